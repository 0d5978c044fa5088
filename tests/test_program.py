"""A step's program by hand: what every block does, from the plan and what is known."""

from dataclasses import replace

import pytest
import torch

from wantrim.benchmarks.peers.random_router import RandomRouter
from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.engine.program import (
    ALL,
    ALL_GIVEN,
    KEPT,
    MIXED,
    NO_CONTEXT,
    NOT_REMEMBERED,
    READ,
    SKIP,
    UPDATE,
    WRITE,
    Facts,
    Row,
    compile_step,
    expected_programs,
)
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import sample, sigmas_for
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import FRAME, FULL, OFF, HeadPlan
from wantrim.methods.role_plan import RolePlan
from wantrim.methods.routers import FixedRouter
from wantrim.methods.schedule import Schedule
from wantrim.methods.shares import Shares
from wantrim.methods.tokens import TokenPlan
from wantrim.tests.small_wan import condition, random_wan, words

# 3 latent frames of 12 tokens; half of a frame is 6
GRID, SIZE, BLOCKS = TokenGrid(3, 4, 3), (3, 8, 6), 7
FACTS = Facts(0.6, 0.4, GRID, BLOCKS)
# one letter a block: a runs on all tokens, c too and then chooses, k on the kept, - not at all
LETTERS = {(ALL, False): "a", (ALL, True): "c", (KEPT, False): "k", (SKIP, False): "-"}


def tape(every: int, keep=0.5, **options) -> TrimPlan:
    return TrimPlan(TokenPlan(Schedule(keep, "constant"), reselect_every=every, **options))


def letters(program) -> str:
    return "".join(LETTERS[row.run, row.choose] for row in program.rows)


def without(plan: TrimPlan, *blocks: int) -> tuple[TrimPlan, Facts]:
    router = BlockPlan(FixedRouter(blocks))
    return replace(plan, blocks=router), replace(FACTS, skipped=frozenset(blocks))


@pytest.mark.parametrize(
    ("every", "wanted"),
    [
        # a choice that the next block would make anew is none
        (1, "aaaaaaa"),
        (2, "ckckcka"),
        (3, "ckkckka"),
        (4, "ckkkckk"),
        (6, "ckkkkka"),
        (7, "ckkkkkk"),
        (50, "ckkkkkk"),
    ],
)
def test_tape_chooses_and_drops(every, wanted):
    program = compile_step(tape(every), FACTS)
    assert letters(program) == wanted
    assert {row.tokens for row in program.rows if row.run == KEPT} <= {18}
    assert {row.tokens for row in program.rows if row.run == ALL} == {36}
    assert program.whole == (every == 1) and program.budget == 6 and program.anchored == 0
    assert not program.remarks and not program.remembers


@pytest.mark.parametrize(
    ("skipped", "wanted"),
    [
        ((1,), "c-kckka"),
        # the choosing block: the next one that runs chooses
        ((3,), "ckk-cka"),
        ((3, 4), "ckk--aa"),
        ((3, 4, 5), "ckk---a"),
        # in front of a choosing one
        ((2,), "ck-ckka"),
        ((1, 2), "c--ckka"),
        ((5,), "ckkck-a"),
        ((1, 2, 3, 4, 5), "c-----a"),
        ((), "ckkckka"),
    ],
)
def test_a_skipped_block_leaves_the_choice_to_the_next(skipped, wanted):
    program = compile_step(*without(tape(3), *skipped))
    assert letters(program) == wanted
    assert all(row == Row(SKIP) for i, row in enumerate(program.rows) if i in skipped)


@pytest.mark.parametrize("skipped", [(), (1,), (2, 4), (1, 2, 3, 4, 5)])
def test_without_tokens_the_others_run_on_all(skipped):
    program = compile_step(*without(TrimPlan(), *skipped))
    assert letters(program) == "".join("-" if i in skipped else "a" for i in range(7))


@pytest.mark.parametrize(
    ("count", "wanted"), [(2, "a-----a"), (4, "a-a-a-a"), (6, "aaa-aaa"), (7, "aaaaaaa")]
)
def test_blocks_that_are_not_known_yet_are_counted(count, wanted):
    """Which ones is the router's business in the run: the first and the last always run."""
    plan = TrimPlan(blocks=BlockPlan(RandomRouter(), BlockBudget(count / 7, count / 7)))
    program = compile_step(plan, replace(FACTS, skipped=None))
    assert letters(program).count("a") == count
    assert letters(program)[0] == letters(program)[-1] == "a"
    if count in (2, 7):
        assert letters(program) == wanted


