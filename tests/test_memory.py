"""Does the predicted memory of a training step equal what a step takes?"""

import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQForImageClassification, RevDEQVisionConfig
from revdeq_hf import memory as planner
from revdeq_hf.memory import OPTIMIZERS, MemoryPlan, advise, load_config, main, parse_bytes, plan_memory, show_bytes
from revdeq_hf.training import peak_memory


def text(**kwargs) -> RevDEQConfig:
    small = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_attention_heads=4, max_steps=2)
    return RevDEQConfig(**{**small, **kwargs})


def images(**kwargs) -> RevDEQVisionConfig:
    return RevDEQVisionConfig(**{**dict(hidden_sizes=[16, 32], expansion_ratios=[2, 1], max_steps=2, num_labels=10), **kwargs})


def measured(config, batch_size, length=None, precision="fp32", optimizer="adamw_torch_fused", micro_batches=1, padded=False) -> int:
    """The most bytes that torch's allocator has handed out in the second training step, written out as one would."""
    vision = isinstance(config, RevDEQVisionConfig)
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    model = (RevDEQForImageClassification if vision else RevDEQForCausalLM)._from_config(config, dtype=dtype).train()
    update = OPTIMIZERS[optimizer](model.parameters())

    def batch():
        if vision:
            pixels = torch.randn(batch_size, config.num_channels, config.image_size, config.image_size)
            return dict(pixel_values=pixels, labels=torch.randint(config.num_labels, (batch_size,)))
        ids = torch.randint(config.vocab_size, (batch_size, length))
        mask = {"attention_mask": (torch.arange(length) < length - 3).long().repeat(batch_size, 1)} if padded else {}
        return dict(input_ids=ids, labels=ids.clone(), **mask)

    def step():
        for _ in range(micro_batches):
            with torch.autocast(
                "cpu", dtype=torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision in ("bf16", "fp16")
            ):
                loss = model(**batch()).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        update.zero_grad()

    step()
    lasting = [*model.parameters(), *model.buffers(), *(value for state in update.state.values() for value in state.values())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in lasting if isinstance(t, torch.Tensor)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return sum(storages.values()) + peak


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["text", "images", "pooled images"])
def test_the_peak_is_the_measured_one(kind, precision, gradient):
    if kind == "text":
        config, shape, optimizer = text(gradient=gradient), (4, 128), "adamw_torch_fused"
    else:
        pools = dict(downsample="max_pool", stem_stride=2) if kind == "pooled images" else {}
        config, shape, optimizer = images(gradient=gradient, **pools), (8, None), "sgd"
    plan = plan_memory(config, *shape, precision=precision, optimizer=optimizer)
    # kernels' own room, which grows with the batch: reordered images of convolutions, operands of two dtypes
    bound = 0.07 if kind != "text" or precision == "bf16" else 0.005
    assert plan.peak == pytest.approx(measured(config, *shape, precision, optimizer), rel=bound)
    assert plan.gradient == gradient


@pytest.mark.parametrize(
    "config",
    [
        text(block_type="paper", tol=1e-9),
        text(num_block_layers=2, num_key_value_heads=2, num_prelude_layers=1, num_coda_layers=1, gradient="checkpoint"),
        text(attn_implementation="eager", gradient="backprop"),
        text(hidden_dropout=0.1, attention_dropout=0.1),
        text(tie_word_embeddings=True, is_causal=False, gradient="backprop"),
        text(beta=0.8, max_steps=12, keep_evaluations=3),  # digits are put aside
        text(gradient="phantom"),
        text(solver="relaxed", gradient="checkpoint"),
        pytest.param(text(solver="anderson", gradient="implicit"), marks=pytest.mark.slow),
        text(vocab_size=4096),  # the peak is in the loss
    ],
    ids=["paper", "layers", "eager", "dropout", "tied", "digits", "phantom", "relaxed", "implicit", "vocabulary"],
)
def test_every_config_is_planned(config):
    assert plan_memory(config, 3, 100).peak == pytest.approx(measured(config, 3, 100), rel=0.005)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_planned(optimizer):
    config = text(vocab_size=8192, max_steps=1)  # large beside the activations
    plan = plan_memory(config, 1, 16, optimizer=optimizer)
    assert plan.peak == pytest.approx(measured(config, 1, 16, optimizer=optimizer), rel=0.005)
    states = {"sgd": 0, "adagrad": 1, "rmsprop": 1, "adamw_torch": 2, "adamw_torch_fused": 2}.get(optimizer, 0.02)
    assert plan.optimizer_state == pytest.approx(states * plan.weights, rel=0.2, abs=1)


