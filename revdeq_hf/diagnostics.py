"""How does a fixed point converge? `diagnose` runs one batch and answers with residuals, spectral radius and drift; `logit_lens` shows what a language
model would say after each step of its solve."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .adjoint_revdeq import residual_of
from .checks_revdeq import SOLVER_ARGUMENTS
from .evaluator_revdeq import Evaluator, State, evaluate_with_graph, generator_states, kept_buffers, set_generator_states
from .layer_revdeq import ReversibleFixedPoint, fixed_point_layers, span
from .solver_revdeq import rows


@dataclass(repr=False)
class Diagnosis:
    """What `diagnose` found out about one fixed-point layer.

    Attributes:
        beta: relaxation in use.
        residuals: (steps begun, batch) or, for layers with `row_dims=2`, (steps begun, batch, positions): relative residual at the start of each step.
        steps: int64 for each row, steps taken.
        evaluations: calls of the block in the solve.
        spectral_radius: (batch,) float32, estimate of the greatest absolute eigenvalue of the Jacobian in z of the block, damped if the layer is,
            at the state returned.
        drift: difference between the reconstructed and the true start state in one backward pass; None where the gradient mode is not "reversible".
        clamped, nonfinite: evaluations of rows in which a value left the range that is kept exactly, or was NaN or infinite.
        pairs: rows that came to rest where no fixed point is: `y = f(z)`, `z = f(y)` and y other than z, which the iteration does not leave either.
    """

    beta: float
    residuals: torch.Tensor
    steps: torch.Tensor
    evaluations: int
    spectral_radius: torch.Tensor
    drift: float | None
    clamped: int
    nonfinite: int
    pairs: int = 0

    @property
    def beta_limit(self) -> float:
        """`2 / (1 + k)` with the batch's greatest spectral radius for k: every beta below it converges near this fixed point if k < 1."""
        return 2 / (1 + self._radius())

    @property
    def rate(self) -> float:
        """`|1 - beta| + beta k`, the factor by which theorem 3.1 of arXiv 2509.12917 bounds the error's decrease in a step, k as in `beta_limit`."""
        return abs(1 - self.beta) + self.beta * self._radius()

    def _radius(self) -> float:
        return self.spectral_radius.max().item() if self.spectral_radius.numel() else 0.0

    def __repr__(self) -> str:
        last = self.residuals[-1]
        shown = f"mean {last.mean().item():.3g} max {last.max().item():.3g}" if last.numel() else "of an empty batch"
        steps = span(self.steps) if self.steps.numel() else "0"
        return (
            f"Diagnosis(beta={self.beta:g}, steps={steps}, evaluations={self.evaluations}, residual {shown}, "
            f"spectral_radius max {self._radius():.3g}, rate={self.rate:.3g}, beta_limit={self.beta_limit:.3g}, drift={self.drift}, "
            f"clamped={self.clamped}, nonfinite={self.nonfinite})"
        )

    def plot(self, path: "str | os.PathLike") -> None:
        """Draws the residual over the steps (median, all rows' range) beside the rate of theorem 3.1 to a PNG or PDF file. Needs matplotlib."""
        from matplotlib.figure import Figure

        flat = self.residuals.flatten(1).float().cpu()
        steps = range(1, len(flat) + 1)
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        median = flat.median(dim=1).values.tolist()
        axes.fill_between(steps, flat.amin(1).tolist(), flat.amax(1).tolist(), alpha=0.2, label="all rows")
        axes.plot(steps, median, marker=".", label="median")
        if self.rate < 1:
            axes.plot(steps, [median[0] * self.rate ** (step - 1) for step in steps], "--", color="grey", label=f"rate {self.rate:.2f}")
        axes.set(xlabel="step", ylabel="relative residual at its start", yscale="log")
        axes.set_title(f"spectral radius {self._radius():.3g}, beta {self.beta:g} (limit {self.beta_limit:.3g}), drift {self.drift}")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


