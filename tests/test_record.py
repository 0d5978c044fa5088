"""What is written down of a run, by hand."""

from dataclasses import replace

import pytest
import torch

from wantrim.engine.program import ALL, KEPT, READ, SKIP, Program, Row
from wantrim.engine.record import Record, Step, join_records
from wantrim.methods.cost import WanShape
from wantrim.methods.grid import TokenGrid
from wantrim.methods.tokens import Selection

# behind a token of something else
GRID = TokenGrid(2, 1, 3, start=1)
WHOLE, PART, NONE = Row(ALL, 6), Row(KEPT, 4), Row(SKIP)


def step(*rows: Row, budget=2, share=1.0, grid=GRID) -> Step:
    return Step(0.8, 0.2, Program(rows, grid, budget, share))


def ran(*rows: Row, choices=(), **options) -> Step:
    one = step(*rows, **options)
    one.close(list(rows), list(choices) or [None] * len(rows))
    return one


def keeping(*rows) -> Selection:
    """Positions of eight tokens, of each sample."""
    return Selection(torch.tensor(rows), 8, (2, 2))


def test_the_rows_of_a_step_in_figures():
    one = ran(WHOLE, replace(PART, heads=True), NONE, PART)
    assert one.num_blocks == 4 and one.grid == GRID
    assert one.tokens_per_block == [6, 4, 0, 4] and one.kept_share == pytest.approx(14 / 24)
    assert one.patterned == [1] and one.blocks_run == 3
    assert one.as_planned and one.watched and not one.whole and not one.repeated
    # of two that did the same each is its own
    assert one != replace(one) and (one.calls, one.seconds) == (0, 0.0)
    # in other patterns it is not the whole model, however many tokens there are
    assert not ran(WHOLE, replace(WHOLE, heads=True)).whole and ran(WHOLE, WHOLE).whole


def test_a_step_that_did_something_else_is_not_as_planned():
    one = step(WHOLE, PART, PART)
    one.close([WHOLE, WHOLE, PART], [None] * 3, reached=True, missing=True)
    assert not one.as_planned and one.ignored and not one.answered
    assert one.kept_share == pytest.approx(16 / 18)


@pytest.mark.parametrize(
    ("rows", "share", "how", "cut"),
    [
        # cancelled between blocks, and behind the last one
        ((WHOLE, PART), 1.0, {"missing": True}, True),
        ((WHOLE, PART), 1.0, {}, False),
        # of a repeated step nothing is missing
        ((NONE, NONE), 0.0, {"missing": True}, False),
        # of an untouched one it is known that the model ran, or nothing
        ((WHOLE, WHOLE), 1.0, {"missing": True, "reached": True}, False),
        ((WHOLE, WHOLE), 1.0, {"missing": True}, True),
    ],
)
def test_a_step_is_cut_off_where_a_run_was_cancelled_before_its_end(rows, share, how, cut):
    one, whole = step(*rows, share=share), step(*rows, share=share)
    one.close(list(rows[:1]), [], whole=False, **how)
    whole.close(list(rows[:1]), [], **how)
    assert one.cut is cut and not whole.cut and not one.answered
    assert Record(steps=[whole, one]).without_cut().steps == [whole, one][: 2 - cut]


def test_a_repeated_step_is_told_from_one_that_another_node_answered():
    again = step(NONE, NONE, share=0.0)
    # nothing looks at its blocks
    assert not again.watched
    again.close([], [])
    assert again.repeated and again.as_planned and not again.answered
    assert (again.kept_share, again.blocks_run) == (0.0, 0)
    again.close([], [], reached=False)
    assert again.answered and not again.repeated
    other = step(WHOLE, PART)
    other.close([WHOLE, PART], [None, None], reached=False)
    assert other.answered and other.rows == [NONE, NONE] and other.kept_share == 0.0
    # blocks of which nothing is known did nothing
    other.close([], [])
    assert other.answered and other.rows == [NONE, NONE]
    # an untouched step does not go by us
    neutral = step(WHOLE, WHOLE)
    assert not neutral.watched
    neutral.close([], [])
    assert neutral.rows == [WHOLE, WHOLE] and not neutral.answered


