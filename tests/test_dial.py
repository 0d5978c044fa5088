"""One dial for a model or for the two experts of Wan2.2."""

import math
import re
from dataclasses import replace

import pytest

from wantrim.benchmarks.depth import shipped_profile
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import sigmas_for
from wantrim.hosts.diffusers.weights import load_original
from wantrim.methods.cost import WanShape
from wantrim.methods.fingerprint import Fingerprint
from wantrim.methods.grid import TokenGrid
from wantrim.methods.mixes import AUTO, MIXES, PRIORITIES
from wantrim.methods.presets import preset_plan
from wantrim.methods.profile import Profile
from wantrim.methods.schedule import progress_at, sigma_at
from wantrim.solve.dial import (
    HIGH,
    LOW,
    TOLERANCE,
    Dial,
    Parts,
    Run,
    other_slice,
    solve,
    split,
    whole_steps,
)
from wantrim.toy import CHECKPOINT

SHAPE, GRID = WanShape(5120, 13824, 40), TokenGrid(21, 30, 52)
TINY, TINY_GRID = WanShape(128, 384, 16, head_dim=16), TokenGrid(5, 6, 6)


def slices(steps: int, first: int, shift=8.0, shape=SHAPE, grid=GRID) -> tuple[Run, Run]:
    """What the high noise expert's sampler is given, and what the low one's."""
    sigmas = tuple(sigmas_for(steps, shift).tolist())
    high, low = sigmas[: first + 1], sigmas[first:]
    return Run(shape, grid, high, shift), Run(shape, grid, low, shift)


def solved_pair(runs, **options):
    return [
        Dial(**options, expert=expert).solve(run)
        for expert, run in zip((HIGH, LOW), runs, strict=True)
    ]


def together(runs, solved) -> float:
    steps = [run.steps for run in runs]
    return sum(steps) / sum(n / one.reached for n, one in zip(steps, solved, strict=True))


@pytest.mark.parametrize(("steps", "first"), [(4, 2), (4, 1), (8, 4), (20, 10), (20, 3), (30, 24)])
@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("speedup", [1.1, 1.25, 1.5, 2.0])
def test_a_pair_meets_its_speedup_or_says_why_not(steps, first, priority, speedup):
    runs = slices(steps, first)
    solved = solved_pair(runs, speedup=speedup, priority=priority, dense_first_steps=1)
    reached = together(runs, solved)
    # both know or neither does
    why = {one.why for one in solved if one.why and "both experts together" in one.why}
    assert len(why) <= 1
    if why:
        assert all(one.why for one in solved) and reached < speedup * (1 - TOLERANCE)
        said = float(re.search(r"reach ([\d.]+)x", why.pop())[1])
        assert said == pytest.approx(reached, rel=0.02)
    else:
        assert reached == pytest.approx(speedup, rel=TOLERANCE)


def test_two_and_two_steps_reach_less_than_twice():
    """Each expert's first step computes everything."""
    runs = slices(4, 2)
    for one in solved_pair(runs, speedup=2.0):
        assert "both experts together reach 1.62x of the 2.00x: with about 2 + 2 steps" in one.why
    for run, one in zip(runs, solved_pair(runs, speedup=1.5), strict=True):
        assert whole_steps(run, one.parts) == [True, False]


def test_an_expert_of_one_step_leaves_it_all_to_the_other():
    high, low = solved_pair(slices(4, 1), speedup=1.5)
    assert high.parts == Parts() and high.why is None
    assert low.reached == pytest.approx(3 / (4 / 1.5 - 1), rel=TOLERANCE)


def test_priorities_split_as_they_say():
    saved = {}
    for priority in MIXES:
        high, low = solved_pair(slices(20, 10), speedup=1.5, priority=priority)
        saved[priority] = (1 - 1 / high.reached) / (1 - 1 / low.reached)
    assert saved["balanced"] == pytest.approx(1.0, rel=0.05)
    assert saved["motion"] == pytest.approx(0.7, rel=0.05)
    assert saved["detail"] == pytest.approx(1 / 0.7, rel=0.05)


@pytest.mark.parametrize("steps", [4, 8, 20])
@pytest.mark.parametrize(("starts_given", "name"), [(False, "motion"), (True, "detail")])
def test_auto_spares_what_the_start_of_the_video_has_not_settled(steps, starts_given, name):
    run = Run(
        SHAPE, GRID, tuple(sigmas_for(steps, 5.0).tolist()), 5.0,
        anchored_frames=int(starts_given), starts_given=starts_given,
    )  # fmt: skip
    found = Dial(1.5, AUTO, dense_first_steps=1).solve(run)
    assert found == Dial(1.5, name, dense_first_steps=1).solve(run)
    assert found.priority == name and found.why is None
    # where that reaches too little, what reaches further
    both = [Dial(4.0, mix, dense_first_steps=1).solve(run) for mix in (name, "balanced")]
    far = Dial(4.0, AUTO, dense_first_steps=1).solve(run)
    assert far == max(both, key=lambda one: one.reached) and far.why