@pytest.mark.parametrize(
    "settings", [dict(precision="pure_bf16"), dict(precision="fp16"), dict(padded=True), dict(gradient_accumulation_steps=3)], ids=str
)
def test_every_setting_is_planned(settings):
    config = text(vocab_size=2048)
    names = {"gradient_accumulation_steps": "micro_batches"}
    found = measured(config, 2, 128, **{names.get(name, name): value for name, value in settings.items()})
    assert plan_memory(config, 2, 128, **settings).peak == pytest.approx(found, rel=0.03)


def test_accumulated_gradients_and_masks_are_counted():
    config = text(vocab_size=8192, max_steps=1, gradient="backprop")
    plain, accumulated = plan_memory(config, 2, 32), plan_memory(config, 2, 32, gradient_accumulation_steps=2)
    # of the gradients of micro-batches before only those that a pass does not make anew before its peak
    assert plain.peak < accumulated.peak <= plain.peak + plain.gradients
    assert (
        plan_memory(text(max_steps=1), 2, 256, padded=True).activations >= plan_memory(text(max_steps=1), 2, 256).activations + 2 * 256**2
    )


def test_the_parts_of_the_paper_model_for_a_machine_that_is_not_here():
    before, generator, kept = peak_memory(), torch.get_rng_state(), (config := RevDEQConfig.paper_wikitext103()).to_dict()
    plan = plan_memory(config, 40, 448, precision="bf16", gradient="backprop", max_steps=2)
    parameters = 94_138_368
    assert plan.gradients == 4 * parameters
    assert plan.weights == pytest.approx(4 * parameters, rel=1e-6)
    assert plan.optimizer_state == pytest.approx(8 * parameters, rel=1e-6)
    assert plan.peak > 4e9
    if before is not None:
        assert peak_memory() < before + 500e6
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_default_dtype() == torch.float32
    assert config.to_dict() == kept


def test_memory_and_steps():
    peaks = {
        mode: [plan_memory(text(gradient=mode), 4, 64, max_steps=steps).activations for steps in (1, 3)]
        for mode in ("reversible", "checkpoint", "backprop")
    }
    assert peaks["reversible"][0] == peaks["reversible"][1]
    state = 4 * 64 * 64 * 4
    assert peaks["checkpoint"][1] - peaks["checkpoint"][0] == pytest.approx(4 * state, rel=0.1)
    assert peaks["backprop"][1] > 2 * peaks["backprop"][0]


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop"])
@pytest.mark.parametrize(
    ("config", "shape", "settings"),
    [
        (text(max_steps=1), (4, 128), dict(optimizer="adagrad")),
        (text(block_type="paper"), (4, 128), dict(gradient_accumulation_steps=2, padded=True, precision="bf16")),
        (images(max_steps=1), (8,), dict(optimizer="sgd", precision="bf16")),
        (text(vocab_size=8192, max_steps=1), (1, 16), dict(optimizer="adamw_torch")),  # the peak is in the update
    ],
    ids=["text", "bf16", "images", "update"],
)
def test_the_peak_is_explained(config, shape, settings, gradient):
    plan = plan_memory(config, *shape, gradient=gradient, **settings)
    explained = plan_memory(config, *shape, gradient=gradient, explain=True, **settings)
    assert replace(explained, operation="", at_peak=()) == plan  # looking changes nothing
    *told, others = explained.at_peak
    assert others.what == "others"
    assert sum(line.bytes for line in explained.at_peak) == plan.peak
    sizes = [line.bytes for line in told]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= 0.01 * plan.peak
    model = (RevDEQForCausalLM if len(shape) == 2 else RevDEQForImageClassification)(config)
    named = {line.what: line.bytes for line in told if not line.phase}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert named.get("weights", weights) == weights  # not there: below 1% of the peak
    if plan.phase == "optimizer":
        assert [named[kind] for kind in ("weights", "gradients", "optimizer exp_avg", "optimizer exp_avg_sq")] == [weights] * 4
    names = {name for name, _ in model.named_modules()} - {""}
    for line in told:
        assert (line.module in names) == (line.phase in ("forward", "backward"))
        assert ".py:" in line.line or line.phase != "forward"


