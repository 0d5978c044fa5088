"""From a budget to a share for every step: the solver against every plan there is."""

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from wantrim.hosts.diffusers.sample import sigmas_for
from wantrim.methods.shares import TRIED
from wantrim.solve import priors
from wantrim.solve.curves import Curves, clock
from wantrim.solve.solver import (
    GRID,
    UNITS,
    Known,
    Task,
    fill,
    solve_nearest,
    solve_shares,
    stretch_error,
)

SIGMAS = (0.96, 0.9, 0.8, 0.65, 0.4, 0.0)
# most happens in the middle, errors count most at first, and half of the tokens hold most of it
CURVES = Curves(
    sigmas=(1.0, 0.9, 0.7, 0.3, 0.0),
    travel=(0.0, 1.0, 6.0, 8.0, 8.5),
    amplified=(3.0, 2.0, 1.2, 0.8, 0.7),
    shares=(0.0, 0.2, 0.5, 1.0),
    tried=(1.0, 0.5),
    left=((1.0, 0.3, 0.1, 0.02), (1.0, 0.6, 0.3, 0.05)),
)
# the same, where changes go on: least at first
GOING = replace(CURVES, reach=(0.0, 0.1, 0.6, 0.9, 0.5))


def cost(share: float) -> float:
    """Of a model call, in whole ones; a multiple of what the solver counts in."""
    return {0.0: 0.0, 1.0: 1.0}.get(share, np.ceil(share * UNITS) / UNITS + 2 / UNITS)


def task(steps: int, whole=(0,), fresh=(0,), calls=None, **options) -> Task:
    sigmas = SIGMAS[: steps + 1] if steps < 6 else tuple(np.linspace(0.97, 0.0, steps + 1))
    return Task(sigmas, calls or (1,) * steps, frozenset(whole), frozenset(fresh), **options)


def by_hand(one: Task, shares, curves=CURVES) -> float:
    """Squared error of a plan: what every token is off by adds up until the next whole step.

    From the third whole step of an expert on, a change goes on from the one before.
    """
    total, stretch, wholes, computed, hot = 0.0, 0.0, [], 0, 0.0
    for step, share in enumerate(shares):
        at, after = one.sigmas[step : step + 2]
        if share == 1.0:
            wholes = [step] if step in one.fresh else [*wholes, step]
            total, stretch, hot = total + stretch**2, 0.0, 0.0
            continue
        whole = wholes[-1]
        here, *there = curves.travel_at([at, one.sigmas[whole], one.sigmas[computed]])
        far, near = ((here - place) ** 2 for place in there)
        left = curves.left_at(share, at)
        off = ((1 - hot) * far + hot * near) * left if hot else far * left
        if len(wholes) > 2 and curves.reach:
            # where half of the steps are done at sigma 0.75
            way = sum(sign * s / (3 - 2 * s) for sign, s in ((1, one.sigmas[wholes[-2]]), (-1, at)))
            reach = np.interp(at, curves.sigmas[::-1], curves.reach[::-1])
            off *= 1 - np.exp(-((way / reach) ** 1.5)) if reach else 1
        weight = curves.amplified_at([at])[0] * (at - after)
        stretch += weight * (off * one.calls[step]) ** 0.5
        if share > 0.0:
            computed, hot = step, 1 - left
    return total + stretch**2


def spent(one: Task, shares) -> float:
    return sum(count * cost(share) for share, count in zip(shares, one.calls, strict=True))


def every_plan(one: Task):
    """All plans of the grid that the solver may find."""
    some = (0.0, *GRID, 1.0) if one.partial else (0.0, 1.0)
    ran = len(one.done)
    choices = [(share,) for share in one.done]
    choices += [(1.0,) if step in one.whole else some for step in range(ran, one.steps)]
    for plan in itertools.product(*choices):
        stretches = [
            [share for step, share in group if step >= ran]
            for partial, group in itertools.groupby(enumerate(plan), lambda at: at[1] < 1)
            if partial
        ]
        # a long one has the same share in all its steps to come
        if any(len(s) > 2 and len(set(s)) > 1 for s in stretches):
            continue
        # behind an expert's first step nothing is known of how tokens change, and without what the
        # last whole step left no part can be computed
        wholes = [max(i for i in range(step + 1) if plan[i] == 1.0) for step in range(one.steps)]
        known = all(
            share in (0.0, 1.0)
            or (wholes[step] not in one.fresh and (one.held or wholes[step] >= ran))
            for step, share in enumerate(plan)
            if step >= ran
        )
        if known:
            yield plan


