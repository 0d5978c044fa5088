"""The dial's bench: every priority has its rows, and a row costs what its target says."""

import sys

import pytest

from wantrim.benchmarks import cases, dial, guidance
from wantrim.benchmarks.cases import Point
from wantrim.benchmarks.depth import DepthCase
from wantrim.benchmarks.dial import TARGETS, WITH, WITHOUT, DialBench, DialCase, all_cases
from wantrim.benchmarks.subjects import toy_subject
from wantrim.benchmarks.table import RESULTS, read_rows
from wantrim.methods.mixes import AUTO, MIXES, candidates


def test_every_priority_has_a_row_beside_what_it_is_made_of():
    cases = all_cases()
    assert len({case.key for case in cases}) == len(cases)
    for target in TARGETS:
        mine = [case for case in cases if case.target == target]
        found = {(c.priority, c.setting) for c in mine if isinstance(c, DialCase)}
        assert found == {(name, setting) for name in MIXES for setting in (WITH, WITHOUT)}
        assert {"fewer_steps", "mixed_update_once"} <= {case.method for case in mine}
    assert any(isinstance(case, DepthCase) for case in cases)


@pytest.mark.parametrize("setting", [WITH, WITHOUT])
def test_a_row_costs_its_share(tmp_path, setting):
    bench = DialBench(toy_subject(), "t2v", Point(6, 1.0, 5.0), 1, 1, tmp_path)
    result = bench.run(DialCase("dial", "balanced", setting, 0.67, None, "balanced"))
    row = result["row"]
    assert row["flops_ratio"] == pytest.approx(0.67, abs=0.03)
    assert row["predicted_ratio"] == pytest.approx(row["flops_ratio"], rel=0.03)
    assert row["knob"] and 10 < row["psnr_db"] < 60


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("steps", ["20", "4"])
@pytest.mark.parametrize("setting", [WITH, WITHOUT])
def test_what_auto_prefers_is_nowhere_behind_by_the_rows(task, steps, setting):
    at = {"task": task, "steps": steps, "setting": setting, "target": "0.67", "prompts": "32"}
    rows = {
        row["method"]: row
        for row in read_rows(RESULTS / "dial.csv")
        if all(row[name] == value for name, value in at.items())
    }
    assert rows.keys() == MIXES.keys()

    mine = rows[candidates(AUTO, task == "i2v")[0]]

    # inside the interval of whichever leads
    assert all(float(mine["psnr_hi"]) >= float(other["psnr_db"]) for other in rows.values())


def test_what_cannot_be_reached_has_no_row(tmp_path):
    bench = DialBench(toy_subject(), "t2v", Point(2, 1.0, 5.0), 1, 1, tmp_path)
    result = bench.run(DialCase("dial", "balanced", WITHOUT, 0.25, None, "balanced"))
    assert "row" not in result and "is the nearest" in result["unreachable"]


def test_the_command_refuses_other_weights(monkeypatch, tmp_path):
    weights = tmp_path / "some.safetensors"
    weights.write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["dial", "--weights", str(weights), "--tasks", "t2v"])
    with pytest.raises(SystemExit, match="leave it out"):
        dial.main()


def test_the_study_by_guidance_has_the_bench_to_compare_with():
    known = {(c.method, c.setting) for c in (*cases.all_cases(), *all_cases()) if c.target == 0.67}

    asked = {(c.method, c.setting) for c in guidance.all_cases()}

    assert asked <= known and {"fewer_steps", "mixed_update_once", "tape"} <= {m for m, _ in asked}
    assert {point.guidance for point in cases.POINTS}.isdisjoint(guidance.MORE)
