"""Generation with a trained language model: what a shared cache costs in quality and saves in memory, and what drafting with few steps gains.

- `steps`: perplexity of the text after other numbers of steps than in training, and the share of tokens whose residual is below 1e-3 then.
- `cache`: the text is read token by token (teacher forcing), so that every token attends to what the cache kept of its predecessors. Perplexity
  per token with one slot per evaluation (equal to the forward pass over the whole text, which is checked) and with shared slots, and the cache's bytes.
- `draft`: greedy decoding with `draft_max_steps=k` against plain greedy decoding of the same prompts: whether the tokens are the same, tokens per
  verification, evaluations of the block per token, time as a ratio.

    python examples/train_language.py --output_dir runs/language
    python benchmarks/generation.py --model runs/language --text some.txt
"""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import interleaved, keep, median
from transformers import AutoTokenizer, DynamicCache

from revdeq_hf import RevDEQForCausalLM

COLUMNS = (
    *("what", "setting", "steps", "tokens", "perplexity", "settled", "cache_bytes", "differs_by"),
    *("same_text", "tokens_per_verification", "evaluations_per_token", "time_ratio"),
)


@torch.no_grad()
def step_rows(model: Any, ids: torch.Tensor, counts: list[int]) -> list[dict[str, Any]]:
    """ids (batch, length); one row for each number of steps."""
    rows = []
    for steps in counts:
        out = model(ids, labels=ids, max_steps=steps, output_solver_stats=True, use_cache=False)
        settled = (out.solver_residual < 1e-3).float().mean().item()
        rows.append(
            {
                "what": "steps",
                "steps": steps,
                "tokens": ids.numel(),
                "perplexity": round(math.exp(out.loss.item()), 3),
                "settled": round(settled, 3),
            }
        )
    return rows


def cache_rows(model: Any, ids: torch.Tensor, steps: int) -> list[dict[str, Any]]:
    """ids (batch, length); one row for each kind of cache."""
    rows = []
    with torch.no_grad():
        whole = model(ids, max_steps=steps, use_cache=False).logits
        for kind in ("per_evaluation", "shared"):
            model.config.kv_cache, own = kind, model.config.kv_cache
            model.config.max_steps, trained = steps, model.config.max_steps
            try:
                cache: Any = DynamicCache(config=model.config)
                logits = torch.cat([model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(ids.shape[1])], 1)
            finally:
                model.config.kv_cache, model.config.max_steps = own, trained
            if kind == "per_evaluation":
                torch.testing.assert_close(logits, whole, rtol=0, atol=1e-3)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).item()
            rows.append(
                {
                    "what": "cache",
                    "setting": kind,
                    "steps": steps,
                    "tokens": ids.numel(),
                    "perplexity": round(math.exp(loss), 3),
                    "cache_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
                    "differs_by": f"{(logits - whole).abs().max().item():.1e}",
                }
            )
    return rows


def draft_rows(model: Any, prompts: list[torch.Tensor], steps: int, new_tokens: int, repeats: int) -> list[dict[str, Any]]:
    settings: dict[str, Any] = dict(max_steps=steps, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    calls: list[tuple[int, int]] = []

    def write(draft: int | None) -> list[torch.Tensor]:
        calls.clear()
        extra = {} if draft is None else {"draft_max_steps": draft}
        return [model.generate(prompt, **settings, **extra) for prompt in prompts]

    def note(module: Any, given: tuple, named: dict[str, Any]) -> None:
        calls.append((named.get("max_steps") or steps, named["input_ids"].shape[1]))

    drafts: list[int | None] = [None, *range(1, steps)]
    rows: list[dict[str, Any]] = []
    reference: list[torch.Tensor] = []
    for draft in drafts:
        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        texts = write(draft)
        handle.remove()
        reference = reference or texts
        written = sum(len(text[0]) - prompt.shape[1] for text, prompt in zip(texts, prompts, strict=True))
        verifications = sum(count == steps for count, _ in calls)
        rows.append(
            {
                "what": "draft",
                "setting": "plain" if draft is None else f"draft of {draft}",
                "steps": steps,
                "tokens": written,
                "same_text": all(torch.equal(a, b) for a, b in zip(texts, reference, strict=True)),
                "tokens_per_verification": round(written / verifications, 3),
                # calls in sequence, whatever number of tokens they take at once: what decoding waits for
                "evaluations_per_token": round(sum(2 * count for count, _ in calls) / written, 2),
            }
        )
    times = interleaved({str(draft): partial(write, draft) for draft in drafts}, repeats, warm_up=0)
    for row, draft in zip(rows, drafts, strict=True):
        row["time_ratio"] = round(median([a / b for a, b in zip(times[str(draft)], times["None"], strict=True)]), 3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", required=True, help="folder of a trained model with its tokenizer")
    parser.add_argument("--text", required=True, help="text file that the model was not trained on")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = RevDEQForCausalLM.from_pretrained(options.model).eval()
    ids = tokenizer(Path(options.text).read_text(encoding="utf-8"), return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    if len(ids) < options.batch * options.length:
        raise ValueError(f"--text must hold {options.batch * options.length} tokens (batch x length), got {len(ids)}")
    batch = ids[: options.batch * options.length].view(options.batch, options.length)
    trained = model.config.max_steps
    rows = step_rows(model, batch, [1, 2, trained, 2 * trained, 4 * trained, 12 * trained])
    rows += [row for steps in (trained, 2 * trained, 4 * trained) for row in cache_rows(model, batch, steps)]
    prompts = [batch[row % len(batch) : row % len(batch) + 1, :32] for row in range(options.prompts)]
    for steps in (trained, 2 * trained):
        if steps > 1:
            rows += draft_rows(model, prompts, steps, options.new_tokens, options.repeats)
    description = f"{model.config.block_type} {model.config.hidden_size}, trained at {trained} steps"
    for row in rows:
        print(row)
    print(
        keep(
            "generation",
            [{"model": description, **dict.fromkeys(COLUMNS, ""), **row} for row in rows],
        )
    )


if __name__ == "__main__":
    main()
