#!/usr/bin/env python
"""Trains, evaluates and saves a reversible equilibrium image classifier with transformers' Trainer.

Without any argument the images are scikit-learn's handwritten digits, so nothing is downloaded:

    python examples/train_image.py

Any data set of the Hub, local folders of images or parquet files take their place (`--help` lists every flag, those of TrainingArguments among
them):

    python examples/train_image.py --dataset_name uoft-cs/cifar10 --preset paper_cifar10_multiscale --num_train_epochs 200 --max_steps -1 \\
        --crop_padding 4 --cutmix 1 --label_smoothing_factor 0.1 --ema_decay 0.999 --bf16 true --channels_last true
    python examples/train_image.py --dataset_name uoft-cs/cifar100 --label_column fine_label
    python examples/train_image.py --train_dir photos/train --validation_dir photos/test --image_size 64

An explicit network, trained on the same batches for the same time (its stem shrinks images fourfold, so small ones are enlarged first):

    python examples/train_image.py --dataset_name uoft-cs/cifar10 --max_minutes 30 --max_steps 1000000 --hidden_sizes 64 128 --expansion_ratios 1 1
    python examples/train_image.py --dataset_name uoft-cs/cifar10 --max_minutes 30 --max_steps 1000000 --model_type resnet --hidden_sizes 64 128 \\
        --image_size 64 --crop_padding 8

The output folder holds the model, the image processor, `results.json` and figures: `training.png`, `evaluation.png` (confusion matrix, calibration,
misclassified images) and `fixed_point.png` (the state after each step). An interrupted run goes on with `--resume_from_checkpoint true`.
"""

import contextlib
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from flags import given_flags, refuse_idle, refuse_zero3
from image_augmentation import Augmentation, soft_cross_entropy
from image_data import (
    KEPT_BYTES,
    DataArguments,
    ImageCollator,
    Pixels,
    decode,
    images_hash,
    is_grey,
    load_images,
    readable_images,
    spread,
)
from image_report import plot_evaluation, plot_fixed_point, probabilities, scores
from PIL import Image
from safetensors.torch import load_file, save_file
from time_limit import MAX_MINUTES, TimedTrainer, check_minutes
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)

from revdeq_hf import ResidualLoss, RevDEQForImageClassification, RevDEQVisionConfig
from revdeq_hf.checkpoints import checkpoint_to_resume
from revdeq_hf.loss_revdeq import share_of_batch
from revdeq_hf.model_card import weight_hashes
from revdeq_hf.optimizers import muon_adamw
from revdeq_hf.report import Run, plot_runs
from revdeq_hf.training import (
    RevDEQCallback,
    fixed_point_layers,
    greatest_drift,
    peak_memory,
    print_table,
    residual_curve,
    run_record,
)

