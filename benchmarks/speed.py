"""Training step, language model, decoding, adaptive steps, compilation, import: ours beside what one could take instead, in one run.

    python benchmarks/speed.py                          # everything; float32
    python benchmarks/speed.py --only step --bf16       # some of it
    python benchmarks/speed.py --table                  # the rows of the last run as tables, for docs/speed.md
    python benchmarks/speed.py --plot docs/speed.png    # and as a picture

The ways of a section are run in turn, so that all meet the same machine, and a ratio is the median of the turns' ratios. `against` is 1. Peak bytes are
those of the tensors made in a step, parameters and inputs not counted. Competitors that are not installed are left out, and said to be:
`pip install jax` (the authors' framework), `pip install --no-deps torchdeq==0.1.0`.

- step: forward and backward pass of the block alone, N steps (2N evaluations): gradient modes; the iteration written out, followed by autograd, with and
  without `torch.utils.checkpoint`; the published reversal in floating point; torchdeq; and JAX, whose reversal keeps float64 states as the authors' does.
- language: an update (AdamW) of the language model, and of transformers' Llama with 2N layers (as many evaluations) or 1 (as many parameters).
- paper: an update (AdamW) of the paper's 94M language model, 32 x 448 tokens, and the share of the device's matrix rate that it reaches. Left out on the
  CPU, unless it is asked for, with `--batch` sequences of `--length` then.
- paper_images: the same of the paper's multi-scale network for CIFAR-10, 128 images (on the CPU, if it is asked for, `--batch` of them).
- images: an update (AdamW) of the image model, and of transformers' ResNet of as many evaluations or as many parameters on grids of the same sizes.
- decode: a token with a cache of 64, and of the same Llamas; with int8 weights where torchao is installed (`pip install --no-deps torchao`).
- decode_compiled: the same with a static cache, forward pass compiled to one program, as `generate(cache_implementation="static")` does on accelerators.
- stop: examples that need different numbers of steps, solved with `tol` and with 40 steps for all.
- compile: the step with the block compiled by torch.compile, and its first step's seconds.
- import: seconds of `import revdeq_hf` in a fresh process beyond transformers' own file of a model.
"""

import argparse
import copy
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, interleaved, keep, kept, median, newest, transformer_block
from gradients import FloatReversal, float_iteration
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetForImageClassification, StaticCache

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQForImageClassification, RevDEQVisionConfig, ReversibleFixedPoint
from revdeq_hf.flops import training_flops
from revdeq_hf.layer_revdeq import fixed_point_layers
from revdeq_hf.training import LiveBytes, matrix_rate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Ways = dict[str, Callable[[], Any]]


