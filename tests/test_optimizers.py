"""Muon and AdamW as one optimizer: which parameters each has, the same updates as the two by themselves, schedules, checkpoints, resumed runs."""

import copy
import importlib
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForTokenClassification, get_scheduler

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQForImageClassification, RevDEQVisionConfig
from revdeq_hf.optimizers import MuonAdamW, muon_adamw

SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_attention_heads=2)


def looped(**settings) -> RevDEQForCausalLM:
    torch.manual_seed(0)
    return RevDEQForCausalLM(RevDEQConfig(**SIZES, max_steps=2, **settings))


def names(model: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if any(parameter is other for other in parameters)}


def update(model: torch.nn.Module, *optimizers: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(seed))
    model(ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_matrices_of_the_body_are_muons_and_each_parameter_has_one_place():
    model = looped(num_prelude_layers=1)
    model.model.solve.block.layers[0].mlp.up_proj.weight.requires_grad_(False)
    optimizer = MuonAdamW(model, 1e-3, 1e-2, weight_decay=0.1)
    matrices = names(model, optimizer.muon.param_groups[0]["params"])
    assert all(name.endswith("proj.weight") for name in matrices)
    assert {name.split(".")[1] for name in matrices} == {"solve", "prelude"}
    assert "model.solve.block.layers.0.mlp.up_proj.weight" not in matrices
    decayed, plain = optimizer.adamw.param_groups
    assert names(model, decayed["params"]) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held}) == sum(p.requires_grad for p in model.parameters())


class Wrapped(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module):  # without a process group
        torch.nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
def test_heads_are_adamws_whatever_the_model_is_wrapped_in(adapted, distributed):
    model = looped()
    if adapted:
        peft = pytest.importorskip("peft", reason="needs peft: pip install 'revdeq_hf[finetune]'")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2))
    if distributed:
        model = Wrapped(model)
    optimizer = MuonAdamW(model, 1e-3, 1e-2)
    assert not any("lm_head" in name for name in names(model, optimizer.muon.param_groups[0]["params"]))
    assert any("lm_head" in name for name in names(model, optimizer.adamw.param_groups[0]["params"]))


def test_an_attribute_named_module_is_no_wrapper():
    model = torch.nn.ModuleDict({"module": torch.nn.Linear(3, 3), "other": torch.nn.Linear(3, 3)})
    assert len(MuonAdamW(model, 1e-3, 1e-2).muon.param_groups[0]["params"]) == 2


def test_updates_are_those_of_torchs_two():
    model, other = looped(), looped()
    both = MuonAdamW(model, 1e-3, 1e-2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    matrices = [p for name, p in other.named_parameters() if name in names(model, both.param_groups[0]["params"])]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in other.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.9), eps=1e-6)
    start = copy.deepcopy(model)
    for seed in range(4):
        update(model, both, seed=seed)
        update(other, muon, adamw, seed=seed)
        assert same(model, other)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


