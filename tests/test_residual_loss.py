"""`ResidualLoss`: what is measured, its gradient through the solve, and when it cannot be had."""

import copy
import pickle

import pytest
import torch
from conftest import awake
from torch import nn
from torch.linalg import vector_norm
from transformers import DynamicCache

from revdeq_hf import (
    ResidualLoss,
    RevDEQConfig,
    RevDEQForCausalLM,
    RevDEQForImageClassification,
    RevDEQModel,
    RevDEQVisionConfig,
    ReversibleFixedPoint,
)


class Block(nn.Module):
    """Its calls are counted."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.calls = 0

    def forward(self, z, x, shift=0.0):
        self.calls += 1
        return torch.tanh(self.linear(z) + x + shift)


def relative(f, z, dim):
    return vector_norm(f - z, dim=dim) / vector_norm(f, dim=dim)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_each_place_counts_by_itself_and_the_gradient_goes_through_the_solve():
    torch.manual_seed(0)
    layer, x = ReversibleFixedPoint(Block(), max_steps=3), torch.randn(4, 5, 6)
    residual = ResidualLoss(layer)
    layer(x, shift=0.3)
    found = residual()
    exact = gradients(layer, found)
    assert layer.drift == 0.0
    z = layer(x, shift=0.3, gradient="backprop").z
    by_hand = relative(layer.block(z, x, shift=0.3), z, -1)
    assert by_hand.shape == (4, 5)
    torch.testing.assert_close(found, by_hand.mean(), rtol=1e-4, atol=0)
    for one, other in zip(exact, gradients(layer, by_hand.mean()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    squares = vector_norm(layer.block(z, x, shift=0.3) - z) ** 2 / vector_norm(z) ** 2
    assert found > 2 * squares  # the mean of the places is another measure than the square of the whole


def test_what_a_mask_leaves_out_does_not_count():
    torch.manual_seed(0)
    layer, x = ReversibleFixedPoint(Block(), max_steps=2), torch.randn(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    residual = ResidualLoss(layer)
    z = layer(x, measure_mask=mask).z
    torch.testing.assert_close(residual(), relative(layer.block(z, x), z, -1)[mask].mean(), rtol=1e-4, atol=0)


def test_where_no_place_counts_it_is_zero():
    layer = ReversibleFixedPoint(Block(), max_steps=2)
    residual = ResidualLoss(layer)
    layer(torch.randn(2, 5, 6), measure_mask=torch.zeros(2, 5, dtype=torch.bool))
    assert residual() == 0
    layer(torch.randn(0, 5, 6))
    assert residual() == 0


class Pair(nn.Module):
    """Two layers, of which the second may be left out, or the first used again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (ReversibleFixedPoint(Block(), max_steps=2) for _ in range(2))

    def forward(self, x, then: str = "second"):
        z = self.first(x).z
        return z if then == "nothing" else getattr(self, then)(z).z


def test_it_is_that_of_the_last_call_with_all_its_solves():
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(3, 6)
    residual = ResidualLoss(model)
    model(x)
    model(x, then="nothing").sum().backward()  # the second layer's solve is of an earlier call, whose graph may be gone
    z = model.first(x).z
    torch.testing.assert_close(residual(), relative(model.first.block(z, x), z, -1).mean(), rtol=1e-4, atol=0)
    model(x, then="first")
    again = model.first(z).z
    expected = relative(model.first.block(z, x), z, -1).mean(), relative(model.first.block(again, z), again, -1).mean()
    model(x, then="first")
    torch.testing.assert_close(residual(), torch.stack(expected).mean(), rtol=1e-4, atol=0)


def test_copies_of_the_model_are_not_measured():
    model, x = Pair(), torch.randn(3, 6)
    residual = ResidualLoss(model)
    model(x)
    # the last one reads bytes made a moment before
    for copied in (copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model).module, pickle.loads(pickle.dumps(model))):
        calls = copied.first.block.calls
        copied(x)
        assert copied.first.block.calls == calls + 4
    assert residual() > 0
    residual.remove()
    model(x)
    with pytest.raises(RuntimeError, match="no solve to measure"):
        residual()


def test_states_of_several_tensors():
    class Pair(nn.Module):
        def forward(self, z, x):
            return torch.tanh(0.5 * z[0] + x[0]), torch.tanh(0.3 * z[1] + x[1])

    x = torch.randn(2, 3), torch.randn(2, 4, 3)
    layer = ReversibleFixedPoint(Pair(), max_steps=2)
    residual = ResidualLoss(layer)
    z = layer(x).z
    f = layer.block(z, x)
    torch.testing.assert_close(
        residual(), torch.stack([relative(a, b, -1).mean() for a, b in zip(f, z, strict=True)]).mean(), rtol=1e-4, atol=0
    )


