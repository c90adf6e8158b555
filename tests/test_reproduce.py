"""Recipes: every flag is one of its script, the networks are what their names say, runs shrink, interrupted work goes on, tables say what the files say."""

import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EXAMPLES
from transformers import AutoTokenizer, HfArgumentParser

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQVisionConfig

pytestmark = pytest.mark.usefixtures("scripts")
sys.path.insert(0, str(EXAMPLES))
reproduce = importlib.import_module("reproduce")  # here, since its recipes are what the tests are repeated for
sys.path.remove(str(EXAMPLES))
RUNS = [(name, variant) for name in reproduce.names() for variant in reproduce.load(name).variants]


def parsed(name: str, variant: str, more: dict | None = None) -> tuple:
    """What the training script makes of a recipe's flags."""
    script, settings = reproduce.load(name).settings(variant)
    settings = {**settings, **(more or {})}
    if script == "../benchmarks/published_reversal.py":
        assert settings.pop("state_dtype") in ("float32", "float64")
        script = "train_language.py"
    module = importlib.import_module(script.removesuffix(".py"))
    kinds = {
        "train_language": ("ModelArguments", "DataArguments", "LanguageTrainingArguments"),
        "train_image": ("ModelArguments", "DataArguments", "ImageTrainingArguments"),
        "think_longer": ("NetworkArguments", "ProblemArguments", "ThinkingArguments"),
    }[module.__name__]
    settings = reproduce.without(settings, reproduce.FOR_ACCELERATORS)  # refused where there is none
    parser = HfArgumentParser([getattr(module, kind) for kind in kinds])
    words = reproduce.flags(settings)
    options, data, training = parser.parse_args_into_dataclasses(args=words)
    module.refuse_idle_flags(importlib.import_module("flags").given_flags(parser, words), options, data)
    return module, options, data, training


@pytest.mark.parametrize(("name", "variant"), RUNS)
def test_every_flag_is_one_of_the_script_and_has_an_effect(name, variant, tmp_path):
    recipe = reproduce.load(name)
    _, settings = recipe.settings(variant)
    _, options, data, training = parsed(name, variant, {"output_dir": str(tmp_path)})
    for flag, value in reproduce.without(settings, (*reproduce.FOR_ACCELERATORS, "state_dtype")).items():
        held = next(getattr(part, flag) for part in (training, data, options) if hasattr(part, flag))
        assert held == value or json.loads(held) == value, flag
    assert training.max_steps > 0, "without updates --scale has nothing to shrink"
    assert recipe.seeds
    assert recipe.columns


@pytest.mark.parametrize("name", reproduce.names())
def test_evaluation_knows_its_flags(name):
    recipe = reproduce.load(name)
    if recipe.evaluation is None:
        return
    evaluation = importlib.import_module("evaluation")
    flags = reproduce.flags(recipe.evaluation)
    options, _ = (evaluation.image_arguments if "image" in recipe.script else evaluation.text_arguments)(flags)
    assert {flag: getattr(options, flag) for flag in recipe.evaluation} == recipe.evaluation


def test_an_evaluation_gets_every_flag_of_the_data_that_it_knows():
    """Of a data flag that a script gets newly it must be decided whether an evaluation needs it."""
    of_training = importlib.import_module("evaluation").TRAINING_ONLY
    saved_with_the_model = {"tokenizer_name", "image_size", "channels"}
    without_effect = {"preprocessing_workers", "keep_pixels"}
    for script, task in (("train_language", "text-generation"), ("image_data", "image-classification")):
        known = {field.name for field in dataclasses.fields(importlib.import_module(script).DataArguments)}
        assert known - {*reproduce.MEASURED_DATA, *of_training[task]} - saved_with_the_model - without_effect == set()


