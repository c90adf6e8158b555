"""Which block should the image model iterate? Variants of f(z, x), trained on the same images, judged at fewer and more steps than in training.

Every variant sits in the same small network (a stem, two or more stages, a classifier), has as many parameters (the blocks' hidden channels make up for
what else they have) and evaluations, and sees the same images in the same order, shifted and flipped. Accuracy is then taken at N/2, N, 2N and 4N steps.
A row is kept per finished run; runs that have a row are skipped.

    python benchmarks/image_study.py --data cifar10        # a folder with train/CLASS/*.png and test/CLASS/*.png
    python benchmarks/image_study.py --table               # the rows kept so far, as Markdown
"""

import argparse
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from common import fit, keep, kept
from PIL import Image
from torch import nn
from torch.nn import functional

from revdeq_hf import Diagnosis, ReversibleFixedPoint, diagnose
from revdeq_hf.modeling_revdeq_vision import RevDEQVisionDownsample

SIZES, STEPS, BETA, GROUP = (32, 64), 2, 0.8, 16


@dataclass(frozen=True)
class Variant:
    """One block.

    Attributes:
        form: "paper", GN(relu(z + GN(x + c2(relu(GN(c1(z))))))); "pre", u + c2(act(GN(c1(act(GN(u)))))); "mixer", u + p2(act(p1(GN(depthwise(u))))), in the
            manner of ConvNeXt.
        inject: u is "add", z + x; "norm", GN(z) + x.
        skip: the identity path comes from "u" or "x" (not in the paper's form).
        out_norm: whether the output is normalised (the paper's form: always).
        kernel: of the depthwise convolution.
        act: "relu", "gelu" or "silu".
        zero: whether the last convolution of the block starts at 0.
        steps: of each stage, as many in sum.
        tuple: whether all stages are one state of several resolutions, which see one another in every evaluation, solved together.
        explicit: a residual network: "same parameters", each block once; "same evaluations", as many blocks of their own as the loop evaluates; "": a loop.
    """

    form: str = "pre"
    inject: str = "norm"
    skip: str = "u"
    out_norm: bool = True
    kernel: int = 3
    act: str = "relu"
    zero: bool = False
    steps: "tuple[int, ...]" = (STEPS,) * len(SIZES)
    tuple: bool = False
    explicit: str = ""

    def settings(self) -> str:
        """What differs from the defaults."""
        return " ".join(f"{f.name}={getattr(self, f.name)}".replace(" ", "_") for f in fields(self) if getattr(self, f.name) != f.default)


VARIANTS: dict[str, Variant] = {
    "paper": Variant(form="paper"),
    "pre": Variant(),
    "pre, zero": Variant(zero=True),
    "pre, x skip": Variant(skip="x", inject="add"),
    "pre, add": Variant(inject="add"),
    "pre, no output norm": Variant(out_norm=False),
    "pre, silu": Variant(act="silu"),
    "mixer 3": Variant(form="mixer", act="gelu"),
    "mixer 5": Variant(form="mixer", act="gelu", kernel=5),
    "mixer 7": Variant(form="mixer", act="gelu", kernel=7),
    "mixer 3, zero": Variant(form="mixer", act="gelu", kernel=3, zero=True),
    "mixer 5, zero": Variant(form="mixer", act="gelu", kernel=5, zero=True),
    "mixer 7, zero": Variant(form="mixer", act="gelu", kernel=7, zero=True),
    "mixer 5, zero, relu": Variant(form="mixer", kernel=5, zero=True),
    "mixer 5, zero, silu": Variant(form="mixer", act="silu", kernel=5, zero=True),
    "mixer 5, zero, add": Variant(form="mixer", act="gelu", kernel=5, zero=True, inject="add"),
    "mixer 5, zero, x skip": Variant(form="mixer", act="gelu", kernel=5, zero=True, skip="x"),
    "mixer 5, zero, 1 and 3 steps": Variant(form="mixer", act="gelu", kernel=5, zero=True, steps=(1, 3)),
    "mixer 5, zero, 3 and 1 steps": Variant(form="mixer", act="gelu", kernel=5, zero=True, steps=(3, 1)),
    "mixer 5, zero, tuple": Variant(form="mixer", act="gelu", kernel=5, zero=True, tuple=True),
    "pre, tuple": Variant(tuple=True),
    "explicit, same parameters": Variant(explicit="same parameters"),
    "explicit, same evaluations": Variant(explicit="same evaluations"),
    "explicit mixer, same parameters": Variant(form="mixer", act="gelu", kernel=5, explicit="same parameters"),
    "explicit mixer, same evaluations": Variant(form="mixer", act="gelu", kernel=5, explicit="same evaluations"),
}
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // GROUP, channels)


