"""The image model: gradients, save and load, sizes, pipeline, and errors."""

import itertools

import numpy as np
import pytest
import torch
from conftest import relative_error
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTImageProcessorPil, pipeline

from revdeq_hf import RevDEQForImageClassification, RevDEQVisionBackbone, RevDEQVisionConfig, RevDEQVisionModel, fixed_point_layers

SMALL = dict(hidden_sizes=[16, 32], expansion_ratios=[2, 1], max_steps=3, num_labels=5, image_size=8, group_width=8)
SINGLE = dict(hidden_sizes=[16], expansion_ratios=[1], pool_size=4, stem="group_norm", residual_stages=False, initializer_range=None)
MODERN = dict(block_type="modern", expansion_ratios=[4, 3])
VARIANTS = [
    dict(),
    dict(max_steps=[2, 14]),
    dict(hidden_sizes=[16], expansion_ratios=[1], pool_size=4),
    SINGLE,
    dict(downsample="max_pool", stem_stride=2),
    MODERN,
    MODERN | dict(kernel_size=3, hidden_act="silu", max_steps=[14, 1], beta=0.7),
]


def small(**kwargs) -> RevDEQForImageClassification:
    torch.manual_seed(0)
    return RevDEQForImageClassification(RevDEQVisionConfig(**{**SMALL, **kwargs}))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
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
    assert [tuple(state.shape) for state in out.hidden_states] == [(2, 16, 10, 13), (2, 16, 10, 13), (2, 32, 5, 7)]
    assert out.solver_steps.tolist() == [[3, 3], [3, 3]]
    assert out.solver_residual.shape == (2, 2)
    assert model(torch.randn(1, 3, 1, 1)).logits.shape == (1, 5)
    for stride in (2, 3, 4):  # sizes are rounded up
        for stem, downsample in itertools.product(("batch_norm", "group_norm", "plain"), ("residual", "max_pool")):
            model = small(stem_stride=stride, stem=stem, downsample=downsample).eval()
            maps = model(torch.randn(2, 3, 10, 13), output_hidden_states=True).hidden_states
            assert maps[0].shape == (2, 16, -(-10 // stride), -(-13 // stride))
            assert maps[2].shape[2:] == tuple(-(-side // 2) for side in maps[1].shape[2:])
    model = small().eval()
    assert model(torch.randn(1, 3, 8, 8), max_steps=[1, 7], output_solver_stats=True).solver_steps.tolist() == [[1, 7]]
    assert model(torch.randn(1, 3, 8, 8), return_dict=False)[0].shape == (1, 5)


@pytest.mark.parametrize(("dtype", "tol", "rounding"), [(torch.float32, 1e-3, 1e-5), (torch.bfloat16, 0.05, 0.05)], ids=str)
def test_a_batch_equals_its_images_one_by_one(dtype, tol, rounding):
    model = small(tol=tol, max_steps=60).eval().to(dtype)
    images = (torch.randn(4, 3, 8, 8) * torch.tensor([3, 5, 10, 20])[:, None, None, None]).to(dtype)
    together = model(images, output_solver_stats=True)
    assert (together.solver_steps < 60).all()
    assert len(together.solver_steps[:, 0].unique()) > 1  # the images do not stop together, or nothing is shown
    for row in range(4):
        alone = model(images[row : row + 1], output_solver_stats=True)
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=rounding, atol=rounding)
        assert torch.equal(alone.solver_steps[0], together.solver_steps[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_model(dtype):
    model = small()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model.eval()(images).logits
        got = model.to(dtype)(images).logits
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
    loss = model.train()(images, labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert loss.isfinite()
    assert all(stage.drift == 0 for stage in model.model.stages)


def solved(block: torch.nn.Module, x: torch.Tensor, steps: int, beta: float) -> torch.Tensor:
    """The fixed point as the paper's equations say it, in floating point."""
    y = z = torch.zeros_like(x)
    for _ in range(steps):
        y = (1 - beta) * y + beta * block(z, x)
        z = (1 - beta) * z + beta * block(y, x)
    return z


@torch.no_grad()
def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Norms and their statistics away from 1 and 0, so that none can be missed."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model.double().eval()


@torch.no_grad()
def test_the_modern_block_is_its_formula():
    """u = GN(z) + x; f = GN(u + pointwise(gelu(pointwise(GN(depthwise(u)))))), written with explicit sums."""
    model = moved(small(**MODERN))
    block, groups = model.model.stages[1].block, 32 // SMALL["group_width"]
    z, x = torch.randn(2, 2, 32, 5, 7, dtype=torch.float64).unbind()

    def norm(value, module):
        parts = value.reshape(2, groups, -1)
        parts = (parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return parts.reshape(value.shape) * module.weight[:, None, None] + module.bias[:, None, None]

    def pointwise(value, module):
        return torch.einsum("bchw,dc->bdhw", value, module.weight[:, :, 0, 0]) + module.bias[:, None, None]

    u = norm(z, block.state_norm) + x
    padded = functional.pad(u, (2,) * 4)
    shifted = [padded[:, :, i : i + 5, j : j + 7] * block.depthwise.weight[:, 0, i, j, None, None] for i in range(5) for j in range(5)]
    hidden = pointwise(norm(sum(shifted), block.norm), block.up_proj)
    assert hidden.shape[1] == 3 * 32
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(block(z, x), norm(u + pointwise(hidden, block.down_proj), block.output_norm), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.model.stages[1](x).z, solved(block, x, 3, 0.8), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_multi_scale_network_is_the_papers():
    """conv-BN-ReLU, then x + z*(x) and pre-activation halving whose shortcut is a 1x1 convolution of the bare input, mean, linear."""
    model = moved(RevDEQForImageClassification(RevDEQVisionConfig.paper_cifar10_multiscale(hidden_sizes=[16, 32], expansion_ratios=[1, 3])))
    images = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    body = model.model
    conv, norm, _ = body.stem
    h = functional.conv2d(images, conv.weight, padding=1).sub(norm.running_mean[:, None, None])
    h = h / (norm.running_var + 1e-5).sqrt()[:, None, None] * norm.weight[:, None, None] + norm.bias[:, None, None]
    h = h.clamp_min(0)
    h = h + solved(body.stages[0].block, h, 4, 0.8)
    down = body.downsamples[0]
    inner = functional.conv2d(down.norm1(h).relu(), down.conv1.weight, stride=2, padding=1)
    inner = functional.conv2d(down.norm2(inner).relu(), down.conv2.weight, padding=1)
    h = inner + functional.conv2d(h, down.shortcut.weight, stride=2)
    h = h + solved(body.stages[1].block, h, 4, 0.8)
    logits = h.mean((2, 3)) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(images).logits, logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_max_pool_takes_the_strongest_response_of_a_window():
    """conv at full resolution, BN, maximum over 3x3 windows at every second place, in the stem (there behind ReLU) and between the stages."""
    model = moved(small(downsample="max_pool", stem_stride=2))
    for norm in (model.model.stem[1], model.model.downsamples[0].norm):
        norm.weight[::2].neg_()  # or a pool ahead of the norm would be one behind it
    images = torch.randn(2, 3, 11, 8, dtype=torch.float64)

    def strongest(h):
        padded, sides = functional.pad(h, (1, 1, 1, 1), value=-torch.inf), [-(-side // 2) for side in h.shape[2:]]
        places = itertools.product(*map(range, sides))
        windows = [padded[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].amax((2, 3)) for row, column in places]
        return torch.stack(windows, -1).unflatten(-1, sides)

    body = model.model
    down = body.downsamples[0]
    h = strongest(body.stem[1](functional.conv2d(images, body.stem[0].weight, padding=1)).relu())
    assert h.shape[2:] == (6, 4)
    h = h + solved(body.stages[0].block, h, 3, 0.8)
    h = strongest(down.norm(functional.conv2d(h, down.conv.weight, padding=1)))
    assert h.shape[2:] == (3, 2)
    h = h + solved(body.stages[1].block, h, 3, 0.8)
    logits = h.mean((2, 3)) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(images).logits, logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_single_scale_network_is_the_papers():
    """A convolution with bias and GroupNorm, the fixed point alone, 4x4 means, linear; no statistics of batches anywhere."""
    model = moved(RevDEQForImageClassification(RevDEQVisionConfig.paper_cifar10_singlescale()))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    conv, norm = model.model.stem
    h = functional.group_norm(functional.conv2d(images, conv.weight, conv.bias, padding=1), 2, norm.weight, norm.bias)
    z = solved(model.model.stages[0].block, h, 2, 0.8)
    pooled = z.unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5))
    logits = pooled.flatten(1) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(images).logits, logits, rtol=0, atol=1e-5)


def test_initial_values():
    """Convolutions, and the presets' classifier, as the authors' layers start: uniform in +-1/sqrt(inputs)."""
    for config in (
        RevDEQVisionConfig.paper_cifar10_singlescale(),
        RevDEQVisionConfig.paper_cifar10_multiscale(hidden_sizes=[64], expansion_ratios=[2]),
    ):
        model = RevDEQForImageClassification(config)
        layers = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
        assert len(layers) == 4
        for layer in layers:
            bound = layer.weight[0].numel() ** -0.5
            for values in (layer.weight, layer.bias):
                if values is not None:
                    assert 0.85 * bound < values.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    head = small(hidden_sizes=[256], expansion_ratios=[1], num_labels=20, initializer_range=0.1).classifier
    assert head.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert not head.bias.any()


def test_trajectory():
    model = small(max_steps=[3, 4], tol=None).eval()
    images = torch.randn(2, 3, 8, 8)
    out = model(images, output_trajectory=True, output_hidden_states=True, output_solver_stats=True)
    assert [len(states) for states in out.trajectory] == [3, 4]
    assert [tuple(residuals.shape) for residuals in out.step_residuals] == [(3, 2), (4, 2)]
    first, second = out.trajectory
    assert torch.equal(out.hidden_states[0] + first[-1], out.hidden_states[1])
    fewer = model(images, max_steps=[3, 2], output_hidden_states=True)
    torch.testing.assert_close(fewer.hidden_states[2], out.hidden_states[2] - second[-1] + second[1], rtol=0, atol=1e-6)
    assert torch.equal(out.step_residuals[1][-1], out.solver_residual[:, 1])
    assert (out.step_residuals[1][1:] < out.step_residuals[1][:-1]).all()  # it converges
    plain = model(images)
    assert plain.trajectory is None
    assert plain.step_residuals is None
    assert torch.equal(plain.logits, out.logits)
    assert len(model.model(images, output_trajectory=True).trajectory) == 2
    early = small(tol=0.1, max_steps=60).eval()(images, output_trajectory=True, output_solver_stats=True)
    assert len(early.trajectory[0]) < 60
    assert len(early.step_residuals[0]) >= early.solver_steps[:, 0].max()
    for mode, differentiable in (("backprop", True), ("reversible", True), ("implicit", False)):
        states = small(gradient=mode)(images, output_trajectory=True).trajectory
        assert states[0][0].requires_grad is differentiable


@pytest.mark.parametrize("preset", ["paper_cifar10_multiscale", "paper_cifar10_singlescale"])
def test_presets_take_labels(preset):
    make = getattr(RevDEQVisionConfig, preset)
    assert make().num_labels == 10
    assert make(num_labels=4).num_labels == 4
    assert make(id2label={0: "a", 1: "b", 2: "c"}).id2label == {0: "a", 1: "b", 2: "c"}


def test_counts_of_the_papers_network():
    assert RevDEQForImageClassification(RevDEQVisionConfig.paper_cifar10_multiscale()).num_parameters() == 10_319_754
    narrow = RevDEQVisionConfig.paper_cifar10_multiscale(expansion_ratios=[1, 1, 1, 1])
    assert round(RevDEQForImageClassification(narrow).num_parameters() / 1e6, 1) == 5.6
    single = RevDEQForImageClassification(RevDEQVisionConfig.paper_cifar10_singlescale())
    stem, block, classifier = (3 * 9 + 1) * 32 + 2 * 32, 2 * 9 * 32**2 + 3 * 2 * 32, (16 * 32 + 1) * 10
    assert single.num_parameters() == stem + block + classifier == 24_714


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(beta=1), "must not be 1"),
        (dict(max_steps=[1, 2, 3]), "one entry per stage"),
        (dict(max_steps=[1, -2]), "max_steps"),
        (dict(expansion_ratios=[1]), "one entry per stage"),
        (dict(block_type="resnet"), "block_type must be one of 'modern', 'paper', 'recall'"),
        (dict(kernel_size=4), "kernel_size must be odd"),
        (dict(stem_stride=0), "stem_stride must be at least 1"),
        (dict(kernel_size=0), "kernel_size must be odd, a number or two"),
        (dict(kernel_size=[3, 3, 3]), "kernel_size must be odd, a number or two"),
        (dict(kernel_size=[1, 4]), r"kernel_size must be odd, a number or two, so that the state keeps its size, got \[1, 4\]"),
        (dict(hidden_sizes=[16, 30]), "group_width must divide"),
        (dict(hidden_sizes=[]), "non-empty"),
        (dict(gradient="exact"), "gradient must be one of"),
        (dict(num_channels=0), "num_channels"),
        (dict(downsample="average"), "downsample must be one of 'residual', 'max_pool', got 'average'"),
        (dict(stem="layer_norm"), "stem must be one of 'batch_norm', 'group_norm', 'plain', got 'layer_norm'"),
        (dict(initializer_range=-0.1), "initializer_range"),
        (dict(num_hidden_layers=3), "number of stages, 2, got 3; set hidden_sizes"),
        (dict(out_features=["stage3"]), "out_features must be a subset"),
    ],
    ids=str,
)
def test_unusable_configs_are_refused(settings, message):
    with pytest.raises(Exception, match=message):
        RevDEQVisionConfig(**{**SMALL, **settings})


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "must be a tensor .* got None"),
        (np.zeros((2, 3, 8, 8)), "must be a tensor .* got ndarray; an image processor"),
        (IMAGES[:, :1], r"3 channels, height, width\), got \(2, 1, 8, 8\); see config.num_channels"),
        (IMAGES[0], r"got \(3, 8, 8\)"),
        (IMAGES.to(torch.uint8), "must be floating, rescaled and normalised, got torch.uint8"),
        (IMAGES[:0], r"at least 1 x 1 pixels, got pixel_values of shape \(0, 3, 8, 8\)"),
        (IMAGES[:, :, :0], r"at least 1 x 1 pixels, got pixel_values of shape \(2, 3, 0, 8\)"),
        (IMAGES[:1, :, :2, :1], "one image of 2 x 1 pixels, divided by 2, leaves BatchNorm a single value"),
    ],
    ids=["none", "array", "grey", "one image", "bytes", "no images", "no rows", "too small to train on"],
)
def test_bad_images_are_told(images, message):
    with pytest.raises(ValueError, match=message):
        small()(images)


def test_small_images():
    """What BatchNorm cannot train on can be classified, and trained on in company or without BatchNorm."""
    tiny = IMAGES[:1, :, :2, :1]
    assert small().eval()(tiny).logits.shape == (1, 5)
    small()(IMAGES[:, :, :2, :1], labels=torch.tensor([0, 1])).loss.backward()
    model = small(hidden_sizes=[16], expansion_ratios=[1], stem="group_norm", pool_size=4)
    model(IMAGES[:1, :, :1, :1], labels=torch.tensor([0])).loss.backward()
    frozen = small()
    for module in frozen.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    assert frozen(tiny).logits.isfinite().all()


@torch.no_grad()
def test_tol_of_a_call_is_that_of_a_config():
    own, asked = (small(tol=tol, max_steps=[60, 50]).eval() for tol in (0.05, None))
    expected, found = own(IMAGES, output_solver_stats=True), asked(IMAGES, output_solver_stats=True, tol=0.05)
    assert 1 < expected.solver_steps.min() < expected.solver_steps.max() < 50
    assert all(torch.equal(found[name], expected[name]) for name in ("logits", "solver_steps", "solver_residual"))
    assert torch.equal(own.model(IMAGES)[0], asked.model(IMAGES, tol=0.05)[0])
    backbones = [RevDEQVisionBackbone(model.config).eval() for model in (own, asked)]
    for backbone, model in zip(backbones, (own, asked), strict=True):
        backbone.load_state_dict(model.model.state_dict())
    assert torch.equal(backbones[0](IMAGES).feature_maps[-1], backbones[1](IMAGES, tol=0.05).feature_maps[-1])


@pytest.mark.parametrize("kind", [RevDEQVisionModel, RevDEQForImageClassification, RevDEQVisionBackbone])
def test_what_is_set_in_the_configuration_later_reaches_every_stage(kind):
    config = RevDEQVisionConfig(hidden_sizes=[16, 16], expansion_ratios=[1, 1], group_width=8, max_steps=9)
    model = kind(config).eval()
    model(IMAGES)
    model.config.tol, model.config.damping = 0.05, 0.5
    out = model(IMAGES)
    again = kind(model.config).eval()
    again.load_state_dict(model.state_dict())
    expected = again(IMAGES)
    assert torch.equal(next(iter(out.values()))[0], next(iter(expected.values()))[0])
    for _, layer in fixed_point_layers(model):
        assert (layer.tol, layer.damping) == (0.05, 0.5)
        assert layer.statistics.steps.min() < 9


def test_steps_set_in_a_layer_are_refused():
    model = small(max_steps=[2, 3])
    model.model.stages[1].max_steps = 5
    with pytest.raises(ValueError, match=r"was changed from \[2, 3\] to \[2, 5\]"):
        model(IMAGES)


@pytest.mark.parametrize("name", ["damping", "beta", "gradient"])
@pytest.mark.parametrize("kind", [RevDEQVisionModel, RevDEQForImageClassification, RevDEQVisionBackbone])
def test_settings_of_the_layers_are_refused_in_a_call(kind, name):
    with pytest.raises(ValueError, match=f"{name}: settings of the model's fixed-point layers, not of a call"):
        kind(small().config)(IMAGES, **{name: 0.5})


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([1], r"one per stage \(2\), got \[1\]"),
        ([1, 2, 3], r"one per stage \(2\)"),
        (0, "whole number from 1 to 100000, got 0"),
        ([4, 0], "whole number from 1 to 100000, got 0"),
        (2.0, r"whole number from 1 to 100000, got 2\.0"),
        (True, "whole number from 1 to 100000, got True"),
        ("4", "whole number from 1 to 100000, got '4'"),
    ],
    ids=str,
)
def test_bad_steps_are_told(steps, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        model(IMAGES, max_steps=steps)
    assert model.model.stem[1].num_batches_tracked == 0  # told before anything was done


@pytest.mark.parametrize(
    ("problem", "labels", "message"),
    [
        (None, torch.tensor([0, 5]), r"\[0, num_labels\) = \[0, 5\), or be -100 to be ignored, got \[5\]"),
        (None, torch.tensor([0, -1]), r"got \[-1\]"),
        (None, torch.tensor([0, 1, 2]), r"must be \(2,\) of torch.int64, got \(3,\) of torch.int64"),
        (None, torch.tensor([[0, 1], [2, 3]]), r"got \(2, 2\) of torch.int64"),
        (None, torch.tensor([0, 1], dtype=torch.int32), "got .* of torch.int32"),
        (None, torch.zeros(2, 5, dtype=torch.long), "several labels at once are floating"),
        (None, torch.rand(2), r"problem_type='multi_label_classification' with num_labels=5 must be floating, \(2, 5\), got \(2,\)"),
        (None, [0, 1], "labels must be a tensor, got list"),
        ("single_label_classification", torch.rand(2, 5), "of torch.int64, got"),
        ("multi_label_classification", torch.zeros(2, 5, dtype=torch.long), r"must be floating, \(2, 5\), got \(2, 5\) of torch.int64"),
        ("regression", torch.zeros(2), r"problem_type='regression' with num_labels=5 must be floating, \(2, 5\), got \(2,\)"),
    ],
)
def test_bad_labels_are_told(problem, labels, message):
    model = small(problem_type=problem)
    with pytest.raises(ValueError, match=message):
        model(IMAGES, labels=labels)
    assert model.model.stem[1].num_batches_tracked == 0  # told before anything was done


def test_bad_labels_of_a_regression_are_told():
    with pytest.raises(ValueError, match=r"must be floating, \(2,\) or \(2, 1\), got \(2,\) of torch.int64"):
        small(num_labels=1)(IMAGES, labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("given", [True, False])
def test_problem_types(given):
    """The losses are the usual ones, whether the type is given or found by the labels, and all parameters learn from them."""
    classes, several, number = torch.tensor([1, 4]), torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 0]]), torch.tensor([0.5, -2.0])
    for problem, count, labels, expected in (
        ("single_label_classification", 5, classes, lambda logits: functional.cross_entropy(logits, classes)),
        ("multi_label_classification", 5, several, lambda logits: functional.binary_cross_entropy_with_logits(logits, several)),
        ("regression", 1, number, lambda logits: (logits[:, 0] - number).square().mean()),
    ):
        model = small(num_labels=count, problem_type=problem if given else None)
        out = model(IMAGES, labels=labels, num_items_in_batch=torch.tensor(labels.numel()))  # as Trainer counts them
        torch.testing.assert_close(out.loss, expected(out.logits))
        assert model.config.problem_type == problem
        out.loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_labels_that_count_for_nothing():
    model = small().eval()
    one = model(IMAGES[:1], labels=torch.tensor([2])).loss
    torch.testing.assert_close(model(IMAGES, labels=torch.tensor([2, -100])).loss, one)
    halved = model(
        IMAGES, labels=torch.tensor([[2], [-100]]), num_items_in_batch=2
    ).loss  # of an accumulated batch of two images with labels
    torch.testing.assert_close(halved, one / 2)