def test_a_schedule_moves_both_rates_and_a_state_goes_on_where_it_was():
    model = looped()
    optimizer = MuonAdamW(model, 1e-3, 1e-2)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for seed in range(3):
        update(model, optimizer, seed=seed)
        schedule.step()
    assert [group["lr"] for group in (*optimizer.muon.param_groups, *optimizer.adamw.param_groups)] == pytest.approx(
        [2.5e-3, 2.5e-4, 2.5e-4]
    )
    other = copy.deepcopy(model)
    resumed = MuonAdamW(other, 1.0, 1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (3, 4):
        update(model, optimizer, seed=seed)
        update(other, resumed, seed=seed)
    assert same(model, other)


def test_a_closure_is_called_once_and_its_loss_returned():
    model, calls = looped(), []

    def closure() -> float:
        calls.append(1)
        ids = torch.arange(12)[None]
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.item()

    assert MuonAdamW(model, 1e-3, 1e-2).step(closure) > 0
    assert len(calls) == 1


def images_model() -> RevDEQForImageClassification:
    torch.manual_seed(0)
    sizes = dict(hidden_sizes=[16, 32], expansion_ratios=[1, 3], max_steps=2, block_type="modern", num_labels=3)
    return RevDEQForImageClassification(RevDEQVisionConfig(**sizes))


def test_a_row_of_a_convolution_is_a_filter_and_convolutions_in_groups_are_adamws():
    model = images_model()
    optimizer = MuonAdamW(model, 1e-3, 1e-2)
    matrices = names(model, optimizer.muon.param_groups[0]["params"])
    assert matrices == {name for name, p in model.named_parameters() if p.dim() == 4 and "depthwise" not in name}
    assert {name.rsplit(".", 2)[-2] for name in matrices} >= {"0", "conv1", "conv2", "shortcut", "up_proj", "down_proj"}
    weight = model.model.stages[1].block.up_proj.weight
    weight.grad = torch.randn(weight.shape)
    start, shape = weight.detach().clone(), weight.shape
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    matrix.grad = weight.grad.flatten(1).clone()
    torch.optim.Muon([matrix], lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    address, gradient = weight.data_ptr(), weight.grad
    optimizer.step()
    assert torch.equal(weight.flatten(1), matrix)
    assert not torch.equal(weight, start)
    assert (weight.shape, weight.data_ptr(), weight.grad is gradient, gradient.shape) == (shape, address, True, shape)


def test_the_memory_format_changes_neither_updates_nor_states():
    model = images_model()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    one, other = MuonAdamW(model, 1e-3, 1e-2), MuonAdamW(last, 1e-3, 1e-2)
    for seed in range(3):
        pixels = torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(seed))
        model(pixels, labels=torch.arange(4) % 3).loss.backward()
        for parameter, twin in zip(model.parameters(), last.parameters(), strict=True):  # the same, since kernels round differently
            twin.grad = torch.empty_like(twin).copy_(parameter.grad)
        for optimizer in (one, other):
            optimizer.step()
        model.zero_grad()
    assert same(model, last)
    wide = last.model.downsamples[0].conv1.weight
    assert wide.is_contiguous(memory_format=torch.channels_last)
    assert not wide.is_contiguous()
    states = [[state.get("momentum_buffer") for state in optimizer.state_dict()["state"].values()] for optimizer in (one, other)]
    pairs = [(a, b) for a, b in zip(*states, strict=True) if a is not None]
    assert len(pairs) == len(one.muon.param_groups[0]["params"])
    assert all(torch.equal(a, b) for a, b in pairs)
    twin = copy.deepcopy(model)
    resumed = MuonAdamW(twin, 1.0, 1.0)
    resumed.load_state_dict(copy.deepcopy(other.state_dict()))  # of the other format
    for trained, by in ((model, one), (twin, resumed)):
        pixels = torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(3))
        trained(pixels, labels=torch.arange(4) % 3).loss.backward()
        by.step()
    assert same(model, twin)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal])
def test_parametrised_weights_are_adamws(wrap):
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(6, 6)), nn.Linear(6, 6))
    optimizer = MuonAdamW(model, lr=1e-2, muon_lr=1e-2)
    assert optimizer.muon.param_groups[0]["params"] == [model[1].weight]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_explicit_models_too_and_networks_without_matrices_are_told():
    model = LlamaForTokenClassification(LlamaConfig(**SIZES, num_hidden_layers=2, num_labels=3))
    matrices = names(model, MuonAdamW(model, 1e-3, 1e-2).muon.param_groups[0]["params"])
    assert len(matrices) == 2 * 7
    assert not any("score" in name or "embed" in name for name in matrices)
    older = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    )  # whose linear layers are another class
    matrices = names(older, MuonAdamW(older, 1e-3, 1e-2).muon.param_groups[0]["params"])
    assert len(matrices) == 2 * 4
    assert all("attn" in name or "mlp" in name for name in matrices)
    with pytest.raises(ValueError, match="needs linear layers or convolutions"):
        MuonAdamW(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.LayerNorm(4)), 1e-3, 1e-2)


@pytest.mark.parametrize(
    ("schedule", "settings"),
    [("polynomial", {"lr_end": 1e-3}), ("cosine_with_min_lr", {"min_lr": 1e-3}), ("cosine_with_min_lr", {"min_lr_rate": 0.1})],
)
def test_schedules_that_end_at_a_rate_of_their_own(schedule, settings):
    """They ask the optimizer for its rate, AdamW's; Muon's falls by the same share."""
    optimizer = MuonAdamW(looped(), 1e-2, 2e-2)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = get_scheduler(schedule, optimizer, 2, 10, scheduler_specific_kwargs=settings)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert {2e-2, 1e-2} == set(rates)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        assert group["lr"] == pytest.approx(0.1 * rate)


