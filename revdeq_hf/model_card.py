# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""What does a model's card say, and is it true? Every number in it comes from files that runs wrote.

    python examples/evaluate.py runs/language                  # measures: evaluation.json
    python -m revdeq_hf.model_card runs/language               # writes README.md
    python -m revdeq_hf.model_card runs/language --check       # compares it with the files

Numbers come from `evaluation.json`, from the training's `trainer_state.json` and `results.json`, and from `config.json`. They stand between marks
(`<!-- generated: ... -->`) and in the metadata, where `check_card` finds whatever differs; the prose around them may be edited by hand, but a sentence there
must not state a quality with a number. No argument takes a number.

`card.yaml` in the model's folder holds what no run knows: the texts of `TEXTS`, and `power_watts`, from which the energy of the training is estimated. Licence,
base model, data sets, language and tags of the metadata are compared with it, too.
"""

import argparse
import hashlib
import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

CARD, EVALUATION, CURVE, FIELDS = "README.md", "evaluation.json", "evaluation_steps.png", "card.yaml"
TEMPLATE = Path(__file__).parent / "model_card_template.md"
INPUTS = ("tokenizer.json", "preprocessor_config.json")  # that make a model's inputs
# fields of our configurations on which no result depends
FREE = {
    *("keep_evaluations", "drift_policy", "steps_sampling", "path_noise", "attention_dropout", "hidden_dropout", "initializer_range"),
    *("kv_cache", "use_cache", "skip_logits", "pad_token_id", "bos_token_id", "eos_token_id", "semantic_loss_ignore_index"),
}
RECORD = (
    "task",
    "weights",
    "parameters",
    "results",
    "solve",
    "configuration",
    "steps_curve",
    "protocol",
    "plot",
    "command",
    "date",
    "device",
    "versions",
    "seconds",
)

# by the class of the model: task of the Hub, Auto class, what it is
KINDS = {
    "RevDEQForCausalLM": ("text-generation", "AutoModelForCausalLM", "causal language model"),
    "RevDEQForImageClassification": ("image-classification", "AutoModelForImageClassification", "image classifier"),
    "RevDEQForSemanticSegmentation": ("image-segmentation", "AutoModelForSemanticSegmentation", "classifier of pixels"),
    "RevDEQForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification", "text classifier"),
    "RevDEQForTokenClassification": ("token-classification", "AutoModelForTokenClassification", "token classifier"),
    "RevDEQForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering", "extractive question answering model"),
    "RevDEQModel": ("feature-extraction", "AutoModel", "text model without a head"),
    "RevDEQVisionModel": ("image-feature-extraction", "AutoModel", "image model without a head"),
}
# tasks whose pipeline brings along what makes the inputs, and takes such a model without further arguments: what it is given
PIPELINES = {
    "text-generation": "a text",
    "text-classification": "a text",
    "token-classification": "a text",
    "image-classification": "an_image.png",
}
METRICS = {
    "text-generation": {
        "perplexity": "perplexity per token",
        "word_perplexity": "perplexity per word",
        "bits_per_byte": "bits per byte",
        "loss": "loss (nats per token)",
    },
    "image-classification": {
        "accuracy": "accuracy",
        "loss": "loss (nats per image)",
        "expected_calibration_error": "expected calibration error",
    },
}
# What a card says where nothing else is given: None leaves it out.
TEXTS: dict[str, Any] = {
    "title": None,
    "description": "A model trained with transformers and `revdeq_hf`. It replaces a stack of layers by one block that is iterated to its fixed point.",
    "intended_use": "Its author has not stated what it is meant for. It is fit for research on deep equilibrium models; measure it on your own data before "
    "any other use.",
    "limits": "What was measured is stated under Evaluation, nothing beyond it is known: neither how the model does on other data, nor whether it treats "
    "groups of people alike. It repeats the errors and biases of its training data. Do not let it decide about people.",
    "training_data": "Its author has not stated what it was trained on.",
    "training_command": None,
    "hardware": None,
    "repo_id": None,
    "license": None,
    "base_model": None,
    "language": None,
    "datasets": None,
    "tags": None,
}
LISTS = ("base_model", "language", "datasets", "tags")  # may be lists of texts

_BLOCK = re.compile(r"<!-- generated: (\w+) -->\n(.*?)<!-- end of \1 -->", re.S)
_QUALITY = re.compile(r"perplexit|accura|bits per byte|\bloss\b|residual|\bdrift\b|calibration error|error rate|\bscore", re.I)
# of the metadata, what is written and compared (the last is model-index); the rest is left alone
_METADATA = ("library_name", "pipeline_tag", "license", "base_model", "language", "datasets", "tags", "metrics", "eval_results")


def render_card(
    folder: "str | Path", *, template: "str | Path | None" = None, evaluated: bool = True, weights: bool = True, **texts: "str | list[str]"
) -> str:
    """The text of README.md for a model's folder. Reads the weights once, for their sha256; writes nothing.

    Args:
        folder: of a saved model, with the files named at the top.
        template: Jinja file instead of the package's own (`model_card_template.md`), with the same names.
        evaluated: False: a card without an evaluation, which says so.
        weights: False: the weights are elsewhere (a card kept for reading); what `evaluation.json` says of them is taken as it is.
        texts: instead of those of `card.yaml`, by the names in `TEXTS`; `check_card` knows those of `card.yaml` only.

    Raises:
        FileNotFoundError: a file is missing; the error names the command that makes it.
        ValueError: the results are of other weights, settings or tokenizers, hold an unknown metric or no finite value, a text states a quality with a
            number, or the template has a placeholder without a value or a digit of its own among the generated parts.
    """
    folder = Path(folder)
    config, architecture = _config(folder)
    task, auto_class, family = KINDS[architecture]
    hashes = weight_hashes(folder) if weights else None
    record = _evaluation(folder, task, hashes, config) if evaluated else {}
    fields, power = _texts(folder, texts)
    training, seconds = _training(folder, hashes)
    context: dict[str, Any] = {
        "text": {**fields, "licence": fields.get("license", "Its author has not stated a licence.")},
        "model": {
            "family": family,
            "block": _block(config),
            "parameters": record.get("parameters"),
            "weights": {f"`{file}`, sha256": digest for file, digest in (hashes or record.get("weights", {})).items()},
            "auto_class": auto_class,
            "pipeline": task if task in PIPELINES and config.get("num_channels", 3) == 3 else None,  # a pipeline makes every image RGB
            "example": PIPELINES.get(task),
            "bundled": bool(config.get("auto_map")),
        },
        "training": training,
        "energy": {"seconds": seconds, "watts": power, "watt_hours": power * seconds / 3600} if power and seconds else None,
        "solver": _solver(config),
    }
    if record:
        context.update(
            results=record["results"],
            names=METRICS[task],
            solve=record["solve"],
            protocol=record["protocol"],
            curve=_curve(record),
            plot=record["plot"]["file"],
            record={**record, "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items())},
        )
    body = _fill(Path(template or TEMPLATE), _known(context))
    _refuse_claims(body)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        license=fields.get("license"),
        base_model=fields.get("base_model"),
        language=fields.get("language"),
        datasets=fields.get("datasets"),
        tags=list(dict.fromkeys(["revdeq", "deep-equilibrium-model", *_listed(fields.get("tags"))])),
        **({"metrics": list(record["results"]), "model_name": fields["title"], "eval_results": _eval_results(record)} if record else {}),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").content


def write_card(folder: "str | Path", **arguments: Any) -> Path:
    """Writes `render_card(folder, **arguments)` to README.md. Of a card that is there the generated parts and metadata change; the prose stays as it is.

    Raises:
        FileExistsError: there is a README.md without generated parts.
    """
    path = Path(folder) / CARD
    text = render_card(folder, **arguments)
    if path.is_file():
        blocks, old = dict(_BLOCK.findall(text)), ModelCard.load(path)
        there = set(dict(_BLOCK.findall(old.text)))
        if there != set(blocks):
            raise FileExistsError(
                f"{str(path)!r} is not a card as it is written here: of the generated parts {', '.join(blocks)} it has {', '.join(sorted(there)) or 'none'}; "
                "move it away to write a new one"
            )
        new = ModelCard(text)
        for key in (*_METADATA, "model_name"):
            setattr(old.data, key, getattr(new.data, key))
        old.text = _BLOCK.sub(lambda found: f"<!-- generated: {found[1]} -->\n{blocks[found[1]]}<!-- end of {found[1]} -->", old.text)
        _refuse_claims(old.text)
        text = old.content
    path.write_text(text, encoding="utf-8")
    return path


def check_card(folder: "str | Path", *, template: "str | Path | None" = None, weights: bool = True) -> None:
    """Compares README.md with what the folder's files give: the generated parts, the metadata, and the plot.

    Args:
        template, weights: as for `render_card`.

    Raises:
        FileNotFoundError: there is no card.
        ValueError: something differs (both versions are named), or a sentence outside of the generated parts states a quality with a number.
    """
    folder = Path(folder)
    path = folder / CARD
    if not path.is_file():
        raise FileNotFoundError(f"there is no {CARD} in {str(folder)!r}; python -m revdeq_hf.model_card {folder} writes it")
    evaluated = (folder / EVALUATION).is_file()
    card, wanted = ModelCard.load(path), ModelCard(render_card(folder, template=template, evaluated=evaluated, weights=weights))
    names, expected = [name for name, _ in _BLOCK.findall(card.text)], dict(_BLOCK.findall(wanted.text))
    if sorted(names) != sorted(expected):
        raise ValueError(
            f"{str(path)!r} must have the generated parts {', '.join(expected)}, once each; it has {', '.join(names) or 'none'}"
        )
    found = dict(_BLOCK.findall(card.text))
    for name, block in expected.items():
        lines, truth = found[name].splitlines(), block.splitlines()
        wrong = [line for line in lines if line not in truth]
        missing = [line for line in truth if line not in lines]
        if lines != truth:
            raise ValueError(
                f"the part {name!r} of {str(path)!r} is not what the files give: it says {wrong or 'the same in another order or less'}, they say "
                f"{missing or 'nothing of it'}; write it anew with python -m revdeq_hf.model_card {folder}"
            )
    for key in _METADATA:
        there, here = (getattr(data, key) for data in (card.data, wanted.data))
        if there != here:
            raise ValueError(
                f"{key} in the metadata of {str(path)!r} is {there}, the files give {here}; state it in {FIELDS} if no run knows it, and write the card anew "
                f"with python -m revdeq_hf.model_card {folder}"
            )
    _refuse_claims(card.text)


def file_hash(path: "str | Path") -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def weight_files(folder: "str | Path") -> list[Path]:
    """model.safetensors, or else its parts. What has another name (a variant, an older file) is not what `from_pretrained` reads.

    Raises:
        FileNotFoundError: there are none.
    """
    whole = Path(folder) / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(Path(folder).glob("model-*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no weights: expected model.safetensors (or its parts), as save_pretrained writes them without a variant"
        )
    return files


def weight_hashes(folder: "str | Path") -> dict[str, str]:
    """sha256 of each of `weight_files`, by name."""
    return {path.name: file_hash(path) for path in weight_files(folder)}


def input_hashes(folder: "str | Path") -> dict[str, str]:
    """sha256 of each of the files `INPUTS` that is there, by name."""
    return {name: file_hash(Path(folder) / name) for name in INPUTS if (Path(folder) / name).is_file()}


def decisive(config: Any) -> dict[str, Any]:
    """What of a configuration the results depend on, as JSON holds it."""
    names = {*inspect.get_annotations(type(config)), "id2label"} - FREE
    return {name: value for name, value in json.loads(config.to_json_string(use_diff=False)).items() if name in names}


# --- what the files say ---


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is damaged, no JSON: {error}") from error


def _config(folder: Path) -> tuple[dict[str, Any], str]:
    """The configuration with all its fields, and the class of the model."""
    from .configuration_revdeq import RevDEQConfig, RevDEQVisionConfig

    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no model in {str(folder)!r}: expected config.json and model.safetensors, as save_pretrained writes them"
        )
    saved = _json(path)
    architecture = (saved.get("architectures") or [None])[0]
    kinds: dict[str, Any] = {"revdeq": RevDEQConfig, "revdeq_vision": RevDEQVisionConfig}
    if architecture not in KINDS or saved.get("model_type") not in kinds:
        raise ValueError(
            f"a card is made of models of this package ({', '.join(KINDS)}), {str(path)!r} is of {architecture} (model_type {saved.get('model_type')!r})"
        )
    return json.loads(kinds[saved["model_type"]].from_json_file(path).to_json_string(use_diff=False)), architecture


def _evaluation(folder: Path, task: str, hashes: dict[str, str] | None, config: dict[str, Any]) -> dict[str, Any]:
    path = folder / EVALUATION
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {EVALUATION} in {str(folder)!r}, from which a card has its numbers: make it with python examples/evaluate.py {folder}, or write a "
            "card that says that nothing was measured (evaluated=False, --not_evaluated)"
        )
    record = _json(path)
    if "solver" in record:  # of an evaluation that noted four settings only
        record.setdefault("configuration", record["solver"])
    lacking = [name for name in RECORD if name not in record]
    if lacking:
        raise ValueError(
            f"{str(path)!r} is not what examples/evaluate.py writes of a model with fixed points, it lacks {', '.join(lacking)}; measure anew"
        )
    known = METRICS.get(task, {})
    if record["task"] != task:
        raise ValueError(f"{str(path)!r} is of a model for {record['task']}, the folder's model is for {task}")
    unknown = [name for name in record["results"] if name not in known]
    if unknown or not record["results"]:
        raise ValueError(f"{str(path)!r} has the metrics {list(record['results'])}; known for {task} are {', '.join(known)}")
    for name, value in record["results"].items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} in {str(path)!r} must be a finite number, got {value!r}")
    if hashes is not None and hashes != record["weights"]:
        raise ValueError(
            f"{str(path)!r} is of other weights than the folder holds: it measured {record['weights']}, here are {hashes}; measure these with "
            f"python examples/evaluate.py {folder}"
        )
    for name, value in record["configuration"].items():
        if config.get(name) != value:
            raise ValueError(f"{str(path)!r} was measured with {name} {value!r}, config.json has {config.get(name)!r}; measure anew")
    inputs = input_hashes(folder)
    if hashes is not None and record.get("inputs", inputs) != inputs:
        raise ValueError(
            f"{str(path)!r} was measured with {record['inputs']}, here are {inputs} (sha256); put these files back, or measure anew"
        )
    plot = folder / record["plot"]["file"]
    if not plot.is_file():
        raise FileNotFoundError(
            f"the plot {plot.name}, which {EVALUATION} names, is not in {str(folder)!r}; measure anew, or copy it there"
        )
    if file_hash(plot) != record["plot"]["sha256"]:
        raise ValueError(f"{str(plot)!r} is not the plot that was drawn from {EVALUATION}; measure anew")
    return record


def _training(folder: Path, hashes: dict[str, str] | None) -> tuple[dict[str, Any], float | None]:
    """What the training's own logs say, by name, and its seconds; nothing without logs."""
    from .report import read_run, summary

    if not (folder / "trainer_state.json").is_file():  # a model whose training left nothing here
        return {}, None
    run, state = read_run(folder), _json(folder / "trainer_state.json")
    record = run.results.get("run", {})
    if hashes is not None and record.get("weights", hashes) != hashes:
        raise ValueError(
            f"results.json in {str(folder)!r} is of a training that gave other weights than the folder holds, {record['weights']} instead of {hashes}; move it "
            "and trainer_state.json away, or put the weights of that training back"
        )
    ends = (entry for entry in reversed(run.history) if "train_runtime" in entry)
    seconds = next((entry.get("train_seconds", entry["train_runtime"]) for entry in ends), None)  # without the former: of another trainer
    rates = run.values("learning_rate")
    found = {
        "command": f"`{record['command']}`" if record else None,
        "device": record.get("device"),
        "commit": record.get("commit"),
        "training tokens": run.results.get("train_tokens"),
        "training images": run.results.get("train_images"),
        "batch size per device": state.get("train_batch_size"),
        "greatest learning rate logged": max(rates) if rates else None,
        "seconds": seconds,
        **summary(run),
    }
    return {name: value for name, value in found.items() if value is not None}, seconds


