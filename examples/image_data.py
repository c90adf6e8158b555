"""Images and labels for `train_image.py`: what its flags name, decoded once, checked, and made into batches."""

import glob
import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from image_augmentation import Augmentation
from PIL import Image
from transformers.utils import logging

KEPT_BYTES = 4 * 2**30
HELD_OUT = "held_out"
# what Pillow raises for files that are no images, cut off or damaged
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

logger = logging.get_logger(__name__)


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub or a local folder, as `datasets` loads it."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one subfolder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for evaluation; default: a tenth of the training images."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet file of images and labels to train on."})
    validation_file: str | None = field(
        default=None, metadata={"help": "The same for evaluation; default: a tenth of the training images."}
    )
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to evaluate on; default: test, else validation, else held_out: a tenth of the training images, by which to choose settings."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; default: the only image column."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels; default: the only class label column."})
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width that images are resized to; default: of the first image, or the saved model's."}
    )
    channels: int | None = field(
        default=None,
        metadata={
            "help": "1 for grey, 3 for colour; default: 1 if all of a hundred training images are grey. White shows behind what is transparent."
        },
    )
    bad_images: str = field(default="refuse", metadata={"help": "What unreadable image files do: refuse (an error lists them) or skip."})
    keep_pixels: bool | None = field(
        default=None,
        metadata={"help": "Decode once and keep the pixels on disk, in the cache of `datasets`; default: where they take at most 4 GiB."},
    )
    flip: bool | None = field(
        default=None,
        metadata={"help": "Flip training images left to right; default: those in colour (grey ones are often digits or letters)."},
    )
    crop_padding: int = field(default=1, metadata={"help": "Pixels a training image may be shifted by."})
    cutout: int = field(default=0, metadata={"help": "Side in pixels of a square that is blanked in each training image; 0: none."})
    erasing: float = field(default=0.0, metadata={"help": "Probability that a random rectangle of a training image is blanked."})
    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup, which averages pairs of training images and labels; 0: none."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of CutMix, which pastes parts of training images; 0: none. 1 is usual."})
    max_train_images: int | None = field(default=None, metadata={"help": "Use so many images for training."})
    max_eval_images: int | None = field(default=None, metadata={"help": "Use so many images for evaluation."})


def digits_rows(test: bool) -> Iterator[dict[str, Any]]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; every fifth one is for the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if (number % 5 == 4) == test:
            yield {"image": Image.fromarray((image * (255 / 16)).round().astype(np.uint8)), "label": int(label)}


def load_splits(data: DataArguments) -> datasets.DatasetDict:
    """The splits of what the flags name.

    Raises:
        FileNotFoundError: a named folder or file is missing.
        ValueError: flags contradict one another, or a file is not a parquet file.
    """
    sources = [f"--{name}" for name in ("dataset_name", "train_dir", "train_file") if getattr(data, name)]
    if len(sources) > 1:
        raise ValueError(f"give one of --dataset_name, --train_dir and --train_file, got {' and '.join(sources)}")
    for kind in ("dir", "file"):
        if getattr(data, f"validation_{kind}") and not getattr(data, f"train_{kind}"):
            raise ValueError(f"--validation_{kind} needs --train_{kind}")
    if data.dataset_name:
        return datasets.load_dataset(data.dataset_name, data.dataset_config)
    if data.train_dir:
        folders = {"train": data.train_dir, **({"validation": data.validation_dir} if data.validation_dir else {})}
        classes: dict[str, list[str]] = {}
        for split, folder in folders.items():
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"--{split}_dir: there is no folder {folder!r}")
            classes[split] = [] if any(Path(folder).glob("metadata.*")) else class_folders(Path(folder), f"--{split}_dir")
        unknown = sorted(set(classes.get("validation", [])) - set(classes["train"]))
        if unknown and classes["train"]:
            raise ValueError(f"--validation_dir has folders of classes that --train_dir has none of: {unknown[:5]}")
        loaded = datasets.load_dataset("imagefolder", data_files={split: f"{glob.escape(folder)}/**" for split, folder in folders.items()})
        known = getattr(loaded["train"].features.get("label"), "names", classes["train"])  # with one class alone there is no such column
        unseen = sorted(set(classes["train"]) - set(known))
        if unseen:
            logger.warning(f"--train_dir: folders without images, of which no class was made: {unseen}")
        return loaded
    if data.train_file:
        files = {"train": data.train_file, **({"validation": data.validation_file} if data.validation_file else {})}
        for split, file in files.items():
            if Path(file).suffix != ".parquet":
                raise ValueError(f"--{split}_file must be a .parquet file, got {file!r}; for a folder of images there is --{split}_dir")
            if not Path(file).is_file():
                raise FileNotFoundError(f"--{split}_file: there is no file {file!r}")
        return datasets.load_dataset("parquet", data_files=files)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])})
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_generator(digits_rows, gen_kwargs={"test": name == "test"}, features=features)
            for name in ("train", "test")
        }
    )