def test_the_published_reversal_trains_and_its_gradient_is_the_exact_one_where_it_can_be(tmp_path, monkeypatch):
    """At beta 0.5 float64 states lose nothing in 2 steps; float32 states at beta 0.8 do. Both leave the model as the script saves it."""
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "benchmarks"))
    language = importlib.import_module("train_language")
    for name in ("build_model", "run_record", "RevDEQCallback"):
        monkeypatch.setattr(language, name, getattr(language, name))  # the benchmark replaces them
    (tmp_path / "text.txt").write_text("".join(f"{number} and {number * 7 % 13}\n" for number in range(400)))
    settings = dict(
        train_file=str(tmp_path / "text.txt"), vocab_size=270, block_size=16, hidden_size=16, intermediate_size=32, solver_steps=2
    )
    settings |= dict(max_steps=3, logging_steps=1, sample_tokens=0, report_to="none", disable_tqdm=True, block_type="paper")

    def norms(run, **more) -> tuple[list[float], dict]:
        folder = tmp_path / "-".join(map(str, (run.__module__, *more.values())))
        results = run(reproduce.flags({**settings, **more, "output_dir": str(folder)}))
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [entry["grad_norm"] for entry in history if "grad_norm" in entry], results

    exact, one = norms(language.main, beta=0.5)
    published = importlib.import_module("published_reversal")
    same, other = norms(published.main, state_dtype="float64", beta=0.5)
    assert same == pytest.approx(exact, rel=1e-4)
    assert one["greatest_drift"] == 0
    assert other["greatest_drift"] < 1e-6
    assert other["run"]["command"].startswith("python benchmarks/published_reversal.py --train_file")
    _, wrong = norms(published.main, state_dtype="float32", beta=0.8)
    assert wrong["greatest_drift"] > 1e-7


def built(name: str, variant: str) -> torch.nn.Module:
    module, options, data, _ = parsed(name, variant)
    with torch.device("meta"):
        if module.__name__ == "train_image":
            size = data.image_size or 32
            return module.build_model(options, [str(label) for label in range(10)], (size, size, 3))

        class Vocabulary:
            bos_token_id = eos_token_id = 0

            def __len__(self) -> int:
                return 50257 if data.tokenizer_name == "gpt2" else data.vocab_size

        return module.build_model(options, Vocabulary(), data.block_size)


def test_paper_recipes_are_the_presets():
    language = built("lm_wikitext103_paper", "paper")
    wanted = RevDEQConfig.paper_wikitext103(bos_token_id=0, eos_token_id=0).to_dict()
    assert {key: value for key, value in language.config.to_dict().items() if wanted.get(key) != value} == {}
    with torch.device("meta"):
        assert language.num_parameters() == RevDEQForCausalLM(RevDEQConfig.paper_wikitext103()).num_parameters()
    for kind in ("multiscale", "singlescale"):
        images = built(f"image_cifar10_paper_{kind}", "paper")
        wanted = getattr(RevDEQVisionConfig, f"paper_cifar10_{kind}")().to_dict()
        found = {key: value for key, value in images.config.to_dict().items() if wanted.get(key) != value}
        assert {key: value for key, value in found.items() if "label" not in key} == {}


def inner(model: torch.nn.Module) -> int:
    """Parameters without embeddings and head."""
    return sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)


@pytest.mark.parametrize(
    ("name", "equilibrium"),
    [
        ("lm_wikitext2_small", "equilibrium, 4 steps"),
        ("lm_wikitext103_paper", "paper"),
        ("lm_wikitext103_best", "equilibrium"),
        ("image_cifar10_small", "equilibrium, 2 steps"),
        ("image_cifar10_paper_multiscale", "paper"),
        ("image_cifar10_paper_singlescale", "paper"),
        ("image_cifar10_best", "equilibrium, paper's block"),
        ("image_cifar100", "equilibrium, paper's block"),
    ],
)
def test_baselines_of_equal_parameters_have_them(name, equilibrium):
    variants = reproduce.load(name).variants
    baselines = [variant for variant in variants if "equal parameters" in variant]
    pooled = [variant for variant in variants if variant == "equilibrium, max pools, Muon"]
    assert len(baselines) == 1 + len(pooled)  # one for each optimizer
    for network in (equilibrium, *pooled):
        for baseline in baselines:
            ratio = inner(built(name, baseline)) / inner(built(name, network))
            assert 0.85 < ratio < 1.15, f"{baseline}, {network}: {ratio:.2f}"


