"""Heads by roles that are found in the run, on real small models."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from wantrim.benchmarks.head_cases import Bare, Shuffled
from wantrim.benchmarks.predicted import CARDS, HEADS, PIXEL_FRAMES, SHAPE, SIZES, video_grid
from wantrim.benchmarks.subjects import toy_subject
from wantrim.engine.plan import TrimPlan
from wantrim.engine.program import Facts, compile_step, expected_programs
from wantrim.engine.work import program_work
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import sample
from wantrim.methods.attend import Layout, attention_share, pattern_pairs, sampled_queries
from wantrim.methods.cost import WanShape
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import CHEAP, FRAME, FULL, OFF, HeadPlan
from wantrim.methods.role_plan import RolePlan, measure_roles, pattern_values
from wantrim.methods.shares import Shares
from wantrim.report.figures import attention_left
from wantrim.solve.dial import Dial, Run
from wantrim.solve.floor import device_rates
from wantrim.tests.small_wan import SIZE, noise, random_wan, words
from wantrim.toy.worlds import SECOND

GRID = TokenGrid(3, 4, 6)
SIGMAS = (1.0, 0.8, 0.6, 0.3)


def shown(added, **patterns) -> torch.Tensor:
    """What heads lack that add so much; by pattern the share that it keeps of each."""
    kept = torch.zeros(len(added), 1 + len(CHEAP))
    for name, shares in patterns.items():
        kept[:, 1 + CHEAP.index(name)] = torch.tensor(shares)
    return torch.tensor(added)[:, None] * (1 - kept)


def test_a_budget_goes_where_it_keeps_most():
    full, frame, tile = (pattern_pairs(name, GRID) for name in (FULL, FRAME, "tile2"))
    # the fourth adds least, and no pattern fits it
    four = shown([1.0, 1.0, 1.0, 0.1], frame=[0.1, 0.97, 0.1, 0.0], tile2=[0.1, 0.1, 0.9, 0.0])
    keep = (full + frame + tile) / (4 * full)
    plan = RolePlan(keep, 4).solved({0: four}, GRID, 1)
    assert plan.self_attention == ((FULL, FRAME, "tile2", OFF),)
    assert plan.cross_attention == ((FULL,) * 4,) and plan.corrected
    # with a pair less there is no room for the three
    less = RolePlan(keep - 0.5 / (4 * full), 4).solved({0: four}, GRID, 1)
    assert attention_share(less, GRID, 0) < keep
    # blocks count alike, whatever the size of what they add
    more = RolePlan(keep, 4).solved({0: four, 1: 9 * four}, GRID, 2)
    assert more.self_attention == plan.self_attention * 2
    # what was not measured stays, and counts
    plan = RolePlan(0.5 + keep / 2, 4).solved({1: four}, GRID, 2)
    assert plan.self_attention == ((FULL,) * 4, (FULL, FRAME, "tile2", OFF))
    # a block keeps a head
    alone = RolePlan(0.01, 4).solved({0: four, 1: four}, GRID, 2).self_attention
    assert all(set(heads) != {OFF} for heads in alone)


def test_every_block_keeps_a_head_where_another_has_better_ones():
    """Two blocks and the pairs of two full heads; a head in its latent frame costs a third of one."""
    evenly = [0.25] * 4
    given = {0: shown(evenly, frame=[1.0] * 4), 1: shown(evenly)}
    plan = RolePlan(2 / 8, 4).solved(given, GRID, 2)
    assert plan.self_attention == ((FRAME,) * 3 + (OFF,), (FULL, OFF, OFF, OFF))


def test_what_a_pattern_leaves_of_a_head_by_hand():
    """Two heads and two cheap patterns, between off and full."""
    # a pattern can make more of a head's output than it was
    found = pattern_values(torch.tensor([0.5, 0.2]), torch.tensor([[0.5, -0.2], [1.0, 0.8]]))
    wanted = torch.tensor([[0.0, 0.25, 0.0, 0.5], [0.0, 0.2, 0.16, 0.2]])
    torch.testing.assert_close(found, wanted)
    # but not more than the head gave
    more = pattern_values(torch.tensor([0.5]), torch.tensor([[1.5, 1.0]]))
    torch.testing.assert_close(more, torch.tensor([[0.0, 0.5, 0.5, 0.5]]))


@pytest.mark.parametrize("keep", [0.3, 0.55, 0.9])
def test_what_is_expected_costs_what_was_asked(keep):
    grid = TokenGrid(21, 30, 52)
    plan = RolePlan(keep, 12).expected(30)
    assert attention_share(plan, grid, 0) == pytest.approx(keep, abs=0.01)
    fulls = [heads.count(FULL) for heads in plan.self_attention]
    assert max(fulls) - min(fulls) <= 1


@pytest.fixture(scope="module")
def wan():
    return random_wan(5)


def sampled(wan, plan, attached=None, guidance=True):
    both = (0, 1) if guidance else (0,)
    seen, text = [], words(2 if guidance else 1)
    x = noise(1, 16, *SIZE)
    with attach(wan, plan, cond_or_uncond=both) as attachment, torch.no_grad():
        for sigma in SIGMAS:
            rows = x.expand(len(both), *x.shape[1:]).contiguous()
            step = torch.full((len(both),), sigma * 1000)
            out = wan(rows, step, text, return_dict=False)[0]
            x = x - 0.2 * out[:1]
            seen.append(out)
            if attached is not None:
                attached(attachment.engine)
        record = attachment.engine.record
    return seen, record


def test_the_first_step_is_exact_and_the_others_run_in_what_was_measured(wan):
    dense, _ = sampled(wan, TrimPlan())
    keep, plans = 0.6, []
    roles = RolePlan(keep, wan.config.num_attention_heads)
    out, record = sampled(wan, TrimPlan(heads=roles), lambda engine: plans.append(engine._heads))
    assert torch.equal(out[0], dense[0])
    assert all(not torch.equal(a, b) for a, b in zip(out[1:], dense[1:], strict=True))
    assert plans[0] is None and isinstance(plans[-1], HeadPlan)
    assert [step.whole for step in record.steps] == [True, False, False, False]
    assert all(step.as_planned for step in record.steps) and not record.notes
    assert attention_left(record) <= keep
    # with these very patterns from the second step on
    grid = record.steps[0].grid
    for step, plan in zip(record.steps[1:], plans[1:], strict=True):
        assert step.program.heads == plan
        assert attention_share(plan, grid, 0) <= keep
    # measured anew in every whole step: the roles of a random model drift with what it is given
    assert all(row.measure for step in record.steps for row in step.rows)


def test_what_is_measured_is_what_the_conditional_prompts_heads_lack(wan, monkeypatch):
    seen = []

    def watched(q, k, v, attention, layout):
        seen.append((q.clone(), k.clone(), v.clone()))
        return measure_roles(q, k, v, attention, layout)

    monkeypatch.setattr("wantrim.engine.call.measure_roles", watched)
    roles = RolePlan(0.6, wan.config.num_attention_heads)
    sampled(wan, TrimPlan(heads=roles))
    assert len(seen) == len(SIGMAS) * len(wan.blocks)
    q, k, v = (3 * t.double() for t in seen[0])
    assert len(q) == len(k) == len(v) == 1
    grid = TokenGrid(SIZE[0], SIZE[1] // 2, SIZE[2] // 2)

    def by_mask(mask=None):
        parts = (t.transpose(1, 2) for t in (q, k, v))
        return scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2)[0]

    frame = torch.arange(grid.tokens) // grid.per_frame
    exact, given = by_mask(), by_mask(frame[:, None] == frame)
    layout = Layout(grid, grid.tokens)
    some = layout.sampled(q.device)

    def lacks(difference):
        few = difference[some].unflatten(0, (grid.frames, -1))
        return (few - few.mean(1, keepdim=True)).square().mean((0, 1, 3)).sqrt()

    host = lambda q, k, v: scaled_dot_product_attention(  # noqa: E731
        *(t.transpose(1, 2) for t in (q, k, v))
    ).transpose(1, 2)
    found = measure_roles(q, k, v, host, layout).double()
    torch.testing.assert_close(found[:, 0], lacks(exact), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        found[:, 1 + CHEAP.index(FRAME)], lacks(exact - given), rtol=1e-4, atol=0
    )
    # what a head gives to a latent frame as a whole is given back, and no loss
    moved = measure_roles(q, k, v + 7.0, host, layout).double()
    torch.testing.assert_close(moved[:, 0], found[:, 0], rtol=1e-3, atol=0)


def test_heads_that_are_off_are_measured_as_those_that_run(wan, monkeypatch):
    found = []

    def solved(self, shown, grid, blocks):
        found.append({block: one[:, 0].clone() for block, one in shown.items()})
        return plan

    heads = (OFF, *(FULL,) * (wan.config.num_attention_heads - 1))
    plan = HeadPlan((heads,) * len(wan.blocks), ((FULL,) * len(heads),) * len(wan.blocks))
    monkeypatch.setattr(RolePlan, "solved", solved)
    sampled(wan, TrimPlan(heads=RolePlan(0.6, len(heads))))
    assert len(found) == 3
    for one in found[1:]:
        for block, added in one.items():
            assert (added > 0).all() and (added != found[0][block]).all()


@pytest.fixture(scope="module")
def second():
    return toy_subject(1, "cpu", SECOND, SECOND.four_step_lora)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_second_tiny_wan_needs_its_heads_roles_and_their_correction(second, task):
    """Half of self-attention from the second of four steps on."""
    (item,) = second.items(task, 1, 1)
    condition = None if item.condition is None else item.condition[None]

    def made(plan: TrimPlan) -> torch.Tensor:
        with attach(second.model, plan, cond_or_uncond=(0,), shift=3.0):
            return sample(
                second.model, item.text[None], second.size,
                steps=4, guidance=1.0, shift=3.0, seed=3, condition=condition,
            )  # fmt: skip

    dense = made(TrimPlan())
    heads = second.model.config.num_attention_heads
    ours, bare, elsewhere = (
        float((made(TrimPlan(heads=kind(0.5, heads))) - dense).square().mean())
        for kind in (RolePlan, Bare, Shuffled)
    )
    assert 0 < ours < 0.1 * min(bare, elsewhere)


def test_neutral_is_the_untouched_model(wan):
    roles = RolePlan(1.0, wan.config.num_attention_heads)
    dense, _ = sampled(wan, TrimPlan())
    out, record = sampled(wan, TrimPlan(heads=roles))
    assert all(map(torch.equal, out, dense)) and not record.notes


def test_partial_and_repeated_steps_run_in_the_patterns_and_measure_nothing(wan):
    roles = RolePlan(0.6, wan.config.num_attention_heads)
    plan = TrimPlan(heads=roles, shares=Shares(SIGMAS, (1, 1, 0.5, 0)))
    _, record = sampled(wan, plan)
    rows = [step.rows for step in record.steps]
    assert [all(row.measure for row in one) for one in rows] == [True, True, False, False]
    assert [any(row.heads for row in one) for one in rows] == [False, True, True, False]
    assert all(step.as_planned for step in record.steps) and not record.notes


def test_where_no_block_may_be_looked_into_nothing_is_measured_and_a_remark_says_so():
    roles = RolePlan(0.6, 4)
    plan = TrimPlan(heads=roles)
    rows = compile_step(plan, Facts(0.8, 0.2, GRID, 4, heads=roles.expected(4))).rows
    assert all(row.measure for row in rows) and any(row.heads for row in rows)
    blind = compile_step(plan, Facts(0.8, 0.2, GRID, 4, inside="another node"))
    assert not any(row.measure or row.heads for row in blind.rows)
    assert blind.remarks == ("another node",)


def test_to_measure_costs_less_than_a_percent_of_a_step():
    shape, grid = WanShape(5120, 13824, 40), TokenGrid(21, 30, 52)
    plan = TrimPlan(heads=RolePlan(0.5, 40))
    first, second = expected_programs(plan, (1.0, 0.9), 1.0, grid, 40)
    dense = program_work(shape, compile_step(TrimPlan(), Facts(1.0, 0.0, grid, 40)), TrimPlan())
    added = program_work(shape, first, plan).flops - dense.flops
    assert 0 < added < 0.01 * dense.flops
    left = program_work(shape, second, plan).attention - added
    # what a few queries see that tell what the patterns lack
    left -= 4 * 21 * 8 * grid.tokens * 5120 * 40
    # cross-attention is not trimmed
    own, cross = 4 * grid.tokens**2 * 5120 * 40, 4 * grid.tokens * 512 * 5120 * 40
    assert left == pytest.approx(0.5 * own + cross, rel=0.01)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("device", CARDS)
@pytest.mark.parametrize("size", SIZES)
def test_to_measure_takes_less_than_a_percent_of_a_steps_time(size, device, prompts):
    rates, grid = device_rates(device), video_grid(SHAPE, *SIZES[size], PIXEL_FRAMES)
    facts = Facts(1.0, 0.0, grid, SHAPE.num_blocks)
    dense, measured = (
        rates.seconds(program_work(SHAPE, compile_step(plan, facts), plan, prompts))
        for plan in (TrimPlan(), TrimPlan(heads=RolePlan(0.5, HEADS)))
    )
    assert dense < measured < 1.01 * dense


@pytest.mark.parametrize("steps", [4, 12])
def test_a_dial_counts_the_first_step_that_measures(steps):
    shape, grid = WanShape(5120, 13824, 40), TokenGrid(21, 45, 80)
    sigmas = tuple(1.0 - i / steps for i in range(steps + 1))
    heads = TrimPlan(heads=RolePlan(0.5, 40))
    run = Run(shape, grid, sigmas, prompts=1)
    alone = run.speedup(heads)
    # three of four steps at half of the attention
    assert 1.0 < alone < 1.6
    wanted = alone * 1.3
    solved = Dial(wanted).solve(run, heads)
    assert solved.reached == pytest.approx(wanted, rel=0.03) and solved.why is None
    assert solved.plan.heads == heads.heads and min(solved.plan.shares.shares) < 1.0


@pytest.mark.parametrize(
    ("grid", "queries"), [(TokenGrid(21, 45, 80), 21 * 8), (TokenGrid(4, 1, 3), 12)]
)
def test_eight_tokens_of_each_latent_frame_measure(grid, queries):
    layout = Layout(grid, grid.tokens)
    assert sampled_queries(layout.counts()) == len(layout.sampled(torch.device("cpu"))) == queries
