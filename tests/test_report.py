"""What the callback logs is right, its cost is small, and the report draws it."""

import copy
import json
import math
import re
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import awake
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from revdeq_hf import (
    RevDEQConfig,
    RevDEQForCausalLM,
    RevDEQForImageClassification,
    RevDEQForSemanticSegmentation,
    RevDEQForTokenClassification,
    RevDEQModel,
    RevDEQVisionConfig,
    ReversibleFixedPoint,
)
from revdeq_hf.flops import training_flops
from revdeq_hf.layer_revdeq import SolveStatistics
from revdeq_hf.report import Run, main, plot_runs, read_run, summary
from revdeq_hf.training import RevDEQCallback, _halve_learning_rates, greatest_drift, peak_memory, residual_curve, run_record

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, max_steps=3)
ROWS = [{"input_ids": [(7 * i + j) % 64 for j in range(9)], "labels": [(7 * i + j) % 64 for j in range(9)]} for i in range(16)]


def text_model(**settings) -> RevDEQForCausalLM:
    return awake(RevDEQForCausalLM(RevDEQConfig(**{**SMALL, **settings})))


def train(model: nn.Module, folder, callback: TrainerCallback, more: tuple[TrainerCallback, ...] = (), **settings) -> Trainer:
    arguments = dict(
        output_dir=str(folder),
        max_steps=6,
        logging_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=TrainingArguments(**{**arguments, **settings}), train_dataset=ROWS, eval_dataset=ROWS)
    trainer.callback_handler.callbacks[:0] = [callback, *more]
    trainer.train()
    trainer.save_state()
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(num_prelude_layers=1, num_coda_layers=1, num_block_layers=2, num_key_value_heads=2, tie_word_embeddings=False),
        dict(block_type="paper", hidden_act="gelu_pytorch_tanh"),
    ],
    ids=["modern", "grouped heads, prelude and coda", "paper"],
)
def test_flops_of_a_text_model_are_those_that_torch_counts(settings):
    config = RevDEQConfig(**{**SMALL, **settings}, attn_implementation="eager")  # torch does not count the CPU's fused attention
    for kind in (RevDEQForCausalLM, RevDEQForTokenClassification):
        model = kind(config).train()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.randint(0, 64, (3, 17)))
        assert training_flops(model) == 3 * counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (RevDEQVisionConfig(hidden_sizes=[16, 32], expansion_ratios=[1, 2], max_steps=[3, 2]), (33, 31)),
        (RevDEQVisionConfig.paper_cifar10_singlescale(), (32, 32)),
        (RevDEQVisionConfig(hidden_sizes=[16, 32], expansion_ratios=[3, 2], max_steps=2, block_type="modern"), (17, 16)),
        (RevDEQVisionConfig(hidden_sizes=[16, 32, 48], expansion_ratios=[1, 2, 1], downsample="max_pool", stem_stride=2), (22, 26)),
    ],
    ids=["two stages", "single scale", "modern", "max pool"],
)
def test_flops_of_an_image_model_are_those_that_torch_counts(config, size):
    model = RevDEQForImageClassification(config).train()
    assert training_flops(model) == 0  # nothing has run
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(2, 3, *size))
    assert training_flops(model) == 3 * counter.get_total_flops() > 0
    assert training_flops(nn.Linear(2, 2)) == 0


def test_logged_figures_are_those_of_the_solves(tmp_path):
    trainer = train(text_model(), tmp_path, RevDEQCallback(peak_flops=1e12), gradient_accumulation_steps=2)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    assert greatest_drift(trainer.state.log_history) == 0
    for entry in logs:
        assert entry["drift"] == entry["nonfinite"] == entry["clamped"] == 0
        assert entry["solver_steps"] == 3
        assert entry["evaluations"] == 6
        assert 0 < entry["residual"] <= entry["residual_max"]
        assert entry["peak_memory_bytes"] > 0
        assert entry["mfu"] == pytest.approx(entry["flops_per_second"] / 1e12)
    # 2 updates of 2 micro-batches of 4 rows of 9 tokens: operations and tokens are of the same seconds
    assert training_flops(trainer.model) / 36 == pytest.approx(logs[-1]["flops_per_second"] / logs[-1]["tokens_per_second"])


@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_is_no_part_of_the_figures(is_causal, tmp_path):
    rows = [{**row, "attention_mask": [1] * 9} for row in ROWS[:4]]
    padded = [
        {"input_ids": [0] * 6 + row["input_ids"], "labels": [-100] * 6 + row["labels"], "attention_mask": [0] * 6 + [1] * 9} for row in rows
    ]
    logged = []
    for data in (rows, padded):
        torch.manual_seed(0)
        model = awake(RevDEQModel(RevDEQConfig(**SMALL, is_causal=is_causal, tol=0.05)), std=0.3)
        callback, batch = RevDEQCallback(), {name: torch.tensor([row[name] for row in data]) for name in ("input_ids", "attention_mask")}
        callback.on_train_begin(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl(), model=model)
        model.train()(**batch)
        callback._add(model)
        logged.append((callback._sums[0, :3], callback._peaks[0, 0]))
    for alone, together in zip(*logged, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["checkpoint", "backprop", "implicit", "phantom"])
