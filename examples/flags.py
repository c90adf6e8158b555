"""Flags of a command line that would have no effect, or that a script cannot follow, are refused: whoever gives one expects something of it."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


def given_flags(parser: ArgumentParser, arguments: list[str] | None) -> set[str]:
    """Names of the flags that the arguments (None: the program's own) hold, those that ask for their default included."""
    unset = object()
    names = vars(parser.parse_args(arguments))
    return {
        name for name, value in vars(parser.parse_args(arguments, Namespace(**dict.fromkeys(names, unset)))).items() if value is not unset
    }


def refuse_idle(given: set[str], idle: Iterable[str], reason: str) -> None:
    """A ValueError where one of the `idle` flags is given, which the reason tells why it does nothing."""
    if found := [f"--{name}" for name in idle if name in given]:
        raise ValueError(f"{', '.join(found)} would have no effect: {reason}. Leave {'it' if len(found) == 1 else 'them'} out")


def refuse_zero3() -> None:
    """A ValueError for DeepSpeed's ZeRO-3 (of --deepspeed, or of accelerate launch), with which no rank has the whole weights that the scripts report on at the
    end. To be called once TrainingArguments are there, which set DeepSpeed up."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed with ZeRO-3: no rank has whole weights, on which this script reports at its end; use stage 2, or FSDP2 "
            "(examples/accelerate/fsdp2.yaml). In a Trainer of your own ZeRO-3 works"
        )
