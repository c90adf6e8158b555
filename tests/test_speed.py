"""The harness of benchmarks/speed.py runs at a small size, and its rows say what they are of."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.mark.slow
def test_rows_table_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import common
    import speed

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(speed, "installed", lambda library, ways: False)
    tiny = [
        "--batch",
        "2",
        "--length",
        "8",
        "--width",
        "32",
        "--vocabulary",
        "64",
        "--steps",
        "3",
        "--memory_steps",
        "40",
        "--repeats",
        "2",
    ]
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)  # a compilation takes half a minute each
    sections = ["step", "language", "images", "decode", "decode_compiled"]
    speed.main([*tiny, "--only", *sections])
    rows = common.kept("speed")
    assert {row["section"] for row in rows} == {"memory", *sections}
    for row in rows:
        reference = row["way"] == row["against"]
        assert not row["ratio"] or (float(row["least"]) <= float(row["ratio"]) <= float(row["greatest"]) and float(row["seconds"]) > 0)
        assert not reference or row["ratio"] == "1.0"
        if "reversible" in row["way"]:
            assert float(row["drift"]) == 0
    peaks = {row["way"]: int(row["peak_bytes"]) for row in rows if row["section"] == "step"}
    assert peaks["reversible"] < peaks["backprop"]
    assert peaks["written out, torch.utils.checkpoint"] < peaks["written out, autograd"]
    kinds = {row["way"]: int(row["peak_bytes"]) for row in rows if row["section"] == "language"}
    assert kinds["RevDEQ, reversible"] < kinds["RevDEQ, backprop"]
    parameters = {row["way"]: row["detail"] for row in rows if row["section"] == "language"}
    assert len(set(parameters.values())) == 3  # RevDEQ's two ways are one model, and so are the greater Llama's

    speed.main([*tiny, "--only", "step", "--ways", "reversible"])
    fewer = [row for row in common.kept("speed")[len(rows) :] if row["section"] == "step"]
    assert {row["way"]: bool(row["peak_bytes"]) for row in fewer} == {"backprop": True, "reversible": True}

    newer = [{**row, "ratio": "0.5"} for row in rows[:1]]
    assert [row["ratio"] for row in speed.last_run(rows[:1] + newer, "step")] == ["0.5"]
    capsys.readouterr()
    speed.main(["--table"])
    table = capsys.readouterr().out
    assert all(row["way"] in table for row in rows)
    speed.main(["--plot", str(tmp_path / "speed.png")])
    assert (tmp_path / "speed.png").stat().st_size > 10_000
