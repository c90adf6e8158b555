import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # pytest -n: torch would take every core in each process, and all would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

from pathlib import Path

import pytest
import torch
from torch import nn

SHARED = Path(__file__).parents[2] / "shared"  # material that a clone does not have
FIXTURES = Path(__file__).parent / "fixtures"
EXAMPLES = Path(__file__).parents[1] / "examples"


class AttentionBlock(nn.Module):
    """A small transformer layer on z + x; `scale` adds a context tensor; `dropout` of two kinds."""

    def __init__(self, width: int = 16, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, z, x, context=None, shift=None):
        u = z + x if context is None else z + x * context
        batch, length, width = u.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm(u)).chunk(3, -1))
        dropout = self.dropout if self.training else 0.0
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        h = x + self.out(h.transpose(1, 2).reshape(batch, length, width))
        f = h + nn.functional.dropout(self.down(nn.functional.gelu(self.up(self.norm2(h)))), dropout)
        return f if shift is None else f + shift


class ConvBlock(nn.Module):
    """GroupNorm and a 3x3 convolution on odd image sizes."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(2, channels)

    def forward(self, z, x):
        return self.norm(torch.relu(self.conv(z)) + x)


class TupleBlock(nn.Module):
    """Two states of other shapes that depend on one another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 5), nn.Linear(5, 8)

    def forward(self, z, x):
        wide, narrow = z
        return torch.tanh(self.b(narrow) + x[0]), torch.tanh(self.a(wide) + x[1])


def make_block(kind: str, **kwargs):
    """A block and its inputs x (with gradients)."""
    torch.manual_seed(0)
    if kind == "attention":
        return AttentionBlock(**kwargs), torch.randn(3, 7, 16, requires_grad=True)
    if kind == "convolution":
        return ConvBlock(), torch.randn(3, 8, 5, 7, requires_grad=True)
    return TupleBlock(), (torch.randn(3, 8, requires_grad=True), torch.randn(3, 5, requires_grad=True))


@torch.no_grad()
def awake(model: nn.Module, std: float = 0.08) -> nn.Module:
    """Gives the matrices of a new language model's modern block a size, and returns the model: they start so small that its branches hardly say anything."""
    if model.config.block_type == "modern":
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=std)
    return model


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Within it the scripts in `examples/` can be imported, and what `datasets` makes of their data is not kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.syspath_prepend(str(EXAMPLES))
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
