"""The laws on an accelerator, in every precision it has. Skipped where there is none."""

import pytest
import torch
from conftest import awake
from test_layer import run

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQForImageClassification, RevDEQVisionConfig

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


@pytest.mark.parametrize("kv_cache", ["per_evaluation", "shared"])
@pytest.mark.parametrize("cache", ["offloaded", "static"])
def test_offloaded_and_compiled_static_caches_write_what_no_cache_writes(cache, kv_cache):
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