def test_where_nothing_is_reversed_there_is_no_drift(gradient, tmp_path):
    trainer = train(text_model(gradient=gradient), tmp_path, RevDEQCallback(peak_flops=0))
    assert all("drift" not in entry and entry["residual"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    assert greatest_drift(trainer.state.log_history) is None


@pytest.mark.parametrize("gradient", ["checkpoint", "reversible"])
def test_a_loaded_model_that_reverses_nothing_is_trained(gradient, tmp_path):
    text_model().save_pretrained(tmp_path / "saved")
    model = RevDEQForCausalLM.from_pretrained(tmp_path / "saved", gradient=gradient)
    if gradient == "reversible":
        model.model.requires_grad_(False)  # the head alone is trained
    trainer = train(model, tmp_path, RevDEQCallback(peak_flops=0))
    assert greatest_drift(trainer.state.log_history) is None
    assert float(model.model.solve.drift) == 0.0


def test_a_curve_of_residuals_leaves_every_module_in_its_mode():
    model = RevDEQForImageClassification(RevDEQVisionConfig(hidden_sizes=[16], expansion_ratios=[1], max_steps=2)).train()
    resting = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert resting
    for module in resting:
        module.eval()  # frozen, its statistics too
    before = copy.deepcopy(model.state_dict())
    (curve,) = residual_curve(model, {"pixel_values": torch.randn(2, 3, 8, 8)}, 3).values()
    assert len(curve) == 3
    assert all(module.training == (module not in resting) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="channels"):
        residual_curve(model, {"pixel_values": torch.randn(2, 4, 8, 8)}, 1)
    assert all(module.training == (module not in resting) for module in model.modules())


def test_tensorboard_has_the_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(text_model(), tmp_path, RevDEQCallback(peak_flops=0), report_to="tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    drawn = {event.step: event.value for event in events.Scalars("train/residual")}
    logged = {entry["step"]: entry["residual"] for entry in trainer.state.log_history if "loss" in entry}
    assert drawn == pytest.approx(logged)
    assert {"train/drift", "train/tokens_per_second", "train/solver_steps"} <= set(events.Tags()["scalars"])


def test_a_run_that_diverged_is_drawn(tmp_path):
    nan = float("nan")
    run = Run(
        "diverged", [{"step": 1, "loss": nan, "residual": nan, "residual_max": nan}], convergence={"solve": [nan, nan]}, trained_steps=4
    )
    plot_runs([run], tmp_path / "diverged.png")
    assert (tmp_path / "diverged.png").stat().st_size > 10_000


def test_seconds_of_evaluation_are_not_seconds_of_training(tmp_path):
    class Slow(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            time.sleep(1.0)

    callback, slow = RevDEQCallback(peak_flops=0), Slow()
    settings = dict(eval_strategy="steps", eval_steps=2, logging_steps=6)
    began = time.perf_counter()
    trainer = train(text_model(), tmp_path, callback, (slow,), **settings)
    assert time.perf_counter() - began > 3  # three evaluations
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 6 * 36 / entry["tokens_per_second"] < 1.9  # two of them came between the updates of this log
    assert "mfu" not in entry


def test_divergence_is_explained_once_and_stops_if_asked(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    next(model.model.solve.block.parameters()).fill_(math.nan)

    with pytest.warns(
        UserWarning, match=r"diverges at update 4: the block of 'model.solve' was not finite in .* first at step 1 .*radius"
    ) as caught:
        trainer = train(
            text_model(), tmp_path, RevDEQCallback("stop", probe={"input_ids": torch.arange(18).view(2, 9)}, peak_flops=0), (Poison(),)
        )
    assert sum("diverges" in str(warning.message) for warning in caught) == 1
    assert trainer.state.global_step == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = train(text_model(), tmp_path, RevDEQCallback("ignore", peak_flops=0), (Poison(),))
    assert trainer.state.global_step == 6
    with pytest.raises(ValueError, match="on_divergence"):
        RevDEQCallback("explode")


def test_a_gradient_that_is_not_finite_is_told(tmp_path):
    """Trainer logs a loss of 0 then, and the solves are finite."""
    model = text_model()
    model.model.requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.warns(UserWarning, match="diverges at update 2: the norm of the gradient is nan"):
        trainer = train(model, tmp_path, RevDEQCallback("stop", peak_flops=0))
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("kind", ["OneCycleLR", "SequentialLR"])
def test_schedules_of_schedules_are_halved(kind):
    def made():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedules = torch.optim.lr_scheduler
        if kind == "OneCycleLR":
            return optimizer, schedules.OneCycleLR(optimizer, max_lr=1.0, total_steps=20, cycle_momentum=False)
        parts = [schedules.LambdaLR(optimizer, lambda update: 1 / (1 + update)) for _ in range(2)]
        return optimizer, schedules.SequentialLR(optimizer, parts, [10])

    rates = {}
    for halved in (False, True):
        optimizer, scheduler = made()
        for update in range(15):
            if update == 5 and halved:
                _halve_learning_rates(optimizer, scheduler)
            rates.setdefault(halved, []).append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert rates[True] == pytest.approx([rate / (1 + (update >= 5)) for update, rate in enumerate(rates[False])])


@pytest.mark.parametrize("drifts", [[0.0, math.nan], [math.nan, 0.0]])
def test_a_drift_that_is_no_number_is_the_greatest(drifts):
    history = [{"step": step, "drift": drift} for step, drift in enumerate(drifts)]
    assert math.isnan(greatest_drift(history))
    assert math.isnan(summary(Run("a", history=history))["greatest drift"])


def test_no_token_is_kept_in_the_record_of_a_run():
    secret = "hf_" + "a1B2" * 9
    for flags in (f"--hub_token {secret}", f"--hub-token={secret}", f"--hub_t {secret}", "--hub-token 'of two words' --seed 1"):
        command = run_record(f"python train.py {flags} --tokenizer_name gpt2", torch.device("cpu"))["command"]
        assert re.search(f"{secret}|words", command) is None, command
        assert "--tokenizer_name gpt2" in command, command


@pytest.mark.parametrize(
    ("weights", "settings", "rate"), [("float32", {}, "float32"), ("bfloat16", {}, "bfloat16"), ("float32", {"bf16": True}, "bfloat16")]
)
def test_the_device_s_rate_is_that_of_the_dtype_computed_in(weights, settings, rate, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("revdeq_hf.training.matrix_rate", lambda device, dtype: asked.append(dtype) or 1e12)
    train(text_model().to(getattr(torch, weights)), tmp_path, RevDEQCallback(), **settings)
    assert asked == [getattr(torch, rate)]


def test_peak_memory_of_a_device_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda: torch.mps)
    assert peak_memory() is None


def test_flops_of_a_segmentation_count_its_classifier():
    model = RevDEQForSemanticSegmentation(
        RevDEQVisionConfig.dense_prediction(num_channels=3, num_labels=50, hidden_sizes=[16], max_steps=2)
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.randn(2, 3, 9, 11))
    assert training_flops(model) == 3 * counter.get_total_flops() > 0


def test_a_rising_residual_halves_the_learning_rate_if_asked(tmp_path):
    class Calm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.01))
            self.read = nn.Linear(4, 1)
            self.solve = ReversibleFixedPoint(_Turn(self.gain), beta=0.9, max_steps=6)

        def forward(self, input_ids, labels=None):
            z = self.solve(input_ids.float()[:, :4] / 64).z
            return {"loss": self.read(z).square().mean()}

    model = Calm()
    with pytest.warns(UserWarning, match="mean residual rises"):
        trainer = train(
            model,
            tmp_path,
            RevDEQCallback("lower_lr", peak_flops=0),
            (_Set(model),),
            max_steps=10,
            lr_scheduler_type="constant",
            learning_rate=1e-6,
        )
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[0] == 1e-6
    assert rates[-1] < 1e-6


class _Turn(nn.Module):
    def __init__(self, gain: nn.Parameter) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, z, x):
        return self.gain * z.flip(-1) + x


class _Set(TrainerCallback):
    def __init__(self, model) -> None:
        self.model = model

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                self.model.gain.fill_(-1.2)


def test_the_step_named_is_that_of_the_stage_and_solve_that_failed():
    callback = RevDEQCallback(peak_flops=0)
    model = nn.ModuleDict(
        {name: ReversibleFixedPoint(_Turn(nn.Parameter(torch.tensor(0.1))), beta=0.9, max_steps=2) for name in ("a", "b")}
    )
    callback.on_train_begin(None, TrainerState(), TrainerControl(), model=model)

    def solved(evaluations: int, bad: list[int]) -> SolveStatistics:
        rows = torch.ones(len(bad))
        return SolveStatistics(rows.long(), rows, evaluations, (torch.Size((len(bad), 4)),), rows.long() * 0, torch.tensor(bad))

    # stage b fails once, in the last 8 of 16 evaluations of a row; other solves are shorter, and well
    for of_a, of_b in (((4, [0, 0]), (16, [8, 3])), ((4, [0, 0]), (2, [0, 0]))):
        callback.on_step_begin(None, TrainerState(), TrainerControl())
        model["a"].statistics, model["b"].statistics = solved(*of_a), solved(*of_b)
        callback.on_step_end(None, TrainerState(), TrainerControl(), model=model)
    with pytest.warns(
        UserWarning, match=r"'b' was not finite in 11 evaluations of an example, first at step 5 of the solve or before"
    ) as caught:
        callback.on_log(SimpleNamespace(fp16=False), TrainerState(log_history=[]), TrainerControl(), logs={"loss": 1.0}, model=model)
    assert "'a'" not in str(caught[0].message)


def test_watching_does_not_change_the_training(tmp_path):
    noisy = dict(hidden_dropout=0.1, steps_sampling={"distribution": "uniform", "min_steps": 1, "max_steps": 4})
    torch.manual_seed(0)
    first = text_model(**noisy)
    watched, alone = (copy.deepcopy(first) for _ in range(2))
    train(watched, tmp_path / "a", RevDEQCallback())
    train(alone, tmp_path / "b", TrainerCallback())
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))
    assert not torch.equal(next(watched.parameters()), next(first.parameters()))


