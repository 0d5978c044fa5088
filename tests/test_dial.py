"""One dial for a model or for the two experts of Wan2.2: it costs what it says, or says why not."""

import itertools
from dataclasses import replace

import pytest
import torch

from wantrim.benchmarks.flops import count_flops, forward_flops, plan_work
from wantrim.benchmarks.predicted import WAN, video_grid
from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import sample, sigmas_for
from wantrim.hosts.diffusers.shape import wan_shape
from wantrim.hosts.diffusers.weights import load_original
from wantrim.methods.depth import BlockPlan
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import FULL, OFF, HeadPlan
from wantrim.methods.routers import FixedRouter
from wantrim.methods.schedule import progress_at, sigma_at
from wantrim.methods.tokens import paper_plan
from wantrim.solve.dial import (
    BOUNDARY,
    HIGH,
    LOW,
    MAX_DENSE_STEPS,
    TOLERANCE,
    Dial,
    Run,
    other_slice,
)
from wantrim.solve.floor import Rates
from wantrim.toy import CHECKPOINT

SHAPE = WAN["14B"]
GRID = video_grid(SHAPE, 832, 480, 81)


def sigmas(steps: int, shift: float = 5.0) -> tuple[float, ...]:
    return tuple(sigmas_for(steps, shift).tolist())


def run_of(steps: int, name="14B", shift=5.0, **options) -> Run:
    shape = WAN[name]
    return Run(shape, video_grid(shape, 832, 480, 81), sigmas(steps, shift), shift, **options)


def speedup(run: Run, plan: TrimPlan) -> float:
    """FLOPs of a run that is whole over those of the plan's programs, one model call a step."""
    work = plan_work(run.shape, run.programs(plan), plan, run.prompts)
    return run.steps * run.prompts * forward_flops(run.shape, run.grid.tokens) / work.flops


def shares(solved) -> tuple[float, ...]:
    return solved.plan.shares.shares


@pytest.mark.parametrize("steps", [4, 6, 20, 30, 50])
@pytest.mark.parametrize(("name", "wanted"), [("1.3B", 1.2), ("5B", 1.5), ("14B", 2.0)])
def test_a_wish_is_met(name, wanted, steps):
    run = run_of(steps, name, prompts=1 if name == "1.3B" else 2)
    solved = Dial(wanted).solve(run)
    assert solved.wanted == wanted and solved.why is None
    assert solved.reached == pytest.approx(speedup(run, solved.plan), rel=1e-9)
    assert wanted / solved.reached == pytest.approx(1, abs=TOLERANCE)
    assert shares(solved)[0] == 1.0 and solved.plan.shares.sigmas == run.sigmas[:-1]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("partial", [True, False])
def test_a_wish_that_cannot_be_met_says_why(steps, partial):
    for wanted in (1.3, 2.5, 4.0):
        run = run_of(steps, partial=partial)
        solved = Dial(wanted).solve(run)
        off = abs(wanted / solved.reached - 1)
        assert (off <= TOLERANCE) == (solved.why is None)
        if not partial:
            assert set(shares(solved)) <= {0.0, 1.0}


def test_without_context_the_reason_is_that_steps_are_whole_or_repeated():
    solved = Dial(1.4).solve(run_of(6, partial=False))
    assert set(shares(solved)) == {0.0, 1.0} and solved.reached == pytest.approx(1.5, rel=1e-3)
    assert solved.why == (
        "steps are whole or repeated, and the next number of them (1.2x) is further away"
    )
    assert Dial(1.4).solve(run_of(6)).why is None
    assert not solved.plan.shares.context


def test_what_the_tooltip_says_is_reachable():
    """Half the number of steps computes one more than the first; beyond it nothing but the first."""
    for steps in (4, 6, 8):
        for prompts in (1, 2):
            solved = Dial(steps / 2).solve(run_of(steps, prompts=prompts))
            assert solved.why is None and sum(shares(solved)) == pytest.approx(2, rel=0.1)
    for wanted in (3.5, 4.0):
        assert shares(Dial(wanted).solve(run_of(4))) == (1.0, 0.0, 0.0, 0.0)
    # what lies on the other side of the wish
    assert Dial(2.4).solve(run_of(4)).why == (
        "steps are so few that the next plan (4x) is further away"
    )
    assert "the next plan (2x) is" in Dial(3.0).solve(run_of(4)).why
    # of two steps one is twice as fast, none left out is nearer to a small wish
    for wanted, all_of_them in ((1.05, True), (1.3, True), (1.5, False)):
        solved = Dial(wanted).solve(run_of(2))
        assert shares(solved) == (1.0, float(all_of_them))
        assert ("the next plan (2x) is further" in (solved.why or "")) == all_of_them
    # where other nodes trim a whole step is no measure
    heads = TrimPlan(heads=HeadPlan.keeping(40, [range(20)] * 40, [range(40)] * 40))
    assert Dial(3.0).solve(run_of(4, partial=False), heads).why.endswith("of them is further away")


