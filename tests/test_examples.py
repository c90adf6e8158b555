"""The language script end to end on small data, packed, padded and streamed, interrupted and resumed, and with unusable input; the help of both scripts."""

import contextlib
import gzip
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import EXAMPLES, SHARED
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from revdeq_hf import RevDEQForImageClassification, RevDEQVisionConfig
from revdeq_hf.checkpoints import last_whole_checkpoint
from revdeq_hf.training import text_hash, text_size


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # datasets hashes functions by their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def language(scripts):
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
    """Flags of a small run; the network's only where it is a new one."""
    named = [flag for split, file in files.items() for flag in (f"--{split}_file", file)]
    return [
        *named,
        *("--output_dir", str(folder), "--block_size", "32"),
        *([] if "--model_name_or_path" in more else ["--hidden_size", "32", "--intermediate_size", "64"]),
        *([] if {"--model_name_or_path", "--tokenizer_name"} & {*more} else ["--vocab_size", "300"]),
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
    assert {split: text_hash(Path(file).read_text().splitlines(keepends=True)) for split, file in text_files.items()} == first[
        "data_sha256"
    ]
    on = ("--model_name_or_path", str(tmp_path / "a"), "--max_steps", "6")
    more = language.main(language_arguments(tmp_path / "b", text_files, *on))
    assert more["validation_loss_before"] == pytest.approx(first["validation_loss"], rel=1e-2)  # bf16 then, float32 now

    solver = ("--solver_steps", "3", "--dropout", "0", "--steps_sampling", '{"distribution": "uniform", "min_steps": 1, "max_steps": 4}')
    language.main(language_arguments(tmp_path / "c", text_files, *on, *solver))
    was, kept, config = (AutoConfig.from_pretrained(tmp_path / name) for name in "abc")
    assert (was.beta, was.max_steps, was.tol, was.hidden_dropout, was.steps_sampling) == (0.8, 2, 1e-3, 0.1, None)
    assert {**kept.to_dict(), "_name_or_path": None} == {**was.to_dict(), "_name_or_path": None}
    assert (config.beta, config.max_steps, config.tol, config.hidden_dropout, config.steps_sampling["max_steps"]) == (0.8, 3, 1e-3, 0, 4)


def test_a_saved_model_pads_with_the_end_of_text_whose_embedding_learns_on(language, text_files, tmp_path):
    """The configuration names no padding token: torch gives the embedding of one no gradient, and here it begins every text."""
    language.main(language_arguments(tmp_path / "a", text_files, "--max_steps", "2", "--save_steps", "1"))
    on = ("--max_steps", "2", "--model_name_or_path")
    language.main(language_arguments(tmp_path / "b", text_files, *on, str(tmp_path / "a")))
    before, after = (load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"] for name in "ab")
    for folder in (tmp_path / "a", tmp_path / "a" / "checkpoint-1", tmp_path / "b"):
        assert AutoConfig.from_pretrained(folder).pad_token_id is None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert tokenizer.pad_token == tokenizer.eos_token == language.END_OF_TEXT
    assert not torch.equal(before[tokenizer.eos_token_id], after[tokenizer.eos_token_id])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer(["alpha alpha", "beta"], return_tensors="pt", padding=True, padding_side="left")
    assert len(model.generate(**batch, max_new_tokens=2)) == 2


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_rows_that_stand_in_for_a_split_are_told(language, text_files, tmp_path, capsys, streaming):
    for number, (given, split, told) in enumerate(
        ((["train"], "validation", True), (["train", "validation"], "validation", False), (list(text_files), "test", False))
    ):
        files = {name: text_files[name] for name in given}
        results = language.main(language_arguments(tmp_path / str(number), files, "--max_steps", "2", "--streaming", streaming))
        printed = capsys.readouterr().out
        assert results["test_split"] == split
        assert f"\non the {split} split " in printed
        assert ("There is no validation split: a twentieth of the training rows is kept to validate on" in printed) == told
        assert {"seconds of training", "seconds of this process"} <= {line.split("  ")[0] for line in printed.splitlines()}
    assert json.loads((tmp_path / "0" / "results.json").read_text())["test_split"] == "validation"


def test_a_sample_begins_as_a_row_to_validate_on_does(language, text_files, tmp_path, capsys):
    arguments = language_arguments(tmp_path, text_files, "--max_steps", "2")
    at = arguments.index("--prompt")
    language.main(arguments[:at] + arguments[at + 2 :])
    sample = capsys.readouterr().out.split("--- a sample ---\n")[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    row = Path(text_files["validation"]).read_text(encoding="utf-8").splitlines()[0]
    begin = tokenizer.decode(tokenizer(row)["input_ids"][:5])
    assert len(begin) > 5
    assert sample.startswith(begin)
    assert language.first_tokens(["", None, " \n", "alpha"], tokenizer) == "alpha"
    cut = language.first_tokens(["\u65e5\u672c\u8a9e"], tokenizer)  # three bytes each, of which five tokens of bytes hold one and a part
    assert cut == "\u65e5"


def test_labels_smoothed_of_a_compiled_model_are_refused(language, monkeypatch):
    monkeypatch.setattr(language, "load_text", lambda *_: pytest.fail("the data were loaded"))
    monkeypatch.setattr(language, "given_flags", lambda *_: pytest.fail("flags were compared, for which configurations are loaded"))
    for compiled in (["--torch_compile", "true"], ["--torch_compile_backend", "eager"]):
        with pytest.raises(ValueError, match=r"--label_smoothing_factor 0\.1 and --torch_compile true: .*without shifting them"):
            language.main([*compiled, "--label_smoothing_factor", "0.1"])


def test_layers_before_and_after_and_a_rounded_vocabulary(language, text_files, tmp_path):
    settings = ("--max_steps", "2", "--num_prelude_layers", "1", "--num_coda_layers", "2", "--pad_vocab_to_multiple_of", "64")
    language.main(language_arguments(tmp_path, text_files, *settings))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.config.num_prelude_layers, model.config.num_coda_layers) == (1, 2)
    size = len(AutoTokenizer.from_pretrained(tmp_path))
    assert model.config.vocab_size == 64 * (size // 64 + 1) > size


def history(folder) -> list[dict]:
    """What a run logged, less what depends on the clock."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "residual", "residual_max", "solver_steps", "drift")
    return [found for entry in entries if (found := {name: entry[name] for name in kept if name in entry}).keys() & {"loss", "eval_loss"}]


def assert_same_run(one, other):
    assert history(one) == history(other)
    weights, resumed = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())


SAMPLED = ("--steps_sampling", '{"distribution": "uniform", "min_steps": 1, "max_steps": 4}')
ACCUMULATED = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")


def test_an_interrupted_run_leaves_a_whole_checkpoint_and_resuming_equals_never_having_stopped(text_files, tmp_path):
    def command(folder, *more):
        flags = ("--dropout", "0.1", *SAMPLED, *ACCUMULATED)
        return [sys.executable, str(EXAMPLES / "train_language.py"), *language_arguments(folder, text_files, *flags, *more)]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while last_whole_checkpoint(tmp_path / "cut") is None:  # its last file exists before it is written
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "cut" / "checkpoint-40").mkdir(exist_ok=True)  # a later checkpoint that the kill cut short
    (tmp_path / "cut" / "checkpoint-40" / "trainer_state.json").write_text('{"epoch": 0.3')
    subprocess.run(command(tmp_path / "cut", "--resume_from_checkpoint", "true"), check=True, capture_output=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    steps = [entry["solver_steps"] for entry in history(tmp_path / "whole") if "solver_steps" in entry]
    assert len(set(steps)) > 1, "the steps were meant to be drawn"


@pytest.mark.parametrize(
    "flags",
    [
        ("--streaming", "true", "--shuffle_buffer", "16"),
        ("--streaming", "true", "--shuffle_buffer", "16", "--dataloader_num_workers", "1", "--pack", "false"),
        ("--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps", "--eval_steps", "10"),
    ],
    ids=["stream", "stream-worker-padded", "plateau"],
)
@pytest.mark.parametrize("step", [20, 60])
def test_resuming_finds_its_place_in_a_stream_and_in_a_schedule(language, text_files, tmp_path, flags, step):
    if step == 60 and flags[0] != "--streaming":
        pytest.skip("the end of a run is the same for all finite data")
    plateau = ("--lr_scheduler_kwargs", '{"patience": 0, "factor": 0.5, "threshold": 0.2}') if "reduce_lr_on_plateau" in flags else ()
    flags = (*flags, *plateau, "--dropout", "0.1", *SAMPLED, *ACCUMULATED, "--save_total_limit", "3")
    language.main(language_arguments(tmp_path / "whole", text_files, *flags))
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "cut" / f"checkpoint-{step}")
    resumed = language.main(language_arguments(tmp_path / "cut", text_files, *flags, "--resume_from_checkpoint", "true"))
    assert resumed["updates"] == 60
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    if plateau:
        rates = [entry["learning_rate"] for entry in history(tmp_path / "whole") if "learning_rate" in entry]
        assert rates[0] == 1e-2  # no warm-up
        assert rates[-1] <= 5e-3


def test_a_resumed_run_keeps_its_tokenizer_whatever_became_of_the_text(language, text_files, tokens, tmp_path):
    files = {split: str(tmp_path / Path(name).name) for split, name in text_files.items()}
    for split, name in text_files.items():
        shutil.copyfile(name, files[split])
    arguments = language_arguments(tmp_path / "out", files, "--max_steps", "20")
    first = language.main(arguments)
    before = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    with Path(files["train"]).open("a", encoding="utf-8") as file:
        file.write("omega psi chi phi upsilon tau sigma\n" * 2000)
    second = language.main([*arguments, "--max_steps", "22", "--resume_from_checkpoint", "true"])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == before
    assert second["updates"] == 22
    assert second["validation_loss"] < first["validation_loss"] + 0.2
    tokens[1].save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has other tokens than the checkpoint"):
        language.main(
            language_arguments(tmp_path / "out", files, "--resume_from_checkpoint", "true", "--tokenizer_name", str(tmp_path / "other"))
        )


def test_compressed_tables_are_read_as_tables(language, tmp_path):
    rows = [json.dumps({"text": f"line {number} of the text"}) for number in range(50)]
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as file:
        file.write("\n".join(rows))
    loaded, _ = language.load_text(language.DataArguments(train_file=str(tmp_path / "t.jsonl.gz")))
    assert set(loaded["train"]["text"]) | set(loaded["validation"]["text"]) == {f"line {number} of the text" for number in range(50)}


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_empty_cell_is_an_empty_text(language, tmp_path, kind, streaming):
    """Of a table that leaves out the cell, or names a null in it."""
    rows: list[str | None] = [f"line {number} of the text" for number in range(60)]
    runs = []
    for name, empty in (("a", None), ("b", "")):
        file = tmp_path / f"{name}.{kind}"
        if kind == "csv":  # where both are an empty cell
            file.write_text("number,text\n" + "".join(f"{number},{text}\n" for number, text in enumerate([*rows, "", *rows, ""])))
        else:
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*rows, empty, *rows, empty]))
        files = dict.fromkeys(("train", "validation", "test"), str(file))
        runs.append(language.main(language_arguments(tmp_path / name, files, "--max_steps", "2", "--streaming", streaming)))
    one, other = runs
    assert one["data_sha256"] == other["data_sha256"]
    assert one["test"]["word_perplexity"] == other["test"]["word_perplexity"]
    assert text_size(["a b\n", None, "c"]) == {"words": 4, "bytes": 5}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_the_mark_at_the_beginning_of_a_file_is_no_text(language, tmp_path, kind, streaming):
    lines = [json.dumps({"text": f"line {number}"}) if kind == "jsonl" else f"line {number}" for number in range(20)]
    (tmp_path / f"t.{kind}").write_text("\n".join((["text"] if kind == "csv" else []) + lines) + "\n", encoding="utf-8-sig")
    data = language.DataArguments(**dict.fromkeys(("train_file", "validation_file"), str(tmp_path / f"t.{kind}")), streaming=streaming)
    loaded, stream = language.load_text(data)
    assert [text.strip() for text in loaded["train"]["text"]] == [f"line {number}" for number in range(20)]
    if stream is not None:
        assert next(iter(stream))["text"].strip() == "line 0"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_is_not_utf8_further_on_is_told_by_its_name(language, tmp_path, workers):
    file = tmp_path / "late.txt"
    file.write_bytes(b"alpha beta gamma\n" * 700_000 + "h\u00e9h\u00e9\n".encode("latin-1"))  # of more than the 10 MB that are read at once
    rows = datasets.load_dataset("text", data_files=str(file), split="train", streaming=True)
    rows = rows.map(lambda batch: {"input_ids": [[1, 2]] * len(batch["text"])}, batched=True, remove_columns=["text"])
    stream = language.Stream(rows, lambda: lambda batch: batch | {"labels": batch["input_ids"]}, 1, 0, {"train": str(file)})
    with pytest.raises(ValueError, match=r"late\.txt is not UTF-8; convert it first") as told:
        for _ in DataLoader(stream, batch_size=None, num_workers=workers):
            pass
    assert not isinstance(told.value, UnicodeDecodeError)


def test_a_training_of_no_update_is_no_success(language, text_files, tmp_path):
    flags = ("--dataloader_drop_last", "true", "--per_device_train_batch_size", "4096", "--per_device_eval_batch_size", "1")
    with pytest.raises(ValueError, match=r"no update was made: .* --per_device_train_batch_size 4096 .*--dataloader_drop_last true"):
        language.main(language_arguments(tmp_path, text_files, *flags))
    assert not (tmp_path / "results.json").exists()
    none = language.main(language_arguments(tmp_path, text_files, "--max_steps", "-1", "--num_train_epochs", "0"))  # as asked for
    assert none["updates"] == 0


def test_an_image_model_has_no_text_to_show(scripts, tmp_path):
    config = RevDEQVisionConfig(image_size=8, num_channels=1, hidden_sizes=[8], expansion_ratios=[1], num_labels=2, group_width=8)
    RevDEQForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a RevDEQForImageClassification \(model_type 'revdeq_vision'\); expected a language model"):
        importlib.import_module("show_fixed_point").main(["--model", str(tmp_path)])


def test_a_sample_ends_where_learned_positions_do(language, text_files, tmp_path, capsys):
    arguments = language_arguments(tmp_path, text_files, "--max_steps", "2", "--block_type", "paper", "--sample_tokens", "120")
    assert language.main(arguments)["updates"] == 2
    assert "--- a sample ---" in capsys.readouterr().out


def test_a_run_that_had_ended_is_not_trained_further(language, text_files, tmp_path):
    language.main(language_arguments(tmp_path / "whole", text_files, "--max_steps", "23"))  # not at the end of an epoch
    shutil.copytree(tmp_path / "whole" / "checkpoint-23", tmp_path / "cut" / "checkpoint-23")
    resumed = language.main(language_arguments(tmp_path / "cut", text_files, "--max_steps", "23", "--resume_from_checkpoint", "true"))
    assert resumed["updates"] == 23
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture(scope="module")
def tokens(language):
    """Data arguments, a tokenizer and the rows of a text of more rows than one batch of `datasets.map`."""
    rows = [" ".join(["alpha", "beta"] * (i % 7)) for i in range(2500)]
    splits = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": rows}) for name in language.SPLITS})
    data = language.DataArguments(block_size=16, vocab_size=300)
    return data, language.train_tokenizer(splits["train"], "text", 300), splits


@pytest.mark.parametrize("separate", [False, True])
def test_packing_predicts_every_token_once(language, tokens, separate):
    data, tokenizer, splits = tokens
    ids, blocks = language.pack(splits, tokenizer, data, separate)
    end = tokenizer.eos_token_id
    for split in ("train", "test"):
        text = [token for row in ids[split]["input_ids"] for token in row]
        assert [token for block in blocks[split]["labels"] for token in block[1:] if token != -100] == text
        assert all(len(block) == 16 for block in blocks[split]["input_ids"])
        before = [end, *text]
        seen = [token for block in blocks[split]["input_ids"] for token in block[:-1]]
        assert seen[: len(text)] == before[:-1]  # each with the token before it as context, across the batches of map


def test_without_packing_every_row_is_its_own_sequence(language, tokens):
    _, tokenizer, splits = tokens
    ids, blocks = language.pack(splits, tokenizer, language.DataArguments(block_size=16, vocab_size=300, pack=False), separate=True)
    assert blocks["train"]["labels"] == blocks["train"]["input_ids"]
    rows = iter(blocks["train"]["input_ids"])
    end = tokenizer.eos_token_id
    for row in ids["train"]["input_ids"]:
        predicted, last = [], end
        while len(predicted) < len(row):
            block = next(rows)
            assert block[0] == last
            assert len(block) <= 16
            predicted += block[1:]
            last = block[-1]
        assert predicted == row
    assert next(rows, None) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_every_token_once_in_each_pass_and_shuffles_each_anew(language, workers):
    distinct = datasets.Dataset.from_dict({"input_ids": [[i] for i in range(1, 451)]}).to_iterable_dataset(num_shards=2)
    stream = language.Stream(distinct, lambda: language.Packed(16, 0), buffer=8, seed=0)
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    blocks = [block["labels"] for block in itertools.islice(loader, 60)]  # two passes of 450 tokens, 15 to a sequence
    seen = [token for block in blocks for token in block[1:]]
    assert len(seen) == 900
    assert sorted(seen[:450]) != seen[:450]
    if workers == 0:
        assert sorted(seen[:450]) == list(range(1, 451))
        assert seen[:450] != seen[450:]
    else:  # each worker has its half; they take turns
        halves = [[token for block in blocks[worker::2] for token in block[1:]] for worker in (0, 1)]
        assert sorted(halves[0][:225]) == list(range(1, 226))
        assert sorted(halves[1][:225]) == list(range(226, 451))
    assert blocks == [block["labels"] for block in itertools.islice(loader, 60)]  # a second reading has the same order


def test_a_stream_without_a_validation_split_does_not_train_on_the_rows_it_validates_on(language, text_files):
    data = language.DataArguments(train_file=text_files["train"], streaming=True, max_eval_rows=10)
    rows, stream = language.load_text(data)
    validated, trained = set(rows["validation"]["text"]), [row["text"] for row in stream]
    assert len(rows["validation"]) == 10
    assert not validated & set(trained)
    assert 370 < len(trained) < 400
    assert rows["train"]["text"] == trained


def test_dataloader_workers_change_nothing(language, text_files, tmp_path):
    for workers in ("0", "2"):
        flags = ("--dropout", "0.1", "--dataloader_num_workers", workers, "--max_steps", "20")
        language.main(language_arguments(tmp_path / workers, text_files, *flags))
    assert_same_run(tmp_path / "0", tmp_path / "2")


def test_padded_rows_grouped_by_length_learn_and_accumulate_with_the_right_loss_scale(language, text_files, tmp_path):
    """Rows of unequal length: one batch of 8 equals 4 micro-batches of 2, whose tokens are counted together."""
    lines = Path(text_files["train"]).read_text(encoding="utf-8").splitlines()
    uneven = tmp_path / "uneven.txt"
    uneven.write_text("\n".join(line[: 6 + 37 * i % 60] for i, line in enumerate(lines)) + "\n", encoding="utf-8")
    files = {**text_files, "train": str(uneven)}
    flags = ("--pack", "false", "--train_sampling_strategy", "group_by_length", "--logging_steps", "1", "--max_steps", "8")
    one = language.main(language_arguments(tmp_path / "one", files, *flags))
    split = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    four = language.main(language_arguments(tmp_path / "four", files, *flags, *split))
    assert one["greatest_drift"] == four["greatest_drift"] == 0
    assert one["validation_loss"] < one["validation_loss_before"]
    whole, parts = ([entry["loss"] for entry in history(tmp_path / name) if "loss" in entry] for name in ("one", "four"))
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_bfloat16_stays_finite_and_exact_over_200_updates(language, text_files, tmp_path):
    flags = ("--bf16", "true", "--use_cpu", "true", "--max_steps", "200", "--logging_steps", "1", "--save_steps", "200", "--dropout", "0.1")
    results = language.main(language_arguments(tmp_path, text_files, *flags))
    entries = [entry for entry in history(tmp_path) if "loss" in entry]
    assert len(entries) == 200
    assert all(np.isfinite([entry["loss"], entry["grad_norm"]]).all() and entry["drift"] == 0 for entry in entries)
    assert results["validation_loss"] < results["validation_loss_before"]


def test_standard_library_splits_share_no_file(language):
    import sysconfig

    seen = {}
    for split in ("train", "validation", "test"):
        rows = list(language.standard_library_rows(split, "", sysconfig.get_path("stdlib")))
        assert rows
        for row in rows:
            assert seen.setdefault(row["text"], split) == split
    assert len(seen) > 300


def test_widths_that_a_model_hands_on_to_its_text_model_are_not_idle(language):
    given = {"hidden_size", "intermediate_size", "num_hidden_layers"}
    language.refuse_idle_flags(given, language.ModelArguments(model_type="fuyu"), language.DataArguments())
    with pytest.raises(ValueError, match=r"--intermediate_size would have no effect: a model of type 'gpt2'"):
        language.refuse_idle_flags(given, language.ModelArguments(model_type="gpt2"), language.DataArguments())


@pytest.mark.parametrize("enabled", [False, True])
def test_weights_in_parts_which_no_report_could_use_are_refused(enabled, language, monkeypatch):
    monkeypatch.setattr(sys.modules[language.refuse_zero3.__module__], "is_deepspeed_zero3_enabled", lambda: enabled)
    with pytest.raises(ValueError, match=r"DeepSpeed with ZeRO-3: .* use stage 2") if enabled else contextlib.nullcontext():
        language.refuse_zero3()


@pytest.mark.parametrize("stage", [2, 3])
def test_zero3_is_known_by_its_configuration(stage, language, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed, and no dependency of the package")
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}), encoding="utf-8")
    arguments = language.TrainingArguments(str(tmp_path), deepspeed=str(file), use_cpu=True)
    assert arguments.deepspeed
    with pytest.raises(ValueError, match="use stage 2") if stage == 3 else contextlib.nullcontext():
        language.refuse_zero3()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_file", "nowhere.txt"], "no file 'nowhere.txt'"),
        (["--validation_file", "valid.txt"], "--train_file is missing"),
        (["--train_file", "{empty}"], "no text"),
        (["--train_file", "{short}"], "shorter than one sequence"),
        (["--train_file", "{train}", "--text_column", "body"], "no column 'body'"),
        (["--train_file", "{line}"], "one row, .* give --validation_file"),
        (["--train_file", "{train}", "--validation_file", "{numbers}"], r"of one kind, got .*train\.txt \(text\), .*numbers\.csv \(csv\)"),
        (["--train_file", "{train}", "--validation_file", "{table}"], r"must be a text, csv, json or parquet file, got .*table\.tsv"),
        (["--train_file", "{numbers}", "--text_column", "n"], "column 'n' of split 'train' must hold texts, got Value"),
        (["--train_file", "{latin}"], "latin.txt is not UTF-8; convert it first"),
        (["--train_file", "{latin}", "--streaming", "true"], "latin.txt is not UTF-8; convert it first"),
        (["--train_file", "{json}"], "latin.jsonl is not UTF-8; convert it first"),
        (["--train_file", "{train}", "--validation_file", "{nothing}"], "--validation_file: .*nothing.txt' is empty"),
        (["--train_file", "{mark}"], "mark.txt holds no rows"),
        (["--train_file", "{mark}", "--streaming", "true"], "split 'train' holds no rows; give a --train_file that does"),
        (["--train_file", "{train}", "--steps_sampling", "uniform"], "--steps_sampling must be JSON such as '{\"distribution"),
        (["--train_file", "{train}", "--dataset_name", "x"], "not both"),
        (["--train_file", "{train}", "--beta", "1"], "must not be 1"),
        (["--train_file", "{train}", "--solver_steps", "-2"], "max_steps"),
        (["--train_file", "{train}", "--block_size", "1"], "--block_size"),
        (["--train_file", "{train}", "--resume_from_checkpoint", "true"], "no whole checkpoint"),
        (["--train_file", "{train}", "--resume_from_checkpoint", "elsewhere"], "not a whole checkpoint"),
        (["--train_file", "{train}", "--streaming", "true", "--max_steps", "-1"], "needs --max_steps"),
        (["--train_file", "{train}", "--streaming", "true", "--text_column", "body"], "no column 'body'"),
        (["--train_file", "{empty}", "--streaming", "true"], "no text"),
        (["--train_file", "{train}", "--streaming", "true", "--shuffle_buffer", "0"], "--shuffle_buffer must be at least 1, got 0"),
        (["--shuffle_buffer", "16"], "--shuffle_buffer would have no effect: it is that of --streaming true"),
        (["--model_type", "gpt2", "--intermediate_size", "64"], "--intermediate_size would have no effect: a model of type 'gpt2' has"),
        (["--train_file", "{train}", "--fp16", "true", "--use_cpu", "true"], "--bf16 true --use_cpu true instead"),
        (["--train_file", "{train}", "--model_name_or_path", "{bare}"], "no tokenizer in .*--tokenizer_name"),
        (["--train_file", "{train}", "--model_name_or_path", "{bare}", "--tokenizer_name", "{large}"], "256 on lie outside"),
        (["--model_name_or_path", "{bare}", "--hidden_size", "64"], "--hidden_size would have no effect: '.*' has a network already"),
        (["--model_name_or_path", "{bare}", "--vocab_size", "64"], "--vocab_size would have no effect: the tokenizer is a saved one"),
        (["--model_type", "llama", "--tol", "1e-3"], "--tol would have no effect: a model of type 'llama' has no fixed point"),
        (["--num_hidden_layers", "2"], "--num_hidden_layers would have no effect: the layers of a revdeq follow"),
        (["--train_file", "{train}", "--tokenizer_name", "{endless}"], "no end-of-text token"),
        (["--train_file", "{train}", "--pad_vocab_to_multiple_of", "0"], "must be at least 1, got 0"),
        (["--train_file", "{train}", "--lr_scheduler_type", "reduce_lr_on_plateau"], "requires an eval strategy"),
    ],
    ids=str,
)
def test_unusable_input_of_the_language_script_is_told(language, text_files, tokens, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(
        "revdeq_hf.RevDEQForCausalLM.forward", lambda *_, **__: pytest.fail("a step was computed before the input was refused")
    )
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "nothing.txt").write_text("")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "a"}\n{"text": "h\u00e9"}\n'.encode("latin-1") * 50)  # whose first row can be read
    (tmp_path / "short.txt").write_text("one\ntwo\n" * 15)
    (tmp_path / "line.txt").write_text("a b c d e f g h" * 40 + "\n")
    (tmp_path / "latin.txt").write_bytes("h\u00e9h\u00e9\n".encode("latin-1") * 200)
    for name in ("numbers.csv", "table.tsv"):
        (tmp_path / name).write_text("n\n" + "\n".join(map(str, range(200))) + "\n")
    bare = language.RevDEQConfig(vocab_size=256, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    language.RevDEQForCausalLM(bare).save_pretrained(tmp_path / "bare")
    _, tokenizer, _ = tokens
    tokenizer.save_pretrained(tmp_path / "large")
    language.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "endless")
    names = {
        "{train}": text_files["train"],
        **{f"{{{name}}}": str(tmp_path / f"{name}.txt") for name in ("empty", "short", "line", "latin", "nothing", "mark")},
    }
    names["{json}"] = str(tmp_path / "latin.jsonl")
    names |= {"{numbers}": str(tmp_path / "numbers.csv"), "{table}": str(tmp_path / "table.tsv")}
    names |= {f"{{{name}}}": str(tmp_path / name) for name in ("bare", "large", "endless")}
    filled = [names.get(argument, argument) for argument in arguments]
    filled += [] if {"--model_name_or_path", "--tokenizer_name"} & set(arguments) else ["--vocab_size", "300"]
    with pytest.raises(Exception, match=message):
        language.main([*filled, "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"])


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
    rows, _ = language.load_text(data)
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "gpt2_tokenizer")
    ids, blocks = language.pack(rows, tokenizer, data, separate=False)
    assert sum(map(len, ids["test"]["input_ids"])) == 295_877
    assert sum(map(len, ids["validation"]["input_ids"])) == 258_659
    assert language.text_size(rows["test"]["text"]) == {"words": 245_569, "bytes": 1_256_449}
    assert options.block_type == "modern"
    predicted = sum(label != -100 for block in blocks["test"]["labels"] for label in block[1:])
    assert predicted == 295_877