def test_drawn_steps_raise_no_alarm(tmp_path):
    model = text_model(steps_sampling={"distribution": "uniform", "min_steps": 1, "max_steps": 8})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(model, tmp_path, RevDEQCallback("stop", peak_flops=0), logging_steps=1, max_steps=60)


def test_report_draws_a_run_and_compares_two(tmp_path, capsys):
    train(text_model(), tmp_path / "a", RevDEQCallback(), max_steps=4)
    train(text_model(max_steps=2), tmp_path / "b", RevDEQCallback(), max_steps=4)
    (tmp_path / "a" / "results.json").write_text(
        json.dumps({"validation_loss": 1.25, "convergence": {"trained_steps": 3, "residuals": {"model.solve": [1.0, 0.1]}}})
    )
    main([str(tmp_path / "a")])
    assert (tmp_path / "a" / "report.png").read_bytes().startswith(b"\x89PNG")
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "both.png")])
    printed = capsys.readouterr().out
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "greatest drift" in printed
    run = read_run(tmp_path / "a")
    assert (run.trained_steps, run.convergence) == (3, {"model.solve": [1.0, 0.1]})
    row = summary(run)
    assert (row["updates"], row["validation loss"], row["steps"], row["greatest drift"]) == (4, 1.25, 3, 0)
    assert row["training loss"] == run.values("loss")[-1]
    with pytest.raises(FileNotFoundError, match="output_dir"):
        read_run(tmp_path)