def test_more_is_never_less():
    for run in (run_of(4), run_of(8, partial=False)):
        reached = [Dial(wanted).solve(run).reached for wanted in (1.0, 1.2, 1.5, 2.0, 4.0)]
        assert reached[0] == 1.0
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(reached))


def test_one_trims_nothing():
    solved = Dial(1.0).solve(run_of(7))
    assert shares(solved) == (1.0,) * 7 and solved.plan.neutral and solved.why is None


@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, 0), (0, 2), (4, 3), (5, 5), (60, 60)])
def test_guarded_steps_are_whole(first, last):
    solved = Dial(2.0, dense_first_steps=first, dense_last_steps=last).solve(run_of(10))
    whole = [share == 1.0 for share in shares(solved)]
    assert all(whole[: max(1, first)]) and all(whole[max(0, 10 - last) :])
    if first + last >= 10:
        assert solved.reached == 1.0
        assert solved.why == ("10 of 10 steps compute everything (the first, and those asked for)")
    elif first + last < 5:
        assert solved.why is None


def test_a_step_that_waits_is_whole():
    run, dial = run_of(8), Dial(2.0)
    planned = shares(dial.solve(run))
    at = planned.index(0.0)
    waiting = shares(dial.solve(replace(run, waits=at)))
    assert planned[at] == 0.0 and waiting[at] == 1.0 and sum(waiting) < 5
    # counted from its own first step on: behind two steps of the other expert
    high, low = run.sigmas[:3], replace(run, sigmas=run.sigmas[2:])
    low = replace(low, before=replace(run, sigmas=high, done=(1.0, 1.0)))
    pair = Dial(2.0, expert=LOW)
    at = shares(pair.solve(low)).index(0.0)
    assert at > 0 and shares(pair.solve(replace(low, waits=at)))[at] == 1.0


def test_steps_outside_of_the_window_are_whole():
    run = run_of(12)
    solved = Dial(1.3, start=0.3, end=0.7).solve(run)
    for sigma, share in zip(run.sigmas, shares(solved), strict=False):
        assert 0.3 <= progress_at(sigma, 5.0) <= 0.7 or share == 1.0
    assert solved.reached == pytest.approx(1.3, rel=TOLERANCE)


def test_a_step_of_two_calls_counts_twice():
    """heun: the announced steps are half of the work."""
    calls = (2,) * 9 + (1,)
    run = run_of(10, calls=calls)
    solved = Dial(1.5).solve(run)
    assert solved.reached == pytest.approx(1.5, rel=TOLERANCE) and solved.why is None
    works = [plan_work(SHAPE, [one], solved.plan).flops for one in run.programs(solved.plan)]
    dense = sum(calls) * 2 * forward_flops(SHAPE, GRID.tokens)
    spent = sum(work * count for work, count in zip(works, calls, strict=True))
    assert dense / spent == pytest.approx(solved.reached)


HEADS = HeadPlan(((OFF,) * 20 + (FULL,) * 20,) * 40, ((FULL,) * 40,) * 40)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (TrimPlan(tokens=paper_plan(0.6)), "what WanTrim Tokens decides is taken as it is"),
        (TrimPlan(heads=HEADS), "what WanTrim Heads decides is taken"),
        (TrimPlan(blocks=BlockPlan(FixedRouter((3, 7, 20)))), "what WanTrim Blocks decides"),
        (
            TrimPlan(heads=HEADS, tokens=paper_plan(0.6)),
            "what WanTrim Tokens and WanTrim Heads decide is taken",
        ),
    ],
)
def test_what_others_decided_stays_and_counts(plan, said):
    run = run_of(8)
    alone = speedup(run, plan)
    assert alone > 1.05
    for wanted in (1.02, 1.6, 3.9):
        solved = Dial(wanted).solve(run, plan)
        assert replace(solved.plan, shares=None) == plan
        assert solved.reached == pytest.approx(speedup(run, solved.plan))
        if wanted < alone:
            assert shares(solved) == (1.0,) * 8
        # every block must have seen all the others
        partial = any(0 < share < 1 for share in shares(solved))
        assert not partial or plan.may_be_partial
        met = abs(wanted / solved.reached - 1) <= TOLERANCE
        assert met == (solved.why is None)
        assert met or said in solved.why


