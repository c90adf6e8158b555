"""The laws on an accelerator, in every precision it has. Skipped where there is none."""

import inspect
import warnings

import pytest
import torch
from conftest import awake
from test_layer import run
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache

from revdeq_hf import (
    RevDEQConfig,
    RevDEQForCausalLM,
    RevDEQForImageClassification,
    RevDEQForSemanticSegmentation,
    RevDEQVisionConfig,
    ReversibleFixedPoint,
)
from revdeq_hf.layer_revdeq import fixed_point_layers
from revdeq_hf.training import matrix_rate, peak_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "bfloat16 autocast", "float16 autocast", "float64"])
@pytest.mark.parametrize("kind", ["attention", "convolution", "tuple"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_modes_agree_and_drift_is_zero(kind, precision, dropout):
    if dropout and kind != "attention":
        pytest.skip("only the attention block has dropout")
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        for beta, steps in ((0.5, 4), (0.8, 13), (0.3, 40), (1.2, 64)):
            settings = dict(beta=beta, steps=steps, precision=precision, dropout=dropout, loss_scale=0.1, device="cuda")
            exact, stored = run(kind, "reversible", **settings), run(kind, "backprop", **settings)
            assert exact[1].drift.item() == 0.0
            z, reference = (s[0].z if isinstance(s[0].z, tuple) else (s[0].z,) for s in (exact, stored))
            assert all(torch.equal(a, b) for a, b in zip(z, reference, strict=True))
            for name, gradient in exact[2].items():
                torch.testing.assert_close(gradient, stored[2][name], rtol=1e-2, atol=1e-4, msg=name)
    finally:
        torch.backends.cudnn.deterministic = deterministic


def test_memory_is_flat():
    config = RevDEQConfig(vocab_size=512, hidden_size=256, intermediate_size=768, num_attention_heads=4)
    model = awake(RevDEQForCausalLM(config)).cuda()
    ids = torch.randint(0, 512, (8, 256), device="cuda")
    peaks = []
    for steps in (4, 4, 27):
        torch.cuda.reset_peak_memory_stats()
        model(ids, labels=ids, max_steps=steps).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        model.zero_grad()
    assert peaks[2] <= 1.05 * peaks[1]
    assert model.model.solve.drift == 0


def test_measuring_the_device_s_rate_does_not_count_as_the_training_s_memory():
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")  # the library's workspace, which stays
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    assert matrix_rate(torch.device("cuda")) > 0
    assert peak_memory() <= before + 2**20


@pytest.mark.parametrize(("cache", "kv_cache"), [("static", "per_evaluation"), ("static", "shared"), ("offloaded", "per_evaluation")])
def test_offloaded_and_compiled_static_caches_write_what_no_cache_writes(cache, kv_cache):
    if cache == "offloaded" and "prefetch_stream.wait_stream" not in inspect.getsource(Cache.update):
        pytest.skip("this transformers fetches a slot before its copy to the host has ended, for every model")
    torch.manual_seed(0)
    config = RevDEQConfig(
        vocab_size=67,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        max_steps=14,
        beta=0.9,
        kv_cache=kv_cache,
        initializer_range=0.1,
    )
    model = awake(RevDEQForCausalLM(config)).cuda().eval()
    ids = torch.randint(1, 67, (2, 11), device="cuda")
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, cache_implementation=cache, **settings), plain)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop"])
@pytest.mark.parametrize("block_type", ["paper", "modern"])
def test_channels_last_reaches_every_evaluation(gradient, block_type):
    sizes = dict(hidden_sizes=[16, 32], expansion_ratios=[2, 1], group_width=8, block_type=block_type)
    config = RevDEQVisionConfig(max_steps=3, num_labels=5, gradient=gradient, **sizes)
    model = RevDEQForImageClassification(config).cuda().to(memory_format=torch.channels_last)
    seen: list[torch.Tensor] = []
    for stage in model.model.stages:
        stage.block.register_forward_pre_hook(lambda block, given: seen.extend(given))
    model(torch.randn(4, 3, 16, 16, device="cuda").to(memory_format=torch.channels_last)).logits.sum().backward()
    assert len(seen) >= 2 * 6 * 2
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)
    assert all(stage.drift == 0 for stage in model.model.stages)


