"""Which row of a trial is best, and how it is said."""

import math

import pytest
import torch

from wantrim.report.compare import Comparison
from wantrim.report.verdict import (
    LABEL,
    Row,
    choose,
    clip_of_all,
    headline,
    row_json,
    verdict_text,
)

STEPS, WANTED = 10, 1.5


def found(psnr: float, motion: float = 1.0) -> Comparison:
    return Comparison(psnr, 0.9, 0.02 * motion, 0.02, 0.003, 0.003, (psnr,))


# the whole one stands still
STILL = Comparison(31.0, 0.9, 0.02, 0.0, 0.003, 0.003, (31.0,))


def rows(**changed) -> list[Row]:
    known = {
        "whole": Row("whole", "whole", 30.0, work=1.0),
        "plan": Row("plan", "WanTrim 1.5x", 21.0, work=0.68, found=found(31.0)),
        "less": Row("less", "WanTrim 1.3x", 24.0, work=0.77, found=found(38.0)),
        "easycache": Row("easycache", "EasyCache", 20.5, work=0.7, found=found(28.5)),
        "steps": Row("steps", "7 steps", 20.9, work=0.7, found=found(27.0)),
    }
    for name, change in changed.items():
        for key, value in change.items():
            setattr(known[name], key, value)
    return list(known.values())


def best(given: list[Row]) -> str | None:
    place = choose(given, WANTED, STEPS).best
    return None if place is None else given[place].name


def test_best_is_the_nearest_of_those_that_save_enough():
    given = rows()
    choice = choose(given, WANTED, STEPS)
    assert given[choice.best].name == "plan" and given[choice.next].name == "easycache"
    assert headline(given, choice, WANTED) == (
        "Best at 1.5x: WanTrim 1.5x, 2.5 dB nearer than EasyCache; 1.43x in seconds."
    )
    # a plan that costs more does not compete; what leaves out steps may be half a step off
    assert best(rows(less={"work": 0.69})) == "less" and best(rows(less={"work": 0.71})) == "plan"
    near = found(35.0)
    assert best(rows(steps={"work": 0.72, "found": near})) == "steps"
    assert best(rows(steps={"work": 0.74, "found": near})) == "plan"
    assert best(rows(steps={"found": found(math.inf)})) == "steps"
    assert best(rows(plan={"failed": "out of memory", "found": None})) == "easycache"
    assert best(rows(plan={"work": None})) == "easycache"


def test_a_wish_that_could_not_be_met_is_said():
    given = rows(plan={"work": 0.5}, whole={"seconds": None})
    said = headline(given, choose(given, 2.4, 4), 2.4)
    assert said.startswith("Best near 2.4x (2x was possible): WanTrim 1.5x")


def test_between_equals_the_plan_by_the_own_run_is_taken():
    def own(psnr: float, work: float = 0.68) -> list[Row]:
        return [*rows(), Row("own", "by the whole run", 21.0, work=work, found=found(psnr))]

    assert best(own(29.3)) == "own" and best(own(31.2)) == "own"
    assert best(own(29.1)) == "plan" and best(own(30.6, work=0.75)) == "plan"
    behind = own(29.4)
    said = headline(behind, choose(behind, WANTED, STEPS), WANTED)
    assert "by the whole run, 1.6 dB further off here than WanTrim 1.5x" in said
    assert "Two plans differ by 1.8 dB more or less in the next video" in said
    given = own(30.6)
    choice = choose(given, WANTED, STEPS)
    assert given[choice.next].name == "plan"
    said = headline(given, choice, WANTED)
    assert "by the whole run, as near to the whole video as WanTrim 1.5x" in said
    assert "Half a dB is no difference" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"easycache": {"found": found(30.8)}}, "Half a dB is no difference"),
        ({"plan": {"found": found(31.0, 0.6)}}, "It has 0.60 x the motion"),
        ({"plan": {"found": STILL}}, "It moves where the whole one stands still"),
        ({"easycache": {"seconds": 15.0}}, "EasyCache was faster here (15.0 s for 21.0 s)"),
        (
            {"whole": {"failed": "no video came"}},
            "No best one: the whole run has no video (no video",
        ),
        (
            {n: {"found": None} for n in ("plan", "easycache", "steps")},
            "saves as much work as 1.5x",
        ),
    ],
)
def test_what_else_is_to_be_known_is_said(change, says):
    given = rows(**change)
    assert says in headline(given, choose(given, WANTED, STEPS), WANTED)


def test_table_says_all_of_every_row():
    given = rows(
        plan={"cached": True, "remarks": ["a remark"]},
        steps={"failed": "out of memory while sampling", "found": None, "seconds": None},
        easycache={"found": found(math.inf)},
    )
    choice = choose(given, WANTED, STEPS)
    text = verdict_text(given, choice, WANTED, ["a note"], 2.5)
    lines = {line[2:].split("  ")[0]: line for line in text.splitlines()}
    assert lines["WanTrim 1.5x"].endswith("  *") and "* cached: sampled in an earlier run" in text
    assert lines["7 steps"].endswith("out of memory while sampling") and " - " in lines["7 steps"]
    assert "equal" in lines["EasyCache"] and lines["EasyCache"].startswith("> ")
    assert sum(line.startswith("> ") for line in lines.values()) == 1
    for said in ("- WanTrim 1.5x: a remark", "- a note", "2.5 s of warming up"):
        assert said in text
    assert "every candidate ran as planned" in verdict_text(rows(), choice, WANTED, [], 0.0)
    figures = row_json(given[3])
    assert figures["psnr_db"] is None and figures["equal"] and figures["remarks"] == 0


def test_clip_of_all_stays_small_and_stands_still_at_the_end():
    generator = torch.Generator().manual_seed(0)
    videos = [torch.rand(count, 90, 640, 3, generator=generator) for count in (5, 5, 3, 5, 5)]
    videos[1] = None
    clip = clip_of_all(rows(), videos)
    # four in a row, 320 wide
    assert clip.shape[0] == 5 and clip.shape[2] == 4 * 320 and clip.shape[1] < 90
    third = clip[:, :, 320:640]
    assert torch.equal(third[2], third[4]) and not torch.equal(third[1], third[2])
    # a fifth one stands below the first, and has its own name
    shades = [torch.full((1, 90, 640, 3), shade / 10) for shade in (1, 2, 3, 4, 5)]
    clip, cell = clip_of_all(rows(), shades), 45 + LABEL
    assert clip.shape[1] == 2 * cell
    below = clip[0, cell:, :320]
    for shown, shade in ((clip[0, LABEL:cell, :320], 0.1), (below[LABEL:], 0.5)):
        assert shown == pytest.approx(shade, abs=0.01)
    for place, name in ((0, clip[0, :LABEL, :320]), (4, below[:LABEL])):
        alone = clip_of_all(rows()[place : place + 1], shades[place : place + 1])
        assert torch.equal(name, alone[0, :LABEL])
    assert clip_of_all(rows(), [None] * 5).shape[-1] == 3