@pytest.mark.parametrize("given", [CURVES, GOING], ids=["as they were", "going on"])
@pytest.mark.parametrize(
    "one",
    [
        task(4),
        task(5),
        task(5, partial=False),
        task(5, whole=(0, 1)),
        task(5, whole=(0, 4)),
        task(5, whole=(0, 3), fresh=(0, 3)),
        task(5, calls=(2, 2, 2, 2, 1)),
        task(4, calls=(1, 3, 1, 2)),
        # steps that ran, as they were
        task(5, done=(1.0,)),
        task(5, done=(1.0, 0.0)),
        task(5, whole=(0, 1), done=(1.0, 1.0, 0.37)),
        task(5, whole=(0, 1), done=(1.0, 1.0, 0.0), held=False),
        task(5, whole=(0, 1), done=(1.0, 1.0), held=False, calls=(1, 2, 1, 2, 1)),
    ],
    ids=lambda one: f"{one.steps} {sorted(one.whole)} {one.calls} {one.done} {one.held}",
)
def test_no_plan_of_the_grid_is_better(one, given):
    plans = [(by_hand(one, plan, given), spent(one, plan), plan) for plan in every_plan(one)]
    calls, before = sum(one.calls), np.inf
    for share in (0.3, 0.45, 0.6, 0.7, 0.85, 0.95, 1.0):
        budget = calls * share
        within = [(error, plan) for error, paid, plan in plans if paid <= budget + 1e-9]
        found = solve_shares(one, given, budget, cost)
        if not within:
            least = [1.0 if step in one.whole else 0.0 for step in range(one.steps)]
            assert found == (*one.done, *least[len(one.done) :])
            continue
        least, best = min(within)
        error = by_hand(one, found, given)
        assert spent(one, found) <= budget + 1e-9
        assert error == pytest.approx(least, rel=1e-9, abs=1e-12) and found == best
        # more is never worse
        assert error <= before + 1e-12
        before = error
    assert found == (*one.done, *(1.0,) * (one.steps - len(one.done)))


def curves(travel, left=(1.0, 0.4, 0.0), amplified=(1.0,) * 4) -> Curves:
    """By step of four: sigmas 1, .75, .5, .25."""
    return Curves((1.0, 0.75, 0.5, 0.25), travel, amplified, (0.0, 0.3, 1.0), (1.0,), (left,))


FOUR = Task((1.0, 0.75, 0.5, 0.25, 0.0), (1,) * 4, frozenset({0}))
LATE, EARLY, EVEN = (0.0, 0.1, 5.0, 9.0), (0.0, 5.0, 9.0, 9.1), (0.0, 1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("given", "budget", "wanted"),
    [
        # what hardly changes is repeated
        (curves(LATE), 3, (1, 0, 1, 1)),
        (curves(EARLY), 3, (1, 1, 1, 0)),
        # of steps that change alike the one whose error is forgotten first
        (curves(EVEN, amplified=(4.0, 3.0, 2.0, 1.0)), 3, (1, 1, 1, 0)),
        (curves(EVEN, amplified=(1.0, 1.0, 2.0, 3.0)), 3, (1, 0, 1, 1)),
        # a part of the tokens is worth it where the error sits in few of them
        (curves(EARLY, (1.0, 0.01, 0.0)), 2.9, (1, 1, 0.5, 0.3)),
        (curves(EARLY, (1.0, 0.01, 0.0)), 2.4, (1, 1, 0.3, 0)),
        # and is not where it is spread evenly
        (curves(LATE, (1.0, 0.99, 0.98)), 3.4, (1, 0, 1, 1)),
        (curves(EVEN), 4, (1, 1, 1, 1)),
        # nothing fits: the cheapest
        (curves(EVEN), 0.5, (1, 0, 0, 0)),
        (curves(EVEN), 1, (1, 0, 0, 0)),
    ],
)
def test_four_steps_by_hand(given, budget, wanted):
    assert solve_shares(FOUR, given, budget, cost) == wanted


