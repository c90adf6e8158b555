"""Does a RevDEQ language model start better from a pretrained transformer's weights than from random ones, and how long does it stay ahead?

Every start is fine-tuned on the same sequences in the same order, with the same optimiser; its validation loss is taken before, on the
way and at the end. Controls: the same shape with random weights throughout ("random"), and with the source's embeddings, last norm and head but random
layers ("no layers"). A row is kept per finished run; runs that have a row are skipped, so the command can be stopped and started again.

    python benchmarks/init_from.py --source FOLDER --train_file train.txt --validation_file valid.txt
    python benchmarks/init_from.py --table          # the rows kept so far, as Markdown
"""

import argparse
import gzip
from pathlib import Path
from typing import Any

import torch
from common import fit, keep, kept
from transformers import AutoModelForCausalLM, AutoTokenizer

from revdeq_hf import RevDEQForCausalLM
from revdeq_hf.init_from import init_from

SEQUENCE, RATE, STEPS, BETA = 128, 1e-3, 4, 0.5
OUTSIDE = {"num_prelude_layers": 2, "num_coda_layers": 2}
# of a source of any depth from 5 on: the layer in the middle, what stands around it, and what the layers are replaced by
STARTS: dict[str, dict[str, Any]] = {
    "one layer: random": {"layers": 0, "random": "all"},
    "one layer: no layers": {"layers": 0, "random": "layers"},
    "one layer: the first": {"layers": 0},
    "one layer: the middle": {"layers": "middle"},
    "one layer: the mean": {"layers": "mean"},
    "2 + 1 + 2: random": {"layers": "middle", "random": "all", **OUTSIDE},
    "2 + 1 + 2: no layers": {"layers": "middle", "random": "layers", **OUTSIDE},
    "2 + 1 + 2: the middle": {"layers": "middle", **OUTSIDE},
    "2 + 1 + 2: the middle, half from the state": {"layers": "middle", "state_gain": 0.5, **OUTSIDE},
    "2 + 1 + 2: the mean": {"layers": "mean", **OUTSIDE},
    "2 + all + 2": {"layers": "all", **OUTSIDE},
    "all": {"layers": "all"},
}


def start(source: Any, random: str | None = None, **settings: Any) -> RevDEQForCausalLM:
    """A start of `STARTS`; random: which weights are not taken over, None, "layers" or "all"."""
    if settings["layers"] == "middle":
        settings["layers"] = (source.config.num_hidden_layers - 1) // 2
    model: Any = init_from(source, max_steps=STEPS, beta=BETA, gradient="backprop", **settings)  # the gradients of reversal, at less time
    if random is None:
        return model
    torch.manual_seed(0)
    fresh: Any = RevDEQForCausalLM(model.config)
    if random == "layers":
        fresh.lm_head.load_state_dict(model.lm_head.state_dict())
        for name in ("embed_tokens", "embed_positions", "norm"):
            if hasattr(fresh.model, name):
                getattr(fresh.model, name).load_state_dict(getattr(model.model, name).state_dict())
    return fresh


def tokens(tokenizer: Any, path: Path) -> torch.Tensor:
    """(number, SEQUENCE): the text in sequences."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
        ids = torch.tensor(tokenizer(file.read(), add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < SEQUENCE:
        raise SystemExit(f"{path} must have at least {SEQUENCE} tokens, got {len(ids)}")
    return ids[: len(ids) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)


@torch.no_grad()
def loss_of(model: Any, rows: torch.Tensor) -> float:
    training = model.training
    model.eval()
    total = sum(model(part, labels=part, use_cache=False).loss.item() * len(part) for part in rows.split(8))
    model.train(training)
    return round(total / len(rows), 4)


def tune(name: str, model: Any, train: torch.Tensor, validation: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Losses before, after a quarter of the updates and after all, and the seconds of training."""
    before, order, losses = loss_of(model, validation), torch.Generator().manual_seed(options.seed), []
    batches = torch.randint(len(train), (options.updates, options.batch), generator=order)
    done = iter(range(options.updates))

    def next_loss() -> torch.Tensor:
        update = next(done)
        if update == options.updates // 4:
            losses.append(loss_of(model, validation))
        rows = train[batches[update]]
        return model(rows, labels=rows, use_cache=False).loss

    _, seconds = fit(name, model, next_loss, options.updates, RATE, weight_decay=0.1, warm_up=max(1, options.updates // 20))
    return {"loss_before": before, "loss_quarter": losses[0], "loss": loss_of(model, validation), "seconds": seconds}


def table() -> None:
    """Prints the rows as Markdown, a table for each source."""
    rows = kept("init_from")
    for source in dict.fromkeys((row["source"], row["updates"]) for row in rows):
        print(f"\n{source[0]}, {source[1]} updates\n\n| start | parameters | before | after a quarter | after all |\n|{'---|' * 5}")
        for row in rows:
            if (row["source"], row["updates"]) == source:
                losses = (f"{float(row[column]):.2f}" if row[column] else "" for column in ("loss_before", "loss_quarter", "loss"))
                print(f"| {row['start']} | {int(row['parameters']) / 1e6:.2f}M | {' | '.join(losses)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--source", type=Path, help="folder of a causal language model with its tokenizer")
    parser.add_argument("--train_file", type=Path, help="text to fine-tune on, plain or .gz")
    parser.add_argument("--validation_file", type=Path, help="text to judge by, plain or .gz")
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), metavar="START", default=list(STARTS), help="only these")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help=f"sequences of {SEQUENCE} tokens in an update")
    parser.add_argument("--validation_rows", type=int, default=64, help=f"sequences of {SEQUENCE} tokens to judge by")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the sequences")
    parser.add_argument("--table", action="store_true", help="print the rows kept so far and stop")
    options = parser.parse_args()
    if options.table:
        return table()
    if not (options.source and options.train_file and options.validation_file):
        parser.error("--source, --train_file and --validation_file are needed")
    torch.set_num_threads(1)
    tokenizer, source = AutoTokenizer.from_pretrained(options.source), AutoModelForCausalLM.from_pretrained(options.source).eval()
    train, validation = (tokens(tokenizer, path) for path in (options.train_file, options.validation_file))
    validation = validation[: options.validation_rows]
    shape = (
        f"{options.source.name}, {source.config.model_type} of {source.config.num_hidden_layers} layers, width {source.config.hidden_size}"
    )
    settings = {
        "source": shape,
        "rate": RATE,
        "seed": options.seed,
        "updates": options.updates,
        "tokens": options.updates * options.batch * SEQUENCE,
    }
    finished = {(row["source"], row["start"], row["seed"], row["tokens"]) for row in kept("init_from")}
    for name in ("the source itself", *options.starts):
        if (shape, name, str(options.seed), str(settings["tokens"])) in finished:
            print(f"{name}: has a row")
            continue
        if name in STARTS:
            model: Any = start(source, **STARTS[name])
            found = tune(name, model, train, validation, options)
        else:
            model, found = source, {"loss_before": loss_of(source, validation), "loss_quarter": "", "loss": "", "seconds": ""}
        row = {**settings, "start": name, "parameters": model.num_parameters(), **found}
        print(row, flush=True)
        keep("init_from", [row])
    return None


if __name__ == "__main__":
    main()