def test_auto_takes_its_first_choice_where_the_other_reaches_no_further():
    run = Run(TINY, TINY_GRID, (1.0, 0.0), anchored_frames=5, starts_given=True)
    found = Dial(2.0, AUTO).solve(run)
    assert found.priority == "detail" and found.reached == 1.0 and found.why


@pytest.mark.parametrize("starts_given", [False, True])
@pytest.mark.parametrize(("steps", "first"), [(4, 2), (8, 4), (20, 3), (30, 24)])
@pytest.mark.parametrize("speedup", [1.3, 1.6, 2.2, 3.0])
def test_both_experts_of_a_pair_take_auto_for_the_same(starts_given, steps, first, speedup):
    runs = [replace(run, starts_given=starts_given) for run in slices(steps, first)]
    names = {one.priority for one in solved_pair(runs, speedup=speedup, dense_first_steps=1)}
    assert len(names) == 1 and names < {"detail" if starts_given else "motion", "balanced"}


@pytest.mark.parametrize("starts_given", [False, True])
@pytest.mark.parametrize(("steps", "first"), [(4, 2), (10, 5), (20, 7), (20, 10)])
@pytest.mark.parametrize("speedup", [1.5, 2.0, 2.25])
def test_both_experts_take_auto_for_the_same_where_steps_crowd(steps, first, speedup, starts_given):
    """As scheduler beta has them: each expert guesses the other's steps, and not well."""
    places = [0.5 - 0.5 * math.cos(math.pi * i / steps) for i in range(steps + 1)]
    sigmas = tuple(sigma_at(place, 8.0) for place in places)
    runs = [
        Run(SHAPE, GRID, part, 8.0, starts_given=starts_given)
        for part in (sigmas[: first + 1], sigmas[first:])
    ]
    names = {one.priority for one in solved_pair(runs, speedup=speedup, dense_first_steps=1)}
    assert names == {"detail" if starts_given else "motion"}


def test_crowded_steps_are_not_all_spared():
    """Two of four steps of scheduler beta lie in the first quarter, and one of them is trimmed."""
    sigmas = tuple(sigma_at(place, 8.0) for place in (0, 0.176, 0.5, 0.824, 1.0))
    alone = Run(SHAPE, GRID, sigmas, 8.0)
    assert whole_steps(alone, Dial(1.5, "motion").solve(alone).parts) == [True] + [False] * 3


def test_what_auto_became_is_said():
    run = slices(20, 10)[0]
    dial = Dial(1.5)
    assert dial.describe(dial.solve(run)) == "1.50x, priority auto (motion)"
    whole = replace(run, sigmas=tuple(sigmas_for(20, 8.0).tolist()))
    parts = dial.solve(whole).parts
    assert re.search(
        r"dropped from 1\d% to 100% of the run \(rising", TrimPlan(parts.tokens).describe()
    )
    by_hand = Dial(1.5, "motion")
    assert by_hand.describe(by_hand.solve(run)) == "1.50x, priority motion"


def test_guards_are_the_first_steps_of_the_high_and_the_last_of_the_low_expert():
    runs = slices(12, 6)
    solved = solved_pair(runs, speedup=1.3, dense_first_steps=3, dense_last_steps=2)
    whole = [whole_steps(run, one.parts) for run, one in zip(runs, solved, strict=True)]
    assert whole == [[True] * 3 + [False] * 3, [True] + [False] * 3 + [True] * 2]


def test_profiles_of_both_count():
    """An expert knows what the other can do, so that both split alike."""
    runs = slices(8, 4, 5.0, TINY, TINY_GRID)
    profile = shipped_profile()
    options = {"speedup": 1.6, "priority": "balanced"}
    high = Dial(**options, expert=HIGH, profile=profile).solve(runs[0])
    low = Dial(**options, expert=LOW, partner=profile).solve(runs[1])
    assert high.parts.blocks is not None and low.parts.blocks is None
    assert together(runs, (high, low)) == pytest.approx(1.6, rel=TOLERANCE)
    assert high.reached > low.reached


