"""Choosing one option of every group for the most value within a cost: a multiple-choice knapsack."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

# rounding must not take options on a line for ones below it: they are the finer choice
SAME_SLOPE = 1 + 1e-9

# cost and value
Option = tuple[int, float]


class BudgetTooSmall(ValueError):
    """Not even the cheapest options fit; `least` is what they and what is needed cost."""

    def __init__(self, least: int, budget: int):
        super().__init__(f"budget: expected at least {least}, got {budget}")
        self.least = least


def hull(options: Sequence[Option]) -> list[int]:
    """The options worth taking, from the cheapest on, each gaining less per cost than the last."""
    order = sorted(range(len(options)), key=lambda i: (options[i][0], -options[i][1], i))
    worth: list[int] = []
    for i in order:
        if worth and options[i][1] <= options[worth[-1]][1]:
            continue
        while len(worth) > 1 and _slope(options, worth[-1], i) > SAME_SLOPE * _slope(
            options, worth[-2], worth[-1]
        ):
            worth.pop()
        worth.append(i)
    return worth


def _slope(options: Sequence[Option], low: int, high: int) -> float:
    return (options[high][1] - options[low][1]) / (options[high][0] - options[low][0])


def choose(
    groups: Sequence[Sequence[Option]], budget: int, needed: Sequence[Sequence[int]] = ()
) -> list[int]:
    """Index of the chosen option of every group.

    Greedy along the groups' hulls by value per cost: short of the optimum by less than one step of
    one hull, and never worth less for a larger budget. Equals go to the lowest index.

    Args:
        needed: sets of groups of which one at least takes more than its cheapest option.

    Raises:
        BudgetTooSmall: the budget is too small for the cheapest options and what is needed.
    """
    hulls = [hull(options) for options in groups]
    at = [0] * len(groups)
    left = budget - sum(groups[g][h[0]][0] for g, h in enumerate(hulls))

    def step(g: int) -> tuple[float, int, int]:
        low, high = hulls[g][at[g]], hulls[g][at[g] + 1]
        return -_slope(groups[g], low, high), g, groups[g][high][0] - groups[g][low][0]

    def more(g: int) -> bool:
        return at[g] + 1 < len(hulls[g])

    for some in needed:
        able = [step(g) for g in some if more(g)]
        if able:
            _, g, cost = min(able)
            left -= cost
            at[g] += 1
    if left < 0:
        raise BudgetTooSmall(budget - left, budget)
    steps = [step(g) for g in range(len(groups)) if more(g)]
    heapq.heapify(steps)
    while steps:
        _, g, cost = heapq.heappop(steps)
        if cost > left:
            continue
        left -= cost
        at[g] += 1
        if more(g):
            heapq.heappush(steps, step(g))
    return [h[i] for h, i in zip(hulls, at, strict=True)]
