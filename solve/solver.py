"""From a wanted cost to a share for every step: a dynamic program over the steps that are whole.

Between two whole steps the velocity is repeated, or a part of the tokens is computed. The error of
such a stretch comes from the curves (curves.py), its cost from the cost model; both add up over
stretches, so that the best choice within a budget is found exactly, up to the grid of shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, product

import numpy as np

from .curves import Curves, clock

# shares that a step may have besides all and none
GRID = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.67, 0.8)
# stretches up to this long may have another share in each of their steps
FREE = 2
# steps in a row that are not whole
LONGEST = 8
# parts of a whole step in which costs are counted
UNITS = 50
# relative distance of a cost within which a budget counts as met, and the next one to try beyond it
TOLERANCE, STRIDE = 0.03, 0.1
# ratio of squared errors, 1 dB, within which curves tell no plans apart: in image to video on the second
# tiny Wan whole steps that a part had moved cost 1.8 dB for a promise of 0.03, and a part that was to
# bring 0.7 cost 0.3; in text to video 1.2 were promised on both and 1.4 and 1.8 came
ALIKE = 10.0**0.1


@dataclass(frozen=True)
class Task:
    """What the solver has to decide.

    Args:
        sigmas: of the steps, falling, and the last one, where the run ends.
        calls: model calls of each step.
        whole: steps that compute everything: the first, those asked for, each expert's first.
        fresh: steps from which on nothing is known of the steps before: each expert's first.
        partial: whether a step may compute a part of its tokens.
        done: shares of steps that ran, None for those to come; shorter is none of the rest.
        held: what the last whole step that ran left for later ones to compute a part by is there.
        parts: the plan so far has them in steps to come.
    """

    sigmas: tuple[float, ...]
    calls: tuple[float, ...]
    whole: frozenset[int]
    fresh: frozenset[int] = frozenset({0})
    partial: bool = True
    done: tuple[float | None, ...] = ()
    held: bool = True
    parts: bool = False

    @property
    def steps(self) -> int:
        return len(self.calls)

    def ran(self, step: int) -> float | None:
        """The share of a step that ran, or None."""
        return self.done[step] if step < len(self.done) else None


def solve_shares(
    task: Task, curves: Curves, budget: float, cost: Callable[[float], float], least: float = 0.0
) -> tuple[float, ...]:
    """The share of every step with the least expected error whose cost is within `budget`.

    Args:
        budget: in whole model calls.
        cost: of a model call at a share, relative to a whole one.
        least: what a plan should cost, where there is one that does.

    Returns:
        The cheapest plan where nothing fits.
    """
    return _solved(task, curves, budget, cost, least)[0]


def _solved(
    task: Task, curves: Curves, budget: float, cost: Callable[[float], float], *least: float
) -> list[tuple[float, ...]]:
    """As `solve_shares`, of one search for all that a plan should cost."""
    room = int(np.floor(budget * UNITS + 1e-6))
    if round(task.calls[0] * UNITS) > room:
        return [_cheapest(task)] * len(least)
    search = _Search(task, curves, room, cost)
    found = [search.best(int(np.ceil(one * UNITS - 1e-6))) for one in least]
    return [_cheapest(task) if plan is None else plan for plan in found]


class Known:
    """The curves at each step of a task: looked up once."""

    def __init__(self, task: Task, curves: Curves):
        at = task.sigmas[:-1]
        self.travel: list[float] = curves.travel_at(at).tolist()
        self.amplified: list[float] = curves.amplified_at(at).tolist()
        self.reach: list[float] = curves.reach_at(at).tolist()
        self.clock = [clock(sigma) for sigma in at]
        # by share and step
        self.left = lru_cache(maxsize=None)(lambda share, step: curves.left_at(share, at[step]))


class _Search:
    """Least error of every beginning of a plan that ends with a whole step, by what it cost.

    Args:
        room: units that may be spent.
    """

    def __init__(self, task: Task, curves: Curves, room: int, cost: Callable[[float], float]):
        self.task, self.known, self.room = task, Known(task, curves), room
        self.price = lru_cache(maxsize=None)(cost)
        # by whole step and, where a change is known there, the whole one before: how a repeated
        # velocity goes on depends on how far apart they are
        self.least: list[dict[int | None, np.ndarray]] = [{} for _ in range(task.steps + 1)]
        self.came: list[dict[int | None, np.ndarray]] = [{} for _ in range(task.steps + 1)]
        self.moves: list[tuple[int, int | None, tuple[float, ...], int]] = []
        first, _ = self._at(0, None)
        first[round(task.calls[0] * UNITS)] = 0.0
        for start in range(task.steps):
            for before in list(self.least[start]):
                for end in self._ends(start):
                    self._go(before, start, end)

    def _at(self, step: int, before: int | None) -> tuple[np.ndarray, np.ndarray]:
        if before not in self.least[step]:
            self.least[step][before] = np.full(self.room + 1, np.inf)
            self.came[step][before] = np.full(self.room + 1, -1)
        return self.least[step][before], self.came[step][before]

    def _ends(self, start: int):
        """The steps that may be the next whole one; the last is where the run ends."""
        task = self.task
        longest = LONGEST + sum(share is not None for share in task.done[start + 1 :])
        for end in range(start + 1, min(task.steps, start + 1 + longest) + 1):
            if end - 1 > start and end - 1 in task.whole:
                return
            if end == task.steps or task.ran(end) in (None, 1.0):
                yield end

    def _go(self, before: int | None, start: int, end: int) -> None:
        task, last = self.task, end == self.task.steps
        whole = 0 if last else round(task.calls[end] * UNITS)
        # of a plan that is done nothing more is asked
        known = None if last or end in task.fresh or start in task.fresh else start
        least = self.least[start][before]
        into, came = self._at(end, known)
        for spent, error, shares in self._ways(before, start, end):
            spent += whole
            if spent > self.room:
                continue
            now = least[: self.room + 1 - spent] + error
            better = now < into[spent:] - 1e-15
            if better.any():
                into[spent:][better] = now[better]
                came[spent:][better] = len(self.moves)
                self.moves.append((start, before, shares, spent))

    def _ways(self, before: int | None, start: int, end: int):
        """Units, error and shares of the ways between two whole steps, but for those that cost more
        than another and are worse.
        """
        task, found = self.task, []
        for shares in _stretches(task, start, end):
            spent = sum(
                _units(task.calls[start + 1 + i] * self.price(share))
                for i, share in enumerate(shares)
            )
            error = stretch_error(task, self.known, start, shares, before)
            found.append((spent, error, shares))
        least = np.inf
        for way in sorted(found, key=lambda way: way[:2]):
            if way[1] <= least:
                least = way[1]
                yield way

    def best(self, low: int) -> tuple[float, ...] | None:
        """The plan of the least error that costs `low` units or more, where one does."""
        end, before = self.task.steps, None
        least = self.least[end].get(None)
        if least is None or not np.isfinite(least).any():
            return None
        low = low if np.isfinite(least[low:]).any() else 0
        at, plan = low + int(least[low:].argmin()), []
        while end > 0:
            start, earlier, shares, spent = self.moves[self.came[end][before][at]]
            plan[:0] = [1.0, *shares]
            end, before, at = start, earlier, at - spent
        return tuple(plan)


def _units(cost: float) -> int:
    return int(np.ceil(cost * UNITS - 1e-6))


def _cheapest(task: Task) -> tuple[float, ...]:
    return tuple(
        float(step in task.whole) if (ran := task.ran(step)) is None else ran
        for step in range(task.steps)
    )


def _stretches(task: Task, start: int, end: int) -> list[tuple[float, ...]]:
    """Ways through the steps between two whole ones."""
    steps = range(start + 1, end)
    # how tokens change is known from two velocities
    known = start not in task.fresh and (task.held or task.ran(start) is None)
    grid = (0.0, *GRID) if task.partial and known else (0.0,)
    ran = [task.ran(step) for step in steps]
    if ran.count(None) <= FREE:
        return list(product(*(grid if share is None else (share,) for share in ran)))
    return [tuple(at if share is None else share for share in ran) for at in grid]


def stretch_error(
    task: Task, known: Known, start: int, shares: Sequence[float], before: int | None = None
) -> float:
    """Expected squared error of the steps behind a whole one.

    Tokens that a partial step computes are off by what happened since then, the others since the
    whole step, less what of it was foretold. Within a stretch the errors point the same way and add
    up; over stretches they do not.

    Args:
        before: the whole step before that one, where a change is known; None is nowhere.
    """
    travel, amplified = known.travel, known.amplified
    error, last, hot = 0.0, start, 0.0
    for step, share in enumerate(shares, start + 1):
        length = task.sigmas[step] - task.sigmas[step + 1]
        far, near = (travel[step] - travel[start]) ** 2, (travel[step] - travel[last]) ** 2
        left = known.left(share, step)
        off = (hot * near + (1.0 - hot) * far) * left
        if before is not None:
            off *= Curves.missed(known.clock[step] - known.clock[before], known.reach[step])
        error += amplified[step] * length * task.calls[step] ** 0.5 * off**0.5
        if share > 0.0:
            last, hot = step, 1.0 - min(1.0, left)
    return error**2


def plan_error(task: Task, known: Known, shares: Sequence[float]) -> float:
    """Expected squared error of a plan: the sum over what lies between its whole steps."""
    wholes = [0, *(step for step in range(1, task.steps) if shares[step] == 1.0), task.steps]
    error, before = 0.0, None
    for start, end in pairwise(wholes):
        error += stretch_error(task, known, start, shares[start + 1 : end], before)
        before = None if start in task.fresh or end in task.fresh else start
    return error


def _with_few_parts(
    task: Task, curves: Curves, budget: float, cost: Callable[[float], float]
) -> list[tuple[float, ...]]:
    """The best plan without parts of the tokens, and the best with them only where it repeats."""
    base = solve_shares(replace(task, partial=False), curves, budget, cost)
    whole = task.whole | {step for step, share in enumerate(base) if share == 1.0}
    return [base, solve_shares(replace(task, whole=whole), curves, budget, cost)]


def solve_nearest(
    task: Task, curves: Curves, budget: float, cost: Callable[[float], float]
) -> tuple[float, ...]:
    """As `solve_shares`, `fill`ed; where nothing near the budget fits, what is nearer beyond it.

    No plan gets a part of the tokens, which takes memory, and no part moves a whole step, for less than
    the curves can tell. With few steps plans are far apart, and far too little is worse than a little
    too much.
    """

    def spent(shares: Sequence[float]) -> float:
        return sum(m * cost(share) for share, m in zip(shares, task.calls, strict=True))

    wanted = budget * (1.0 - TOLERANCE)
    tries = _solved(task, curves, budget, cost, 0.0, wanted)
    if task.partial:
        # what a run shows of itself speaks less of whether parts are worth it than the curves do
        tries[:0] = _with_few_parts(task, curves, budget, cost)[task.parts :]
    plans = [fill(plan, task.calls, budget, cost, task.done) for plan in tries]
    near = [plan for plan in plans if wanted <= spent(plan) <= budget * (1.0 + 1e-6)]
    if near:
        known = Known(task, curves)
        errors = [plan_error(task, known, plan) for plan in near]
        most = min(errors) * ALIKE
        # of sigmas that are no numbers there is no error
        return next(p for p, e in zip(near, errors, strict=True) if not e > most)
    below = plans[-1]
    least = spent(below)
    if least > budget:
        return below
    more = budget
    while (more := more + STRIDE) < sum(task.calls):
        above = solve_shares(task, curves, more, cost)
        if (most := spent(above)) > budget:
            break
        if most > least:
            # the solver rounds every cost up
            below, least = above, most
    else:
        above = tuple(1.0 if (ran := task.ran(step)) is None else ran for step in range(task.steps))
    return above if spent(above) / budget < budget / least else below


def fill(
    shares: Sequence[float],
    calls: Sequence[float],
    budget: float,
    cost: Callable[[float], float],
    done: Sequence[float | None] = (),
) -> tuple[float, ...]:
    """Partial steps, all by the same factor, a little larger or smaller, so that the budget is met.

    The solver counts in units and on a grid; what is left over is spent here, on steps to come.
    """
    ran = {step for step, share in enumerate(done) if share is not None}
    open_ = {step for step, share in enumerate(shares) if 0.0 < share < 1.0} - ran

    def at(factor: float) -> tuple[float, ...]:
        return tuple(
            min(0.95, max(0.02, share * factor)) if step in open_ else share
            for step, share in enumerate(shares)
        )

    def spent(factor: float) -> float:
        return sum(m * cost(share) for share, m in zip(at(factor), calls, strict=True))

    if not open_:
        return tuple(shares)
    low, high = 0.2, 5.0
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if spent(middle) <= budget else (low, middle)
    return at(low)
