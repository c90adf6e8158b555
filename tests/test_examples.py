"""The language script end to end on small data, interrupted and resumed, and with unusable input; the help of both scripts."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # datasets hashes functions by their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def language():
    return load("train_language")


@pytest.fixture(scope="module")
def text_files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("text")
    words = ["alpha", "beta", "gamma", "delta", "\u00e9psilon"]
    generator = np.random.default_rng(0)
    files = {}
    for split, lines in (("train", 400), ("validation", 40), ("test", 40)):
        # every second word repeats the one before: a unigram model cannot know that
        rows = [" ".join(w for w in generator.choice(words, 6) for _ in (0, 1)) for _ in range(lines)]
        files[split] = str(folder / f"{split}.txt")
        Path(files[split]).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return files


def language_arguments(folder, files, *more: str) -> list[str]:
    named = [flag for split, file in files.items() for flag in (f"--{split}_file", file)]
    return [
        *named,
        *("--output_dir", str(folder), "--vocab_size", "300", "--block_size", "32", "--hidden_size", "32", "--intermediate_size", "64"),
        *(
            "--per_device_train_batch_size",
            "8",
            "--max_steps",
            "60",
            "--save_steps",
            "20",
            "--logging_steps",
            "5",
            "--learning_rate",
            "1e-2",
        ),
        *("--sample_tokens", "5", "--prompt", "alpha", "--disable_tqdm", "true", *more),
    ]


def test_language_script_learns_saves_and_reports(language, text_files, tmp_path, capsys):
    results = language.main(language_arguments(tmp_path, text_files))
    printed = capsys.readouterr().out
    assert results["greatest_drift"] == 0
    assert results["test"]["perplexity"] < 0.8 * results["test_unigram"]["perplexity"]
    assert results["validation_loss"] < results["validation_loss_before"]
    assert json.loads((tmp_path / "results.json").read_text())["updates"] == 60
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "bits per byte" in printed
    assert "a sample" in printed
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "alpha alpha beta beta \u00e9psilon"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert all(entry["drift"] == 0 and entry["residual"] > 0 for entry in state["log_history"] if "loss" in entry)

    # the scores again, by hand: every token of the test text is predicted exactly once
    ids = [tokenizer.eos_token_id, *tokenizer(Path(text_files["test"]).read_text(encoding="utf-8"))["input_ids"]]
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 31):
            block = torch.tensor([ids[start : start + 32]])
            nats += torch.nn.functional.cross_entropy(model.eval()(block).logits[0, :-1], block[0, 1:], reduction="sum").item()
    assert results["test"]["tokens"] == len(ids) - 1
    assert results["test"]["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-4)
    size = len(Path(text_files["test"]).read_bytes())
    assert results["test"]["bits_per_byte"] == pytest.approx(nats / size / np.log(2), rel=1e-4)


def test_language_script_in_bf16_with_other_settings_goes_on_from_a_saved_model(language, text_files, tmp_path):
    settings = (
        "--bf16",
        "true",
        "--use_cpu",
        "true",
        "--gradient_accumulation_steps",
        "2",
        "--max_steps",
        "6",
        "--beta",
        "0.8",
        "--block_type",
        "paper",
    )
    first = language.main(language_arguments(tmp_path / "a", text_files, *settings, "--tol", "1e-3", "--dropout", "0.1"))
    assert first["greatest_drift"] == 0
    more = language.main(language_arguments(tmp_path / "b", text_files, "--model_name_or_path", str(tmp_path / "a"), "--max_steps", "6"))
    assert more["validation_loss_before"] == pytest.approx(first["validation_loss"], rel=1e-2)  # bf16 then, float32 now


def test_an_interrupted_run_leaves_a_whole_checkpoint_and_resuming_equals_never_having_stopped(text_files, tmp_path):
    def command(folder, *more):
        return [sys.executable, str(EXAMPLES / "train_language.py"), *language_arguments(folder, text_files, "--dropout", "0.1", *more)]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "cut" / "checkpoint-20" / "trainer_state.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "cut" / "checkpoint-40").mkdir(exist_ok=True)  # a later checkpoint that the kill cut short
    (tmp_path / "cut" / "checkpoint-40" / "trainer_state.json").write_text('{"epoch": 0.3')
    subprocess.run(command(tmp_path / "cut", "--resume_from_checkpoint", "true"), check=True, capture_output=True)
    from safetensors.torch import load_file

    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_standard_library_splits_share_no_file(language):
    import sysconfig

    seen = {}
    for split in ("train", "validation", "test"):
        rows = list(language.standard_library_rows(split, "", sysconfig.get_path("stdlib")))
        assert rows
        for row in rows:
            assert seen.setdefault(row["text"], split) == split
    assert len(seen) > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_file", "nowhere.txt"], "no file 'nowhere.txt'"),
        (["--validation_file", "valid.txt"], "--train_file is missing"),
        (["--train_file", "{empty}"], "no text"),
        (["--train_file", "{short}"], "shorter than one sequence"),
        (["--train_file", "{train}", "--text_column", "body"], "no column 'body'"),
        (["--train_file", "{train}", "--dataset_name", "x"], "not both"),
        (["--train_file", "{train}", "--beta", "1"], "must not be 1"),
        (["--train_file", "{train}", "--solver_steps", "-2"], "max_steps"),
        (["--train_file", "{train}", "--block_size", "1"], "--block_size"),
        (["--train_file", "{train}", "--resume_from_checkpoint", "true"], "no whole checkpoint"),
        (["--train_file", "{train}", "--resume_from_checkpoint", "elsewhere"], "not a whole checkpoint"),
    ],
    ids=str,
)
def test_unusable_input_of_the_language_script_is_told(language, text_files, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "short.txt").write_text("one\ntwo\n" * 15)
    names = {"{empty}": str(tmp_path / "empty.txt"), "{short}": str(tmp_path / "short.txt"), "{train}": text_files["train"]}
    filled = [names.get(argument, argument) for argument in arguments]
    with pytest.raises(Exception, match=message):
        language.main([*filled, "--output_dir", str(tmp_path / "out"), "--vocab_size", "300", "--disable_tqdm", "true"])


@pytest.mark.parametrize("script", ["train_language", "train_image"])
def test_help_lists_own_and_training_flags(script):
    out = subprocess.run([sys.executable, str(EXAMPLES / f"{script}.py"), "--help"], capture_output=True, text=True, check=True).stdout
    for flag in ("--solver_steps", "--beta", "--gradient_accumulation_steps", "--bf16", "--resume_from_checkpoint", "--dataset_name"):
        assert flag in out


@pytest.mark.skipif(not SHARED.is_dir(), reason="WikiText-2 and the GPT-2 tokenizer are not part of a clone")
def test_language_script_on_wikitext_counts_words_and_tokens_as_published(language, tmp_path):
    import gzip

    files = {}
    for split, name in (("validation", "valid"), ("test", "test")):
        files[split] = str(tmp_path / f"{split}.txt")
        with gzip.open(SHARED / "data" / "wikitext-2" / f"wiki.{name}.tokens.gz") as packed:
            Path(files[split]).write_bytes(packed.read())
    files["train"] = files["validation"]
    options, data, _ = language.HfArgumentParser(
        (language.ModelArguments, language.DataArguments, language.LanguageTrainingArguments)
    ).parse_args_into_dataclasses(language_arguments(tmp_path / "out", files))
    rows = language.load_text(data)
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "gpt2_tokenizer")
    ids, blocks = language.pack(rows, tokenizer, data, separate=False)
    assert sum(map(len, ids["test"]["input_ids"])) == 295_877
    assert sum(map(len, ids["validation"]["input_ids"])) == 258_659
    assert language.text_size(rows["test"]["text"]) == {"words": 245_569, "bytes": 1_256_449}
    assert options.block_type == "modern"
    predicted = sum(label != -100 for block in blocks["test"]["labels"] for label in block[1:])
    assert predicted == 295_877
