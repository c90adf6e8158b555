"""How far the gradients of each way back are from stored backpropagation, on the real language model and a batch of real text.

`exact` is this package's reversal; `float32` and `float64` are the published algebraic reversal with states of that precision. For each: the
relative error of all parameter gradients together against backpropagation through the very same iteration, and the drift, the
greatest absolute difference between the reconstructed and the true start state.

    python benchmarks/gradients.py            # 4 and 8 steps
    python benchmarks/gradients.py --steps 4 8 16 32
"""

import argparse
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from common import keep
from torch import nn

from revdeq_hf import FixedPointSolution, RevDEQConfig, RevDEQForCausalLM, ReversibleFixedPoint


def float_iteration(
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, beta: float, steps: int, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The iteration from zero with states in floating point of dtype `wide`; returns the pair (y, z)."""
    y = z = torch.zeros_like(x, dtype=wide)
    for _ in range(steps):
        y = (1 - beta) * y + beta * call(z.to(x.dtype), x).to(wide)
        z = (1 - beta) * z + beta * call(y.to(x.dtype), x).to(wide)
    return y, z


class FloatReversal(torch.autograd.Function):
    """The reversal as published: `z = (z' - beta f(y', x)) / (1 - beta)` in floating point."""

    drift = 0.0  # of the last backward pass

    @staticmethod
    def forward(ctx, call, x, beta, steps, wide, *parameters):
        y, z = float_iteration(call, x, beta, steps, wide)
        ctx.save_for_backward(x, y, z)
        ctx.settings = call, beta, steps, parameters
        return z.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, y, z = ctx.saved_tensors
        call, beta, steps, parameters = ctx.settings
        gz, gy = gradient.to(y.dtype), torch.zeros_like(y)
        sums = [torch.zeros_like(t) for t in (x, *parameters)]

        def pull(state, weight):
            with torch.enable_grad():
                s, leaf = state.to(x.dtype).requires_grad_(), x.detach().requires_grad_()
                f = call(s, leaf)
            first, *rest = torch.autograd.grad(f, [s, leaf, *parameters], (beta * weight).to(f.dtype))
            for total, more in zip(sums, rest, strict=True):
                total.add_(more)
            return f.detach().to(y.dtype), first.to(y.dtype)

        for _ in range(steps):
            f, more = pull(y, gz)
            gy = gy + more
            z = (z - beta * f) / (1 - beta)
            f, more = pull(z, gy)
            gz = (1 - beta) * gz + more
            y = (y - beta * f) / (1 - beta)
            gy = (1 - beta) * gy
        FloatReversal.drift = torch.stack([y, z]).abs().max().item()
        return None, sums[0], None, None, None, *sums[1:]


class FloatSolve(nn.Module):
    """Stands in for the model's fixed-point layer: the iteration in floating point, reversed or stored by autograd."""

    def __init__(self, layer: ReversibleFixedPoint, wide: torch.dtype, autocast: bool, stored: bool) -> None:
        super().__init__()
        self.stored = stored
        self.block: nn.Module = layer.block
        for name in ("gradient", "max_steps", "row_dims", "solver", "draws_steps"):  # what the model reads of it
            setattr(self, name, getattr(layer, name))
        self.beta, self.wide, self.autocast = layer.beta, wide, autocast

    def forward(self, x, *, max_steps, gradient, past_key_values=None, **kwargs):
        device = x.device.type

        def call(z, x):
            with torch.autocast(device, torch.bfloat16, enabled=self.autocast, cache_enabled=False):
                return self.block(z, x, **kwargs).to(x.dtype)

        if self.stored:
            _, z = float_iteration(call, x, self.beta, max_steps, self.wide)
            return self._solution(z.to(x.dtype), max_steps)
        z = FloatReversal.apply(call, x, self.beta, max_steps, self.wide, *self.block.parameters())
        return self._solution(z, max_steps)

    @staticmethod
    def _solution(z: torch.Tensor, steps: int) -> FixedPointSolution:
        """As the layer returns it, so that the model finds every field; nothing was clamped, or looked at."""
        none = torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device)
        return FixedPointSolution(
            z=z, steps=none + steps, residual=None, evaluations=2 * steps, shapes=(z.shape,), clamped=none, nonfinite=none
        )


def text_batch(vocabulary: int, batch: int, length: int) -> torch.Tensor:
    """Bytes of the standard library's source as token ids."""
    data = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()[: batch * length]
    return (torch.tensor(list(data)) % vocabulary).view(batch, length)


def gradients(model: nn.Module, ids: torch.Tensor, autocast: bool) -> tuple[torch.Tensor, float]:
    model.zero_grad()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids).loss
    loss.backward()
    return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters() if parameter.grad is not None]), loss.item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = text_batch(256, 8, options.length).to(device)
    rows = []
    for block in ("paper", "modern"):
        for autocast in (False, True):
            for beta in options.betas:
                for steps in options.steps:
                    torch.manual_seed(0)
                    act = "gelu_pytorch_tanh" if block == "paper" else "silu"
                    config = RevDEQConfig(
                        vocab_size=256,
                        hidden_size=options.hidden_size,
                        intermediate_size=4 * options.hidden_size,
                        num_attention_heads=4,
                        block_type=block,
                        hidden_act=act,
                        beta=beta,
                        max_steps=steps,
                        gradient="backprop",
                    )
                    model = RevDEQForCausalLM(config).to(device)
                    if block == "modern":  # its output matrices start so small that states hardly matter: take a size of training instead
                        for parameter in model.model.solve.parameters():
                            if parameter.dim() == 2:
                                torch.nn.init.normal_(parameter, std=0.05)
                    layer = model.model.solve
                    for way in ("exact", "float32", "float64"):
                        found = []
                        for stored in (True, False):
                            layer.gradient = "backprop" if stored else "reversible"
                            if way != "exact":
                                model.model.solve = FloatSolve(layer, getattr(torch, way), autocast, stored)
                            found.append(gradients(model, ids, autocast))
                        (expected, loss), (got, other) = found
                        drift = layer.drift.item() if way == "exact" else FloatReversal.drift
                        rows.append(
                            {
                                "block": block,
                                "f": "bfloat16 autocast" if autocast else "float32",
                                "beta": beta,
                                "steps": steps,
                                "reversal": way,
                                "gradient_error": f"{((got - expected).norm() / expected.norm()).item():.1e}",
                                "drift": f"{drift:.1e}",
                                "loss_difference": f"{abs(other - loss):.1e}",
                            }
                        )
                        print(rows[-1], flush=True)
    print(keep("gradients", rows))


if __name__ == "__main__":
    main()
