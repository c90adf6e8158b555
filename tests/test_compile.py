"""torch.compile: one program in both passes, so that the reversal stays exact."""

import shutil

import pytest
import torch
from conftest import awake, make_block
from torch import nn

from revdeq_hf import (
    ResidualLoss,
    RevDEQConfig,
    RevDEQForCausalLM,
    RevDEQForImageClassification,
    RevDEQForSemanticSegmentation,
    RevDEQForSequenceClassification,
    RevDEQForTokenClassification,
    RevDEQVisionConfig,
    ReversibleFixedPoint,
    fixed_point_layers,
)
from revdeq_hf.solver_revdeq import ExactState, Scratch, resolution_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler"),
]


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]),
    ]
)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


class Chain(nn.Module):
    """Long pointwise chains, which the compiler fuses otherwise with gradients than without: half precision then rounds at other places."""

    def __init__(self, dropout: float, width: int = 64) -> None:
        super().__init__()
        self.first, self.last, self.dropout = nn.LayerNorm(width), nn.RMSNorm(width), nn.Dropout(dropout)
        self.up, self.gate, self.down = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, z, x):
        h = self.first(z + x)
        inner = self.dropout(nn.functional.gelu(self.up(h)) * torch.sigmoid(self.gate(h)))
        return self.last(x + self.down(inner) * torch.tanh(h))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16 autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("how", ["block.compile()", "torch.compile(block)"])
def test_a_compiled_block_is_reversed_exactly(how, dropout, precision, device):
    gradients = {}
    for mode in ("reversible", "backprop"):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        block, x = Chain(dropout).to(device, dtype), torch.randn(4, 32, 64, dtype=dtype, device=device, requires_grad=True)
        if how == "block.compile()":
            block.compile()
            compiled = block
        else:
            compiled = torch.compile(block)
        layer = ReversibleFixedPoint(compiled, beta=0.8, max_steps=5, gradient=mode, drift_policy="raise")
        torch.manual_seed(1)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision.endswith("autocast")):
            z = layer(x).z
        z.float().square().sum().backward()
        assert layer.drift == 0
        gradients[mode] = [x.grad, *(p.grad for p in block.parameters())]
    # some are zero but for rounding, and an accelerator's sums are not repeated in their order
    least = 0.0 if device == "cpu" else 1e-3 * max(b.float().norm() for b in gradients["backprop"])
    for a, b in zip(*gradients.values(), strict=True):
        assert (a.float() - b.float()).norm() < (1e-5 if precision == "float32" else 5e-2) * max(b.float().norm(), least)


def text(labels: str) -> dict[str, torch.Tensor]:
    """Token ids, with labels for each token ("tokens") or for each text ("texts")."""
    ids = torch.randint(0, 64, (2, 16))
    return {"input_ids": ids, "labels": ids if labels == "tokens" else torch.tensor([0, 2])}


WIDTHS = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, max_steps=3, pad_token_id=0, num_labels=64)
MODELS = {
    "causal": (lambda: RevDEQForCausalLM(RevDEQConfig(**WIDTHS)), lambda: text("tokens")),
    "tokens": (lambda: RevDEQForTokenClassification(RevDEQConfig(**WIDTHS, is_causal=False)), lambda: text("tokens")),
    "texts": (lambda: RevDEQForSequenceClassification(RevDEQConfig(**WIDTHS)), lambda: text("texts")),
    "images": (
        lambda: RevDEQForImageClassification(RevDEQVisionConfig(hidden_sizes=[16, 32], expansion_ratios=[1, 1], num_labels=5, max_steps=2)),
        lambda: {"pixel_values": torch.randn(4, 3, 9, 8), "labels": torch.arange(4)},
    ),
    "grids": (
        lambda: RevDEQForSemanticSegmentation(
            RevDEQVisionConfig.dense_prediction(num_channels=3, num_labels=2, hidden_sizes=[16], max_steps=2, steps_sampling=None)
        ),
        lambda: {"pixel_values": torch.randn(2, 3, 7, 9), "labels": torch.randint(0, 2, (2, 7, 9))},
    ),
}


def test_a_whole_compiled_model_compiles_the_block_by_itself(device):
    torch.manual_seed(0)
    config = RevDEQConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, max_steps=3, drift_policy="raise")
    model = awake(RevDEQForCausalLM(config)).to(device)
    ids = torch.randint(0, 64, (2, 16), device=device)
    expected = model(ids, labels=ids).loss
    got = torch.compile(model)(ids, labels=ids).loss
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.backward()
    assert model.model.solve.drift == 0
    assert model.model.solve._compiled_block
    assert not any("_orig_mod" in name for name in model.state_dict())