def _block(config: dict[str, Any]) -> str:
    if config["model_type"] == "revdeq":
        return (
            f"{config['block_type']}, {config['num_block_layers']} transformer layer{'s' if config['num_block_layers'] > 1 else ''} of width "
            f"{config['hidden_size']} with {config['num_attention_heads']} heads and an MLP of {config['intermediate_size']}"
        )
    stages = ", ".join(
        f"{size} (expansion {ratio})" for size, ratio in zip(config["hidden_sizes"], config["expansion_ratios"], strict=True)
    )
    return f"{config['block_type']}, convolutional, one for each stage; channels {stages}"


def _solver(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "solver": config["solver"],
        "beta": config["beta"],
        "steps": config["max_steps"],
        "stops at a residual of": "none, all steps are taken" if config["tol"] is None else config["tol"],
        "gradient mode": config["gradient"],
    }


def _curve(record: dict[str, Any]) -> dict[str, Any]:
    """The table of steps against quality, as Markdown."""
    columns = list(record["steps_curve"][0])
    names = {**METRICS[record["task"]], "max_steps": "steps", "residual": "mean residual"}

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return {
        "header": row([names[column] for column in columns]),
        "rule": row(["---"] * len(columns)),
        "rows": [
            row(["not finite" if point[column] is None else _shown(point[column]) for column in columns]) for point in record["steps_curve"]
        ],
    }


