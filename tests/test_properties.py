"""What must hold for every plan, grid and budget, not only for those that somebody thought of."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from wantrim.benchmarks.flops import plan_work
from wantrim.benchmarks.head_cases import solve_heads
from wantrim.benchmarks.peers.random_router import RandomRouter
from wantrim.engine.plan import TrimPlan
from wantrim.engine.program import Facts, compile_step, expected_programs
from wantrim.methods.attend import Layout, attention_share, pattern_pairs
from wantrim.methods.cost import WanShape
from wantrim.methods.depth import SHAPES, BlockBudget, BlockPlan, choose_blocks
from wantrim.methods.grid import TokenGrid, gather_tokens, other_positions, scatter_tokens
from wantrim.methods.heads import CHEAP, FULL, OFF
from wantrim.methods.importance import query_count, sample_queries
from wantrim.methods.knapsack import BudgetTooSmall, choose, hull
from wantrim.methods.routers import FixedRouter
from wantrim.methods.schedule import (
    BINS,
    DIRECTIONS,
    SPREAD,
    STAGES,
    Schedule,
    progress_at,
    sigma_at,
    sigma_bin,
)
from wantrim.methods.shares import Shares, latent_mask, token_change
from wantrim.methods.tokens import TokenPlan, paper_plan, select_tokens, smooth_select
from wantrim.profiles.fingerprint import Fingerprint
from wantrim.profiles.profile import Profile
from wantrim.slim.width import ffn_count, ffn_multiple, kept_count, pare_width, solve_width
from wantrim.solve.dial import HIGH, LOW, MOST_BEFORE, TOLERANCE, Dial, Run
from wantrim.tests.hypotheses import few
from wantrim.tests.test_budget import width_share

shares = st.floats(0.01, 1.0)
places = st.floats(0.0, 1.0)
shifts = st.floats(0.05, 20.0)
# samplers of other models begin far above 1
sigmas = st.one_of(places, st.floats(0.0, 100.0))
directions = st.sampled_from(DIRECTIONS)
sizes = st.integers(1, 6)
grids = st.builds(TokenGrid, st.integers(1, 4), sizes, sizes, st.integers(0, 3))
schedules = st.builds(Schedule, shares, directions)
budgets = st.tuples(shares, shares, st.sampled_from(SHAPES)).map(
    lambda made: BlockBudget(min(made[:2]), max(made[:2]), made[2])
)
TINY = WanShape(128, 384, 16, head_dim=16)


def rising(values) -> bool:
    return all(a <= b + 1e-9 for a, b in zip(values, values[1:], strict=False))


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# when: schedules and block budgets


@given(schedules)
def test_a_schedule_keeps_on_the_mean_what_was_asked(schedule):
    kept = [schedule.at((stage + 0.5) / STAGES) for stage in range(STAGES)]
    assert sum(kept) / len(kept) == pytest.approx(schedule.keep_ratio, abs=1e-12)
    assert all(0.0 <= k <= 1.0 and abs(k - schedule.keep_ratio) <= SPREAD + 1e-12 for k in kept)
    # falling and rising are of the pruning
    assert rising(kept if schedule.direction != "rising" else kept[::-1])


@given(schedules, places)
def test_a_schedule_is_the_same_backwards_in_the_other_direction(schedule, progress):
    stage = progress * STAGES
    # a place where two stages meet belongs to the later one
    assume(abs(stage - round(stage)) > 1e-4)
    other = {"falling": "rising", "rising": "falling"}.get(schedule.direction, "constant")
    backwards = replace(schedule, direction=other)
    assert backwards.at(1 - progress) == pytest.approx(schedule.at(progress), abs=1e-12)


@given(places, shifts)
def test_progress_is_the_inverse_of_sigma(progress, shift):
    sigma = sigma_at(progress, shift)
    assert 0.0 <= sigma <= 1.0 + 1e-12
    assert progress_at(sigma, shift) == pytest.approx(progress, abs=1e-9)


@given(st.lists(sigmas, min_size=2, max_size=6), shifts)
@example([3.0, 2.0, 1.0, 0.0], 2.0)
@example([math.inf, 1.0, 0.0], 2.0)
def test_progress_grows_as_sigma_falls(values, shift):
    found = [progress_at(sigma, shift) for sigma in sorted(values, reverse=True)]
    assert rising(found) and all(0.0 <= p <= 1.0 for p in found)
    assert all(0 <= sigma_bin(sigma) < BINS for sigma in values)


@given(budgets, st.lists(sigmas, min_size=2, max_size=6), st.integers(1, 50))
def test_a_block_budget_is_between_its_ends_and_goes_one_way(budget, values, num_blocks):
    values = sorted(values)
    shares = [budget.fraction(sigma) for sigma in values]
    assert all(budget.k_min - 1e-12 <= share <= budget.k_max + 1e-12 for share in shares)
    assert rising(shares if budget.shape != "rising" else shares[::-1])
    counts = [budget.blocks(sigma, num_blocks) for sigma in values]
    assert all(min(2, num_blocks) <= count <= num_blocks for count in counts)
    for share, count in zip(shares, counts, strict=True):
        assert abs(count - share * num_blocks) <= 0.5 + 1e-9 or count == min(2, num_blocks)


@given(
    st.lists(
        st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, math.inf, math.nan])),
        min_size=1,
        max_size=12,
    ),
    st.integers(2, 14),
)
@example([0.0, math.nan, math.nan, 0.0], 2)
@example([0.0, math.inf, math.inf, 0.0], 3)
def test_exactly_so_many_blocks_run_with_the_first_and_the_last(values, count):
    logits = torch.tensor(values)
    runs = choose_blocks(logits, count)
    assert len(runs) == min(count, len(values)) and list(runs) == sorted(set(runs))
    assert {0, len(values) - 1} <= set(runs)
    assert set(runs) <= set(choose_blocks(logits, count + 1))
    others = set(range(len(values))) - set(runs)
    least = min((values[i] for i in set(runs) - {0, len(values) - 1}), default=math.inf)
    if not any(map(math.isnan, values)):
        assert all(values[i] <= least for i in others)


@given(
    budgets, st.integers(1, 12), shifts, st.integers(2, 40), st.tuples(places, places).map(sorted)
)
def test_blocks_are_skipped_within_the_window_alone(budget, steps, shift, blocks, ends):
    plan = BlockPlan(RandomRouter(), budget, *ends)
    for step in range(steps):
        sigma = sigma_at(step / steps, shift)
        progress = progress_at(sigma, shift)
        count, inside = plan.count(sigma, progress, blocks), ends[0] <= progress <= ends[1]
        assert count == (budget.blocks(sigma, blocks) if inside else blocks)


# which: tokens


@given(
    st.integers(0, 99),
    st.integers(1, 2),
    st.integers(1, 4),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.5, 0.3, 1.0]),
    st.booleans(),
    st.data(),
)
def test_selected_places(seed, batch, frames, positions, alpha, equal, data):
    keep = data.draw(st.integers(1, positions))
    scores = noise(seed, batch, frames, positions)
    if equal:
        scores = (scores > 0).float()
    stays = smooth_select(scores, keep, alpha)
    assert stays.shape == scores.shape and (stays.sum(-1) == keep).all()
    smooth = scores.clone()
    smooth[:, 1:] = alpha * scores[:, 1:] + (1 - alpha) * scores[:, :-1]
    for row, kept in zip(smooth.flatten(0, 1).tolist(), stays.flatten(0, 1), strict=True):
        # by hand: the highest first, of equals the lowest place
        places = sorted(sorted(range(positions), key=lambda i: (-row[i], i))[:keep])
        assert places == kept.nonzero().flatten().tolist()


@given(st.integers(0, 99), grids, st.integers(0, 3), st.sampled_from([0.5, 1.0]), st.data())
def test_every_latent_frame_keeps_as_many_tokens(seed, grid, after, alpha, data):
    length = grid.start + grid.tokens + after
    budget = data.draw(st.integers(1, grid.per_frame))
    anchored = data.draw(st.lists(st.booleans(), min_size=grid.frames, max_size=grid.frames))
    scores = noise(seed, 2, grid.tokens)
    chosen = select_tokens(scores, grid, length, budget, alpha=alpha, anchored=anchored)
    expected = [grid.per_frame if given else budget for given in anchored]
    assert list(chosen.per_frame) == expected and chosen.length == length
    outside = torch.tensor([i for i in range(length) if not 0 <= i - grid.start < grid.tokens])
    for row, dropped in zip(chosen.index, chosen.dropped, strict=True):
        assert (row.diff() > 0).all()
        assert torch.equal(torch.cat([row, dropped]).sort().values, torch.arange(length))
        assert torch.isin(outside, row).all()
        frames = (row[torch.isin(row, outside, invert=True)] - grid.start) // grid.per_frame
        assert frames.bincount(minlength=grid.frames).tolist() == expected
    # elsewhere in a longer sequence, and back again
    other = replace(grid, start=data.draw(st.integers(0, 3)))
    there = chosen.moved(grid, other, other.start + other.tokens + 2)
    back = there.moved(other, grid, length)
    assert torch.equal(back.index, chosen.index) and back.per_frame == chosen.per_frame
    assert torch.equal(there.dropped - other.start, chosen.dropped - grid.start)


@given(st.integers(0, 99), grids, st.tuples(*[st.integers(1, 2)] * 3), st.data())
def test_a_tokens_change_lies_where_its_mask_does(seed, grid, patch, data):
    """Of a latent that is a whole number of patches large, or that the embedding pads."""
    size = [n * p for n, p in zip((grid.frames, grid.height, grid.width), patch, strict=True)]
    # an odd edge that the patch embedding fills up
    size = [n - data.draw(st.integers(0, p - 1)) for n, p in zip(size, patch, strict=True)]
    kept = noise(seed, 1, grid.tokens) > 0
    mask = latent_mask(kept, grid, size)
    assert mask.shape == (1, 1, *size)
    change = token_change(mask.expand(1, 3, *size).float(), grid)
    # a token's own pixels say whether it changed
    assert torch.equal(change > 0, kept)
    assert change.shape == (1, grid.tokens) and (change >= 0).all()


@given(st.integers(0, 99), st.integers(1, 12), st.integers(1, 3), st.data())
def test_what_was_gathered_is_put_back(seed, length, batch, data):
    count = data.draw(st.integers(1, length))
    hidden = noise(seed, batch, length, 3)
    index = noise(seed + 1, batch, length).argsort(1)[:, :count].sort(1).values
    kept = gather_tokens(hidden, index)
    assert torch.equal(scatter_tokens(hidden, index, kept), hidden)
    changed = scatter_tokens(hidden, index, kept + 1)
    assert torch.equal(gather_tokens(changed, index), kept + 1)
    rest = other_positions(index, length)
    assert torch.equal(other_positions(rest, length), index)
    assert torch.equal(gather_tokens(changed, rest), gather_tokens(hidden, rest))


@given(grids, shares, st.integers(1, 300))
def test_queries_are_spread_evenly(grid, ratio, least):
    index = sample_queries(grid, ratio, least)
    assert len(index) == query_count(grid, ratio, least) == len(index.unique())
    counts = (index // grid.per_frame).bincount(minlength=grid.frames)
    assert counts.min() == counts.max() and counts.sum() >= min(grid.tokens, least, len(index))
    assert len(index) >= min(grid.tokens, max(ratio * grid.tokens, min(least, grid.tokens))) - 1e-6


@given(st.integers(0, 99), grids, st.integers(0, 2), st.sampled_from(CHEAP), st.data())
def test_a_pattern_puts_every_token_into_one_group(seed, grid, after, pattern, data):
    """And costs the pairs that its groups have."""
    counts = data.draw(
        st.lists(st.integers(1, grid.per_frame), min_size=grid.frames, max_size=grid.frames)
    )
    keep = torch.zeros(2, grid.frames, grid.per_frame, dtype=torch.bool)
    order = noise(seed, *keep.shape).argsort(-1)
    for frame, count in enumerate(counts):
        keep[:, frame].scatter_(1, order[:, frame, :count], True)
    length = grid.start + grid.tokens + after
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[:, grid.start : grid.start + grid.tokens] = keep.flatten(1)
    kept = mask.nonzero()[:, 1].view(2, -1)
    layout = Layout(grid, length, kept, counts)
    groups, rest = layout.groups(pattern, torch.device("cpu"))
    places = torch.arange(grid.start, grid.start + sum(counts))
    ordered = places[None] if groups.order is None else groups.order
    assert torch.equal(ordered.sort(1).values, places.expand_as(ordered)) and rest is None
    assert sum(groups.sizes) == sum(counts)
    assert pattern_pairs(pattern, grid, counts) == sum(size**2 for size in groups.sizes)
    assert pattern_pairs(pattern, grid, counts) <= pattern_pairs(FULL, grid, counts)


# how much: knapsack, widths, heads

options = st.lists(st.tuples(st.integers(0, 30), st.floats(0.0, 10.0)), min_size=1, max_size=5)
groups = st.lists(options, min_size=1, max_size=6)


@given(groups, st.data())
def test_a_knapsack_never_spends_more_and_more_is_never_worth_less(groups, data):
    needed = data.draw(st.lists(st.lists(st.integers(0, len(groups) - 1), min_size=1), max_size=2))
    needed = [sorted(set(some)) for some in needed]
    before = -1.0
    for budget in range(0, sum(max(c for c, _ in g) for g in groups) + 1, 7):
        try:
            chosen = choose(groups, budget, needed)
        except BudgetTooSmall as error:
            assert error.least > budget and before < 0
            choose(groups, error.least, needed)
            continue
        taken = [options[i] for options, i in zip(groups, chosen, strict=True)]
        assert sum(cost for cost, _ in taken) <= budget
        value = sum(value for _, value in taken)
        assert value >= before - 1e-9
        before = value
        for some in needed:
            able = [g for g in some if len(hull(groups[g])) > 1]
            assert not able or any(chosen[g] != hull(groups[g])[0] for g in able)


@given(options)
def test_a_hull_gains_ever_less(options):
    worth = hull(options)
    steps = [
        (options[b][1] - options[a][1]) / (options[b][0] - options[a][0])
        for a, b in zip(worth, worth[1:], strict=False)
    ]
    assert all(step > 0 for step in steps)
    assert all(b <= a * (1 + 1e-6) for a, b in zip(steps, steps[1:], strict=False))
    assert options[worth[0]][0] == min(cost for cost, _ in options)
    assert options[worth[-1]][1] == max(value for _, value in options)


@given(st.integers(1, 64), st.integers(1, 14000), st.floats(0.0, 0.999), st.floats(0.0, 0.999))
def test_kept_counts(num_heads, ffn_dim, ratio, other):
    heads, channels = kept_count(num_heads, ratio), ffn_count(ffn_dim, ratio)
    assert 1 <= heads <= num_heads and heads >= num_heads * (1 - ratio) - 1e-6
    assert heads - 1 < num_heads * (1 - ratio) or heads <= max(8, math.ceil(num_heads / 5))
    assert 1 <= channels <= ffn_dim and channels >= ffn_dim * (1 - ratio) - 1e-6
    assert channels == ffn_dim or channels % ffn_multiple(ffn_dim) == 0
    more = max(ratio, other)
    assert kept_count(num_heads, more) <= heads and ffn_count(ffn_dim, more) <= channels


def profile_of(seed: int, blocks=3, heads=4, head_dim=4, ffn=48) -> Profile:
    made = Profile.empty(Fingerprint(heads * head_dim, ffn, blocks, heads, 16, 16, (0.5,)))
    generator = torch.Generator().manual_seed(seed)
    for name, value in made.tensors.items():
        made.tensors[name] = torch.rand(value.shape, generator=generator)
    made.tensors["count"] = torch.ones(BINS)
    return made


@few
@given(st.integers(0, 99), st.floats(0.05, 1.0))
def test_a_width_is_within_its_budget_and_leaves_something_everywhere(seed, budget):
    profile = profile_of(seed)
    try:
        width = solve_width(profile, budget)
    except ValueError as error:
        least = float(str(error).split("at least ")[1].split(" ")[0])
        assert budget < least and solve_width(profile, least)
        return
    assert width_share(width, profile.model) <= budget + 1e-9
    for block in range(width.num_blocks):
        own, cross, channels = width.sizes(block)
        assert min(own, cross, channels) >= 1 and channels % 16 == 0
    if budget == 1.0:
        assert width_share(width, profile.model) == 1.0


@few
@given(st.integers(0, 99), st.floats(0.0, 0.99))
def test_pare_keeps_equally_many_and_the_highest(seed, ratio):
    profile = profile_of(seed)
    width = pare_width(profile, ratio)
    scores = profile.importance("cross")
    expected = (kept_count(4, ratio), kept_count(4, ratio), ffn_count(48, ratio))
    for block in range(3):
        assert width.sizes(block) == expected
        kept = list(width.cross_heads[block])
        lost = sorted(set(range(4)) - set(kept))
        assert not lost or scores[block, kept].min() >= scores[block, lost].max()


@few
@given(st.integers(0, 99), st.floats(0.02, 1.0), grids)
def test_heads_are_within_their_budget_and_every_block_keeps_one(seed, budget, grid):
    profile = profile_of(seed)
    try:
        plan = solve_heads(profile, grid, budget)
    except ValueError as error:
        assert "expected at least" in str(error)
        return
    # one more multiply-add than asked for may come of rounding
    assert attention_share(plan, grid, 512) <= budget + 1e-6
    assert all(any(name != OFF for name in heads) for heads in plan.self_attention)


# what it costs, and the dial that asks for it


@st.composite
def plans(draw) -> TrimPlan:
    """What every part of it may be; shares by sixths of the run."""
    tokens = draw(st.none() | st.builds(TokenPlan, schedules, reselect_every=st.integers(1, 20)))
    blocks = draw(st.none() | st.builds(BlockPlan, st.just(RandomRouter()), budgets))
    values = draw(st.none() | st.tuples(*[st.sampled_from([0, 0.1, 0.5, 1])] * 6))
    sixths = tuple(1 - step / 6 for step in range(6))
    parts = None if values is None else Shares(sixths, values, draw(st.booleans()))
    return TrimPlan(tokens, None, blocks, parts)


@given(plans(), grids, st.integers(1, 8), st.data())
def test_a_plan_costs_at_most_the_dense_run(plan, grid, steps, data):
    anchored = data.draw(st.lists(st.booleans(), min_size=grid.frames, max_size=grid.frames))
    values = [1 - step / steps for step in range(steps)]
    programs = expected_programs(plan, values, 1.0, grid, 16, anchored)
    dense = expected_programs(TrimPlan(), values, 1.0, grid, 16)
    cost, whole = (plan_work(TINY, some, plan).flops for some in (programs, dense))
    # to choose costs a little, and may be all that a plan does
    assert 0 < cost <= whole * 1.1 and (plan.trims_tokens or cost <= whole)
    for program in programs:
        assert len(program.rows) == 16
        assert all(row.tokens <= grid.tokens for row in program.rows)
        kept = {row.tokens for row in program.rows if row.run == "kept"}
        # one choice a step, and the same number of tokens in every block
        assert len(kept) <= 1 and min(kept, default=grid.frames) >= grid.frames
        # nothing is left out before something chose
        first = next((row for row in program.rows if row.run != "skip"), None)
        assert program.partial or first is None or first.run == "all"


@given(plans(), grids, st.sets(st.integers(1, 14)), places, st.booleans(), st.integers(0, 3))
def test_a_program_is_made_of_what_is_known(plan, grid, skipped, progress, context, seen):
    plan = replace(plan, blocks=BlockPlan(FixedRouter(tuple(skipped))))
    facts = Facts(
        1 - progress, progress, grid, 16, known=seen > 0, seen=seen, context=context,
        skipped=frozenset(skipped),
    )  # fmt: skip
    program = compile_step(plan, facts)
    assert program == compile_step(plan, facts)
    assert not program.repeats or seen
    assert not program.partial or (seen > 1 and context and not skipped)
    if not program.repeats:
        assert {i for i, row in enumerate(program.rows) if row.run == "skip"} == skipped
    # who looks at a choice that no block goes by
    for index, row in enumerate(program.rows):
        behind = [r.run for r in program.rows[index + 1 :] if r.run != "skip"]
        assert not row.choose or behind[:1] == ["kept"] or not behind or skipped


@st.composite
def runs(draw) -> Run:
    steps, shift = draw(st.integers(1, 8)), draw(st.floats(0.5, 12.0))
    grid = TokenGrid(draw(st.integers(1, 21)), draw(st.integers(4, 30)), draw(st.integers(4, 52)))
    begins, ends = sorted((draw(places), draw(places)))
    assume(ends - begins > 0.02)
    values = [begins + (ends - begins) * step / steps for step in range(steps + 1)]
    path = tuple(sigma_at(value, shift) for value in values)
    return Run(
        TINY, grid, path, shift, draw(st.integers(1, 2)), starts_given=draw(st.booleans()),
        partial=draw(st.booleans()),
    )  # fmt: skip


@few
@given(runs(), st.floats(1.0, 4.0), st.integers(0, 3), st.integers(0, 3))
def test_a_dial_meets_its_speedup_or_says_why(run, wanted, first, last):
    dial = Dial(wanted, dense_first_steps=first, dense_last_steps=last)
    solved = dial.solve(run)
    assert solved.reached >= 1 - 1e-9
    assert solved.reached == pytest.approx(run.speedup(solved.plan))
    assert (solved.why is None) == (abs(wanted / solved.reached - 1) <= TOLERANCE)
    found = solved.plan.shares.shares
    assert all(
        share == 1.0 for share in (*found[: max(1, first)], *found[run.steps - last :][:last])
    )
    assert wanted > 1.0 or solved.plan.neutral
    assert dial.solve(run) == solved


@few
@given(st.integers(2, 10), st.data(), st.floats(1.0, 3.0), st.floats(0.5, 12.0))
def test_both_experts_of_a_pair_save_what_one_of_them_cannot(steps, data, wanted, shift):
    # a second expert of fewer steps goes over a video that is there
    most = int(steps * MOST_BEFORE / (1 + MOST_BEFORE))
    first = data.draw(st.integers(1, max(1, most)))
    path = tuple(sigma_at(step / steps, shift) for step in range(steps + 1))
    grid = TokenGrid(21, 30, 52)
    pair = [Run(TINY, grid, part, shift) for part in (path[: first + 1], path[first:])]
    solved = [
        Dial(wanted, expert=expert).solve(run)
        for run, expert in zip(pair, (HIGH, LOW), strict=True)
    ]
    spent = sum(run.steps / one.reached for run, one in zip(pair, solved, strict=True))
    if not any(one.why for one in solved):
        assert steps / spent == pytest.approx(wanted, rel=2 * TOLERANCE)
    assert len({one.why for one in solved}) == 1


@given(shares, grids, places)
def test_a_budget_is_never_empty_and_follows_the_ratio(keep, grid, progress):
    plan = paper_plan(keep)
    budget = plan.budget(progress, grid)
    assert 1 <= budget <= grid.per_frame
    assert budget == 1 or abs(budget - plan.keep_at(progress) * grid.per_frame) <= 0.5 + 1e-9
