"""Small models in real processes, and the pairs of runs that must agree: for test_distributed.py and benchmarks/equivalences.py.

`RUNS` are what is run, `EQUIVALENCES` which of them agree and how closely. As a program this makes the named runs one after the other and leaves what
they gave in a folder; one process is one rank:

    python tests/distributed_worker.py FOLDER one one_accumulated
    torchrun --nproc_per_node 2 tests/distributed_worker.py FOLDER ddp fsdp2

accelerate (1.15) shards on accelerators only, and with FSDP asked for on a CPU trains with DDP without a word. `shards_on_cpu` makes it take gloo on the
CPU for an accelerator's backend; all that follows is its own FSDP2 code and Trainer's, as it is. Scripts run so, too:

    accelerate launch --config_file examples/accelerate/fsdp2.yaml tests/distributed_worker.py script examples/train_language.py --use_cpu true ...
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from conftest import awake
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQForImageClassification, RevDEQVisionConfig, diagnose
from revdeq_hf.checks_revdeq import GRADIENT_MODES, partitioned
from revdeq_hf.layer_revdeq import fixed_point_layers
from revdeq_hf.optimizers import MuonAdamW

LENGTH, VOCABULARY, CLASSES, SIDE = 12, 64, 5, 8
EVALUATED = 13  # rows, so that the last batch is uneven
SAMPLED: dict[str, Any] = {"steps_sampling": {"distribution": "uniform", "min_steps": 2, "max_steps": 8}}
NOISY = {**SAMPLED, "hidden_dropout": 0.1, "attention_dropout": 0.1}
DEATH = "this block was made to fail"
REFUSED_INSIDE = ("reversible", "implicit")  # gradient modes that take the parameters at the start of a solve
EXAMPLES = Path(__file__).parents[1] / "examples"


# --- what is run ---


@dataclass(frozen=True)
class Run:
    """A training run of transformers' Trainer.

    Attributes:
        ranks, wrapper: processes, and what the model is wrapped in: "none" (one process), "ddp", "fsdp2", "zero2", "zero3" (DeepSpeed's).
        model: "language"; "image", one stage with GroupNorm; "batch_norm", two stages, whose stem and downsampling hold BatchNorm; "frozen_batch_norm",
            the same in evaluation mode.
        batch, accumulation: rows of a micro-batch on each rank, micro-batches of an update.
        rows, repeated, drop_last: rows of the data set, how many of the first stand again at its end, whether an uneven last batch is left out.
        adamw: AdamW with clipped gradients. Else gradient descent without, whose steps are as large as its gradients, so that a wrong scale shows.
        muon: with AdamW, Muon for the matrices.
        bf16: mixed precision.
        smoothing: of the labels.
        diagnosed: afterwards each rank looks into its solves with `diagnose`.
        settings: further ones of the model.
        desynchronised: the other ranks' generators are not where rank 0's is.
        sharded: checkpoints hold shards, as distributed checkpoints do, not whole weights.
        save, resume: update after which a checkpoint is written; run from whose checkpoint this one goes on.
        find_unused: `ddp_find_unused_parameters`; None, Trainer's default, means True for most models.
        dies: in the third update the block fails on the last rank.
    """

    ranks: int = 1
    wrapper: str = "none"
    model: str = "language"
    batch: int = 8
    accumulation: int = 1
    rows: int = 24
    repeated: int = 0
    drop_last: bool = False
    adamw: bool = False
    muon: bool = False
    bf16: bool = False
    smoothing: float = 0.0
    diagnosed: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    desynchronised: bool = False
    sharded: bool = False
    save: int | None = None
    resume: str | None = None
    find_unused: bool | None = False
    dies: bool = False


@dataclass(frozen=True)
class Batch:
    """One batch without Trainer, whose rows the ranks share: the loss, and its gradients by every parameter.

    Attributes:
        wrapper: also "fsdp2_inside", sharded units inside the solve, and "tp", tensor parallelism, in which both ranks have the whole batch.
        settings: of the model.
        refused: it must end in an error, which is what it leaves.
        micro: batches it is divided into; all but the last are gone through without synchronisation (`no_sync`).
        frozen: all but the block, so that what the solve is given has no gradient.
        output_trajectory: the states of all steps are asked for.
    """

    ranks: int = 1
    wrapper: str = "none"
    gradient: str = "reversible"
    micro: int = 1
    refused: bool = False
    frozen: bool = False
    output_trajectory: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Script:
    """An example script, as a user starts it, with one rank by `python`, with two by `accelerate launch` and a shipped configuration."""

    name: str
    flags: dict[str, Any]
    ranks: int = 1
    config: str | None = None


# a batch of 8 in all; gradients clipped and AdamW, as the scripts have it
COMMON: dict[str, Any] = dict(max_steps=6, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm="true", use_cpu="true")
LANGUAGE = Script(
    "train_language.py",
    dict(
        vocab_size=300, block_size=32, hidden_size=32, intermediate_size=64, learning_rate=0.01, max_eval_rows=60, sample_tokens=4, **COMMON
    ),
)
IMAGE = Script(
    "train_image.py",
    dict(preset="paper_cifar10_singlescale", hidden_sizes=16, crop_padding=0, flip="false", per_device_eval_batch_size=64, **COMMON),
)
ONE, DDP, FSDP2, ZERO3 = Run(), Run(2, "ddp", batch=4), Run(2, "fsdp2", batch=4), Run(2, "zero3", batch=4)
LOOKED_INTO = dict(smoothing=0.1, diagnosed=True)
TENSOR_PARALLEL: dict[str, dict[str, Any]] = {
    "paper": dict(block_type="paper", num_block_layers=2),
    "tied": dict(tie_word_embeddings=True, num_key_value_heads=2),
    "stopping": dict(beta=0.8, max_steps=8, tol=4e-4, kv_cache="shared"),
}
RUNS: dict[str, Run | Batch | Script] = {
    "one": ONE,
    "one_accumulated": replace(ONE, batch=2, accumulation=4),
    "one_uneven": replace(ONE, rows=20),
    "one_uneven_accumulated": replace(ONE, rows=20, batch=4, accumulation=2),
    "one_13_and_3_rows": replace(ONE, rows=13, repeated=3),
    "one_drop_last": replace(ONE, rows=19, drop_last=True),
    "one_adamw": replace(ONE, adamw=True),
    "one_sampled": replace(ONE, settings=SAMPLED),
    "one_image": replace(ONE, model="image"),
    "one_image_accumulated": replace(ONE, model="image", batch=2, accumulation=4),
    "one_batch_norm": replace(ONE, model="batch_norm"),
    "one_frozen_batch_norm": replace(ONE, model="frozen_batch_norm"),
    "one_bf16": replace(ONE, bf16=True),
    "one_noisy": replace(ONE, settings=NOISY, adamw=True, save=3),
    "one_noisy_resumed": replace(ONE, settings=NOISY, adamw=True, resume="one_noisy"),
    "one_muon": replace(ONE, adamw=True, muon=True),
    "one_image_muon": replace(ONE, model="image", adamw=True, muon=True),
    "ddp": DDP,
    "ddp_find_unused": replace(DDP, find_unused=None),
    "ddp_accumulated": replace(DDP, batch=2, accumulation=2),
    "ddp_13_rows": replace(DDP, rows=13),
    "ddp_drop_last": replace(DDP, rows=19, drop_last=True),
    "ddp_adamw": replace(DDP, adamw=True),
    "ddp_muon": replace(DDP, adamw=True, muon=True),
    "ddp_sampled": replace(DDP, settings=SAMPLED, desynchronised=True),
    "ddp_image": replace(DDP, model="image"),
    "ddp_smoothed": replace(DDP, **LOOKED_INTO),
    "ddp_batch_norm": replace(DDP, model="batch_norm"),
    "ddp_frozen_batch_norm": replace(DDP, model="frozen_batch_norm"),
    "ddp_bf16": replace(DDP, bf16=True),
    "ddp_noisy": replace(DDP, settings=NOISY, adamw=True, save=3),
    "ddp_noisy_resumed": replace(DDP, settings=NOISY, adamw=True, resume="ddp_noisy"),
    "fsdp2": FSDP2,
    "fsdp2_accumulated": replace(FSDP2, batch=2, accumulation=2),
    "fsdp2_sampled": replace(FSDP2, settings=SAMPLED, desynchronised=True),
    "fsdp2_smoothed": replace(FSDP2, **LOOKED_INTO),
    "fsdp2_image": replace(FSDP2, model="image"),
    "fsdp2_bf16": replace(FSDP2, bf16=True),
    "fsdp2_batch_norm": replace(FSDP2, model="batch_norm"),
    "fsdp2_full": replace(FSDP2, adamw=True, save=3),
    "fsdp2_full_resumed": replace(FSDP2, adamw=True, resume="fsdp2_full"),
    "fsdp2_sharded": replace(FSDP2, adamw=True, save=3, sharded=True),
    "fsdp2_sharded_resumed": replace(FSDP2, adamw=True, resume="fsdp2_sharded", sharded=True),
    "fsdp2_sharded_on_one": replace(FSDP2, ranks=1, batch=8, adamw=True, resume="fsdp2_sharded", sharded=True),
    "fsdp2_muon": replace(FSDP2, adamw=True, muon=True),
    "fsdp2_image_muon": replace(FSDP2, model="image", adamw=True, muon=True, save=3),
    "fsdp2_image_muon_resumed": replace(FSDP2, model="image", adamw=True, muon=True, resume="fsdp2_image_muon"),
    "fsdp2_image_muon_sharded": replace(FSDP2, model="image", adamw=True, muon=True, save=3, sharded=True),
    "fsdp2_image_muon_sharded_resumed": replace(
        FSDP2, model="image", adamw=True, muon=True, resume="fsdp2_image_muon_sharded", sharded=True
    ),
    "ddp_dies": replace(DDP, dies=True),
    "fsdp2_dies": replace(FSDP2, dies=True),
    **{
        f"{gradient}_{kind}": Batch(1 if kind == "none" else 2, kind, gradient)
        for gradient in GRADIENT_MODES
        for kind in ("none", "ddp", "fsdp2")
    },
    **{f"{gradient}_tp": Batch(2, "tp", gradient) for gradient in GRADIENT_MODES},
    **{
        f"{name}_{kind}": Batch(ranks, kind, settings=settings)
        for name, settings in TENSOR_PARALLEL.items()
        for ranks, kind in ((1, "none"), (2, "tp"))
    },
    "tp_heads": Batch(2, "tp", refused=True, settings=dict(num_key_value_heads=1)),
    **{f"{gradient}_zero3": Batch(2, "zero3", gradient) for gradient in GRADIENT_MODES},
    "reversible_zero2": Batch(2, "zero2"),
    "zero3_frozen": Batch(2, "zero3", frozen=True, refused=True),
    "zero3_trajectory": Batch(2, "zero3", output_trajectory=True, refused=True),
    "zero2": replace(ZERO3, wrapper="zero2"),
    "zero3": ZERO3,
    "zero3_accumulated": replace(ZERO3, batch=2, accumulation=2),
    "zero3_image": replace(ZERO3, model="image"),
    "zero3_adamw": replace(ZERO3, adamw=True, save=3),
    "zero3_adamw_resumed": replace(ZERO3, adamw=True, resume="zero3_adamw"),
    "ddp_no_sync": Batch(2, "ddp", micro=2),
    "fsdp2_no_sync": Batch(2, "fsdp2", micro=2),
    **{f"{gradient}_inside": Batch(2, "fsdp2_inside", gradient, refused=gradient in REFUSED_INSIDE) for gradient in GRADIENT_MODES},
    "language_script": LANGUAGE,
    "language_script_ddp": replace(LANGUAGE, ranks=2, config="ddp_cpu.yaml"),
    "language_script_fsdp2": replace(LANGUAGE, ranks=2, config="fsdp2.yaml"),
    "image_script": IMAGE,
    "image_script_ddp": replace(IMAGE, ranks=2, config="ddp_cpu.yaml"),
    "image_script_fsdp2": replace(IMAGE, ranks=2, config="fsdp2.yaml"),
}


# --- the runs ---


def build(kind: str, **settings: Any) -> nn.Module:
    """The small model, of the same weights on every rank and in every run."""
    torch.manual_seed(0)
    settings = {"max_steps": 3, "drift_policy": "raise", **settings}
    if kind == "language":
        shape = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_attention_heads=4, max_position_embeddings=LENGTH)
        return awake(RevDEQForCausalLM(RevDEQConfig(**shape, **settings)))
    stages = (
        dict(hidden_sizes=[16], expansion_ratios=[1], stem="group_norm")
        if kind == "image"
        else dict(hidden_sizes=[16, 16], expansion_ratios=[1, 1])
    )
    model = RevDEQForImageClassification(RevDEQVisionConfig(**stages, image_size=SIDE, group_width=8, num_labels=CLASSES, **settings))
    return keep_statistics(model) if kind == "frozen_batch_norm" else model


def keep_statistics(model: nn.Module) -> nn.Module:
    """BatchNorm stays in evaluation mode, whatever `model.train()` says."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(False)
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    return model


def rows_of(kind: str, count: int, repeated: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows that differ in how many of their labels count, so that a mean of means is not the mean."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        if kind == "language":
            ids = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)
            counted = torch.arange(LENGTH) >= index * 5 % (LENGTH - 2)
            rows.append({"input_ids": ids, "labels": ids.where(counted, -100)})
        else:
            pixels = torch.randn(3, SIDE, SIDE, generator=generator)
            rows.append({"pixel_values": pixels, "labels": torch.tensor(index % CLASSES)})
    return rows + rows[:repeated]


@contextlib.contextmanager
def shards_on_cpu() -> Iterator[None]:
    """accelerate takes gloo on the CPU for an accelerator's backend, and so shards."""
    before, environment = PartialState._prepare_backend, dict(os.environ)
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)  # torchrun has not started this process
        dist.init_process_group("gloo", **alone)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield
    finally:
        PartialState._prepare_backend = before
        for name in set(os.environ) - set(environment):  # ACCELERATE_USE_FSDP and the like
            del os.environ[name]


