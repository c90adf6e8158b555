"""Scores and figures of a trained image classifier, for `train_image.py`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, confusion_matrix

CALIBRATION_BINS = 15


def scores(logits: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Accuracy, that of each class (None for a class without images), the confusion matrix (rows are true classes), and the calibration error.

    Args:
        logits: (images, classes).
        labels: (images,), class numbers.
        names: of the classes.
    """
    predicted = logits.argmax(-1)
    matrix = confusion_matrix(labels, predicted, labels=np.arange(len(names)))
    images = matrix.sum(1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "per_class_accuracy": {
            name: float(right / count) if count else None for name, right, count in zip(names, matrix.diagonal(), images, strict=True)
        },
        "confusion_matrix": matrix.tolist(),
        "expected_calibration_error": calibration_error(probabilities(logits).max(-1), predicted == labels),
    }


def probabilities(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().softmax(-1).numpy()


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = CALIBRATION_BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, mean confidence and accuracy of each of `bins` equal parts of [0, 1] that a prediction's confidence may lie in; NaN where none does.

    sklearn's `calibration_curve` gives the same means and leaves out the counts, which the calibration error needs.
    """
    part = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    counts = np.bincount(part, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in empty parts
        return counts, np.bincount(part, confidence, bins) / counts, np.bincount(part, right, bins) / counts


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: `|accuracy - confidence|` of the parts of `reliability`, weighted by their images."""
    counts, means, accuracies = reliability(confidence, right, bins)
    filled = counts > 0
    return float((np.abs(accuracies - means)[filled] * counts[filled]).sum() / counts.sum())


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure


def show_image(axes: Any, image: np.ndarray, title: str = "") -> None:
    """Draws uint8 pixels (height, width, 1 or 3)."""
    axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
    axes.set_title(title, fontsize="x-small")
    axes.axis("off")


def plot_evaluation(
    logits: np.ndarray, labels: np.ndarray, names: list[str], images: dict[int, np.ndarray], found: dict[str, Any], path: Path
) -> None:
    """Confusion matrix, reliability diagram, and some misclassified images with their true and predicted class, to a PNG file.

    Args:
        images: pixels of the misclassified images to show, by their row.
        found: what `scores` returned.
    """
    figure = new_figure(15, 5)
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1.15, 0.9, 1))
    matrix = np.asarray(found["confusion_matrix"], dtype=float)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes = left.subplots()
    left.colorbar(axes.imshow(shares, vmin=0, vmax=1, cmap="Blues"), ax=axes, shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title=f"Share of each class; accuracy {found['accuracy']:.2%}")
    if len(names) <= 20:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
        axes.set_yticks(range(len(names)), names, fontsize="small")
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, int(matrix[row, column]), ha="center", va="center", fontsize="xx-small", color=colour)

    predicted, confidence = logits.argmax(-1), probabilities(logits).max(-1)
    counts, means, accuracies = reliability(confidence, predicted == labels)
    axes = middle.subplots()
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[:-1]
    axes.bar(edges, np.nan_to_num(accuracies), 1 / CALIBRATION_BINS, align="edge", edgecolor="white", label="accuracy")
    axes.bar(edges, counts / counts.sum(), 0.4 / CALIBRATION_BINS, align="edge", color="grey", label="share of images")
    axes.plot(means[counts > 0], accuracies[counts > 0], ".", color="black")
    axes.plot([0, 1], [0, 1], ":", color="grey", label="calibrated")
    axes.set(xlabel="confidence", ylabel="accuracy", title=f"Calibration error {found['expected_calibration_error']:.3f}")
    axes.legend(fontsize="small")

    right.suptitle("Surest mistakes: true / predicted" if images else "No image was misclassified", fontsize="medium")
    if images:
        side = int(np.ceil(np.sqrt(len(images))))
        grid = right.subplots(side, side, squeeze=False).flatten()
        for axes in grid:
            axes.axis("off")
        for axes, (row, image) in zip(grid, images.items(), strict=False):
            show_image(axes, image, f"{names[labels[row]]} / {names[predicted[row]]}")
    figure.savefig(path, dpi=120)


@torch.no_grad()
def plot_fixed_point(model: torch.nn.Module, pixel_values: torch.Tensor, images: np.ndarray, steps: int, trained: int, path: Path) -> None:
    """For each image a row: the image, the mean over the channels of the first stage's state after each step, and the residual, to a PNG file.

    Args:
        pixel_values: (rows, channels, height, width), on the model's device.
        images: the same ones as uint8, (rows, height, width, channels).
        steps: steps to solve with.
        trained: steps of the training, marked in the last column.
    """
    solved = model.eval()(pixel_values=pixel_values, max_steps=steps, output_trajectory=True)
    maps = torch.stack([state.mean(1) for state in solved.trajectory[0]]).float().cpu().numpy()
    residuals = solved.step_residuals[0].float().cpu().numpy()
    rows, columns = len(images), len(maps)
    figure = new_figure(1.15 * (columns + 1) + 2.4, 1.35 * rows + 0.4)
    axes = figure.subplots(rows, columns + 2, squeeze=False, width_ratios=[1] * (columns + 1) + [1.9])
    for row in range(rows):
        show_image(axes[row, 0], images[row], "image" if row == 0 else "")
        low, high = maps[-1, row].min(), maps[-1, row].max()
        for step in range(columns):
            axes[row, step + 1].imshow(maps[step, row], vmin=low, vmax=high, cmap="viridis")
            axes[row, step + 1].axis("off")
            if row == 0:
                axes[row, step + 1].set_title(f"step {step + 1}", fontsize="x-small")
        curve = axes[row, -1]
        curve.plot(range(1, len(residuals) + 1), residuals[:, row], marker=".")
        curve.axvline(trained, color="grey", linestyle=":")
        curve.set_yscale("log")
        curve.tick_params(labelsize="x-small")
        curve.grid(alpha=0.3)
    axes[0, -1].set_title("residual at each step's start", fontsize="x-small")
    figure.savefig(path, dpi=120)
