#!/usr/bin/env python
"""Trains, evaluates and saves a reversible equilibrium image classifier with transformers' Trainer.

Without any argument the images are scikit-learn's handwritten digits, so nothing is downloaded:

    python examples/train_image.py

Any data set of the Hub, or a local folder of images, takes their place (`--help` lists every flag, those of TrainingArguments among them):

    python examples/train_image.py --dataset_name uoft-cs/cifar10 --preset paper_cifar10_multiscale --num_train_epochs 200 --max_steps -1
    python examples/train_image.py --train_dir photos/train --validation_dir photos/test --image_size 64

The output folder holds the model, the image processor, `results.json` and `training.png`. An interrupted run goes on with
`--resume_from_checkpoint true`.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)

from revdeq_hf import RevDEQForImageClassification, RevDEQVisionConfig
from revdeq_hf.training import (
    RevDEQCallback,
    checkpoint_to_resume,
    fixed_point_layers,
    peak_memory,
    plot_training,
    print_table,
    residual_curve,
)

PRESETS = ("small", "paper_cifar10_multiscale")


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A saved model to go on from; its head is replaced if the labels differ."}
    )
    preset: str = field(default="small", metadata={"help": f"Network of a new model: {' or '.join(PRESETS)}."})
    hidden_sizes: list[int] | None = field(default=None, metadata={"help": "Channels of each stage, instead of the preset's."})
    expansion_ratios: list[int] | None = field(default=None, metadata={"help": "Expansion of each stage's block, instead of the preset's."})
    beta: float = field(default=0.8, metadata={"help": "Relaxation of the iteration, in (0, 2), not 1."})
    solver_steps: int = field(default=4, metadata={"help": "Steps of each solve, two evaluations of the block each (config.max_steps)."})
    tol: float | None = field(default=None, metadata={"help": "Relative residual at which an example stops; always all steps by default."})
    gradient: str = field(default="reversible", metadata={"help": "Gradient mode: reversible, checkpoint or backprop."})
    keep_evaluations: int = field(default=1, metadata={"help": "Evaluations whose graphs are kept for the backward pass."})


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub or a local folder, as `datasets` loads it."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one subfolder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for evaluation; default: a tenth of the training images."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; default: the only image column."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels; default: the only class label column."})
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width that images are resized to; default: of the first image."}
    )
    flip: bool | None = field(default=None, metadata={"help": "Flip training images left to right; default: not for the digits."})
    crop_padding: int = field(default=1, metadata={"help": "Pixels a training image may be shifted by."})
    max_train_images: int | None = field(default=None, metadata={"help": "Use so many images for training."})
    max_eval_images: int | None = field(default=None, metadata={"help": "Use so many images for evaluation."})


@dataclass
class ImageTrainingArguments(TrainingArguments):
    output_dir: str = field(default="runs/image", metadata={"help": "Folder for the model, checkpoints, results and figure."})
    max_steps: int = field(default=600, metadata={"help": "Updates to train for; -1: num_train_epochs decide."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Images per device in evaluation."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Updates of linear warm-up, or their share of all if below 1."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    logging_steps: float = field(default=25, metadata={"help": "Updates between logs."})
    eval_strategy: str = field(default="no", metadata={"help": "no, steps or epoch."})
    save_steps: float = field(default=200, metadata={"help": "Updates between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    dataloader_pin_memory: bool = field(default=torch.accelerator.is_available(), metadata={"help": "Pin host memory for faster copies."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads the image column, so columns stay."})


def digits_rows(test: bool) -> Iterator[dict[str, Any]]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; every fifth one is for the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if (number % 5 == 4) == test:
            yield {"image": Image.fromarray((image * (255 / 16)).round().astype(np.uint8)), "label": int(label)}


def load_images(data: DataArguments) -> tuple[datasets.Dataset, datasets.Dataset, str, str]:
    """Training rows, evaluation rows, and the names of their image and label columns.

    Raises:
        FileNotFoundError: a named folder is missing.
        ValueError: the columns cannot be told, or a split is missing.
    """
    if data.dataset_name and data.train_dir:
        raise ValueError("give either --dataset_name or --train_dir, not both")
    if data.validation_dir and not data.train_dir:
        raise ValueError("--validation_dir needs --train_dir")
    if data.dataset_name:
        loaded = datasets.load_dataset(data.dataset_name, data.dataset_config)
    elif data.train_dir:
        folders = {"train": data.train_dir, **({"validation": data.validation_dir} if data.validation_dir else {})}
        for split, folder in folders.items():
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"--{split}_dir: there is no folder {folder!r}")
        loaded = datasets.load_dataset("imagefolder", data_files={split: f"{folder}/**" for split, folder in folders.items()})
    else:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])})
        loaded = datasets.DatasetDict(
            {
                name: datasets.Dataset.from_generator(digits_rows, gen_kwargs={"test": name == "test"}, features=features)
                for name in ("train", "test")
            }
        )
    if "train" not in loaded:
        raise ValueError(f"the data set has no split 'train', got {', '.join(loaded)}")
    held_out = next((name for name in ("test", "validation") if name in loaded), None)
    if held_out is None:
        loaded = loaded["train"].train_test_split(test_size=0.1, seed=0)
        held_out = "test"
    train, evaluation = loaded["train"], loaded[held_out]
    image = data.image_column or only_column(train, datasets.Image, "--image_column")
    label = data.label_column or only_column(train, datasets.ClassLabel, "--label_column")
    for name in (image, label):
        if name not in train.column_names:
            raise ValueError(f"no column {name!r}, the data set has {train.column_names}")
    if not isinstance(train.features[label], datasets.ClassLabel):
        train, evaluation = train.class_encode_column(label), evaluation.class_encode_column(label)
    if train.features[label].names != evaluation.features[label].names:
        raise ValueError(
            f"training and evaluation have other classes: {train.features[label].names} and {evaluation.features[label].names}"
        )
    if data.max_train_images is not None:
        train = train.shuffle(seed=0).select(range(min(data.max_train_images, len(train))))
    if data.max_eval_images is not None:
        evaluation = evaluation.shuffle(seed=0).select(range(min(data.max_eval_images, len(evaluation))))
    return train, evaluation, image, label


def only_column(rows: datasets.Dataset, kind: type, flag: str) -> str:
    names = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if len(names) != 1:
        raise ValueError(f"the data set has {len(names)} columns of type {kind.__name__} ({names}); name one with {flag}")
    return names[0]


def pixel_statistics(rows: datasets.Dataset, column: str, grey: bool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, over up to 2,000 images, of values in [0, 1]."""
    count, total, squares = 0.0, 0.0, 0.0
    for row in rows.select(range(min(2000, len(rows)))):
        pixels = np.asarray(row[column].convert("L" if grey else "RGB"), dtype=np.float64).reshape(-1, 1 if grey else 3) / 255
        count, total, squares = count + len(pixels), total + pixels.sum(0), squares + (pixels**2).sum(0)
    mean = total / count
    return np.atleast_1d(mean).tolist(), np.atleast_1d(np.sqrt(np.maximum(squares / count - mean**2, 1e-12))).tolist()


