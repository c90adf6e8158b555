"""What is a saved model worth? What `evaluate.py` measures, and the file of results that it writes.

A number belongs to weights, settings, data and a protocol, so the file holds all of them: sha256 of the weights, the tokenizer and the data, the settings, the
protocol, versions, device, command and date. `revdeq_hf.model_card` takes its numbers from there.

The quality curve: the same data at half, once, twice and four times the model's own steps, or at `--curve_steps`. The residual curve: mean residual at the
start of each step of one batch. The drift: of one backward pass of up to four examples.
"""

import itertools
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, HfArgumentParser

from revdeq_hf.model_card import CURVE, EVALUATION, decisive, file_hash, input_hashes, weight_hashes
from revdeq_hf.training import fixed_point_layers, print_table, residual_curve, run_record, text_hash, text_scores, text_size

USAGE = "python examples/evaluate.py MODEL [flags]     (MODEL: the folder of a saved model, or its name on the Hub)"
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
# flags of the training scripts that name data
SOURCES = ("dataset_name", "train_file", "validation_file", "test_file", "train_dir", "validation_dir")
# flags of the training scripts' data that change nothing here
TRAINING_ONLY = {
    "text-generation": ("vocab_size", "block_size", "pack", "streaming", "shuffle_buffer", "max_train_rows", "prompt", "sample_tokens"),
    "image-classification": ("flip", "crop_padding", "cutout", "erasing", "mixup", "cutmix", "max_train_images"),
}