def _eval_results(record: dict[str, Any]) -> list[EvalResult]:
    protocol, names = record["protocol"], METRICS[record["task"]]
    how = {key: protocol[key] for key in ("window", "stride", "max_steps", "dtype") if key in protocol}
    return [
        EvalResult(
            task_type=record["task"],
            dataset_type=protocol.get("dataset") or re.sub(r"\W+", "-", protocol["data"].lower()),
            dataset_name=protocol["data"],
            dataset_config=protocol.get("dataset_config"),
            dataset_split=protocol["split"],
            metric_type=name,
            metric_name=names[name],
            metric_value=value,
            metric_args=how,
        )
        for name, value in record["results"].items()
    ]


# --- the text ---


def _texts(folder: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
    """The texts: the given ones, those of card.yaml, the defaults; and the power."""
    path = folder / FIELDS
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is no YAML: {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{str(path)!r} must hold names and texts, got {type(saved).__name__}")
    power = saved.pop("power_watts", None)
    if power is not None and (isinstance(power, bool) or not isinstance(power, int | float) or not 0 < power < math.inf):
        raise ValueError(f"power_watts in {str(path)!r} must be a positive number, got {power!r}")
    for name, value in [*saved.items(), *given.items()]:
        if name not in TEXTS:
            hint = f"; it belongs in {FIELDS}" if name == "power_watts" else ""
            raise ValueError(f"a card has no text {name!r}{hint}; known are {', '.join(TEXTS)}")
        whole = isinstance(value, str) or (name in LISTS and isinstance(value, list) and all(isinstance(part, str) for part in value))
        if not whole:
            raise ValueError(f"{name} of a card must be a text{' or a list of texts' if name in LISTS else ''}, got {value!r}")
    texts = {**TEXTS, "title": folder.resolve().name, **saved, **given}
    texts["repo_id"] = texts["repo_id"] or f"USER/{texts['title']}"
    return {name: value.strip() if isinstance(value, str) else value for name, value in texts.items() if value is not None}, power


def _listed(value: "str | list[str] | None") -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _known(value: Any) -> Any:
    """Without the entries that are None, so that the template finds them undefined."""
    if not isinstance(value, dict):
        return value
    return {key: _known(part) for key, part in value.items() if part is not None}


def _shown(value: Any) -> str:
    """As in a table: numbers with four significant digits, whole ones complete."""
    if isinstance(value, list | tuple):
        return " x ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _fill(path: Path, context: dict[str, Any]) -> str:
    template = path.read_text(encoding="utf-8")
    for name, block in _BLOCK.findall(template):
        typed = re.search(r".*\d.*", re.sub(r"{{.*?}}|{%.*?%}|{#.*?#}", "", block, flags=re.S))
        if typed:
            raise ValueError(
                f"the part {name!r} of the template {path.name} has a digit of its own: {typed[0].strip()!r}; take it from the results, {{{{ ... }}}}"
            )
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    try:
        filled = environment.from_string(template).render(context)
    except jinja2.TemplateError as error:
        raise ValueError(f"the template {path.name} cannot be filled: {error}") from error
    return re.sub(r"\n{3,}", "\n\n", filled)


def _refuse_claims(body: str) -> None:
    """No sentence outside of the generated parts may state a quality with a number."""
    for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n|\n(?=[|#*-])", _BLOCK.sub("", body)):
        if _QUALITY.search(sentence) and re.search(r"\d", sentence):
            raise ValueError(
                f"a number of quality belongs in the generated parts, where results stand behind it; found in the text: {sentence.strip()!r}"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m revdeq_hf.model_card", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("folder", metavar="FOLDER", help="folder of a saved model")
    parser.add_argument("--check", action="store_true", help="compare the card with the files and write nothing")
    parser.add_argument("--template", help="Jinja file instead of the package's own")
    parser.add_argument("--not_evaluated", action="store_true", help="write a card that says that nothing was measured")
    parser.add_argument("--no_weights", action="store_true", help="the weights are elsewhere: do not compare them with the results")
    options = parser.parse_args(arguments)
    common = {"template": options.template, "weights": not options.no_weights}
    try:
        if options.check:
            check_card(options.folder, **common)
            print(f"{Path(options.folder) / CARD} says what the files give")
        else:
            print(f"written: {write_card(options.folder, evaluated=not options.not_evaluated, **common)}")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
