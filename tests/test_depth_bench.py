"""The depth bench: every question has its rows, and a row costs what its target says."""

import statistics
import sys

import pytest
import torch

from wantrim.benchmarks import depth, quality
from wantrim.benchmarks.cases import POINTS, TOLERANCE, Case, Point
from wantrim.benchmarks.depth import (
    PAPER_RATIO,
    ROUTERS,
    TARGETS,
    DepthBench,
    DepthCase,
    all_cases,
    depth_case,
    least_blocks,
    shipped_profile,
    solve_plan,
)
from wantrim.benchmarks.subjects import toy_subject
from wantrim.benchmarks.table import read_rows
from wantrim.hosts.diffusers.sample import sigmas_for
from wantrim.methods.depth import SHAPES, blocks_per_step
from wantrim.methods.fingerprint import Fingerprint
from wantrim.methods.profile import Profile
from wantrim.methods.routers import FixedRouter

FEW = Point(2, 1.0, shift=5.0)


@pytest.fixture(scope="module")
def toy():
    return toy_subject()


def test_the_issue_is_covered():
    cases = all_cases()
    assert len({case.key for case in cases}) == len(cases)
    for target in TARGETS:
        rows = [case for case in cases if case.target == target]
        assert any(case.method == "fewer_steps" for case in rows)
        plans = {c.method for c in rows if isinstance(c, DepthCase)}
        assert plans == set(ROUTERS) == {"profiled", "random", "static"}
        assert {c.curve for c in rows if "curve" in c.groups} == set(SHAPES)


@pytest.mark.parametrize("point", POINTS)
def test_budgets_are_solved_for_the_real_mean(point):
    sigmas = sigmas_for(point.steps, point.shift)[:-1].tolist()
    for case in all_cases():
        if not isinstance(case, DepthCase):
            continue
        plan, share = solve_plan(case, point, shipped_profile())
        counts = blocks_per_step(plan, sigmas, point.shift, 16)
        assert statistics.fmean(counts) / 16 == share
        assert share == pytest.approx(case.target, abs=TOLERANCE)
        if not isinstance(plan.router, FixedRouter) and plan.budget.k_max < 1:
            assert plan.budget.k_max == pytest.approx(PAPER_RATIO * plan.budget.k_min)


def test_static_removal_takes_the_blocks_that_add_least():
    """By hand: the mean of two bins is 9, 3, 4, 2, 1 and the ends stay."""
    made = Profile.empty(Fingerprint(8, 8, 5, 2, 4, 4))
    made.tensors["count"][[2, 9]] = 1
    made.tensors["hidden"] += 1
    made.tensors["residual"][2] = torch.tensor([9.0, 1.0, 4.0, 3.0, 1.0])
    made.tensors["residual"][9] = torch.tensor([9.0, 5.0, 4.0, 1.0, 1.0])
    assert least_blocks(made, [0.95, 0.25], 1) == (3,)
    assert least_blocks(made, [0.95, 0.25], 2) == (1, 3)
    assert least_blocks(made, [0.25], 1) == (1,)
    assert least_blocks(made, [0.25, 0.95], 3) == (1, 2, 3)


@pytest.mark.parametrize("router", ["profiled", "static"])
def test_counted_flops_are_the_predicted_ones(toy, tmp_path, router):
    bench = DepthBench(toy, "t2v", FEW, 1, 1, tmp_path)
    row = bench.run(depth_case("methods", 0.75, router))["row"]
    assert row["flops_ratio"] == pytest.approx(row["predicted_ratio"], rel=0.02)
    assert row["flops_ratio"] == pytest.approx(0.75, abs=TOLERANCE)
    assert row["psnr_db"] < 60 and row["method"] == router
    # the model is as it was
    assert bench.run(quality.DENSE)["row"]["psnr_db"] == 100


def test_the_command_writes_rows_and_takes_up_what_was_done(tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "all_cases", lambda: [Case("methods", "fewer_steps", "", 0.75)])
    words = ["depth", "--prompts", "1", "--jobs", "1", "--steps", "4", "--only", "methods"]
    monkeypatch.setattr(
        sys, "argv", [*words, "--work", f"{tmp_path}/work", "--results", f"{tmp_path}/rows"]
    )
    depth.main()
    rows = read_rows(tmp_path / "rows" / "depth.csv")
    assert [(r["method"], r["task"], r["steps"]) for r in rows] == [
        ("dense", "t2v", "4"),
        ("fewer_steps", "t2v", "4"),
    ]
    monkeypatch.setattr(DepthBench, "run", lambda self, case: 1 / 0)
    depth.main()
    assert read_rows(tmp_path / "rows" / "depth.csv") == rows