def test_every_layer_of_an_image_model_counts_alike_and_channels_are_those_of_grids():
    torch.manual_seed(0)
    config = RevDEQVisionConfig(num_channels=3, hidden_sizes=[8, 16], expansion_ratios=[1, 2], group_width=8, num_labels=4, max_steps=2)
    model = RevDEQForImageClassification(config)
    residual = ResidualLoss(model)
    seen = []
    for stage in model.model.stages:
        stage.register_forward_hook(lambda layer, args, solution: seen.append(relative(layer.block(solution.z, *args), solution.z, 1)))
    loss = model(torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 3])).loss
    torch.testing.assert_close(residual(), torch.stack([part.mean() for part in seen]).mean(), rtol=1e-4, atol=0)
    assert len(seen) == len(model.model.stages) > 1
    assert loss.isfinite()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_language_model_learns_to_converge(compiled):
    """Of the same labels the solves come to rest sooner where their residual is in the loss."""

    def train(weight: float) -> float:
        torch.manual_seed(0)
        sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_attention_heads=2)
        model = RevDEQForCausalLM(RevDEQConfig(**sizes, beta=0.8, max_steps=3))
        residual = ResidualLoss(model)
        call = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.randint(0, 32, (4, 16), generator=torch.Generator().manual_seed(1))
        for _ in range(30):
            loss = call(input_ids=ids, labels=ids).loss + weight * residual()
            optimizer.zero_grad()
            loss.backward()
            assert model.model.solve.drift == 0.0
            optimizer.step()
        with torch.no_grad():
            model(input_ids=ids)
        return model.model.solve.statistics.residual.mean().item()

    assert train(5.0) < 0.7 * train(0.0)


@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_does_not_count(is_causal):
    config = RevDEQConfig(vocab_size=31, hidden_size=16, intermediate_size=16, num_attention_heads=2, max_steps=2, is_causal=is_causal)
    model = awake(RevDEQModel(config), std=0.5).train()
    residual, ids = ResidualLoss(model), torch.randint(31, (2, 6))
    model(ids)
    alone = residual()
    for padding in ((0, 5), (5, 0)):
        mask = torch.nn.functional.pad(torch.ones_like(ids), padding)
        model(torch.nn.functional.pad(ids, padding), attention_mask=mask)
        torch.testing.assert_close(residual(), alone)


def test_recorded_layers_are_those_of_the_solve():
    settings = dict(num_coda_layers=1, attn_implementation="eager")
    config = RevDEQConfig(vocab_size=31, hidden_size=16, intermediate_size=16, num_attention_heads=2, max_steps=2, **settings)
    model, ids = awake(RevDEQModel(config)).train(), torch.randint(31, (2, 6))
    alone = model(ids, output_hidden_states=True, output_attentions=True)
    residual = ResidualLoss(model)
    measured = model(ids, output_hidden_states=True, output_attentions=True)
    assert residual() > 0
    for name in ("hidden_states", "attentions"):
        for one, other in zip(alone[name], measured[name], strict=True):
            assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="use_cache=False"):
        model(ids, past_key_values=DynamicCache(config=config))


def test_it_costs_nothing_without_gradients_or_once_removed():
    layer, x = ReversibleFixedPoint(Block(), max_steps=2), torch.randn(2, 6)
    residual = ResidualLoss(layer)
    with torch.no_grad():
        layer(x)
    assert layer.block.calls == 4
    layer(x)
    assert layer.block.calls == 4 + 4 + 1
    residual()
    residual.remove()
    layer(x)
    assert layer.block.calls == 9 + 4
    with pytest.raises(RuntimeError, match="call the model with gradients before each call of ResidualLoss"):
        residual()


def test_what_cannot_be_measured_is_said():
    with pytest.raises(ValueError, match="Linear has no ReversibleFixedPoint"):
        ResidualLoss(nn.Linear(2, 2))


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_under_ddp_the_gradient_is_the_same(process_group):
    """The block is met twice in the graph, once outside of what DDP sees as the output; the residual's part must not be missing from what is reduced."""
    torch.manual_seed(0)
    layer, x = ReversibleFixedPoint(Block(), max_steps=2), torch.randn(2, 6)
    residual, found = ResidualLoss(layer), {}
    for weight in (0.0, 3.0):
        for model in (layer, nn.parallel.DistributedDataParallel(layer)):
            found[model is layer, weight] = gradients(model, model(x).z.square().mean() + weight * residual())
    for weight in (0.0, 3.0):
        assert all(torch.equal(a, b) for a, b in zip(found[True, weight], found[False, weight], strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(found[True, 0.0], found[True, 3.0], strict=True))


def test_under_fsdp2_it_is_refused(process_group):
    """Its evaluation of a block would meet shards, or take the place of the solve's hooks."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(ReversibleFixedPoint(Block(), max_steps=2))
    ResidualLoss(model)
    for module in (model[0], model):
        fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(RuntimeError, match="which FSDP2 and DeepSpeed's ZeRO-3 shard as a whole; train with DDP or ZeRO-2"):
        model(torch.randn(2, 6))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.linear = ReversibleFixedPoint(Block(), max_steps=2), nn.Linear(6, 6)

    def forward(self, z, x):
        return torch.tanh(self.linear(self.inner(z + x).z))


@pytest.mark.parametrize("tol", [None, 1e-9])
def test_a_solve_within_a_solve_is_part_of_the_block(tol):
    torch.manual_seed(0)
    layer, x, found = ReversibleFixedPoint(Outer(), max_steps=3, tol=tol), torch.randn(4, 6), []
    residual = ResidualLoss(layer)
    for gradient in ("reversible", "backprop"):
        z = layer(x, gradient=gradient).z
        assert len(residual._measured) == 1
        loss = residual()
        torch.testing.assert_close(loss, relative(layer.block(z, x), z, -1).mean(), rtol=1e-3, atol=0)
        found.append(gradients(layer, loss + z.sum()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