def test_report_of_a_run_without_figures_has_empty_panels(tmp_path):
    plot_runs([Run("nothing", [{"loss": 1.0, "step": 1}, {"train_runtime": 3.0}])], tmp_path / "report.png")
    assert (tmp_path / "report.png").is_file()


def test_what_cannot_be_reported_is_told_in_one_line(tmp_path, capsys):
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": []}))
    (tmp_path / "odd.png").mkdir()
    for folder, output, message in (
        ("nowhere", None, "there is no run in "),
        (".", "nowhere/x.png", r"--output: there is no folder '.*nowhere' to write the figure to"),
        (".", "x.xyz", r"--output: expected a picture that ends in one of .*png.*, got '.*x\.xyz'"),
        (".", "odd.png", "--output: .* is a folder"),
    ):
        with pytest.raises(SystemExit):
            main([str(tmp_path / folder), *([] if output is None else ["--output", str(tmp_path / output)])])
        assert re.match(f"python -m revdeq_hf.report: error: {message}", capsys.readouterr().err.splitlines()[-1])
    for damaged, message in (('{"log_his', "is cut short or damaged"), ("[1]", "must hold a JSON object with log_history")):
        state.write_text(damaged)
        with pytest.raises(SystemExit):
            main([str(tmp_path)])
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_state_cut_short_is_replaced_by_that_of_the_newest_checkpoint(tmp_path, capsys):
    train(text_model(), tmp_path, RevDEQCallback(), max_steps=4, logging_steps=1, save_strategy="steps", save_steps=1)
    for cut in (tmp_path, tmp_path / "checkpoint-4"):
        (cut / "trainer_state.json").write_text('{"log_his')
    with pytest.warns(UserWarning, match=r"trainer_state\.json' is cut short .*up to checkpoint-3, the newest whole checkpoint"):
        assert summary(read_run(tmp_path))["updates"] == 3
    capsys.readouterr()
    main([str(tmp_path)])
    assert "this is the run up to checkpoint-3, the newest whole checkpoint." in capsys.readouterr().out
    assert (tmp_path / "report.png").is_file()
