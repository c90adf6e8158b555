"""The benchmarks whose stand-ins for the layer have to keep up with the models run at their smallest size."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def common(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return common


def test_gradients_of_the_reversal_as_published(common):
    importlib.import_module("gradients").main(["--steps", "1", "3", "--betas", "0.8", "--hidden_size", "32", "--length", "8"])
    rows = common.kept("gradients")
    assert len(rows) == 2 * 2 * 2 * 3
    for row in rows:
        assert float(row["loss_difference"]) < 1e-5
        if row["reversal"] == "exact":
            assert float(row["drift"]) == 0
            assert float(row["gradient_error"]) < (1e-5 if row["f"] == "float32" else 2e-2)
        elif row["reversal"] == "float64" and row["f"] == "float32":
            assert float(row["gradient_error"]) < 1e-3  # three steps do not use up its bits


def test_every_kind_of_gradient_trains_and_is_tested(common, monkeypatch):
    thinking = importlib.import_module("thinking_gradients")
    monkeypatch.setattr(thinking, "LONG", 34)  # bits, of a thousand strings and 128 steps
    arguments = ["--steps", "2", "--updates", "2", "--hidden", "8"]
    thinking.main(arguments)
    rows = common.kept("thinking_gradients")
    assert [row["way"] for row in rows] == list(thinking.WAYS)
    assert next(row for row in rows if row["way"] == "reversible")["drift"] == "0.0"
    thinking.main(arguments)
    assert common.kept("thinking_gradients") == rows  # those are done
    assert all(f"| {way} |" in thinking.table() for way in thinking.WAYS)