def test_what_is_told_of_steps():
    """How often an activation is there says whether evaluations keep their graphs."""

    def counts(config, length, gradient, steps, *wanted):
        plan = plan_memory(config, 4, length, gradient=gradient, max_steps=steps, optimizer="sgd", explain=True)
        return [sum(line.count for line in plan.at_peak if (line.what, line.module) == pair) for pair in wanted]

    layer = "model.solve.block.layers.0"
    attention = ("aten._scaled_dot_product_flash_attention_for_cpu", f"{layer}.self_attn")
    activation, convolution = ("aten.silu", f"{layer}.mlp.act_fn"), ("aten.convolution", "model.stages.0.block.conv1")
    for steps in (1, 2):
        assert counts(text(), 64, "backprop", steps, attention, activation) == [2 * steps, 2 * steps]
        assert counts(text(), 64, "reversible", steps, attention, activation) == [1, 1]
        assert counts(images(), None, "backprop", steps, convolution) == [2 * steps]
        assert counts(images(), None, "reversible", steps, convolution) == [1]


def test_sampled_steps_are_planned_for_the_most_of_them():
    for sampling in ({"distribution": "uniform", "min_steps": 1, "max_steps": 3}, {"distribution": "choice", "steps": [2, 3, 1]}):
        sampled = plan_memory(text(gradient="backprop", steps_sampling=sampling), 2, 32)
        assert sampled == plan_memory(text(gradient="backprop", max_steps=3), 2, 32)
    endless = text(steps_sampling={"distribution": "poisson", "mean": 4})
    with pytest.raises(ValueError, match="no bound to plan for; give it a 'max_steps'"):
        plan_memory(endless, 2, 32)
    assert plan_memory(endless, 2, 32, max_steps=1).peak > 0


@pytest.fixture
def straight_plans(monkeypatch):
    """Plans whose peak is a straight line of the batch, another one for each mode."""
    lines = {"reversible": (100, 10), "checkpoint": (100, 12), "backprop": (100, 40)}

    def plan(config, batch_size, length=None, *, gradient, **settings):
        peak = lines[gradient][0] + lines[gradient][1] * batch_size
        return MemoryPlan(gradient, batch_size, length, "fp32", "sgd", peak, "forward", 0, 0, 0, 0)

    monkeypatch.setattr(planner, "plan_memory", plan)


@pytest.mark.usefixtures("straight_plans")
def test_advice():
    config = text(max_steps=4)
    roomy = advise(config, 10, 64, budget=1000, reserve=0.5)
    assert [(entry.fits, entry.largest_batch) for entry in roomy.modes] == [(True, 40), (True, 33), (True, 10)]
    assert (roomy.gradient, roomy.batch_size) == ("backprop", 10)  # it fits, and has the fewest evaluations
    assert [entry.time for entry in roomy.modes] == [31 / 24, 31 / 24, 1.0]
    tighter = advise(config, 11, 64, budget=1000, reserve=0.5)
    assert (tighter.gradient, tighter.batch_size) == ("reversible", 40)  # of two with as many evaluations, the leaner
    assert [entry.fits for entry in tighter.modes] == [True, True, False]
    without = advise(text(max_steps=4, tol=1e-3), 11, 64, budget=1000, reserve=0.5)
    assert without.gradient == "checkpoint"  # with tol "reversible" keeps no evaluation
    too_large = advise(config, 50, 64, budget=500, reserve=0.0)
    assert [entry.fits for entry in too_large.modes] == [False] * 3
    assert (too_large.gradient, too_large.batch_size) == ("reversible", 40)
    nothing = advise(config, 1, 64, budget=101)
    assert nothing.batch_size == 0
    assert [entry.largest_batch for entry in nothing.modes] == [0, 0, 0]
    only = advise(config, 10, 64, budget=1000, modes=["checkpoint"])
    assert (only.gradient, len(only.modes)) == ("checkpoint", 1)


