"""PARE's depth: the block budget (eq. 8), the choice (eq. 10) and what an artist is shown."""

import pytest
import torch

from wantrim.benchmarks.peers.random_router import RandomRouter
from wantrim.hosts.diffusers.sample import sigmas_for
from wantrim.methods.depth import SHAPES, BlockBudget, BlockPlan, choose_blocks
from wantrim.methods.routers import FixedRouter
from wantrim.methods.schedule import progress_at


def test_the_papers_budget_of_forty_blocks():
    budget = BlockBudget()
    assert (budget.blocks(1.0, 40), budget.blocks(0.0, 40)) == (35, 20)
    # 20 + 15 * sigma
    assert [budget.blocks(s, 40) for s in (0.2, 0.4, 0.6, 0.8)] == [23, 26, 29, 32]
    # 30 blocks: 15 and 26.25
    assert (budget.blocks(1.0, 30), budget.blocks(0.0, 30)) == (26, 15)


def test_curves():
    falling, constant, rising = (BlockBudget(0.25, 0.75, shape) for shape in SHAPES)
    for sigma in (0.0, 0.3, 1.0):
        assert falling.fraction(sigma) == pytest.approx(0.25 + 0.5 * sigma)
        assert rising.fraction(sigma) == pytest.approx(0.75 - 0.5 * sigma)
        assert constant.fraction(sigma) == 0.5
    # a sampler's sigma may lie a little outside
    assert falling.fraction(1.2) == 0.75 and falling.fraction(-0.1) == 0.25


def test_the_first_and_the_last_block_count_and_always_run():
    assert BlockBudget(0.01, 0.01).blocks(0.5, 40) == 2
    assert BlockBudget(0.01, 0.01).blocks(0.5, 1) == 1
    low = torch.tensor([-5.0, 1.0, 3.0, 2.0, -9.0])
    assert choose_blocks(low, 2) == (0, 4)
    assert choose_blocks(low, 3) == (0, 2, 4)
    assert choose_blocks(low, 4) == (0, 2, 3, 4)
    assert choose_blocks(low, 5) == choose_blocks(low, 9) == (0, 1, 2, 3, 4)
    # of equals the first, on every machine
    assert choose_blocks(torch.zeros(7), 4) == (0, 1, 2, 6)


def test_more_blocks_are_a_superset_of_fewer():
    logits = torch.randn(17, generator=torch.Generator().manual_seed(0))
    sets = [set(choose_blocks(logits, count)) for count in range(2, 18)]
    assert [len(s) for s in sets] == list(range(2, 18))
    assert all(a < b for a, b in zip(sets, sets[1:], strict=False))


def blocks_per_step(plan: BlockPlan, sigmas, shift: float, num_blocks: int) -> list[int]:
    return [plan.count(sigma, progress_at(sigma, shift), num_blocks) for sigma in sigmas]


def test_blocks_per_step_of_wans_shift_are_more_than_the_nominal_mean():
    plan = BlockPlan(RandomRouter())
    sigmas = sigmas_for(20, 5.0)[:-1].tolist()
    counts = blocks_per_step(plan, sigmas, 5.0, 40)
    assert counts[0] == 35 and counts == sorted(counts, reverse=True)
    # by hand: 20 + 15 * mean sigma
    assert sum(counts) / 20 == pytest.approx(20 + 15 * sum(sigmas) / 20, abs=0.3)
    # methods.md: about 31, where the curve's own mean is 27.5
    assert 30.5 < sum(counts) / 20 < 32


def test_blocks_are_skipped_between_start_and_end():
    # without a shift progress is 1 - sigma
    plan = BlockPlan(RandomRouter(), BlockBudget(0.5, 0.5), start=0.25, end=0.5)
    assert blocks_per_step(plan, [1.0, 0.75, 0.5, 0.25], 1.0, 8) == [8, 4, 4, 8]


def test_a_fixed_list_does_not_follow_the_budget():
    plan = BlockPlan(FixedRouter((0, 3, 5)), BlockBudget(0.1, 0.1))
    # block 0 runs all the same
    assert blocks_per_step(plan, [1.0, 0.5], 1.0, 8) == [6, 6]


def test_skipped_blocks_that_nobody_chose_are_spread_evenly_between_the_first_and_the_last():
    plan = BlockPlan(RandomRouter(), BlockBudget(0.5, 0.5))
    # by hand: the middles of three, four and one of as many pieces of what is between
    assert plan.skipped(0.5, 0.5, 6, None) == {1, 3, 4}
    assert plan.skipped(0.5, 0.5, 8, None) == {1, 3, 4, 6}
    assert plan.skipped(0.5, 0.5, 3, None) == {1}
    # by logits the least of the inner ones
    low = torch.tensor([-9.0, 1.0, 3.0, 0.0, 2.0, -9.0])
    assert plan.skipped(0.5, 0.5, 6, low) == {1, 3, 4}


def test_neutral():
    assert BlockPlan(RandomRouter(), BlockBudget(1.0, 1.0)).neutral
    assert BlockPlan(FixedRouter(())).neutral
    assert not BlockPlan(RandomRouter(), BlockBudget(0.9, 1.0)).neutral
    assert not BlockPlan(FixedRouter((3,))).neutral


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: BlockBudget(0.6, 0.5), "0 < k_min <= k_max <= 1.*0.6 and 0.5"),
        (lambda: BlockBudget(0.0, 0.5), "k_min"),
        (lambda: BlockBudget(0.5, 1.1), "k_max"),
        (lambda: BlockBudget(shape="flat"), "shape: expected one of falling.*'flat'"),
        (lambda: BlockPlan(RandomRouter(), start=0.6, end=0.4), "start and end"),
    ],
)
def test_plans_that_cannot_work_are_refused(made, said):
    with pytest.raises(ValueError, match=said):
        made()