def test_curves_are_corrected_by_where_the_change_of_a_run_lies():
    recorded = replace(curves(EARLY, (1.0, 0.01, 0.0)), held=((0.0, 0.9, 1.0),))
    assert solve_shares(FOUR, recorded, 2.9, cost) == (1, 1, 0.5, 0.3)
    even = recorded.held_by((0.0, 0.3, 1.0), 0.6)
    assert even.left[0] == pytest.approx((1.0, 1 - 0.99 / 9, 0.0))
    # few of the tokens are not worth it any more
    assert solve_shares(FOUR, even, 2.9, cost) == (1, 1, 0.8, 0)
    # a narrower change leaves no less than in the recording
    assert recorded.held_by((0.0, 0.95, 1.0), 0.6).left[0] == pytest.approx(recorded.left[0])
    # at the sigma where it was seen, between those that were tried
    two = replace(CURVES, held=((0.0, 0.8, 0.9, 1.0), (0.0, 0.4, 0.6, 1.0)))
    found = two.held_by((0.0, 0.3, 0.5, 1.0), 0.75).left
    assert found[0] == pytest.approx((1.0, 1 - 0.7 / 4, 1 - 0.9 * (2 / 3) ** 2, 0.02))
    assert found[1] == pytest.approx((1.0, 1 - 0.4 / 4, 1 - 0.7 * (2 / 3) ** 2, 0.05))
    # of curves that do not know it nothing is corrected
    assert CURVES.held_by((0.0, 0.3, 0.5, 1.0), 0.75) is CURVES


def test_the_error_of_a_stretch_by_hand():
    """Behind a whole step at .96, where travel is 0.4: 1 at sigma .9 and 3.5 at .8."""
    one = task(5)
    first = 2.0 * 0.1 * 0.6
    second = (2.0 * 1.2) ** 0.5 * 0.15
    assert stretch_error(one, Known(one, CURVES), 0, (0.0,)) == pytest.approx(first**2)
    # in one stretch they point the same way
    both = stretch_error(one, Known(one, CURVES), 0, (0.0, 0.0))
    assert both == pytest.approx((first + second * 3.1) ** 2)
    # a fifth of the tokens leaves .36 of it at .9; what was computed is off by what came since
    assert CURVES.left_at(0.2, 0.9) == pytest.approx(0.36)
    off = 0.64 * 2.5**2 + 0.36 * 3.1**2
    part = stretch_error(one, Known(one, CURVES), 0, (0.2, 0.0))
    assert part == pytest.approx((first * 0.6 + second * off**0.5) ** 2)
    # two calls of a step count twice
    twice = task(5, calls=(1, 2, 1, 1, 1))
    assert stretch_error(twice, Known(twice, CURVES), 0, (0.0,)) == pytest.approx(2 * first**2)


def test_curves_are_linear_between_what_was_measured():
    assert CURVES.travel_at([0.96, 0.8, 0.15]).tolist() == pytest.approx([0.4, 3.5, 8.25])
    # below what was measured it goes on: 9.1 at .25 was 9 at .5
    assert curves(EARLY).travel_at([0.5, 0.25, 0.0]).tolist() == pytest.approx([9.0, 9.1, 9.2])
    three = Curves((0.9, 0.5, 0.25), (0.0, 9.0, 9.1), (1.0,) * 3, (0.0, 1.0), (1.0,), ((1.0, 0.0),))
    assert three.travel_at([0.0])[0] == pytest.approx(9.2)
    # of one whole step nothing is known of the way
    one = Curves((0.7,), (3.0,), (1.0,), (0.0, 1.0), (1.0,), ((1.0, 0.0),))
    assert one.travel_at([0.9, 0.7, 0.1]).tolist() == [3.0] * 3
    # by ratio: half way between 2 and 1.2
    assert CURVES.amplified_at([0.8])[0] == pytest.approx((2.0 * 1.2) ** 0.5)
    # in share and in sigma
    assert CURVES.left_at(0.35, 1.0) == pytest.approx(0.2)
    assert CURVES.left_at(0.35, 0.75) == pytest.approx((0.2 + 0.45) / 2)
    assert CURVES.left_at(0.35, 0.1) == pytest.approx(0.45) and CURVES.left_at(0.0, 0.6) == 1.0