def test_advice_holds():
    config = text(max_steps=1)
    (entry,) = advise(config, 4, 32, budget=10**7, reserve=0.2, modes=["checkpoint"], optimizer="sgd").modes
    sizes = (entry.largest_batch, entry.largest_batch + max(1, entry.largest_batch // 64))
    within, beyond = (plan_memory(config, size, 32, gradient="checkpoint", optimizer="sgd").peak for size in sizes)
    assert within <= 8_000_000 < beyond
    assert entry.fits


def test_the_search_finds_the_largest_batch():
    for known in ({}, {7: 70}, {4000: 40000}):
        calls = []

        def peak(size, calls=calls):
            calls.append(size)
            return max(10 * size, 20 * size - 1000)  # two straight pieces

        found = planner._largest(peak, 5000, dict(known))
        assert peak(found) <= 5000 < peak(found + max(1, found // 64))
        assert len(calls) < 12
    assert planner._largest(lambda size: 0, 5000, {}) == planner.LARGEST_BATCH


@pytest.mark.parametrize(
    ("arguments", "settings", "error"),
    [
        (("text", 0, 16), {}, "batch_size must be a whole number >= 1, got 0"),
        (("text", 2.0, 16), {}, "batch_size must be a whole number >= 1, got 2.0"),
        (("text", 2), {}, "length must be a whole number >= 1, got None"),
        (("images", 2, 16), {}, "images have no length and no padding, got length=16"),
        (("images", 2), dict(padded=True), "images have no length and no padding"),
        (("text", 2, 16), dict(precision="fp8"), "precision must be one of 'fp32', 'bf16', 'fp16', 'pure_bf16', got 'fp8'"),
        (("text", 2, 16), dict(optimizer="adam"), "optimizer must be one of 'adamw_torch', .*, got 'adam'"),
        (("text", 2, 16), dict(gradient="magic"), "gradient must be one of 'reversible', .*got 'magic'"),
        (("text", 2, 16), dict(gradient_accumulation_steps=0), "gradient_accumulation_steps must be a whole number >= 1, got 0"),
        (("text", 2, 16), dict(max_steps=0), "max_steps must be"),
        (("text", 2, 16), dict(gradient="implicit", max_steps=[1, 2]), "max_steps must be"),
        (("paper", 2, 40), {}, "learned positions for 32 tokens"),
    ],
)
def test_bad_input(arguments, settings, error):
    kind, *shape = arguments
    config = {"text": text(), "images": images(), "paper": text(block_type="paper", max_position_embeddings=32)}[kind]
    with pytest.raises(ValueError, match=error):
        plan_memory(config, *shape, **settings)


def test_other_bad_input(tmp_path):
    with pytest.raises(TypeError, match="config must be a RevDEQConfig or a RevDEQVisionConfig, got dict"):
        plan_memory({}, 2, 16)
    for settings in (dict(budget=0), dict(budget=1e9, reserve=1.0)):
        with pytest.raises(ValueError, match="budget must be a number of bytes above 0 and reserve"):
            advise(text(), 2, 16, **settings)
    with pytest.raises(ValueError, match=r"modes must be some of .*got \['implicit'\]"):
        advise(text(), 2, 16, budget=1e9, modes=["implicit"])
    with pytest.raises(ValueError, match="gradient='reversible' cannot go with solver='relaxed'"):
        advise(text(solver="relaxed", gradient="checkpoint"), 2, 16, budget=1e9)
    with pytest.raises(FileNotFoundError, match="expected a model folder, a JSON file or one of paper_wikitext103"):
        load_config(str(tmp_path / "nowhere"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not a JSON file"):
        load_config(str(tmp_path / "broken.json"))
    (tmp_path / "other.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'revdeq' or 'revdeq_vision', got 'llama'"):
        load_config(str(tmp_path / "other.json"))


def test_configs_and_bytes_are_read(tmp_path):
    text(max_steps=5).save_pretrained(tmp_path)
    images(max_steps=[1, 2]).to_json_file(tmp_path / "images.json", use_diff=False)
    assert load_config(str(tmp_path)).max_steps == 5
    assert load_config(str(tmp_path / "images.json")).max_steps == [1, 2]
    assert load_config("paper_cifar10_singlescale").hidden_sizes == [32]
    cases = {"24GB": 24 * 10**9, "1.5 GiB": 3 * 2**29, "800mb": 8 * 10**8, "12": 12}
    assert {written: parse_bytes(written) for written in cases} == cases
    for wrong in ("24 parsecs", "GB", "-1GB", ""):
        with pytest.raises(ValueError, match="expected bytes such as 24GB"):
            parse_bytes(wrong)
    assert [show_bytes(size) for size in (12, 1234, 12_345_678, 24 * 10**9)] == ["12 B", "1.234 KB", "12.35 MB", "24 GB"]


def test_the_command(tmp_path, capsys, request):
    text().save_pretrained(tmp_path)
    main([str(tmp_path), "--batch", "2", "--length", "32", "--gradient", "reversible", "backprop", "--max_steps", "1", "--optim", "sgd"])
    printed = capsys.readouterr().out
    plan = plan_memory(text(max_steps=1), 2, 32, optimizer="sgd")
    assert show_bytes(plan.peak) in printed
    assert "checkpoint" not in printed
    assert "largest batch" not in printed

    main([str(tmp_path), "--batch", "2", "--length", "32", "--gradient", "reversible", "backprop", "--explain"])
    printed = capsys.readouterr().out
    for mode in ("reversible", "backprop"):
        plan = plan_memory(text(), 2, 32, gradient=mode, explain=True)
        table = printed.split(f"{mode}: the peak of {show_bytes(plan.peak)} is in {plan.phase}, at {plan.operation}.\n\n")[1].splitlines()
        first, last = (" ".join(table[number].split()) for number in (2, 1 + len(plan.at_peak)))
        assert first.startswith(f"{plan.at_peak[0].what} {show_bytes(plan.at_peak[0].bytes)} {plan.at_peak[0].bytes / plan.peak:.1%}")
        assert last.startswith(f"others {show_bytes(plan.at_peak[-1].bytes)}")

    for wrong, error in (
        (["--length", "-3"], "length must be a whole number >= 1, got -3"),
        (["--budget", "much"], "expected bytes such as 24GB"),
    ):
        with pytest.raises(SystemExit):
            main([str(tmp_path), *wrong])
        assert error in capsys.readouterr().err

    request.getfixturevalue("straight_plans")
    command = [str(tmp_path), "--length", "32", "--budget", "1KB", "--reserve", "0.5"]
    main([*command, "--batch", "10"])
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines() if line.startswith("backprop")] == [
        ["backprop", *["0", "B"] * 4, "500", "B", "forward", "1.00", "yes", "10"]
    ]
    assert 'Take gradient="backprop": it has the fewest evaluations of what fits into 1 KB with 50% in reserve, up to batch 10.' in printed
    main([*command, "--batch", "500"])
    assert 'Batch 500 does not fit into 1 KB with 50% in reserve. Take gradient="reversible" with batch 40' in capsys.readouterr().out
    main([str(tmp_path), "--length", "32", "--budget", "99B"])
    assert "Not even one example fits into 99 B with 10% in reserve" in capsys.readouterr().out
