"""What transformers asks of every image model, in short: the essence of its common tests for models, backbones and configurations."""

import copy
import json

import pytest
import torch
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, ViTImageProcessorPil
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # `transformers.AutoImageProcessor` of 5.17 wants torchvision

from revdeq_hf import (
    RevDEQForImageClassification,
    RevDEQForSemanticSegmentation,
    RevDEQVisionBackbone,
    RevDEQVisionConfig,
    RevDEQVisionModel,
    modeling_revdeq_vision,
)
from revdeq_hf.training import LiveBytes

SEVERAL = dict(hidden_sizes=[16, 32], expansion_ratios=[1, 2], max_steps=2, group_width=8, num_labels=3, image_size=8)
SINGLE = SEVERAL | dict(hidden_sizes=[16], expansion_ratios=[1], pool_size=4, stem="group_norm", residual_stages=False)
MODERN = SEVERAL | dict(block_type="modern")
RECALL = SEVERAL | dict(block_type="recall", stem="plain", kernel_size=[1, 3])
POOLED = SEVERAL | dict(downsample="max_pool")
NETWORKS = pytest.mark.parametrize(
    "settings", [SEVERAL, SINGLE, MODERN, RECALL, POOLED], ids=["several stages", "single stage", "modern", "recall", "max pool"]
)
CLASSES = [RevDEQVisionModel, RevDEQForImageClassification, RevDEQVisionBackbone]
IMAGES = torch.randn(2, 3, 9, 12, generator=torch.Generator().manual_seed(3))


def make(model_class, settings, **kwargs):
    torch.manual_seed(0)
    return model_class(RevDEQVisionConfig(**{**settings, "drift_policy": "raise", **kwargs})).eval()


@NETWORKS
def test_hidden_states_are_the_stems_map_and_each_stages(settings):
    for model_class in CLASSES:
        model = make(model_class, settings)
        out = model(IMAGES, output_hidden_states=True)
        sizes = settings["hidden_sizes"]
        shapes = [(2, size, 9, 12) if index == 0 else (2, size, 5, 6) for index, size in enumerate(sizes)]
        assert [tuple(state.shape) for state in out.hidden_states] == [(2, sizes[0], 9, 12), *shapes]
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        assert model(IMAGES).hidden_states is None
        model.config.output_hidden_states = True
        assert len(model(IMAGES).hidden_states) == len(out.hidden_states)
        assert model(IMAGES, output_hidden_states=False).hidden_states is None
    body = make(RevDEQVisionModel, settings)
    out = body(IMAGES, output_hidden_states=True)
    assert torch.equal(out.hidden_states[0], body.stem(IMAGES))
    assert out.hidden_states[-1] is out.last_hidden_state


@NETWORKS
@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop"])
def test_hidden_states_get_gradients(settings, gradient):
    model = make(RevDEQForImageClassification, settings, gradient=gradient).train()
    out = model(IMAGES, output_hidden_states=True)
    for state in out.hidden_states:
        state.retain_grad()
    out.logits.square().sum().backward()
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in out.hidden_states)


@NETWORKS
def test_tuples_and_copies(settings):
    for model_class in CLASSES:
        model = make(model_class, settings)
        out = model(IMAGES, output_hidden_states=True)
        as_tuple = model(IMAGES, output_hidden_states=True, return_dict=False)
        copied = copy.deepcopy(model)(IMAGES, output_hidden_states=True, return_dict=False)
        for ours, other, third in zip(out.to_tuple(), as_tuple, copied, strict=True):
            first = ours[-1] if isinstance(ours, tuple) else ours
            assert torch.equal(first, other[-1] if isinstance(other, tuple) else other)
            assert torch.equal(first, third[-1] if isinstance(third, tuple) else third)


