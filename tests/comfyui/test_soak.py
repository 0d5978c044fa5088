"""The short form of soak.py: nothing grows with the runs."""

import runpy
import sys

import torch

from wantrim.benchmarks.table import RESULTS, read_rows
from wantrim.tests.comfyui import soak, test_accidents, tiny

RUNS = 30


def test_nothing_grows_with_the_runs(monkeypatch, tmp_path):
    """As the script by its own command; it ends in an error when anything is left over."""
    out = tmp_path / "soak.csv"
    monkeypatch.setattr(sys, "argv", ["soak.py", "--runs", str(RUNS), "--out", str(out)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(soak.__file__, run_name="__main__")
    (row,) = read_rows(out)
    figures = {name: float(row[name]) for name in soak.COLUMNS[:-4]}
    assert (figures["cancelled"], figures["raised"], figures["finished"]) == (3, 1, RUNS - 4)
    assert figures["of_runs_left"] == 0
    assert figures["tensors_end"] == figures["tensors_begin"]
    assert figures["carried_end"] == figures["carried_begin"]
    # less than one a run
    assert figures["objects_end"] - figures["objects_begin"] < RUNS
    assert figures["rss_mb_end"] - figures["rss_mb_begin"] < 32


def test_what_is_left_is_found():
    """Or the figures above would say nothing."""
    one = soak.Soak()
    one.run("tokens")
    before, kept = one.figures(), []
    held = soak.PLANS["tokens"](one.model)
    kept.append(tiny.watch(held))
    kept.append(test_accidents.run(held))
    after = one.figures()
    assert after["tensors"] > before["tensors"] and after["objects"] > before["objects"]
    assert soak.carried(held) > soak.carried(one.model) == before["carried"]
    # another output of the same plan
    one.outputs["tokens"] = torch.zeros(1)
    one.run("tokens")
    assert one.wrong == ["tokens"]


def test_the_shipped_row_is_of_a_long_run():
    rows = read_rows(RESULTS / "soak.csv")
    assert list(rows[0]) == list(soak.COLUMNS)
    longest = max(rows, key=lambda row: int(row["runs"]))
    assert int(longest["runs"]) >= 200 and longest["of_runs_left"] == "0"
    assert longest["tensors_begin"] == longest["tensors_end"]
    assert longest["carried_begin"] == longest["carried_end"]
    assert float(longest["rss_mb_end"]) - float(longest["rss_mb_begin"]) < 32
