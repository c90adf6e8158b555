"""Augmentation of image batches in plain torch, for `train_image.py`.

Images are (batch, channels, height, width) and normalised, so that 0 is the mean of the data; labels are class probabilities, (batch, classes).
What is drawn comes from a numpy generator that the caller seeds.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F


@dataclass
class Augmentation:
    """What is done to a training batch, in this order; each is off at its default.

    Args:
        padding: pixels an image may be shifted by.
        flip: whether an image is mirrored left to right with probability 1/2.
        cutout: side in pixels of a square set to 0.
        erasing: probability that a rectangle of an image is set to 0.
        mixup, cutmix: alpha of the Beta distribution the mixing shares are drawn from; with both, a batch gets one or the other.
        label_smoothing: share of the probability that is spread evenly over all classes.
        classes: number of classes.
    """

    padding: int = 0
    flip: bool = False
    cutout: int = 0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    classes: int = 1

    def __post_init__(self) -> None:
        for name in ("padding", "cutout", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.erasing <= 1:
            raise ValueError(f"erasing is a probability, got {self.erasing}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")

    @property
    def softens_labels(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0 or self.label_smoothing > 0

    @property
    def draws(self) -> bool:
        """Whether anything is left to chance."""
        return any((self.padding, self.flip, self.cutout, self.erasing, self.mixup, self.cutmix))

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The batch's images, and the probabilities of its classes, or None where the labels (batch,) stay what they are."""
        if self.padding:
            pixels = shifted(pixels, self.padding, rng)
        if self.flip:
            pixels = mirrored(pixels, rng)
        if self.cutout:
            pixels = cut_out(pixels, self.cutout, rng)
        if self.erasing:
            pixels = erased(pixels, self.erasing, rng)
        if not self.softens_labels:
            return pixels, None
        probabilities = soft_labels(labels, self.classes, self.label_smoothing)
        ways = [(mix, alpha) for mix, alpha in ((mixup, self.mixup), (cutmix, self.cutmix)) if alpha]
        if ways:
            mix, alpha = ways[rng.integers(len(ways))]
            pixels, probabilities = mix(pixels, probabilities, alpha, rng)
        return pixels, probabilities


def shifted(pixels: torch.Tensor, padding: int, rng: np.random.Generator) -> torch.Tensor:
    """Each image moved by up to `padding` pixels in both directions; its edge is repeated."""
    batch, _, height, width = pixels.shape
    padded = F.pad(pixels, (padding,) * 4, mode="replicate")
    down, right = torch.from_numpy(rng.integers(0, 2 * padding + 1, (2, batch, 1)))
    ys, xs = torch.arange(height) + down, torch.arange(width) + right  # (batch, height), (batch, width)
    return padded[torch.arange(batch)[:, None, None], :, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2).contiguous()


def mirrored(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Each image mirrored left to right with probability 1/2."""
    chosen = torch.from_numpy(rng.random(len(pixels)) < 0.5)
    return torch.where(chosen[:, None, None, None], pixels.flip(-1), pixels)


def rectangles(top, left, height, width, size: tuple[int, int]) -> torch.Tensor:
    """Masks (batch, 1, *size), true inside rectangles given by integer arrays (batch,); what lies outside the image is cut off."""
    ys, xs = np.arange(size[0]), np.arange(size[1])
    rows = (ys >= top[:, None]) & (ys < (top + height)[:, None])
    columns = (xs >= left[:, None]) & (xs < (left + width)[:, None])
    return torch.from_numpy(rows[:, None, :, None] & columns[:, None, None, :])


def cut_out(pixels: torch.Tensor, side: int, rng: np.random.Generator) -> torch.Tensor:
    """Cutout (DeVries and Taylor, 2017): a square around a random pixel is set to 0; at the border a part of it lies outside."""
    batch, _, *size = pixels.shape
    top, left = (rng.integers(0, length, batch) - side // 2 for length in size)
    sides = np.full(batch, side)
    return pixels.masked_fill(rectangles(top, left, sides, sides, (size[0], size[1])), 0.0)


def erased(pixels: torch.Tensor, probability: float, rng: np.random.Generator) -> torch.Tensor:
    """Random erasing (Zhong et al., 2017): with the probability given, a rectangle inside the image is set to 0.

    Its area is 2% to 33% of the image and its height 0.3 to 3.3 times its width, up to rounding and where the image is that high and wide.
    """
    batch, _, *size = pixels.shape
    area = rng.uniform(0.02, 0.33, batch) * size[0] * size[1]
    aspect = np.exp(rng.uniform(np.log(0.3), np.log(3.3), batch))
    height = np.clip(np.sqrt(area * aspect).round().astype(int), 1, size[0])
    width = np.clip(np.sqrt(area / aspect).round().astype(int), 1, size[1])
    top, left = rng.integers(0, size[0] - height + 1), rng.integers(0, size[1] - width + 1)
    height = np.where(rng.random(batch) < probability, height, 0)
    return pixels.masked_fill(rectangles(top, left, height, width, (size[0], size[1])), 0.0)


def soft_labels(labels: torch.Tensor, classes: int, smoothing: float = 0.0) -> torch.Tensor:
    """Class numbers (batch,) as probabilities (batch, classes): `1 - smoothing` for the class and `smoothing` spread evenly over all."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mixup(pixels: torch.Tensor, probabilities: torch.Tensor, alpha: float, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (Zhang et al., 2018): each image and its label averaged with those of another one of the batch; the share is drawn for each image."""
    share = torch.from_numpy(rng.beta(alpha, alpha, len(pixels))).to(pixels.dtype)
    other = torch.from_numpy(rng.permutation(len(pixels)))
    return _mixed(pixels, other, share[:, None, None, None]), _mixed(probabilities, other, share[:, None])


def _mixed(values: torch.Tensor, other: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return share * values + (1 - share) * values[other]


def cutmix(pixels: torch.Tensor, probabilities: torch.Tensor, alpha: float, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """CutMix (Yun et al., 2019): a rectangle of each image is taken from another one of the batch; labels are mixed by the area it really has."""
    batch, _, *size = pixels.shape
    other = torch.from_numpy(rng.permutation(batch))
    side = np.sqrt(1 - rng.beta(alpha, alpha, batch))  # of the rectangle, in image sides
    height, width = (np.round(side * length).astype(int) for length in size)
    top, left = (rng.integers(0, length, batch) - extent // 2 for length, extent in zip(size, (height, width), strict=True))
    inside = rectangles(top, left, height, width, (size[0], size[1]))
    share = 1 - inside.flatten(1).float().mean(1)
    return torch.where(inside, pixels[other], pixels), _mixed(probabilities, other, share[:, None])


def soft_cross_entropy(logits: torch.Tensor, probabilities: torch.Tensor, images: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross-entropy with class probabilities: its mean, or its sum divided by `images`, the number of images that an update takes in all."""
    if images is None:
        return F.cross_entropy(logits.float(), probabilities)
    return F.cross_entropy(logits.float(), probabilities, reduction="sum") / images