PRESETS = ("small", "paper_cifar10_multiscale", "paper_cifar10_singlescale")
MODEL_TYPES = ("revdeq", "resnet")
NEW = ("model_type", "hidden_sizes")
OF_REVDEQ = ("preset", "expansion_ratios", "block_type", "stem_stride", "downsample")
OF_RESNET = ("depths", "layer_type", "embedding_size", "downsample_in_first_stage")
SOLVER = ("beta", "solver_steps", "tol", "gradient", "keep_evaluations")
AVERAGED_WEIGHTS = "averaged.safetensors"


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A saved model to go on from; its head is replaced if there are more or fewer labels, and of its network only the solver can be set anew."
        },
    )
    model_type: str = field(default="revdeq", metadata={"help": "revdeq, or resnet: transformers' explicit network, to compare with."})
    preset: str = field(default="small", metadata={"help": f"Network of a new model: {', '.join(PRESETS)}."})
    hidden_sizes: list[int] | None = field(default=None, metadata={"help": "Channels of each stage, instead of the preset's."})
    expansion_ratios: list[int] | None = field(default=None, metadata={"help": "Expansion of each stage's block, instead of the preset's."})
    block_type: str | None = field(
        default=None, metadata={"help": "Block of the stages, instead of the preset's: paper, or modern, in the manner of ConvNeXt."}
    )
    stem_stride: int = field(default=1, metadata={"help": "The stem divides the resolution by so much; 2 or 4 for large images."})
    downsample: str | None = field(
        default=None,
        metadata={"help": "How the resolution falls, instead of the preset's way: residual, or max_pool, which learns faster."},
    )
    beta: float | None = field(
        default=None, metadata={"help": "Relaxation of the iteration, in (0, 2), not 1. Default: 0.8, or the saved model's."}
    )
    solver_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps of each solve, two evaluations of the block each (config.max_steps). Default: the preset's, 4 or 2, or the saved model's."
        },
    )
    tol: float | None = field(
        default=None, metadata={"help": "Relative residual at which an example stops. Default: always all steps, or the saved model's."}
    )
    gradient: str | None = field(
        default=None, metadata={"help": "Gradient mode: reversible, checkpoint or backprop. Default: reversible, or the saved model's."}
    )
    keep_evaluations: int | None = field(
        default=None, metadata={"help": "Evaluations whose graphs are kept for the backward pass. Default: 1, or the saved model's."}
    )
    compile_blocks: bool = field(
        default=False, metadata={"help": "Compile each stage's block by itself, in a fraction of the time that --torch_compile takes."}
    )
    depths: list[int] | None = field(default=None, metadata={"help": "resnet: layers of each stage; default: 2 each."})
    layer_type: str = field(default="basic", metadata={"help": "resnet: basic or bottleneck layers."})
    embedding_size: int | None = field(default=None, metadata={"help": "resnet: channels of the stem; default: those of the first stage."})
    downsample_in_first_stage: bool = field(
        default=False, metadata={"help": "resnet: halve the resolution in the first stage too; the stem has divided it by 4 already."}
    )