def test_matrices_alone():
    """As of adapters, and where all else is frozen at first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model.requires_grad_(False)
    model[0].weight.requires_grad_(True)
    optimizer = MuonAdamW(model, 1e-2, 2e-2, weight_decay=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    model[1].bias.requires_grad_(True)
    optimizer.add_param_group({"params": [model[1].bias]})
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])} == {"0.weight", "1.bias"}
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(2e-2, 0.1), (1e-2, 0.0)]
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in twin.param_groups] == [2e-2, 1e-2]


def test_a_group_that_is_added_later_is_trained_by_the_one_it_belongs_to():
    model = looped(num_prelude_layers=1)
    prelude = list(model.model.prelude.parameters())
    for parameter in prelude:
        parameter.requires_grad_(False)
    optimizer = MuonAdamW(model, 1e-3, 1e-2, weight_decay=0.1)
    update(model, optimizer, seed=0)
    for parameter in prelude:
        parameter.requires_grad_(True)
    before = copy.deepcopy(prelude)
    with pytest.raises(ValueError, match="add two groups"):
        optimizer.add_param_group({"params": prelude})
    optimizer.add_param_group({"params": [parameter for parameter in prelude if parameter.dim() > 1], "lr": 0.02})
    optimizer.add_param_group({"params": [parameter for parameter in prelude if parameter.dim() == 1]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": prelude[:1]})
    update(model, optimizer, seed=1)
    assert not any(torch.equal(parameter, old) for parameter, old in zip(prelude, before, strict=True))
    matrices, vectors = optimizer.param_groups[-2:]
    assert optimizer.muon.param_groups == [optimizer.param_groups[0], matrices]
    assert optimizer.adamw.param_groups == [*optimizer.param_groups[1:3], vectors]
    assert [(group["lr"], group["weight_decay"]) for group in (matrices, vectors)] == [(0.02, 0.1), (1e-3, 0.0)]
    twin, resumed = copy.deepcopy((model, optimizer))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for trained, by in ((model, optimizer), (twin, resumed)):
        update(trained, by, seed=2)
    assert same(model, twin)


def test_a_group_that_sets_betas_is_adamws():
    model = looped(num_prelude_layers=1)
    model.model.prelude.requires_grad_(False)
    optimizer = MuonAdamW(model, 1e-3, 1e-2, weight_decay=0.1)
    model.model.prelude.requires_grad_(True)
    optimizer.add_param_group({"params": model.model.prelude.parameters(), "betas": (0.8, 0.9)})
    before = copy.deepcopy(model.model.prelude)
    update(model, optimizer, seed=0)
    assert len(optimizer.muon.param_groups) == 1
    assert optimizer.adamw.param_groups[-1]["weight_decay"] == 0.1
    assert not any(torch.equal(a, b) for a, b in zip(before.parameters(), model.model.prelude.parameters(), strict=True))


# unpickled are bytes made a moment before, to see what torch.multiprocessing would hand on
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(copied):
    model = looped()
    optimizer = MuonAdamW(model, 1e-3, 1e-2, weight_decay=0.1)
    update(model, optimizer, seed=0)
    twin, twins = copied((model, optimizer))
    start = copy.deepcopy(model)
    for seed in (1, 2):
        update(twin, twins, seed=seed)
    assert same(model, start)
    for seed in (1, 2):
        update(model, optimizer, seed=seed)
    assert same(model, twin)
    assert twins.muon.state is twins.adamw.state is twins.state
    assert twins.param_groups[0] is twins.muon.param_groups[0]


@pytest.mark.usefixtures("scripts")
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path):
    language = importlib.import_module("train_language")
    (tmp_path / "text.txt").write_text("".join(f"{number} and {number * 7 % 13}\n" for number in range(400)))
    flags = [
        "--train_file",
        str(tmp_path / "text.txt"),
        "--vocab_size",
        "270",
        "--block_size",
        "16",
        "--hidden_size",
        "16",
        "--intermediate_size",
        "32",
    ]
    flags += ["--muon_learning_rate", "0.02", "--max_steps", "6", "--save_steps", "3", "--logging_steps", "1", "--sample_tokens", "0"]
    flags += ["--report_to", "none", "--disable_tqdm", "true", "--output_dir"]
    language.main([*flags, str(tmp_path / "whole")])
    again = tmp_path / "again"
    language.main([*flags, str(again), "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-3")])
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    language.main([*flags, str(tmp_path / "adamw"), "--muon_learning_rate", "1e-3"])
    changed = load_file(tmp_path / "adamw" / "model.safetensors")
    assert not all(torch.equal(value, changed[name]) for name, value in one.items())
    assert [muon_adamw(SimpleNamespace(muon_learning_rate=rate)) for rate in (None, 0.0)] == [None, None]
    history = json.loads((again / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["step"] == 6