def updates(model, count, compiled=False, precision=torch.bfloat16, **inputs):
    """Trains for some updates under autocast; returns the losses, and the greatest drift of each update."""
    torch._dynamo.reset()
    program = torch.compile(model) if compiled else model
    layers = [layer for _, layer in fixed_point_layers(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses, drifts = [], []
    for _ in range(count):
        with torch.autocast("cuda", precision):
            loss = program(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        drifts.append(max(layer.drift.item() for layer in layers))
    return losses, drifts


@pytest.fixture
def _search():
    """cuDNN looks for the fastest algorithm of each shape, which need not be a deterministic one."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    yield
    torch.backends.cudnn.benchmark = before


@pytest.mark.usefixtures("_search")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("block_type", ["paper", "modern"])
def test_image_models_train_without_drift(block_type, layout, compiled):
    torch.manual_seed(0)
    sizes = dict(
        hidden_sizes=[32, 64, 64, 32], expansion_ratios=[1, 2, 2, 1], block_type=block_type
    )  # stages alike but for the maps' sides
    model = RevDEQForImageClassification(RevDEQVisionConfig(max_steps=4, num_labels=5, **sizes)).cuda().to(memory_format=layout)
    pixels = torch.randn(16, 3, 33, 31, device="cuda").contiguous(memory_format=layout)
    losses, drifts = updates(model, 8, compiled, pixel_values=pixels, labels=torch.arange(16, device="cuda") % 5)
    assert drifts == [0.0] * 8
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("steps", [4, 30])
def test_dense_prediction_trains_without_drift(steps, compiled):
    torch.manual_seed(0)
    config = RevDEQVisionConfig.dense_prediction(
        num_channels=3, num_labels=2, hidden_sizes=[32], max_steps=steps, path_noise=0.1, initial_scale=1.0, damping=0.3
    )
    model = RevDEQForSemanticSegmentation(config).cuda()
    grids = torch.randn(8, 3, 19, 19, device="cuda")
    losses, drifts = updates(model, 8, compiled, pixel_values=grids, labels=(grids[:, 0] > 0).long())
    assert drifts == [0.0] * 8
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], ids=str)
def test_language_models_train_without_drift(backend, precision, compiled):
    if compiled and backend == SDPBackend.FLASH_ATTENTION:
        pytest.skip("transformers makes a mask in compiled models, which this kernel does not take")
    torch.manual_seed(0)
    config = RevDEQConfig(
        vocab_size=512, hidden_size=128, intermediate_size=384, num_attention_heads=2, max_steps=6, beta=0.8, hidden_dropout=0.1
    )
    model = awake(RevDEQForCausalLM(config)).cuda()
    ids = torch.randint(0, 512, (4, 129), device="cuda")
    with sdpa_kernel(backend):
        losses, drifts = updates(model, 8, compiled, precision, input_ids=ids, labels=ids)
    assert drifts == [0.0] * 8
    assert losses[-1] < losses[0]


class Unrepeatable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, z, x):
        self.calls += 1
        return torch.tanh(self.weight * z + x + 0.01 * self.calls)


def test_drift_is_told_by_a_later_pass_without_the_host_waiting():
    layer = ReversibleFixedPoint(Unrepeatable().cuda(), max_steps=4)
    x = torch.randn(4, 8, device="cuda", requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x).z.sum().backward()
    torch.cuda.synchronize()
    with pytest.warns(UserWarning, match="drift"):
        layer(x)
    assert layer.drift > 0


def test_training_waits_for_nothing():
    """No operation of a training step makes the host wait for the device."""
    config = RevDEQConfig(vocab_size=512, hidden_size=128, intermediate_size=384, num_attention_heads=2, max_steps=30, beta=0.8)
    model = awake(RevDEQForCausalLM(config)).cuda()
    ids = torch.randint(0, 512, (4, 65), device="cuda")
    images = RevDEQForImageClassification(RevDEQVisionConfig(hidden_sizes=[16, 32], expansion_ratios=[1, 1], num_labels=5)).cuda()
    pixels, labels = torch.randn(8, 3, 16, 16, device="cuda"), torch.arange(8, device="cuda") % 5
    for turn in range(2):
        torch.cuda.set_sync_debug_mode("error" if turn else "default")  # the first turn makes tables and plans
        try:
            with torch.autocast("cuda", torch.bfloat16):
                language, picture = model(ids, labels=ids).loss, images(pixels, labels=labels).loss
            (language + picture).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