class Watch(TrainerCallback):
    """Keeps the gradients of every update, the steps of every solve and the greatest drift; lets a block fail."""

    def __init__(self, model: nn.Module, dies: bool, sees_gradients: bool) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.steps: list[int] = []
        self.drift = 0.0
        self.update = 0
        self.sees_gradients = sees_gradients
        self.layers = [layer for _, layer in fixed_point_layers(model)]
        for layer in self.layers:
            layer.register_forward_hook(self._count)
        if dies:
            self.layers[0].block.register_forward_pre_hook(self._fail)

    def _count(self, layer: nn.Module, inputs: Any, solution: Any) -> None:
        if layer.training:
            self.steps.append(solution.evaluations // 2)

    def _fail(self, block: nn.Module, inputs: Any) -> None:
        if self.update == 2 and dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError(DEATH)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.update = state.global_step + 1
        self.drift = max(self.drift, *(float(layer.drift) for layer in self.layers))
        if not self.sees_gradients:
            return
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} got no gradient"
            self.gradients[f"gradient {self.update} {name}"] = whole(parameter.grad)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, of all its shards where it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def zero_settings(stage: str) -> dict[str, Any]:
    """A configuration of DeepSpeed. Parameters as small as these would all stay whole; gradients are clipped unless told otherwise."""
    zero = {"stage": int(stage[-1]), **({"stage3_param_persistence_threshold": 0} if stage == "zero3" else {})}
    automatic = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **automatic}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and statistics, without counters."""
    if partitioned(model.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    return {name: whole(tensor).contiguous() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def train(name: str, run: Run, folder: Path) -> None:
    """Makes a run and leaves in `folder` NAME.json and NAME.safetensors, and the steps of the other ranks in NAME.1.json and so on."""
    model = build(run.model, **run.settings)
    before = weights_of(model)
    sharding: dict[str, Any] = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT" if run.sharded else "FULL_STATE_DICT"}
    arguments = TrainingArguments(
        output_dir=str(folder / name),
        per_device_train_batch_size=run.batch,
        per_device_eval_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulation,
        num_train_epochs=2,
        dataloader_drop_last=run.drop_last,
        # where the rows do not come out even, their order must be the data set's, so that what is repeated can be told
        train_sampling_strategy="sequential" if run.rows % 8 else "random",
        optim="adamw_torch" if run.adamw else "sgd",
        bf16=run.bf16,
        label_smoothing_factor=run.smoothing,
        learning_rate=0.01 if run.adamw else 0.3,
        max_grad_norm=1.0 if run.adamw else 0.0,
        logging_steps=1,
        save_strategy="no" if run.save is None else "steps",
        save_steps=run.save or 500,
        use_cpu=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=run.find_unused if run.wrapper == "ddp" else None,
        report_to=[],
        disable_tqdm=True,
        deepspeed=zero_settings(run.wrapper) if run.wrapper.startswith("zero") else None,
        fsdp=run.wrapper == "fsdp2" or None,
        fsdp_config=sharding if run.wrapper == "fsdp2" else None,
    )
    watch = Watch(model, run.dies, not run.wrapper.startswith("zero"))  # DeepSpeed has made its step by then
    rows = rows_of(run.model, run.rows, run.repeated)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows_of(run.model, EVALUATED),
        callbacks=[watch],
        optimizer_cls_and_kwargs=(lambda: MuonAdamW, dict(lr=0.01, muon_lr=0.01)) if run.muon else None,
    )
    if arguments.world_size != run.ranks:
        raise RuntimeError(f"{name} is a run of {run.ranks} ranks, got {arguments.world_size}")
    if run.desynchronised:
        torch.rand(7 * arguments.process_index)
    trainer.train(resume_from_checkpoint=None if run.resume is None else str(folder / run.resume / f"checkpoint-{RUNS[run.resume].save}"))
    if run.wrapper.startswith("zero"):
        assert trainer.model_wrapped.zero_optimization_stage() == int(run.wrapper[-1])
        assert partitioned(trainer.model.parameters()) == (run.wrapper == "zero3")
    else:
        wrapped = {"none": nn.Module, "ddp": DistributedDataParallel, "fsdp2": FSDPModule}[run.wrapper]
        assert isinstance(trainer.model_wrapped, wrapped), f"{name} ran in {type(trainer.model_wrapped).__name__}"
    if run.wrapper == "fsdp2":  # law 11
        assert all(isinstance(layer, FSDPModule) for _, layer in fixed_point_layers(trainer.model)), "a solve is no unit of its own"
        assert not any(isinstance(module, FSDPModule) for _, layer in fixed_point_layers(trainer.model) for module in layer.block.modules())
    if run.wrapper == "ddp":
        assert trainer.model_wrapped.find_unused_parameters == (run.find_unused is None)
    predictions = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)
    weights = weights_of(trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    moved = max(float((weights[key].double() - before[key].double()).abs().max()) for key in weights)
    figures = {"losses": losses, "steps": watch.steps, "drift": watch.drift, "moved": moved}
    if run.diagnosed:
        looks = diagnose(trainer.model, input_ids=torch.stack([row["input_ids"] for row in rows[:4]]))
        assert isinstance(looks, dict)
        figures |= {
            "radius": [look.spectral_radius.tolist() for look in looks.values()],
            "looked_drift": [look.drift for look in looks.values()],
        }
        assert all(isinstance(parameter, DTensor) == (run.wrapper == "fsdp2") for parameter in trainer.model.parameters()), (
            "weights were left whole"
        )
    tensors = {**watch.gradients, **{f"weight {key}": value for key, value in weights.items()}, "predictions": predictions}
    leave(folder, name, figures, tensors)
    if run.save is not None:
        trainer.save_model(str(folder / name / "final"))


def go_through(name: str, run: Batch, folder: Path) -> None:
    """Gradients of one batch; twice, since DistributedDataParallel finds out in the second pass which parameters the first one left out."""
    model: Any = build("language", gradient=run.gradient, num_prelude_layers=1, num_coda_layers=1, **run.settings)
    rank = dist.get_rank() if run.ranks > 1 else 0
    ids = torch.randint(0, VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(2))
    mine = [ids] if run.wrapper == "tp" else ids.chunk(run.ranks)[rank].chunk(run.micro)
    wrapped = model
    if run.wrapper == "tp":
        if rank == 0:
            model.save_pretrained(folder / name)
        dist.barrier()
        wrapped = model = RevDEQForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(tp_size=2)).train()
        sharded = {key.split(".")[-2] for key, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
        assert sharded >= {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj"}, sharded
    if run.frozen:
        model.requires_grad_(False).model.solve.requires_grad_(True)
    if run.wrapper.startswith("zero"):
        return go_through_zero(name, run, folder, model, ids)
    if run.wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    elif run.wrapper == "fsdp2_inside":
        for module in model.model.solve.block.layers:
            fully_shard(module)
        wrapped = fully_shard(model)
    elif run.wrapper == "fsdp2":
        for module in [module for module in model.modules() if type(module).__name__ in model._no_split_modules]:
            fully_shard(module)
        wrapped = fully_shard(model)
    for _ in range(2):
        model.zero_grad()
        losses = []
        for index, part in enumerate(mine):
            last = index == run.micro - 1
            if run.wrapper == "fsdp2":
                wrapped.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or run.wrapper != "ddp" else wrapped.no_sync():
                outputs = wrapped(input_ids=part, labels=part)
                assert (outputs.logits is None) == (run.wrapper != "tp"), "a head that ranks share for good needs logits, no other does"
                loss = outputs.loss / run.micro
                loss.backward()
            losses.append(float(loss.detach()))
            if not last and run.wrapper == "ddp":  # or there is nothing to put off
                local = model.lm_head.weight.grad.clone()
                dist.broadcast(local, src=0)
                assert rank == 0 or not torch.equal(local, model.lm_head.weight.grad), "the ranks' gradients were exchanged inside no_sync"
    total = torch.tensor(sum(losses), dtype=torch.float64)
    if run.ranks > 1:
        dist.all_reduce(total)
    gradients = {}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{key} got no gradient"
        gradients[f"gradient 1 {key}"] = whole(parameter.grad)
    figures: dict[str, Any] = {
        "losses": [float(total) / run.ranks],
        "steps": [],
        "drift": float(model.model.solve.drift),
        "moved": 0.0,
    }
    if run.wrapper in ("none", "tp"):
        model.eval()
        with torch.no_grad():
            outputs = model(ids, output_solver_stats=True)
            figures["tokens"] = model.generate(ids[:, :5], max_new_tokens=6, do_sample=False).tolist()
        gradients["predictions"], figures["solver_steps"] = outputs.logits, outputs.solver_steps.tolist()
    if run.wrapper == "tp":
        model.save_pretrained(folder / f"{name}_again")
    leave(folder, name, figures, gradients)


def go_through_zero(name: str, run: Batch, folder: Path, model: Any, ids: torch.Tensor) -> None:
    """The same with DeepSpeed, which makes a step of none, since it lets go of gradients in its steps alone."""
    import deepspeed

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    settings = {**zero_settings(run.wrapper), "train_micro_batch_size_per_gpu": 4, "train_batch_size": 8, "gradient_accumulation_steps": 1}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**settings, "gradient_clipping": 0.0})
    mine = ids.chunk(run.ranks)[dist.get_rank()]
    for _ in range(2):
        loss = engine(input_ids=mine, labels=mine, output_trajectory=run.output_trajectory).loss
        engine.backward(loss)
        names = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        gradients = {key: deepspeed.utils.safe_get_full_grad(model.get_parameter(key)).clone() for key in names}
        engine.step()
    total = loss.detach().double()
    dist.all_reduce(total)
    figures = {"losses": [float(total) / run.ranks], "steps": [], "drift": float(model.model.solve.drift), "moved": 0.0}
    leave(folder, name, figures, {f"gradient 1 {key}": value for key, value in gradients.items()})


def be_refused(name: str, run: Batch, folder: Path) -> None:
    """Leaves the error of a batch that must not go through."""
    try:
        go_through(name, run, folder)
    except (RuntimeError, ValueError) as error:
        leave(folder, name, {"error": str(error)}, {"nothing": torch.zeros(0)})
    else:
        raise AssertionError(f"{name} went through")


def leave(folder: Path, name: str, figures: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / (f"{name}.{rank}.json" if rank else f"{name}.json")).write_text(json.dumps(figures), encoding="utf-8")


def main(folder: Path, names: Sequence[str]) -> None:
    if any(isinstance(RUNS[name], Batch) and RUNS[name].ranks > 1 for name in names):
        dist.init_process_group("gloo")
    for name in names:
        run = RUNS[name]
        assert not isinstance(run, Script), f"{name} is a script, see launch_script"
        if isinstance(run, Batch):
            (be_refused if run.refused else go_through)(name, run, folder)
            continue
        with shards_on_cpu() if run.wrapper == "fsdp2" else contextlib.nullcontext():
            train(name, run, folder)


# --- what must agree ---


@dataclass(frozen=True)
class Equivalence:
    """Two runs that must agree.

    Attributes:
        tolerance: greatest difference allowed of losses, gradients, final weights and predictions, each as a share of the greatest loss, gradient, change
            of a weight in training and prediction. 0: none in any bit. None: they need not agree, and the text says why.
    """

    text: str
    run: str
    other: str
    tolerance: float | None = 1e-5


def _of_batches() -> Iterator[Equivalence]:
    for gradient in GRADIENT_MODES:
        yield Equivalence(f"one batch, gradient={gradient!r}: tensor parallel on two ranks; one rank", f"{gradient}_tp", f"{gradient}_none")
    for name, settings in TENSOR_PARALLEL.items():
        told = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        yield Equivalence(f"one batch, {told}: tensor parallel on two ranks; one rank", f"{name}_tp", f"{name}_none")
    for gradient in GRADIENT_MODES:
        for kind, text in (("ddp", "DDP"), ("fsdp2", "FSDP2")):
            yield Equivalence(f"one batch, gradient={gradient!r}: two {text} ranks; one rank", f"{gradient}_{kind}", f"{gradient}_none")
    for gradient in GRADIENT_MODES:
        if gradient not in REFUSED_INSIDE:
            text = f"one batch, gradient={gradient!r}: two FSDP2 ranks, units inside the solve; one rank"
            yield Equivalence(text, f"{gradient}_inside", f"{gradient}_none")
    yield Equivalence("one batch: two DDP ranks, two micro-batches, the first in `no_sync`; one rank", "ddp_no_sync", "reversible_none")
    yield Equivalence(
        "one batch: two FSDP2 ranks, two micro-batches, the first not synchronised; one rank", "fsdp2_no_sync", "reversible_none"
    )


EQUIVALENCES = (
    *_of_batches(),
    Equivalence("language model: two DDP ranks; one rank with twice the batch", "ddp", "one"),
    Equivalence("language model: two FSDP2 ranks; one rank with twice the batch", "fsdp2", "one"),
    Equivalence("two FSDP2 ranks; two DDP ranks", "fsdp2", "ddp", 0),
    Equivalence("smoothed labels: two FSDP2 ranks; two DDP ranks", "fsdp2_smoothed", "ddp_smoothed", 0),
    Equivalence("two DDP ranks with `find_unused_parameters`; without", "ddp_find_unused", "ddp", 0),
    Equivalence("AdamW, clipped gradients: two DDP ranks; one rank", "ddp_adamw", "one_adamw", 1e-4),
    Equivalence("AdamW, clipped gradients: two FSDP2 ranks; one rank", "fsdp2_full", "one_adamw", 1e-4),
    Equivalence("Muon (orthogonalises in bfloat16): two DDP ranks; one rank", "ddp_muon", "one_muon", 0.05),
    Equivalence("Muon (orthogonalises in bfloat16): two FSDP2 ranks; one rank", "fsdp2_muon", "one_muon", 0.05),
    Equivalence("Muon of convolutions (orthogonalises in bfloat16): two FSDP2 ranks; one rank", "fsdp2_image_muon", "one_image_muon", 0.05),
    Equivalence("4 accumulated micro-batches; one batch", "one_accumulated", "one"),
    Equivalence("two DDP ranks, 2 accumulated micro-batches each; one batch", "ddp_accumulated", "one"),
    Equivalence("two FSDP2 ranks, 2 accumulated micro-batches each; one batch", "fsdp2_accumulated", "one"),
    Equivalence("sampled steps: two DDP ranks whose generators differ; one rank", "ddp_sampled", "one_sampled"),
    Equivalence("sampled steps: two FSDP2 ranks whose generators differ; one rank", "fsdp2_sampled", "one_sampled"),
    Equivalence("13 rows on two ranks; those 13 and the first 3 again on one", "ddp_13_rows", "one_13_and_3_rows"),
    Equivalence("19 rows, `drop_last`: two DDP ranks; one rank", "ddp_drop_last", "one_drop_last"),
    Equivalence("20 rows, 2 accumulated micro-batches of 4, at the end 1; batches of 8, 8 and 4", "one_uneven_accumulated", "one_uneven"),
    Equivalence("image model with GroupNorm: two DDP ranks; one rank", "ddp_image", "one_image"),
    Equivalence("image model with GroupNorm: two FSDP2 ranks; one rank", "fsdp2_image", "one_image"),
    Equivalence("image model with GroupNorm: 4 accumulated micro-batches; one batch", "one_image_accumulated", "one_image"),
    Equivalence("image model, BatchNorm in evaluation mode: two DDP ranks; one rank", "ddp_frozen_batch_norm", "one_frozen_batch_norm"),
    Equivalence(
        "image model with BatchNorm: two DDP ranks; one rank (statistics are each rank's own)", "ddp_batch_norm", "one_batch_norm", None
    ),
    Equivalence(
        "image model with BatchNorm: two FSDP2 ranks; one rank (statistics are each rank's own)", "fsdp2_batch_norm", "one_batch_norm", None
    ),
    Equivalence(
        "image model with BatchNorm: two FSDP2 ranks; two DDP ranks (those of DDP begin each update with rank 0's)",
        "fsdp2_batch_norm",
        "ddp_batch_norm",
        None,
    ),
    Equivalence("bfloat16: two DDP ranks; one rank (rounding of bfloat16)", "ddp_bf16", "one_bf16", 0.05),
    Equivalence(
        "bfloat16: two FSDP2 ranks; one rank (FSDP2 also rounds x, the loss and the sums of gradients)", "fsdp2_bf16", "one_bf16", 0.05
    ),
    Equivalence("resumed with dropout and sampled steps, one rank; not stopped", "one_noisy_resumed", "one_noisy", 0),
    Equivalence("resumed with dropout and sampled steps, two DDP ranks; not stopped", "ddp_noisy_resumed", "ddp_noisy", 0),
    Equivalence("resumed from whole weights, two FSDP2 ranks; not stopped", "fsdp2_full_resumed", "fsdp2_full", 0),
    Equivalence("resumed from shards, two FSDP2 ranks; not stopped", "fsdp2_sharded_resumed", "fsdp2_sharded", 0),
    Equivalence("resumed on one rank from the shards of two; two ranks, not stopped", "fsdp2_sharded_on_one", "fsdp2_sharded"),
    Equivalence("Muon resumed from whole weights, two FSDP2 ranks; not stopped", "fsdp2_image_muon_resumed", "fsdp2_image_muon", 0),
    Equivalence("Muon resumed from shards, two FSDP2 ranks; not stopped", "fsdp2_image_muon_sharded_resumed", "fsdp2_image_muon", 0),
    Equivalence("checkpoints in shards; whole", "fsdp2_sharded", "fsdp2_full", 0),
    Equivalence("Muon, checkpoints in shards; whole", "fsdp2_image_muon_sharded", "fsdp2_image_muon", 0),
)
ZERO_EQUIVALENCES = (  # where DeepSpeed is installed
    *(
        Equivalence(f"one batch, gradient={gradient!r}: two ZeRO-3 ranks; one rank", f"{gradient}_zero3", f"{gradient}_none")
        for gradient in GRADIENT_MODES
    ),
    Equivalence("one batch, gradient='reversible': two ZeRO-2 ranks; one rank", "reversible_zero2", "reversible_none"),
    Equivalence("language model: two ZeRO-2 ranks; one rank with twice the batch", "zero2", "one"),
    Equivalence("language model: two ZeRO-3 ranks; one rank with twice the batch", "zero3", "one"),
    Equivalence("two ZeRO-3 ranks, 2 accumulated micro-batches each; one batch", "zero3_accumulated", "one"),
    Equivalence("image model with GroupNorm: two ZeRO-3 ranks; one rank", "zero3_image", "one_image"),
    Equivalence("AdamW, clipped gradients: two ZeRO-3 ranks; one rank", "zero3_adamw", "one_adamw", 1e-4),
    Equivalence("resumed, two ZeRO-3 ranks; not stopped", "zero3_adamw_resumed", "zero3_adamw", 0),
)
SCRIPT_EQUIVALENCES = tuple(
    Equivalence(f"`examples/{script.name}`: `accelerate launch --config_file {config}`; `python`", f"{name}_{kind}", name, 1e-4)
    for name, script in (("language_script", LANGUAGE), ("image_script", IMAGE))
    for kind, config in (("ddp", "ddp_cpu.yaml"), ("fsdp2", "fsdp2.yaml"))
)


def launch(ranks: int, folder: Path, names: Sequence[str], timeout: float = 300) -> subprocess.CompletedProcess:
    """Makes runs in a process of their own, or with 2 ranks in two that torchrun starts; the output is theirs, errors included."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return start([sys.executable, *torchrun, __file__, str(folder), *names], timeout)


