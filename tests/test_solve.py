"""The plan for a wanted speed-up: it costs what it says, and says what it cannot."""

import itertools
from dataclasses import replace

import pytest
import torch

from wantrim.benchmarks.depth import shipped_profile
from wantrim.benchmarks.flops import count_flops
from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import sample, sigmas_for
from wantrim.hosts.diffusers.shape import wan_shape
from wantrim.hosts.diffusers.weights import load_original
from wantrim.methods.cost import WanShape, planned_tokens
from wantrim.methods.depth import BlockBudget, BlockPlan, blocks_per_step
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import HeadPlan
from wantrim.methods.mixes import MIXES, knobs_at, way
from wantrim.methods.presets import preset_plan
from wantrim.methods.routers import RandomRouter
from wantrim.solve.dial import (
    TOLERANCE,
    Parts,
    Run,
    blocks_run,
    floor_cost,
    flops_cost,
    solve,
    whole_steps,
)
from wantrim.solve.floor import Rates
from wantrim.toy import CHECKPOINT

GRID_480P = TokenGrid(21, 30, 52)
SMALL = WanShape(1536, 8960, 30)
LARGE = WanShape(5120, 13824, 40)
TINY, TINY_SIZE, TINY_GRID = WanShape(128, 384, 16, head_dim=16), (5, 12, 12), TokenGrid(5, 6, 6)
SPEEDUPS = (1.0, 1.05, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
priorities = pytest.mark.parametrize("priority", MIXES)


@pytest.fixture(scope="module")
def profile():
    return shipped_profile()


def sigmas(steps: int, shift: float = 5.0) -> tuple[float, ...]:
    return tuple(sigmas_for(steps, shift).tolist())


def run_of(steps: int = 20, shape=SMALL, grid=GRID_480P, shift=5.0, **options) -> Run:
    return Run(shape, grid, sigmas(steps, shift), shift, **options)


def tiny_run(steps: int = 20, **options) -> Run:
    return run_of(steps, TINY, TINY_GRID, 3.0, **options)


@priorities
@pytest.mark.parametrize(
    "run",
    [
        *(run_of(steps) for steps in (1, 2, 3, 4, 8, 20, 50)),
        run_of(20, LARGE, TokenGrid(21, 45, 80), 8.0, prompts=1),
        run_of(4, LARGE, anchored_frames=1),
        # an expert's slices
        Run(LARGE, GRID_480P, sigmas(20)[:11], 5.0),
        Run(LARGE, GRID_480P, sigmas(20)[10:], 5.0),
    ],
    ids=lambda run: f"{run.steps} steps",
)
def test_every_speedup_is_met_or_explained_and_more_is_never_less(run, priority):
    dense, before = flops_cost(run, Parts()), 1.0
    for wanted in SPEEDUPS:
        solved = solve(run, wanted, priority)
        assert solved.reached == pytest.approx(dense / flops_cost(run, solved.parts))
        assert solved.reached >= before - 1e-9
        before = solved.reached
        met = abs(solved.reached / wanted - 1) <= TOLERANCE
        assert met == (solved.why is None)
        assert solved.parts.blocks is None and solved.parts.heads is None


@priorities
@pytest.mark.parametrize("steps", [2, 4, 20])
def test_with_a_profile_too(profile, priority, steps):
    run, before = tiny_run(steps), 1.0
    dense = flops_cost(run, Parts())
    for wanted in SPEEDUPS:
        solved = solve(run, wanted, priority, profile)
        assert solved.reached == pytest.approx(dense / flops_cost(run, solved.parts))
        assert solved.reached >= before * 0.999
        before = solved.reached
        assert (abs(solved.reached / wanted - 1) <= TOLERANCE) == (solved.why is None)
    # the more knobs, the further
    assert before > solve(run, 4.0, priority).reached


@priorities
def test_one_trims_nothing(profile, priority):
    for given in (None, profile):
        solved = solve(tiny_run(), 1.0, priority, given)
        assert solved.parts == Parts() and solved.reached == 1.0 and solved.why is None


def test_four_steps_of_which_two_are_whole_cannot_be_three_times_as_fast(profile):
    run = tiny_run(4)
    solved = solve(run, 3.0, profile=profile, dense_first=1, dense_last=1)
    assert solved.reached < 2.0
    assert solved.why == (
        "2 of 4 steps compute everything (the first for later ones to repeat, the last 1 on "
        "purpose); the others are trimmed as far as is sane"
    )
    assert whole_steps(run, solved.parts) == [True, False, False, True]


def test_a_run_of_one_step_says_that_nothing_can_be_trimmed():
    solved = solve(run_of(1), 1.5)
    assert solved.parts == Parts() and solved.reached == 1.0
    assert "1 of 1 steps compute everything" in solved.why
    everything_given = solve(run_of(8, anchored_frames=21), 1.5)
    assert everything_given.reached == 1.0
    assert everything_given.parts == Parts()
    assert "all latent frames are given" in everything_given.why


def test_without_a_profile_it_says_what_one_would_add(profile):
    assert "without a profile only tokens" in solve(run_of(4), 4.0).why
    assert "without a profile" not in solve(tiny_run(4), 4.0, profile=profile).why


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("last", range(3))
@priorities
def test_guarded_steps_are_whole_and_the_others_are_not(profile, priority, first, last):
    run = tiny_run(10)
    parts = solve(run, 2.5, priority, profile, dense_first=first, dense_last=last).parts
    whole = whole_steps(run, parts)
    heads = [parts.heads is not None and parts.heads.trims_at(p) for p in run.progress]
    # of 10 steps the three below a quarter, and the last
    first, last = max(first, 3 * (priority == "motion")), max(last, priority == "detail")
    # a plan that remembers has a first step of its own
    begins, ends = max(1, first), 10 - last
    assert all(whole[:begins]) and all(whole[ends:])
    assert not any(heads[:first]) and not any(heads[ends:])
    assert not any(whole[begins:ends]) and all(heads[first:ends])


@pytest.mark.parametrize(("first", "last"), [(10, 0), (0, 10), (5, 5), (60, 60), (9, 0)])
def test_guards_that_leave_no_step_trim_nothing(first, last):
    run = tiny_run(10)
    solved = solve(run, 2.0, dense_first=first, dense_last=last)
    assert (solved.reached == 1.0) == (first + last >= 10)
    assert "10 of 10 steps" in solved.why or (first, last) == (9, 0)


def test_motion_spares_early_steps_and_detail_late_ones(profile):
    work = {}
    for priority in MIXES:
        run = tiny_run(20)
        parts = solve(run, 2.0, priority, profile).parts
        kept = planned_tokens(parts.tokens, run.grid, 16, run.progress)
        counts = blocks_run(run, parts)
        work[priority] = [sum(k) / 16 * n for k, n in zip(kept, counts, strict=True)]
    early = {name: sum(steps[1:8]) / sum(steps[12:]) for name, steps in work.items()}
    assert early["motion"] > early["balanced"] > early["detail"]
    # five steps of 20 are spared altogether at one end, three at the other
    assert work["motion"][0] == work["motion"][4] > work["motion"][5]
    assert work["detail"][-1] == work["detail"][-3] > work["detail"][-4]


@priorities
def test_no_knob_goes_further_than_its_path(profile, priority):
    parts = solve(tiny_run(50), 4.0, priority, profile).parts
    blocks, tokens, attention = MIXES[priority].path[-1]
    assert parts.tokens.schedule.keep_ratio >= tokens
    assert parts.blocks.budget.k_min >= blocks
    assert parts.blocks.skipped == "reuse"
    assert attention == 0.75
    only = solve(tiny_run(50), 4.0, priority).parts
    assert only.tokens.schedule.keep_ratio == pytest.approx(tokens)


def test_blocks_come_first_then_tokens_then_heads(profile):
    used = []
    for wanted in (1.15, 1.6, 3.5):
        parts = solve(tiny_run(50), wanted, profile=profile).parts
        used.append([part is not None for part in (parts.blocks, parts.tokens, parts.heads)])
    assert used == [[True, False, False], [True, True, False], [True, True, True]]


def test_paths_only_go_down():
    for mix in MIXES.values():
        assert mix.path[0] == (1, 1, 1)
        for before, after in itertools.pairwise(mix.path):
            assert all(b <= a for a, b in zip(before, after, strict=True)) and before != after
        for free in itertools.product((True, False), repeat=3):
            points = way(mix, *free)
            assert points[0] == knobs_at(points, 0.0) == (1, 1, 1)
            assert points[-1] == knobs_at(points, float(len(points) - 1))
            assert all(
                p == 1 for point in points for p, f in zip(point, free, strict=True) if not f
            )


FIXED = {
    "tokens": preset_plan("refresh", 0.7),
    "paper tokens": preset_plan("paper", 0.7),
    "whole tokens": preset_plan("refresh", 1.0),
    "blocks": BlockPlan(RandomRouter(), BlockBudget(0.5, 0.875), skipped="reuse"),
    "heads": HeadPlan.keeping(8, [range(5)] * 16, [range(8)] * 16),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_others_decided_stays_and_counts(profile, name):
    part, kind = FIXED[name], name.split()[-1]
    fixed = Parts(**{kind: part})
    run, before = tiny_run(), 0.0
    alone = flops_cost(run, Parts()) / flops_cost(run, fixed)
    for wanted in (1.0, 1.2, 1.5, 2.0, 2.5):
        solved = solve(run, wanted, profile=profile, fixed=fixed)
        assert getattr(solved.parts, kind) is part
        assert solved.reached >= max(alone, before) * 0.999
        before = solved.reached
        if wanted <= alone:
            assert solved.parts == fixed
        else:
            assert solved.why or solved.reached == pytest.approx(wanted, rel=TOLERANCE)
    nothing_left = solve(run, 4.0, fixed=fixed)
    if kind == "tokens":
        assert nothing_left.parts == fixed
    assert f"what WanTrim {kind.capitalize()} decides is taken as it is" in nothing_left.why


def test_another_cost_can_be_given():
    """A part of each step that no plan makes cheaper, as launching kernels is."""
    run = run_of(20)
    floor = 0.3 * flops_cost(run, Parts())

    def cost(run, parts):
        return floor + flops_cost(run, parts)

    solved = solve(run, 1.5, cost=cost)
    assert cost(run, Parts()) / cost(run, solved.parts) == pytest.approx(1.5, rel=TOLERANCE)
    assert flops_cost(run, Parts()) / flops_cost(run, solved.parts) > 1.7


def test_sigmas_that_go_up_do_no_harm():
    run = Run(SMALL, GRID_480P, sigmas(10)[::-1], 5.0)
    for first, last in itertools.product(range(3), range(3)):
        solved = solve(run, 2.0, dense_first=first, dense_last=last)
        assert solved.reached == pytest.approx(2.0, rel=TOLERANCE)
        whole = whole_steps(run, solved.parts)
        assert whole == [i < max(1, first) or i >= 10 - last for i in range(10)]


def test_nonsense_is_refused(profile):
    for speedup in (0.9, 0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="speedup: expected 1"):
            solve(run_of(), speedup)
    with pytest.raises(ValueError, match="priority: expected one of motion, balanced, detail"):
        solve(run_of(), 1.5, "speed")
    with pytest.raises(ValueError, match="sigmas: expected those of one step"):
        Run(SMALL, GRID_480P, (1.0,))


def test_heads_cost_less_only_where_they_are_trimmed():
    run, heads = tiny_run(6), FIXED["heads"]
    late = replace(heads, start=0.6)
    dense, whole, some = (
        flops_cost(run, Parts(heads=plan)) for plan in (None, heads, late)
    )  # fmt: skip
    share = sum(at >= 0.6 for at in run.progress) / 6
    assert dense - some == pytest.approx((dense - whole) * share)


def test_on_a_card_whose_rates_are_known_the_cost_is_its_time():
    """Where attention is slow, dropping tokens is worth more, so that fewer have to go."""
    slow = Rates(1e15, 1e12, 1e15, "made up")
    fast = Rates(1e12, 1e15, 1e15, "made up")
    found = []
    for rates in (slow, fast):
        solved = solve(run_of(20), 1.5, cost=floor_cost(rates))
        assert solved.reached == pytest.approx(1.5, rel=0.03)
        found.append(solved.parts.tokens.schedule.keep_ratio)
    assert found[0] > found[1] + 0.05


@pytest.fixture(scope="module")
def tiny_wan():
    return load_original(CHECKPOINT)


def counted(model, parts: Parts, steps: int, guidance: float, given: int) -> tuple[int, object]:
    text = torch.randn(1, 24, model.config.text_dim, generator=torch.Generator().manual_seed(1))
    condition = torch.zeros(1, 20, *TINY_SIZE)
    condition[:, :4, :given] = 1
    options = {"guidance": guidance, "condition": condition if given else None}
    roles = (COND, UNCOND) if guidance != 1 else (COND,)
    attached = attach(
        model,
        TrimPlan(parts.tokens, parts.heads, parts.blocks),
        cond_or_uncond=roles,
        shift=3.0,
        sigmas=sigmas(steps, 3.0)[:-1],
    )
    with attached:
        total = count_flops(lambda: sample(model, text, TINY_SIZE, steps=steps, **options))
        return total, attached.finish()


@pytest.mark.parametrize(
    ("wanted", "priority", "steps", "guidance", "given", "with_profile", "options"),
    [
        (1.4, "motion", 8, 1.0, 0, False, {"dense_last": 1}),
        (1.6, "detail", 4, 4.0, 1, False, {}),
        (1.2, "balanced", 8, 1.0, 0, True, {}),
        (2.0, "motion", 6, 4.0, 1, True, {"dense_first": 2}),
        (3.0, "detail", 4, 1.0, 0, True, {}),
    ],
)
def test_torch_counts_what_was_solved(
    tiny_wan, profile, wanted, priority, steps, guidance, given, with_profile, options
):
    shape, prompts = wan_shape(tiny_wan, 24), 2 if guidance != 1 else 1
    run = Run(shape, TINY_GRID, sigmas(steps, 3.0), 3.0, prompts, given)
    solved = solve(run, wanted, priority, profile if with_profile else None, **options)
    dense = steps * counted(tiny_wan, Parts(), 1, guidance, given)[0]
    trimmed, report = counted(tiny_wan, solved.parts, steps, guidance, given)
    assert dense / trimmed == pytest.approx(solved.reached, rel=0.03)
    assert solved.why is None or wanted > 1.6
    assert solved.why or dense / trimmed == pytest.approx(wanted, rel=0.04)
    if solved.parts.blocks is not None:
        expected = blocks_per_step(solved.parts.blocks, run.sigmas[:-1], 3.0, 16)
        assert [step.blocks_run for step in report.steps] == expected
    whole = [step.kept_share == 1.0 for step in report.steps]
    assert whole == whole_steps(run, solved.parts)


def test_heads_are_whole_in_guarded_steps(tiny_wan):
    """A step outside of the heads' window runs the host's own model: nothing of it differs."""
    heads = FIXED["heads"]
    never = HeadPlan(heads.self_attention, heads.cross_attention, start=0.999)
    late = HeadPlan(heads.self_attention, heads.cross_attention, start=0.5)
    text = torch.randn(1, 24, tiny_wan.config.text_dim, generator=torch.Generator().manual_seed(1))

    def video(plan):
        with attach(tiny_wan, TrimPlan(heads=plan), shift=3.0, cond_or_uncond=(COND, UNCOND)) as a:
            return sample(tiny_wan, text, TINY_SIZE, steps=4), a.finish()

    with attach(tiny_wan, TrimPlan(), shift=3.0):
        dense = sample(tiny_wan, text, TINY_SIZE, steps=4)
    untouched, report = video(never)
    assert torch.equal(untouched, dense)
    assert [step.kept_share for step in report.steps] == [1.0] * 4 and not report.notes
    changed, _ = video(late)
    assert not torch.allclose(changed, dense, atol=1e-3)
    assert not torch.equal(changed, video(heads)[0])
    with pytest.raises(ValueError, match="start and end"):
        HeadPlan(heads.self_attention, heads.cross_attention, start=0.6, end=0.5)