def test_small_networks_trained_by_muon_compare_too():
    variants = ("equilibrium, max pools, Muon", "equilibrium, 2 steps, Muon", "resnet, equal parameters, Muon")
    pooled, plain, explicit = (built("image_cifar10_small", variant) for variant in variants)
    assert 0.95 < inner(explicit) / inner(pooled) < 1.05
    assert inner(plain) < inner(pooled)
    for timed, untimed in (("equilibrium, ten minutes", pooled), ("resnet, ten minutes", explicit)):
        assert inner(built("image_cifar10_small", timed)) == inner(untimed)


def test_baselines_of_equal_evaluations_have_them():
    for name in ("lm_wikitext2_small", "lm_wikitext103_paper", "lm_wikitext103_best"):
        variants = reproduce.load(name).variants
        (baseline,) = [variant for variant in variants if "equal evaluations" in variant]
        model, explicit = built(name, next(iter(variants))), built(name, baseline)
        # `num_hidden_layers` of a looped model counts the layers of every evaluation, prelude and coda included
        steps = model.config.steps_sampling or {"max_steps": model.config.max_steps}
        assert model.config.max_steps <= steps["max_steps"]
        assert explicit.config.num_hidden_layers == model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["image_cifar10_small", "image_cifar10_best", "image_cifar10_minutes", "image_cifar100"])
def test_residual_networks_of_equal_evaluations_have_them(name):
    baselines = {"resnet, equal evaluations, Muon": "equilibrium, max pools, Muon"}
    if name in ("image_cifar10_best", "image_cifar100"):
        baselines["resnet, equal evaluations"] = "equilibrium, paper's block"
    for baseline, network in baselines.items():
        explicit, model = built(name, baseline).config, built(name, network).config
        assert explicit.hidden_sizes == model.hidden_sizes
        assert explicit.depths == [2 * steps for steps in model.steps_per_stage]


# --- shrinking ---


def test_shrunk():
    settings = {"max_steps": 5000, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "save_steps": 0.25}
    settings |= {"per_device_train_batch_size": 32, "learning_rate": 1e-3, "solver_steps": 4, "warmup_steps": 500}
    small = reproduce.shrunk(settings, 0.01)
    assert small["max_steps"] == 50
    assert small["warmup_steps"] == 5  # 500 would leave the rate near zero to the end
    assert small["hidden_size"] % (2 * 12) == 0
    assert 72 <= small["hidden_size"] <= 96
    assert small["intermediate_size"] == 304
    assert small["per_device_train_batch_size"] == 1
    assert small["max_eval_rows"] == 16
    assert {name: small[name] for name in ("learning_rate", "solver_steps", "save_steps")} == {
        "learning_rate": 1e-3,
        "solver_steps": 4,
        "save_steps": 0.25,
    }
    assert reproduce.shrunk(settings, 1) == settings
    images = reproduce.shrunk({"hidden_sizes": [128, 256, 512], "per_device_train_batch_size": 64, "max_steps": 100}, 0.01)
    assert images["hidden_sizes"] == [16, 32, 48]
    assert images["per_device_train_batch_size"] == 8  # BatchNorm needs several
    assert images["max_steps"] == 4
    assert reproduce.shrunk({"warmup_steps": 0.1, "max_steps": 100}, 0.01)["warmup_steps"] == 0.1  # a share stays
    for scale in (0, -1, 1.5):
        with pytest.raises(ValueError, match=r"--scale must lie in \(0, 1\]"):
            reproduce.shrunk(settings, scale)


def commands(*arguments: str, capsys) -> list[str]:
    reproduce.main([*arguments, "--dry_run"])
    return capsys.readouterr().out.splitlines()


