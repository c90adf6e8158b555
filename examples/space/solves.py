"""What happens in a solve? The figures that the Space shows: of a text, of an image, and of a training step in each gradient mode.

Numbers only: `views.py` draws them, `app.py` lays them out.
"""

import copy
import struct
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from revdeq_hf import Diagnosis, diagnose, logit_lens
from revdeq_hf.layer_revdeq import fixed_point_layers
from revdeq_hf.memory import MODES
from revdeq_hf.training import LiveBytes

MAX_CHARACTERS = 4_000  # looked at before a text is tokenised
MAX_TOKENS = 128
MAX_PIXELS = 25_000_000
COST_STEPS = (1, 2, 4, 8, 16)
# what Pillow raises for files that are not images or are cut off
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class InputError(Exception):
    """A text or an image that cannot be solved; the message is for whoever gave it."""


@dataclass(frozen=True)
class TextSolve:
    """The solve of one text.

    Attributes:
        words: the text's tokens, as text.
        residual: (steps, tokens), relative residual at the start of each step.
        predicted: (steps, tokens), the most probable next token, had the solve ended after each step.
        probability, divergence: (steps, tokens), its probability, and how far (nats) the distribution is from the last step's.
        radius: spectral radius of the block where the solve ended.
        trained_steps: steps of a solve in training.
    """

    words: list[str]
    residual: np.ndarray
    predicted: list[list[str]]
    probability: np.ndarray
    divergence: np.ndarray
    radius: float
    trained_steps: int

    @property
    def steps(self) -> int:
        return len(self.residual)

    def steps_to(self, tolerance: float) -> np.ndarray:
        """(tokens,): steps after which each token's residual is at most `tolerance`; all steps where that is not seen before the last.

        With `config.tol` a token stops there. The tokens after it then see it as it stopped, and may take a step or two more or less than here.
        """
        reached = self.residual <= tolerance
        return np.where(reached.any(0), reached.argmax(0), self.steps)


@dataclass(frozen=True)
class ImageSolve:
    """The solve of one image.

    Attributes:
        pixels: (height, width) or (height, width, 3) uint8, the image in the model's size.
        names: of the classes.
        probability: (steps, classes), had each stage ended its solve after so many steps.
        residual: for each stage (its steps,), relative residual at the start of each step.
        states: (steps, height, width), the first stage's state after each step, mean over its channels.
        radius: spectral radius of each stage's block where its solve ended.
        trained_steps: of each stage.
    """

    pixels: np.ndarray
    names: list[str]
    probability: np.ndarray
    residual: list[np.ndarray]
    states: np.ndarray
    radius: list[float]
    trained_steps: list[int]

    @property
    def steps(self) -> int:
        return len(self.probability)


@dataclass(frozen=True)
class Cost:
    """A training step (forward and backward pass) in one gradient mode, measured on this machine.

    Attributes:
        gradient, steps: gradient mode, and steps of each solve.
        kept: bytes that the forward pass leaves for the backward pass.
        peak: most bytes of tensors alive at once, gradients included, weights not.
        seconds: the shortest of the repeats.
        difference: greatest difference of any gradient from that of "backprop", relative to that parameter's greatest gradient.
        drift: what `layer.drift` says; None where the mode reverses nothing.
    """

    gradient: str
    steps: int
    kept: int
    peak: int
    seconds: float
    difference: float
    drift: float | None


def solve_text(model: Any, tokenizer: Any, text: str, steps: int) -> TextSolve:
    """Solves a text of up to `MAX_TOKENS` tokens, or as many as the model has positions for, and looks at every step.

    Raises:
        InputError: the text is empty or too long.
    """
    ids = text_ids(model, tokenizer, text)
    lens = logit_lens(model, ids, top_k=1, max_steps=steps)
    return TextSolve(
        words=[tokenizer.decode([token]) for token in ids[0].tolist()],
        residual=lens.residual[:, 0].numpy(),
        predicted=[[tokenizer.decode([token]) for token in row] for row in lens.tokens[:, 0, :, 0].tolist()],
        probability=lens.log_probs[:, 0, :, 0].exp().numpy(),
        divergence=lens.divergence[:, 0].numpy(),
        radius=_radii(model, ids, max_steps=steps)[0],
        trained_steps=model.config.max_steps,
    )


def solve_image(model: Any, processor: Any, path: str | Path | None, steps: int, invert: bool = False) -> ImageSolve:
    """Solves an image file, and looks at every step.

    Args:
        steps: of each stage.
        invert: turn light into dark, for ink on paper where the model knows light strokes on black.

    Cost: a solve of each number of steps up to `steps`, so that each row of `probability` is what the model says with so many.

    Raises:
        InputError: there is no file, or it is not an image, is cut off or too large.
    """
    image = model_image(model, processor, path, invert)
    values = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = [model(values, max_steps=number, output_trajectory=number == steps) for number in range(1, steps + 1)]
    return ImageSolve(
        pixels=np.asarray(image),
        names=[str(model.config.id2label[label]) for label in range(model.config.num_labels)],
        probability=torch.cat([out.logits for out in found]).softmax(-1).numpy(),
        residual=[residual[:, 0].numpy() for residual in found[-1].step_residuals],
        states=torch.stack([state[0].mean(0) for state in found[-1].trajectory[0]]).numpy(),
        radius=_radii(model, values, max_steps=steps),
        trained_steps=list(model.config.steps_per_stage),
    )