@dataclass
class ImageTrainingArguments(TrainingArguments):
    output_dir: str = field(default="runs/image", metadata={"help": "Folder for the model, checkpoints, results and figures."})
    max_steps: int = field(default=600, metadata={"help": "Updates to train for; -1: num_train_epochs decide."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Images per device in evaluation."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW."})
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of Muon for matrices and convolutions; AdamW has the rest. Default or 0: AdamW alone."},
    )
    residual_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the residual in the loss, to which it rises from 0, so that other numbers of steps than the training's serve, too. 0: none."
        },
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Updates of warm-up, or their share of all if below 1."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    logging_steps: float = field(default=25, metadata={"help": "Updates between logs."})
    eval_strategy: str = field(default="no", metadata={"help": "no, steps or epoch."})
    save_steps: float = field(default=200, metadata={"help": "Updates between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    dataloader_pin_memory: bool = field(default=torch.accelerator.is_available(), metadata={"help": "Pin host memory for faster copies."})
    report_to: str = field(
        default="tensorboard", metadata={"help": "Where figures are sent too: tensorboard, wandb, trackio, ... or none."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "DDP looks for parameters without gradient; there are none."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads the pixel column, so columns stay."})
    one_cycle: bool = field(
        default=False,
        metadata={"help": "One-cycle schedule (torch's OneCycleLR) with its peak at the end of the warm-up, instead of lr_scheduler_type."},
    )
    max_minutes: float | None = field(default=None, metadata={"help": MAX_MINUTES})
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Evaluate and save an exponential moving average of the weights and BatchNorm statistics with this decay, e.g. 0.999; the "
            "first updates n have the smaller decay (1 + n) / (10 + n). Checkpoints hold both."
        },
    )
    channels_last: bool = field(default=False, metadata={"help": "Keep images and weights in the channels_last memory format."})
    test_flip: bool = field(default=False, metadata={"help": "Evaluate with logits averaged over each image and its mirror image."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay must lie in [0, 1), got {self.ema_decay}")
        check_minutes(self.max_minutes)


# --- model ---


def build_processor(options: ModelArguments, data: DataArguments, images: list[Image.Image]) -> tuple[Any, str]:
    """The image processor, and the mode of the images, "L" or "RGB". A new processor gets its mean and deviation when the pixels are known.

    Raises:
        ValueError: a saved processor does not fit its model, or a flag is out of range.
    """
    if data.channels not in (None, 1, 3):
        raise ValueError(f"--channels must be 1 or 3, got {data.channels}")
    if data.image_size is not None and data.image_size < 1:
        raise ValueError(f"--image_size must be at least 1, got {data.image_size}")
    size = None if data.image_size is None else {"height": data.image_size, "width": data.image_size}
    if options.model_name_or_path:
        processor = ViTImageProcessorPil.from_pretrained(options.model_name_or_path, **({"size": size} if size else {}))
        config = AutoConfig.from_pretrained(options.model_name_or_path)
        wanted = getattr(config, "num_channels", None)
        counts = (len(processor.image_mean), len(processor.image_std))
        if counts != (wanted, wanted) or wanted not in (1, 3):
            raise ValueError(
                f"the image processor in {options.model_name_or_path!r} does not fit the model: its image_mean and image_std have {counts[0]} and "
                f"{counts[1]} channels, the model's config.num_channels is {wanted}"
            )
        if data.channels not in (None, wanted):
            raise ValueError(f"--channels {data.channels}: the saved model takes images of {wanted} channels; leave the flag out")
        return processor, "L" if wanted == 1 else "RGB"
    first = images[0]
    grey = all(map(is_grey, images)) if data.channels is None else data.channels == 1
    return ViTImageProcessorPil(size=size or {"height": first.height, "width": first.width}), "L" if grey else "RGB"


def refuse_idle_flags(given: set[str], options: ModelArguments, data: DataArguments) -> None:
    """A ValueError for flags that would have no effect on the model that the others name."""
    kind = options.model_type
    if options.model_name_or_path:
        refuse_idle(given, (*NEW, *OF_REVDEQ, *OF_RESNET), f"{options.model_name_or_path!r} has a network already")
        kind = AutoConfig.from_pretrained(options.model_name_or_path).model_type
    if kind in ("revdeq", RevDEQVisionConfig.model_type):
        refuse_idle(given, OF_RESNET, "they are a resnet's")
    else:
        refuse_idle(given, (*OF_REVDEQ, *SOLVER, "residual_weight"), f"a model of type {kind!r} has no fixed point")


def build_model(options: ModelArguments, names: list[str], shape: tuple[int, int, int]) -> torch.nn.Module:
    """A new or saved classifier of images (height, width, channels).

    Raises:
        ValueError: a setting is unknown, or the images are smaller than the network can halve.
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if options.preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {options.preset!r}")
    if options.model_type not in MODEL_TYPES:
        raise ValueError(f"--model_type must be one of {', '.join(MODEL_TYPES)}, got {options.model_type!r}")
    given = {
        "beta": options.beta,
        "max_steps": options.solver_steps,
        "tol": options.tol,
        "gradient": options.gradient,
        "keep_evaluations": options.keep_evaluations,
    }
    solver = {name: value for name, value in given.items() if value is not None}
    if options.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(
            options.model_name_or_path, ignore_mismatched_sizes=True, **labels, **solver
        )
        if model.config.model_type == RevDEQVisionConfig.model_type:
            model.config.image_size = shape[0]
    elif options.model_type == "resnet":
        sizes = options.hidden_sizes or [32, 64]
        depths = options.depths or [2] * len(sizes)
        if len(depths) != len(sizes):
            raise ValueError(f"--depths must have one entry per stage, got {depths} for {len(sizes)} --hidden_sizes")
        config = AutoConfig.for_model(
            "resnet",
            num_channels=shape[-1],
            embedding_size=options.embedding_size or sizes[0],
            hidden_sizes=sizes,
            depths=depths,
            layer_type=options.layer_type,
            downsample_in_first_stage=options.downsample_in_first_stage,
            **labels,
        )
        model = AutoModelForImageClassification.from_config(config)
    else:
        settings: dict[str, Any] = {}
        create: Any = RevDEQVisionConfig
        if options.preset == "small":
            settings = dict(hidden_sizes=[32, 64], expansion_ratios=[1, 1])
        else:
            create = getattr(RevDEQVisionConfig, options.preset)
        own = dict(
            hidden_sizes=options.hidden_sizes,
            expansion_ratios=options.expansion_ratios,
            block_type=options.block_type,
            downsample=options.downsample,
        )
        width = RevDEQVisionConfig.group_width
        if options.block_type != "recall" and any(size % width for size in options.hidden_sizes or []):  # that one has no groups
            raise ValueError(
                f"--hidden_sizes must be multiples of {width}, the channels of a group of GroupNorm, got {options.hidden_sizes}"
            )
        config = create(
            image_size=shape[0],
            num_channels=shape[-1],
            stem_stride=options.stem_stride,
            **{"beta": 0.8, **solver, **settings, **{name: value for name, value in own.items() if value is not None}},
            **{"num_labels": len(names), **labels},
        )
        model = RevDEQForImageClassification(config)
    least = 2 ** (len(getattr(model.config, "hidden_sizes", [0])) - 1) * getattr(model.config, "stem_stride", 1)
    if model.config.model_type == "resnet":
        least *= 4 * (1 + model.config.downsample_in_first_stage)
    if min(shape[:2]) < least:
        raise ValueError(
            f"images of {shape[0]} x {shape[1]} pixels are smaller than the network allows, which divides their sides by {least}; "
            f"enlarge them with --image_size (at least {least}), take fewer --hidden_sizes or a smaller --stem_stride"
        )
    return model


# --- training ---


class AveragedWeights(TrainerCallback):
    """An exponential moving average of a model's weights and BatchNorm statistics, updated after every update of the model."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.averaged = AveragedModel(model, multi_avg_fn=partial(self.average, decay), use_buffers=True)

    @staticmethod
    def average(decay: float, averages: Any, values: Any, count: torch.Tensor) -> None:
        updates = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + updates) / (10 + updates)))(averages, values, count)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.averaged.update_parameters(model)
        for average, value in zip(self.averaged.module.buffers(), model.buffers(), strict=True):
            if not average.is_floating_point():  # counters
                average.copy_(value)

    @torch.no_grad()
    def exchange(self, model: torch.nn.Module) -> None:
        """Puts the average into the model and the model's weights here; a second time: back again. Before the first update nothing happens."""
        if not self.averaged.n_averaged:
            return
        tensors = (itertools.chain(module.parameters(), module.buffers()) for module in (model, self.averaged.module))
        for value, average in zip(*tensors, strict=True):
            held = value.clone()
            value.copy_(average)
            average.copy_(held)

    def save(self, folder: str | Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.averaged.state_dict().items()}, Path(folder) / AVERAGED_WEIGHTS)

    def load(self, folder: str | Path) -> None:
        path = Path(folder) / AVERAGED_WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(
                f"--ema_decay: the checkpoint {str(folder)!r} has no {AVERAGED_WEIGHTS}; it was written without the flag"
            )
        self.averaged.load_state_dict(load_file(path))