def class_folders(folder: Path, flag: str) -> list[str]:
    """The classes: names of the folders in a folder of images.

    Raises:
        ValueError: there are fewer than two, or they hold folders themselves, which would be the classes.
    """

    def folders(path: Path) -> list[str]:
        return sorted(inner.name for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith("."))

    classes = folders(folder)
    if len(classes) < 2:
        raise ValueError(f"{flag}: {str(folder)!r} must hold a folder of images for each class, at least two, got {classes}")
    for name in classes:
        if inner := folders(folder / name):
            raise ValueError(f"{flag}: the folder of class {name!r} must hold images alone, it also holds the folders {inner[:5]}")
    return classes


def load_images(data: DataArguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and evaluation rows with the columns `image` (bytes or path, not decoded) and `label` (a class label).

    Raises:
        FileNotFoundError: a named folder or file is missing.
        ValueError: the columns cannot be told, a split is missing, or the labels of the splits do not fit.
    """
    for name, limit in (("max_train_images", data.max_train_images), ("max_eval_images", data.max_eval_images)):
        if limit is not None and limit < 1:
            raise ValueError(f"--{name} must be at least 1, got {limit}")
    loaded = load_splits(data)
    if "train" not in loaded:
        raise ValueError(f"the data set has no split 'train', got {', '.join(loaded)}")
    held_out = data.eval_split or next((name for name in ("test", "validation") if name in loaded), None)
    if held_out in (None, HELD_OUT):
        halves = loaded["train"].train_test_split(test_size=0.1, seed=0)
        held_out, loaded = HELD_OUT, {"train": halves["train"], HELD_OUT: halves["test"]}
    if held_out not in loaded:
        raise ValueError(f"--eval_split: the data set has no split {held_out!r}, got {', '.join(loaded)}")
    splits = {"training": loaded["train"], held_out: loaded[held_out]}
    image = data.image_column or only_column(splits["training"], datasets.Image, "--image_column")
    label = data.label_column or only_column(splits["training"], datasets.ClassLabel, "--label_column")
    names: list | None = None
    for split, rows in splits.items():
        for name in (image, label):
            if name not in rows.column_names:
                raise ValueError(f"no column {name!r}, the split {split} of the data set has {rows.column_names}")
        kept = rows.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
        kept = kept.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})
        limit = data.max_train_images if split == "training" else data.max_eval_images
        labelled, found = class_labels(kept, names, split)
        if len(found) < 2:
            raise ValueError(
                f"{label!r} must have at least two classes, got {found}; take another column with --label_column, or other images"
            )
        if names is not None and found != names:
            raise ValueError(f"training and evaluation have other classes: {names} and {found}")
        names = found
        if limit is not None:
            labelled = labelled.shuffle(seed=0).select(range(min(limit, len(labelled))))
        splits[split] = labelled
    train, evaluation = splits.values()
    seen = set(train.select_columns(["label"])[:]["label"])
    empty = [name for number, name in enumerate(names or []) if number not in seen]
    if empty:
        logger.warning(f"{len(empty)} of {len(names or [])} classes have no training images, so that they cannot be learned: {empty[:20]}")
    return train, evaluation


def only_column(rows: datasets.Dataset, kind: type, flag: str) -> str:
    names = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if len(names) != 1:
        raise ValueError(
            f"the data set has {len(names)} columns of type {kind.__name__} ({names}); name one with {flag}. All columns: {rows.column_names}"
        )
    return names[0]


def class_labels(rows: datasets.Dataset, names: list | None, split: str) -> tuple[datasets.Dataset, list]:
    """The rows with `label` as a class label, and the names of the classes.

    Whole numbers and texts that are not declared as class labels are numbered in their order, in all splits by the values of the training split.
    """
    values, feature = rows.select_columns(["label"])[:]["label"], rows.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        outside = sorted({-1 if value is None else value for value in values} - set(range(feature.num_classes)))
        if outside:
            raise ValueError(
                f"labels of the split {split} must be numbers from 0 to {feature.num_classes - 1}, also got {outside[:5]}: they may be withheld; "
                "take another split with --eval_split, or another column with --label_column"
            )
        return rows, feature.names
    known = isinstance(feature, datasets.Value) and (feature.dtype.startswith(("int", "uint")) or "string" in feature.dtype)
    if not known or None in values:
        raise ValueError(f"--label_column: labels must be whole numbers or texts, one for each image, got {feature} in the split {split}")
    classes = sorted(set(values)) if names is None else names
    names = [str(value) for value in classes]
    numbers = {str(value): number for number, value in enumerate(classes)}
    unknown = sorted({str(value) for value in values} - set(names))
    if unknown:
        raise ValueError(f"labels of the split {split} that no training image has: {unknown[:5]}")
    codes = [numbers[str(value)] for value in values]
    return rows.remove_columns("label").add_column("label", codes).cast_column("label", datasets.ClassLabel(names=names)), names


def is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")


def converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in `mode`, "L" or "RGB", with 8 bits a channel; what is transparent shows white behind it.

    Raises:
        ValueError: its pixels have no known range.
    """
    if image.mode.startswith("I") and 0 < np.asarray(image).max() < 256:  # 0 alone is black in any range
        bits, instead = (32, "8 or 16 bits") if image.mode == "I" else (16, "8 bits")
        raise ValueError(
            f"{bits}-bit pixels, none of them above 255, have no known range: save the image with {instead} a pixel, or scaled to the full 16 bits"
        )
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    elif image.has_transparency_data:  # by itself Pillow shows the colours that lie unseen under transparent pixels
        seen = image.convert("RGBA")
        if np.asarray(seen)[..., 3].min() < 255:
            image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return image.convert(mode)


def read_pixels(batch: dict[str, list], processor: Any, mode: str, keep: bool = True) -> dict[str, list]:
    """Encoded images to `pixels`, the bytes of a (height, width, channels) uint8 array of the processor's size.

    `problem` tells why an image could not be read ("" if it could), `changed` whether colour was lost or grey made colour, `greatest` the greatest value
    of an image of more than 8 bits a pixel (else None).
    """
    out: dict[str, list] = {"pixels": [], "problem": [], "changed": [], "greatest": []}
    for number, encoded in enumerate(batch["image"]):
        pixels, problem, changed, greatest = b"", "", False, None
        try:
            image = datasets.Image().decode_example(encoded)
            changed = is_grey(image) != (mode == "L")
            array = np.atleast_3d(np.asarray(converted(image, mode)))
        except IMAGE_ERRORS as error:
            problem = f"{encoded['path'] or 'row {}'.format(batch['index'][number])}: {error}"
        else:
            sized = processor(array, input_data_format="channels_last", do_rescale=False, do_normalize=False)["pixel_values"][0]
            pixels = np.ascontiguousarray(np.asarray(sized).transpose(1, 2, 0)).tobytes()
            greatest = int(np.asarray(image).max()) if image.mode.startswith("I") else None
        for name, value in (("pixels", pixels if keep else b""), ("problem", problem), ("changed", changed), ("greatest", greatest)):
            out[name].append(value)
    return out


def decode(rows: datasets.Dataset, processor: Any, mode: str, keep: bool, bad_images: str, split: str) -> tuple[datasets.Dataset, int]:
    """Rows with the columns `pixels`, `label` and `index`, and how many unreadable images were left out.

    Every image is read once here. With `keep` its pixels stay in `datasets`' cache on disk, else they are read again when they are used.

    Raises:
        ValueError: an image cannot be read and `bad_images` is "refuse", or none can be read.
    """
    rows = rows.add_column("index", range(len(rows)))
    read = partial(read_pixels, processor=processor, mode=mode)
    found = rows.map(
        partial(read, keep=keep),
        batched=True,
        batch_size=256,
        remove_columns=["image"],
        features=datasets.Features(
            {
                "label": rows.features["label"],
                "index": datasets.Value("int64"),
                "pixels": datasets.Value("binary"),
                "problem": datasets.Value("string"),
                "changed": datasets.Value("bool"),
                "greatest": datasets.Value("int64"),
            }
        ),
        desc=f"Reading the images of the split {split}",
    )
    problems = found.select_columns(["problem"])[:]["problem"]
    good = [number for number, problem in enumerate(problems) if not problem]
    bad = [problem for problem in problems if problem]
    if bad and (bad_images == "refuse" or not good):
        listed = "\n  ".join(bad[:20] + ([f"and {len(bad) - 20} more"] if len(bad) > 20 else []))
        raise ValueError(
            f"{len(bad)} of {len(problems)} images of the split {split} cannot be read; repair them or leave them out with --bad_images skip:\n  {listed}"
        )
    if bad:
        logger.warning(f"left out {len(bad)} of {len(problems)} images of the split {split} that cannot be read, the first one: {bad[0]}")
    changed = sum(found.select_columns(["changed"])[:]["changed"])
    if changed:
        what = "are in colour and were made grey" if mode == "L" else "are grey and were made RGB"
        logger.warning(f"{changed} of {len(good)} images of the split {split} {what}, as the model wants them; see --channels")
    greatest = max((value for value in found.select_columns(["greatest"])[:]["greatest"] if value is not None), default=0)
    if 0 < greatest < 4096:
        logger.warning(
            f"images of the split {split} have 16 bits a pixel, but no value above {greatest}, as of 12 bits or fewer: of 256 levels they keep "
            f"{(greatest >> 8) + 1}; scale their values to the full range, 0 to 65535"
        )
    if not keep:
        return rows.select(good).with_transform(lambda batch: {**batch, **read(batch)}), len(bad)
    found = found.remove_columns(["problem", "changed", "greatest"])
    return (found.select(good) if bad else found), len(bad)


def images_hash(rows: datasets.Dataset) -> str:
    """sha256 of decoded images and their labels, by which runs tell that they saw the same data."""
    content = hashlib.sha256()
    for row in rows:
        content.update(row["pixels"] + row["label"].to_bytes(4, "big"))
    return content.hexdigest()


def spread(count: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `count`, evenly spaced: the first rows of a folder are all of one class."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def readable_images(rows: datasets.Dataset, most: int = 100) -> list[Image.Image]:
    """Some images, decoded; unreadable ones are told by `decode` later, unless there are no others."""
    images, problem = [], ""
    for row in rows.select(spread(len(rows), most)):
        try:
            images.append(datasets.Image().decode_example(row["image"]))
        except IMAGE_ERRORS as error:
            problem = f"{row['image']['path']}: {error}"
    if not images:
        raise ValueError(f"there is no readable image among {min(len(rows), most)} of the training split: {problem or 'it is empty'}")
    return images


class Pixels:
    """Rows of `decode` to uint8 arrays (rows, height, width, channels), and these to what the processor would make of them."""

    def __init__(self, processor: Any, shape: tuple[int, int, int]) -> None:
        self.processor, self.shape = processor, shape

    def array(self, rows: list[dict]) -> np.ndarray:
        return np.frombuffer(b"".join(row["pixels"] for row in rows), dtype=np.uint8).reshape(len(rows), *self.shape)

    def normalised(self, array: np.ndarray) -> torch.Tensor:
        """float32 (rows, channels, height, width)."""
        values = torch.from_numpy(array.transpose(0, 3, 1, 2).astype(np.float32, order="C"))
        if self.processor.do_rescale:
            values = values * self.processor.rescale_factor
        if not self.processor.do_normalize:
            return values
        mean, deviation = (torch.tensor(given)[:, None, None] for given in (self.processor.image_mean, self.processor.image_std))
        return (values - mean) / deviation

    def statistics(self, rows: datasets.Dataset) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over up to 2,000 images, of values in [0, 1]."""
        values = self.array(list(rows.select(spread(len(rows), 2000)))).reshape(-1, self.shape[-1]) / 255
        return values.mean(0).tolist(), np.maximum(values.std(0), 1e-6).tolist()


class ImageCollator:
    """Rows to `pixel_values` and `labels`; with an augmentation that softens labels also `probabilities`, (batch, classes).

    What an augmentation draws depends on the seed and on the images of the batch alone, so it is the same whether a run was interrupted or not, and for
    any number of data workers.
    """

    def __init__(self, pixels: Pixels, channels_last: bool = False, augmentation: Augmentation | None = None, seed: int = 0) -> None:
        self.pixels, self.augmentation, self.seed = pixels, augmentation, seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        values = self.pixels.normalised(self.pixels.array(rows))
        batch = {"labels": torch.tensor([row["label"] for row in rows])}
        if self.augmentation is not None:
            rng = np.random.default_rng([self.seed, *(row["index"] for row in rows)])
            values, soft = self.augmentation(values, batch["labels"], rng)
            if soft is not None:
                batch["probabilities"] = soft
        return {"pixel_values": values.contiguous(memory_format=self.memory_format), **batch}