def test_the_curves_that_ship_are_of_the_shares_that_a_run_measures():
    for name in ("TEXT_TO_VIDEO", "IMAGE_TO_VIDEO"):
        for one in (getattr(priors, name), getattr(priors, f"{name}_UNGUIDED")):
            assert one.shares == (0.0, *TRIED, 1.0)
            assert {len(row) for row in (*one.left, *one.held)} == {len(one.shares)}


def test_less_goes_on_the_longer_it_takes():
    assert GOING.reach_at([1.0, 0.8, 0.0]).tolist() == pytest.approx([0.0, 0.35, 0.5])
    assert CURVES.reach_at([1.0, 0.8, 0.0]).tolist() == [0.0] * 3
    # a quarter of the reach, to the power of 1.5: an eighth
    assert Curves.missed(0.1, 0.4) == pytest.approx(1 - np.exp(-1 / 8))
    assert Curves.missed(0.1, 0.1) == pytest.approx(1 - 1 / np.e)
    assert Curves.missed(0.1, 0.0) == Curves.missed(0.1, -0.5) == 1.0 and Curves.missed(0, 1) == 0
    # shifted by 3, half of the steps are done at sigma 0.75
    assert [clock(sigma) for sigma in (1.0, 0.75, 0.5, 0.0)] == pytest.approx([0, 0.5, 0.75, 1])


@pytest.mark.parametrize("calls", [(1,) * 7, (2, 2, 2, 1, 2, 2, 1)])
@pytest.mark.parametrize("factor", [0.5, 0.97, 1.0, 1.3, 1.8])
def test_what_is_left_over_is_spent(calls, factor):
    found = (1.0, 1.0, 0.5, 0.2, 0.0, 1.0, 0.3)

    def price(part: float) -> float:
        return 0.0 if part == 0.0 else 0.03 * (part < 1.0) + part**1.2

    def total(shares) -> float:
        return sum(price(part) * count for part, count in zip(shares, calls, strict=True))

    budget = total([share * factor if 0 < share < 1 else share for share in found])
    filled = fill(found, calls, budget, price)
    assert total(filled) == pytest.approx(budget, rel=1e-6) and total(filled) <= budget
    for before, after in zip(found, filled, strict=True):
        assert after == (before if before in (0.0, 1.0) else pytest.approx(before * factor))
    # a part never becomes none or all
    low, high = (fill(found, calls, budget * times, price)[2:4] for times in (0.1, 9))
    assert low == pytest.approx((0.1, 0.04)) and high == (0.95, 0.95)


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        (2.9, (1, 0, 1, 1)),
        (2.2, (1, 0, 1, 0)),
        (3.0, (1, 0, 1, 1)),
        (0.4, (1, 0, 0, 0)),
        (3.4, (1, 0, 1, 1)),
        (3.6, (1, 1, 1, 1)),
    ],
)
def test_where_nothing_near_fits_the_nearer_plan_is_taken(budget, wanted):
    """Whole steps alone: 2, 3 or 4 of 4, by ratio."""
    one = Task(FOUR.sigmas, FOUR.calls, FOUR.whole, partial=False)
    assert solve_nearest(one, curves(LATE), budget, cost) == wanted