def one_cycle(update: int, warmup: int, updates: int) -> float:
    """The learning rate of update 0, 1, ..., `updates - 1`, as a part of the peak: OneCycleLR's with its default factors and `warmup / updates` as `pct_start`.

    Half a cosine from 1/25 up to 1 at the end of the warm-up, another one down to 1/250,000 at the last update.
    """
    top = warmup - 1
    if update < top:
        start, end, share = 1 / 25, 1.0, update / top
    else:
        start, end, share = 1.0, 1 / 250_000, min((update - top) / max(updates - 1 - top, 1), 1.0)
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


class ImageTrainer(TimedTrainer):
    """Trainer whose training batches alone are augmented, with soft labels, averaged weights and a time limit."""

    data_collator: Any
    lr_scheduler: Any

    def __init__(self, *arguments: Any, train_collator: ImageCollator, **kwargs: Any) -> None:
        super().__init__(*arguments, **kwargs)
        self.label_smoother = None  # the collator smooths; the evaluation's loss stays plain
        self.train_collator = train_collator
        self.residual = ResidualLoss(self.model) if self.args.residual_weight else None
        self.average = None if self.args.ema_decay is None else AveragedWeights(self.model, self.args.ema_decay)
        if self.average is not None:
            self.add_callback(self.average)
        if self.average is not None and self.is_fsdp_enabled:
            raise ValueError("--ema_decay averages whole weights, which FSDP does not keep in one place; use DDP or leave the flag out")

    def get_train_dataloader(self):
        evaluation_collator, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluation_collator

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = self.loss_of_labels(model, inputs, num_items_in_batch)
        if self.residual is not None and model.training:
            residual = share_of_batch(self.residual(), inputs["labels"], num_items_in_batch)
            loss = loss + self.args.residual_weight * self.share * residual * self.ranks_averaged(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def ranks_averaged(self, num_items_in_batch: Any) -> int:
        """By how much a loss grows whose images were counted over all ranks, since the ranks' gradients are averaged."""
        counted = num_items_in_batch is not None and self.args.average_tokens_across_devices
        return self.accelerator.num_processes if counted else 1

    def loss_of_labels(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[torch.Tensor, Any]:
        if "probabilities" not in inputs:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
            if not isinstance(
                self.model.config, RevDEQVisionConfig
            ):  # others' forward passes take the images of an update and pass them over
                loss = share_of_batch(loss, inputs["labels"], num_items_in_batch)
            return loss, outputs
        outputs = model(**{name: value for name, value in inputs.items() if name not in ("labels", "probabilities")})
        loss = soft_cross_entropy(outputs.logits, inputs["probabilities"], num_items_in_batch)
        return loss * self.ranks_averaged(num_items_in_batch), outputs

    def get_eval_dataloader(self, *arguments: Any):
        with self._all_images():
            return super().get_eval_dataloader(*arguments)

    def get_test_dataloader(self, *arguments: Any):
        with self._all_images():
            return super().get_test_dataloader(*arguments)

    @contextlib.contextmanager
    def _all_images(self) -> Iterator[None]:
        """`--dataloader_drop_last` is for training alone."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None and self.args.one_cycle:
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, partial(one_cycle, warmup=warmup, updates=num_training_steps))
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, resume_from_checkpoint=None, **kwargs):
        if self.average is not None and resume_from_checkpoint:
            self.average.load(resume_from_checkpoint)
        trained = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.average is not None:  # the model is the average from here on
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
                self.average.load(self.state.best_model_checkpoint)
            self.average.exchange(self.model)
            self.remove_callback(self.average)
            self.average = None
        return trained

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # a checkpoint's last file tells that it is whole, so this one must come before it
        if self.average is not None and output_dir is not None and self.args.should_save:
            self.average.save(output_dir)

    def evaluation_loop(self, *arguments: Any, **kwargs: Any):
        if self.average is None:
            return super().evaluation_loop(*arguments, **kwargs)
        self.average.exchange(self.model)
        try:
            return super().evaluation_loop(*arguments, **kwargs)
        finally:
            self.average.exchange(self.model)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predictions are the logits, of a model with fixed points also the steps and residuals of each image, (batch, stages)."""
        ignored = ["hidden_states", "attentions"]
        asked = {**inputs, "output_solver_stats": True} if fixed_point_layers(self.model) else inputs
        loss, predictions, labels = super().prediction_step(model, asked, prediction_loss_only, ignored)
        if prediction_loss_only or not self.args.test_flip:
            return loss, predictions, labels
        flipped = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
        logits, *figures = predictions if isinstance(predictions, tuple) else (predictions,)
        logits = (logits + super().prediction_step(model, flipped, False, ignored)[1]) / 2
        return F.cross_entropy(logits.float(), labels), (logits, *figures) if figures else logits, labels


class Accuracy(evaluate.Metric):
    """Share of right answers, computed by scikit-learn; needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="Accuracy.", citation="", inputs_description="", features=features)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(references, predictions))}


def logits_of(predictions: Any) -> np.ndarray:
    return predictions[0] if isinstance(predictions, tuple) else predictions


def evaluation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and mean cross-entropy, of each image once.

    On several ranks Trainer's own loss is the mean of batches that are filled up with other images where they do not divide evenly; "loss" takes its place.
    """
    logits, labels = logits_of(prediction.predictions), prediction.label_ids
    loss = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)).item()
    return {**Accuracy().compute(predictions=logits.argmax(-1), references=labels), "loss": loss}


