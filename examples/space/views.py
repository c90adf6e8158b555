"""How is a solve drawn? HTML heat maps and matplotlib figures of what `solves.py` found.

Colours can be told apart with every kind of colour vision: from light yellow to dark blue for amounts, viridis for states, Okabe and Ito's palette with
markers of their own for curves.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from solves import Cost, ImageSolve, TextSolve

from revdeq_hf.memory import MODES, show_bytes

AMOUNTS = colormaps["YlGnBu"]
STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", ":"), ("#CC79A7", "D", "-."))
SMALLEST = 1e-7  # residuals below it, down to 0, are drawn here
SHOWN_CLASSES = 10
DPI = 160
CSS = """
.rq-scroll { overflow-x: auto; max-width: 100%; }
.rq-scroll.rq-end { direction: rtl; }
.rq-scroll.rq-end > table { direction: ltr; margin-right: auto; }
.rq-scroll table { border-collapse: separate; border-spacing: 1px; margin: 0; width: auto; font-size: 13px; }
.rq-scroll table, .rq-scroll tr, .rq-scroll th, .rq-scroll td { border: 0 !important; }
.rq-scroll th, .rq-scroll td { padding: 3px 6px; text-align: center; white-space: pre; font-family: ui-monospace, monospace; }
.rq-scroll th:first-child { position: sticky; left: 0; background: var(--background-fill-primary, white); color: var(--body-text-color); z-index: 1; }
.rq-scroll td.rq-best { font-weight: bold; outline: 2px solid #D55E00; outline-offset: -2px; }
.rq-text { font-family: ui-monospace, monospace; font-size: 15px; line-height: 1.7; white-space: pre-wrap; overflow-wrap: anywhere; }
.rq-text span { border-radius: 3px; padding: 2px 0; box-shadow: inset -1px 0 0 rgba(255, 255, 255, 0.7); }
.rq-pixels img { image-rendering: pixelated; }
.rq-plot img { max-width: min(100%, 620px) !important; margin: 0 auto; }
.rq-legend { display: flex; align-items: center; gap: 8px; font-size: 13px; margin-top: 8px; flex-wrap: wrap; }
.rq-legend i { display: inline-block; height: 12px; width: 140px; border-radius: 3px; }
.rq-message { border-left: 4px solid #D55E00; padding: 8px 12px; background: #D55E0018; overflow-wrap: anywhere; }
"""


def message(text: str) -> str:
    """What the page says where there is nothing to show."""
    return f'<div class="rq-message" role="alert">{escape(text)}</div>'


def text_summary(solve: TextSolve, tolerance: float) -> str:
    """The solve in two sentences."""
    settled = int((solve.steps_to(tolerance) < solve.steps).sum())
    return (
        f"**{len(solve.words)} tokens, {solve.steps} steps** ({2 * solve.steps} evaluations of the one block; trained with {solve.trained_steps}). "
        f"{settled} of {len(solve.words)} tokens reached a residual of {tolerance:g} before the last step. {_converges([solve.radius])}"
    )


def image_summary(solve: ImageSolve) -> str:
    """The solve in two sentences."""
    best = int(solve.probability[-1].argmax())
    trained = " and ".join(map(str, solve.trained_steps))
    return (
        f"**It is taken for {solve.names[best]!r}** (probability {solve.probability[-1, best]:.1%}) after {solve.steps} steps in each of "
        f"{len(solve.residual)} stages (trained with {trained}). {_converges(solve.radius)}"
    )


def steps_heat_map(solve: TextSolve, tolerance: float) -> str:
    """The text, each token on the colour of its steps."""
    needed = solve.steps_to(tolerance)
    least, most = int(needed.min()), int(needed.max())
    darkest = max(most, least + 4)  # a difference of one step shall not look like one of many
    spans = []
    for position, word in enumerate(solve.words):
        count = int(needed[position])
        steps = f"{count} steps" if count < solve.steps else f"{count} steps or more"
        title = f"{visible(word)}: {steps}; residual {solve.residual[-1, position]:.1e} at the start of the last one"
        shown = escape(word).replace("\n", "↵\n")
        spans.append(f'<span style="{_cell((count - least) / (darkest - least))}" title="{escape(title)}">{shown}</span>')
    unreached = f", {most} or more where that is not reached" if most == solve.steps else ""
    legend = _legend(f"{least}", f"steps until the residual is {tolerance:g} or less{unreached}", f"{darkest}")
    return f'<div class="rq-text">{"".join(spans)}</div>{legend}'


def predictions(solve: TextSolve) -> str:
    """A row for each step, a column for each token of the text: the most probable next token, coloured by the distance from the last step's distribution."""
    head = "".join(f"<th>{escape(visible(word))}</th>" for word in solve.words)
    rows = [f"<tr><th>step</th>{head}</tr>"]
    far = max(float(solve.divergence.max()), 1e-6)
    for step, row in enumerate(solve.predicted):
        cells = "".join(
            f'<td style="{_cell(solve.divergence[step, position] / far)}" title="probability {solve.probability[step, position]:.1%}, '
            f'{solve.divergence[step, position]:.2g} nats from the last step">{escape(visible(word))}</td>'
            for position, word in enumerate(row)
        )
        rows.append(f"<tr><th>{step + 1}</th>{cells}</tr>")
    legend = _legend("as after the last step", "distance of the distribution", f"{far:.2g} nats from it")
    return f'<div class="rq-scroll rq-end rq-predictions"><table>{"".join(rows)}</table></div>{legend}'


def class_predictions(solve: ImageSolve) -> str:
    """A row for each step, a column for each class (of many, the likeliest): its probability."""
    shown = np.sort(np.argsort(-solve.probability[-1], kind="stable")[:SHOWN_CLASSES])
    rows = ["<tr><th>step</th>" + "".join(f"<th>{escape(solve.names[label])}</th>" for label in shown) + "</tr>"]
    for step, probability in enumerate(solve.probability):
        best = probability.argmax()
        cells = "".join(
            f'<td class="{"rq-best" if label == best else ""}" style="{_cell(probability[label])}">{100 * probability[label]:.1f}%</td>'
            for label in shown
        )
        rows.append(f"<tr><th>{step + 1}</th>{cells}</tr>")
    return f'<div class="rq-scroll rq-predictions"><table>{"".join(rows)}</table></div>'


def text_residuals(solve: TextSolve, tolerance: float) -> Figure:
    """Residual over the steps: every token, their median, the tolerance, the steps of training."""
    figure = _figure(3.1)
    axes = figure.subplots()
    steps = np.arange(1, solve.steps + 1)
    values = solve.residual.clip(min=SMALLEST)
    axes.plot(steps, values, color="#999999", alpha=0.35, linewidth=0.8)
    axes.plot([], [], color="#999999", label="each token")
    colour, marker, line = STYLES[0]
    axes.plot(steps, np.median(values, axis=1), line, color=colour, marker=marker, markersize=5, linewidth=2, label="median token")
    axes.axhline(tolerance, color=STYLES[1][0], linestyle="--", label=f"tolerance {tolerance:g}")
    _residual_axes(axes, solve.steps, [solve.trained_steps])
    return figure


def image_residuals(solve: ImageSolve) -> Figure:
    """Residual over the steps, of each stage."""
    figure = _figure(3.1)
    axes = figure.subplots()
    for stage, values in enumerate(solve.residual):
        colour, marker, line = STYLES[stage % len(STYLES)]
        steps, name = np.arange(1, len(values) + 1), f"stage {stage + 1}"  # with `config.tol` a stage may end before the others
        axes.plot(steps, values.clip(min=SMALLEST), line, color=colour, marker=marker, markersize=5, linewidth=2, label=name)
    _residual_axes(axes, solve.steps, solve.trained_steps)
    return figure


def image_states(solve: ImageSolve, columns: int = 6) -> Figure:
    """What the model sees, and the first stage's state after each step."""
    pictures = [solve.pixels, *solve.states]
    rows = -(-len(pictures) // columns)
    figure = _figure(1.0 * rows)
    low, high = float(solve.states[-1].min()), float(solve.states[-1].max())
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if number < len(pictures):
            settings: dict[str, Any] = dict(cmap="viridis", vmin=low, vmax=high) if number else dict(cmap="gray", vmin=0, vmax=255)
            axes.imshow(pictures[number], interpolation="nearest", **settings)
            axes.set_title(f"step {number}" if number else "input", fontsize=10)
    return figure


def cost_figure(costs: Sequence[Cost]) -> Figure:
    """Memory and time of a training step over the steps of its solves, a curve for each gradient mode."""
    figure = _figure(5.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for mode, (colour, marker, line) in zip(MODES, STYLES, strict=False):
        points = [cost for cost in costs if cost.gradient == mode]
        for axes, values in ((upper, [cost.kept / 1e6 for cost in points]), (lower, [1000 * cost.seconds for cost in points])):
            axes.plot([cost.steps for cost in points], values, line, color=colour, marker=marker, markersize=6, linewidth=2, label=mode)
    upper.set(ylabel="kept (MB)", ylim=(0, None))
    lower.set(ylabel="time (ms)", ylim=(0, None), xlabel="steps of the solve")
    counts = sorted({cost.steps for cost in costs})
    lower.set_xscale("log", base=2)
    lower.set_xticks(counts)
    lower.xaxis.set_major_formatter(ScalarFormatter())
    lower.xaxis.set_minor_formatter(NullFormatter())
    upper.legend()
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure


def cost_table(costs: Sequence[Cost], shape: Sequence[int]) -> str:
    """The gradient modes at the most steps that were measured, on a batch of that shape."""
    most = max(cost.steps for cost in costs)
    names = ("gradient mode", "kept", "peak", "time", "gradients off by", "drift")
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for cost in (cost for cost in costs if cost.steps == most):
        drift = "" if cost.drift is None else f"{cost.drift:g}"
        values = (show_bytes(cost.kept), show_bytes(cost.peak), f"{1000 * cost.seconds:.0f} ms", f"{cost.difference:.1g}", drift)
        rows.append(f"<tr><th>{cost.gradient}</th>" + "".join(f"<td>{value}</td>" for value in values) + "</tr>")
    size = " x ".join(map(str, shape))
    return (
        f'<p>A batch of {size}, {most} steps:</p><div class="rq-scroll rq-costs"><table>{"".join(rows)}</table></div>'
        "<p>Kept: bytes between forward and backward pass. Peak: most bytes at once, gradients included, weights not. Time: the shortest of three runs. "
        "Gradients off by: greatest difference from those of backprop, relative to the greatest gradient of the same weight. Drift: how far the reversed "
        "solve ended from its start.</p>"
    )


def visible(token: str) -> str:
    """A token with its white space made visible."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"


def _converges(radii: Sequence[float]) -> str:
    values = ", ".join(f"{radius:.2f}" for radius in radii)
    name = "Spectral radius of the block there" + (f" (stages 1 to {len(radii)})" if len(radii) > 1 else "")
    return f"{name}: {values}, " + ("below 1: the steps converge." if max(radii) < 1 else "not below 1: the steps need not converge.")


def _cell(share: float) -> str:
    """CSS of a cell: the colour of a share in [0, 1] and a text colour that can be read on it."""
    red, green, blue, _ = AMOUNTS(float(np.clip(share, 0, 1)))
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    return f"background: {to_hex((red, green, blue))}; color: {'black' if luminance > 0.5 else 'white'}"


def _legend(low: str, what: str, high: str) -> str:
    stops = ", ".join(to_hex(AMOUNTS(share)) for share in np.linspace(0, 1, 6))
    return f'<div class="rq-legend">{escape(low)} <i style="background: linear-gradient(to right, {stops})"></i> {escape(high)} · {escape(what)}</div>'


def _figure(height: float, width: float = 5.0) -> Figure:
    """A figure whose labels can be read where it is as narrow as a telephone."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure


def _residual_axes(axes: Any, steps: int, trained: Sequence[int]) -> None:
    for number, count in enumerate(sorted(set(trained))):
        if count <= steps:
            axes.axvline(count, color="black", linestyle=":", linewidth=1.2, label=None if number else "steps in training")
    axes.set(xlabel="step", ylabel="relative residual at its start", yscale="log", xlim=(0.5, steps + 0.5))
    axes.set_xticks(range(1, steps + 1, 1 + (steps - 1) // 12))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