class Runs:
    """The rows of a run: what was timed in turn, as ratios to one of the ways."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        section: str,
        shape: str,
        ways: Ways,
        against: str,
        figures: "dict[str, dict[str, Any]] | None" = None,
        operations: float = 0.0,
    ) -> None:
        """Times the ways; `figures`: what else is known of them, as in `keep_row`; `operations`: of each, as a share of what the device does in a second."""
        times = interleaved(self.wanted(ways, against), self.options.repeats, warm_up=1)
        for name, seconds in times.items():
            ratios = sorted(a / b for a, b in zip(seconds, times[against], strict=True))
            least, middle, greatest = (round(value, 3) for value in (ratios[0], median(ratios), ratios[-1]))
            measured: dict[str, Any] = dict(
                against=against, ratio=middle, least=least, greatest=greatest, seconds=round(median(seconds), 5)
            )
            known = (figures or {}).get(name, {})
            if operations:
                share = f"{operations / measured['seconds']:.3f} of the matrix rate"
                measured["detail"] = f"{share}, {known['detail']}" if "detail" in known else share
            self.keep_row(section, shape, name, **{**known, **measured})

    def wanted(self, ways: Ways, against: str) -> Ways:
        """Those that `--ways` asks for, and the one they are compared with."""
        return {name: way for name, way in ways.items() if not self.options.ways or name in {against, *self.options.ways}}

    def keep_row(self, section: str, shape: str, way: str, **figures: Any) -> None:
        """`figures`: some of against, ratio, least, greatest, seconds, peak_bytes, drift, detail."""
        precision = "bfloat16" if self.options.bf16 else "float32"
        columns = ("against", "ratio", "least", "greatest", "seconds", "peak_bytes", "drift", "detail")
        self.rows.append(dict(section=section, f=precision, shape=shape, way=way, **{name: figures.get(name, "") for name in columns}))
        print({name: value for name, value in self.rows[-1].items() if value != ""}, flush=True)


def installed(library: str, ways: str) -> bool:
    found = importlib.util.find_spec(library) is not None
    if not found:
        print(f"left out: {ways} ({library} is not installed, see --help)", flush=True)
    return found


def peak_of(way: Callable[[], Any]) -> int:
    if DEVICE == "cuda":  # its allocator counts what compiled programs take, too
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as memory:
        way()
    return memory.peak


# --- the block alone ---


def step(runs: Runs) -> None:
    options = runs.options
    batch, length, width, beta = options.batch, options.length, options.width, options.beta
    block, x, rotary = transformer_block(batch, length, width, DEVICE)
    autocast = partial(torch.autocast, DEVICE, torch.bfloat16, enabled=options.bf16)
    parameters = tuple(block.parameters())
    layers: dict[str, ReversibleFixedPoint] = {}

    def call(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return block(z, x, position_embeddings=rotary)

    def ours(name: str, steps: int, **settings: Any) -> torch.Tensor:
        if name not in layers:
            layers[name] = ReversibleFixedPoint(block, beta=beta, max_steps=steps, drift_policy="ignore", **settings)
        return layers[name](x, position_embeddings=rotary).z

    def written_out(call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], steps: int) -> torch.Tensor:
        return float_iteration(call, x, beta, steps, x.dtype)[1]

    def checkpointed(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        value = checkpoint(call, z, x, use_reentrant=False)
        assert isinstance(value, torch.Tensor)
        return value

    def torchdeq(**settings: Any) -> torch.Tensor:
        from torchdeq import get_deq

        both: dict[str, Any] = dict(f_solver="fixed_point_iter", f_tol=0.0, b_solver="fixed_point_iter", b_tol=0.0, b_max_iter=2 * steps)
        deq = get_deq(**both, **settings)
        return deq(lambda z: call(z, x), torch.zeros_like(x))[0][-1]

    def floating(z: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:  # its backward pass runs outside the caller's autocast
        with autocast(cache_enabled=False):
            return call(z, leaf).to(x.dtype)

    for steps in options.steps:
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "backprop": partial(ours, f"backprop {steps}", steps, gradient="backprop"),
            "reversible": partial(ours, f"reversible {steps}", steps),
            f"reversible, keep_evaluations={steps}": partial(
                ours, f"reversible, keep_evaluations={steps} {steps}", steps, keep_evaluations=steps
            ),
            "checkpoint": partial(ours, f"checkpoint {steps}", steps, gradient="checkpoint"),
            "written out, autograd": partial(written_out, call, steps),
            "written out, torch.utils.checkpoint": partial(written_out, checkpointed, steps),
            "published reversal, float64 states": partial(FloatReversal.apply, floating, x, beta, steps, torch.float64, *parameters),
        }
        if installed("torchdeq", "torchdeq"):
            # 2N evaluations forward each: followed by autograd, or followed by 2N products of the implicit function theorem
            ways["torchdeq, autograd"] = partial(torchdeq, f_max_iter=0, grad=2 * steps)
            ways["torchdeq, implicit"] = partial(torchdeq, f_max_iter=2 * steps, ift=True)

        def train(way: Callable[[], torch.Tensor]) -> None:
            with autocast():
                z = way()
            z.float().square().mean().backward()

        def clean() -> None:
            block.zero_grad(set_to_none=True)
            x.grad = None

        figures: dict[str, dict[str, Any]] = {}
        for name, way in runs.wanted(ways, "backprop").items():
            clean()
            figures[name] = {"peak_bytes": peak_of(partial(train, way))}
            if name.startswith("reversible"):
                figures[name]["drift"] = layers[f"{name} {steps}"].drift.item()
            if name.startswith("published"):
                figures[name]["drift"] = float(f"{FloatReversal.drift:.1e}")
        clean()
        timed: Ways = {name: partial(train, way) for name, way in ways.items()}
        if not options.ways and installed("jax", "JAX"):
            timed |= jax_ways(block, x, rotary, beta, steps, options.bf16)
        runs.add("step", f"{batch}x{length}x{width}, N={steps}, beta={beta}", timed, "backprop", figures)
    for steps in options.memory_steps:  # memory alone, at depths that backpropagation does not reach
        for mode in ("reversible", "checkpoint"):
            clean()
            name = f"{mode}, N={steps}"
            with autocast():
                peak = peak_of(lambda: ours(name, steps, gradient=mode).float().square().mean().backward())  # noqa: B023
            drift = {"drift": layers[name].drift.item()} if mode == "reversible" else {}
            runs.keep_row("memory", f"{batch}x{length}x{width}, beta={beta}", name, peak_bytes=peak, **drift)


def jax_ways(block: Any, x: torch.Tensor, rotary: Any, beta: float, steps: int, bf16: bool) -> Ways:
    """Compiled by its own compiler, which is not timed."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes most of an accelerator's memory
    import jax
    import jax_twin

    params, x_there, rotary_there = jax_twin.from_torch(block, x, rotary)
    weight, config = jax.numpy.ones_like(x_there), block.layers[0].self_attn.config
    ways: Ways = {}
    for state in ("float64", "float32"):
        training_step = jax_twin.make_step(config, beta, steps, state, "bfloat16" if bf16 else "float32")
        ways[f"JAX, {state} states"] = partial(lambda go: jax.block_until_ready(go(params, x_there, rotary_there, weight)), training_step)
    return ways


