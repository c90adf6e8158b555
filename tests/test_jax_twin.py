"""The JAX code that the benchmarks time computes what the package computes (benchmarks/jax_twin.py)."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error

from revdeq_hf import RevDEQConfig, ReversibleFixedPoint
from revdeq_hf.block_revdeq import RevDEQTransformerBlock
from revdeq_hf.modeling_revdeq import RevDEQRotaryEmbedding

KINDS = {
    "modern": {},
    "grouped": dict(num_key_value_heads=2, num_block_layers=2, hidden_act="gelu"),
    "paper": dict(block_type="paper", hidden_act="gelu_pytorch_tanh", num_block_layers=2),
}


@pytest.fixture(scope="module")
def benchmarks():
    """Within it the scripts in `benchmarks/` can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        yield


@pytest.fixture(scope="module")
def twin(benchmarks):
    pytest.importorskip("jax", reason="JAX is not installed, and no dependency of the package")
    return importlib.import_module("jax_twin")


def problem(kind: str, dtype: torch.dtype):
    """A block, x (3, 7, 32), its rotary positions (None for the paper's block), and the gradient of the loss with respect to z."""
    config = RevDEQConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=8, attn_implementation="sdpa", **KINDS[kind]
    )
    block, x = RevDEQTransformerBlock(config).to(dtype), torch.randn(3, 7, 32, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() == 1:  # ones and zeros would hide what they do
                parameter.add_(0.3 * torch.randn_like(parameter))
    rotary = None if config.block_type == "paper" else RevDEQRotaryEmbedding(config)(x, torch.arange(7)[None])
    return config, block, x, rotary, torch.randn_like(x)


def errors(twin, kind: str, beta: float, steps: int, dtype: torch.dtype = torch.float32, **settings) -> dict[str, float]:
    """Relative errors of z and of the gradients of x and of every parameter against stored backpropagation in torch; shapes and dtypes are checked."""
    config, block, x, rotary, weight = problem(kind, dtype)
    layer = ReversibleFixedPoint(block, beta=beta, max_steps=steps, gradient="backprop")
    z = layer(x, position_embeddings=rotary).z
    names = [name for name, _ in block.named_parameters()]
    expected = dict(zip(["x", *names], torch.autograd.grad(z, [x, *block.parameters()], weight), strict=True)) | {"z": z.detach()}
    inputs = twin.from_torch(block, x, rotary)
    z, grads, grad_x = twin.make_step(config, beta, steps, **settings)(*inputs, weight.numpy())
    got = {name: torch.from_numpy(np.array(array)) for name, array in {"x": grad_x, **grads, "z": z}.items()}
    assert got.keys() == expected.keys()
    assert {name: tensor.shape for name, tensor in got.items()} == {name: tensor.shape for name, tensor in expected.items()}
    assert got["z"].dtype == getattr(torch, settings.get("state_dtype", "float64"))
    assert {got[name].dtype for name in ("x", *names)} == {dtype}
    # softmax does not see what a bias of the keys adds where there are no rotary positions: that gradient is rounding alone
    return {name: relative_error(got[name], expected[name].to(got[name].dtype)) for name in expected if not name.endswith("k_proj.bias")}


@pytest.mark.parametrize(
    ("kind", "beta", "steps"),
    [
        ("modern", 0.5, 1),
        ("modern", 0.8, 4),
        pytest.param("modern", 0.5, 4, marks=pytest.mark.slow),
        pytest.param("modern", 0.8, 1, marks=pytest.mark.slow),
        pytest.param("grouped", 0.8, 4, marks=pytest.mark.slow),
        pytest.param("paper", 0.5, 4, marks=pytest.mark.slow),
    ],
)
def test_it_computes_what_torch_computes(twin, kind, beta, steps):
    figures = errors(twin, kind, beta, steps, xla_disable_hlo_passes="fusion")  # so small, see make_step
    assert max(figures.values()) < 1e-5, figures


def test_as_it_is_compiled_for_timing(twin):
    figures = errors(twin, "modern", 0.8, 4, torch.float64, compute_dtype="float64")
    assert max(figures.values()) < 1e-7, figures  # float64, for what XLA changes in last bits


def test_it_runs_in_low_precision(twin):
    figures = errors(twin, "modern", 0.5, 2, state_dtype="float32", compute_dtype="bfloat16")
    assert max(figures.values()) < 0.03, figures


def test_what_it_has_not_is_refused(twin):
    with pytest.raises(ValueError, match="beta must not be 1"):
        twin.make_step(RevDEQConfig(), 1.0, 4)
    with pytest.raises(ValueError, match=r"without dropout.*hidden_dropout=0\.1"):
        twin.make_step(RevDEQConfig(hidden_dropout=0.1), 0.5, 4)


def test_without_jax_it_says_what_to_install(benchmarks, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "jax_twin", raising=False)
    with pytest.raises(ImportError, match="pip install jax"):
        importlib.import_module("jax_twin")