def test_configs_of_backbones(tmp_path):
    config = RevDEQVisionConfig()
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert (config.out_features, config.out_indices) == (["stage4"], [4])
    chosen = RevDEQVisionConfig(out_indices=[0, -2])
    assert chosen.out_features == ["stem", "stage3"]
    chosen.out_features = ["stage1", "stage3"]
    assert chosen.out_indices == [1, 3]
    chosen.save_pretrained(tmp_path)
    assert "stage_names" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, RevDEQVisionConfig)
    assert (loaded.out_features, loaded.out_indices) == (["stage1", "stage3"], [1, 3])
    assert loaded.to_dict() | {"_name_or_path": ""} == chosen.to_dict()
    assert AutoConfig.from_pretrained(tmp_path, out_indices=[2]).out_features == ["stage2"]
    assert RevDEQVisionConfig(**SINGLE, stage_names=["stem", "stage1", "stage2"]).stage_names == ["stem", "stage1"]
    for wrong in (dict(out_features=["stage3", "stage1"]), dict(out_indices=[5]), dict(out_features=["stem"], out_indices=[1])):
        with pytest.raises(ValueError, match="out_"):
            RevDEQVisionConfig(**wrong)


def test_a_backbone_returns_the_maps_of_a_trained_classifier(tmp_path):
    model = make(RevDEQForImageClassification, SEVERAL)
    model.save_pretrained(tmp_path / "classifier")
    expected = model(IMAGES, output_hidden_states=True, output_solver_stats=True)
    backbone = RevDEQVisionBackbone.from_pretrained(tmp_path / "classifier", out_features=["stem", "stage2"]).eval()
    out = backbone(IMAGES)
    assert (backbone.channels, backbone.out_indices) == ([16, 32], [0, 2])
    assert backbone.out_feature_channels == {"stem": 16, "stage1": 16, "stage2": 32}
    assert len(out.feature_maps) == 2
    assert torch.equal(out.feature_maps[0], expected.hidden_states[0])
    assert torch.equal(out.feature_maps[1], expected.hidden_states[2])
    assert torch.equal(out.solver_residual, expected.solver_residual)
    assert backbone(IMAGES, max_steps=[1, 5]).solver_steps.tolist() == [[1, 5], [1, 5]]
    backbone.save_pretrained(tmp_path / "backbone")
    again = RevDEQVisionBackbone.from_pretrained(tmp_path / "backbone").eval()
    assert torch.equal(again(IMAGES).feature_maps[1], out.feature_maps[1])
    classifier = RevDEQForImageClassification.from_pretrained(tmp_path / "backbone").eval()
    assert torch.equal(classifier.model(IMAGES).last_hidden_state, expected.hidden_states[-1])
    assert isinstance(AutoBackbone.from_config(model.config), RevDEQVisionBackbone)


@NETWORKS
@pytest.mark.parametrize("gradient", ["reversible", "backprop"])
def test_activation_checkpointing_is_mapped_onto_the_gradient_mode(settings, gradient):
    model = make(RevDEQForImageClassification, settings, gradient=gradient).train()

    def kept_and_gradients() -> tuple[int, list[torch.Tensor]]:
        with LiveBytes() as memory:
            loss = model(IMAGES).logits.square().sum()
        kept = memory.alive
        return kept, torch.autograd.grad(loss, list(model.parameters()))

    before, expected = kept_and_gradients()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    after, found = kept_and_gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert after == before if gradient == "reversible" else after < 0.8 * before


def test_activation_checkpointing_says_when_it_has_nothing_to_do(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_revdeq_vision.logger, "warning_once", said.append)
    for gradient, count in (("backprop", 0), ("reversible", 1)):
        model = make(RevDEQForImageClassification, SEVERAL, gradient=gradient)
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        assert len(said) == count
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        assert len(said) == count
    assert "gradient='reversible'" in said[0]


def test_every_class_takes_restarts():
    """Of each stage's start states the best one, in every class and not in the body alone."""
    for model_class in (*CLASSES, RevDEQForSemanticSegmentation):
        settings = RECALL | dict(hidden_sizes=[16], expansion_ratios=[1]) if model_class is RevDEQForSemanticSegmentation else SEVERAL
        model = make(model_class, settings, initial_scale=1.0)
        calls: list[int] = []
        body = model if isinstance(model, RevDEQVisionBackbone | RevDEQVisionModel) else model.model
        body.stages[0].block.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            model(IMAGES, num_restarts=3)
            assert len(calls) == 3 * 2 * 2
            with pytest.raises(ValueError, match="num_restarts"):
                model(IMAGES, num_restarts=0)