# --- the run ---


def main(arguments: list[str] | None = None) -> dict:
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, ImageTrainingArguments), description=__doc__.split("\n\n")[0] if __doc__ else None
    )
    options, data, training = parser.parse_args_into_dataclasses(args=arguments)
    refuse_idle_flags(given_flags(parser, arguments), options, data)
    refuse_zero3()
    command = f"python examples/train_image.py {shlex.join(sys.argv[1:] if arguments is None else arguments)}".strip()
    record = run_record(command, training.device)  # now: the files may be of another commit at the end
    if data.bad_images not in ("refuse", "skip"):
        raise ValueError(f"--bad_images must be refuse or skip, got {data.bad_images!r}")
    if training.residual_weight < 0:
        raise ValueError(f"--residual_weight must not be negative, got {training.residual_weight}")
    resume = checkpoint_to_resume(training)
    set_seed(training.seed)
    began = time.perf_counter()

    with training.main_process_first(desc="preparing the data"):
        train, evaluation = load_images(data)
        images = readable_images(train)
        processor, mode = build_processor(options, data, images)
        names = train.features["label"].names
        example = np.atleast_3d(np.asarray(Image.new(mode, images[0].size)))  # its size alone counts; whether it can be used `decode` tells
        sized = processor(example, input_data_format="channels_last", do_rescale=False, do_normalize=False)["pixel_values"][0]
        pixels = Pixels(processor, (*sized.shape[1:], sized.shape[0]))
        model: Any = build_model(options, names, pixels.shape)
        keep = data.keep_pixels
        if keep is None:
            keep = (len(train) + len(evaluation)) * sized.size <= KEPT_BYTES
        train, skipped = decode(train, processor, mode, keep, data.bad_images, "train")
        evaluation, skipped_eval = decode(evaluation, processor, mode, keep, data.bad_images, "evaluation")
        if not options.model_name_or_path:
            processor.image_mean, processor.image_std = pixels.statistics(train)

    if training.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if options.compile_blocks:
        layers = fixed_point_layers(model)
        if not layers:
            raise ValueError(
                f"--compile_blocks: a model of type {model.config.model_type!r} has no fixed points; take --torch_compile true"
            )
        for _, layer in layers:
            layer.compile()
    augmentation = Augmentation(
        padding=data.crop_padding,
        flip=data.flip if data.flip is not None else mode == "RGB",
        cutout=data.cutout,
        erasing=data.erasing,
        mixup=data.mixup,
        cutmix=data.cutmix,
        label_smoothing=training.label_smoothing_factor,
        classes=len(names),
    )
    if training.per_device_train_batch_size == 1 and augmentation.draws:
        raise ValueError(
            "--per_device_train_batch_size 1: what an augmentation draws follows from the images of a batch, so that one alone would be changed alike in every "
            "epoch; take at least 2, or leave the augmentation out (--crop_padding 0 --flip false)"
        )
    trainer = ImageTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=ImageCollator(pixels, training.channels_last),
        train_collator=ImageCollator(pixels, training.channels_last, augmentation, training.seed),
        compute_metrics=evaluation_metrics,
        optimizer_cls_and_kwargs=muon_adamw(training),
    )
    trainer.callback_handler.callbacks.insert(0, RevDEQCallback())  # ahead of the reporting ones

    # not by evaluate before train: on several ranks accelerate 1.15 takes a model so evaluated for prepared, and trains it without exchanging gradients
    training.eval_on_start = resume is None
    trained = trainer.train(resume_from_checkpoint=resume)
    if trainer.state.max_steps > 0 and not trainer.state.global_step:  # Trainer ends without an error where there is no batch
        raise ValueError(
            f"nothing was trained: {len(train)} training images make no whole batch of --per_device_train_batch_size {training.per_device_train_batch_size} on "
            f"each of {training.world_size} processes; take smaller batches, or leave out --dataloader_drop_last {str(training.dataloader_drop_last).lower()}"
        )
    before: dict = next((entry for entry in trainer.state.log_history if entry["step"] == 0 and "eval_loss" in entry), {})
    if trainer.is_fsdp_enabled:  # whole weights at the end, whatever the checkpoints hold
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    predicted = trainer.predict(evaluation, metric_key_prefix="eval")
    trainer.log(predicted.metrics)
    trainer.save_state()

    found = scores(logits_of(predicted.predictions), predicted.label_ids, names)
    results = {
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "train_images": len(train),
        "eval_images": len(evaluation),
        "data_sha256": {"train": images_hash(train), "evaluation": images_hash(evaluation)} if keep else None,
        "unreadable_images": skipped + skipped_eval,
        "updates": trainer.state.global_step,
        "loss_before": before.get("eval_loss"),
        "loss": predicted.metrics["eval_loss"],
        "accuracy_before": before.get("eval_accuracy"),
        **found,
        "stages": stage_figures(model, predicted.predictions),
        "greatest_drift": greatest_drift(trainer.state.log_history),
        "train_seconds": trained.metrics["train_seconds"],
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": peak_memory(),
        "run": record,
    }
    if trainer.is_world_process_zero():
        report(results, trainer, pixels, evaluation, predicted, found)
    if training.push_to_hub:
        trainer.push_to_hub()  # with the results, of which the card is made
    return results