@pytest.mark.parametrize(
    ("anchored", "kept"),
    [(None, 18), ((False,) * 3, 18), ((True, False, False), 24), ((True, False, True), 30)],
)
def test_given_latent_frames_keep_all(anchored, kept):
    program = compile_step(tape(3), replace(FACTS, anchored=anchored))
    assert [row.tokens for row in program.rows if row.run == KEPT] == [kept] * 4
    assert program.anchored == sum(anchored or ())
    loose = compile_step(tape(3, anchor=False), replace(FACTS, anchored=anchored))
    assert {row.tokens for row in loose.rows if row.run == KEPT} == {18} and loose.anchored == 0


def test_a_video_that_is_given_is_computed_in_full():
    program = compile_step(tape(3), replace(FACTS, anchored=(True,) * 3))
    assert program.untouched and program.remarks == (ALL_GIVEN,)
    assert not compile_step(tape(3, anchor=False), replace(FACTS, anchored=(True,) * 3)).whole


@pytest.mark.parametrize(
    ("facts", "why"), [({"mixed": True}, MIXED), ({"inside": "nobody may"}, "nobody may")]
)
def test_where_no_token_may_go_all_are_computed_and_it_is_said(facts, why):
    facts = replace(FACTS, **facts, known=True, seen=2)
    for plan in (tape(3), shares(1, 1, 0.3)):
        program = compile_step(plan, facts)
        assert program.untouched and program.remarks == (why,) and program.share == 1.0
    # nothing was to be dropped at this place of the run
    assert not compile_step(tape(3, start=0.5), facts).remarks
    # a skipped step looks into no block
    assert compile_step(shares(1, 1, 0), facts).repeats


# steps at sigma 1, .8, .6; FACTS is in the third
def shares(*values: float, context=True) -> TrimPlan:
    sigmas = tuple(1 - 0.2 * i for i in range(len(values)))
    return TrimPlan(shares=Shares(sigmas, values, context))


KNOWN = replace(FACTS, known=True, seen=2)


@pytest.mark.parametrize(
    ("share", "row", "budget"),
    [
        (0, Row(SKIP), 12),
        (0.3, Row(KEPT, 12, context=READ), 4),
        # never less than a token in a latent frame
        (0.01, Row(KEPT, 3, context=READ), 1),
        # rounded: 2.4 and 3.6 tokens of a latent frame
        (0.2, Row(KEPT, 6, context=READ), 2),
        (0.31, Row(KEPT, 12, context=READ), 4),
        (0.5, Row(KEPT, 18, context=READ), 6),
        (1, Row(ALL, 36), 12),
    ],
)
def test_a_share_is_the_same_in_every_block(share, row, budget):
    program = compile_step(shares(1, 1, share), KNOWN)
    assert program.rows == (row,) * BLOCKS
    # a run of whole steps has nothing to remember
    assert (program.share, program.budget, program.remembers) == (share, budget, share < 1)
    assert program.repeats == (share == 0) and program.partial == (0 < share < 1)
    assert program.whole == (share == 1) and not program.remarks
    # the nearest announced step decides
    assert compile_step(shares(1, 1, share), replace(KNOWN, sigma=0.52)).rows == program.rows


def test_a_share_goes_by_what_is_remembered():
    part, none = shares(1, 1, 0.3), shares(1, 1, 0)
    for plan in (part, none):
        first = compile_step(plan, FACTS)
        assert first.whole and not first.remarks
        # a window or a prompt that comes late
        for late in ({"seen": 3}, {"begun": True}):
            program = compile_step(plan, replace(FACTS, known=False, **late))
            assert program.whole and program.share == 1.0
            assert program.remarks == (NOT_REMEMBERED,)
    # how tokens change is known from two steps; a velocity to repeat from one
    once = replace(FACTS, known=True, seen=1)
    assert compile_step(part, once).whole and not compile_step(part, once).remarks
    assert compile_step(none, once).repeats


def test_a_part_of_the_tokens_needs_context():
    lost = replace(KNOWN, context=False)
    for plan, facts in (
        (shares(1, 1, 0.3), lost),
        (replace(shares(1, 1, 0.3), tokens=tape(3).tokens), KNOWN),
        (replace(shares(1, 1, 0.3), blocks=BlockPlan(FixedRouter((2,)))), KNOWN),
    ):
        program = compile_step(plan, facts)
        assert program.share == 1.0 and program.remarks == (NO_CONTEXT,)
        assert not any(row.context for row in program.rows)
    # a plan that does without says nothing
    quiet = compile_step(shares(1, 1, 0.3, context=False), KNOWN)
    assert quiet.share == 1.0 and not quiet.remarks
    assert compile_step(shares(1, 1, 0, context=False), lost).repeats


