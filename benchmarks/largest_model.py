"""The widest language model whose training step fits into a memory, for each gradient mode and number of steps; and what a batch of it needs.

    python benchmarks/largest_model.py            # predicts what has no row yet in benchmarks/results/largest_model.csv; some minutes, no memory to speak of
    python benchmarks/largest_model.py --table

The paper's block, GPT-2's vocabulary, 32 sequences of 448 tokens, bfloat16 autocast, AdamW; a tenth of the memory in reserve. By
`revdeq_hf.memory.plan_memory`, which was within 4% of what was measured on the CPU; an H100 took up to 7% more (docs/memory.md).
"""

import argparse
from functools import cache

import torch
from common import keep, kept

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM
from revdeq_hf.memory import plan_memory

HEAD, BATCH, LENGTH, RESERVE = 64, 32, 448, 0.1
MODES, STEPS, BUDGETS = ("reversible", "checkpoint", "backprop"), (4, 16), (8, 24)


def config_of(width: int, steps: int) -> RevDEQConfig:
    heads = width // HEAD
    return RevDEQConfig.paper_wikitext103(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads, max_steps=steps, tol=None
    )


@cache
def peak(width: int, mode: str, steps: int) -> int:
    return plan_memory(config_of(width, steps), BATCH, LENGTH, precision="bf16", gradient=mode).peak


def parameters(width: int) -> int:
    with torch.device("meta"):
        return RevDEQForCausalLM(config_of(width, 1)).num_parameters() if width else 0


def widest(mode: str, steps: int, budget: int) -> int:
    """Greatest multiple of `HEAD` that fits, by bisection; 0 if none does."""
    room = int((1 - RESERVE) * budget * 10**9)
    least, most = 0, 8192 // HEAD
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if peak(middle * HEAD, mode, steps) <= room else (least, middle - 1)
    return least * HEAD


def table() -> str:
    lines = ["| memory | steps | mode | widest | parameters | peak |", "|---|---|---|---|---|---|"]
    for row in kept("largest_model"):
        size, bytes_ = int(row["parameters"]) / 1e6, int(row["peak_bytes"]) / 1e9
        lines.append(f"| {row['budget_gb']} GB | {row['steps']} | {row['mode']} | {row['width']} | {size:.0f}M | {bytes_:.1f} GB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--table", action="store_true", help="print the rows that are kept, as Markdown")
    if parser.parse_args().table:
        print(table())
        return
    done = {(int(row["budget_gb"]), int(row["steps"]), row["mode"]) for row in kept("largest_model")}
    for budget in BUDGETS:
        for steps in STEPS:
            for mode in MODES:
                if (budget, steps, mode) in done:
                    continue
                width = widest(mode, steps, budget)
                row = {"budget_gb": budget, "steps": steps, "mode": mode, "width": width, "parameters": parameters(width)}
                keep("largest_model", [{**row, "peak_bytes": peak(width, mode, steps) if width else 0}])
                print(row, flush=True)


if __name__ == "__main__":
    main()
