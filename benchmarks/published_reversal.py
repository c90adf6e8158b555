"""Trains a language model as examples/train_language.py does, but through the reversal as published, which divides by 1 - beta in floating point.

    python benchmarks/published_reversal.py --state_dtype float32 --beta 0.8 --solver_steps 8 --output_dir runs/published

and every flag of train_language.py. What a wrong gradient costs: examples/recipes/study_gradients.yaml. The forward pass of the training is the
iteration in floating point of that precision; evaluation, saving and everything else are the script's. `drift` in the logs is that of the last update.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from gradients import FloatReversal, FloatSolve
from transformers import TrainerCallback

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import train_language


class DriftLog(TrainerCallback):
    """Adds the drift of the last backward pass to the logs, in the place of RevDEQCallback, whose figures are those of the exact solve."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs is not None and "loss" in logs:
            logs["drift"] = FloatReversal.drift
            if state.log_history:
                state.log_history[-1]["drift"] = FloatReversal.drift


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--state_dtype", choices=("float32", "float64"), default="float32")
    arguments = sys.argv[1:] if arguments is None else arguments
    options, rest = parser.parse_known_args(arguments)
    script: Any = train_language
    build, record = script.build_model, script.run_record
    command = f"python benchmarks/published_reversal.py {shlex.join(arguments)}"

    def published(*settings: Any) -> torch.nn.Module:
        model = build(*settings)
        exact = model.model.solve
        reversal, solve = FloatSolve(exact, getattr(torch, options.state_dtype), autocast=False, stored=False), exact.forward

        def forward(*inputs: Any, **kwargs: Any) -> Any:
            return (reversal if torch.is_grad_enabled() else solve)(*inputs, **kwargs)

        exact.forward = forward
        return model

    script.build_model, script.RevDEQCallback = published, DriftLog
    script.run_record = lambda _, device: record(command, device)
    return script.main(rest)


if __name__ == "__main__":
    main()
