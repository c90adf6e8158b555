#!/usr/bin/env python
"""Trains, evaluates, samples and saves a reversible equilibrium language model with transformers' Trainer.

Without any argument the corpus is the source text of Python's own standard library, so nothing is downloaded:

    python examples/train_language.py

Any data set of the Hub, or local files, take its place (`--help` lists every flag, those of TrainingArguments among them):

    python examples/train_language.py --dataset_name Salesforce/wikitext --dataset_config wikitext-103-raw-v1 --tokenizer_name gpt2
    python examples/train_language.py --train_file train.txt --validation_file valid.txt --test_file test.txt

    python examples/train_language.py --dataset_name HuggingFaceFW/fineweb --streaming true --documents true --tokenizer_name gpt2 --max_steps 100000

The output folder holds the model, the tokenizer, `results.json` and `training.png`. An interrupted run goes on with
`--resume_from_checkpoint true`. docs/training.md leads from one process to many.
"""

import copy
import hashlib
import itertools
import json
import math
import os
import random
import shlex
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from flags import given_flags, refuse_idle, refuse_zero3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM
from revdeq_hf.checkpoints import ResumableTrainer, checkpoint_to_resume
from revdeq_hf.model_card import weight_hashes
from revdeq_hf.optimizers import muon_adamw
from revdeq_hf.report import Run, plot_runs
from revdeq_hf.training import (
    RevDEQCallback,
    TextScores,
    fixed_point_layers,
    greatest_drift,
    peak_memory,
    print_table,
    residual_curve,
    run_record,
    text_hash,
    text_size,
    unigram_scores,
)

