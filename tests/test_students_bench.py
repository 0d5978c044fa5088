"""The bench of trained students: the issue's questions, and what a row is measured on."""

import sys
from dataclasses import replace

import pytest
import torch

from wantrim.benchmarks import students
from wantrim.benchmarks.cases import Point
from wantrim.benchmarks.quality import DENSE
from wantrim.benchmarks.students import (
    FEW,
    ROUTED,
    STAGES,
    WIDTH,
    StudentBench,
    StudentCase,
    all_cases,
    student,
)
from wantrim.benchmarks.subjects import toy_subject
from wantrim.benchmarks.table import read_rows
from wantrim.hosts.diffusers.slim import load_slim
from wantrim.slim.file import read_header
from wantrim.training.gate import new_router
from wantrim.training.models import open_origin, write_student
from wantrim.training.recipe import load_recipe

POINT = Point(4, 2.0, shift=3.0)


@pytest.fixture(scope="module")
def toy():
    return toy_subject()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A student as it is cut, as if each stage had made it."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = load_recipe("tiny")
    stages = [f"{number}-{stage.kind}" for number, stage in enumerate(recipe.stages, 1)]
    assert tuple(stages) == STAGES
    start = folder / "tiny" / "start.safetensors"
    open_origin(recipe).cut(start, recipe.stages[0])
    header, weights = read_header(start), load_slim(start).state_dict()
    said = [{"stage": "router", "k_min": 0.4, "k_max": 0.7}]
    torch.manual_seed(0)
    router = new_router(16, "latent", 16)
    made = folder / "tiny" / "3-router"
    made.mkdir()
    write_student(made, weights, router, "latent", header, said)
    return folder


def test_every_question_has_its_row():
    cases = all_cases()
    assert len({case.key for case in cases}) == len(cases)
    mine = [case for case in cases if isinstance(case, StudentCase)]
    known = {(case.method, case.setting, case.target) for case in mine}
    # whatever is compared is there, at the same target
    for case in mine:
        assert case.against is None or (*case.against, case.target) in known
    targets = {case.target for case in cases if case.method == "fewer_steps"}
    assert targets == {WIDTH, ROUTED}
    routers = {case.router for case in mine if case.target == ROUTED}
    assert routers == {"trained", "profiled", "random", "static"}
    assert all(case.steps == 4 for case in mine if case.target == FEW)


def test_flops_are_the_predicted_ones_and_the_full_model_is_left_as_it_was(
    toy, runs, tmp_path, monkeypatch
):
    monkeypatch.setattr(students, "RUNS", runs)
    bench = StudentBench(toy, "t2v", POINT, 1, 1, tmp_path)
    cases = {case.setting: case for case in all_cases()}
    rows = {}
    for name in ("cut, not trained", "stage II", "stage II's student, static blocks"):
        rows[name] = bench.run(cases[name])["row"]
        assert rows[name]["flops_ratio"] == pytest.approx(rows[name]["predicted_ratio"], rel=0.02)
    assert rows["cut, not trained"]["parameter_ratio"] == pytest.approx(0.747, abs=0.002)
    assert rows["stage II"]["flops_ratio"] < 0.6
    assert rows["stage II"]["parameter_ratio"] < 0.6
    # two unguided steps of the full model instead of four guided ones
    few = replace(cases["full model, 4 steps"], steps=2)
    row = bench.run(few)["row"]
    assert row["flops_ratio"] == pytest.approx(0.25, rel=0.02) and row["psnr_db"] < 60
    assert bench.run(DENSE)["row"]["psnr_db"] == 100


def test_the_command_says_which_students_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(students, "RUNS", tmp_path / "none")
    case = student("stage I", WIDTH, "tiny/1-width")
    monkeypatch.setattr(students, "all_cases", lambda: [case])
    words = ["students", "--prompts", "1", "--jobs", "1", "--steps", "20"]
    monkeypatch.setattr(
        sys, "argv", [*words, "--work", f"{tmp_path}/work", "--results", f"{tmp_path}/rows"]
    )
    monkeypatch.setattr(StudentBench, "dense", lambda self: [])
    monkeypatch.setattr(
        students, "run_cases", lambda args, cases, *rest: said.append((args.points, cases))
    )
    said = []
    students.main()
    (points, cases) = said[0]
    assert [point.steps for point in points] == [20] and cases[1] is case
    bench = StudentBench(toy_subject(), "t2v", POINT, 1, 1, tmp_path)
    assert "is not there" in bench.run(case)["unreachable"]
    assert read_rows(tmp_path / "rows" / "students.csv") == []