@pytest.mark.parametrize(("steps", "first"), [(4, 2), (20, 10), (20, 3), (9, 5)])
def test_each_slice_tells_the_other(steps, first):
    high, low = slices(steps, first)
    for own, other, is_high in ((high, low, True), (low, high, False)):
        found = other_slice(own, is_high)
        assert found.sigmas == pytest.approx(other.sigmas, abs=1e-4)
        # a boundary by hand is the same where the steps are even
        by_hand = other_slice(own, is_high, sigma_at(first / steps, 8.0))
        assert by_hand.sigmas == pytest.approx(other.sigmas, abs=1e-4)
    # a quarter and nine tenths of the run
    for sigma, count in ((0.96, 6), (0.47, 1)):
        assert other_slice(slices(4, 2)[0], True, sigma).steps == count
    whole = Run(SHAPE, GRID, tuple(sigmas_for(6, 8.0).tolist()), 8.0)
    assert other_slice(whole, True) is None and other_slice(whole, False) is None


def test_an_expert_that_does_the_whole_run_is_a_model_alone():
    run = Run(SHAPE, GRID, tuple(sigmas_for(6, 8.0).tolist()), 8.0)
    for expert in (HIGH, LOW):
        pair = Dial(1.5, expert=expert).solve(run)
        assert pair.reached == Dial(1.5).solve(run).reached
        assert pair.why is None


def test_split_fills_up():
    assert split(0.3, [0.5, 0.5], [0.6, 0.6], (1, 1)) == pytest.approx([0.3, 0.3])
    assert split(0.3, [0.5, 0.5], [0.6, 0.6], (0.5, 1)) == pytest.approx([0.2, 0.4])
    assert split(0.3, [0.25, 0.75], [0.0, 0.6], (1, 1)) == pytest.approx([0.0, 0.4])
    assert split(0.9, [0.5, 0.5], [0.5, 0.6], (1, 1)) == pytest.approx([0.5, 0.6])
    assert split(0.0, [0.5, 0.5], [0.5, 0.6], (1, 1)) == pytest.approx([0.0, 0.0], abs=1e-6)


def test_sigma_is_the_inverse_of_progress():
    for shift in (1.0, 3.0, 8.0):
        for progress in (0.0, 0.1, 0.5, 0.9, 1.0):
            assert progress_at(sigma_at(progress, shift), shift) == pytest.approx(progress)


def test_a_dial_alone_is_the_solver():
    run = slices(20, 10)[0]
    tokens = preset_plan("refresh", 0.8)
    dial = Dial(1.5, "detail", dense_first_steps=2, dense_last_steps=1)
    other = solve(run, 1.5, "detail", dense_first=2, dense_last=1, fixed=Parts(tokens))
    assert dial.solve(run, Parts(tokens)) == other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speedup": 0.9}, r"speedup: expected 1 \(off\) to 4, got 0.9"),
        ({"speedup": 4.1}, "got 4.1"),
        ({"speedup": float("nan")}, "got nan"),
        ({"priority": "speed"}, "priority: expected one of auto, motion, balanced, detail"),
        ({"dense_first_steps": -1}, "dense_first_steps: expected 0 to 100"),
        ({"dense_last_steps": 101}, "dense_last_steps: expected 0 to 100"),
        ({"boundary": 1.0}, "boundary: expected 0 to less than 1"),
        ({"profile": Profile.empty(Fingerprint(8, 8, 2, 2, 4, 4))}, "at least one recorded run"),
        ({"partner": Profile.empty(Fingerprint(8, 8, 2, 2, 4, 4))}, "at least one recorded run"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Dial(**options)


def test_a_plan_with_a_dial():
    tokens = preset_plan("refresh", 0.8)
    off, on, final = Dial(1.0), Dial(1.5), Dial(1.5, final=True)
    assert TrimPlan(dial=off).neutral and not TrimPlan(tokens, dial=off).neutral
    assert not TrimPlan(dial=on).neutral
    assert TrimPlan(dial=final).neutral and TrimPlan(tokens, dial=final).neutral
    assert TrimPlan(tokens, dial=final).solved() == TrimPlan()
    assert TrimPlan(tokens, dial=off).solved() == TrimPlan(tokens)
    assert TrimPlan(dial=on).solved(Parts(tokens)) == TrimPlan(tokens)
    assert TrimPlan(dial=on).describe() == "1.50x, priority auto"
    assert TrimPlan(tokens, dial=final).describe() == "final render, nothing trimmed"
    assert "high noise" in Dial(1.5, expert=HIGH).describe()
    with pytest.raises(ValueError, match="plan: expected one that is solved"):
        attach(load_original(CHECKPOINT), TrimPlan(dial=on))
