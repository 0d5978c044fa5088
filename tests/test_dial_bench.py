"""The dial's bench: every number has its rows, and a row costs what was asked."""

import sys
from dataclasses import replace

import pytest

from wantrim.benchmarks import cases, dial
from wantrim.benchmarks.bench import Bench
from wantrim.benchmarks.cases import DEFAULT, SKIP, Point, dial_case, solve_plan
from wantrim.benchmarks.dial import OPTIONS, OPTIONS_AT, SPEEDUPS, all_cases, target_of
from wantrim.benchmarks.subjects import toy_subject
from wantrim.solve.dial import MAX_SPEEDUP

POINT = Point(6, 1.0, 5.0)


def test_every_number_has_a_row_beside_fewer_steps_and_every_option_its_own():
    cases = all_cases()
    assert len({case.key for case in cases}) == len(cases)
    assert max(SPEEDUPS) == MAX_SPEEDUP
    for speedup in SPEEDUPS:
        mine = {case.method for case in cases if case.target == target_of(speedup)}
        assert mine == {"fewer_steps", DEFAULT, SKIP}
    for speedup in OPTIONS_AT:
        mine = [c for c in cases if "options" in c.groups and c.target == target_of(speedup)]
        # beside the same without an option
        assert len(mine) == 1 + len(OPTIONS) and mine[0].setting == ""
        assert all(c.dial.speedup == pytest.approx(speedup, rel=1e-2) for c in mine)


def test_an_option_reaches_the_plan(tmp_path):
    run = Bench(toy_subject(), "t2v", POINT, 1, 1, tmp_path).sampling
    case = dial_case("options", 0.67, dense_first_steps=3)
    assert case.setting == "dense first steps 3"
    assert solve_plan(case, run).shares.shares[:3] == (1.0,) * 3
    whole = solve_plan(dial_case("options", 0.67, dense_last_steps=2), run).shares.shares
    assert whole[-2:] == (1.0,) * 2 and min(whole) < 1


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_row_costs_its_share(tmp_path, task):
    bench = Bench(toy_subject(), task, POINT, 1, 1, tmp_path)
    # 4 of 6 steps would be 0.67
    row = bench.run(dial_case("speedup", 0.6))["row"]
    assert row["flops_ratio"] == pytest.approx(0.6, rel=0.03)
    assert row["predicted_ratio"] == pytest.approx(row["flops_ratio"], rel=0.01)
    assert "on a part of the tokens" in row["knob"] and 10 < row["psnr_db"] < 60


def test_without_context_steps_are_whole_or_repeated(tmp_path):
    bench = Bench(toy_subject(), "t2v", POINT, 1, 1, tmp_path)
    case = dial_case("speedup", 0.5, SKIP)
    assert set(solve_plan(case, bench.sampling).shares.shares) == {0.0, 1.0}
    partial = solve_plan(dial_case("speedup", 0.6), bench.sampling).shares
    assert not set(partial.shares) <= {0.0, 1.0}
    without = solve_plan(replace(dial_case("speedup", 0.6), context=False), bench.sampling).shares
    assert set(without.shares) == {0.0, 1.0}
    row = bench.run(case)["row"]
    assert row["flops_ratio"] == pytest.approx(3 / 6, rel=1e-3)


def test_the_command_refuses_other_weights(monkeypatch, tmp_path):
    weights = tmp_path / "some.safetensors"
    weights.write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["dial", "--weights", str(weights), "--tasks", "t2v"])
    with pytest.raises(SystemExit, match="leave it out"):
        dial.main()


def test_the_fast_subset_is_one_number(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(dial, "run_cases", lambda args, cases, *rest: asked.append(cases))
    monkeypatch.setattr(sys, "argv", ["dial", "--work", str(tmp_path)])
    dial.main()
    assert {case.target for case in asked[0]} == {1.0, target_of(1.5)}
    assert cases.Case("speedup", "fewer_steps", "", target_of(1.5)) in asked[0]