# --- whole models ---


def models(options: argparse.Namespace, steps: int) -> dict[str, nn.Module]:
    shape: dict[str, Any] = dict(
        vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=3 * options.width, num_attention_heads=8
    )
    llama = partial(LlamaConfig, **shape, tie_word_embeddings=False)
    return {
        f"Llama of {2 * steps} layers": LlamaForCausalLM(llama(num_hidden_layers=2 * steps)),
        "RevDEQ": RevDEQForCausalLM(RevDEQConfig(**shape, max_steps=steps)),
        "Llama of 1 layer": LlamaForCausalLM(llama(num_hidden_layers=1)),
    }


def language(runs: Runs) -> None:
    options = runs.options
    steps = 4
    ids = torch.randint(options.vocabulary, (options.batch, options.length), device=DEVICE)
    ways: Ways = {}
    figures: dict[str, dict[str, Any]] = {}

    def update(model: Any, optimizer: torch.optim.Optimizer, gradient: str | None = None) -> None:
        if gradient:
            model.model.solve.gradient = gradient
        with torch.autocast(DEVICE, torch.bfloat16, enabled=options.bf16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for name, model in models(options, steps).items():
        model.to(DEVICE).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        update(model, optimizer)  # makes the optimiser's state
        variants = (
            {name: {}} if name != "RevDEQ" else {f"RevDEQ, {gradient}": {"gradient": gradient} for gradient in ("reversible", "backprop")}
        )
        for variant, settings in variants.items():
            ways[variant] = partial(update, model, optimizer, **settings)
        if "layers" in name:
            checkpointed: Any = copy.deepcopy(model)
            checkpointed.train().gradient_checkpointing_enable()
            ways[f"{name}, gradient checkpointing"] = partial(
                update, checkpointed, torch.optim.AdamW(checkpointed.parameters(), fused=True)
            )
            ways[f"{name}, gradient checkpointing"]()
        for variant in list(ways):
            if variant not in figures:
                count = sum(p.numel() for p in model.parameters())
                figures[variant] = {"peak_bytes": peak_of(ways[variant]), "detail": f"{count:,} parameters"}
        if name == "RevDEQ":
            figures["RevDEQ, reversible"]["drift"] = model.model.solve.drift.item()  # type: ignore[union-attr]
    shape = f"{options.batch}x{options.length}x{options.width}, N={steps}, vocabulary {options.vocabulary}"
    runs.add("language", shape, ways, f"Llama of {2 * steps} layers", figures)


def paper(runs: Runs) -> None:
    options = runs.options
    batch, length = (32, 448) if DEVICE == "cuda" else (options.batch, options.length)
    model: Any = RevDEQForCausalLM(RevDEQConfig.paper_wikitext103()).to(DEVICE).train()
    ids = torch.randint(model.config.vocab_size, (batch, length), device=DEVICE)
    model(ids, labels=ids, use_cache=False)  # the operations are those of the last forward pass
    share = training_flops(model) / matrix_rate(torch.device(DEVICE), torch.bfloat16 if options.bf16 else torch.float32)
    shape = f"{batch}x{length}, N={model.config.max_steps}"
    whole_model(runs, "paper", shape, model, dict(input_ids=ids, labels=ids, use_cache=False), operations=share)


def paper_images(runs: Runs) -> None:
    batch = 128 if DEVICE == "cuda" else runs.options.batch
    config = RevDEQVisionConfig.paper_cifar10_multiscale(hidden_sizes=[128, 256, 256, 128], expansion_ratios=[1, 3, 3, 1])
    for layout in (torch.contiguous_format, torch.channels_last):
        model: Any = RevDEQForImageClassification(config).to(DEVICE, memory_format=layout).train()
        pixels = torch.randn(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=layout)
        labels = torch.randint(10, (batch,), device=DEVICE)
        shape = f"{batch} images, N={config.max_steps}, {str(layout).removeprefix('torch.')}"
        whole_model(runs, "paper_images", shape, model, dict(pixel_values=pixels, labels=labels), all_kept=2 * config.steps_per_stage[0])


def whole_model(
    runs: Runs, section: str, shape: str, model: Any, inputs: dict[str, Any], operations: float = 0.0, all_kept: int = 0
) -> None:
    """An update of a model by its gradient modes, uncompiled and compiled; `all_kept`: also with so many evaluations kept."""
    torch._dynamo.reset()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    programs = {"": model, ", compiled": torch.compile(model)}
    layers = [layer for _, layer in fixed_point_layers(model)]

    def update(gradient: str, kept: int, how: str) -> None:
        for layer in layers:
            layer.gradient, layer.keep_evaluations = gradient, kept
        with torch.autocast(DEVICE, torch.bfloat16, enabled=runs.options.bf16):
            loss = programs[how](**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    modes: dict[str, tuple[str, int]] = {"reversible": ("reversible", 1), "backprop": ("backprop", 1)}
    if all_kept:
        modes[f"reversible, keep_evaluations={all_kept}"] = "reversible", all_kept
    update("reversible", 1, "")  # makes the optimiser's state
    ways: Ways = {name + how: partial(update, *mode, how) for how in programs for name, mode in modes.items()}
    figures: dict[str, dict[str, Any]] = {}
    for name, way in runs.wanted(ways, "backprop").items():
        began = time.perf_counter()
        way()  # compiles
        seconds = time.perf_counter() - began
        figures[name] = {"peak_bytes": peak_of(way)}
        if name.endswith("compiled"):
            figures[name]["detail"] = f"first update {seconds:.0f} s"
        if name.startswith("reversible"):
            figures[name]["drift"] = max(layer.drift.item() for layer in layers)
    runs.add(section, shape, ways, "backprop", figures, operations)


def images(runs: Runs) -> None:
    options, steps, stages = runs.options, 2, [32, 64]
    side, batch = 32, 8 * options.batch
    shape: dict[str, Any] = dict(hidden_sizes=stages, num_labels=10)
    # a ResNet's stem divides the image by four, ours here by two
    resnet = partial(ResNetConfig, **shape, embedding_size=stages[0], layer_type="basic")
    networks: dict[str, Any] = {
        "ResNet of as many evaluations": ResNetForImageClassification(resnet(depths=[2 * steps] * len(stages))),
        "RevDEQ": RevDEQForImageClassification(RevDEQVisionConfig(**shape, expansion_ratios=[1, 1], stem_stride=2, max_steps=steps)),
        "ResNet of as many parameters": ResNetForImageClassification(resnet(depths=[2] * len(stages))),
    }
    labels = torch.randint(10, (batch,), device=DEVICE)
    ways: Ways = {}
    figures: dict[str, dict[str, Any]] = {}

    def update(model: Any, pixels: torch.Tensor, optimizer: torch.optim.Optimizer, gradient: str | None = None) -> None:
        for stage in model.model.stages if gradient else ():
            stage.gradient = gradient
        with torch.autocast(DEVICE, torch.bfloat16, enabled=options.bf16):
            loss = model(pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for name, network in networks.items():
        network.to(DEVICE).train()
        size = side if name == "RevDEQ" else 2 * side
        training = partial(
            update, network, torch.randn(batch, 3, size, size, device=DEVICE), torch.optim.AdamW(network.parameters(), fused=True)
        )
        training()  # makes the optimiser's state
        modes = {f"RevDEQ, {mode}": partial(training, mode) for mode in ("reversible", "backprop")}
        for way, function in (modes if name == "RevDEQ" else {name: training}).items():
            ways[way] = function
            figures[way] = {"peak_bytes": peak_of(function), "detail": f"{sum(p.numel() for p in network.parameters()):,} parameters"}
    figures["RevDEQ, reversible"]["drift"] = drift_of(networks["RevDEQ"], ways["RevDEQ, reversible"])
    runs.add("images", f"{batch} images, stages {stages}, N={steps}", ways, "ResNet of as many evaluations", figures)


def drift_of(model: Any, training: Callable[[], Any]) -> float:
    training()
    return max(layer.drift.item() for _, layer in fixed_point_layers(model))


@torch.no_grad()
def decode(runs: Runs) -> None:
    options, steps = runs.options, 4
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    candidates: dict[str, Any] = {name: model.to(DEVICE, dtype).eval() for name, model in models(options, steps).items()}
    figures = {name: {"detail": f"{model.get_memory_footprint() / 1e6:.0f} MB of weights"} for name, model in candidates.items()}
    if installed("torchao", "int8 weights"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        from torchao.utils import get_model_size_in_bytes

        for name in ("RevDEQ", f"Llama of {2 * steps} layers"):
            candidates[f"{name}, int8 weights"] = quantized = copy.deepcopy(candidates[name])
            quantize_(quantized, Int8WeightOnlyConfig())
            figures[f"{name}, int8 weights"] = {"detail": f"{get_model_size_in_bytes(quantized) / 1e6:.0f} MB of weights"}
    for batch in (1, 32):
        ids = torch.randint(options.vocabulary, (batch, 64), device=DEVICE)
        caches: dict[str, Any] = {}

        def tokens(name: str) -> None:
            for _ in range(8):
                candidates[name](ids[:, :1], past_key_values=caches[name], use_cache=True)  # noqa: B023
            caches[name].crop(-8)  # noqa: B023

        for name, model in candidates.items():
            caches[name] = DynamicCache(config=model.config)
            model(ids, past_key_values=caches[name], use_cache=True)
        ways: Ways = {name: partial(tokens, name) for name in candidates}
        runs.add("decode", f"batch {batch}, width {options.width}, N={steps}, 8 tokens", ways, f"Llama of {2 * steps} layers", figures)


@torch.no_grad()
def decode_compiled(runs: Runs) -> None:
    options, steps = runs.options, 4
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    asked: dict[str, Any] = runs.wanted(dict(models(options, steps)), f"Llama of {2 * steps} layers")
    candidates = {name: model.to(DEVICE, dtype).eval() for name, model in asked.items()}
    mode = "default" if DEVICE == "cpu" else "reduce-overhead"  # with CUDA graphs, as transformers does
    for batch in (1, 32):
        ids = torch.randint(options.vocabulary, (batch, 64), device=DEVICE)
        caches: dict[str, StaticCache] = {}
        programs: dict[str, Any] = {}

        def tokens(name: str) -> None:
            for _ in range(8):
                programs[name](ids[:, :1], past_key_values=caches[name], use_cache=True)  # noqa: B023
            for layer in caches[name].layers:  # noqa: B023
                layer.cumulative_length.sub_(8)

        figures: dict[str, dict[str, Any]] = {}
        for name, model in candidates.items():
            torch._dynamo.reset()
            caches[name] = StaticCache(config=model.config, max_cache_len=128)
            model(ids, past_key_values=caches[name], use_cache=True)
            programs[name] = torch.compile(model, fullgraph=True, mode=mode)
            began = time.perf_counter()
            tokens(name)
            figures[name] = {"detail": f"compiled in {time.perf_counter() - began:.0f} s"}
        ways: Ways = {name: partial(tokens, name) for name in candidates}
        shape = f"batch {batch}, width {options.width}, N={steps}, 8 tokens"
        runs.add("decode_compiled", shape, ways, f"Llama of {2 * steps} layers", figures)


# --- the rest ---


class Paced(nn.Module):
    """A convolution whose share in f, and with it the number of steps, each example has in its first channel: f = x + r conv(z)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular", bias=False)
        with torch.no_grad():  # its norm is at most the sum of those of its nine taps, and about half of that
            self.conv.weight.div_(torch.linalg.matrix_norm(self.conv.weight.permute(2, 3, 0, 1), 2).sum() / 2)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x[:, :1, :1, :1]) * self.conv(z)


@torch.no_grad()
def stop(runs: Runs) -> None:
    batch, channels, side, most = 32, 64, 32, 40
    x = torch.randn(batch, channels, side, side, device=DEVICE)
    x[:, 0] = torch.linspace(0.0, 3.0, batch, device=DEVICE)[:, None, None]
    block = Paced(channels).to(DEVICE)
    fixed, adaptive = (ReversibleFixedPoint(block, max_steps=most, tol=tol).eval() for tol in (None, 1e-4))
    taken = adaptive(x).steps.float().mean().item()
    detail: dict[str, dict[str, Any]] = {
        f"tol=1e-4, {most} at most": {"detail": f"{taken:.1f} steps on average, {taken / most:.3f} of all"}
    }
    ways: Ways = {f"{most} steps": lambda: fixed(x), f"tol=1e-4, {most} at most": lambda: adaptive(x)}
    runs.add("stop", f"{batch}x{channels}x{side}x{side}", ways, f"{most} steps", detail)


def compiled(runs: Runs) -> None:
    options, steps = runs.options, runs.options.steps[-1]
    block, x, rotary = transformer_block(options.batch, options.length, options.width, DEVICE)
    fast = copy.deepcopy(block)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layers = {
        "eager": ReversibleFixedPoint(block, beta=options.beta, max_steps=steps, drift_policy="ignore"),
        "compiled": ReversibleFixedPoint(fast, beta=options.beta, max_steps=steps, drift_policy="ignore"),
    }

    layers["compiled"].compile()

    def train(layer: ReversibleFixedPoint) -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=options.bf16):
            z = layer(x, position_embeddings=rotary).z
        z.float().square().mean().backward()

    began = time.perf_counter()
    train(layers["compiled"])
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    detail = f"first step {time.perf_counter() - began:.0f} s, {breaks} graph breaks"
    figures: dict[str, dict[str, Any]] = {
        "compiled": {"drift": layers["compiled"].drift.item(), "detail": detail},
        "eager": {"drift": layers["eager"].drift.item()},
    }
    shape = f"{options.batch}x{options.length}x{options.width}, N={steps}, beta={options.beta}"
    runs.add("compile", shape, {name: partial(train, layer) for name, layer in layers.items()}, "eager", figures)


def import_time(runs: Runs) -> None:
    """Processor seconds in fresh processes, which the waiting for others does not touch."""
    code = (
        "import time; from transformers import LlamaForCausalLM; began = time.process_time(); "
        "import revdeq_hf; print(time.process_time() - began)"
    )
    seconds = sorted(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(runs.options.repeats)
    )
    runs.keep_row("import", "", "import revdeq_hf", seconds=round(median(seconds), 3), detail=f"{seconds[0]:.3f} to {seconds[-1]:.3f} s")


SECTIONS: dict[str, Callable[[Runs], None]] = {
    "step": step,
    "language": language,
    "paper": paper,
    "paper_images": paper_images,
    "images": images,
    "decode": decode,
    "decode_compiled": decode_compiled,
    "stop": stop,
    "compile": compiled,
    "import": import_time,
}


# --- what is shown ---


def place(row: dict[str, str]) -> str:
    """Where a row was measured: the accelerator, or so many threads of a processor."""
    return row["device"].removeprefix("NVIDIA ") if " " in row["device"] else f"{row['threads']} threads"


def last_run(rows: list[dict[str, str]], section: str) -> list[dict[str, str]]:
    """The newest rows of a section of each shape, precision, device and number of threads, in their order."""
    return newest((row for row in rows if row["section"] == section), "f", "shape", "way", "device", "threads")


def tables(rows: list[dict[str, str]]) -> str:
    lines = []
    for section in dict.fromkeys(row["section"] for row in rows):
        lines += [
            "",
            f"### {section}",
            "",
            "| f, shape | way | time, as a ratio (least to greatest) | peak MB | drift | |",
            "|" + "---|" * 6,
        ]
        for row in last_run(rows, section):
            ratio = (
                f"{row['ratio']} ({row['least']} to {row['greatest']})" if row["ratio"] else f"{row['seconds']} s" if row["seconds"] else ""
            )
            peak = f"{int(row['peak_bytes']) / 1e6:.0f}" if row["peak_bytes"] else ""
            lines.append(
                f"| {row['f']} {row['shape']}, {place(row)} | {row['way']} | {ratio} | {peak} | {row['drift']} | {row['detail']} |"
            )
    return "\n".join(lines[1:])


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """A bar for each way of the sections that were timed; the reference is at 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, list[dict[str, str]]] = {}
    for section in SECTIONS:
        for row in last_run(rows, section):
            if row["ratio"]:
                groups.setdefault(f"{section}: {row['f']}, {row['shape']}, {place(row)}", []).append(row)
    if not groups:
        raise ValueError(f"{RESULTS / 'speed.csv'} has no rows to draw; run the benchmark first")
    room = [len(group) + 3 for group in groups.values()]  # for the bars, and for the title
    columns: list[list[str]] = [[], [], []]
    for number, title in enumerate(groups):
        columns[min(2, 3 * sum(room[:number]) // sum(room))].append(title)
    columns = [column for column in columns if column]
    figure = pyplot.figure(figsize=(7 * len(columns), 0.22 * sum(room) / len(columns) + 1.5), layout="constrained")
    figure.supxlabel("time as a ratio to the way at the dotted line; whiskers: all turns")
    for part, titles in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
        heights = [len(groups[title]) for title in titles]
        panels = part.subplots(len(titles), 1, squeeze=False, sharex=True, height_ratios=heights)
        for axes, title in zip(panels[:, 0], titles, strict=True):
            group = groups[title]
            ratios = [float(row["ratio"]) for row in group]
            spread = [[ratio - float(row["least"]) for ratio, row in zip(ratios, group, strict=True)]]
            spread.append([float(row["greatest"]) - ratio for ratio, row in zip(ratios, group, strict=True)])
            ours = [
                "#c05020" if any(word in row["way"] for word in ("reversible", "RevDEQ", "tol", "compiled")) else "#8090a0" for row in group
            ]
            axes.barh([row["way"] for row in group], ratios, xerr=spread, color=ours, ecolor="#404040")
            axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
            axes.set_xlim(0, 2.2)
            axes.invert_yaxis()
            axes.set_title(title, fontsize=9, loc="left")
            axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    summary, details = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), default=[name for name in SECTIONS if not name.startswith("paper") or DEVICE != "cpu"]
    )
    parser.add_argument("--ways", nargs="+", help="of the sections only these, and the one they are compared with; JAX is left out then")
    parser.add_argument("--bf16", action="store_true", help="the block under bfloat16 autocast, decoding with bfloat16 weights")
    parser.add_argument("--steps", type=int, nargs="+", default=[8], help="of the block alone")
    parser.add_argument("--memory_steps", type=int, nargs="*", default=[4, 64])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="run nothing, print what is kept")
    parser.add_argument("--plot", type=Path, help="run nothing, draw what is kept into this file")
    options = parser.parse_args(arguments)
    if options.table or options.plot:
        if options.plot:
            plot(kept("speed"), options.plot)
        else:
            print(tables(kept("speed")))
        return
    for section in options.only:
        torch.manual_seed(0)
        runs = Runs(options)
        SECTIONS[section](runs)
        print(keep("speed", runs.rows), flush=True)  # a section at a time: what has been measured is kept


if __name__ == "__main__":
    main()