@dataclass
class EvaluationArguments:
    solver_steps: int | None = field(default=None, metadata={"help": "Steps of each solve; default: the model's own."})
    batch_size: int = field(default=16, metadata={"help": "Windows or images evaluated at once."})
    dtype: str = field(default="float32", metadata={"help": "Precision of weights and computation: float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "Where to compute; default: the accelerator, where there is one."})
    use_cpu: bool = field(
        default=False, metadata={"help": "Compute on the CPU, as --device cpu does; the training scripts have this flag."}
    )
    curve_examples: int | None = field(
        default=None,
        metadata={"help": "At most so many windows or images, evenly spaced, for the curve of steps against quality; default: all."},
    )
    curve_steps: list[int] | None = field(
        default=None, metadata={"help": "Steps of that curve; default: half, once, twice and four times the model's own."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the results; default: the model's own."})

    def __post_init__(self) -> None:
        for name in ("solver_steps", "batch_size", "curve_examples", "curve_steps"):
            value = getattr(self, name)
            if value is not None and min(value if isinstance(value, list) else [value]) < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if self.use_cpu and self.device not in (None, "cpu"):
            raise ValueError(f"--use_cpu true and --device {self.device} contradict one another; leave one of the two out")
        self.device = "cpu" if self.use_cpu else self.device


@dataclass
class TextArguments(EvaluationArguments):
    split: str = field(default="test", metadata={"help": "Split to measure on: train, validation or test."})
    window: int | None = field(
        default=None, metadata={"help": "Tokens that the model sees at once; default: its max_position_embeddings, at most 1024."}
    )
    stride: int | None = field(
        default=None,
        metadata={
            "help": "Tokens from one window to the next; each predicted token sees at least window - stride before it. Default: half a window."
        },
    )


@dataclass
class Measured:
    """What `main` needs of the data: `score(steps, every)` gives the figures of every `every`-th example at so many steps (None: the model's own).

    Attributes:
        count: examples that `score` knows, windows or images.
        batch: arguments of the model for the first examples, with labels.
        protocol: what was measured and how.
    """

    score: Callable[[Any, int], dict[str, Any]]
    count: int
    batch: dict[str, torch.Tensor]
    protocol: dict[str, Any]


def refuse_other_data(folder: Path, data: Any, name: str, flags: list[str]) -> None:
    """A ValueError where a model that was trained on data of the user's own would be measured on the built-in ones, which its card would then publish.

    Args:
        folder, data: of the model, and what the flags say of its data.
        name, flags: as given on the command line, which the error completes.
    """
    record = folder / "results.json"
    if any(getattr(data, name, None) for name in SOURCES) or not record.is_file():
        return
    found = json.loads(record.read_text(encoding="utf-8"))
    run = found.get("run") if isinstance(found, dict) else None
    command = run.get("command") if isinstance(run, dict) else None
    if not command:  # of another program
        return
    named = data_flags(command, data)
    if any(word[2:] in SOURCES for word in named):
        again = shlex.join([name, *named, *flags])
        raise ValueError(
            f"{str(folder)!r} was trained with {shlex.join(named)}, and nothing says on which data it is to be measured. On these it is by\n"
            f"    python examples/evaluate.py {again}\nor name others"
        )


def data_flags(command: str, data: Any) -> list[str]:
    """The words of a training's command that say which data an evaluation is to load, flags that were given short in full."""
    idle = itertools.chain(*TRAINING_ONLY.values(), ["tokenizer_name"])  # the model's folder has its tokenizer
    known = {entry.name for entry in fields(data)}.difference(idle)
    found: list[str] = []
    wanted = False
    for word in shlex.split(command):
        if not word.startswith("--"):
            found += [word] if wanted else []
            continue
        flag, is_joined, value = word[2:].partition("=")
        name = next((name for name in sorted(known) if name.startswith(flag.replace("-", "_"))), None)
        wanted = name is not None
        found += [f"--{name}", *([value] if is_joined else [])] if wanted else []
    return found


def main(arguments: list[str] | None = None) -> dict:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0].startswith("-"):
        if arguments[:1] not in (["-h"], ["--help"]):
            print(f"usage: {USAGE}", file=sys.stderr)
            raise SystemExit(2)
        more = "MODEL --help lists the flags of this kind of model too, those that name its data among them."
        HfArgumentParser(EvaluationArguments, usage=USAGE, description="Flags for every model:", epilog=more).print_help()
        raise SystemExit(0)
    name, *flags = arguments
    folder = model_folder(name)
    hashes = weight_hashes(folder)
    kind = (AutoConfig.from_pretrained(folder).architectures or ["a model without a head"])[0]
    if kind.endswith("ForCausalLM"):
        task, auto, options, data = "text-generation", AutoModelForCausalLM, *text_arguments(flags)
    elif kind.endswith("ForImageClassification"):
        task, auto, options, data = "image-classification", AutoModelForImageClassification, *image_arguments(flags)
    else:
        raise ValueError(
            f"{name!r} is {kind}; causal language models (...ForCausalLM) and classifiers (...ForImageClassification) are measured here"
        )
    defaults = type(data)()
    idle = [f"--{flag}" for flag in TRAINING_ONLY[task] if getattr(data, flag) != getattr(defaults, flag)]
    if idle:
        raise ValueError(f"{', '.join(idle)}: for training only, without effect on an evaluation; leave out (a text's window is --window)")
    refuse_other_data(folder, data, name, flags)
    output = Path(options.output_dir or folder)
    if output.resolve() != Path(name).resolve() and not options.output_dir:
        raise ValueError(f"{name!r} is no folder here to write the results to; name one with --output_dir")
    output.mkdir(parents=True, exist_ok=True)

    began = time.perf_counter()
    device = torch.device(options.device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    run = run_record("python examples/evaluate.py " + shlex.join(arguments), device)  # now: the files may be of another commit at the end
    model: Any = load(auto, folder, getattr(torch, options.dtype)).to(device)
    measure = text if task == "text-generation" else images
    measured = measure(model, folder, options, data)
    figures = measured.score(options.solver_steps, 1)
    if not math.isfinite(figures["results"]["loss"]):
        raise ValueError(
            f"the loss of {name!r} is {figures['results']['loss']}: these weights, or this dtype ({options.dtype}), compute nothing finite"
        )
    own: Any = options.solver_steps or getattr(model.config, "max_steps", None)
    curve, residuals = [], {}
    if fixed_point_layers(model):
        every = math.ceil(measured.count / (options.curve_examples or measured.count))
        for steps in options.curve_steps or ladder(own):
            point = figures if steps == own and every == 1 else measured.score(steps, every)
            quality = {key: point["results"][key] for key in ("accuracy", "perplexity", "loss") if key in point["results"]}
            curve.append({"max_steps": steps, **finite({**quality, "residual": point["solve"]["residual"]})})
        inputs = {key: value for key, value in measured.batch.items() if key != "labels"}
        longest = max(own) if isinstance(own, list) else own
        residuals = residual_curve(model, inputs, 4 * longest)
        figures["solve"].update(drift(model, measured.batch))
        measured.protocol.update(curve_examples=len(range(0, measured.count, every)), residual_examples=len(measured.batch["labels"]))
    record = {
        "task": task,
        "model": Path(name).name,
        "weights": hashes,
        "parameters": model.num_parameters(),
        "results": figures["results"],
        "details": figures["details"],
        "solve": figures["solve"],
        "configuration": decisive(model.config),
        "inputs": input_hashes(folder),
        "steps_curve": curve,
        "residual_per_step": residuals,
        "protocol": {**measured.protocol, "max_steps": own, "dtype": options.dtype, "batch_size": options.batch_size},
        **run,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if curve:
        plot_curves(record, output / CURVE)
        record["plot"] = {"file": CURVE, "sha256": file_hash(output / CURVE)}
    (output / EVALUATION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    show(record, output)
    return record


def model_folder(name: str) -> Path:
    """The folder of a model: `name` itself, or a copy of what the Hub has under this name.

    Raises:
        FileNotFoundError: there is none, or it holds no config.json.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=MODEL_FILES))
        except (
            hub_errors.HfHubHTTPError,
            hub_errors.HFValidationError,
            hub_errors.LocalEntryNotFoundError,
            hub_errors.OfflineModeIsEnabled,
        ) as error:
            raise FileNotFoundError(f"there is no folder {name!r}, nor could a model of this name be had from the Hub ({error})") from error
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{name!r} holds no config.json: give the folder of a saved model, such as a training script's --output_dir"
        )
    return folder


def load(auto: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model, in evaluation mode.

    Raises:
        ValueError: its weights are not those of its configuration; transformers alone would only tell of it, and leave the rest random.
    """
    model, told = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    wrong = {kind: sorted(map(str, told[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if told[kind]}
    if wrong:
        raise ValueError(
            f"the weights in {str(folder)!r} do not fit its config.json: {wrong}; was it written by another version of the package?"
        )
    return model.eval()


def ladder(steps: "int | list[int]") -> list:
    """Half, once, twice and four times `steps` (those of each stage, if it is a list), without repetitions."""
    if isinstance(steps, list):
        rungs = [[max(1, int(factor * count)) for count in steps] for factor in (0.5, 1, 2, 4)]
        return [rung for rung, _ in itertools.groupby(rungs)]
    return sorted({max(1, steps // 2), steps, 2 * steps, 4 * steps})


def finite(figures: dict[str, Any]) -> dict[str, Any]:
    """With None for what is not finite: JSON has no word for it."""
    return {key: value if math.isfinite(value) else None for key, value in figures.items()}


def drift(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Greatest drift of one backward pass of up to four examples; nothing where the gradient mode does not reverse."""
    if model.config.gradient != "reversible":
        return {}
    model(**{key: value[:4] for key, value in batch.items()}).loss.backward()
    model.zero_grad(set_to_none=True)
    return {"drift": max(layer.drift.item() for _, layer in fixed_point_layers(model))}


# --- texts ---


def text_arguments(flags: list[str]) -> tuple[Any, Any]:
    from train_language import DataArguments

    parser = HfArgumentParser((TextArguments, DataArguments), prog="evaluate.py MODEL", description="Flags for a language model.")
    options, data = parser.parse_args_into_dataclasses(args=flags)
    alone = data.test_file or data.validation_file
    return options, replace(data, train_file=data.train_file or alone)  # its text is not looked at


def text(model: Any, folder: Path, options: TextArguments, data: Any) -> Measured:
    """Perplexity by windows that overlap: every token but the first is predicted once, by the first window that holds it."""
    from train_language import SPLITS, Scorer, load_text, load_tokenizer, tokenize

    if options.split not in SPLITS:
        raise ValueError(f"--split must be one of {', '.join(SPLITS)}, got {options.split!r}")
    longest = model.config.max_position_embeddings
    window = options.window or min(longest, 1024)
    stride = options.stride or max(1, window // 2)
    if not 1 <= stride < window:
        raise ValueError(
            f"--stride must be at least 1 and less than the window, so that every token has one before it; got {stride} and {window}"
        )
    if getattr(model.config, "block_type", None) == "paper" and window > longest:
        raise ValueError(
            f"--window must be at most {longest}, for which the model has learned positions (max_position_embeddings), got {window}"
        )
    rows, tokenizer = load_text(data)[0][options.split], load_tokenizer(data.tokenizer_name or str(folder))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model a vocabulary of {model.get_input_embeddings().num_embeddings}"
        )
    built_in = data.dataset_name is None and data.train_file is None
    separate = built_in if data.documents is None else data.documents
    texts = rows[data.text_column]
    tokens = rows.map(tokenize(tokenizer, data.text_column, separate), batched=True, remove_columns=rows.column_names, desc="Tokenising")
    ids = torch.tensor([tokenizer.eos_token_id, *itertools.chain.from_iterable(tokens["input_ids"])])
    sizes = text_size(text or "" for text in texts)
    spans = list(windows(len(ids), window, stride))

    def batches(chosen: list[tuple[int, int, int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Windows of one length, (batch, length), and their labels: -100 where another window predicts."""
        for length, group in itertools.groupby(chosen, key=lambda span: span[1] - span[0]):
            same = list(group)
            for start in range(0, len(same), options.batch_size):
                part = same[start : start + options.batch_size]
                inputs = torch.stack([ids[begin:end] for begin, end, _ in part]).to(model.device)
                first = torch.tensor([first - begin for begin, _, first in part], device=model.device)
                yield inputs, inputs.masked_fill(torch.arange(length, device=model.device) < first[:, None], -100)

    @torch.no_grad()
    def score(steps: int | None, every: int) -> dict[str, Any]:
        nats, solved, asked = 0.0, torch.zeros(3, dtype=torch.float64), solver_arguments(model, steps)
        counted = 0
        for inputs, labels in batches(spans[::every]):
            outputs = model(input_ids=inputs, use_cache=False, **asked)
            nats += Scorer.token_losses(outputs.logits, labels).double().sum().item()
            told = labels[:, 1:] != -100  # the positions before the predicted ones
            counted += int(told.sum())
            solved += solver_sums(outputs, partial(predicting, told))
        scores = text_scores(nats, counted, **sizes)
        kept = (
            ("perplexity", "loss") if every > 1 else ("perplexity", "word_perplexity", "bits_per_byte", "loss")
        )  # the sizes are of all windows
        return {"results": {key: scores[key] for key in kept}, "details": {}, "solve": solver_means(solved)}

    origin = options.split if built_in else str(rows.split)  # load_text takes a split that is not given from the one before it
    protocol = {
        "data": f"source text of Python {platform.python_version()}'s standard library",
        **described(data, getattr(data, f"{origin}_file")),
        "split": "a twentieth of the training rows (seed 0)" if origin == "train" != options.split else origin,
        "examples": len(rows),
        "data_sha256": text_hash(texts),
        "tokens": len(ids) - 1,
        **sizes,
        "documents_end_with_a_token": separate,
        "window": window,
        "stride": stride,
        "windows": len(spans),
    }
    inputs, labels = next(batches(spans))
    return Measured(score, len(spans), {"input_ids": inputs, "labels": labels}, protocol)


def predicting(told: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of values (batch, length) those of the positions before the predicted tokens."""
    return values[:, :-1][told]


def windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first token predicted) of the windows over `count` tokens: the tokens from 1 on are predicted once each."""
    begin, first = 0, 1
    while first < count:
        end = min(begin + window, count)
        yield begin, end, first
        begin, first = begin + stride, end


# --- images ---


def image_arguments(flags: list[str]) -> tuple[Any, Any]:
    from image_data import DataArguments

    parser = HfArgumentParser((EvaluationArguments, DataArguments), prog="evaluate.py MODEL", description="Flags for an image model.")
    options, data = parser.parse_args_into_dataclasses(args=flags)
    return options, data


def images(model: Any, folder: Path, options: EvaluationArguments, data: Any) -> Measured:
    """Accuracy, loss and calibration of a classifier."""
    from image_data import HELD_OUT, ImageCollator, Pixels, decode, images_hash, load_images, load_splits
    from image_report import scores
    from train_image import ModelArguments, build_processor

    held_out = data.eval_split or next((name for name in ("test", "validation") if name in load_splits(data)), None)
    rows = load_images(replace(data, eval_split=held_out))[1]
    names, known = rows.features["label"].names, [str(label) for _, label in sorted(model.config.id2label.items())]
    if names != known:
        raise ValueError(f"the data set has other classes than the model: {names[:20]} and {known[:20]}")
    processor, mode = build_processor(ModelArguments(model_name_or_path=str(folder)), data, [])
    pixels = Pixels(processor, (processor.size["height"], processor.size["width"], model.config.num_channels))
    rows, skipped = decode(rows, processor, mode, True, data.bad_images, "evaluation")
    collate = ImageCollator(pixels)

    def batches(every: int) -> Iterator[dict[str, torch.Tensor]]:
        chosen = range(0, len(rows), every)
        for start in range(0, len(chosen), options.batch_size):
            batch = collate([rows[index] for index in chosen[start : start + options.batch_size]])
            yield {"pixel_values": batch["pixel_values"].to(model.device, model.dtype), "labels": batch["labels"].to(model.device)}

    @torch.no_grad()
    def score(steps: Any, every: int) -> dict[str, Any]:
        logits, labels, solved, asked = [], [], torch.zeros(3, dtype=torch.float64), solver_arguments(model, steps)
        for batch in batches(every):
            outputs = model(pixel_values=batch["pixel_values"], **asked)
            logits.append(outputs.logits.float().cpu())
            labels.append(batch["labels"].cpu())
            solved += solver_sums(outputs, torch.flatten)
        all_logits, all_labels = torch.cat(logits), torch.cat(labels)
        found = scores(all_logits.numpy(), all_labels.numpy(), names)
        results = {
            "accuracy": found.pop("accuracy"),
            "loss": F.cross_entropy(all_logits.double(), all_labels).item(),
            "expected_calibration_error": found.pop("expected_calibration_error"),
        }
        return {"results": results, "details": found, "solve": solver_means(solved)}

    source = data.validation_file or data.train_file or data.validation_dir or data.train_dir
    protocol = {
        "data": "scikit-learn's digits",
        **described(data, source, "images of "),
        "split": "a tenth of the training images (seed 0)" if held_out in (None, HELD_OUT) else held_out,
        "examples": len(rows),
        "data_sha256": images_hash(rows),
        "unreadable_images": skipped,
        "classes": len(names),
        "image_size": list(pixels.shape[:2]),
    }
    return Measured(score, len(rows), next(batches(1)), protocol)


# --- both ---


def described(data: Any, source: str | None, what: str = "") -> dict[str, Any]:
    """The data by their name on the Hub (`dataset`, `dataset_config`), or by the name of their file or folder; the split is told beside it."""
    if data.dataset_name:
        dataset = {} if Path(data.dataset_name).exists() else {"dataset": data.dataset_name}
        config = {"dataset_config": data.dataset_config} if data.dataset_config else {}
        return {"data": Path(data.dataset_name).name, **dataset, **config}
    return {"data": f"{what}{Path(source).name}"} if source else {}


def solver_arguments(model: Any, steps: Any) -> dict[str, Any]:
    if not fixed_point_layers(model):  # an explicit model, to compare with
        return {}
    return {"max_steps": steps, "output_solver_stats": True}


def solver_sums(outputs: Any, chosen: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Count, sum of the residuals and sum of the steps of the chosen rows."""
    if getattr(outputs, "solver_residual", None) is None:
        return torch.zeros(3, dtype=torch.float64)
    residual, steps = chosen(outputs.solver_residual).double(), chosen(outputs.solver_steps).double()
    return torch.stack([torch.tensor(float(residual.numel())).double(), residual.sum().cpu(), steps.sum().cpu()])


def solver_means(sums: torch.Tensor) -> dict[str, float]:
    count, residual, steps = sums.tolist()
    return {"residual": residual / count, "steps": steps / count} if count else {}


def plot_curves(record: dict[str, Any], path: Path) -> None:
    """Residual at the start of each step, and quality against steps, to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = record["configuration"]["max_steps"]
    trained = max(trained) if isinstance(trained, list) else trained
    for name, values in record["residual_per_step"].items():
        left.plot(range(1, len(values) + 1), values, marker=".", label=name)
    left.set(xlabel="step", ylabel="relative residual at its start", yscale="log", title="Convergence")
    key, label = ("accuracy", "accuracy") if "accuracy" in record["results"] else ("loss", "loss (nats per token)")
    steps = [max(point["max_steps"]) if isinstance(point["max_steps"], list) else point["max_steps"] for point in record["steps_curve"]]
    right.plot(steps, [math.nan if point[key] is None else point[key] for point in record["steps_curve"]], marker="o", color="C1")
    right.set(xlabel="steps of the solve", ylabel=label, xscale="log", title="Quality over steps")
    right.set_xticks(steps, [str(count) for count in steps])
    right.minorticks_off()
    for axes in (left, right):
        axes.axvline(trained, color="grey", linestyle=":", label="the model's own steps")
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def show(record: dict[str, Any], folder: Path) -> None:
    print_table(
        [f"{record['protocol'].get('data')}, {record['protocol']['split']}", ""], [*record["results"].items(), *record["solve"].items()]
    )
    if record["steps_curve"]:
        header = list(record["steps_curve"][0])
        print_table([name.replace("_", " ") for name in header], [[point[name] for name in header] for point in record["steps_curve"]])
    print(
        f"\nwritten: {folder / EVALUATION}; in the model's folder a card is made of it by python -m revdeq_hf.model_card {shlex.quote(str(folder))}"
    )