def test_commands(capsys):
    whole = commands("lm_wikitext2_small", "--seeds", "7", "--variants", "equilibrium, 4 steps", capsys=capsys)
    assert len(whole) == 2
    assert whole[0].startswith("python examples/train_language.py --dataset_name Salesforce/wikitext")
    assert "--seed 7" in whole[0]
    assert whole[1].startswith("python examples/evaluate.py runs/recipes/lm_wikitext2_small/equilibrium__4_steps-seed7 --dataset_name")
    # another source of data takes the place of the recipe's, also in the evaluation
    for line in commands("lm_wikitext2_small", "--train_file", "a.txt", capsys=capsys):
        assert "dataset_name" not in line
        assert "--train_file a.txt" in line
    for line in commands("image_cifar100", "--built_in_data", "--scale", "0.01", capsys=capsys):
        assert "uoft-cs" not in line
        assert "label_column" not in line
    searched = commands("lm_wikitext2_small", "--search", capsys=capsys)
    assert len(searched) == 2 * len(reproduce.load("lm_wikitext2_small").variants) * 2
    assert all("--seed 0" in line for line in searched if "train_language" in line)
    override = commands("lm_wikitext2_small", "--max_steps", "5", capsys=capsys)
    assert all("--max_steps 5" in line for line in override if "train_language" in line)


@pytest.mark.parametrize(("name", "variant"), RUNS)
def test_scale_shrinks_every_variant(name, variant, capsys):
    """Also where the flags are the script's own for a problem, and where the network is that of another variant."""
    _, settings = reproduce.load(name).settings(variant)
    places = ("--variants", variant, "--built_in_data", "--scale", "0.01", "--seeds", "1")
    run = reproduce.given(commands(name, *places, capsys=capsys)[0].split()[2:])
    assert int(run["max_steps"][0]) <= max(4, settings.get("max_steps", 1200) / 100)
    if "preset" not in settings:
        widths = {"hidden_size", "hidden_sizes"} & run.keys()
        assert len(widths) == ("model_name_or_path" not in run)
        assert all(int(width) <= 80 for name in widths for width in run[name])


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match=r"there is no recipe 'nonsense'; there are .*lm_wikitext2_small"):
        reproduce.main(["nonsense"])
    with pytest.raises(SystemExit, match="has no x; it has equilibrium"):
        reproduce.main(["lm_wikitext2_small", "--variants", "x"])
    with pytest.raises(SystemExit, match="holds no results yet"):
        reproduce.main(["lm_wikitext2_small", "--table", "--results", "nowhere"])
    with pytest.raises(ValueError, match="flags begin with --, got 'stray'"):
        reproduce.given(["stray"])


def test_unknown_fields_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RECIPES", tmp_path)
    (tmp_path / "odd.yaml").write_text("title: odd\ncolour: red\n")
    with pytest.raises(ValueError, match="colour is no field of a recipe"):
        reproduce.load("odd")


def test_other_data_have_columns_of_their_own(capsys):
    for more, named in (([], True), (["--train_dir", "a", "--validation_dir", "b"], False)):
        reproduce.main(["image_cifar100", "--dry_run", *more])
        assert ("--label_column fine_label" in capsys.readouterr().out) == named


