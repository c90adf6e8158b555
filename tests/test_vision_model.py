"""The image model: gradients, save and load, sizes, pipeline, and errors."""

import numpy as np
import pytest
import torch
from conftest import relative_error
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTImageProcessorPil, pipeline

from revdeq_hf import RevDEQForImageClassification, RevDEQVisionConfig, RevDEQVisionModel

SMALL = dict(hidden_sizes=[16, 32], expansion_ratios=[2, 1], max_steps=3, num_labels=5, image_size=8, group_width=8)


def small(**kwargs) -> RevDEQForImageClassification:
    torch.manual_seed(0)
    return RevDEQForImageClassification(RevDEQVisionConfig(**{**SMALL, **kwargs}))


@pytest.mark.parametrize("variant", [dict(), dict(max_steps=[2, 14]), dict(hidden_sizes=[16], expansion_ratios=[1], pool_size=4)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_modes_agree_on_the_whole_model(variant, autocast):
    images, labels = torch.randn(3, 3, 9, 7), torch.tensor([0, 1, 4])
    gradients, losses = {}, {}
    for mode in ("reversible", "checkpoint", "backprop"):
        model = small(**variant, gradient=mode)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(images, labels=labels).loss
        loss.backward()
        losses[mode] = loss.item()
        gradients[mode] = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[mode].values())
        assert all(stage.drift == 0 for stage in model.model.stages)
    assert len(set(losses.values())) == 1
    for mode in ("reversible", "checkpoint"):
        for name, gradient in gradients[mode].items():
            if name.startswith((f"model.stages.{len(model.model.stages) - 1}", "classifier")):
                assert torch.equal(gradient, gradients["backprop"][name]), name
            else:  # a stage's x is also added to its z: stored backpropagation adds all evaluations to that one by one, the reversal their sum
                assert relative_error(gradient, gradients["backprop"][name]) <= (1e-2 if autocast else 2e-6), name


def test_save_and_load_give_the_same_logits(tmp_path):
    model = small().eval()
    model.config.id2label = {index: f"class {index}" for index in range(5)}
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 8, 8)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert loaded.config.id2label[4] == "class 4"
    assert AutoConfig.from_pretrained(tmp_path).hidden_sizes == [16, 32]
    assert isinstance(AutoModel.from_pretrained(tmp_path), RevDEQVisionModel)
    other_head = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert other_head(images).logits.shape == (2, 3)


def test_pipeline_on_a_png_file(tmp_path):
    from PIL import Image

    small().save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    answers = pipeline("image-classification", model=str(tmp_path))(str(tmp_path / "a.png"), top_k=5)
    assert abs(sum(answer["score"] for answer in answers) - 1) < 1e-4


def test_outputs():
    model = small().eval()
    out = model(torch.randn(2, 3, 10, 13), output_hidden_states=True, output_solver_stats=True)
    assert [tuple(state.shape) for state in out.hidden_states] == [(2, 16, 10, 13), (2, 32, 5, 7)]
    assert out.solver_steps.tolist() == [[3, 3], [3, 3]]
    assert out.solver_residual.shape == (2, 2)
    assert model(torch.randn(1, 3, 1, 1)).logits.shape == (1, 5)
    assert model(torch.randn(1, 3, 8, 8), max_steps=[1, 7], output_solver_stats=True).solver_steps.tolist() == [[1, 7]]
    assert model(torch.randn(1, 3, 8, 8), return_dict=False)[0].shape == (1, 5)


def test_a_batch_equals_its_images_one_by_one():
    model = small(tol=1e-3, max_steps=60).eval()
    images = torch.randn(4, 3, 8, 8) * torch.tensor([3, 5, 10, 20])[:, None, None, None]
    together = model(images, output_solver_stats=True)
    for row in range(4):
        alone = model(images[row : row + 1], output_solver_stats=True)
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=1e-5, atol=1e-5)
        assert torch.equal(alone.solver_steps[0], together.solver_steps[row])


def test_half_precision_model():
    model = small().to(torch.bfloat16)
    loss = model(torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert loss.isfinite()
    assert all(stage.drift == 0 for stage in model.model.stages)


def test_counts_of_the_papers_network():
    assert RevDEQForImageClassification(RevDEQVisionConfig.paper_cifar10_multiscale()).num_parameters() == 10_319_754
    narrow = RevDEQVisionConfig.paper_cifar10_multiscale(expansion_ratios=[1, 1, 1, 1])
    assert round(RevDEQForImageClassification(narrow).num_parameters() / 1e6, 1) == 5.6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(beta=1), "must not be 1"),
        (dict(max_steps=[1, 2, 3]), "one entry per stage"),
        (dict(max_steps=[1, -2]), "max_steps"),
        (dict(expansion_ratios=[1]), "one entry per stage"),
        (dict(hidden_sizes=[16, 30]), "group_width must divide"),
        (dict(hidden_sizes=[]), "non-empty"),
        (dict(gradient="exact"), "gradient must be one of"),
        (dict(num_channels=0), "num_channels"),
    ],
    ids=str,
)
def test_unusable_configs_are_refused(settings, message):
    with pytest.raises(Exception, match=message):
        RevDEQVisionConfig(**{**SMALL, **settings})


def test_bad_inputs_are_told():
    model = small()
    with pytest.raises(ValueError, match="3 channels"):
        model(torch.randn(2, 1, 8, 8))
    with pytest.raises(ValueError, match="got None"):
        model()
    with pytest.raises(ValueError, match=r"one per stage \(2\)"):
        model(torch.randn(2, 3, 8, 8), max_steps=[1])