def text_batch(model: Any, tokenizer: Any, text: str) -> dict[str, torch.Tensor]:
    """Arguments of a training step on the text."""
    ids = text_ids(model, tokenizer, text)
    return {"input_ids": ids, "labels": ids}


def image_batch(model: Any, processor: Any, path: str | Path | None, invert: bool, copies: int = 8) -> dict[str, torch.Tensor]:
    """Arguments of a training step on so many copies of the image, labelled as what the model takes it for."""
    values = processor(model_image(model, processor, path, invert), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        label = model(values).logits.argmax(-1)
    return {"pixel_values": values.repeat(copies, 1, 1, 1), "labels": label.repeat(copies)}


def gradient_costs(model: Any, batch: dict[str, torch.Tensor], steps: Sequence[int] = COST_STEPS, repeats: int = 3) -> list[Cost]:
    """What a training step on the batch costs in each exact gradient mode, for each number of steps.

    The model is copied, and not changed. Memory is counted in a first run of its own (`LiveBytes`), time is that of the others.
    """
    model = copy.deepcopy(model).train()
    layers = [layer for _, layer in fixed_point_layers(model)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward(mode: str, number: int) -> torch.Tensor:
        for layer in layers:
            layer.gradient = mode
        model.zero_grad(set_to_none=True)
        return model(**batch, max_steps=number).loss

    costs = []
    for number in steps:
        kept, peak, gradients, drift = {}, {}, {}, {}
        for mode in MODES:
            with LiveBytes() as memory:
                loss = forward(mode, number)
                kept[mode] = memory.alive
                loss.backward()
            peak[mode] = memory.peak
            gradients[mode] = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            drift[mode] = max(layer.drift.item() for layer in layers) if mode == "reversible" else None
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(repeats):
            for mode in MODES:  # in turn, so that whatever else the machine does meets all of them
                start = time.perf_counter()
                forward(mode, number).backward()
                seconds[mode].append(time.perf_counter() - start)
        for mode in MODES:
            difference = max(map(_difference, gradients[mode], gradients["backprop"]))
            costs.append(Cost(mode, number, kept[mode], peak[mode], min(seconds[mode]), difference, drift[mode]))
    return costs


def text_ids(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """(1, tokens) ids of a text.

    Raises:
        InputError: it is empty or too long.
    """
    if not text or not text.strip():
        raise InputError("The text is empty. Type a few words.")
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"The text has {len(text):,} characters, and this page takes up to {MAX_CHARACTERS:,}. Shorten it.")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    most = min(MAX_TOKENS, model.config.max_position_embeddings)
    if ids.shape[1] > most:
        raise InputError(f"The text has {ids.shape[1]} tokens, and this page shows up to {most}. Shorten it.")
    return ids


def model_image(model: Any, processor: Any, path: str | Path | None, invert: bool = False) -> Image.Image:
    """The image in the model's size and colours, 8 bits a channel; transparent parts are white.

    Raises:
        InputError: there is no file, or it is not an image, is cut off or too large.
    """
    if not path:
        raise InputError("There is no image yet. Drop one above, or choose an example.")
    try:
        image = _read(path)
    except IMAGE_ERRORS as error:
        kind = (
            "The file is no image, or of a kind that is not known"
            if isinstance(error, UnidentifiedImageError)
            else f"The file is damaged ({error})"
        )
        raise InputError(f"{kind}. Try a PNG or JPEG file.") from error
    if image.mode == "F":
        raise InputError("The image has floating-point pixels, whose range is not known. Save it with 8 bits a channel.")
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if model.config.num_channels == 1 else "RGB")
    image = image.resize((processor.size["width"], processor.size["height"]), resample=processor.resample)
    return ImageOps.invert(image) if invert else image


def _read(path: str | Path) -> Image.Image:
    """The pixels of a file, as its camera was held."""
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise InputError(
                f"The image has {image.width:,} x {image.height:,} pixels, and this page takes up to {MAX_PIXELS // 10**6} million. Scale it down."
            )
        image.load()
        return ImageOps.exif_transpose(image)


def _radii(model: Any, *args: Any, **kwargs: Any) -> list[float]:
    """Spectral radius of each fixed-point layer's block for one example."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the fixed point .* need not converge")  # the page says it
        found = diagnose(model, *args, power_iterations=20, **kwargs)
    assert not isinstance(found, Diagnosis)
    return [diagnosis.spectral_radius[0].item() for diagnosis in found.values()]


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