def test_where_nothing_near_fits_the_dearest_that_does_is_taken():
    """A repeated step costs next to nothing, but the solver counts a unit: 2.02 for 2.001."""
    one = Task((1.0, 0.75, 0.5, 0.0), (1, 0.9, 1), frozenset({0}), partial=False)

    def price(share: float) -> float:
        return share or 0.001

    # the second step is worth more than the third, and costs less
    early = curves((0.0, 5.0, 5.5, 6.0))
    assert solve_shares(one, early, 2.07, price) == (1, 1, 0)
    assert solve_nearest(one, early, 2.07, price) == (1, 0, 1)


@pytest.mark.parametrize("wanted", [1.2, 1.5, 1.7])
def test_a_wish_is_met_where_a_part_of_the_tokens_is_worth_nothing(wanted):
    """Whole steps alone would be up to a sixth off; no part takes anything of the error away."""
    even = replace(CURVES, left=((1.0,) * 4,) * 2)
    one = task(5, whole=(0,))
    found = solve_nearest(one, even, 5 / wanted, cost)
    assert abs(spent(one, found) * wanted / 5 - 1) <= 0.03


def test_parts_and_moved_whole_steps_have_to_promise_a_decibel():
    """Image to video in 20 steps: by the curves that ship a part brings 0.7 dB, by others more."""
    sigmas = tuple(sigmas_for(20, 3.0).tolist())
    one, shipped = Task(sigmas, (1.0,) * 20, frozenset({0})), priors.IMAGE_TO_VIDEO

    def plan(of_left: float, budget: float = 13.4, **options) -> tuple[float, ...]:
        left = tuple((1.0, *(of_left * part for part in row[1:])) for row in shipped.left)
        return solve_nearest(replace(one, **options), replace(shipped, left=left), budget, cost)

    def wholes(shares) -> list[int]:
        return [step for step, share in enumerate(shares) if share == 1.0]

    alone, none, some, moved = plan(1.0, partial=False), plan(1.0), plan(0.7), plan(0.05)
    assert none == alone and set(none) == {0.0, 1.0}
    # one that is planned is not taken back for what a run shows
    kept = plan(1.0, parts=True)
    assert wholes(kept) == wholes(alone) and set(kept) > {0.0, 1.0}
    assert wholes(some) == wholes(alone) and set(some) > {0.0, 1.0}
    assert wholes(moved) != wholes(alone)
    # where whole steps alone come nowhere near the wish there are parts whatever they promise
    assert set(plan(1.0, 13.8)) > {0.0, 1.0}


def test_sigmas_that_are_no_numbers_have_a_plan():
    broken = Task((1.0, math.nan, 0.5, 0.0), (2, 0, 1), frozenset({0}), done=(1.0, 0.0, None))
    assert solve_nearest(broken, CURVES, 2.0, cost) == (1.0, 0.0, 0.0)


def test_what_ran_is_not_filled():
    found = (1.0, 0.4, 0.4)
    assert fill(found, (1, 1, 1), 1.9, lambda share: share, (1.0, 0.4)) == pytest.approx(
        (1.0, 0.4, 0.5)
    )
    assert fill(found, (1, 1, 1), 1.9, lambda share: share, (1.0, None)) == pytest.approx(
        (1.0, 0.45, 0.45)
    )
    one = Task(FOUR.sigmas, FOUR.calls, frozenset({0, 1}), done=(1.0, 1.0, 0.4))
    nearest = solve_nearest(one, curves(EARLY, (1.0, 0.01, 0.0)), 2.6, lambda share: share)
    assert nearest == pytest.approx((1.0, 1.0, 0.4, 0.2))


def test_without_a_partial_step_nothing_is_filled():
    assert fill((1.0, 0.0, 1.0), (1, 1, 1), 2.7, cost) == (1.0, 0.0, 1.0)


def test_fifty_steps_are_solved_within_two_seconds():
    one = Task(tuple(np.linspace(1.0, 0.0, 51)), (1,) * 50, frozenset({0}))
    began = time.process_time()
    found = solve_shares(one, CURVES, 30.0, cost)
    assert time.process_time() - began < 2.0
    assert 29.0 < spent(one, found) <= 30.0