def contexts(values, **facts) -> list[str]:
    plan, found = shares(*values), []
    for step, sigma in enumerate(plan.shares.sigmas):
        program = compile_step(
            plan, replace(KNOWN, sigma=sigma, seen=step, known=step > 0, **facts)
        )
        assert len({row.context for row in program.rows}) == 1
        found.append(program.rows[0].context)
    return found


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ((1, 1, 0.5, 0.2, 1, 0.3, 0, 1), ["", WRITE, UPDATE, READ, WRITE, READ, "", ""]),
        # through a repeated step
        ((1, 1, 0, 0.2), ["", WRITE, "", READ]),
        ((1, 1, 0.5, 0, 0, 0.2, 1), ["", WRITE, UPDATE, "", "", READ, ""]),
        # a part that comes too early is whole, and what it would have read is written
        ((1, 0.5, 0.4), [WRITE, WRITE, READ]),
        ((1, 0, 1, 0, 0), [""] * 5),
        ((1, 1, 1), [""] * 3),
    ],
)
def test_keys_and_values_are_written_where_a_later_step_reads_them(values, wanted):
    assert contexts(values) == wanted
    assert set(contexts(values, inside="no")) == set(contexts(values, mixed=True)) == {""}
    assert set(contexts(values, context=False)) == {""}


HEADS = HeadPlan((*[(FRAME, FULL)] * 2, *[(FULL, FULL)] * 4, (OFF, FULL)), ((FULL, FULL),) * 7)


def test_heads_run_in_their_patterns():
    wanted = [0, 1, 6]
    for plan in (TrimPlan(), tape(3), shares(1, 1, 0.3)):
        program = compile_step(replace(plan, heads=HEADS), KNOWN)
        assert [i for i, row in enumerate(program.rows) if row.heads] == wanted
        # the rest of the row is what it is without heads
        bare = [replace(row, heads=False) for row in program.rows]
        assert bare == list(compile_step(plan, KNOWN).rows)
    plan, facts = without(TrimPlan(heads=HEADS), 1)
    skipped = compile_step(plan, facts)
    assert [i for i, row in enumerate(skipped.rows) if row.heads] == [i for i in wanted if i != 1]


def test_heads_of_a_block_that_may_not_be_looked_into_are_whole():
    program = compile_step(TrimPlan(heads=HEADS), replace(FACTS, inside="not here"))
    assert program.untouched and program.remarks == ("not here",)
    assert compile_step(TrimPlan(heads=HEADS), replace(FACTS, mixed=True)).rows[0].heads


def test_a_plan_knows_what_it_trims_and_says_so():
    heads = HeadPlan(((FULL, FULL, OFF), (FRAME, FULL, OFF)), ((FULL, OFF, OFF), (FULL,) * 3))
    cases = {
        "nothing trimmed": TrimPlan(
            TokenPlan(Schedule(1.0)),
            HeadPlan.full(2, 3),
            BlockPlan(FixedRouter(())),
            Shares((1.0, 0.5), (1.0, 1.0)),
        ),
        "of 5 steps 2 whole, 1 on a part of the tokens, 2 repeated (1 0 0.35 1 0)": TrimPlan(
            shares=Shares((0.9, 0.8, 0.7, 0.6, 0.5), (1.0, 0.0, 0.35, 1.0, 0.0))
        ),
        "of 2 steps 1 whole, 1 repeated (1 0)": TrimPlan(shares=Shares((0.9, 0.5), (1.0, 0.0))),
        "of 2 steps 1 whole, 1 on a part of the tokens (1 0.4)": TrimPlan(
            shares=Shares((0.9, 0.5), (1.0, 0.4))
        ),
        "40% of the tokens dropped (constant, by the attention they receive, reselected every 3 "
        "blocks)": tape(3, 0.6),
        "40% of the tokens dropped from 10% to 80% of the run (constant, by the attention they "
        "receive, reselected every 3 blocks)": tape(3, 0.6, start=0.1, end=0.8),
        "heads 3 full, 1 frame, 2 off, 2 cross-attention heads off": TrimPlan(heads=heads),
        "heads 2 full, 1 off": TrimPlan(heads=HeadPlan(((FULL, FULL, OFF),), ((FULL,) * 3,))),
        "heads by their roles, 45% of self-attention left": TrimPlan(heads=RolePlan(0.45, 3)),
        "always the same blocks skipped": TrimPlan(blocks=BlockPlan(FixedRouter((2,)))),
        "40% to 90% of the blocks run (rising, random)": TrimPlan(
            blocks=BlockPlan(RandomRouter(), BlockBudget(0.4, 0.9, "rising"))
        ),
    }
    for said, plan in cases.items():
        assert plan.describe() == said and plan.neutral == (said == "nothing trimmed")
    both = tape(3, 0.6).describe() + "; always the same blocks skipped"
    assert without(tape(3, 0.6), 2)[0].describe() == both
    assert not cases["nothing trimmed"].trims_heads and TrimPlan().neutral
    # what is left out whole leaves nothing behind that a part could go by
    assert [plan.may_be_partial for plan in cases.values()] == [True] * 4 + [False] * 2 + (
        [True] * 3 + [False] * 2
    )
    assert [said for said, plan in cases.items() if plan.finds_roles] == [
        "heads by their roles, 45% of self-attention left"
    ]
    # all of it is no part
    assert not TrimPlan(heads=RolePlan(1.0, 3)).finds_roles