def stage_figures(model: torch.nn.Module, predictions: Any) -> dict[str, dict[str, float]]:
    """Mean steps and relative residual of each fixed point over the evaluation's images."""
    layers = fixed_point_layers(model)
    if not layers:
        return {}
    _, steps, residuals = predictions
    means = zip(layers, steps.mean(0), residuals.mean(0), strict=True)
    return {name: {"solver_steps": float(taken), "residual": float(residual)} for (name, _), taken, residual in means}


def report(results: dict, trainer: Trainer, pixels: Pixels, evaluation: datasets.Dataset, predicted: Any, found: dict) -> None:
    """Writes results.json and the figures to the output folder and prints the table."""
    folder = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled:  # one rank alone cannot run a model in shards
        model = AutoModelForImageClassification.from_pretrained(folder).to(trainer.args.device)
    logits, labels = logits_of(predicted.predictions), predicted.label_ids

    wrong = np.flatnonzero(logits.argmax(-1) != labels)
    wrong = wrong[np.argsort(-probabilities(logits[wrong]).max(-1))][:25].tolist()  # the surest ones
    shown = dict(zip(wrong, pixels.array([evaluation[row] for row in wrong]), strict=True)) if wrong else {}
    plot_evaluation(logits, labels, list(model.config.id2label.values()), shown, found, folder / "evaluation.png")

    run = Run(folder.name, trainer.state.log_history, results=results)
    layers = fixed_point_layers(model)
    if layers:
        steps = layers[0][1].max_steps
        some = pixels.array([evaluation[row] for row in spread(len(evaluation), 64)])
        values = pixels.normalised(some).to(model.device)
        run.trained_steps, run.convergence = steps, residual_curve(model, {"pixel_values": values}, 4 * steps)
        results["convergence"] = {"trained_steps": steps, "residuals": run.convergence}
        few = spread(len(some), 6)
        plot_fixed_point(model, values[few], some[few], min(2 * steps, 12), steps, folder / "fixed_point.png")
    plot_runs([run], folder / "training.png")
    results["run"]["weights"] = weight_hashes(folder)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    names = {"train_seconds": "seconds of training", "seconds": "seconds of this process"}
    rows = [[names.get(key, key.replace("_", " ")), value] for key, value in results.items() if not isinstance(value, dict | list)]
    for name, figures in results["stages"].items():
        rows += [[f"{name}, mean {key.replace('_', ' ')}", value] for key, value in figures.items()]
    rows = [[name, value] for name, value in rows if name != "peak memory bytes"]
    rows += [["peak memory (MB)", results["peak_memory_bytes"] and results["peak_memory_bytes"] / 1e6], ["saved in", str(folder)]]
    print_table(["the run", ""], rows)


if __name__ == "__main__":
    main()
