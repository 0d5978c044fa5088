from itertools import product

import pytest
import torch

from wantrim.methods.knapsack import BudgetTooSmall, choose, hull


def instance(seed: int, groups: int = 5) -> list[list[tuple[int, float]]]:
    random = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(groups):
        some = int(torch.randint(1, 4, (1,), generator=random))
        costs = torch.randint(1, 20, (some,), generator=random).tolist()
        values = torch.rand(some, generator=random).tolist()
        made.append([(0, 0.0), *zip(costs, values, strict=True)])
    return made


def spent(groups, chosen) -> tuple[int, float]:
    taken = [options[i] for options, i in zip(groups, chosen, strict=True)]
    return sum(cost for cost, _ in taken), sum(value for _, value in taken)


def optimum(groups, budget: int) -> float:
    every = (spent(groups, pick) for pick in product(*(range(len(g)) for g in groups)))
    return max(value for cost, value in every if cost <= budget)


def largest_step(groups) -> float:
    steps = [0.0]
    for options in groups:
        values = [options[i][1] for i in hull(options)]
        steps += [b - a for a, b in zip(values, values[1:], strict=False)]
    return max(steps)


def test_what_is_dominated_or_below_the_hull_is_not_worth_taking():
    # 1 costs more than 2 for less; 3 gains less per cost than the way from 2 to 4
    options = [(0, 0.0), (5, 1.0), (4, 3.0), (6, 3.1), (8, 5.0), (9, 5.0)]
    assert hull(options) == [0, 2, 4]
    # on the line: a finer choice
    assert hull([(0, 0.0), (1, 1.0), (2, 2.0)]) == [0, 1, 2]
    tenths = [(i, 0.1 * i) for i in range(20)]
    assert hull(tenths) == list(range(20))
    assert hull([(3, 1.0), (1, 1.0), (1, 2.0)]) == [2]
    # each gains less than the last: all of them are worth it
    assert hull([(0, 0.0), (1, 10.0), (2, 15.0), (3, 17.0), (4, 18.0)]) == [0, 1, 2, 3, 4]


def test_the_best_value_per_cost_comes_first_and_the_rest_is_filled():
    groups = [[(0, 0.0), (4, 8.0)], [(0, 0.0), (6, 6.0)], [(0, 0.0), (2, 1.0)]]
    assert choose(groups, 3) == [0, 0, 1]
    assert choose(groups, 4) == [1, 0, 0]
    # 6 does not fit beside 4, 2 does
    assert choose(groups, 9) == [1, 0, 1]
    assert choose(groups, 12) == [1, 1, 1]


def test_equals_go_to_the_first():
    groups = [[(0, 0.0), (2, 1.0)]] * 4
    assert choose(groups, 5) == [1, 1, 0, 0]


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_optimum_but_for_one_step(seed):
    groups = instance(seed)
    whole = sum(max(cost for cost, _ in options) for options in groups)
    last = -1.0
    for budget in range(0, whole + 2, 3):
        cost, value = spent(groups, choose(groups, budget))
        assert cost <= budget
        best = optimum(groups, budget)
        assert best - largest_step(groups) <= value <= best + 1e-12
        # more is never worth less
        assert value >= last
        last = value
    most = sum(max(value for _, value in options) for options in groups)
    assert spent(groups, choose(groups, whole))[1] == pytest.approx(most)


def test_items_of_one_cost_are_chosen_best():
    """With equal costs greedy is exact: the very optimum of every budget."""
    for seed in range(8):
        values = torch.rand(9, generator=torch.Generator().manual_seed(seed)).tolist()
        groups = [[(0, 0.0), (7, value)] for value in values]
        for count in range(10):
            _, value = spent(groups, choose(groups, 7 * count + 3))
            assert value == pytest.approx(optimum(groups, 7 * count + 3), abs=1e-12)


def test_what_is_needed_is_there_even_when_others_are_worth_more():
    groups = [
        [(0, 0.0), (5, 9.0)],
        [(0, 0.0), (5, 8.0)],
        [(0, 0.0), (5, 1.0)],
        [(0, 0.0), (5, 2.0)],
    ]
    assert choose(groups, 10) == [1, 1, 0, 0]
    assert choose(groups, 10, needed=[[0, 1], [2, 3]]) == [1, 0, 0, 1]
    with pytest.raises(BudgetTooSmall) as caught:
        choose(groups, 9, needed=[[0, 1], [2, 3]])
    assert caught.value.least == 10
