"""The bench of trained students: the issue's questions, and what a row is measured on."""

from dataclasses import replace

import pytest
import torch

from wantrim.benchmarks import quality, students
from wantrim.benchmarks.cases import DENSE, Point
from wantrim.benchmarks.students import STAGES, StudentBench, all_cases
from wantrim.benchmarks.subjects import toy_subject
from wantrim.benchmarks.table import RESULTS, read_rows
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


def test_flops_are_the_predicted_ones_and_the_full_model_is_left_as_it_was(
    toy, runs, tmp_path, monkeypatch
):
    monkeypatch.setattr(students, "RUNS", runs)
    bench = StudentBench(toy, "t2v", POINT, 1, 1, tmp_path)
    cases = {case.setting: case for case in all_cases()}
    assert len(cases) == len(all_cases()) - 1, "two rows of fewer steps, no other twice"
    rows = {}
    for name in ("cut, not trained", "stage II", "stage II's student, random blocks"):
        rows[name] = bench.run(cases[name])["row"]
        assert rows[name]["flops_ratio"] == pytest.approx(rows[name]["predicted_ratio"], rel=0.02)
    assert rows["cut, not trained"]["parameter_ratio"] == pytest.approx(0.747, abs=0.002)
    assert rows["stage II"]["flops_ratio"] < 0.6
    assert rows["stage II"]["parameter_ratio"] < 0.6
    assert rows["stage II"]["psnr_db"] != rows["stage II's student, random blocks"]["psnr_db"]
    # two unguided steps of the full model instead of four guided ones
    few = replace(cases["full model, 4 steps"], steps=2)
    row = bench.run(few)["row"]
    assert row["flops_ratio"] == pytest.approx(0.25, rel=0.02) and row["psnr_db"] < 60
    assert bench.run(DENSE)["row"]["psnr_db"] == 100


def test_a_student_is_held_against_another_by_the_same_videos():
    made = {
        case.setting: {
            "row": {"setting": case.setting, "method": case.method, "flops_ratio": case.target},
            "psnr": [20.0 + number + add for number in range(8)],
            "clusters": list(range(8)),
        }
        for case, add in zip(all_cases()[:4], (3.0, 1.0, 0.0, -2.0), strict=True)
    }
    cases = {case.setting: case for case in all_cases()}
    found = {("t2v", POINT, cases[name]): result for name, result in made.items()}
    rows = {row["setting"]: row for row in students.compared_rows(found)}
    told = rows["stage II's student, random blocks"]
    assert told["against"] == "stage II" and told["vs"] == "worse"
    assert told["vs_db"] == told["vs_lo"] == told["vs_hi"] == pytest.approx(-2.0)
    assert not any("against" in row for name, row in rows.items() if "random" not in name)


def test_every_row_is_a_case_and_the_command_makes_it(monkeypatch):
    """What has no case is an old study and stands in results/old."""
    ran = []
    monkeypatch.setattr(students, "run_cases", lambda args, *_, **__: ran.append(args))
    monkeypatch.setattr(quality, "commit", lambda: "1234567")
    monkeypatch.setattr("sys.argv", ["students"])
    students.main()
    (args,) = ran
    assert args.results == RESULTS
    known = {(case.method, case.setting, f"{case.target:g}") for case in (DENSE, *all_cases())}
    rows = read_rows(RESULTS / "students.csv")
    assert len(rows) >= 10
    for row in rows:
        assert "dirty" not in row["commit"]
        assert (row["method"], row["setting"], row["target"]) in known
        assert (row["prompts"], row["seeds"]) == (str(args.prompts), str(args.seeds))


def test_a_student_that_was_trained_anew_is_another_case(monkeypatch, tmp_path):
    monkeypatch.setattr(students, "RUNS", tmp_path)
    (case,) = (case for case in all_cases() if case.setting == "stage I")
    stage, keys = tmp_path / case.student, [case.key]
    stage.mkdir(parents=True)
    for name in ("student", "router"):
        for text in ("once", "anew"):
            (stage / f"{name}.safetensors").write_text(text)
            keys.append(case.key)
    assert len(set(keys)) == 5 and case.key == keys[-1]


def test_the_command_says_which_students_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(students, "RUNS", tmp_path / "none")
    words = ["students", "--prompts", "1", "--jobs", "1", "--work", f"{tmp_path}/work"]
    monkeypatch.setattr("sys.argv", [*words, "--results", f"{tmp_path}/rows"])
    ran = []
    monkeypatch.setattr(students, "run_cases", lambda args, cases, *rest, **more: ran.append(cases))
    students.main()
    ((point, cases),) = ran[0].items()
    assert (point.steps, point.guidance) == (20, 8.0) and cases == [DENSE, *all_cases()]
    bench = StudentBench(toy_subject(), "t2v", POINT, 1, 1, tmp_path)
    monkeypatch.setattr(bench, "dense", lambda: [])
    assert "is not there" in bench.run(cases[1])["unreachable"]
