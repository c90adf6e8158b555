"""examples/evaluate.py: the scores by another route, windows, curves, what the file of results holds, and input that does not fit."""

import importlib
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import EXAMPLES, awake
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, ViTImageProcessorPil

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQForImageClassification, RevDEQForSequenceClassification, RevDEQVisionConfig
from revdeq_hf.model_card import file_hash

pytestmark = pytest.mark.usefixtures("scripts")


@pytest.fixture(scope="module")
def evaluation(scripts):
    return importlib.import_module("evaluation")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(["alpha", "beta", "gamma", "d\u00e9lta"], 6)) for _ in range(12)]
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(scripts, text_file):
    rows = datasets.Dataset.from_dict({"text": text_file.read_text(encoding="utf-8").splitlines(keepends=True)})
    return importlib.import_module("train_language").train_tokenizer(rows, "text", 270)


def save_language_model(folder: Path, tokenizer, **settings) -> Path:
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_attention_heads=2, max_position_embeddings=24)
    awake(RevDEQForCausalLM(RevDEQConfig(**{**sizes, "max_steps": 2, "beta": 0.8, **settings})), 0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def language(tmp_path_factory, tokenizer) -> Path:
    return save_language_model(tmp_path_factory.mktemp("models") / "language", tokenizer)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 150)):
        (folder / name).mkdir()
        for number in range(10):
            Image.fromarray(generator.integers(low, low + 100, (8, 8), dtype=np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def image_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "image"
    torch.manual_seed(0)
    names = ["dark", "light"]
    config = RevDEQVisionConfig(
        image_size=8,
        num_channels=1,
        hidden_sizes=[16, 16],
        expansion_ratios=[1, 1],
        max_steps=[2, 1],
        id2label=dict(enumerate(names)),
        label2id={"dark": 0, "light": 1},
    )
    RevDEQForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.25]).save_pretrained(folder)
    return folder


# --- texts ---


@pytest.mark.parametrize(("count", "window", "stride"), [(2, 5, 2), (10, 5, 1), (11, 5, 4), (23, 8, 3), (24, 24, 12), (100, 7, 6)])
def test_windows_predict_every_token_once_with_enough_before_it(evaluation, count, window, stride):
    spans = list(evaluation.windows(count, window, stride))
    assert [token for _, end, first in spans for token in range(first, end)] == list(range(1, count))
    assert all(end - begin <= window for begin, end, _ in spans)
    assert all(first - begin >= window - stride for begin, _, first in spans[1:])