def test_neutral_is_every_row_is_all():
    program = compile_step(TrimPlan(), FACTS)
    assert program.rows == (Row(ALL, 36),) * BLOCKS
    assert program.untouched and program.whole
    for plan in (tape(3), shares(1, 0.5, 0.4), replace(TrimPlan(), heads=HEADS)):
        assert not compile_step(plan, KNOWN).untouched


# what a run is expected to do, and what it did

SHIFT, STEPS = 3.0, 6
SIGMAS = tuple(sigmas_for(STEPS, SHIFT)[:-1].tolist())
RUNS = {
    "tape": TrimPlan(TokenPlan(Schedule(0.6), reselect_every=3, start=0.2)),
    "shares": TrimPlan(shares=Shares(SIGMAS, (1, 1, 0.4, 0, 0.25, 1))),
    "early part": TrimPlan(shares=Shares(SIGMAS, (1, 0.3, 0.3, 0, 1, 0))),
    # a repeated step tells nothing of how tokens change
    "repeated first": TrimPlan(shares=Shares(SIGMAS, (1, 0, 0.4, 0.3, 1, 0))),
    "no context": TrimPlan(shares=Shares(SIGMAS, (1, 0, 0.4, 0, 1, 0.1), context=False)),
    "heads": TrimPlan(heads=HeadPlan(((FRAME, OFF, FULL, FULL),) * 5, ((FULL,) * 4,) * 5)),
    "shares and heads": TrimPlan(
        heads=HeadPlan(((FRAME, OFF, FULL, FULL),) * 5, ((FULL,) * 4,) * 5),
        shares=Shares(SIGMAS, (1, 1, 0, 0.4, 0.5, 0.25)),
    ),
    "tape and shares": TrimPlan(
        TokenPlan(Schedule(0.5), reselect_every=4), shares=Shares(SIGMAS, (1, 0, 1, 0.5, 0, 1))
    ),
}


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_does_what_is_expected_of_it(name, given):
    plan, model = RUNS[name], random_wan(5, in_dim=36)
    with attach(model, plan, cond_or_uncond=(COND, UNCOND), shift=SHIFT) as attachment:
        options = {"steps": STEPS, "shift": SHIFT, "condition": condition(range(given))}
        sample(model, words(), SIZE, **options)
        record = attachment.finish()
    anchored = (True, False, False) if given else None
    programs = expected_programs(plan, SIGMAS, SHIFT, GRID, 5, anchored)
    assert [step.program for step in record.steps] == programs
    assert [step.rows for step in record.steps] == [list(program.rows) for program in programs]
    assert all(step.as_planned for step in record.steps)
    assert not all(program.whole for program in programs)


def test_of_blocks_that_a_router_picks_the_number_is_expected():
    plan = TrimPlan(blocks=BlockPlan(RandomRouter(2), BlockBudget(0.4, 0.9)))
    model = random_wan(6)
    with attach(model, plan, shift=SHIFT) as attachment, torch.no_grad():
        sample(model, words(), SIZE, steps=STEPS, shift=SHIFT, guidance=1)
        record = attachment.finish()
    programs = expected_programs(plan, SIGMAS, SHIFT, GRID, 6)
    expected = [6 - letters(program).count("-") for program in programs]
    assert [step.blocks_run for step in record.steps] == expected
    assert all(step.as_planned for step in record.steps)
    assert len({step.blocks_run for step in record.steps}) > 1


@pytest.mark.parametrize(
    ("height", "width", "group"), [(22, 40, 22), (15, 26, 15), (7, 12, 3), (17, 19, 1)]
)
def test_tokens_beside_given_frames_come_in_groups_where_modulation_is_by_frame(
    height, width, group
):
    grid = TokenGrid(3, height, width)
    plan = TrimPlan(TokenPlan(schedule=Schedule(0.66, "constant")))
    options = {"anchored": (True, False, False)}
    free, grouped = (
        compile_step(plan, Facts(0.5, 0.5, grid, 4, **options, by_frame=by_frame)).budget
        for by_frame in (False, True)
    )
    assert free == plan.tokens.budget(0.5, grid) and (group == 1 or free % group)
    assert grouped % group == 0 and 0 <= free - grouped < group
    # nothing is given: all latent frames keep equally many
    assert compile_step(plan, Facts(0.5, 0.5, grid, 4, by_frame=True)).budget == free