def diagnose(module: nn.Module, *args: Any, power_iterations: int = 40, **kwargs: Any) -> "Diagnosis | dict[str, Diagnosis]":
    """Calls `module(*args, **kwargs)` once and looks into the solve of every fixed-point layer that ran.

    Args:
        module: a `ReversibleFixedPoint`, or any model that holds some.
        args, kwargs: what it is called with, on its device; under the autocast of the caller.
        power_iterations: vector-Jacobian products for the spectral radius, of which the second half is averaged.

    Returns:
        A `Diagnosis` for a layer, else one for each layer's name (of its last call).

    Warns where the layer's beta is not below `2 / (1 + k)`, k the greatest spectral radius: any Lipschitz constant of the block is at least that
    large, so theorem 3.1 gives no convergence there.

    Cost: the call itself, and for each layer a solve with its backward pass (8N evaluations), one evaluation and `power_iterations`
    products of 2. `.grad` fields, generators and buffers stay as they are. Under FSDP2 all ranks call it, and the weights are whole on each meanwhile.

    Raises:
        ValueError: no fixed-point layer ran.

    Example:
        >>> import torch
        >>> from revdeq_hf import ReversibleFixedPoint, diagnose
        >>> class Half(torch.nn.Module):
        ...     def forward(self, z, x):
        ...         return 0.5 * z + x
        >>> found = diagnose(ReversibleFixedPoint(Half(), beta=0.8, max_steps=20), torch.ones(1, 3))
        >>> f"{found.spectral_radius.item():.3f} {found.beta_limit:.3f} {found.drift}"
        '0.500 1.333 0.0'
    """
    if isinstance(power_iterations, bool) or not isinstance(power_iterations, int) or power_iterations < 2:
        raise ValueError(f"power_iterations must be a whole number >= 2, got {power_iterations!r}")
    calls: dict[str, tuple[ReversibleFixedPoint, tuple, dict]] = {}
    handles = []
    for name, layer in fixed_point_layers(module):

        def remember(layer: nn.Module, given: tuple, named: dict, name: str = name) -> None:
            assert isinstance(layer, ReversibleFixedPoint)
            calls[name] = (layer, given, named)

        handles.append(layer.register_forward_pre_hook(remember, with_kwargs=True))
    device = next(
        (tensor.device for tensor in (*module.parameters(), *tree_leaves((args, kwargs))) if isinstance(tensor, torch.Tensor)),
        torch.device("cpu"),
    )
    generators = generator_states(device)
    buffers = kept_buffers(module.modules())
    try:
        with torch.enable_grad():  # a model that keeps a cache does so without gradients only, and its evaluations could not be repeated
            module(*args, **kwargs)
        for handle in handles:  # they shall not see the calls below
            handle.remove()
        if not calls:
            raise ValueError(f"no ReversibleFixedPoint ran in the call of {type(module).__name__}: there is nothing to diagnose")
        found = {name: _diagnose_layer(module, layer, given, named, power_iterations) for name, (layer, given, named) in calls.items()}
    finally:
        for handle in handles:
            handle.remove()
        set_generator_states(generators, device)
        for buffer in buffers:
            buffer.put_back()
    for name, diagnosis in found.items():
        radius = diagnosis._radius()
        if not diagnosis.beta < diagnosis.beta_limit or radius >= 1:
            remedy = (
                "bound the block (weight decay, a norm at its end, no identity path from z), or try damping=0.5, which helps where it turns states over"
                if not radius < 1
                else f"take beta below {diagnosis.beta_limit:.3g}"
            )
            warnings.warn(
                f"the fixed point {name!r} need not converge: its block has spectral radius k = {radius:.3g} where the solve ended, beta is "
                f"{diagnosis.beta:g}, and theorem 3.1 asks for k < 1 and beta < 2 / (1 + k) = {diagnosis.beta_limit:.3g}; {remedy}",
                stacklevel=2,
            )
        if diagnosis.pairs:
            warnings.warn(
                f"{diagnosis.pairs} of the {diagnosis.steps.numel()} rows of the fixed point {name!r} rest in a pair y = f(z), z = f(y), y other than z, and "
                "not in a fixed point, which more steps do not change; damping=0.5 leads out of pairs (after training, as in training)",
                stacklevel=2,
            )
    return found[""] if isinstance(module, ReversibleFixedPoint) else found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it all of a model is in evaluation mode; afterwards each module is in its own again (some may rest while others train)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def sharded_parts(module: nn.Module) -> list[Any]:
    """The modules within it whose weights FSDP2 keeps in shards."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule  # costs too much to import where nothing is sharded

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


@contextmanager
def _whole_weights(module: nn.Module) -> Iterator[None]:
    """Within it no weight of the module is in shards, as blocks that are evaluated outside of their solve want it; FSDP2 does that for calls alone."""
    sharded = sharded_parts(module)
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()


def _diagnose_layer(module: nn.Module, layer: ReversibleFixedPoint, given: tuple, named: dict, power_iterations: int) -> Diagnosis:
    (x, *context), named = tree_map_only(torch.Tensor, torch.Tensor.detach, (given, named))
    x = tree_map_only(torch.Tensor, torch.Tensor.requires_grad_, x)
    settings = {name: named.pop(name) for name in SOLVER_ARGUMENTS if name in named}
    settings |= {"output_trajectory": True, "num_restarts": 1}  # of several start states the first
    settings["max_steps"] = settings.get("max_steps") or layer.max_steps  # a number, so that none is drawn
    device = tree_leaves(x)[0].device
    generators, buffers = generator_states(device), kept_buffers(layer.modules())
    with torch.enable_grad():
        solution = layer(x, *context, **settings, **named)
        is_tuple = isinstance(solution.z, tuple)
        z: State = solution.z if is_tuple else (solution.z,)
        drift = None
        if (settings.get("gradient") or layer.gradient) == "reversible" and any(part.requires_grad for part in z):
            torch.autograd.grad([part.float().sum() for part in z], tree_leaves(x), allow_unused=True)
            drift = layer.drift.item()
    set_generator_states(generators, device)  # the map of the solve: its dropout mask, its buffers
    for buffer in buffers:
        buffer.put_back()
    with _whole_weights(module):
        evaluator = Evaluator(layer.block, (x, tuple(context), named), is_tuple, z, layer.damping)
        evaluation = evaluate_with_graph(evaluator, z, [tensor.detach() for tensor in evaluator.tensors])
        radius = _spectral_radius(evaluation.state, evaluation.f, power_iterations)
        with torch.no_grad(), evaluator.precision():
            twice = evaluator(tuple(part.detach() for part in evaluation.f), evaluator.tensors)
    away, back = (residual_of(part, z, layer.row_dims) for part in (evaluation.f, twice))
    assert solution.step_residuals is not None
    return Diagnosis(
        layer.beta,
        solution.step_residuals,
        solution.steps,
        solution.evaluations,
        radius,
        drift,
        int(solution.clamped.sum()),
        int(solution.nonfinite.sum()),
        int(((away > 0.1) & (back < 0.1 * away)).sum()),
    )


def _spectral_radius(z: State, f: State, iterations: int) -> torch.Tensor:
    """(batch,): the growth of a random row vector under products with the Jacobian of each example, averaged (geometrically) over the second half
    of the products; a dominant pair of complex eigenvalues makes single products go up and down."""
    generator = torch.Generator(z[0].device).manual_seed(0)
    row = tuple(torch.randn(part.shape, dtype=part.dtype, device=part.device, generator=generator) for part in z)
    outputs = [part for part in f if part.requires_grad]
    if not outputs or not z[0].numel():
        return torch.zeros(z[0].shape[0], device=z[0].device)
    growths = []
    for _ in range(iterations):
        norm = torch.stack([rows(part).double().norm(dim=1) for part in row]).norm(dim=0)
        growths.append(norm)
        safe = torch.where(norm > 0, norm, 1.0)  # a nilpotent Jacobian maps the vector to 0, and 0 stays
        row = tuple((part / safe.to(part.dtype).reshape(-1, *[1] * (part.dim() - 1))) for part in row)
        weights = [part for part, output in zip(row, f, strict=True) if output.requires_grad]
        row = torch.autograd.grad(outputs, z, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
    later = torch.stack(growths[iterations // 2 :])
    return later.log().mean(dim=0).exp().float()


@dataclass
class LogitLens:
    """What a language model would predict, had its solve ended after each step. The last step is what the model does predict.

    Attributes:
        tokens: (steps, batch, seq, k) ids of the k most probable next tokens.
        log_probs: (steps, batch, seq, k) float32, their log-probabilities in nats.
        divergence: (steps, batch, seq) float32, Kullback-Leibler divergence in nats of the last step's distribution from this step's.
        residual: (steps begun, batch, seq) float32, relative residual at the start of each step.
        solver_steps: (batch, seq) int64, steps each position took (fewer than all where `tol` stopped it).
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor
    divergence: torch.Tensor
    residual: torch.Tensor
    solver_steps: torch.Tensor

    @property
    def settled(self) -> torch.Tensor:
        """(batch, seq) int64: the step (from 1) after which the most probable token is, and stays, that of the last step."""
        first = self.tokens[..., 0]
        differs = first != first[-1]
        numbers = torch.arange(1, len(first) + 1, device=first.device)[:, None, None]
        return (differs * numbers).amax(dim=0) + 1

    def plot(self, path: "str | os.PathLike", words: Sequence[str], tokenizer: Any = None, row: int = 0) -> None:
        """Draws one text as a heat map to a PNG or PDF file: steps upwards, positions to the right, colour the divergence from the last step, a
        second panel with the residual. Needs matplotlib.

        Args:
            path: the file.
            words: how to name the positions, e.g. `tokenizer.convert_ids_to_tokens(ids[0])`.
            tokenizer: with it each cell names the token it predicts; readable for up to some 40 positions.
            row: which text of the batch.
        """
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        steps, _, length, _ = self.tokens.shape
        if len(words) != length:
            raise ValueError(f"words must name the {length} positions of the text, got {len(words)}")
        figure = Figure(figsize=(max(6.0, 0.55 * length), 1.8 + 0.5 * steps + 0.35 * len(self.residual)), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=[1.4, 1])
        divergence, residual = (x[:, row].clamp_min(1e-5).cpu().numpy() for x in (self.divergence, self.residual))
        panels = (
            (upper, divergence, "nats from the last step", "after step"),
            (lower, residual, "relative residual", "at the start of step"),
        )
        for axes, values, title, label in panels:
            low, high = float(values.min()), float(values.max())
            image = axes.imshow(
                values,
                origin="lower",
                aspect="auto",
                cmap="viridis_r",
                norm=LogNorm(low, max(high, 1.01 * low)),
                extent=(-0.5, length - 0.5, 0.5, len(values) + 0.5),
            )
            axes.set(ylabel=label, yticks=range(1, len(values) + 1), xticks=range(length))
            axes.set_xticklabels(words if axes is lower else [""] * length, rotation=90, fontsize="small")
            figure.colorbar(image, ax=axes, label=title, pad=0.01)
        if tokenizer is not None:
            for step in range(steps):
                for position in range(length):
                    word = tokenizer.decode([int(self.tokens[step, row, position, 0])])
                    shown = word.strip() if word.strip() and word.isprintable() else repr(word)[1:-1]
                    upper.text(position, step + 1, shown, ha="center", va="center", fontsize=6, clip_on=True)
        figure.savefig(path, dpi=130)