@pytest.mark.parametrize("gradient", ["reversible", "backprop"])
def test_a_backbone_trains(gradient):
    backbone = make(RevDEQVisionBackbone, SEVERAL, gradient=gradient, out_indices=[0, 1, 2]).train()
    sum(features.square().mean() for features in backbone(IMAGES).feature_maps).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in backbone.parameters())
    assert all(stage.drift == 0 for stage in backbone.stages)


@NETWORKS
def test_device_maps_and_offload(settings, tmp_path):
    """A stage is one piece (`_no_split_modules`): its weights may wait on the disk until it runs."""
    model = make(RevDEQForImageClassification, settings)
    expected = model(IMAGES).logits
    model.save_pretrained(tmp_path / "model")
    places = {"model.stem": "cpu", "model.stages": "disk", "model.downsamples": "disk", "model.pooler": "cpu", "classifier": "cpu"}
    for device_map in ("cpu", "auto", places):
        loaded = AutoModelForImageClassification.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk"
        )
        with torch.no_grad():
            assert torch.equal(loaded(IMAGES).logits, expected)
    assert next(loaded.model.stages.parameters()).device.type == "meta"
    with torch.device("meta"):
        empty = RevDEQForImageClassification(model.config)
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())


@NETWORKS
def test_mismatched_sizes(settings, tmp_path):
    """Another head, and images of another number of channels, on the rest of a trained model."""
    make(RevDEQForImageClassification, settings).save_pretrained(tmp_path)
    other = dict(id2label={index: str(index) for index in range(7)}, num_channels=1)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(tmp_path, **other)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **other).eval()
    assert model(IMAGES[:, :1]).logits.shape == (2, 7)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    kept = AutoModel.from_pretrained(tmp_path).stages
    assert all(map(torch.equal, model.model.stages[0].parameters(), kept[0].parameters()))


def test_a_saved_image_processor_is_found_without_torchvision(tmp_path):
    make(RevDEQForImageClassification, SEVERAL).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert list(processor.image_mean) == [0.4, 0.5, 0.6]
    images = torch.randint(0, 255, (20, 30, 3), dtype=torch.uint8).numpy()
    assert processor(images, return_tensors="pt")["pixel_values"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop"])
def test_channels_last_is_kept(gradient):
    """Maps of the stages lie as the images do, and say the same. (Inside a solve on an accelerator: tests/test_gpu.py.)"""
    model = make(RevDEQForImageClassification, SEVERAL, gradient=gradient)
    expected = model(IMAGES).logits
    model = model.to(memory_format=torch.channels_last)
    out = model(IMAGES.to(memory_format=torch.channels_last), output_hidden_states=True)
    assert all(state.is_contiguous(memory_format=torch.channels_last) for state in out.hidden_states)
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-5)
    out.logits.sum().backward()
    assert all(stage.drift == 0 for stage in model.model.stages)


@NETWORKS
@torch.no_grad()
def test_the_inference_path_exports_for_any_batch_and_size(settings):
    if settings.get("downsample") == "max_pool" and torch.__version__ < "2.13":
        pytest.skip("torch's max pool exports for sides of one parity alone, before 2.13")
    model = make(RevDEQForImageClassification, settings, max_steps=1)
    least = 2 * len(settings["hidden_sizes"])  # so that no stage sees a single row, of which export would make a special case
    sizes = {
        0: torch.export.Dim("batch", min=1, max=64),
        2: torch.export.Dim("height", min=least, max=512),
        3: torch.export.Dim("width", min=least, max=512),
    }
    exported = torch.export.export(model, (), {"pixel_values": IMAGES}, dynamic_shapes={"pixel_values": sizes}, strict=False)
    for shape in ((2, 3, 9, 12), (1, 3, least, 7), (5, 3, 16, 16)):
        images = torch.randn(shape)
        torch.testing.assert_close(exported.module()(pixel_values=images).logits, model(images).logits, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same():
    """The stages are compiled by themselves, with torch's default backend; what lies between them is traced."""
    model, labels = make(RevDEQForImageClassification, SEVERAL).train(), torch.tensor([0, 2])
    start = copy.deepcopy(model.state_dict())
    losses, gradients = [], []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.load_state_dict(start)
        model.zero_grad()
        losses.append(run(IMAGES, labels=labels).loss)
        losses[-1].backward()
        assert all(stage.drift == 0 for stage in model.model.stages)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)
