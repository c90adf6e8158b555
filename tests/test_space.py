"""examples/space: what the Space computes and draws, the models and inputs that it refuses, and (where gradio is installed) its page.

`examples/space/check_in_browser.py` drives the page in a real browser; here nothing is served.
"""

import copy
import importlib
import importlib.util
import re
import sys
from dataclasses import replace
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import awake
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ViTImageProcessorPil

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQForImageClassification, RevDEQVisionConfig
from revdeq_hf.layer_revdeq import fixed_point_layers

SPACE = Path(__file__).parents[1] / "examples" / "space"
TEXT = "def f(x):\n    return <x>"
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="the page itself needs gradio, which is no dependency of the package"
)


@pytest.fixture(scope="module", autouse=True)
def space_modules():
    """The Space's files import each other by bare names, as they lie in one folder there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SPACE))
        yield
    for name in ("app", "solves", "views"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def solves(space_modules):
    return importlib.import_module("solves")


@pytest.fixture(scope="module")
def views(space_modules):
    return importlib.import_module("views")


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def language_model(**settings):
    torch.manual_seed(0)
    config = dict(vocab_size=256, hidden_size=32, intermediate_size=64, num_attention_heads=4, beta=0.5, max_steps=3)
    return awake(RevDEQForCausalLM(RevDEQConfig(**{**config, **settings})), std=0.16).eval()  # tokens differ in their steps


@pytest.fixture(scope="module")
def language():
    return language_model()


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    names = {number: f"<{number}>" for number in range(12)}
    config = RevDEQVisionConfig(
        image_size=8, num_channels=1, hidden_sizes=[16, 16], expansion_ratios=[1, 1], max_steps=[2, 3], id2label=names, label2id=None
    )
    return RevDEQForImageClassification(config).eval()


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_texts_figures_are_those_of_the_model(solves, language, tokenizer):
    found = solves.solve_text(language, tokenizer, TEXT, steps=6)
    assert "".join(found.words) == TEXT
    assert found.residual.shape == found.probability.shape == found.divergence.shape == (6, len(TEXT))
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    for steps in (1, 4, 6):  # ended there, the model says the same
        with torch.no_grad():
            best = language(ids, max_steps=steps).logits[0].softmax(-1).max(-1)
        assert found.predicted[steps - 1] == [tokenizer.decode([token]) for token in best.indices.tolist()]
        np.testing.assert_allclose(found.probability[steps - 1], best.values, rtol=1e-4)
    assert found.divergence[0].max() > found.divergence[4].max() > found.divergence[5].max() == 0
    assert 0 < found.radius < 1


def test_steps_per_token_are_those_of_a_model_with_that_tolerance(solves, language, tokenizer):
    tolerance = 0.02
    needed = solves.solve_text(language, tokenizer, TEXT, steps=20).steps_to(tolerance)
    stopping = language_model(tol=tolerance, max_steps=20)
    with torch.no_grad():
        taken = stopping(tokenizer(TEXT, return_tensors="pt")["input_ids"], output_solver_stats=True).solver_steps[0].numpy()
    assert len(set(needed)) > 1
    assert needed[0] == taken[0]
    assert np.abs(needed - taken).max() <= 1  # there, tokens that have stopped stay as they are for those after them


def test_tokens_that_do_not_settle_have_all_steps(solves, language, tokenizer):
    found = solves.solve_text(language, tokenizer, TEXT, steps=4)
    assert found.steps_to(1e-9).tolist() == [4] * len(TEXT)
    assert found.steps_to(2.0).tolist() == [0] * len(TEXT)


@pytest.mark.parametrize(
    ("text", "complaint"), [("", "empty"), (" \n\t", "empty"), ("a" * 129, "129 tokens"), ("a" * 10_000, "10,000 characters")]
)
def test_texts_that_do_not_fit_are_told(solves, language, tokenizer, text, complaint):
    for use in (lambda: solves.solve_text(language, tokenizer, text, 2), lambda: solves.text_batch(language, tokenizer, text)):
        with pytest.raises(solves.InputError, match=complaint):
            use()
    short = language_model(block_type="paper", max_position_embeddings=20)
    with pytest.raises(solves.InputError, match="21 tokens, and this page shows up to 20"):
        solves.solve_text(short, tokenizer, "a" * 21, 2)


def test_an_images_figures_are_those_of_the_model(solves, classifier, processor, picture):
    found = solves.solve_image(classifier, processor, picture, steps=4)
    values = processor(Image.open(picture), return_tensors="pt")["pixel_values"]
    for steps in (1, 4):
        with torch.no_grad():
            out = classifier(values, max_steps=steps, output_solver_stats=True)
        np.testing.assert_array_equal(found.probability[steps - 1], out.logits.softmax(-1)[0])
    assert [residual[-1] for residual in found.residual] == out.solver_residual[0].tolist()
    assert found.states.shape == (4, 8, 8)
    np.testing.assert_array_equal(found.pixels, np.asarray(Image.open(picture)))
    assert found.names[3] == "<3>"
    assert len(found.radius) == 2
    assert found.trained_steps == [2, 3]


def test_images_of_every_kind_come_in_the_models_size_and_colours(solves, classifier, processor, tmp_path):
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    image = Image.fromarray(grey)
    clear = Image.merge("RGBA", [Image.new("L", (8, 8), 0)] * 3 + [image])  # black ink, the more transparent the lighter
    turned = Image.Exif()
    turned[274] = 3  # the camera was upside down
    files = {
        "grey.png": (image, {}, grey),
        "colour.png": (image.convert("RGB"), {}, grey),
        "palette.gif": (image.convert("P"), {}, grey),
        "deep.png": (Image.fromarray(grey.astype(np.uint16) << 8), {}, grey),
        "clear.png": (clear, {}, 255 - grey),
        "turned.png": (image.rotate(180), {"exif": turned}, grey),
        "huge.png": (image.resize((2000, 3000), Image.Resampling.NEAREST), {}, None),
        "line.png": (Image.new("L", (3000, 1)), {}, None),
    }
    for name, (given, options, expected) in files.items():
        given.save(tmp_path / name, **options)
        got = solves.model_image(classifier, processor, tmp_path / name)
        assert (got.mode, got.size) == ("L", (8, 8)), name
        if expected is not None:
            np.testing.assert_array_equal(np.asarray(got), expected, err_msg=name)
    inverted = solves.model_image(classifier, processor, tmp_path / "grey.png", invert=True)
    np.testing.assert_array_equal(np.asarray(inverted), 255 - grey)


def test_files_that_are_no_images_are_told(solves, classifier, processor, picture, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    Image.new("1", (6000, 5000)).save(tmp_path / "large.png")
    Image.new("F", (8, 8)).save(tmp_path / "float.tiff")
    for file, complaint in (
        (None, "no image yet"),
        ("text.png", "is no image"),
        ("empty.png", "is no image"),
        ("cut.jpg", "damaged"),
        ("large.png", r"6,000 x 5,000 pixels, and this page takes up to 25 million"),
        ("float.tiff", "floating-point"),
    ):
        path = None if file is None else tmp_path / file
        with pytest.raises(solves.InputError, match=complaint):
            solves.solve_image(classifier, processor, path, 2)
        with pytest.raises(solves.InputError, match=complaint):
            solves.image_batch(classifier, processor, path, invert=False)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_gradient_modes_are_measured(solves, kind, language, tokenizer, classifier, processor, picture):
    model = language if kind == "text" else classifier
    batch = (
        solves.text_batch(language, tokenizer, TEXT)
        if kind == "text"
        else solves.image_batch(classifier, processor, picture, invert=False, copies=3)
    )
    assert {name: len(values) for name, values in batch.items()} == dict.fromkeys(batch, 1 if kind == "text" else 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    costs = solves.gradient_costs(model, batch, steps=(2, 8), repeats=1)
    by_mode = {(cost.gradient, cost.steps): cost for cost in costs}
    assert len(by_mode) == len(costs) == 6

    def growth(mode):
        return by_mode[mode, 8].kept - by_mode[mode, 2].kept

    assert 0 <= growth("reversible") < growth("checkpoint") < growth("backprop")
    for cost in costs:
        assert cost.seconds > 0
        assert cost.peak > cost.kept > 0
        assert cost.difference < 1e-5
        assert cost.drift == (0 if cost.gradient == "reversible" else None)
    assert model.config.gradient == "reversible"
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_text_is_drawn(solves, views, language, tokenizer):
    found = solves.solve_text(language, tokenizer, TEXT, steps=9)
    needed = found.steps_to(0.02)
    html = views.steps_heat_map(found, 0.02)
    spans = re.findall(r'<span style="background: (#\w{6}); color: (?:black|white)" title="[^"<>]*: (\d+) steps', html)
    assert [int(count) for _, count in spans] == needed.tolist()
    assert len({colour for colour, _ in spans}) == len(set(needed)) > 1
    table = views.predictions(found)
    assert table.count("<tr>") == 1 + 9
    assert table.count("<td") == 9 * len(TEXT)
    assert f"{int((needed < 9).sum())} of {len(TEXT)} tokens" in views.text_summary(found, 0.02)
    axes = views.text_residuals(found, 0.02).axes[0]
    np.testing.assert_allclose(axes.get_lines()[len(TEXT) + 1].get_ydata(), np.median(found.residual, axis=1))
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel()
    assert axes.get_ylabel()


def test_tokens_and_classes_are_text_not_markup(solves, views, language, tokenizer, classifier, processor, picture):
    text = solves.solve_text(language, tokenizer, "ab", steps=2)
    text = replace(text, words=['<i title="">', "<b>"], predicted=[["<s>", "<u>"], ["<s>", "<u>"]])
    image = solves.solve_image(classifier, processor, picture, steps=2)  # its classes are called "<0>" to "<11>"
    for html, tags in (
        (views.steps_heat_map(text, 0.01), ("i title", "b")),
        (views.predictions(text), ("i", "b", "s", "u")),
        (views.class_predictions(image), ("3",)),
        (views.message("<b>"), ("b",)),
    ):
        for tag in tags:
            assert f"&lt;{tag}" in html
            assert f"<{tag}>" not in html
            assert f"<{tag}=" not in html


def test_an_image_is_drawn(solves, views, classifier, processor, picture):
    found = solves.solve_image(classifier, processor, picture, steps=7)
    table = views.class_predictions(found)
    assert table.count("<tr>") == 1 + 7
    assert table.count("<td") == 7 * 10
    shown = [float(value) for value in re.findall(r">([\d.]+)%<", table)][-10:]
    likeliest = np.sort(np.argsort(-found.probability[-1])[:10])
    np.testing.assert_allclose(shown, 100 * found.probability[-1, likeliest], atol=0.051)
    assert len([axes for axes in views.image_states(found).axes if axes.images]) == 1 + 7
    assert len(views.image_residuals(found).axes[0].get_lines()) == 2 + 2  # the stages, and the steps that each was trained with
    assert repr(found.names[found.probability[-1].argmax()]) in views.image_summary(found)
    stages = copy.deepcopy(classifier)
    for _, layer in fixed_point_layers(stages):
        layer.tol = 0.3
    found = solves.solve_image(stages, processor, picture, steps=7)  # each stage stops by itself
    assert [len(line.get_xdata()) for line in views.image_residuals(found).axes[0].get_lines()[:2]] == [
        len(part) for part in found.residual
    ]
    assert min(map(len, found.residual)) < 7


def test_costs_are_drawn(solves, views):
    costs = [
        solves.Cost(mode, steps, 1_000_000 * steps, 3_000_000, 0.25, 0.0, 0.0 if mode == "reversible" else None)
        for steps in (1, 4)
        for mode in solves.MODES
    ]
    table = views.cost_table(costs, (8, 1, 8, 8))
    assert "8 x 1 x 8 x 8, 4 steps" in table
    assert table.count("4 MB") == 3
    assert "250 ms" in table
    upper, lower = views.cost_figure(costs).axes
    assert [list(line.get_ydata()) for line in upper.get_lines()] == [[1, 4]] * 3
    assert [list(line.get_ydata()) for line in lower.get_lines()] == [[250, 250]] * 3


def test_white_space_can_be_seen(views):
    assert [views.visible(token) for token in ("\n  ", "\tx", "", "a")] == ["↵··", "⇥x", "∅", "a"]


def test_the_space_states_what_it_needs():
    """Spaces read the head of README.md and requirements.txt; both must name the same gradio, and requirements all that the package needs."""
    import yaml
    from packaging.requirements import Requirement

    head = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert head["sdk"] == "gradio"
    assert (SPACE / head["app_file"]).is_file()
    assert len(head["short_description"]) <= 60  # the Hub refuses more
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    stated = {found.name: found for found in (Requirement(line) for line in lines if not line.startswith("#"))}
    assert head["sdk_version"] in stated["gradio"].specifier
    for needed in map(Requirement, requires("revdeq_hf") or []):
        if needed.marker is None:  # an extra's have one
            assert stated[needed.name].specifier == needed.specifier


@pytest.fixture(scope="module")
def app(space_modules):
    return importlib.import_module("app")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, language, tokenizer, classifier, processor):
    folder = tmp_path_factory.mktemp("models")
    for name, parts in (("language", (language, tokenizer)), ("image", (classifier, processor))):
        for part in parts:
            part.save_pretrained(folder / name)
    return folder


@needs_gradio
def test_models_that_cannot_be_shown_are_told(app, folders, tokenizer, tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1)
    ).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "empty").mkdir()
    language_model(solver="anderson", gradient="implicit").save_pretrained(tmp_path / "anderson")
    tokenizer.save_pretrained(tmp_path / "anderson")
    for kind, source, complaint in (
        ("language", None, r"train_language\.py .* REVDEQ_LANGUAGE_MODEL"),
        ("image", "", r"train_image\.py .* REVDEQ_IMAGE_MODEL"),
        ("language", str(tmp_path / "nowhere"), "cannot be loaded"),
        ("image", str(tmp_path / "empty"), "cannot be loaded"),
        ("image", str(folders / "language"), "cannot be loaded"),
        ("language", str(tmp_path / "llama"), "is a LlamaForCausalLM"),
        ("language", str(tmp_path / "anderson"), "solver='anderson'"),
    ):
        with pytest.raises(app.ModelError, match=complaint):
            app.load(kind, source)


@needs_gradio
def test_a_page_without_models_says_what_to_do(app):
    shown = str(app.build(None, None).get_config_file())
    assert "--language runs/language" in shown
    assert "REVDEQ_IMAGE_MODEL" in shown


@needs_gradio
def test_the_page_solves(app, folders, picture):
    page = app.build(str(folders / "language"), str(folders / "image"))
    text, image = (function.fn for function in page.fns.values() if function.name == "solve")
    assert "24 tokens, 3 steps" in text(TEXT, 3, 0.01)[0]
    assert "is taken for" in image({"path": str(picture)}, 3, False)[0]
    for broken in (text("", 3, 0.01), image(None, 3, False)):
        assert 'role="alert"' in broken[0]
        assert not any(value for value in broken[2:])  # nothing of an earlier solve stays
    assert all(function.concurrency_limit == 1 for function in page.fns.values() if function.name in ("solve", "measure"))


@needs_gradio
def test_examples_are_digits_of_the_test_split(app):
    from sklearn.datasets import load_digits

    held_out = (load_digits().images[4::5] * (255 / 16)).round().astype(np.uint8)
    files = app.digit_files()
    assert len(files) == 10
    assert all((np.asarray(Image.open(file)) == held_out).all((1, 2)).any() for file in files)
