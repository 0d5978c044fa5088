"""What trials found: kept as plain data, and gone by in runs that are like them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from wantrim.methods.cost import WanShape
from wantrim.methods.grid import TokenGrid
from wantrim.solve.dial import Dial, Run, curves_of
from wantrim.solve.tuned import Travel, Tuned, Way, of_both
from wantrim.solve.variants import variants
from wantrim.tests.waits import Waits, put

SIGMAS = (1.0, 0.95, 0.88, 0.8, 0.7, 0.56, 0.36, 0.15, 0.0)
RUN = Run(WanShape(96, 256, 6), TokenGrid(5, 6, 7), SIGMAS, 3.0)
# nearly all of the change is in the last steps, where the curves that ship have little
LATE = Travel(SIGMAS[:-1], (0.0, 0.1, 0.2, 0.3, 0.4, 3.0, 9.0, 20.0))
SHARES = (1.0, 0.0, 1.0, 0.3, 0.0, 1.0, 0.5, 1.0)


def trial(**changed) -> Tuned:
    kept = {
        "sigmas": SIGMAS, "prompts": 2, "starts_given": False, "tokens": 210, "speedup": 1.6,
        "chosen": "WanTrim 1.6x", "shares": SHARES, "travel": LATE,
    }  # fmt: skip
    return Tuned(**{**kept, **changed})


def recorded(**changed) -> Tuned:
    return trial(**{"speedup": 1.0, "chosen": None, "shares": None, **changed})


def test_the_way_is_summed_from_step_to_step():
    way, still = Way(), torch.zeros(2, 3)
    # the second call of a step, and one of another size, tell nothing of it
    for sigma, at in ((1.0, 1.0), (1.0, 9.0), (0.7, 4.0), (0.8, 9.0), (0.4, -1.0)):
        way.see(sigma, still + at)
    way.see(0.2, torch.zeros(2, 4))
    # change by a third of the numbers: 3 of 6 by 2
    way.see(0.1, torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]))
    assert way.ended() == Travel((1.0, 0.7, 0.4, 0.1), pytest.approx((0, 3, 8, 8 + 2**0.5)))


def test_a_way_without_numbers_or_of_one_step_is_none():
    for values in ([1.0], [1.0, math.nan, 2.0], [1.0, math.inf], []):
        way = Way()
        for step, value in enumerate(values):
            way.see(1.0 - 0.2 * step, torch.full((2, 2), value))
        assert way.ended() is None, values
    # above the sigmas of Wan there is no order
    way = Way()
    for sigma in (1.3, 1.1, 0.5):
        way.see(sigma, torch.zeros(1))
    assert way.ended() is None


def test_a_way_waits_for_the_device_at_its_end_alone():
    way, velocity = Way(), torch.ones(4)
    put(velocity)
    with Waits() as waited:
        for step in range(3):
            way.see(1.0 - 0.2 * step, velocity * step)
        assert not waited.seen
        way.ended()
    assert len(waited.seen) == 1


def test_a_recorded_run_is_gone_by_where_no_trial_is():
    solved = Dial(2.0, tuned=(recorded(),)).solve(RUN)
    assert solved.plan == Dial(2.0, travel=LATE).solve(RUN).plan != Dial(2.0).solve(RUN).plan
    assert solved.tuned == "solved by the whole run that WanTrim Profile recorded"
    assert not solved.chosen
    early = replace(LATE, travel=(0.0, 9.0, 11.0, 12.0, 12.5, 12.8, 12.9, 13.0))
    for both in ((recorded(travel=early), trial()), (trial(), recorded(travel=early))):
        assert Dial(1.6, tuned=both).solve(RUN).plan.shares.shares == SHARES
        assert "of your trial" in Dial(2.0, tuned=both).solve(RUN).tuned


def test_a_run_that_both_experts_recorded_is_one():
    ways = Travel(SIGMAS[:3], (0.0, 0.5, 0.7)), Travel(SIGMAS[3:-1], (0.0, 0.2, 0.9, 1.0, 1.5))
    high = recorded(sigmas=SIGMAS[:4], travel=ways[0])
    low = recorded(sigmas=SIGMAS[3:], travel=ways[1])
    both = ways[0].joined(ways[1])
    assert both.sigmas == SIGMAS[:-1]
    assert of_both((high,), (low,)) == [
        (replace(high, travel=both),),
        (replace(low, travel=both),),
    ]
    for other in (
        replace(low, tokens=211), replace(low, prompts=1), replace(low, starts_given=True),
        replace(low, chosen="WanTrim 1.6x"), replace(low, sigmas=SIGMAS[4:]),
    ):  # fmt: skip
        assert of_both((high,), (other,)) == [(high,), (other,)], other
        assert of_both((high,), (other, low))[1] == (other, replace(low, travel=both))


def test_what_is_kept_is_read_again():
    # schedulers of other models begin above 1
    above = trial(sigmas=(1.02, *SIGMAS[1:]), travel=replace(LATE, sigmas=(1.02, *SIGMAS[1:-1])))
    other = trial(shares=None, chosen="EasyCache at 0.2")
    for kept in (trial(), trial(heads=0.75), other, above, recorded()):
        data = kept.to_json()
        assert json.loads(json.dumps(data)) == data and Tuned.from_json(data) == kept


@pytest.mark.parametrize(
    "harm",
    [
        {"sigmas": [1.0, float("nan")]},
        {"sigmas": [0.5, 1.0, 0.0]},
        {"sigmas": "1, 0"},
        {"shares": [1.0, 0.5]},
        {"shares": [2.0] * 8},
        {"tokens": True},
        {"tokens": 0},
        {"speedup": "1.6"},
        {"speedup": 0.5},
        {"chosen": 7},
        {"starts_given": None},
        {"travel": {"sigmas": [1.0, 0.5], "travel": [0.0]}},
        {"travel": {"sigmas": [1.0, 0.5], "travel": [1.0, 0.5]}},
        {"travel": {"sigmas": [1.0, 0.5], "travel": [0.0, math.inf]}},
        {"travel": [1]},
        {"heads": 2.0},
        {"heads": "most"},
    ],
)
def test_damaged_outcomes_are_refused(harm):
    with pytest.raises(ValueError, match="expected"):
        Tuned.from_json({**trial().to_json(), **harm})


def test_runs_that_are_alike():
    facts = {"sigmas": SIGMAS, "prompts": 2, "starts_given": False, "tokens": 210}
    assert trial().resembles(**facts)
    near = tuple(max(0.0, sigma - 0.03) for sigma in SIGMAS)
    for same in ({"tokens": 300}, {"tokens": 145}, {"sigmas": near}):
        assert trial().resembles(**{**facts, **same}), same
    far = tuple(max(0.0, sigma - 0.08) for sigma in SIGMAS)
    for other in (
        {"tokens": 330}, {"tokens": 130}, {"prompts": 1}, {"starts_given": True},
        {"sigmas": SIGMAS[1:]}, {"sigmas": far},
    ):  # fmt: skip
        assert not trial().resembles(**{**facts, **other}), other


@pytest.mark.parametrize("wanted", [1.05, 1.5, 3.9, 4.0])
def test_no_plan_is_tried_twice(wanted):
    labels = [one.label for one in variants(wanted)]
    assert len(set(labels)) == len(labels) == (5 if wanted == 4.0 else 6)


def test_the_travel_takes_the_place_of_the_curves_own():
    ship = curves_of(RUN)
    own = LATE.on(ship)
    assert own.travel_at(SIGMAS[:-1]) == pytest.approx(LATE.travel)
    assert own.amplified_at(SIGMAS[:-1]) == pytest.approx(ship.amplified_at(SIGMAS[:-1]))
    assert own.left == ship.left
    both = Travel((1.0, 0.95), (0.0, 0.5)).joined(Travel((0.9, 0.6, 0.3), (0.0, 0.2, 0.9)))
    assert both == Travel((1.0, 0.95, 0.9, 0.6, 0.3), (0.0, 0.5, 0.5, 0.7, 1.4))
    # heun calls the first expert at the second one's first sigma too
    both = Travel((1.0, 0.95, 0.9), (0.0, 0.5, 0.8)).joined(Travel((0.9, 0.6), (0.0, 0.2)))
    assert both == Travel((1.0, 0.95, 0.9, 0.6), (0.0, 0.5, 0.8, 1.0))


def test_a_like_run_at_the_same_wish_is_the_plan_that_won():
    solved = Dial(1.6, tuned=(trial(prompts=1, shares=(1.0,) * 8), trial())).solve(RUN)
    assert solved.plan.shares.shares == SHARES and "your trial chose (WanTrim 1.6x)" in solved.tuned
    assert solved.reached == pytest.approx(RUN.speedup(solved.plan))


def test_the_plan_that_won_holds_while_what_was_done_is_of_it():
    dial = Dial(1.6, tuned=(trial(),))
    so_far = dial.solve(replace(RUN, done=SHARES[:4]))
    assert so_far.chosen and so_far.plan.shares.shares == SHARES
    # a prompt that came anew made a step whole
    other = dial.solve(replace(RUN, done=(1.0, 0.0, 1.0, 1.0)))
    assert not other.chosen and other.plan.shares.shares[:4] == (1.0, 0.0, 1.0, 1.0)
    assert other.reached == pytest.approx(1.6, rel=0.03) and "by the whole run" in other.tuned


def test_another_wish_is_solved_by_the_whole_run():
    plain = Dial(2.0).solve(RUN).plan.shares.shares
    late = Dial(2.0, travel=LATE).solve(RUN)
    tuned = Dial(2.0, tuned=(trial(),)).solve(RUN)
    assert tuned.plan == late.plan and late.tuned is None
    assert "solved by the whole run of your trial" in tuned.tuned
    assert np.mean(tuned.plan.shares.shares[5:]) > np.mean(plain[5:])
    assert np.mean(tuned.plan.shares.shares[1:5]) < np.mean(plain[1:5])


@pytest.mark.parametrize(
    "other",
    [
        # steps that have to be whole, a winner of another kind, no room for what it needs
        (Dial(1.6, dense_first_steps=2, tuned=(trial(),)), RUN),
        (Dial(1.6, tuned=(trial(shares=None),)), RUN),
        (Dial(1.6, tuned=(trial(),)), Run(RUN.shape, RUN.grid, SIGMAS, 3.0, partial=False)),
    ],
)
def test_what_won_is_not_forced(other):
    dial, run = other
    solved = dial.solve(run)
    assert solved.plan.shares.shares != SHARES and "solved by the whole run" in solved.tuned
    first = dial.dense_first_steps
    assert solved.plan.shares.shares[:first] == (1.0,) * first


def test_a_run_unlike_any_trial_is_as_without():
    dial = Dial(1.6, tuned=(trial(prompts=1),))
    assert dial.trial_of(RUN) is None
    assert dial.solve(RUN).plan == Dial(1.6).solve(RUN).plan and dial.solve(RUN).tuned is None


def test_where_a_curve_says_nothing_the_one_that_ships_goes_on_to_its_scale():
    shipped = curves_of(RUN)
    places = np.array([1.0, 0.96, 0.9, 0.7, 0.3, 0.15])
    whole = shipped.travel_at(places)
    # an expert's part of the way, at three times the change
    for part in (slice(0, 3), slice(2, 6), slice(1, 4)):
        own = Travel(tuple(places[part]), tuple(3 * (whole[part] - whole[part][0])))
        found = own.on(shipped).travel_at(places)
        assert found - found[0] == pytest.approx(3 * (whole - whole[0]), rel=1e-3)