def test_a_variant_goes_on_from_the_model_of_another(tmp_path, monkeypatch):
    """`after`: the other one is trained first where its model is not there, and results that are there stay."""
    recipe = {
        **{"title": "two", "about": "a", "expected": "b", "hardware": "c", "script": "think_longer.py", "seeds": [3]},
        **{"arguments": {"max_steps": 4}, "columns": {"loss": "train_loss"}, "evaluation": None},
        "variants": {"short words": {}, "long words": {"after": "short words", "train_size": 32}},
    }
    monkeypatch.setattr(reproduce, "RECIPES", tmp_path)
    (tmp_path / "two.yaml").write_text(json.dumps(recipe))
    trained = []

    def train(command, check):
        given = reproduce.given(command[2:])
        folder = Path(given["output_dir"][0])
        if "model_name_or_path" in given:
            assert (Path(given["model_name_or_path"][0]) / "results.json").exists()
        folder.mkdir(parents=True)
        trained.append(folder.name)
        found = {"train_loss": float(len(trained)), "run": {"command": reproduce.shown(command[1:])}}
        (folder / "results.json").write_text(json.dumps(found))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(reproduce.subprocess, "run", train)
    places = ["two", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    reproduce.main([*places, "--variants", "long words"])
    assert trained == ["short_words-seed3", "long_words-seed3"]
    losses = {path.stem: json.loads(path.read_text())["train_loss"] for path in (tmp_path / "results" / "two").iterdir()}
    assert losses == {"short_words-seed3": 1, "long_words-seed3": 2}
    command = json.loads((tmp_path / "results" / "two" / "long_words-seed3.json").read_text())["command"]
    assert f"--train_size 32 --model_name_or_path {tmp_path / 'runs' / 'two' / 'short_words-seed3'} --seed 3" in command
    assert "after" not in command
    reproduce.main(places)
    assert len(trained) == 2
    with pytest.raises(SystemExit, match=r"--output_dir, --seed: a recipe's runs have seeds and folders of their own"):
        reproduce.main([*places, "--seed", "5", "--output_dir", "/elsewhere"])
    shutil.rmtree(tmp_path / "runs" / "two" / "long_words-seed3")
    with pytest.raises(SystemExit, match="short_words-seed3 holds a run of other settings"):
        reproduce.main([*places, "--variants", "long words", "--results", str(tmp_path / "other"), "--scale", "0.5"])
    # in a clone results are there and models are not
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "results" / "two" / "long_words-seed3.json").unlink()
    reproduce.main([*places, "--variants", "long words"])
    assert trained[2:] == ["short_words-seed3", "long_words-seed3"]
    assert json.loads((tmp_path / "results" / "two" / "short_words-seed3.json").read_text())["train_loss"] == 1

    for after in ("long words", "nothing"):
        recipe["variants"]["long words"]["after"] = after
        (tmp_path / "two.yaml").write_text(json.dumps(recipe))
        with pytest.raises(ValueError, match=f"'long words' goes on from '{after}', which is none of those before it: short words"):
            reproduce.load("two")


# --- a recipe end to end ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recipe of its own, run for one of two seeds and variants, interrupted between training and evaluation."""
    folder = tmp_path_factory.mktemp("recipe")
    for split, lines in (("train", 300), ("validation", 30), ("test", 30)):
        (folder / f"{split}.txt").write_text("".join(f"{number} times {split} is {number * 7 % 13}\n" for number in range(lines)))
    recipe = {
        **{"title": "tiny", "about": "a", "expected": "b", "hardware": "c", "script": "train_language.py", "seeds": [3]},
        "arguments": {
            **{f"{split}_file": str(folder / f"{split}.txt") for split in ("train", "validation", "test")},
            **dict(vocab_size=300, block_size=16, hidden_size=16, intermediate_size=32, num_attention_heads=2, solver_steps=2),
            **dict(max_steps=6, logging_steps=1, save_steps=3, sample_tokens=0, report_to="none", disable_tqdm=True),
        },
        "evaluation": {"curve_steps": [1, 3], "batch_size": 64},
        "columns": {"loss": "evaluation.loss", "at 3": "steps_curve.3.loss", "drift": "greatest_drift", "nothing": "a.b"},
        "variants": {"looped": {}},
    }
    (folder / "tiny.yaml").write_text(json.dumps(recipe))
    return folder


