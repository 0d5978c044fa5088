import pytest
import torch

from wantrim.benchmarks import width
from wantrim.benchmarks.cases import Point
from wantrim.benchmarks.subjects import toy_subject
from wantrim.benchmarks.table import read_rows
from wantrim.benchmarks.width import (
    CORRECTIONS,
    IN_PLACE,
    IN_PLACE_TARGETS,
    REFIT,
    SLIM,
    SLIM_TARGETS,
    WIDTH_COLUMNS,
    WidthBench,
    WidthCase,
    all_cases,
)
from wantrim.methods.budget import width_share
from wantrim.methods.profile import load_profile

FEW = Point(2, 1.0, shift=5.0)


@pytest.fixture(scope="module")
def toy():
    return toy_subject()


@pytest.fixture(scope="module")
def bench(toy, tmp_path_factory):
    width_bench = pytest.MonkeyPatch()
    width_bench.setattr(width, "CALIBRATED_ON", 2)
    yield WidthBench(toy, "t2v", FEW, 1, 1, tmp_path_factory.mktemp("work"))
    width_bench.undo()


def test_the_issue_is_covered():
    cases = all_cases()
    assert len({case.key for case in cases}) == len(cases)
    for target in IN_PLACE_TARGETS:
        assert {c.method for c in cases if c.target == target} >= set(IN_PLACE)
    for target in SLIM_TARGETS:
        mine = [c for c in cases if c.target == target and c.method in SLIM]
        assert {c.method for c in mine} == set(SLIM)
        for rule in ("slim_pare", "slim_budget"):
            assert [c.setting for c in mine if c.method == rule] == list(CORRECTIONS)
    rows = {(c.method, c.setting, c.target) for c in cases}
    named = [c for c in cases if getattr(c, "against", None)]
    assert all((*c.against, c.target) in rows for c in named)
    assert {c.against[0] for c in named} == {"pare", "drop", "slim_pare", "slim_budget"}
    assert "fewer_steps" in {c.method for c in cases}


@pytest.mark.parametrize("name", ["demote", "drop", "pare", "random"])
def test_heads_in_place_cost_what_was_asked_and_what_is_counted(bench, name):
    row = bench.run(WidthCase("in_place", name, "", 0.5))["row"]
    assert 0.45 < row["attention_ratio"] <= 0.5
    assert row["flops_ratio"] == pytest.approx(row["predicted_ratio"], rel=0.02)
    assert 5 < row["psnr_db"] < 40


def test_a_slim_model_is_sampled_and_gone(bench, toy):
    before = bench.sample(bench.items[0])
    files = sorted(path.name for path in bench.folder.iterdir())
    rows = {}
    for name in ("slim_pare", "slim_random", "slim_budget"):
        rows[name] = bench.run(WidthCase("sliced", name, REFIT, 0.8))["row"]
        row = rows[name]
        assert row["flops_ratio"] == pytest.approx(row["predicted_ratio"], rel=0.02)
        assert bench.model is toy.model
    assert torch.equal(bench.sample(bench.items[0]), before)
    assert sorted(path.name for path in bench.folder.iterdir()) == files
    # as wide, and as large
    assert rows["slim_random"]["parameter_ratio"] == rows["slim_pare"]["parameter_ratio"]
    share = rows["slim_budget"]["parameter_ratio"]
    assert share == pytest.approx(rows["slim_pare"]["parameter_ratio"], abs=0.005)
    assert rows["slim_pare"]["psnr_db"] > rows["slim_random"]["psnr_db"] + 1


def test_corrections_are_what_they_say(bench):
    """Of the same width: raw, then norms rescaled, then output projections refitted."""
    got = [bench.run(WidthCase("sliced", "slim_pare", one, 0.7)) for one in CORRECTIONS]
    assert len({one["row"]["knob"] for one in got}) == 1
    psnr = [one["row"]["psnr_db"] for one in got]
    assert len(set(psnr)) == 3
    assert psnr[2] > psnr[0]


def test_random_keeps_as_much_as_the_rule_in_every_block(bench, toy):
    bench.dense()
    profile = load_profile(bench._files[0])
    cases = [WidthCase("sliced", name, REFIT, 0.7) for name in ("slim_pare", "slim_random")]
    widths = [width.plan_slim(c, profile, bench.grid, bench.shape, None) for c in cases]
    for block in range(16):
        assert widths[0].sizes(block) == widths[1].sizes(block) == (6, 6, 272)
    assert widths[0] != widths[1]
    assert width_share(widths[0], bench.shape) == width_share(widths[1], bench.shape)


def test_recording_is_of_other_prompts(bench, monkeypatch):
    seen = []
    sample = WidthBench.sample
    monkeypatch.setattr(
        WidthBench,
        "sample",
        lambda self, item, steps=None: seen.append(item.prompt) or sample(self, item, steps),
    )
    fresh = WidthBench(bench.subject, "t2v", FEW, 1, 1, bench.folder / "other")
    fresh.folder.mkdir()
    fresh.dense()
    assert len(set(seen[:2])) == 2
    assert not {item.prompt for item in fresh.items} & set(seen[:2])


def test_rows_are_compared_and_written_once(monkeypatch, tmp_path):
    monkeypatch.setattr(width, "CALIBRATED_ON", 1)
    arguments = (
        "width --jobs 1 --prompts 1 --seeds 1 --steps 4 --targets 0.5 --only demote drop "
        f"--work {tmp_path / 'work'} --results {tmp_path}"
    )
    monkeypatch.setattr("sys.argv", arguments.split())
    width.main()
    rows = read_rows(tmp_path / "width.csv")
    assert [row["method"] for row in rows] == ["dense", "drop", "demote"]
    assert tuple(rows[0]) == WIDTH_COLUMNS
    assert {"against", "vs_db", "vs_steps_db", "attention_ratio"} <= set(WIDTH_COLUMNS)
    assert rows[2]["against"] == "drop"
    difference = float(rows[2]["psnr_db"]) - float(rows[1]["psnr_db"])
    assert float(rows[2]["vs_db"]) == pytest.approx(difference, abs=1e-3)
    # `pare` was not run
    assert rows[1]["against"] == ""
    monkeypatch.setattr(WidthBench, "run", None)
    width.main()
    assert read_rows(tmp_path / "width.csv") == rows


def test_no_number_of_steps_is_dense_under_another_name(bench):
    result = bench.run(next(c for c in all_cases() if c.method == "fewer_steps"))
    assert "unreachable" in result