class StudyBlock(nn.Module):
    """f(z, x) of a variant, (batch, channels, height, width) to the same; with `z` None an ordinary residual block on x."""

    def __init__(self, channels: int, hidden: int, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        act = ACTIVATIONS[variant.act]
        self.z_norm = (
            group_norm(channels) if variant.inject == "norm" and variant.form != "paper" and not variant.explicit else nn.Identity()
        )
        if variant.form == "paper":
            first = [nn.Conv2d(channels, hidden, 3, padding=1, bias=False), group_norm(hidden), act()]
            last, self.inner_norm = nn.Conv2d(hidden, channels, 3, padding=1, bias=False), group_norm(channels)
        elif variant.form == "pre":
            first = [group_norm(channels), act(), nn.Conv2d(channels, hidden, 3, padding=1, bias=False), group_norm(hidden), act()]
            last = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        else:
            depthwise = nn.Conv2d(channels, channels, variant.kernel, padding=variant.kernel // 2, groups=channels, bias=False)
            first = [depthwise, group_norm(channels), nn.Conv2d(channels, hidden, 1), act()]
            last = nn.Conv2d(hidden, channels, 1)
        if variant.zero:
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.branch = nn.Sequential(*first, last)
        self.out_norm = group_norm(channels) if variant.out_norm and not variant.explicit else nn.Identity()

    def forward(self, z: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        if self.variant.form == "paper":
            assert z is not None
            return self.out_norm(torch.relu(z + self.inner_norm(x + self.branch(z))))
        u = x if z is None else self.z_norm(z) + x
        return self.out_norm((x if self.variant.skip == "x" else u) + self.branch(u))


class TupleBlock(nn.Module):
    """Several resolutions at once: each is evaluated by its own block on its x and what the others, resampled, say."""

    def __init__(self, sizes: tuple[int, ...], hidden: list[int], variant: Variant) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(StudyBlock(size, width, variant) for size, width in zip(sizes, hidden, strict=True))
        self.across = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(other, size, 1, bias=False) if other != size else nn.Identity() for other in sizes) for size in sizes
        )

    def forward(self, z: tuple[torch.Tensor, ...], x: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        blocks, across = cast(Iterable[StudyBlock], self.blocks), cast(list[list[nn.Module]], self.across)
        normed = [block.z_norm(part) for block, part in zip(blocks, z, strict=True)]
        new = []
        for index, (block, part) in enumerate(zip(blocks, z, strict=True)):
            own = x[index]
            for other, state in enumerate(normed):
                if other != index:
                    moved = across[index][other](state)
                    own = own + functional.interpolate(moved, size=part.shape[-2:], mode="nearest" if other > index else "area")
            new.append(block(part, own))
        return tuple(new)


class StudyModel(nn.Module):
    """Stem, stages `x + z*(x)`, residual downsampling between them, pooling, classifier: the package's network around a variant's blocks."""

    def __init__(self, variant: Variant, hidden: list[int], classes: int) -> None:
        super().__init__()
        self.variant = variant
        self.stem = nn.Sequential(nn.Conv2d(3, SIZES[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(SIZES[0]), nn.ReLU())
        self.downsamples = nn.ModuleList(RevDEQVisionDownsample(a, b, 1e-5) for a, b in zip(SIZES, SIZES[1:], strict=False))
        settings: dict[str, Any] = dict(beta=BETA, gradient="backprop")  # the gradients of reversal, bit for bit
        if variant.explicit:
            count = 2 * STEPS if variant.explicit == "same evaluations" else 1
            self.stages = nn.ModuleList(
                nn.ModuleList(StudyBlock(size, width, variant) for _ in range(count)) for size, width in zip(SIZES, hidden, strict=True)
            )
        elif variant.tuple:
            self.stages = nn.ModuleList([ReversibleFixedPoint(TupleBlock(SIZES, hidden, variant), max_steps=STEPS, **settings)])
        else:
            self.stages = nn.ModuleList(
                ReversibleFixedPoint(StudyBlock(size, width, variant), max_steps=steps, **settings)
                for size, width, steps in zip(SIZES, hidden, variant.steps, strict=True)
            )
        self.classifier = nn.Linear(SIZES[-1], classes)

    def forward(self, images: torch.Tensor, depth: float = 1.0) -> tuple[torch.Tensor, list[Any]]:
        """images (batch, 3, height, width), solved in `depth` times as many steps as in training, at least 1; returns logits and the solutions."""
        h, solutions = self.stem(images), []
        if self.variant.tuple:
            parts = [h]
            for downsample in self.downsamples:
                parts.append(downsample(parts[-1]))
            solution = self.stages[0](tuple(parts), max_steps=round(depth * STEPS))
            return self.classifier((parts[-1] + solution.z[-1]).mean((-2, -1))), [solution]
        for index, stage in enumerate(self.stages):
            if index:
                h = self.downsamples[index - 1](h)
            if self.variant.explicit:
                for block in cast(nn.ModuleList, stage):
                    h = block(None, h)
            else:
                solutions.append(stage(h, max_steps=max(1, round(depth * self.variant.steps[index]))))
                h = h + solutions[-1].z
        return self.classifier(h.mean((-2, -1))), solutions


def build(variant: Variant, classes: int, seed: int) -> StudyModel:
    """The model, its blocks as wide inside as brings it to the parameters of the paper's form with hidden channels = channels."""

    def count(hidden: list[int], form: Variant) -> int:
        return sum(p.numel() for p in StudyModel(form, hidden, classes).parameters())

    target = count(list(SIZES), Variant(form="paper"))
    hidden = list(SIZES)
    once = (
        replace(variant, explicit="same parameters") if variant.explicit else variant
    )  # more blocks, each as wide as the only one would be
    while count([width + GROUP for width in hidden], once) <= target:
        hidden = [width + GROUP for width in hidden]
    while count(hidden, once) > target * 1.03:
        hidden = [width - GROUP for width in hidden]
    torch.manual_seed(seed)
    model: Any = StudyModel(variant, hidden, classes)
    return model.to(memory_format=torch.channels_last)


def read(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (number, 3, height, width) and labels of FOLDER/SPLIT/CLASS/*.png."""
    classes = sorted(path for path in (folder / split).iterdir() if path.is_dir())
    images, labels = [], []
    for label, path in enumerate(classes):
        for file in sorted(path.glob("*.png")):
            images.append(np.asarray(Image.open(file).convert("RGB")))
            labels.append(label)
    if not images:
        raise SystemExit(f"there are no images {folder / split}/CLASS/*.png")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def read_both(folder: Path, test_images: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Both splits, with at most about so many test images, spread over the classes."""
    data = {split: read(folder, split) for split in ("train", "test")}
    stride = max(1, len(data["test"][1]) // test_images)
    data["test"] = (data["test"][0][::stride], data["test"][1][::stride])
    return data


def as_input(images: torch.Tensor) -> torch.Tensor:
    return ((images.float() / 255 - 0.47) / 0.25).contiguous(memory_format=torch.channels_last)


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """uint8 images, each shifted by up to 4 pixels and flipped with probability 1/2."""
    batch, _, height, width = images.shape
    padded = functional.pad(images, (4,) * 4)
    down, right = torch.randint(0, 9, (2, batch, 1), generator=generator)
    ys, xs = torch.arange(height) + down, torch.arange(width) + right
    flip = torch.rand(batch, 1, generator=generator) < 0.5
    xs = torch.where(flip, xs.flip(1), xs)
    return padded[torch.arange(batch)[:, None, None], :, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def evaluate(model: StudyModel, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Accuracy at N/2, N, 2N and 4N steps, loss at N; mean residual of all stages at the end of 4N; drift and spectral radius of a few images."""
    model.eval()
    looped = not model.variant.explicit
    found: dict[str, Any] = {}
    names = {"accuracy_half": 0.5, "accuracy": 1.0, "accuracy_double": 2.0, "accuracy_quadruple": 4.0}
    for name, depth in names.items():
        if not looped and name != "accuracy":
            found[name] = ""
            continue
        right, loss, residual = 0, 0.0, 0.0
        for part, target in zip(images.split(250), labels.split(250), strict=True):
            logits, solutions = model(as_input(part), depth=depth)
            right += int((logits.argmax(-1) == target).sum())
            loss += functional.cross_entropy(logits, target, reduction="sum").item() / len(labels)
            residual += sum(s.residual.sum().item() for s in solutions) / max(1, len(solutions)) / len(labels)
        found[name] = round(right / len(labels), 4)
        if name == "accuracy":
            found["loss"] = round(loss, 4)
    found["residual_quadruple"] = round(residual, 6) if looped else ""
    found["spectral_radius"], found["drift"] = "", ""
    if looped:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            looks = cast(dict[str, Diagnosis], diagnose(model, as_input(images[:8]), depth=4.0)).values()
        found["spectral_radius"] = round(max(look.spectral_radius.max().item() for look in looks), 3)
        stages = cast(list[ReversibleFixedPoint], list(model.stages))
        for stage in stages:
            stage.gradient = "reversible"
        with torch.enable_grad():
            logits, _ = model(as_input(images[:8]))
            logits.sum().backward()
        found["drift"] = max(stage.drift.item() for stage in stages)
    return found


class Run(NamedTuple):
    """Under which conditions a variant is trained; the columns that tell whether it has a row."""

    variant: str
    rate: float
    seed: int
    updates: int
    batch: int


def losses(model: StudyModel, images: torch.Tensor, labels: torch.Tensor, batch: int, seed: int) -> Callable[[], torch.Tensor]:
    """A function whose calls give the losses of one shuffled, augmented batch after another; the same ones for every model."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)

    def next_loss() -> torch.Tensor:
        nonlocal order
        if len(order) < batch:
            order = torch.randperm(len(labels), generator=generator)
        rows, order = order[:batch], order[batch:]
        logits, _ = model(as_input(augmented(images[rows], generator)))
        return functional.cross_entropy(logits, labels[rows])

    return next_loss


def train(run: Run, data: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """One run; returns its row."""
    images, labels = data["train"]
    variant = VARIANTS[run.variant]
    model = build(variant, int(labels.max()) + 1, run.seed)
    next_loss = losses(model, images, labels, run.batch, run.seed)
    loss, seconds = fit(run.variant, model, next_loss, run.updates, run.rate, weight_decay=0.05, warm_up=max(1, run.updates // 10))
    return {
        "variant": run.variant,
        "settings": variant.settings(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "rate": run.rate,
        "seed": run.seed,
        "updates": run.updates,
        "batch": run.batch,
        "train_loss": loss,
        **evaluate(model, *data["test"]),
        "seconds": seconds,
    }


def table() -> None:
    """Prints the rows as Markdown, those of the most updates first, then by accuracy."""
    print(f"| updates | block | parameters | N/2 | N | 2N | 4N | residual at 4N | radius |\n|{'---|' * 9}")
    for row in sorted(kept("image_study"), key=lambda row: (-int(row["updates"]), -float(row["accuracy"]))):
        accuracies = (
            row[name] and f"{float(row[name]):.1%}" for name in ("accuracy_half", "accuracy", "accuracy_double", "accuracy_quadruple")
        )
        residual = row["residual_quadruple"] and f"{float(row['residual_quadruple']):.4f}"
        print(
            f"| {row['updates']} | {row['variant']} | {row['parameters']} | {' | '.join(accuracies)} | {residual} | {row['spectral_radius']} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("cifar10"), help="folder with train/CLASS/*.png and test/CLASS/*.png")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), metavar="NAME", help="only these")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test_images", type=int, default=2000, help="test images, spread over the classes")
    parser.add_argument("--table", action="store_true", help="print the rows kept so far and stop")
    options = parser.parse_args()
    if options.table:
        table()
        return
    torch.set_num_threads(1)
    finished = {tuple(row[column] for column in Run._fields) for row in kept("image_study")}
    runs = [Run(name, options.rate, options.seed, options.updates, options.batch) for name in options.variants or VARIANTS]
    runs = [run for run in runs if tuple(map(str, run)) not in finished]
    if not runs:
        print("all have a row")
        return
    data = read_both(options.data, options.test_images)
    for run in runs:
        row = train(run, data)
        print(row, flush=True)
        keep("image_study", [row])


if __name__ == "__main__":
    main()
