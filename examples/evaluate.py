#!/usr/bin/env python
"""Measures a saved language or image model: quality with its protocol, steps against quality, residuals and drift.

    python examples/evaluate.py runs/language
    python examples/evaluate.py runs/language --train_file my.txt --test_file other.txt --window 256 --stride 64
    python examples/evaluate.py runs/image
    python examples/evaluate.py runs/image --help            # every flag, those of the data among them

Writes `evaluation.json` and `evaluation_steps.png` into the model's folder; `python -m revdeq_hf.model_card` makes a card of them. The measuring itself is in
`evaluation.py`.

Python looks for modules in a script's own folder first, so for the scripts beside this one `import evaluate` would find this file. It then stands aside for
the library of that name.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path


def stand_aside() -> None:
    """Puts the library `evaluate` in this module's place."""
    here = Path(__file__).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("evaluate", elsewhere)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("the library evaluate is not installed: python -m pip install evaluate", name="evaluate")
    library = sys.modules["evaluate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)


if __name__ == "evaluate":
    stand_aside()
elif __name__ == "__main__":
    from evaluation import main

    main()