@pytest.mark.parametrize(("window", "stride"), [(24, 12), (10, 3), (9, 8)])
def test_text_scores_equal_those_of_single_predictions(evaluation, language, text_file, tmp_path, window, stride):
    flags = ["--test_file", str(text_file), "--window", str(window), "--stride", str(stride), "--output_dir", str(tmp_path)]
    found = evaluation.main([str(language), *flags, "--batch_size", "4", "--curve_examples", "3"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(language).eval(), AutoTokenizer.from_pretrained(language)
    written = text_file.read_text(encoding="utf-8")
    ids = [tokenizer.eos_token_id, *tokenizer(written)["input_ids"]]
    nats = 0.0
    for token in range(1, len(ids)):  # the first window that reaches the token
        begin = max(0, math.ceil((token + 1 - window) / stride)) * stride
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:token]])).logits[0, -1]
        nats -= logits.log_softmax(-1)[ids[token]].item()
    words, size = len(written.split()) + written.count("\n"), len(written.encode("utf-8"))
    assert found["results"]["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert found["results"]["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    assert found["results"]["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert found["results"]["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    protocol = found["protocol"]
    assert (protocol["tokens"], protocol["words"], protocol["bytes"], protocol["examples"]) == (len(ids) - 1, words, size, 12)


def test_what_the_file_of_results_holds(evaluation, language, text_file, tmp_path, capsys):
    shutil.copytree(language, tmp_path / "model")
    found = evaluation.main([str(tmp_path / "model"), "--test_file", str(text_file), "--batch_size", "8"])
    assert json.loads((tmp_path / "model" / "evaluation.json").read_text()) == found
    assert found["weights"] == {"model.safetensors": file_hash(language / "model.safetensors")}
    assert found["plot"]["sha256"] == file_hash(tmp_path / "model" / "evaluation_steps.png")
    assert (tmp_path / "model" / "evaluation_steps.png").read_bytes().startswith(b"\x89PNG")
    assert found["command"].startswith("python examples/evaluate.py ")
    assert {"torch", "transformers", "revdeq_hf"} <= found["versions"].keys()
    assert found["protocol"].items() >= {"split": "test", "window": 24, "stride": 12, "dtype": "float32", "max_steps": 2}.items()
    assert found["solve"]["drift"] == 0
    assert found["solve"]["steps"] == 2
    assert [point["max_steps"] for point in found["steps_curve"]] == [1, 2, 4, 8]
    assert found["steps_curve"][1]["loss"] == found["results"]["loss"]
    model = AutoModelForCausalLM.from_pretrained(language).eval()
    residuals = found["residual_per_step"]["model.solve"]
    assert len(residuals) == 8
    assert residuals[7] < residuals[1] < residuals[0] == pytest.approx(1, abs=1e-3)  # the solve begins at 0
    flags = ["--test_file", str(text_file), "--output_dir", str(tmp_path)]
    other = evaluation.main([str(tmp_path / "model"), *flags, "--solver_steps", "4", "--curve_steps", "8", "3"])
    assert [point["max_steps"] for point in other["steps_curve"]] == [8, 3]
    assert other["steps_curve"][0]["loss"] == pytest.approx(found["steps_curve"][3]["loss"], rel=1e-6)
    assert other["results"]["loss"] == pytest.approx(found["steps_curve"][2]["loss"], rel=1e-6)
    assert other["protocol"]["max_steps"] == 4
    assert other["configuration"]["max_steps"] == model.config.max_steps == 2
    assert "bits_per_byte" in capsys.readouterr().out


def test_the_protocol_says_where_the_texts_came_from(evaluation, language, text_file, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(text_file, tmp_path / "data" / "train.txt")
    twentieth, file = "a twentieth of the training rows (seed 0)", str(text_file)
    for flags, data, split in (
        (["--test_file", file], "lines.txt", "test"),
        (["--validation_file", file], "lines.txt", "validation"),
        (["--train_file", file], "lines.txt", twentieth),
        (["--train_file", file, "--split", "train"], "lines.txt", "train"),
        (["--dataset_name", str(tmp_path / "data")], "data", twentieth),
    ):
        found = evaluation.main([str(language), *flags, "--curve_steps", "2", "--output_dir", str(tmp_path)])["protocol"]
        assert (found["data"], found["split"]) == (data, split)
        assert "dataset" not in found  # which names a data set of the Hub


def test_the_scripts_own_protocol_is_a_stride_of_a_window_less_one(evaluation, language, text_file, tmp_path):
    """Trained and evaluated on the same file by the training script, whose sequences begin with the last token of the one before."""
    script = importlib.import_module("train_language")
    flags = ["--train_file", str(text_file), "--test_file", str(text_file), "--block_size", "24", "--max_steps", "2", "--report_to", "none"]
    more = ["--sample_tokens", "0", "--disable_tqdm", "true", "--model_name_or_path", str(language), "--output_dir", str(tmp_path)]
    trained = script.main([*flags, *more])
    found = evaluation.main([str(tmp_path), "--test_file", str(text_file), "--window", "24", "--stride", "23"])
    for name in ("loss", "perplexity", "word_perplexity", "bits_per_byte"):
        assert found["results"][name] == pytest.approx(trained["test"][name], rel=1e-5)


def test_tolerance_bfloat16_and_an_explicit_model(evaluation, tokenizer, text_file, tmp_path):
    model = save_language_model(tmp_path / "tol", tokenizer, max_steps=8, tol=0.3)
    found = evaluation.main([str(model), "--test_file", str(text_file), "--dtype", "bfloat16", "--curve_examples", "2"])
    assert 1 <= found["solve"]["steps"] < 8
    assert found["solve"]["drift"] == 0
    explicit = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    )
    explicit.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    found = evaluation.main([str(tmp_path / "llama"), "--test_file", str(text_file)])
    assert found["results"]["perplexity"] > 1
    assert found["steps_curve"] == []
    assert "plot" not in found


# --- images ---


def test_image_scores_equal_those_of_single_images(evaluation, image_model, pictures, tmp_path):
    flags = ["--train_dir", str(pictures), "--validation_dir", str(pictures), "--output_dir", str(tmp_path), "--batch_size", "6"]
    found = evaluation.main([str(image_model), *flags])
    model = RevDEQForImageClassification.from_pretrained(image_model).eval()
    right, nats = 0, 0.0
    for label, name in enumerate(("dark", "light")):
        for path in (pictures / name).glob("*.png"):
            values = (torch.from_numpy(np.array(Image.open(path))) / 255 - 0.5) / 0.25
            with torch.no_grad():
                log_probabilities = model(values[None, None].float()).logits[0].log_softmax(-1)
            right += int(log_probabilities.argmax() == label)
            nats -= log_probabilities[label].item()
    assert found["results"]["accuracy"] == right / 20
    assert found["results"]["loss"] == pytest.approx(nats / 20, rel=1e-5)
    assert np.array(found["details"]["confusion_matrix"]).sum() == 20
    assert [point["max_steps"] for point in found["steps_curve"]] == [[1, 1], [2, 1], [4, 2], [8, 4]]
    assert found["steps_curve"][1]["accuracy"] == found["results"]["accuracy"]
    assert set(found["residual_per_step"]) == {"model.stages.0", "model.stages.1"}
    assert found["solve"]["drift"] == 0
    assert found["solve"]["steps"] == 1.5
    assert found["protocol"].items() >= {"split": "validation", "examples": 20, "classes": 2, "image_size": [8, 8]}.items()
    assert found["protocol"]["data"] == f"images of {pictures.name}"  # the split is told beside it


# --- input that does not fit ---


def test_errors_say_what_to_do(evaluation, language, image_model, tokenizer, text_file, pictures, tmp_path):
    own = ["--test_file", str(text_file), "--output_dir", str(tmp_path / "out")]

    def refused(kind: type[Exception], message: str, model: Path, *flags: str) -> None:
        with pytest.raises(kind, match=message):
            evaluation.main([str(model), *flags])

    refused(FileNotFoundError, "there is no folder 'nobody/nothing'", Path("nobody/nothing"), *own)
    (tmp_path / "empty").mkdir()
    refused(FileNotFoundError, r"config\.json", tmp_path / "empty", *own)
    shutil.copytree(language, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    refused(FileNotFoundError, "holds no weights", tmp_path / "bare", *own)
    for window, stride in (("8", "8"), ("8", "9"), ("1", "1")):
        refused(ValueError, "--stride must be", language, *own, "--window", window, "--stride", stride)
    refused(ValueError, "--block_size: for training only", language, *own, "--block_size", "8")
    refused(ValueError, "--split must be one of", language, *own, "--split", "tests")
    refused(ValueError, "--batch_size must be at least 1", language, *own, "--batch_size", "0")
    refused(ValueError, "--dtype must be", language, *own, "--dtype", "int8")
    refused(ValueError, "--use_cpu true and --device cuda contradict", language, *own, "--use_cpu", "true", "--device", "cuda")
    refused(FileNotFoundError, "--train_file: there is no file", language, "--test_file", "missing.txt")
    data = ["--train_dir", str(pictures), "--validation_dir", str(pictures)]
    refused(ValueError, "--cutout: for training only", image_model, *data, "--cutout", "2")
    (tmp_path / "other").mkdir()
    shutil.copytree(pictures / "dark", tmp_path / "other" / "night")
    shutil.copytree(pictures / "light", tmp_path / "other" / "day")
    others = ["--train_dir", str(tmp_path / "other"), "--validation_dir", str(tmp_path / "other")]
    refused(ValueError, "other classes than the model", image_model, *others)
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, max_steps=2)
    RevDEQForSequenceClassification(RevDEQConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "head")
    refused(ValueError, "RevDEQForSequenceClassification; causal language models", tmp_path / "head", *own)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_weights_that_do_not_fit_or_are_not_finite_are_refused(evaluation, language, text_file, tmp_path):
    for name, change in (
        ("short", lambda weights: weights.pop("lm_head.weight")),
        ("nan", lambda weights: weights["lm_head.weight"].fill_(math.nan)),
    ):
        folder = tmp_path / name
        shutil.copytree(language, folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="do not fit its config" if name == "short" else "is nan: these weights"):
            evaluation.main([str(folder), "--test_file", str(text_file)])
        assert not (folder / "evaluation.json").exists()


# --- the script ---


def test_beside_the_script_the_library_is_still_found():
    """A script's own folder comes first where Python looks for modules, and evaluate.py has the library's name."""
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import evaluate; print(evaluate.__file__, evaluate.Metric, evaluate.module.__name__)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "evaluate.module.Metric" in told
    assert str(EXAMPLES) not in told


def test_the_script_runs_by_itself(language, text_file, tmp_path):
    script = [sys.executable, str(EXAMPLES / "evaluate.py")]
    told = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "MODEL" in told
    assert "--curve_steps" in told
    assert subprocess.run(script, capture_output=True, check=False).returncode == 2
    flags = ["--test_file", str(text_file), "--curve_examples", "2", "--output_dir", str(tmp_path)]
    done = subprocess.run([*script, str(language), *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "evaluation.json").read_text())["protocol"]["curve_examples"] == 2


def test_the_flag_of_the_training_scripts_chooses_the_cpu(evaluation):
    assert evaluation.text_arguments(["--use_cpu", "true"])[0].device == "cpu"
    assert evaluation.image_arguments(["--use_cpu", "true", "--device", "cpu"])[0].device == "cpu"
    assert evaluation.text_arguments([])[0].device is None


def test_a_model_of_other_data_is_not_measured_on_the_built_in_ones(evaluation, language, text_file, tmp_path):
    folder, text = shutil.copytree(language, tmp_path / "model"), str(shutil.copy(text_file, tmp_path / "my lines.txt"))
    words = f"python examples/train_language.py --train_f '{text}' --validation-file={text_file} --max_steps 2 --pack false --text_col text"
    (folder / "results.json").write_text(json.dumps({"run": {"command": words}}))
    with pytest.raises(ValueError, match=r"was trained with --train_file .*, and nothing says on which data") as told:
        evaluation.main([str(folder), "--curve_steps", "1"])
    assert not (folder / "evaluation.json").exists()
    (command,) = (line.strip() for line in str(told.value).splitlines() if "python" in line)
    _, script, *flags = shlex.split(command)
    assert script == "examples/evaluate.py"
    assert flags == [str(folder), "--train_file", text, "--validation_file", str(text_file), "--text_column", "text", "--curve_steps", "1"]
    for other in ([], {"run": None}, {"run": {"command": "python mine.py --output_dir train_file --max_steps 2"}}):
        (folder / "results.json").write_text(json.dumps(other))
        evaluation.refuse_other_data(folder, evaluation.text_arguments([])[1], str(folder), [])
    (folder / "results.json").write_text(json.dumps({"run": {"command": words}}))
    assert evaluation.main(flags)["protocol"]["data"] == "lines.txt"
    assert (folder / "evaluation.json").exists()


def test_the_fixed_point_of_a_text_is_shown(scripts, language, tmp_path, capsys):
    show = importlib.import_module("show_fixed_point")
    flags = ["--model", str(language), "--prompt", "a few words", "--new_tokens", "3", "--output", str(tmp_path)]
    show.main([*flags, "--steps", "3"])
    printed = capsys.readouterr().out
    assert "most probable next" in printed
    assert "model.solve: " in printed
    assert {path.name for path in tmp_path.iterdir()} == {"fixed_point.png", "convergence.png"}
    with pytest.raises(ValueError, match="--steps must be at least 1, got 0"):
        show.main([*flags, "--steps", "0"])
    with pytest.raises(ValueError, match="--prompt must hold at least one token"):
        show.main([*flags, "--prompt", ""])
    with pytest.raises(FileNotFoundError, match="--output: there is no folder 'nowhere'"):
        show.main([*flags, "--output", "nowhere"])
    explicit = LlamaConfig(vocab_size=512, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    LlamaForCausalLM(explicit).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(language).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"llama' is a LlamaForCausalLM, which has no fixed point to show"):
        show.main([*flags, "--model", str(tmp_path / "llama")])
