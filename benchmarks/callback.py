"""What does `RevDEQCallback` cost? The seconds inside its hooks, logs included, as a share of the seconds of training.

python benchmarks/callback.py
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import keep
from transformers import Trainer, TrainingArguments

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM
from revdeq_hf.training import RevDEQCallback


class Timed(RevDEQCallback):
    """Adds up the time of every hook after the beginning, which measures the matrix rate once."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        for name in ("on_step_begin", "on_substep_end", "on_step_end", "on_log"):
            setattr(self, name, partial(self.timed, getattr(self, name)))

    def timed(self, hook: Callable[..., None], *arguments: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        hook(*arguments, **kwargs)
        self.seconds += time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=192)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = RevDEQConfig(
        vocab_size=2048, hidden_size=options.width, intermediate_size=3 * options.width, num_attention_heads=4, max_steps=2
    )
    ids = torch.randint(0, 2048, (options.batch, options.length)).tolist()
    callback = Timed()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.updates,
            per_device_train_batch_size=options.batch,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=RevDEQForCausalLM(config), args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
        trainer.callback_handler.callbacks.insert(0, callback)
        seconds = trainer.train().metrics["train_runtime"]
    row = {
        **vars(options),
        "seconds_per_update": round(seconds / options.updates, 4),
        "callback_per_update": round(callback.seconds / options.updates, 6),
        "share": round(callback.seconds / seconds, 5),
    }
    print(row)
    keep("callback", [row])


if __name__ == "__main__":
    main()