END_OF_TEXT = "<|endoftext|>"
PROMPT = "def read_"  # of the built-in corpus
PROMPT_TOKENS = 5  # of others
SPLITS = ("train", "validation", "test")
TEXT_FEATURES = (datasets.Value("string"), datasets.Value("large_string"))
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")  # what datasets unpacks
FILE_KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"} | dict.fromkeys(
    (".tsv", ".zip", ".tar", ".tgz", ".arrow", ".feather", ".orc", ".xls", ".xlsx", ".pdf", ".doc", ".docx"), "unknown"
)
SOLVER = ("beta", "solver_steps", "tol", "gradient", "steps_sampling", "kv_cache", "keep_evaluations", "dropout")
BLOCK = ("block_type", "num_block_layers", "num_prelude_layers", "num_coda_layers")
NEW = ("model_type", "pad_vocab_to_multiple_of", "tie_word_embeddings")
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
STREAM_ROWS = 10_000  # rows of a stream from which a tokenizer is trained and tokens are counted
STREAM_VALIDATION_ROWS = 1_000  # rows to validate on where a stream has no such split


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A saved model to go on from, instead of a new one; of its network only the solver can be set anew."},
    )
    model_type: str = field(
        default="revdeq", metadata={"help": "revdeq, or an explicit model to compare with, e.g. llama (transformers' names)."}
    )
    num_hidden_layers: int = field(
        default=1, metadata={"help": "Layers of an explicit model; a revdeq's own count follows from its steps."}
    )
    block_type: str = field(default="modern", metadata={"help": "Block of a new model: modern or paper."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the state."})
    intermediate_size: int = field(default=576, metadata={"help": "Width of the MLP's hidden layer(s)."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Key-value heads; as many as heads by default."})
    num_block_layers: int = field(default=1, metadata={"help": "Transformer layers in one evaluation of the block."})
    num_prelude_layers: int = field(default=0, metadata={"help": "Ordinary layers before the fixed point."})
    num_coda_layers: int = field(default=0, metadata={"help": "Ordinary layers after it."})
    pad_vocab_to_multiple_of: int = field(
        default=1, metadata={"help": "Round the vocabulary of a new model up to a multiple of this; 64 suits accelerators."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "Relaxation of the iteration, in (0, 2), not 1. Default: 0.8, or the saved model's."}
    )
    solver_steps: int | None = field(
        default=None,
        metadata={"help": "Steps of a solve, two evaluations of the block each (config.max_steps). Default: 2, or the saved model's."},
    )
    tol: float | None = field(
        default=None, metadata={"help": "Relative residual at which an example stops. Default: always all steps, or the saved model's."}
    )
    gradient: str | None = field(
        default=None,
        metadata={
            "help": "Gradient mode: reversible, checkpoint, backprop, implicit or phantom. Default: reversible, or the saved model's."
        },
    )
    steps_sampling: str | None = field(
        default=None,
        metadata={
            "help": 'Steps drawn for each batch, as JSON: \'{"distribution": "uniform", "min_steps": 2, "max_steps": 8}\', or null. '
            "Default: always all, or as of the saved model."
        },
    )
    kv_cache: str | None = field(
        default=None, metadata={"help": "Cache of generation: per_evaluation or shared. Default: per_evaluation, or the saved model's."}
    )
    keep_evaluations: int | None = field(
        default=None, metadata={"help": "Evaluations whose graphs are kept for the backward pass. Default: 1, or the saved model's."}
    )
    dropout: float | None = field(default=None, metadata={"help": "Dropout inside the block. Default: 0, or the saved model's."})
    tie_word_embeddings: bool = field(default=False, metadata={"help": "Share the embedding's weights with the head."})


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub or a local folder, as `datasets` loads it."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "Text, csv, json or parquet file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "File to validate on; default: a twentieth of the training rows."})
    test_file: str | None = field(
        default=None, metadata={"help": "File to test on; default: the validation rows, as the results then say."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "A saved tokenizer; by default a byte-level BPE is trained."})
    vocab_size: int = field(default=2048, metadata={"help": "Size of a tokenizer trained here."})
    block_size: int = field(default=256, metadata={"help": "Tokens of a training sequence."})
    pack: bool = field(
        default=True,
        metadata={
            "help": "Cut sequences from the concatenated rows; false: each row is its own sequence (several if longer), padded per batch; "
            "--train_sampling_strategy group_by_length then puts rows of like length together."
        },
    )
    documents: bool | None = field(
        default=None,
        metadata={
            "help": "Rows are whole documents, each ended by the end-of-text token; default: only of the built-in corpus, or with --pack false."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read, tokenise and pack the training split while training, without storing it; needs --max_steps, starts anew at its end."
        },
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Sequences of a stream held at once, from which they are drawn."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Use the first so many rows of the training split."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Use the first so many rows of the other splits."})
    preprocessing_workers: int | None = field(default=None, metadata={"help": "Processes for tokenising."})
    prompt: str | None = field(
        default=None,
        metadata={
            "help": f"Beginning of the text sampled at the end; default: {PROMPT!r}, of other texts the first tokens of one to validate on."
        },
    )
    sample_tokens: int = field(default=120, metadata={"help": "Tokens to sample at the end, as far as the model's positions go."})


@dataclass
class LanguageTrainingArguments(TrainingArguments):
    output_dir: str = field(default="runs/language", metadata={"help": "Folder for the model, checkpoints, results and figure."})
    max_steps: int = field(default=800, metadata={"help": "Updates to train for; -1: num_train_epochs decide."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Sequences per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Sequences per device in evaluation."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Updates of linear warm-up, or their share of all if below 1."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    logging_steps: float = field(default=25, metadata={"help": "Updates between logs."})
    eval_strategy: str = field(default="no", metadata={"help": "no, steps or epoch."})
    save_steps: float = field(default=200, metadata={"help": "Updates between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    muon_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of Muon for the matrices; AdamW has the rest. Default or 0: AdamW alone."}
    )
    dataloader_pin_memory: bool = field(default=torch.accelerator.is_available(), metadata={"help": "Pin host memory for faster copies."})
    report_to: str = field(
        default="tensorboard", metadata={"help": "Where figures are sent too: tensorboard, wandb, trackio, ... or none."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "DDP looks for parameters without gradient; there are none."}
    )


def twentieth(text: str) -> int:
    """A number from 0 to 19 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:4], "big") % 20


def standard_library_rows(split: str, version: str, folder: str) -> Iterator[dict[str, str]]:
    """Files of Python's standard library, without its tests and tables. A hash of the text decides the split: equal files are in the same one."""
    del version  # part of the cache key
    for path in sorted(Path(folder).rglob("*.py")):
        parts = path.relative_to(folder).parts
        if {"test", "tests", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3"} & set(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of files in other encodings
        if text and split == {0: "test", 1: "validation"}.get(twentieth(text), "train"):
            yield {"text": text, "path": "/".join(parts)}


def load_text(data: DataArguments) -> tuple[datasets.DatasetDict, datasets.IterableDataset | None]:
    """The three splits as rows of text. With --streaming the training split holds the first rows only, and the stream of all of them comes too.

    Raises:
        FileNotFoundError: a named file is missing.
        ValueError: the text column or the training split is missing, or a split holds no text.
    """
    files = named_files(data)
    if data.dataset_name and files:
        raise ValueError("give either --dataset_name or --train_file, not both")
    if files and "train" not in files:
        raise ValueError(f"--train_file is missing, got only {', '.join(f'--{split}_file' for split in files)}")
    if data.dataset_name:
        loaded = datasets.load_dataset(data.dataset_name, data.dataset_config, streaming=data.streaming)
    elif files:
        for split, name in files.items():
            if not Path(name).is_file():
                raise FileNotFoundError(f"--{split}_file: there is no file {name!r}")
            if not Path(name).stat().st_size:
                raise ValueError(f"--{split}_file: {name!r} is empty")
        loaded = load_files(files, data.streaming)
    else:
        folder = sysconfig.get_path("stdlib")
        loaded = {
            split: datasets.Dataset.from_generator(
                standard_library_rows, gen_kwargs={"split": split, "version": sys.version, "folder": folder}
            )
            for split in SPLITS
        }
        if data.streaming:
            loaded = {split: rows.to_iterable_dataset() for split, rows in loaded.items()}
    if "train" not in loaded:
        raise ValueError(f"the data set has no split 'train', got {', '.join(loaded)}")
    loaded, stream = dict(loaded), None
    if "validation" not in loaded and os.environ.get("RANK", "0") == "0":
        print("There is no validation split: a twentieth of the training rows is kept to validate on, and not trained on.")
    if data.streaming:
        loaded, stream = first_rows(loaded, data)
    if "validation" not in loaded:
        if len(loaded["train"]) < 2:
            raise ValueError("the training data is one row, of which none can be kept to validate on; give --validation_file")
        halves = loaded["train"].train_test_split(test_size=0.05, seed=0)
        loaded["train"], loaded["validation"] = halves["train"], halves["test"]
    if "test" not in loaded:
        loaded["test"] = loaded["validation"]
    for split in SPLITS:
        if not len(loaded[split]):  # a stream of few rows may keep none to validate on
            raise ValueError(f"split {split!r} holds no rows; give a --{split}_file that does")
        if data.text_column not in loaded[split].column_names:
            raise ValueError(
                f"no column {data.text_column!r} in split {split!r}, which has {loaded[split].column_names}; see --text_column"
            )
        if (feature := loaded[split].features[data.text_column]) not in TEXT_FEATURES:
            raise ValueError(f"column {data.text_column!r} of split {split!r} must hold texts, got {feature}; see --text_column")
        limit = data.max_train_rows if split == "train" else data.max_eval_rows
        if limit is not None:
            loaded[split] = loaded[split].select(range(min(limit, len(loaded[split]))))
        if not any(text and text.strip() for text in loaded[split][data.text_column]):
            raise ValueError(f"split {split!r} holds no text in column {data.text_column!r}")
    return datasets.DatasetDict({split: loaded[split] for split in SPLITS}), stream


def named_files(data: DataArguments) -> dict[str, str]:
    return {split: getattr(data, f"{split}_file") for split in SPLITS if getattr(data, f"{split}_file")}


def load_files(files: dict[str, str], streaming: bool) -> datasets.DatasetDict:
    """The named file of each split. What is no table is text, a row for each line.

    Raises:
        ValueError: they are of several kinds, or of one that is not known.
    """
    kinds = {}
    for split, name in files.items():
        endings = [ending for ending in Path(name).suffixes if ending not in COMPRESSED]
        kinds[name] = FILE_KINDS.get(endings[-1] if endings else "", "text")
        if kinds[name] == "unknown":
            raise ValueError(f"--{split}_file must be a text, csv, json or parquet file, got {name!r}")
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"the files of all splits must be of one kind, got {', '.join(f'{name} ({kind})' for name, kind in kinds.items())}"
        )
    kind = next(iter(kinds.values()))
    # the mark that some editors put at the beginning of a file is no part of its text; readers of tables leave it out by themselves
    more = {"keep_linebreaks": True, "encoding": "utf-8-sig"} if kind == "text" else {}
    return datasets.load_dataset(kind, data_files=files, streaming=streaming, **more)


@contextmanager
def reading(files: dict[str, str]) -> Iterator[None]:
    """A ValueError that names the files where datasets finds them without rows or not UTF-8: of json and of a stream not before their rows are read."""
    try:
        yield
    except (datasets.exceptions.DatasetGenerationError, UnicodeDecodeError) as error:
        cause = error if isinstance(error, UnicodeDecodeError) else error.__cause__
        names = " or ".join(dict.fromkeys(files.values())) or "the data set"
        if isinstance(cause, UnicodeDecodeError):
            raise ValueError(f"{names} is not UTF-8; convert it first ({cause})") from error
        if isinstance(cause, datasets.arrow_writer.SchemaInferenceError):
            raise ValueError(f"{names} holds no rows") from error
        raise


def first_rows(loaded: dict, data: DataArguments) -> tuple[dict[str, datasets.Dataset], datasets.IterableDataset]:
    """Streamed splits as tables, of the training split its first rows, and the stream of all its rows, without those to validate on."""
    train, limits = loaded["train"], {"train": STREAM_ROWS}
    if "validation" not in loaded:
        loaded["validation"], limits["validation"] = (
            train.filter(held_out, fn_kwargs={"column": data.text_column}),
            data.max_eval_rows or STREAM_VALIDATION_ROWS,
        )
        train = train.filter(held_out, fn_kwargs={"column": data.text_column, "wanted": False})
    if data.max_train_rows is not None:
        train = train.take(data.max_train_rows)
    loaded["train"] = train
    tables = {}
    for split, rows in loaded.items():
        limit = limits.get(split, data.max_eval_rows)
        if split in SPLITS:
            tables[split] = datasets.Dataset.from_list(list(rows if limit is None else rows.take(limit)))
    return tables, train


def held_out(row: dict, column: str, wanted: bool = True) -> bool:
    """Whether a hash of the text puts a row into the twentieth that is not trained on: any part of a stream decides it by itself."""
    return (twentieth(row.get(column) or "") == 1) == wanted


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A saved tokenizer.

    Raises:
        ValueError: there is none, or it has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer in {name!r}, name one with --tokenizer_name ({error})") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name!r} has no end-of-text token (eos_token), which begins and ends a text here")
    return tokenizer


def train_tokenizer(rows: datasets.Dataset, column: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text is represented, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=True
    )
    tokenizer.train_from_iterator((row[column] or "" for row in rows), trainer, length=len(rows))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def cut(tokens: list[int], size: int) -> list[list[int]]:
    """Sequences of up to `size` tokens in which every token but the first is predicted once: each begins with the last token of the one before."""
    return [tokens[start : start + size] for start in range(0, len(tokens) - 1, size - 1)]


class Packed:
    """Turns rows of tokens into sequences of exactly `size`, cut from the concatenated rows; the first begins with the end-of-text token.

    What is left of a batch of rows waits for the next one. After the last of `rows` it is filled up, with labels of -100, which do not count.
    """

    def __init__(self, size: int, end: int, rows: int | None = None) -> None:
        self.size, self.end, self.rows, self.rest = size, end, rows, [end]

    def __call__(self, batch: dict, indices: list[int] | None = None) -> dict:
        tokens = [*self.rest, *itertools.chain.from_iterable(batch["input_ids"])]
        blocks = cut(tokens, self.size)
        self.rest = blocks.pop() if blocks and len(blocks[-1]) < self.size else tokens[-1:]
        labels = list(blocks)
        if indices is not None and self.rows is not None and indices[-1] == self.rows - 1 and len(self.rest) > 1:
            missing = self.size - len(self.rest)
            blocks.append(self.rest + [self.end] * missing)
            labels.append(self.rest + [-100] * missing)
        return {"input_ids": blocks, "labels": labels}


def unpacked(batch: dict, indices: list[int] | None = None, *, size: int, end: int) -> dict:
    """Each row by itself, in several sequences if it is longer than `size`."""
    del indices
    blocks = [block for row in batch["input_ids"] for block in cut([end, *row], size)]
    return {"input_ids": blocks, "labels": blocks}


class Stream(torch.utils.data.IterableDataset):
    """Endless training sequences from a stream of rows: each of its passes is shuffled anew, within `buffer` sequences.

    Nothing but the seed decides the order, so a resumed run finds its place by reading the stream again up to there. Dataloader workers share
    the stream's shards (its files). (`IterableDataset.shuffle(...).repeat()` of datasets gives every pass the same order, and before packing it would
    tear texts apart.)
    """

    def __init__(
        self, rows: datasets.IterableDataset, sequences: Callable[[], Callable], buffer: int, seed: int, files: dict[str, str] | None = None
    ) -> None:
        self.rows, self.sequences, self.buffer, self.seed = rows, sequences, buffer, seed
        self.files = files or {}  # by whose names errors call them

    def __iter__(self) -> Iterator[dict]:
        make = self.sequences()
        for turn in itertools.count():
            empty = True
            for block in shuffled(self.read(make), self.buffer, random.Random(f"{self.seed} {turn}")):
                empty = False
                yield block
            if empty:  # a worker without a shard
                return

    def read(self, make: Callable[[dict], dict]) -> Iterator[dict]:
        with reading(self.files):
            for row in self.rows:
                made = make({"input_ids": [row["input_ids"]]})
                for ids, labels in zip(made["input_ids"], made["labels"], strict=True):
                    yield {"input_ids": ids, "labels": labels}


def shuffled(items: Iterable[dict], size: int, generator: random.Random) -> Iterator[dict]:
    """The items in the order in which they are drawn from a buffer of `size`."""
    held: list[dict] = []
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        index = generator.randrange(size)
        yield held[index]
        held[index] = item
    generator.shuffle(held)
    yield from held


def pack(
    rows: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, data: DataArguments, separate: bool
) -> tuple[datasets.DatasetDict, datasets.DatasetDict]:
    """Token ids, and the sequences of up to `block_size` of them that are trained on, see `Packed` and `unpacked`.

    With `separate` each row ends with the end-of-text token.
    """
    ids, blocks = datasets.DatasetDict(), datasets.DatasetDict()
    settings: dict[str, Any] = {"size": data.block_size, "end": tokenizer.eos_token_id}
    for split in SPLITS:
        ids[split] = rows[split].map(
            tokenize(tokenizer, data.text_column, separate),
            batched=True,
            remove_columns=rows[split].column_names,
            num_proc=data.preprocessing_workers,
            desc=f"Tokenising {split}",
        )
        blocks[split] = ids[split].map(
            Packed(**settings, rows=len(ids[split])) if data.pack else partial(unpacked, **settings),
            batched=True,
            with_indices=True,  # packing carries tokens from batch to batch, so it has one process
            remove_columns=ids[split].column_names,
            desc=f"Packing {split}",
        )
    if not len(blocks["train"]) or -100 in blocks["train"][0]["labels"]:
        raise ValueError(f"the training text is shorter than one sequence of --block_size {data.block_size} tokens")
    return ids, blocks


def tokenize(tokenizer: PreTrainedTokenizerBase, column: str, separate: bool) -> Callable[[dict], dict]:
    end = tokenizer.eos_token_id
    tokenizer(["warm"])  # a fast tokenizer's first call changes its state, and with it the cache key of map

    def ids(batch: dict) -> dict:
        rows = tokenizer([text or "" for text in batch[column]], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*row, end] for row in rows] if separate else rows}

    return ids


def solver_settings(options: ModelArguments) -> dict[str, Any]:
    """What the flags say of a fixed-point model's solver and block, by the names of its configuration."""
    given = {
        "beta": options.beta,
        "max_steps": options.solver_steps,
        "tol": options.tol,
        "gradient": options.gradient,
        "kv_cache": options.kv_cache,
        "keep_evaluations": options.keep_evaluations,
        "attention_dropout": options.dropout,
        "hidden_dropout": options.dropout,
    }
    sampling = {} if options.steps_sampling is None else {"steps_sampling": parsed(options.steps_sampling, "--steps_sampling")}
    return {name: value for name, value in given.items() if value is not None} | sampling


def refuse_idle_flags(given: set[str], options: ModelArguments, data: DataArguments) -> None:
    """A ValueError for flags that would have no effect on the model or the tokenizer that the others name."""
    if data.tokenizer_name or options.model_name_or_path:
        refuse_idle(given, ["vocab_size"], "the tokenizer is a saved one")
    if options.model_name_or_path:
        refuse_idle(given, (*NEW, *WIDTHS, *BLOCK), f"{options.model_name_or_path!r} has a network already")
    kind = AutoConfig.from_pretrained(options.model_name_or_path).model_type if options.model_name_or_path else options.model_type
    if kind != "revdeq":
        refuse_idle(given, (*SOLVER, *BLOCK), f"a model of type {kind!r} has no fixed point")
    elif not options.model_name_or_path:
        refuse_idle(given, ["num_hidden_layers"], "the layers of a revdeq follow from --num_block_layers and --solver_steps")
    if kind != "revdeq" and not options.model_name_or_path:
        known = AutoConfig.for_model(kind)
        kinds = (known, known.get_text_config())  # some hand their widths on
        idle = [name for name in WIDTHS if not any(hasattr(config, name) for config in kinds)]
        refuse_idle(given, idle, f"a model of type {kind!r} has no such setting")
    if not data.streaming:
        refuse_idle(given, ["shuffle_buffer"], "it is that of --streaming true")


def build_model(options: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> torch.nn.Module:
    solver = solver_settings(options)
    if options.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, **solver)
        known = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > known:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {options.model_name_or_path!r} a vocabulary of {known}: ids from {known} on lie "
                "outside of it; leave out --tokenizer_name to take the model's own"
            )
        return model
    multiple = options.pad_vocab_to_multiple_of
    if multiple < 1:
        raise ValueError(f"--pad_vocab_to_multiple_of must be at least 1, got {multiple}")
    common: dict[str, Any] = dict(
        vocab_size=-(-len(tokenizer) // multiple) * multiple,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_key_value_heads,
        max_position_embeddings=block_size,
        tie_word_embeddings=options.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if options.model_type != "revdeq":
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(options.model_type, num_hidden_layers=options.num_hidden_layers, **common)
        )
    config = RevDEQConfig(
        **common,
        num_block_layers=options.num_block_layers,
        num_prelude_layers=options.num_prelude_layers,
        num_coda_layers=options.num_coda_layers,
        hidden_act="silu" if options.block_type == "modern" else "gelu_pytorch_tanh",
        block_type=options.block_type,
        **{"beta": 0.8, "max_steps": 2, **solver},
    )
    return RevDEQForCausalLM(config)


def parsed(text: str, flag: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        example = '{"distribution": "uniform", "min_steps": 2, "max_steps": 8}'
        raise ValueError(f"{flag} must be JSON such as '{example}', got {text!r} ({error})") from error


class Scorer:
    """Trainer's metrics through `TextScores`; `size` holds words and bytes of the split at hand."""

    def __init__(self, size: dict[str, int]) -> None:
        self.size = size
        self.metric = TextScores()

    @staticmethod
    def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Losses in nats, (batch, seq - 1), so that Trainer need not gather all logits."""
        # classes last: transposed logits take twice the time
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none")
        return losses.view(labels.shape[0], -1)

    def __call__(self, prediction) -> dict[str, float]:
        counted = prediction.label_ids[:, 1:] != -100
        return self.metric.compute(predictions=prediction.predictions[counted].astype("float64"), **self.size)


def main(arguments: list[str] | None = None) -> dict:
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, LanguageTrainingArguments), description=__doc__.split("\n\n")[0] if __doc__ else None
    )
    options, data, training = parser.parse_args_into_dataclasses(args=arguments)
    if training.label_smoothing_factor and training.torch_compile:
        raise ValueError(
            f"--label_smoothing_factor {training.label_smoothing_factor} and --torch_compile true: of a compiled model transformers' Trainer smooths the "
            "labels without shifting them, so that it would learn to repeat each token; leave one of the two out"
        )
    refuse_idle_flags(given_flags(parser, arguments), options, data)
    refuse_zero3()
    command = f"python examples/train_language.py {shlex.join(sys.argv[1:] if arguments is None else arguments)}".strip()
    record = run_record(command, training.device)  # now: the files may be of another commit at the end
    if data.block_size < 2:
        raise ValueError(f"--block_size must be at least 2, got {data.block_size}")
    if data.streaming and training.max_steps < 1:
        raise ValueError(f"--streaming true needs --max_steps, since a stream has no length; got --max_steps {training.max_steps}")
    if data.shuffle_buffer < 1:
        raise ValueError(f"--shuffle_buffer must be at least 1, got {data.shuffle_buffer}")
    resume = checkpoint_to_resume(training)
    set_seed(training.seed)
    began = time.perf_counter()

    with training.main_process_first(desc="preparing the data"), reading(named_files(data)):
        rows, stream = load_text(data)
        # a tokenizer trained on a text that has changed since would give the tokens of the weights other meanings
        saved = data.tokenizer_name or resume or options.model_name_or_path
        tokenizer = load_tokenizer(saved) if saved else train_tokenizer(rows["train"], data.text_column, data.vocab_size)
        if resume and data.tokenizer_name and load_tokenizer(resume).get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"--tokenizer_name {data.tokenizer_name} has other tokens than the checkpoint {resume}; leave it out")
        built_in = data.dataset_name is None and data.train_file is None
        separate = (built_in or not data.pack) if data.documents is None else data.documents
        ids, blocks = pack(rows, tokenizer, data, separate)
    train = blocks["train"]
    if stream is not None:
        settings: dict[str, Any] = {"size": data.block_size, "end": tokenizer.eos_token_id}
        stream = stream.map(tokenize(tokenizer, data.text_column, separate), batched=True, remove_columns=rows["train"].column_names)
        sequences = partial(Packed, **settings) if data.pack else partial(partial, unpacked, **settings)
        train = Stream(stream, sequences, data.shuffle_buffer, training.seed, {"train": data.train_file} if data.train_file else None)
        # rank 0 reads for all; it cannot hand out batches of unequal length, though, which each rank reads for itself
        training.accelerator_config.dispatch_batches = data.pack
    pad = tokenizer.pad_token or tokenizer.eos_token
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = pad
    if pad == tokenizer.eos_token:
        # Trainer would write it into the model's configuration, and the end-of-text token of a llama loaded with that gets no gradient
        tokenizer.pad_token = None
    hashes = {split: text_hash(rows[split][data.text_column]) for split in SPLITS}  # of a stream its first rows
    sizes = {split: text_size(rows[split][data.text_column]) for split in ("validation", "test")}
    unigram = unigram_scores(ids["train"]["input_ids"], ids["test"]["input_ids"], len(tokenizer), **sizes["test"])

    model: Any = build_model(options, tokenizer, data.block_size)
    scorer = Scorer(sizes["validation"])
    trainer = ResumableTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator if data.pack else DataCollatorForSeq2Seq(padding),
        compute_metrics=scorer,
        preprocess_logits_for_metrics=Scorer.token_losses,
        optimizer_cls_and_kwargs=muon_adamw(training),
    )
    trainer.callback_handler.callbacks.insert(0, RevDEQCallback())  # ahead of the reporting ones

    # not by evaluate before train: on several ranks accelerate 1.15 takes a model so evaluated for prepared, and trains it without exchanging gradients
    training.eval_on_start = resume is None
    trained = trainer.train(resume_from_checkpoint=resume)
    if not trainer.state.global_step and (training.max_steps > 0 or training.num_train_epochs > 0):
        raise ValueError(
            f"no update was made: of {len(blocks['train'])} sequences no batch of --per_device_train_batch_size {training.per_device_train_batch_size} "
            f"could be made with --dataloader_drop_last {str(training.dataloader_drop_last).lower()}; give smaller batches, or drop none"
        )
    before: dict = next((entry for entry in trainer.state.log_history if entry["step"] == 0 and "eval_loss" in entry), {})
    if trainer.is_fsdp_enabled:  # whole weights at the end, whatever the checkpoints hold
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    tokenizer.pad_token = pad
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    trainer.save_model()
    trainer.save_state()
    after = trainer.evaluate()
    scorer.size = sizes["test"]
    test = trainer.evaluate(blocks["test"], metric_key_prefix="test")

    history = trainer.state.log_history
    results = {
        "parameters": model.num_parameters(),
        "data_sha256": hashes,
        "train_tokens": None if stream is not None else sum(map(len, ids["train"]["input_ids"])),
        "updates": trainer.state.global_step,
        "validation_loss_before": before.get("eval_loss"),
        "validation_loss": after["eval_loss"],
        "test_split": "validation" if hashes["test"] == hashes["validation"] else "test",
        "test": {key.removeprefix("test_"): value for key, value in test.items()},
        "test_unigram": unigram,
        "greatest_drift": greatest_drift(history),
        "train_seconds": trained.metrics["train_seconds"],
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": peak_memory(),
        "run": record,
    }
    if trainer.is_world_process_zero():
        prompt = data.prompt
        if prompt is None:
            prompt = PROMPT if built_in else first_tokens(rows["validation"][data.text_column], tokenizer)
        report(results, trainer, tokenizer, prompt, data.sample_tokens, blocks["test"][0]["input_ids"])
    if training.push_to_hub:
        trainer.push_to_hub()  # with the results, of which the card is made
    return results


def first_tokens(texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the first few tokens of the first text that is not empty."""
    text = next(text for text in texts if text and text.strip())[:200]
    # a token may end within a character
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]).rstrip("\ufffd")


def report(results: dict, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, begin: str, sample_tokens: int, ids: list[int]) -> None:
    """Writes results.json and training.png to the output folder, prints a sample and the table."""
    folder = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled:  # one rank alone cannot run a model in shards
        model = AutoModelForCausalLM.from_pretrained(folder).to(trainer.args.device)
    layers = fixed_point_layers(model)
    run = Run(folder.name, trainer.state.log_history, results=results)
    if layers:
        run.trained_steps = int(layers[0][1].max_steps)
        run.convergence = residual_curve(model, {"input_ids": torch.tensor([ids], device=model.device)}, 4 * run.trained_steps)
        results["convergence"] = {"trained_steps": run.trained_steps, "residuals": run.convergence}
    plot_runs([run], folder / "training.png")
    results["run"]["weights"] = weight_hashes(folder)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    model.eval()
    prompt = tokenizer(begin, return_tensors="pt", add_special_tokens=False).to(model.device)
    room = getattr(model.config, "max_position_embeddings", math.inf) - prompt["input_ids"].numel()  # learned positions end there
    count = min(sample_tokens, room)
    if count > 0 and prompt["input_ids"].numel():
        set_seed(trainer.args.seed)
        out = model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=count,
            do_sample=True,
            temperature=0.7,
            top_p=0.95,
            pad_token_id=tokenizer.pad_token_id,
        )
        print(f"\n--- a sample ---\n{tokenizer.decode(out[0], skip_special_tokens=True)}\n---")
    test, unigram = results["test"], results["test_unigram"]
    print_table(
        [f"on the {results['test_split']} split", "this model", "unigram model"],
        [
            ["loss (nats per token)", test["loss"], unigram["loss"]],
            ["perplexity per token", test["perplexity"], unigram["perplexity"]],
            ["perplexity per word", test["word_perplexity"], unigram["word_perplexity"]],
            ["bits per byte", test["bits_per_byte"], unigram["bits_per_byte"]],
        ],
    )
    print_table(
        ["the run", ""],
        [
            ["parameters", results["parameters"]],
            ["updates", results["updates"]],
            ["validation loss before", results["validation_loss_before"]],
            ["validation loss after", results["validation_loss"]],
            ["greatest drift", results["greatest_drift"]],
            ["seconds of training", results["train_seconds"]],
            ["seconds of this process", results["seconds"]],
            ["peak memory (MB)", results["peak_memory_bytes"] and results["peak_memory_bytes"] / 1e6],
            ["saved in", str(folder)],
        ],
    )


if __name__ == "__main__":
    main()