def test_on_a_card_whose_rates_are_known_the_cost_is_its_time():
    slow = Rates(1e15, 1e12, 1e15)
    for rates in (slow, Rates(1e12, 1e15, 1e15)):
        run = run_of(10)
        solved = Dial(1.5).solve(run, cost=rates.seconds)
        seconds = [
            rates.seconds(plan_work(SHAPE, run.programs(plan), plan))
            for plan in (TrimPlan(), solved.plan)
        ]
        assert seconds[0] / seconds[1] == pytest.approx(1.5, rel=TOLERANCE)
    # there a part of the tokens costs more than its share of the FLOPs: its keys are not fewer
    run = run_of(4, prompts=1)
    found = [
        Dial(1.5).solve(run, cost=Rates(a, b, 1e15).seconds).plan
        for a, b in ((1e15, 1e12), (1e12, 1e15))
    ]
    assert speedup(run, found[0]) != pytest.approx(speedup(run, found[1]), rel=1e-3)


# a pair


def slices(steps: int, first: int, shift=8.0) -> tuple[Run, Run]:
    """What the high noise expert's sampler is given, and what the low one's."""
    whole = sigmas(steps, shift)
    return tuple(Run(SHAPE, GRID, part, shift) for part in (whole[: first + 1], whole[first:]))


def solved_pair(runs, speedup, **options):
    return [
        Dial(speedup, expert=expert, **options).solve(run)
        for expert, run in zip((HIGH, LOW), runs, strict=True)
    ]


@pytest.mark.parametrize(("steps", "first"), [(6, 3), (12, 3), (20, 14)])
@pytest.mark.parametrize("wanted", [1.3, 1.8])
def test_a_pair_meets_its_speedup_and_both_find_the_same(steps, first, wanted):
    runs = slices(steps, first)
    solved = solved_pair(runs, wanted)
    spent = sum(run.steps / one.reached for run, one in zip(runs, solved, strict=True))
    assert steps / spent == pytest.approx(wanted, rel=TOLERANCE)
    assert [one.why for one in solved] == [None, None]
    # each begins anew
    assert [shares(one)[0] for one in solved] == [1.0, 1.0]
    # an expert that is told the boundary finds what it finds by its own sigmas
    told = [
        Dial(wanted, expert=expert, boundary=runs[1].sigmas[0]).solve(run)
        for expert, run in zip((HIGH, LOW), runs, strict=True)
    ]
    for one, other in zip(solved, told, strict=True):
        assert shares(one) == pytest.approx(shares(other), abs=1e-3)


def test_two_and_two_steps_reach_less_than_three_times():
    for one in solved_pair(slices(4, 2), 3.0):
        assert one.reached == pytest.approx(2.0, rel=0.01)
        assert one.why == (
            "2 of 4 steps compute everything (the first of each expert, and those asked for)"
        )


def test_guards_are_the_first_steps_of_the_high_and_the_last_of_the_low_expert():
    solved = solved_pair(slices(12, 6), 1.3, dense_first_steps=3, dense_last_steps=2)
    high, low = map(shares, solved)
    assert high[:3] == (1.0,) * 3 and low[0] == 1.0 and low[-2:] == (1.0, 1.0)
    assert min(*high, *low) < 1.0


@pytest.mark.parametrize(("steps", "first"), [(4, 2), (20, 10), (20, 3), (9, 5)])
def test_each_slice_tells_the_other(steps, first):
    high, low = slices(steps, first)
    for own, other, expert in ((high, low, HIGH), (low, high, LOW)):
        found = other_slice(own, expert)
        assert found.sigmas == pytest.approx(other.sigmas, abs=1e-4)
        # a boundary by hand is the same where the steps are even
        by_hand = other_slice(own, expert, sigma_at(first / steps, 8.0))
        assert by_hand.sigmas == pytest.approx(other.sigmas, abs=1e-4)
    # a quarter and nine tenths of the run
    for sigma, count in ((0.96, 6), (0.47, 1)):
        assert other_slice(slices(4, 2)[0], HIGH, sigma).steps == count


def test_a_video_that_begins_in_the_middle_has_no_steps_before_it():
    """Denoise below 1: the last 14 of 20 steps, 4 by the first expert."""
    every = sigmas(20, 8.0)[6:]
    high, low = (Run(SHAPE, GRID, part, 8.0) for part in (every[:5], every[4:]))
    assert other_slice(high, HIGH).sigmas == pytest.approx(low.sigmas, abs=1e-4)
    first = Dial(1.5, expert=HIGH).solve(high)
    second = Dial(1.5, expert=LOW).solve(replace(low, before=replace(high, done=shares(first))))
    assert second.together == pytest.approx(1.5, rel=TOLERANCE)


@pytest.mark.parametrize("steps", [6, 10])
def test_a_low_noise_expert_that_goes_over_a_video_is_a_model_alone(steps):
    """Denoise 0.2 and less: no first expert's steps are made up, whose savings nobody makes."""
    every = sigmas(5 * steps, 8.0)[4 * steps :]
    run = Run(SHAPE, GRID, every, 8.0)
    solved = Dial(1.5, expert=LOW).solve(run)
    assert solved.together is None and solved == Dial(1.5).solve(run)
    # three steps of the first one for each of the second's are a pair still
    assert other_slice(slices(8, 6)[1], LOW).steps == 6


