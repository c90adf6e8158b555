"""Flags of a command line that would have no effect are refused: whoever gives one expects something of it."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable


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
