"""What a recomputation must find as it was: buffers, generators, parametrised and shared weights; and what it cannot work with."""

import copy
import itertools
import threading
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from conftest import AttentionBlock, make_block
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from revdeq_hf import ReversibleFixedPoint


class Parametrised(nn.Module):
    """Two linear layers that share a bias, with weights made by a parametrisation."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.bias = self.first.bias
        if kind == "weight norm":
            parametrizations.weight_norm(self.first)
        elif kind == "spectral norm":
            parametrizations.spectral_norm(self.first)
            parametrizations.spectral_norm(self.last)
        elif kind == "spectral norm by hooks":
            torch.nn.utils.spectral_norm(self.first)
        elif kind == "orthogonal":
            parametrizations.orthogonal(self.first)
        elif kind == "adapter":
            self.first = Adapter(self.first)

    def forward(self, z, x):
        return torch.tanh(self.last(torch.sin(self.first(z))) + x)


class Adapter(nn.Module):
    """A low-rank update of a frozen layer, as PEFT wraps it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["weight norm", "spectral norm", "spectral norm by hooks", "orthogonal", "adapter"])
def test_parametrised_shared_and_adapted_weights(kind, training):
    """All modes agree, drift is 0, and the buffers are where ONE call of the block leaves them."""
    torch.manual_seed(0)
    original, x = Parametrised(kind).train(training), torch.randn(3, 6, requires_grad=True)
    once = copy.deepcopy(original)
    once(torch.zeros(3, 6), x)
    results = []
    for gradient in ("reversible", "checkpoint", "backprop"):
        block = copy.deepcopy(original)
        layer = ReversibleFixedPoint(block, max_steps=4, gradient=gradient, drift_policy="raise")
        solution = layer(x)
        solution.z.square().sum().backward()
        for (name, buffer), expected in zip(block.named_buffers(), once.buffers(), strict=True):
            assert torch.equal(buffer, expected), name
        assert all((p.grad is not None) == p.requires_grad for p in block.parameters())
        results.append([solution.z, x.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
        x.grad = None
    for other in results[:2]:
        for a, b in zip(other, results[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_second_solve_does_not_disturb_the_reversal_of_the_first():
    """Spectral norm's vectors have moved on in between."""
    block = Parametrised("spectral norm")
    layer = ReversibleFixedPoint(block, max_steps=3, drift_policy="raise")
    x = torch.randn(2, 6)
    first, second = layer(x).z, layer(x).z
    assert not torch.equal(first, second), "the vectors did not move, and this proves nothing"
    after = [b.clone() for b in block.buffers()]
    (second.sum() + first.sum()).backward()
    assert all(torch.equal(a, b) for a, b in zip(after, block.buffers(), strict=True))


class Counting(nn.Module):
    """Counts its calls in a buffer and, as reckless code does, lets the count influence what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z, x):
        self.calls += 1
        return torch.tanh(self.linear(z) * (1 + 0.1 * torch.sin(self.calls.clone())) + x)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop", "implicit", "phantom"])
def test_a_solve_moves_buffers_on_as_one_call_does(gradient):
    layer = ReversibleFixedPoint(Counting(), max_steps=4, gradient=gradient, drift_policy="raise")
    x = torch.randn(2, 4)
    for calls in (1, 2):
        layer(x).z.sum().backward()
        assert layer.block.calls == calls
    assert all(p.grad is not None for p in layer.block.parameters())


class Averaging(nn.Module):
    """Keeps a running mean in a buffer that each call replaces by another tensor, or makes larger at first use, as observers of quantisation do."""

    def __init__(self, resized: bool) -> None:
        super().__init__()
        self.linear, self.resized = nn.Linear(4, 4), resized
        self.register_buffer("mean", torch.zeros(0) if resized else torch.zeros(4))

    def forward(self, z, x):
        h = torch.tanh(self.linear(z) + x)
        if self.resized:
            if not self.mean.numel():
                self.mean.resize_(4).zero_()
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        else:
            h = h * (1 + self.mean)  # which autograd keeps
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return 0.9 * h + 0.3 * torch.sin(self.mean.clone())


@pytest.mark.parametrize("resized", [False, True])
def test_buffers_that_are_replaced_or_resized_are_replayed(resized):
    found = []
    for gradient in ("backprop", "checkpoint", "reversible"):
        torch.manual_seed(0)
        layer = ReversibleFixedPoint(Averaging(resized), max_steps=6, gradient=gradient, drift_policy="raise")
        x = torch.randn(3, 4, requires_grad=True)
        for _ in range(2):
            layer(x).z.square().sum().backward()
        found.append([x.grad, layer.block.mean, *(parameter.grad for parameter in layer.parameters())])
    once = Averaging(resized)
    once.load_state_dict({**layer.block.state_dict(), "mean": once.mean})
    once(torch.zeros(3, 4), x)
    assert once.mean.shape == layer.block.mean.shape == (4,)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


class Observing(nn.Module):
    """Fake quantisation, whose fused kernel writes to buffers and leaves their versions as they are, or a running mean that is written to by `.data`."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.linear, self.fused = nn.Linear(4, 4), fused
        self.register_buffer("low", torch.tensor(float("inf") if fused else 0.0))
        self.register_buffer("high", torch.tensor(-float("inf")))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("on", torch.ones(1, dtype=torch.int64))
        self.register_buffer("unset", torch.tensor(float("nan")))

    def forward(self, z, x):
        h = self.linear(z) + x
        if self.fused:
            buffers = self.on, self.on, self.low, self.high, self.scale, self.zero_point
            return torch.tanh(
                torch.fused_moving_avg_obs_fake_quant(h, *buffers, averaging_const=0.3, quant_min=0, quant_max=15, ch_axis=-1)
            )
        self.low.data.lerp_(h.detach().mean(), 0.3)
        return torch.tanh(h * (1 + torch.sin(3 * self.low.clone())))


@pytest.mark.parametrize("fused", [True, False])
def test_buffers_that_are_written_to_without_a_new_version_are_replayed(fused):
    x, found = torch.randn(3, 4, requires_grad=True), []
    torch.manual_seed(0)
    original = Observing(fused)
    once = copy.deepcopy(original)
    version = once.low._version
    once(torch.zeros(3, 4), x)
    assert once.low._version == version, "its version tells, and this proves nothing"
    for gradient in ("backprop", "checkpoint", "reversible", "implicit"):
        layer = ReversibleFixedPoint(copy.deepcopy(original), max_steps=6, gradient=gradient, drift_policy="raise")
        losses = [layer(x).z.square().sum() for _ in range(2)]
        buffers = [buffer.clone() for buffer in layer.buffers()]
        assert not torch.equal(buffers[0], original.low)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(list(layer.buffers()), buffers, rtol=0, atol=0, equal_nan=True)
        found.append([x.grad, layer.block.low, *(parameter.grad for parameter in layer.parameters())])
        x.grad = None
    for other in found[1:3]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_law_5_buffers_that_a_block_writes_to_change_nothing_between_solves_with_and_without_gradients(fused, training):
    x = torch.randn(3, 4)
    torch.manual_seed(0)
    original, found = Observing(fused), []
    for wanted in (True, False):
        layer = ReversibleFixedPoint(copy.deepcopy(original), max_steps=4).train(training)
        with torch.set_grad_enabled(wanted):
            found.append([layer(x).z.detach(), layer.block.low.clone()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


class Late(nn.Module):
    """Makes a parameter in its first call, as torchao's fake quantisation of learned ranges does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), None

    def forward(self, z, x):
        if self.scale is None:
            self.scale = nn.Parameter(self.linear.weight.detach().abs().max())
        return torch.tanh(self.linear(z) / self.scale + x)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
def test_parameters_that_the_first_call_makes_are_told(gradient):
    layer, x = ReversibleFixedPoint(Late(), max_steps=3, gradient=gradient, drift_policy="raise"), torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="belongs before the solve"):
        layer(x).z.sum().backward()
    layer.block.scale = None
    with torch.no_grad():
        layer.block(torch.zeros(2, 4), x)
    layer(x).z.sum().backward()
    assert layer.block.scale.grad != 0


def test_optimizers_that_step_within_the_backward_pass_train_the_same_in_all_modes():
    """As LOMO and layer-wise GaLore do; the layer stands between two others, and is called twice."""

    def step(parameter: nn.Parameter) -> None:
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    trained, x = [], torch.randn(3, 7, 16)
    for gradient in ("backprop", "checkpoint", "reversible"):
        torch.manual_seed(0)
        block, _ = make_block("attention")
        before, layer, after = (
            nn.Linear(16, 16),
            ReversibleFixedPoint(block, max_steps=3, gradient=gradient, drift_policy="raise"),
            nn.Linear(16, 16),
        )
        parameters = [*before.parameters(), *block.parameters(), *after.parameters()]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            after(layer(layer(before(x)).z).z).square().mean().backward()
        assert all(parameter.grad is None for parameter in parameters)
        trained.append(parameters)
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0], rtol=1e-5, atol=1e-6)


def hook_once(module: nn.Module, calls: list) -> None:
    handle = module.register_forward_hook(lambda *_: calls.append(handle.remove()))


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "implicit"])
def test_hooks_removed_between_the_passes_are_met_again(gradient):
    """Hooks that steer what a module gets or returns, removed before the backward pass, as peft removes those of aLoRA; and one that removes itself."""
    x, found, calls, later = torch.randn(3, 7, 16), [], [], []
    for removed in (False, True):
        block, _ = make_block("attention")
        layer = ReversibleFixedPoint(block, max_steps=3, gradient=gradient, drift_policy="raise")
        hook_once(block.down, calls)
        steering = [
            block.up.register_forward_hook(lambda module, given, value: value + 0.5),
            block.out.register_forward_pre_hook(lambda module, given, named: ((1.3 * given[0],), named), with_kwargs=True),
        ]
        loss = layer(x).z.square().sum()
        assert len(calls) == removed + 1
        if removed:
            for handle in steering:
                handle.remove()
            block.up.register_forward_hook(lambda module, given, value: later.append(value))
        loss.backward()
        found.append([parameter.grad for parameter in block.parameters()])
    assert len(calls) == 2
    assert later, "a hook registered since sees the evaluations of the backward pass"
    assert not block.out._forward_pre_hooks
    assert not block.out._forward_pre_hooks_with_kwargs
    assert len(block.up._forward_hooks) == 1
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
def test_hooks_whose_dict_was_replaced_are_met_again_and_probes_that_remove_themselves_stay_gone(gradient):
    x, found, calls = torch.randn(3, 7, 16), [], []
    for replaced in (False, True):
        block, _ = make_block("attention")
        layer = ReversibleFixedPoint(block, max_steps=3, gradient=gradient, drift_policy="raise")
        block.up.register_forward_hook(lambda module, given, value: value + 0.5)
        handle = block.out.register_forward_hook(lambda module, given, value: 1.3 * value)
        loss = layer(x).z.square().sum()
        if replaced:
            block.up._forward_hooks = OrderedDict()
            handle.remove()
            hook_once(block.out, calls)
        loss.backward()
        found.append([parameter.grad for parameter in block.parameters()])
    assert not block.up._forward_hooks
    assert not block.out._forward_hooks
    assert len(calls) == 1
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    "buffer", [torch.empty(3, device="meta"), torch.zeros(3, dtype=torch.uint8).view(torch.bits8)], ids=["meta", "bits"]
)
def test_buffers_that_cannot_be_compared_are_left_alone(buffer):
    block, x = make_block("attention")[0], torch.randn(3, 7, 16)
    block.register_buffer("idle", buffer)
    ReversibleFixedPoint(block, max_steps=3, drift_policy="raise")(x).z.sum().backward()


class Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.norm = nn.LSTM(32, 32, batch_first=True), nn.LayerNorm(32)

    def forward(self, z, x):
        return self.norm(self.lstm(z)[0] + x)


class Biased(nn.Module):
    """Attention with a learned bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.qkv, self.norm = nn.Parameter(torch.randn(1, 4, 7, 7)), nn.Linear(32, 96), nn.LayerNorm(32)

    def forward(self, z, x):
        q, k, v = (part.view(len(z), 7, 4, 8).transpose(1, 2) for part in self.qkv(z).chunk(3, -1))
        h = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.to(q.dtype))
        return self.norm(h.transpose(1, 2).flatten(2) + x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.TransformerEncoderLayer(32, 2, 32, batch_first=True), nn.LayerNorm(32)

    def forward(self, z, x):
        return self.norm(self.layer(z) + x)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, z, x):
        return torch.tanh(self.linear(self.norm(z + x)))


class Inner(nn.Module):
    """A fixed point within the block, whose rows stop one by one: without gradients they leave it, and with them they stay."""

    def __init__(self) -> None:
        super().__init__()
        self.solve = ReversibleFixedPoint(Normed(), max_steps=30, tol=0.01)
        self.linear = nn.Linear(32, 32)

    def forward(self, z, x):
        return torch.tanh(self.linear(self.solve((z + x).flatten(0, 1)).z)).view_as(x)


# torch's LSTM does not run under the CPU's autocast
@pytest.mark.parametrize(("kind", "autocast"), [(Memory, False), *itertools.product([Biased, Encoder, Inner], [False, True])])
def test_kernels_that_depend_on_whether_there_is_a_graph(kind, autocast):
    """torch takes others where nothing wants a gradient, and the reversal would then meet another map than the forward pass."""
    found = []
    for gradient in ("backprop", "checkpoint", "reversible"):
        torch.manual_seed(0)
        layer = ReversibleFixedPoint(kind(), max_steps=12, gradient=gradient, drift_policy="raise").train(kind is not Encoder)
        x = torch.randn(9, 7, 32, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            z = layer(x).z
        z.square().sum().backward()
        assert layer.drift == 0
        found.append([z, x.grad, *(parameter.grad for parameter in layer.parameters())])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


class Failing(nn.Module):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.linear, self.at = nn.Linear(4, 4), at
        self.register_buffer("calls", torch.zeros(()))
        self.count = 0

    def forward(self, z, x):
        self.count += 1
        self.calls += 1
        out = nn.functional.dropout(self.linear(z) + x, 0.2)
        if self.count == self.at:
            raise KeyError("from inside the block")
        return torch.tanh(out)


@pytest.mark.parametrize("at", [1, 2, 5, 10])
@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop"])
def test_a_block_that_raises_in_the_middle_leaves_everything_as_it_was(gradient, at):
    layer = ReversibleFixedPoint(Failing(at), max_steps=4, gradient=gradient)
    x = torch.randn(2, 4, requires_grad=True)
    before = torch.get_rng_state()
    if at <= 8:
        with pytest.raises(KeyError, match="from inside"):
            layer(x)
        assert layer.block.calls == 0
    else:
        z = layer(x).z
        before = torch.get_rng_state()
        if gradient == "backprop":
            return z.sum().backward()  # no evaluation left to fail in
        with pytest.raises(KeyError, match="from inside"):
            z.sum().backward()
        assert layer.block.calls == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert x.grad is None
    assert layer.block.linear.weight.grad is None


class Interrupted(nn.Module):
    """Random numbers are drawn while it runs, in another thread; with `dropout` by itself as well, in evaluation too."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner, self.dropout, self.drawn = AttentionBlock(), dropout, []

    def draw(self) -> None:
        self.drawn.append(torch.rand((), dtype=torch.float64).item())

    def forward(self, z, x):
        thread = threading.Thread(target=self.draw)
        thread.start()
        thread.join()
        return nn.functional.dropout(self.inner(z, x), self.dropout)


def test_a_solve_does_not_take_back_what_other_threads_draw():
    layer = ReversibleFixedPoint(Interrupted(0.0), max_steps=5).eval()
    with torch.no_grad():
        layer(torch.randn(2, 7, 16))
    assert len(set(layer.block.drawn)) == len(layer.block.drawn) == 11  # ten evaluations, and one that finds out who draws


class Scaled(nn.Module):
    """Its buffer is one that a user, and no evaluation, changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 6), nn.Dropout(0.3)
        self.register_buffer("scale", torch.ones(6))

    def forward(self, z, x):
        return torch.tanh(0.5 * self.drop(self.linear(z)) * self.scale + x)


@pytest.mark.parametrize(("gradient", "keep"), [("checkpoint", 0), ("implicit", 1)])  # with a graph that is kept torch tells
def test_law_9_a_buffer_that_changed_between_the_passes_is_told(gradient, keep):
    layer = ReversibleFixedPoint(Scaled(), max_steps=3, gradient=gradient, keep_evaluations=keep)
    loss = layer(torch.randn(4, 6)).z.square().sum()
    with torch.no_grad():
        layer.block.scale.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"buffer 'scale' of shape .* of the block's Scaled has been changed between"):
        loss.backward()


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop", "implicit"])
def test_a_buffer_replaced_between_the_passes_is_that_of_the_forward_pass_again(gradient):
    x, gradients = torch.randn(4, 6), []
    layer = ReversibleFixedPoint(Scaled().eval(), max_steps=3, gradient=gradient, drift_policy="raise")
    for replaced in (False, True):
        layer.zero_grad()
        loss = layer(x).z.square().sum()
        if replaced:
            layer.block.scale = other = layer.block.scale * 0.5
        loss.backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    assert layer.block.scale is other
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


class Watching(nn.Module):
    """Keeps the greatest value that it has met, which changes nothing of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("peak", torch.zeros(()))

    def forward(self, z, x):
        with torch.no_grad():
            if z.abs().max() > self.peak:
                self.peak.copy_(z.abs().max())
        return torch.tanh(0.5 * self.linear(z) + x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "implicit"])
def test_a_buffer_that_evaluations_change_and_nothing_reads_is_no_matter(gradient, training):
    layer = ReversibleFixedPoint(Watching(), max_steps=4, gradient=gradient, keep_evaluations=1, drift_policy="raise").train(training)
    layer(torch.randn(4, 6)).z.sum().backward(retain_graph=True)
    assert layer.block.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop", "implicit"])
def test_a_replay_leaves_no_trace_for_other_solves(gradient, first):
    """One solve moves the buffers of a spectral norm, the other does not; either may be gone back through first."""
    layer = ReversibleFixedPoint(Parametrised("spectral norm"), max_steps=3, gradient=gradient, drift_policy="raise")
    x = torch.randn(4, 6)
    losses = [layer.train(training)(x).z.square().sum() for training in (True, False)]
    losses[first].backward()
    losses[1 - first].backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "implicit"])
def test_law_1_a_switch_between_training_and_evaluation_does_not_reach_a_backward_pass(gradient, training):
    x, gradients = torch.randn(4, 6), []
    layer = ReversibleFixedPoint(Scaled(), max_steps=3, gradient=gradient, drift_policy="raise")
    for switched in (False, True):
        layer.train(training)
        layer.zero_grad()
        torch.manual_seed(7)
        loss = layer(x).z.square().sum()
        layer.train(training != switched)
        loss.backward()
        assert layer.block.drop.training == (training != switched)
        gradients.append([parameter.grad for parameter in layer.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "implicit"])
def test_a_block_that_switches_its_own_modules_keeps_them_so(gradient):
    class Switching(Scaled):
        def forward(self, z, x):
            self.drop.eval()
            return super().forward(z, x)

    layer = ReversibleFixedPoint(Switching(), max_steps=3, gradient=gradient)
    loss = layer(torch.randn(4, 6)).z.sum()
    assert not layer.block.drop.training
    loss.backward()
    assert not layer.block.drop.training


def test_one_mask_of_dropout_in_evaluation_too():
    layer = ReversibleFixedPoint(Interrupted(0.3), max_steps=40, beta=0.5).eval()
    with torch.no_grad():
        solution = layer(torch.randn(2, 7, 16))
    assert solution.residual.max() < 0.1  # with a mask for each evaluation it would be about 0.5


def test_hooks_of_the_block_fire_at_every_evaluation():
    block, x = make_block("attention")
    counts = {"pre": 0, "forward": 0, "backward": 0}
    block.register_forward_pre_hook(lambda *_: counts.__setitem__("pre", counts["pre"] + 1))
    block.register_forward_hook(lambda *_: counts.__setitem__("forward", counts["forward"] + 1))
    block.register_full_backward_hook(lambda *_: counts.__setitem__("backward", counts["backward"] + 1))
    layer = ReversibleFixedPoint(block, max_steps=3, keep_evaluations=0)
    z = layer(x).z
    assert counts == {"pre": 6, "forward": 6, "backward": 0}
    z.sum().backward()
    assert counts == {"pre": 12, "forward": 12, "backward": 6}
    assert layer.drift == 0


def test_a_hook_that_changes_the_output_changes_the_map():
    block, x = make_block("attention")
    handle = block.register_forward_hook(lambda module, args, output: 0.5 * output)
    results = []
    for gradient in ("reversible", "backprop"):
        layer = ReversibleFixedPoint(block, max_steps=3, gradient=gradient, drift_policy="raise")
        z = layer(x).z
        results.append((z, torch.autograd.grad(z.square().sum(), x)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    handle.remove()
    assert not torch.equal(layer(x).z, z)


class Changes(nn.Module):
    def __init__(self, change) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(4, 4), change

    def forward(self, z, x):
        return self.change(self.linear, z, x)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop"])
@pytest.mark.parametrize(
    "view",
    [
        lambda linear, z, x: z,
        lambda linear, z, x: z.view(-1).view(z.shape),
        lambda linear, z, x: x.expand_as(z),
        lambda linear, z, x: linear(x).flip(0).flip(0).T.T,
    ],
    ids=["z itself", "view of z", "view of x", "strided"],
)
def test_a_block_that_returns_a_view_of_its_input(view, gradient):
    layer = ReversibleFixedPoint(Changes(view), max_steps=3, gradient=gradient, drift_policy="raise")
    z0, x = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    kept = z0.detach().clone(), x.detach().clone()
    solution = layer(x, z0=z0)
    y = z = kept[0]
    for _ in range(3):
        y = 0.2 * y + 0.8 * view(layer.block.linear, z, kept[1])
        z = 0.2 * z + 0.8 * view(layer.block.linear, y, kept[1])
    torch.testing.assert_close(solution.z, z, rtol=0, atol=1e-5)
    solution.z.sum().backward()
    assert torch.equal(z0, kept[0])
    assert torch.equal(x, kept[1])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "change", [lambda linear, z, x: z.add_(x), lambda linear, z, x: linear(x.mul_(0.9)), lambda linear, z, x: linear(z).add_(x.neg_())]
)
def test_a_block_that_changes_its_input_in_place_is_refused(change, grad):
    layer = ReversibleFixedPoint(Changes(change), max_steps=3)
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError), match=r"in.place"):
        layer(torch.randn(2, 4)).z.sum().backward()


def test_transforms_of_torch_func_are_refused_and_functional_call_works_where_all_is_stored():
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, max_steps=2)
    for transform in (
        lambda: torch.func.grad(lambda t: layer(t).z.sum())(x),
        lambda: torch.func.vmap(lambda t: layer(t).z)(x[None]),
        lambda: torch.func.jvp(lambda t: layer(t).z, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            transform()
    swapped = {f"block.{name}": parameter.detach().mul(0.5).requires_grad_() for name, parameter in block.named_parameters()}
    stored = ReversibleFixedPoint(block, max_steps=2, gradient="backprop")
    torch.func.functional_call(stored, swapped, (x,)).z.sum().backward()
    assert all(parameter.grad is not None for parameter in swapped.values())
    assert all(parameter.grad is None for parameter in block.parameters())
    for gradient in ("reversible", "checkpoint", "implicit"):  # a recomputation after the call would meet the block's own weights
        layer = ReversibleFixedPoint(block, max_steps=2, gradient=gradient)
        out = torch.func.functional_call(layer, swapped, (x,)).z.sum()
        with pytest.raises(RuntimeError, match="functional_call"):
            out.backward()


def test_a_cache_of_parametrised_weights_is_refused_with_gradients():
    layer = ReversibleFixedPoint(Parametrised("weight norm"), max_steps=2)
    with parametrize.cached():
        with pytest.raises(RuntimeError, match=r"cached\(\)"):
            layer(torch.randn(2, 6))
        with torch.no_grad():
            layer(torch.randn(2, 6))


def test_rows_of_positions_stop_by_themselves():
    """row_dims=2: a causal block's position stops as it would if the positions after it were not there."""
    torch.manual_seed(0)
    block = AttentionBlock()
    for parameter in block.parameters():
        parameter.data.mul_(0.8)
    x = torch.randn(3, 9, 16) * torch.logspace(-2, 1, 9)[torch.randperm(9)][None, :, None]
    layer = ReversibleFixedPoint(block, max_steps=60, tol=1e-4, row_dims=2)
    whole = layer(x)
    assert whole.steps.shape == whole.residual.shape == whole.clamped.shape == (3, 9)
    assert len(set(whole.steps.flatten().tolist())) > 2
    assert (whole.residual <= 1e-4).all()
    assert repr(whole).startswith("FixedPointSolution(batch=3x9, steps=")
    for end in (1, 4, 8):
        start = layer(x[:, :end])
        assert torch.equal(start.steps, whole.steps[:, :end])
        torch.testing.assert_close(start.z, whole.z[:, :end], rtol=1e-5, atol=1e-6)
    x.requires_grad_()
    results = []
    for gradient in ("reversible", "backprop"):
        layer = ReversibleFixedPoint(block, max_steps=40, tol=1e-3, row_dims=2, gradient=gradient, drift_policy="raise")
        results.append(torch.autograd.grad(layer(x).z.square().sum(), [x, *block.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Mixed(nn.Module):
    """A state of two tensors with other numbers of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, z, x):
        flat, deep = z
        return torch.tanh(self.down(deep.mean(1)) + x[0]), torch.tanh(self.up(flat)[:, None] + x[1])


def test_rows_of_states_with_other_numbers_of_dimensions():
    block = Mixed()
    x = torch.randn(3, 4, requires_grad=True), torch.randn(3, 5, 6, requires_grad=True)
    scale = torch.tensor([0.01, 1.0, 3.0])
    results = []
    for gradient in ("reversible", "backprop"):
        layer = ReversibleFixedPoint(block, beta=0.7, max_steps=30, tol=1e-2, gradient=gradient, drift_policy="raise")
        solution = layer((x[0] * scale[:, None], x[1] * scale[:, None, None]))
        assert len(set(solution.steps.tolist())) > 1
        results.append(torch.autograd.grad(sum(part.square().sum() for part in solution.z), [*x, *block.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_row_dims_are_checked():
    with pytest.raises(ValueError, match="row_dims"):
        ReversibleFixedPoint(nn.Linear(2, 2), row_dims=3)
    with pytest.raises(ValueError, match=r"\(batch, positions, \.\.\.\)"):
        ReversibleFixedPoint(nn.Linear(2, 2), row_dims=2)(torch.randn(3))


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@pytest.mark.parametrize("around_forward", [True, False])
def test_the_backward_pass_has_the_autocast_of_the_forward_pass(gradient, around_forward):
    """A layer in float32 inside a program in bfloat16 that calls backward() under its own autocast, and the other way round."""
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, max_steps=8, drift_policy="raise")
    results = []
    for mode in (gradient, "backprop"):
        with torch.autocast("cpu", torch.bfloat16, enabled=around_forward):
            loss = layer(x, gradient=mode).z.square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=not around_forward):
            results.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert layer.drift == 0


class Pair(NamedTuple):
    scale: torch.Tensor
    name: str


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop"])
def test_context_in_named_tuples_and_ordered_dicts_gets_gradients(gradient):
    class Scaled(nn.Module):
        def forward(self, z, x, pair, more):
            assert pair.name == "a"
            return 0.5 * torch.tanh(z * pair.scale + x * more["shift"])

    layer = ReversibleFixedPoint(Scaled(), max_steps=4, gradient=gradient)
    scale, shift = (torch.full((4,), value, requires_grad=True) for value in (0.7, 1.3))
    layer(torch.randn(2, 4), Pair(scale, "a"), OrderedDict(shift=shift)).z.sum().backward()
    assert scale.grad.abs().sum() > 0
    assert shift.grad.abs().sum() > 0


def test_a_hidden_input_is_told_in_every_solve():
    """Not in the first one of a layer only: what a block uses may change, and it would get no gradient without a word."""
    outside = torch.ones(4)
    layer = ReversibleFixedPoint(Changes(lambda linear, z, x: torch.tanh(linear(z) + x) * outside), max_steps=2)
    layer(torch.randn(2, 4)).z.sum().backward()
    outside = torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="neither one of its parameters nor one of its arguments"):
        layer(torch.randn(2, 4)).z.sum().backward()


class Stamps:
    """A compiler whose programs tell themselves apart: the n-th adds n / 1000 to what it returns."""

    def __init__(self) -> None:
        self.programs = 0

    def __call__(self, graph, examples):
        self.programs += 1
        stamp = self.programs / 1000
        return lambda *inputs: tuple(part + stamp for part in graph(*inputs))


def test_stages_of_one_class_keep_to_their_own_programs():
    """torch.compile would give blocks of the same class one program for any shape, from the third stage on, and that to earlier stages in the backward pass."""
    torch._dynamo.reset()
    stamps = Stamps()
    layers = [ReversibleFixedPoint(make_block("convolution")[0], beta=0.8, max_steps=3, drift_policy="raise") for _ in range(4)]
    for layer in layers:
        layer.compile(backend=stamps)
    for _ in range(2):
        h = torch.randn(2, 8, 16, 16, requires_grad=True)
        for layer in layers:
            h = torch.nn.functional.avg_pool2d(h + layer(h).z, 2)
        h.sum().backward()
        assert [layer.drift.item() for layer in layers] == [0.0] * 4
    assert stamps.programs == 4


@pytest.mark.parametrize(("settings", "programs"), [({}, 2), ({"dynamic": True}, 1), ({"dynamic": False}, 3)], ids=str)
def test_calls_of_other_shapes_in_between_change_no_program(settings, programs):
    torch._dynamo.reset()
    stamps = Stamps()
    block, _ = make_block("convolution")
    layer = ReversibleFixedPoint(block, beta=0.8, max_steps=3, drift_policy="raise")
    layer.compile(backend=stamps, **settings)
    sizes = (5, 6, 7)
    solved = [layer(torch.randn(3, 8, size, size, requires_grad=True)).z.sum() for size in (*sizes, *sizes)]
    for loss in (*solved[::2], *solved[1::2]):
        loss.backward()  # raises where a program is not that of the forward pass
    assert stamps.programs == programs


def test_a_copy_of_a_compiled_layer_compiles_its_own_block():
    torch._dynamo.reset()
    block, x = make_block("convolution")
    layer = ReversibleFixedPoint(block, beta=0.8, max_steps=3, drift_policy="raise")
    layer.compile(backend="eager")
    before = layer(x).z
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert torch.equal(copied(x).z, before)
    assert not torch.equal(layer(x).z, before)
    copied(x).z.sum().backward()
    assert all(parameter.grad is not None for parameter in copied.block.parameters())
    assert all(parameter.grad is None for parameter in block.parameters())
    layer.block = copied.block  # a block put in its place is compiled, too
    assert torch.equal(layer(x).z, before)