def test_a_boundary_by_hand_makes_up_no_endless_expert():
    assert other_slice(slices(10, 5)[0], HIGH, 0.999).steps == 100


def test_a_low_noise_expert_that_begins_above_the_boundary_does_the_others_part():
    """Its high noise one is bypassed, and the boundary still set."""
    run = Run(SHAPE, GRID, sigmas(12, 8.0), 8.0)
    for boundary in (0.0, 0.875, 0.9):
        assert Dial(1.5, expert=LOW, boundary=boundary).solve(run) == Dial(1.5).solve(run)
    # from its third step on: what came before it is not known, and cannot go down to the boundary
    late = replace(run, sigmas=run.sigmas[2:])
    assert late.sigmas[0] > 0.875
    assert Dial(1.5, expert=LOW, boundary=0.875).solve(late) == Dial(1.5, expert=LOW).solve(late)


def test_an_expert_that_does_the_whole_run_is_a_model_alone():
    run = Run(SHAPE, GRID, sigmas(6, 8.0), 8.0)
    assert other_slice(run, HIGH) is None and other_slice(run, LOW) is None
    alone = Dial(1.5).solve(run)
    assert Dial(1.5, expert=LOW).solve(run) == alone
    # the high noise one may be stopped at Wan's boundary, where the other begins with a whole step
    high = Dial(1.5, expert=HIGH).solve(run)
    switch = sum(sigma >= BOUNDARY for sigma in run.sigmas[:-1])
    assert 0 < switch < 6 and high.plan.shares.shares[switch] == 1.0
    assert high.reached == pytest.approx(alone.reached, rel=0.03) and high.together is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speedup": 0.9}, r"speedup: expected 1 \(off\) or more, got 0.9"),
        ({"speedup": float("nan")}, "got nan"),
        ({"dense_first_steps": -1}, "dense_first_steps: expected 0 to 100"),
        ({"dense_last_steps": 101}, "dense_last_steps: expected 0 to 100"),
        ({"boundary": 1.0}, "boundary: expected 0 to less than 1"),
        ({"boundary": -0.1}, "boundary: expected 0 to less than 1, got -0.1"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Dial(**options)


def test_what_lies_at_the_edge_is_allowed():
    for options in ({"speedup": 1.0}, {"boundary": 0.0}, {"boundary": 0.99}):
        assert Dial(**options) == replace(Dial(), **options)
    most = Dial(dense_first_steps=MAX_DENSE_STEPS, dense_last_steps=MAX_DENSE_STEPS)
    assert shares(most.solve(run_of(3))) == (1.0,) * 3
    assert run_of(1).steps == 1 and run_of(1).shares_done == (None,)
    assert run_of(3, done=(1.0, 0.5)).shares_done == (1.0, 0.5, None)


def test_words():
    assert Dial(1.5).describe() == "1.50x"
    assert "of both experts, here the high noise one" in Dial(1.5, expert=HIGH).describe()
    assert Dial(1.0).off and not Dial(1.01).off


# torch's count of what was solved


@pytest.fixture(scope="module")
def tiny():
    return load_original(CHECKPOINT)


@pytest.mark.parametrize(
    ("wanted", "steps", "guidance", "given"), [(1.5, 6, 1.0, 0), (1.6, 4, 4.0, 1)]
)
def test_torch_counts_what_was_solved(tiny, wanted, steps, guidance, given):
    size, prompts = (5, 12, 12), 2 if guidance != 1 else 1
    text = torch.randn(1, 24, tiny.config.text_dim, generator=torch.Generator().manual_seed(1))
    condition = torch.zeros(1, 20, *size)
    condition[:, :4, :given] = 1
    options = {"guidance": guidance, "condition": condition}
    anchored = tuple(frame < given for frame in range(5)) if given else None
    run = Run(
        wan_shape(tiny, 24), TokenGrid(5, 6, 6), sigmas(steps, 3.0), 3.0, prompts, anchored,
        starts_given=bool(given),
    )  # fmt: skip
    solved = Dial(wanted).solve(run)
    dense = steps * count_flops(lambda: sample(tiny, text, size, steps=1, **options))
    with attach(
        tiny, solved.plan, cond_or_uncond=(COND, UNCOND)[:prompts], shift=3.0
    ) as attachment:
        total = count_flops(lambda: sample(tiny, text, size, steps=steps, **options))
        record = attachment.finish()
    assert dense / total == pytest.approx(solved.reached, rel=1e-3)
    assert dense / total == pytest.approx(wanted, rel=TOLERANCE)
    assert all(step.as_planned for step in record.steps) and not record.notes
