#!/usr/bin/env python
"""A page that shows how reversible equilibrium models find their fixed point: of a text that is typed, of an image that is dropped.

    python examples/train_language.py --output_dir runs/language
    python examples/train_image.py --output_dir runs/image
    python -m pip install -r examples/space/requirements.txt
    python examples/space/app.py --language runs/language --image runs/image

On a Space the models are named by the variables REVDEQ_LANGUAGE_MODEL and REVDEQ_IMAGE_MODEL, folders or names on the Hub. Computing is in `solves.py`,
drawing in `views.py`; this file lays them out.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported; nothing is sent without being asked

import gradio as gr
import numpy as np
import solves
import torch
import views
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer, ViTImageProcessorPil

import revdeq_hf

TEXT = 'def read_lines(path):\n    """Return the lines of a file."""\n    with open(path) as file:\n        return file.read'
TOLERANCES = (0.1, 0.01, 0.001)
INTRODUCTION = """# Watch a fixed point converge
A [reversible deep equilibrium model](https://arxiv.org/abs/2509.12917) has one block instead of many layers, and repeats it
until its state hardly changes any more.
"""
# one computation at a time: each uses all cores, and `diagnose` runs a model's layers with hooks
ONE_AT_A_TIME: dict[str, Any] = dict(concurrency_limit=1, concurrency_id="model")

# files are read by `solves`, which says what is wrong with one; gradio itself just fails
NOT_READ: dict[str, Any] = dict(preprocess=False)


class ModelError(Exception):
    """A model that cannot be shown; the message says why, and what to do."""


def load(kind: str, source: str | None) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer or image processor.

    Args:
        kind: "language" or "image".
        source: folder, or name on the Hub.

    Raises:
        ModelError: there is none, or it is of another kind.
    """
    if not source:
        raise ModelError(
            f"No {kind} model was given. Train one with `python examples/train_{kind}.py --output_dir runs/{kind}` and start this page with "
            f"`--{kind} runs/{kind}`; on a Space, set the variable REVDEQ_{kind.upper()}_MODEL to a model of the Hub."
        )
    classes: dict[str, tuple[Any, Any, Any]] = {
        "language": (AutoModelForCausalLM, revdeq_hf.RevDEQForCausalLM, AutoTokenizer),
        "image": (AutoModelForImageClassification, revdeq_hf.RevDEQForImageClassification, ViTImageProcessorPil),
    }
    auto_class, model_class, processor_class = classes[kind]
    try:
        model = auto_class.from_pretrained(source, dtype=torch.float32).eval()
        processor = processor_class.from_pretrained(source)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"The {kind} model {source!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if not isinstance(model, model_class):
        raise ModelError(f"{source!r} is a {type(model).__name__}, and this page shows models of the class {model_class.__name__}.")
    config = model.config
    if config.solver != "reversible" or config.num_restarts > 1 or getattr(config, "num_channels", 3) not in (1, 3):
        raise ModelError(
            f"{source!r} has solver={config.solver!r} and num_restarts={config.num_restarts}; this page follows the steps of one reversible solve, of texts or "
            "of images with 1 or 3 channels."
        )
    return model, processor


def build(language: str | None, image: str | None) -> gr.Blocks:
    """The page, for the models in two folders or on the Hub. A tab whose model is missing says so."""
    with gr.Blocks(title="Watch a fixed point converge", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tabs():
            for kind, source, tab in (("language", language, text_tab), ("image", image, image_tab)):
                with gr.Tab("Text" if kind == "language" else "Image"):
                    try:
                        loaded = load(kind, source)
                    except ModelError as error:
                        gr.HTML(views.message(str(error)))
                    else:
                        tab(page, *loaded)
        gr.Markdown(f"revdeq_hf {revdeq_hf.__version__}. Everything is computed on this machine's processor while you wait.")
    return page


def text_tab(page: gr.Blocks, model: Any, tokenizer: Any) -> None:
    with gr.Row():
        text = gr.Textbox(TEXT, label="Text", lines=4, max_lines=10, scale=3, min_width=280)
        with gr.Column(scale=2, min_width=280):
            steps = gr.Slider(1, 32, value=8, step=1, label="Steps of the solve")
            tolerance = gr.Radio(
                [(f"{value:g}", value) for value in TOLERANCES], value=0.01, label="Residual at which a token counts as settled"
            )
            button = gr.Button("Solve", variant="primary")
    summary = gr.Markdown()
    with gr.Column(visible=False) as results:
        gr.Markdown("### Steps per token\nThe darker a token, the more steps its state took to settle.")
        heat_map = gr.HTML()
        gr.Markdown(
            "### Prediction after each step\nBelow each token of the text: the token that the model would put next, had its solve ended there."
        )
        table = gr.HTML()
        gr.Markdown("### Residual per step\nHow much one more evaluation of the block would change the state, relative to its size.")
        residual = gr.Plot(show_label=False, elem_classes="rq-plot")

    def solve(text: str, steps: int, tolerance: float) -> tuple:
        try:
            found = solves.solve_text(model, tokenizer, text, int(steps))
        except solves.InputError as error:
            return views.message(str(error)), gr.Column(visible=False), "", "", None
        return (
            views.text_summary(found, tolerance),
            gr.Column(visible=True),
            views.steps_heat_map(found, tolerance),
            views.predictions(found),
            views.text_residuals(found, tolerance),
        )

    inputs, outputs = [text, steps, tolerance], [summary, results, heat_map, table, residual]
    gr.on([button.click, steps.change, tolerance.change, page.load], solve, inputs, outputs, trigger_mode="always_last", **ONE_AT_A_TIME)
    costs_section(model, partial(solves.text_batch, model, tokenizer), [text], "of the text")


def image_tab(page: gr.Blocks, model: Any, processor: Any) -> None:
    with gr.Row():
        image = gr.Image(
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            label="Image",
            height=240,
            scale=3,
            min_width=280,
            elem_classes="rq-pixels",
        )
        with gr.Column(scale=2, min_width=280):
            steps = gr.Slider(1, 16, value=8, step=1, label="Steps of the solve, in each stage")
            invert = gr.Checkbox(label="Invert (for dark ink on light paper)")
            button = gr.Button("Solve", variant="primary")
    if knows_digits(model):
        with gr.Column(elem_classes="rq-pixels"):
            gr.Examples([[path] for path in digit_files()], [image], label="Digits that examples/train_image.py tests on")
    summary = gr.Markdown()
    with gr.Column(visible=False) as results:
        gr.Markdown("### Prediction after each step\nThe probability of each class, had every stage ended its solve there.")
        table = gr.HTML()
        gr.Markdown(
            "### The state after each step\nThe first stage's state, averaged over its channels, beside the image as the model sees it."
        )
        states = gr.Plot(show_label=False, elem_classes="rq-plot")
        gr.Markdown("### Residual per step\nHow much one more evaluation of a stage's block would change its state, relative to its size.")
        residual = gr.Plot(show_label=False, elem_classes="rq-plot")

    def solve(file: dict | None, steps: int, invert: bool) -> tuple:
        try:
            found = solves.solve_image(model, processor, _path(file), int(steps), invert)
        except solves.InputError as error:
            return views.message(str(error)), gr.Column(visible=False), "", None, None
        return (
            views.image_summary(found),
            gr.Column(visible=True),
            views.class_predictions(found),
            views.image_states(found),
            views.image_residuals(found),
        )

    inputs, outputs = [image, steps, invert], [summary, results, table, states, residual]
    triggers = [button.click, steps.change, invert.change, image.change, page.load]
    gr.on(triggers, solve, inputs, outputs, trigger_mode="always_last", **NOT_READ, **ONE_AT_A_TIME)

    def batch(file: dict | None, invert: bool) -> dict:
        return solves.image_batch(model, processor, _path(file), invert)

    costs_section(model, batch, [image, invert], "of eight copies of the image")


def costs_section(model: Any, batch: Callable[..., dict], inputs: list[Any], of_what: str) -> None:
    """A button that measures the gradient modes on the batch made of the inputs."""
    gr.Markdown(
        f"### Memory and time of the gradient modes\nA training step {of_what} in each exact mode, measured now: `reversible` keeps no states and runs the "
        "solve backwards, `checkpoint` keeps the states, `backprop` everything."
    )
    button = gr.Button("Measure (some ten seconds)")
    table = gr.HTML()
    figure = gr.Plot(show_label=False, elem_classes="rq-plot", visible=False)

    def measure(*values: Any) -> tuple:
        try:
            examples = batch(*values)
            costs = solves.gradient_costs(model, examples)
        except solves.InputError as error:
            return views.message(str(error)), gr.Plot(visible=False)
        shape = next(iter(examples.values())).shape
        return views.cost_table(costs, shape), gr.Plot(views.cost_figure(costs), visible=True)

    button.click(measure, inputs, [table, figure], **NOT_READ, **ONE_AT_A_TIME)


def knows_digits(model: Any) -> bool:
    return model.config.num_channels == 1 and sorted(map(str, model.config.id2label.values())) == [str(digit) for digit in range(10)]


def digit_files() -> list[str]:
    """PNG files of ten digits that `examples/train_image.py` tests on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder = Path(tempfile.mkdtemp(prefix="revdeq-digits-"))
    files = []
    for digit in range(10):
        number = next(row for row in range(4, len(digits.target), 5) if digits.target[row] == digit)  # every fifth is for the test
        files.append(str(folder / f"{digit}.png"))
        Image.fromarray((digits.images[number] * (255 / 16)).round().astype(np.uint8)).save(files[-1])
    return files


def _path(file: dict | None) -> str | None:
    """Where gradio has put an upload."""
    return None if file is None else file["path"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for kind in ("language", "image"):
        variable = f"REVDEQ_{kind.upper()}_MODEL"
        parser.add_argument(
            f"--{kind}", default=os.environ.get(variable), help=f"folder or Hub name of the {kind} model; default: ${variable}"
        )
    options = parser.parse_args(arguments)
    # fonts of the system: gradio's own themes fetch theirs from the network
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build(options.language, options.image).launch(theme=theme, css=views.CSS, footer_links=["gradio", "settings"], max_file_size="20mb")


if __name__ == "__main__":
    main()
