"""Predicted peaks of training steps beside measured ones, for a dozen configs of both models.

The prediction is `revdeq_hf.memory.plan_memory`; the measured step is the second one of a run of transformers' Trainer on the CPU. Two measures: what
torch's allocator handed out, by its profiler, which includes the room that kernels take for themselves; and the bytes of all tensors (`LiveBytes`).

    python benchmarks/memory_plan.py            # measures; about five minutes
    python benchmarks/memory_plan.py --table    # prints the table of docs/memory.md from the rows that are kept
"""

import argparse
import contextlib
import tempfile
import time
from typing import Any

import torch
import transformers
from common import keep, kept
from torch.profiler import ProfilerActivity, profile

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQForImageClassification, RevDEQVisionConfig
from revdeq_hf.memory import Config, plan_memory
from revdeq_hf.training import LiveBytes

TEXT = dict(vocab_size=2048, hidden_size=128, intermediate_size=384, num_attention_heads=4)
IMAGE = dict(hidden_sizes=[16, 32], expansion_ratios=[2, 1], num_labels=10)
# name, config, batch, length, settings
CASES: list[tuple[str, Config, int, int | None, dict[str, Any]]] = [
    ("text, 8 steps", RevDEQConfig(**TEXT, max_steps=8), 8, 128, {}),
    ("text, 8 steps", RevDEQConfig(**TEXT, max_steps=8), 8, 128, dict(precision="bf16", gradient="checkpoint")),
    ("text, 8 steps", RevDEQConfig(**TEXT, max_steps=8), 8, 128, dict(optimizer="sgd", gradient="backprop")),
    ("text, 4 steps", RevDEQConfig(**TEXT, max_steps=4), 16, 64, dict(precision="bf16", gradient="backprop")),
    ("text, 40 steps, beta 0.8", RevDEQConfig(**TEXT, max_steps=40, beta=0.8), 2, 128, dict(precision="bf16", optimizer="sgd")),
    ("text, paper's block, 4 steps, tol", RevDEQConfig(**TEXT, block_type="paper", max_steps=4, tol=1e-9), 4, 448, {}),
    ("text, 2 layers, grouped heads", RevDEQConfig(**TEXT, num_block_layers=2, num_key_value_heads=2), 4, 128, dict(gradient="checkpoint")),
    ("text, eager attention", RevDEQConfig(**TEXT, attn_implementation="eager"), 2, 256, dict(gradient="backprop")),
    ("text, padded", RevDEQConfig(**TEXT), 4, 256, dict(padded=True)),
    ("text, 4 micro-batches", RevDEQConfig(**TEXT), 2, 64, dict(optimizer="adamw_torch", gradient_accumulation_steps=4)),
    ("text, weights in bfloat16", RevDEQConfig(**TEXT), 4, 128, dict(precision="pure_bf16", optimizer="adafactor")),
    ("images, 4 steps", RevDEQVisionConfig(**IMAGE), 16, None, dict(optimizer="sgd")),
    ("images, 4 steps", RevDEQVisionConfig(**IMAGE), 16, None, dict(gradient="backprop")),
    ("images, 12 steps", RevDEQVisionConfig(**IMAGE, max_steps=12), 8, None, dict(gradient="checkpoint")),
    ("images, 4 steps", RevDEQVisionConfig(**IMAGE), 8, None, dict(precision="bf16")),
    ("images, 4 steps", RevDEQVisionConfig(**IMAGE), 8, None, dict(precision="bf16", gradient="backprop")),
]


class AllocatorPeak(transformers.TrainerCallback):
    """Bytes that the allocator of the CPU had handed out at the most in the second update, beside what is there all the time."""

    def __init__(self) -> None:
        self.peak = 0
        self._profile: Any = None

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if state.global_step == 1:
            optimizer = getattr(optimizer, "optimizer", optimizer)
            lasting = [*model.parameters(), *model.buffers(), *(v for s in optimizer.state.values() for v in s.values())]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in lasting if isinstance(t, torch.Tensor)}
            self.peak = sum(storages.values())
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._profile is not None:
            self._profile.stop()
            events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
            alive = most = 0
            for event in sorted(events, key=lambda e: e.start_ns()):
                alive += event.nbytes()
                most = max(most, alive)
            self.peak, self._profile = self.peak + most, None


def examples(config: Config, count: int, length: int | None, padded: bool) -> list[dict[str, torch.Tensor]]:
    if isinstance(config, RevDEQVisionConfig):
        shape = (config.num_channels, config.image_size, config.image_size)
        return [dict(pixel_values=torch.randn(shape), labels=torch.tensor(i % config.num_labels)) for i in range(count)]
    assert length is not None
    rows = torch.randint(config.vocab_size, (count, length))
    mask = {"attention_mask": (torch.arange(length) < length - 5).long()} if padded else {}
    return [dict(input_ids=row, labels=row.clone(), **mask) for row in rows]


def measure(config: Config, batch: int, length: int | None, settings: dict[str, Any]) -> tuple[int, int]:
    """Peak bytes of tensors and of the allocator."""
    settings = {"precision": "fp32", "optimizer": "adamw_torch_fused", "padded": False, "gradient_accumulation_steps": 1, **settings}
    config.gradient = settings.get("gradient", config.gradient)
    accumulated = settings["gradient_accumulation_steps"]
    model_class: Any = RevDEQForImageClassification if isinstance(config, RevDEQVisionConfig) else RevDEQForCausalLM
    allocator = AllocatorPeak()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            optim=settings["optimizer"],
            bf16=settings["precision"] == "bf16",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data: Any = examples(config, 2 * batch * accumulated, length, settings["padded"])
        memory = stack.enter_context(LiveBytes())
        model = model_class._from_config(config, dtype=torch.bfloat16 if settings["precision"] == "pure_bf16" else torch.float32)
        memory.peak = 0
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=[allocator]).train()
    return memory.peak, allocator.peak


def table() -> None:
    """The last run's rows as Markdown."""
    rows = kept("memory_plan")[-len(CASES) :]
    print("| config | batch | gradient | precision | optimiser | predicted | measured | difference | of all tensors |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        predicted, tensors, allocator = (int(row[name]) for name in ("predicted", "tensors", "allocator"))
        cells = [row["config"], row["batch"], *(f"`{row[name]}`" for name in ("gradient", "precision", "optimizer"))]
        sizes = [f"{size / 1e6:.2f} MB" for size in (predicted, allocator)]
        print(f"| {' | '.join([*cells, *sizes])} | {predicted / allocator - 1:+.2%} | {tensors / 1e6:.2f} MB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--table", action="store_true", help="print the kept rows of the last run instead")
    if parser.parse_args().table:
        table()
        return
    rows = []
    for name, config, batch, length, settings in CASES:
        torch.manual_seed(0)
        began = time.perf_counter()
        plan = plan_memory(config, batch, length, **settings)
        seconds = time.perf_counter() - began
        tensors, allocator = measure(config, batch, length, settings)
        rows.append(
            {
                "config": name,
                "batch": str(batch) if length is None else f"{batch} x {length}",
                "gradient": plan.gradient,
                "precision": plan.precision,
                "optimizer": plan.optimizer,
                "predicted": plan.peak,
                "tensors": tensors,
                "allocator": allocator,
                "phase": plan.phase,
                "seconds": round(seconds, 2),
            }
        )
        print(rows[-1], f"{plan.peak / tensors - 1:+.2%} {plan.peak / allocator - 1:+.2%}", flush=True)
    print(keep("memory_plan", rows))


if __name__ == "__main__":
    main()
