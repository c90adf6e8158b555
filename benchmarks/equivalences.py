"""Do two ranks train what one trains, and a run that was stopped what it would have become?

Small models in real processes, two ranks on a CPU over gloo, under DDP, FSDP2 and, where it is installed, DeepSpeed's ZeRO, by transformers' Trainer, by
the example scripts, and single batches without Trainer. What is run and what must agree stands in tests/distributed_worker.py, from which
tests/test_distributed.py takes it, too.

    python benchmarks/equivalences.py            # rows in results/equivalences.csv; exit code 1 if a pair does not agree as promised
    python benchmarks/equivalences.py --table    # the table of docs/equivalences.md, from the last row of each pair
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import keep, kept

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import distributed_worker as worker

KINDS = ("losses", "gradient", "weight", "predictions")


def promise(tolerance: float | None) -> str:
    return "none" if tolerance is None else "every bit" if tolerance == 0 else f"to {tolerance:g}"


def rows_of(folder: Path, pairs: tuple[worker.Equivalence, ...]) -> list[dict[str, Any]]:
    rows = []
    for pair in pairs:
        found = worker.difference(folder, pair)
        figures = {f"{kind}{part}": found.get(f"{kind}{part}", "") for kind in KINDS for part in ("", "_scale")}
        share = worker.worst(found)
        agrees = "" if pair.tolerance is None else share <= pair.tolerance
        rows.append(
            {"pair": pair.text, "runs": f"{pair.run} {pair.other}", "promised": promise(pair.tolerance), "agrees": agrees, **figures}
        )
        print(f"{share:8.1e} {promise(pair.tolerance):>10} {pair.text}", flush=True)
    return rows


def table() -> None:
    last = {row["pair"]: row for row in kept("equivalences")}
    print("| the two runs | losses | gradients | final weights | predictions | promised |")
    print("|---|---|---|---|---|---|")
    for pair in (*worker.EQUIVALENCES, *worker.ZERO_EQUIVALENCES, *worker.SCRIPT_EQUIVALENCES):
        row = last[pair.text]
        cells = ["" if row[kind] == "" else f"{float(row[kind]):.0e} of {float(row[f'{kind}_scale']):.2g}" for kind in KINDS]
        print("|", " | ".join([pair.text, *(cell.replace("0e+00 of", "0 of") for cell in cells), row["promised"]]), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--table", action="store_true")
    if parser.parse_args().table:
        table()
        return
    pairs, scripts = worker.EQUIVALENCES, worker.SCRIPT_EQUIVALENCES
    if importlib.util.find_spec("deepspeed"):
        pairs += worker.ZERO_EQUIVALENCES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        worker.launch_all(folder, list(dict.fromkeys(run for pair in pairs for run in (pair.other, pair.run))))
        for run in dict.fromkeys(run for pair in scripts for run in (pair.other, pair.run)):
            worker.launch_script(folder, run)
        rows = rows_of(folder, (*pairs, *scripts))
    print(keep("equivalences", rows))
    sys.exit(any(row["agrees"] is False for row in rows))


if __name__ == "__main__":
    main()
