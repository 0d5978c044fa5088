"""The bench of the verdict's choices: what is best by the others, and how often it is chosen."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from wantrim.benchmarks import verdicts
from wantrim.benchmarks.bench import Bench
from wantrim.benchmarks.cases import Point
from wantrim.benchmarks.subjects import toy_subject
from wantrim.benchmarks.table import read_rows
from wantrim.benchmarks.verdicts import WholeRun, agreement, bests, candidates, rows_of
from wantrim.hosts.diffusers.easycache import easycache
from wantrim.report.compare import Comparison

WORK = {"whole": 1.0, "plan": 0.66, "less": 0.75, "repeats": 0.65, "steps": 0.65}


def judged(chosen="plan", **psnr) -> dict:
    figures = {"plan": 40.0, "less": 45.0, "repeats": 30.0, "steps": 25.0}
    return {"work": WORK, "psnr_db": {**figures, **psnr}, "chosen": chosen, "commit": "1234567"}


def figures() -> dict:
    """As they are kept."""
    found = {
        name: asdict(Comparison(db, 0.9, 0.1, 0.1, 0.0, 0.0, (db,)))
        for name, db in judged()["psnr_db"].items()
    }
    return {"work": WORK, "found": found}


def test_best_is_the_highest_of_those_that_save_enough_and_what_its_interval_reaches():
    same = [judged() for _ in range(4)]
    assert bests(same, 1.5, 20) == {"plan"}
    # as good as each other: now one is ahead, now the other
    near = [judged(repeats=40.0 + off) for off in (-1.0, 1.0, -0.5, 0.4)]
    assert bests(near, 1.5, 20) == {"plan", "repeats"}
    behind = [judged(repeats=39.0 + off) for off in (-0.5, 0.5, -0.5, 0.5)]
    assert bests(behind, 1.5, 20) == {"plan"}


def test_each_prompt_is_judged_by_all_the_others():
    found = [judged(), judged(), judged(), judged("repeats", repeats=90.0)]
    by_others = agreement(found, 1.5, 20)
    # of the others' best the odd one knows nothing
    assert by_others[3] == {"plan"}
    bench = SimpleNamespace(point=Point(20, 5.0), subject=SimpleNamespace(name="tiny"), task="t2v")
    rows = {row["candidate"]: row for row in rows_of(found, bench, 1.5)}
    assert [rows[name]["chosen"] for name in WORK if name != "whole"] == [3, 0, 1, 0]
    assert rows["plan"]["agrees"] == rows["verdict"]["agrees"] == 3
    assert rows["repeats"]["agrees"] == 0 and rows["verdict"]["chosen"] == 4
    assert rows["plan"]["psnr_db"] == 40.0 and rows["less"]["work"] == 0.75


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(toy_subject(), "t2v", Point(10, 8.0), 3, 1, tmp_path_factory.mktemp("work"))


def test_a_whole_run_tells_what_easycache_would_leave_out(bench):
    item = bench.items[0]
    whole = WholeRun(bench, item)
    assert len(whole.calls) == 10 and len(whole.travel.sigmas) == 10
    for wanted in (2, 4):
        threshold = whole.threshold(wanted)
        with easycache(bench.model, steps=10, shift=3.0, threshold=threshold) as budget:
            bench.sample(item)
        # it sees what the run without it went through, and not what its own goes through
        assert abs(budget.computed.count(False) - wanted) <= 1
    # the video is as without being watched
    assert (whole.latents == bench.sample(item)).all()


def test_candidates_cost_what_they_say(bench, monkeypatch):
    found = candidates(bench, bench.items[0], 1.5)
    # attention is little of the first tiny Wan's work
    assert list(found) == [
        "whole", "plan", "own", "repeats", "less", "more", "easycache", "steps",
    ]  # fmt: skip
    for name in ("plan", "own"):
        assert found[name][0] == pytest.approx(1 / 1.5, rel=0.03)
    assert found["less"][0] > found["plan"][0] > found["more"][0]
    assert found["steps"][0] == 0.7


def test_finished_prompts_are_kept_and_rows_are_written(tmp_path, monkeypatch):
    asked, said = [], []
    monkeypatch.setattr(verdicts, "judge", lambda *given: asked.append(given) or figures())
    monkeypatch.setattr(verdicts, "toy_subject", lambda world: toy_subject())
    options = ["--world", "1", "--prompts", "3"]
    options += ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    monkeypatch.setattr(verdicts, "commit", lambda: "made by")
    for _ in range(2):
        verdicts.main(options, said.append)
    assert len(asked) == 3
    table = tmp_path / verdicts.FILE
    assert {row["commit"] for row in read_rows(table)} == {"made by"}
    # rules of another day, and the same videos
    monkeypatch.setattr(verdicts, "commit", lambda: "another")
    with monkeypatch.context() as changed:
        changed.setattr(verdicts, "choose", lambda rows, *_: SimpleNamespace(best=3))
        verdicts.main(options, said.append)
    assert said[-1].endswith("in 0 of 3 prompts") and len(asked) == 3
    assert {row["commit"] for row in read_rows(table)} == {"made by"}
    assert {row["candidate"]: row["chosen"] for row in read_rows(table)}["repeats"] == "3"
    # what was kept without figures is judged anew
    kept = sorted((tmp_path / "work").glob("*.json"))[0]
    kept.write_text(json.dumps(judged("repeats")))
    verdicts.main(options, said.append)
    assert len(asked) == 4 and read_rows(table)[0]["commit"] == "another made by"
    del asked[3]
    assert said[-1] == "the verdict chose one of the bench's best in 3 of 3 prompts"
    assert len((tmp_path / verdicts.FILE).read_text().splitlines()) == 1 + 5
    # other prompts are rows of their own
    verdicts.main([*options, "--first", "2"], said.append)
    assert [given[1].prompt_index for given in asked] == [0, 1, 2, 3, 4]
    assert len((tmp_path / verdicts.FILE).read_text().splitlines()) == 1 + 10
    with pytest.raises(SystemExit):
        verdicts.main([*options[:2], "--prompts", "2"])
    # the bench has none of the first world
    with pytest.raises(SystemExit):
        verdicts.main([*options, "--world", "1", "--steps", "50"])