def test_coverage_is_how_often_each_token_was_computed():
    first, second = keeping([0, 1, 2, 4, 6, 7]), keeping([0, 2, 3, 4, 5, 7])
    one = ran(WHOLE, PART, PART, PART, NONE, choices=(None, first, first, second, None))
    assert one.coverage is None
    one.settle()
    # of five blocks four ran; the first choice left out the third and the fifth token, twice
    wanted = torch.tensor([[0.8, 0.8, 0.4], [0.8, 0.4, 0.8]])
    wanted.view(-1)[[0, 5]] -= 0.2
    torch.testing.assert_close(one.coverage, wanted.view(1, 2, 1, 3))
    # each sample has its own
    apart = ran(PART, choices=[keeping([0, 1, 2, 4, 6, 7], [0, 2, 3, 4, 5, 7])])
    apart.settle()
    assert apart.coverage.view(2, 6).tolist() == [[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0]]
    nothing = Step(0.8, 0.2, Program((), GRID, 3))
    nothing.settle()
    assert nothing.coverage.sum() == 0


def test_a_run_tells_of_places_by_its_partial_steps():
    left, right = keeping([0, 1, 2, 4, 5, 7]), keeping([0, 2, 3, 5, 6, 7])
    two = keeping([0, 1, 2, 4, 5, 7], [0, 2, 3, 5, 6, 7])
    record = Record(steps=[ran(WHOLE, WHOLE), ran(NONE, NONE, share=0.0)])
    assert record.coverage() is None
    for one in record.steps:
        one.settle()
    assert record.coverage() is None and record.kept_share == 0.5
    record.steps += [ran(PART, choices=[left]), ran(PART, choices=[right])]
    for one in record.steps[2:]:
        one.settle()
    assert record.coverage().flatten().tolist() == [0.5, 1.0, 0.5, 0.5, 1.0, 0.5]
    assert record.kept_share == pytest.approx((1 + 0 + 2 / 3 + 2 / 3) / 4)
    # what is alike for all samples counts for each of them
    record.steps.append(ran(PART, choices=[two]))
    record.steps[-1].settle()
    assert record.coverage().shape == (2, 2, 1, 3)
    assert record.coverage()[:, 0, 0, 0].tolist() == pytest.approx([2 / 3, 1 / 3])
    # of the last size alone
    small = ran(Row(KEPT, 2), budget=1, grid=TokenGrid(1, 1, 3))
    small.close([Row(KEPT, 2)], [Selection(torch.tensor([[0, 2]]), 3, (2,))])
    small.settle()
    record.steps.append(small)
    assert record.coverage().tolist() == [[[[1.0, 0.0, 1.0]]]]
    assert Record().kept_share == 1.0


def test_what_did_not_happen_is_said_once():
    record = Record()
    for text in ("a", "b", "a"):
        record.note(text)
    assert record.notes == ["a", "b"]


def test_runs_that_made_one_video_are_one():
    steps = [ran(WHOLE), ran(Row(ALL, 6, context=READ)), ran(NONE)]
    empty = Record("none", planned="a", seconds=1.0, finished=True)
    high = Record(
        "high", steps[:2], ["x", "y"], planned="b", seconds=2.0, finished=True, missed=True,
        shape=WanShape(8, 16, 1), asked=1.5,
    )  # fmt: skip
    low = Record(
        "low", steps[2:], ["y", "z"], planned="a", seconds=4.0, context="in RAM", asked=1.5
    )
    joined = join_records([empty, high, low])
    # what is of one run alone is of the first that did something
    assert (joined.model, joined.shape, joined.asked) == ("high", high.shape, 1.5)
    # a wish is all theirs or nobody's
    assert join_records([high, Record("low", steps[2:], asked=3.0)]).asked is None
    assert joined.steps == steps and joined.notes == ["x", "y", "z"]
    assert joined.planned == "a; then b" and joined.seconds == 7.0
    assert not joined.finished and joined.missed and joined.context == "in RAM"
    assert join_records([empty, high]).finished and join_records([empty, high]).context is None
    assert not join_records([empty, low]).missed
    assert join_records([high]) is high
    # where nothing ran it is the first one's
    assert join_records([empty, Record("other")]).model == "none"