def test_what_the_configuration_changes_reaches_a_compiled_model():
    torch._dynamo.reset()
    config = RevDEQConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, max_steps=2)
    model = awake(RevDEQForCausalLM(config)).eval()
    compiled, ids, seen = torch.compile(model, fullgraph=True, backend="eager"), torch.randint(0, 64, (2, 16)), []
    with torch.no_grad():
        for beta in (0.8, 0.5, 0.75):  # from the second value on, torch takes it for a number that changes
            model.config.beta = beta
            seen.append(compiled(ids).logits)
            assert torch.equal(seen[-1], model(ids).logits)
        assert not torch.equal(seen[0], seen[1])
        for name, value in (("damping", 1.5), ("tol", -1.0), ("keep_evaluations", -3)):
            usual = getattr(model.config, name)
            setattr(model.config, name, value)
            with pytest.raises(Exception, match=f"{name} must"):
                compiled(ids)
            setattr(model.config, name, usual)


@pytest.mark.parametrize("kind", [*MODELS, "causal, residual in the loss"])
def test_a_compiled_model_has_the_gradients_of_the_uncompiled_one(kind, device):
    """Parameter by parameter: torch 2.11 once lost all of them in a loss that was summed in place, and nothing told so."""
    torch.manual_seed(0)
    make, inputs = MODELS[kind.split(",")[0]]
    model, inputs = awake(make()).to(device), {name: value.to(device) for name, value in inputs().items()}
    residual = ResidualLoss(model) if "residual" in kind else None
    gradients = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        loss = call(**inputs).loss
        (loss if residual is None else loss + residual()).backward()
        assert all(layer.drift == 0 for _, layer in fixed_point_layers(model))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    for name, expected in gradients[0].items():
        assert expected.norm() > 0, name
        assert (gradients[1][name] - expected).norm() < 1e-4 * expected.norm(), name


@pytest.mark.parametrize("settings", [dict(max_steps=33), dict(tol=1e-3), dict(initial_scale=1.0)], ids=str)
@pytest.mark.parametrize("in_the_call", [False, True])
def test_what_cannot_be_written_out_compiles_the_block_by_itself(settings, in_the_call):
    block, x = make_block("convolution")
    asked = {name: settings[name] for name in ("max_steps", "tol") if in_the_call and name in settings}
    layer = ReversibleFixedPoint(block, beta=0.8, **{name: value for name, value in settings.items() if name not in asked}).eval()
    with torch.no_grad():
        expected = layer(x, **asked)
        found = torch.compile(layer, backend="aot_eager")(x, **asked)
    torch.testing.assert_close(found.z, expected.z, rtol=0, atol=1e-5)
    assert layer._compiled_block


def test_a_compiled_solve_in_training_mode_keeps_to_one_dropout_mask():
    layer = ReversibleFixedPoint(Chain(0.2), beta=0.8, max_steps=24).train()
    x = torch.randn(4, 64)
    with torch.no_grad():
        assert torch.compile(layer, backend="aot_eager")(x).residual.max() < 1e-5  # another mask would be another fixed point


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta", [0.5, 0.8, 1.2])
def test_arithmetic_compiled_to_one_kernel_gives_the_same_bits(beta, dtype, device):
    resolution = resolution_for(beta, dtype)
    torch.manual_seed(0)
    start = torch.randn(5, 7, 13, dtype=dtype, device=device)
    states = [ExactState.from_float(start, resolution, scratch=Scratch(fused=fused)) for fused in (False, True)]
    active = torch.tensor([True, False, True, True, False], device=device)
    for phase in range(resolution.segment):
        f = 50 * torch.randn_like(start)
        f[0, 0, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e4, -3e4])
        for state in states:
            state.advance(f, phase, active if phase % 2 else None)
        assert torch.equal(states[0].integers, states[1].integers)
        assert torch.equal(*(state.value(phase + 1, dtype) for state in states))
        rows = torch.arange(5, device=device) % (phase + 2)  # a phase for each row, as where rows stopped at different steps
        assert torch.equal(*(state.value(rows, dtype) for state in states))
    before = states[0].integers.clone()
    for state in states:
        state.advance(f, 0, active)
        state.retreat(f, 0, active)
        assert torch.equal(state.integers, before)


@pytest.mark.parametrize("tol", [None, 1e-2])
def test_a_compiled_block_with_compiled_arithmetic_is_reversed_exactly(tol, monkeypatch, device):
    torch.manual_seed(0)
    block, x = Chain(0.0).to(device), torch.randn(4, 32, 64, device=device, requires_grad=True)
    block.compile()
    found = []
    for unfused in ((device,), ()):
        monkeypatch.setattr("revdeq_hf.adjoint_revdeq.UNFUSED_DEVICES", unfused)
        layer = ReversibleFixedPoint(block, beta=0.8, max_steps=30, tol=tol, drift_policy="raise")
        z = layer(x).z
        (gradient,) = torch.autograd.grad(z.square().sum(), x)
        assert layer.drift == 0
        found.append((z.detach(), gradient))
    for plain, fused in zip(*found, strict=True):
        assert torch.equal(plain, fused)