def start(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess:
    """Runs a command with one thread, its error output in with the other.

    Raises:
        subprocess.TimeoutExpired: it, and all that it has started, was ended.
    """
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(list(command), process.returncode, output)


def launch_all(folder: Path, names: Sequence[str]) -> None:
    """Makes runs of both kinds of `launch`: first those of two ranks, then those of one, which may go on from a checkpoint of two.

    Raises:
        RuntimeError: they failed.
    """
    for ranks, deepspeed in ((2, True), (2, False), (1, False)):  # a process that has once trained with DeepSpeed does so with all
        those = [name for name in names if (RUNS[name].ranks, RUNS[name].wrapper.startswith("zero")) == (ranks, deepspeed)]  # type: ignore[union-attr]
        # a process that has once been a rank remains one
        those.sort(key=lambda name: (RUNS[name].wrapper == "fsdp2", getattr(RUNS[name], "resume", None) is not None))  # type: ignore[union-attr]
        if those:
            _must_succeed(launch(ranks, folder, those))


def launch_script(folder: Path, name: str, timeout: float = 200) -> None:
    """Runs a script and leaves its losses, its saved weights and those it began with, as other runs do.

    Raises:
        RuntimeError: it failed.
    """
    script, output = RUNS[name], folder / name
    assert isinstance(script, Script)
    corpus = folder / "corpus.txt"
    corpus.write_text((Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    launcher = [sys.executable]
    if script.config is not None:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "accelerate" / script.config)]
    flags = {**script.flags, "output_dir": output, "per_device_train_batch_size": 8 // script.ranks}
    if script.name == "train_language.py":
        flags["train_file"] = corpus
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    _must_succeed(start([*launcher, __file__, "script", str(EXAMPLES / script.name), *words], timeout))
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    weights = load_file(output / "model.safetensors")
    # what a weight is worth, since what it began as is not kept
    moved = max(float(tensor.abs().max()) for tensor in weights.values())
    figures = {"losses": losses, "steps": [], "drift": results["greatest_drift"], "moved": moved}
    leave(folder, name, figures, {f"weight {key}": value for key, value in weights.items()})


def _must_succeed(done: subprocess.CompletedProcess) -> None:
    if done.returncode:
        first = max(done.stdout.find("Traceback"), 0)
        raise RuntimeError(f"{' '.join(map(str, done.args))} failed with {done.returncode}:\n{done.stdout[first:][:6000]}")


def figures_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def difference(folder: Path, pair: Equivalence) -> dict[str, float]:
    """Greatest absolute differences of two runs in losses, gradients, weights and predictions, and what to measure them by (`..._scale`).

    A run that was resumed has the gradients of its own updates only, and those are compared.
    """
    run, other = (figures_of(folder, name) for name in (pair.run, pair.other))
    tensors, others = (load_file(folder / f"{name}.safetensors") for name in (pair.run, pair.other))
    if len(run["losses"]) != len(other["losses"]):
        raise AssertionError(f"{pair.run} has {len(run['losses'])} losses, {pair.other} {len(other['losses'])}")
    found = {
        "losses": max(abs(a - b) for a, b in zip(run["losses"], other["losses"], strict=True)),
        "losses_scale": max(map(abs, other["losses"])),
    }
    for kind in ("gradient", "weight", "predictions"):
        keys, expected = ({key for key in kept if key.startswith(kind)} for kept in (tensors, others))
        if not keys:  # DeepSpeed's are gone with its step
            continue
        if keys != expected and not (keys < expected and kind == "gradient" and RUNS[pair.run].resume is not None):  # type: ignore[union-attr]
            raise AssertionError(f"{pair.run} and {pair.other} differ in their {kind}: {sorted(keys ^ expected)[:4]}")
        found[kind] = max(float((tensors[key].double() - others[key].double()).abs().max()) for key in keys)
        found[f"{kind}_scale"] = other["moved"] if kind == "weight" else max(float(others[key].abs().max()) for key in keys)
    return found


def worst(found: dict[str, float]) -> float:
    """The greatest difference as a share of its scale."""
    return max(found[kind] / found[f"{kind}_scale"] for kind in found if f"{kind}_scale" in found)


if __name__ == "__main__":
    if sys.argv[1] == "script":
        sys.argv = sys.argv[2:]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        with shards_on_cpu() if os.environ.get("ACCELERATE_USE_FSDP") == "true" else contextlib.nullcontext():
            runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads race with the end of the interpreter: now and then it hangs or aborts after all is done