@pytest.mark.slow
def test_end_to_end(run, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "RECIPES", run)
    places = ["--runs", str(run / "runs"), "--results", str(run / "results")]
    reproduce.main(["tiny", *places])
    shown = capsys.readouterr().out
    record = json.loads((run / "results" / "tiny" / "looped-seed3.json").read_text())
    assert record["variant"] == "looped"
    assert record["seed"] == 3
    assert record["updates"] == 6
    assert record["greatest_drift"] == 0
    assert [step for step, _ in record["losses"]] == [1, 2, 3, 4, 5, 6]
    assert [row["max_steps"] for row in record["steps_curve"]] == [1, 3]
    assert record["data_sha256"].keys() == {"train", "validation", "test"}
    assert record["protocol"]["data_sha256"] == record["data_sha256"]["test"]
    assert record["command"].startswith("python examples/train_language.py --train_file")
    assert {"device", "versions", "train_seconds", "peak_memory_bytes", "parameters"} <= record.keys()
    loss, later = (f"{figures['loss']:.3f}" for figures in (record["evaluation"], record["steps_curve"][1]))
    assert f"| looped | {loss} | {later} | 0 |  | 1 | {record.get('commit', '')[:7]}" in shown

    reproduce.main(["tiny", *places])  # nothing is done twice
    assert "is there" in capsys.readouterr().out

    # a run that was interrupted in its training goes on from its checkpoint, with the same result
    (run / "results" / "tiny" / "looped-seed3.json").unlink()
    folder = run / "runs" / "tiny" / "looped-seed3"
    for name in ("results.json", "model.safetensors", "evaluation.json"):
        (folder / name).unlink()
    for path in folder.glob("checkpoint-6"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    reproduce.main(["tiny", *places, "--variants", "looped"])
    assert "--resume_from_checkpoint true" in capsys.readouterr().out
    again = json.loads((run / "results" / "tiny" / "looped-seed3.json").read_text())
    assert again["evaluation"]["loss"] == record["evaluation"]["loss"]

    (run / "results" / "tiny" / "looped-seed3.json").unlink()
    with pytest.raises(SystemExit, match="holds a run of other settings; delete it or name another folder"):
        reproduce.main(["tiny", *places, "--learning_rate", "0.1"])
    with pytest.raises(SystemExit, match="that command failed"):
        reproduce.main(["tiny", *places, "--seeds", "4", "--beta", "1"])
    capsys.readouterr()
    reproduce.main(["tiny", *places])  # only evaluated again
    assert "train_language" not in capsys.readouterr().out

    reproduce.main(["tiny", *places, "--plot", str(run / "tiny.png")])
    assert (run / "tiny.png").stat().st_size > 10_000
    assert AutoTokenizer.from_pretrained(folder)


# --- tables ---


def test_results_files_are_readable_and_hold_the_same():
    record = {"losses": [[1, 2.5], [2, 2.0]], "curve": [{"max_steps": 1, "loss": 3.0}], "text": "a [ b ]", "empty": []}
    text = reproduce.readable(record)
    assert json.loads(text) == record
    assert ' "losses": [[1, 2.5], [2, 2.0]],\n' in text


def test_tables_say_mean_and_deviation():
    assert reproduce.summary([1.0, 2.0, 3.0]) == "2.000 \u00b1 1.000"
    assert reproduce.summary([0.12345, 0.12987]) == "0.1267 \u00b1 0.0045"
    assert reproduce.summary([0.5]) == "0.5000"
    assert reproduce.summary([150.0, 160.5]) == "155.2 \u00b1 7.4"
    assert reproduce.summary([887136256 / 1e6, 900e6 / 1e6]) == "893.6 \u00b1 9.1"
    assert reproduce.summary([0.0, 1.0]) == "0.5000 \u00b1 0.7071"
    assert reproduce.measured({"a": {"b": 2_500_000}}, "a.b/1e6") == 2.5
    assert reproduce.measured({}, "a.b/1e6") is None
    assert reproduce.summary([5, 5]) == "5"
    assert reproduce.summary([12345678]) == "12,345,678"
    assert reproduce.summary([None, None]) == ""
    rows = {
        "steps_curve": [{"max_steps": 4, "loss": 2.0}, {"max_steps": [4, 8], "loss": 3.0}],
        "adaptive": [{"size": "9, odd", "exact": 1}],
    }
    assert reproduce.at(rows, "steps_curve.4.loss") == 2.0
    assert reproduce.at(rows, "steps_curve.16.loss") is None
    assert reproduce.at(rows, "adaptive.9, odd.exact") == 1
    assert reproduce.at({"curve": [{"size": 9, "steps": 2, "exact": 0}, {"size": 9, "steps": 4, "exact": 1}]}, "curve.9.exact") == 1
    assert reproduce.at(rows, "nothing.at.all") is None
    assert reproduce.at(rows, "nothing.at.all|steps_curve.4.loss") == 2.0


def test_a_run_that_diverged_is_told(run, monkeypatch, tmp_path):
    """No evaluation, which would refuse it; None in the file, a word in the table, no line in the picture."""
    monkeypatch.setattr(reproduce, "RECIPES", run)
    folder = tmp_path / "runs" / "tiny" / "looped-seed3"
    folder.mkdir(parents=True)
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be run"))
    train = reproduce.Run(reproduce.load("tiny"), "looped", 3, 1.0, folder, tmp_path / "results", {}, False).commands[0]
    found = {"validation_loss": float("nan"), "greatest_drift": 0.0, "run": {"command": reproduce.shown(train), "commit": "0" * 40}}
    (folder / "results.json").write_text(json.dumps(found))
    reproduce.main(["tiny", *places, "--variants", "looped"])
    record = json.loads((tmp_path / "results" / "tiny" / "looped-seed3.json").read_text())
    assert record["diverged"] is True
    assert record["validation_loss"] is None
    shown = reproduce.table(reproduce.load("tiny"), tmp_path / "results")
    assert "| looped (diverged in 1 of 1) |  |  | 0 |  | 1 | 0000000 |" in shown
    reproduce.main(["tiny", *places, "--plot", str(tmp_path / "tiny.png")])


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_tables_of_the_pages_are_those_of_the_files(page):
    """`python examples/reproduce.py --update README.md docs/results.md` would change nothing."""
    text = (EXAMPLES.parent / page).read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert text.count("<!-- table: ") == text.count("<!-- end -->")
    assert reproduce.updated(text) == text


@pytest.mark.parametrize("name", [name for name in reproduce.names() if (reproduce.RESULTS / name).is_dir()])
def test_kept_results_are_those_of_the_recipe(name, tmp_path, capsys):
    """A results file tells of the recipe as it stands: its variant exists, and its command has the variant's flags. What is there can be drawn."""
    recipe = reproduce.load(name)
    files = list((reproduce.RESULTS / name).glob("*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    assert sum(map(len, reproduce.kept(recipe, reproduce.RESULTS).values())) == len(files)
    elsewhere = (*reproduce.SOURCES, *reproduce.OF_THE_SOURCE, *reproduce.FOR_ACCELERATORS)  # as the place of the run had it
    for record in records:
        _, settings = recipe.settings(record["variant"])
        run = reproduce.given(record["command"].split()[2:])
        for flag, value in reproduce.without(settings, elsewhere).items():
            if not isinstance(value, dict):
                assert run[flag] == reproduce.flags({flag: value})[1:], (record["variant"], flag)
        assert "dirty" not in record["commit"]
        assert "/" not in record["command"].split()[1].removeprefix("examples/").removeprefix("benchmarks/")
        if record["variant"].startswith(("equilibrium", "the same", "exact", "beta", "modern", "paper")):
            assert record["greatest_drift"] == 0
    assert reproduce.table(recipe, reproduce.RESULTS).count("\n") >= 2
    capsys.readouterr()
    reproduce.plot(recipe, reproduce.RESULTS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()
    evaluated = {record["variant"] for record in records if "curve" in record or record["evaluation"]}
    told = [line.partition(": only its training")[0] for line in capsys.readouterr().out.splitlines()]
    assert set(told) == {record["variant"] for record in records} - evaluated