@torch.no_grad()
def logit_lens(model: Any, input_ids: torch.Tensor, top_k: int = 5, max_steps: int | None = None, **kwargs: Any) -> LogitLens:
    """What a causal language model of this package would predict after each step of its solve.

    Args:
        model: a `RevDEQForCausalLM`, also one with adapters of PEFT.
        input_ids: (batch, seq).
        top_k: tokens to keep for each step and position.
        max_steps: steps of the solve, instead of the config's.
        kwargs: further arguments of `RevDEQModel.forward`, such as `attention_mask`.

    Cost: one solve, the coda and the head once per step; logits of two steps at a time.

    Raises:
        ValueError: the model is another one, or `top_k` does not lie in 1 to the size of the vocabulary.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # with adapters
    if getattr(model.config, "model_type", None) != "revdeq" or not hasattr(model, "lm_head"):
        raise ValueError(f"logit_lens looks at the solve of a RevDEQForCausalLM, got {type(model).__name__}")
    if not 1 <= top_k <= model.config.vocab_size:
        raise ValueError(f"top_k must lie in 1 to {model.config.vocab_size}, the size of the vocabulary, got {top_k}")
    out = model.model(input_ids, max_steps=max_steps, output_trajectory=True, **kwargs)
    predict = lambda states: torch.log_softmax(model.lm_head(states).float(), dim=-1)  # noqa: E731
    last = predict(out.trajectory[-1])
    tokens, log_probs, divergence = [], [], []
    for states in out.trajectory:
        found = predict(states)
        best = found.topk(top_k, dim=-1)
        tokens.append(best.indices)
        log_probs.append(best.values)
        divergence.append((last.exp() * (last - found)).sum(-1).clamp_min(0))
    return LogitLens(torch.stack(tokens), torch.stack(log_probs), torch.stack(divergence), out.step_residuals, out.solver_steps)