def build_processor(first: Image.Image, statistics: tuple[list[float], list[float]], size: int | None) -> Any:
    height, width = (first.height, first.width) if size is None else (size, size)
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=statistics[0], image_std=statistics[1])


class ImageCollator:
    """Rows to `pixel_values` and `labels`. Training images are shifted by up to `padding` pixels and, if asked for, flipped, in plain torch."""

    def __init__(self, processor: Any, image: str, label: str, grey: bool, padding: int = 0, flip: bool = False) -> None:
        self.processor, self.image, self.label = processor, image, label
        self.mode = "L" if grey else "RGB"
        self.padding, self.flip = padding, flip

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [np.atleast_3d(np.asarray(row[self.image].convert(self.mode))) for row in rows]
        pixels = self.processor(images, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        if self.padding:
            pixels = shifted(pixels, self.padding)
        if self.flip:
            flipped = torch.rand(len(pixels)) < 0.5
            pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
        return {"pixel_values": pixels, "labels": torch.tensor([row[self.label] for row in rows])}


def shifted(pixels: torch.Tensor, padding: int) -> torch.Tensor:
    """Each image of (batch, channels, height, width) moved by up to `padding` pixels in both directions; its edge is repeated."""
    batch, _, height, width = pixels.shape
    padded = F.pad(pixels, (padding,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * padding + 1, (2, batch, 1))
    ys, xs = torch.arange(height) + down, torch.arange(width) + right  # (batch, height), (batch, width)
    return padded[torch.arange(batch)[:, None, None], :, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2).contiguous()


def build_model(options: ModelArguments, names: list[str], channels: int, size: int) -> torch.nn.Module:
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if options.model_name_or_path:
        return AutoModelForImageClassification.from_pretrained(options.model_name_or_path, ignore_mismatched_sizes=True, **labels)
    if options.preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {options.preset!r}")
    settings: dict[str, Any] = dict(hidden_sizes=[32, 64], expansion_ratios=[1, 1])
    if options.preset == "paper_cifar10_multiscale":
        settings = {}
    for name in ("hidden_sizes", "expansion_ratios"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    create = RevDEQVisionConfig.paper_cifar10_multiscale if options.preset != "small" else RevDEQVisionConfig
    config = create(
        image_size=size,
        num_channels=channels,
        beta=options.beta,
        max_steps=options.solver_steps,
        tol=options.tol,
        gradient=options.gradient,
        keep_evaluations=options.keep_evaluations,
        **{**settings, "num_labels": len(names), **labels},
    )
    return RevDEQForImageClassification(config)


class Accuracy(evaluate.Metric):
    """Share of right answers, computed by scikit-learn; needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="Accuracy.", citation="", inputs_description="", features=features)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(references, predictions))}


def main(arguments: list[str] | None = None) -> dict:
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, ImageTrainingArguments), description=__doc__.split("\n\n")[0] if __doc__ else None
    )
    options, data, training = parser.parse_args_into_dataclasses(args=arguments)
    resume = checkpoint_to_resume(training)
    set_seed(training.seed)
    began = time.perf_counter()

    with training.main_process_first(desc="preparing the data"):
        train, evaluation, image, label = load_images(data)
    first = train[0][image]
    grey = first.mode in ("1", "L", "I;16")
    if options.model_name_or_path:
        processor = ViTImageProcessorPil.from_pretrained(options.model_name_or_path)
        grey = len(processor.image_mean) == 1
    else:
        processor = build_processor(first, pixel_statistics(train, image, grey), data.image_size)
    model: Any = build_model(options, train.features[label].names, 1 if grey else 3, processor.size["height"])
    flip = data.flip if data.flip is not None else (data.dataset_name or data.train_dir) is not None
    metric = Accuracy()

    class ImageTrainer(Trainer):
        """Only training images are augmented."""

        def get_train_dataloader(self):
            self.data_collator = ImageCollator(processor, image, label, grey, data.crop_padding, flip)
            try:
                return super().get_train_dataloader()
            finally:
                self.data_collator = ImageCollator(processor, image, label, grey)

    trainer = ImageTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=ImageCollator(processor, image, label, grey),
        compute_metrics=lambda p: metric.compute(predictions=p.predictions.argmax(-1), references=p.label_ids),
    )
    trainer.callback_handler.callbacks.insert(0, RevDEQCallback())  # ahead of the reporting ones

    before = trainer.evaluate(metric_key_prefix="before") if resume is None else {}
    trained = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    after = trainer.evaluate()

    drifts = [entry["drift"] for entry in trainer.state.log_history if "drift" in entry]
    results = {
        "parameters": model.num_parameters(),
        "train_images": len(train),
        "eval_images": len(evaluation),
        "updates": trainer.state.global_step,
        "loss_before": before.get("before_loss"),
        "loss": after["eval_loss"],
        "accuracy_before": before.get("before_accuracy"),
        "accuracy": after["eval_accuracy"],
        "greatest_drift": max(drifts) if drifts else None,
        "train_seconds": trained.metrics["train_runtime"],
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": peak_memory(),
    }
    if trainer.is_world_process_zero():
        report(results, trainer, evaluation)
    return results


def report(results: dict, trainer: Trainer, evaluation: datasets.Dataset) -> None:
    """Writes results.json and training.png to the output folder and prints the table."""
    folder = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    batch = trainer.data_collator([evaluation[index] for index in range(min(64, len(evaluation)))])
    steps = fixed_point_layers(model)[0][1].max_steps
    curves = residual_curve(model, {"pixel_values": batch["pixel_values"].to(model.device)}, 4 * steps)
    plot_training(trainer.state.log_history, curves, steps, folder / "training.png")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    rows = [[key.replace("_", " "), value] for key, value in results.items() if key != "peak_memory_bytes"]
    rows += [["peak memory (MB)", results["peak_memory_bytes"] and results["peak_memory_bytes"] / 1e6], ["saved in", str(folder)]]
    print_table(["the run", ""], rows)


if __name__ == "__main__":
    main()
