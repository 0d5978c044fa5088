import pytest
import torch

from wantrim.kernels.reference import token_mass
from wantrim.methods import importance
from wantrim.methods.grid import (
    TokenGrid,
    gather_tokens,
    masked_as_given,
    other_positions,
    scatter_tokens,
    timed_as_given,
)
from wantrim.methods.importance import (
    attention_received,
    query_count,
    sample_queries,
    scoring_queries,
)
from wantrim.methods.schedule import Schedule
from wantrim.methods.tokens import Selection, TokenPlan, paper_plan, select_tokens, smooth_select

GRIDS = [TokenGrid(1, 1, 1), TokenGrid(2, 7, 9), TokenGrid(5, 6, 6), TokenGrid(3, 5, 4, start=7)]


def scores(grid: TokenGrid, batch=2) -> torch.Tensor:
    return torch.randn(batch, grid.tokens, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def asking(monkeypatch):
    """asking(ratio, least): this share of the tokens are queries, and so many at least."""

    def put(ratio, least):
        monkeypatch.setattr(importance, "QUERY_RATIO", ratio)
        monkeypatch.setattr(importance, "MIN_QUERIES", least)

    return put


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [1 / 64, 0.3, 1.0])
def test_queries_are_stratified_over_latent_frames(grid, ratio):
    index = sample_queries(grid, ratio)
    frames = (index // grid.per_frame).bincount(minlength=grid.frames)
    assert frames.min() == frames.max()
    assert len(index.unique()) == len(index)
    assert index.max() < grid.tokens
    if ratio == 1.0:
        assert torch.equal(index, torch.arange(grid.tokens))


def test_large_grids_use_the_asked_share_of_queries():
    grid = TokenGrid(21, 45, 80)
    assert len(sample_queries(grid, 1 / 64)) == pytest.approx(grid.tokens / 64, rel=0.02)


def test_queries_begin_at_a_golden_offset_of_their_own_in_each_latent_frame():
    """By hand: of 16 tokens every fourth, from 0, 0.618 and 0.236 of a step on."""
    index = sample_queries(TokenGrid(3, 4, 4), 0.25, at_least=1).view(3, 4) - torch.tensor(
        [[0], [16], [32]]
    )
    assert index.tolist() == [[0, 4, 8, 12], [2, 6, 10, 14], [0, 4, 8, 12]]
    # with steps of 10: 0, 6.18 and 2.36
    first = sample_queries(TokenGrid(3, 10, 10), 0.1, at_least=1).view(3, 10)[:, 0]
    assert (first - torch.tensor([0, 100, 200])).tolist() == [0, 6, 2]


@pytest.mark.parametrize(
    ("grid", "ratio", "least", "radius"),
    [
        # sampled on a grid that has room for a tube
        (TokenGrid(2, 16, 17), 1 / 64, 1, 2),
        # too narrow, too low, or nothing is sampled
        (TokenGrid(2, 16, 15), 1 / 64, 1, 0),
        (TokenGrid(2, 15, 16), 1 / 64, 1, 0),
        (TokenGrid(2, 16, 16), 1.0, 1, 0),
        (TokenGrid(2, 16, 16), 1 / 64, 512, 0),
    ],
)
def test_a_sampled_query_does_not_vote_for_its_neighbours(grid, ratio, least, radius, asking):
    q, k = torch.randn(2, 1, grid.tokens, 2, 6, generator=torch.Generator().manual_seed(1)).unbind()
    index = sample_queries(grid, ratio, least)
    size = (grid.frames, grid.height, grid.width)
    asking(ratio, least)
    got = attention_received(grid, q, k)
    assert torch.equal(got, token_mass(q, k, size, index, exclude_radius=radius))
    assert not torch.equal(got, token_mass(q, k, size, index, exclude_radius=1))


def test_a_small_video_has_enough_queries(asking):
    grid = TokenGrid(4, 10, 10)
    assert query_count(grid, 1 / 64, 256) == 256 and query_count(grid, 1 / 64, 1) == 8
    assert query_count(grid, 1 / 64, 900) == 400 and query_count(grid, 0.5, 1) == 200
    q = torch.randn(2, 1, 400, 1, 4, generator=torch.Generator().manual_seed(1))
    many = attention_received(grid, *q)
    asking(1 / 64, 1)
    assert not torch.equal(attention_received(grid, *q), many)


@pytest.mark.parametrize(
    ("grid", "queries"), [(TokenGrid(1, 20, 20), 256), (TokenGrid(2, 110, 100), 344)]
)
def test_by_itself_one_of_64_tokens_asks_and_256_at_least(grid, queries, asking):
    q = torch.randn(2, 1, grid.tokens, 1, 4, generator=torch.Generator().manual_seed(1))
    assert len(sample_queries(grid, 1 / 64)) == scoring_queries(grid) == queries
    got = attention_received(grid, *q)
    for count in (queries - 2, queries, queries + 2):
        asking(count / grid.tokens, 1)
        assert torch.equal(got, attention_received(grid, *q)) == (count == queries)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("after", [0, 5])
def test_same_count_in_every_frame_and_nothing_outside_the_grid(grid, after):
    budget, length = max(1, grid.per_frame // 2), grid.start + grid.tokens + after
    chosen = select_tokens(scores(grid), grid, length, budget, alpha=0.4)
    assert chosen.per_frame == (budget,) * grid.frames and chosen.length == length
    for row, dropped in zip(chosen.index, chosen.dropped, strict=True):
        inside = row[(row >= grid.start) & (row < grid.start + grid.tokens)] - grid.start
        counts = (inside // grid.per_frame).bincount(minlength=grid.frames)
        assert counts.tolist() == [budget] * grid.frames
        assert set(range(grid.start)) <= set(row.tolist())
        assert set(range(grid.start + grid.tokens, length)) <= set(row.tolist())
        assert sorted(row.tolist() + dropped.tolist()) == list(range(length))


def places(scores, keep, alpha):
    """Positions that stay in each latent frame."""
    return [
        [frame.nonzero().flatten().tolist() for frame in sample]
        for sample in smooth_select(scores, keep, alpha)
    ]


def test_smoothing_uses_the_raw_score_of_the_frame_before():
    # alpha 0.5: frame 1 becomes (4+0)/2, (1+8)/2 -> 2.0, 4.5; frame 2 (1+4)/2, (2+1)/2 -> 2.5, 1.5
    # a recursive average would give frame 2: (1+2)/2, (2+4.5)/2 -> 1.5, 3.25 and keep the other
    scores = torch.tensor([[[0.0, 8.0], [4.0, 1.0], [1.0, 2.0]]])
    assert places(scores, 1, 0.5) == [[[1], [1], [0]]]
    assert places(scores, 1, 1.0) == [[[1], [0], [1]]]


def test_ties_go_to_the_lowest_position():
    assert places(torch.tensor([[[1.0, 5.0, 1.0, 1.0, 5.0, 1.0]]]), 4, 0.5) == [[[0, 1, 2, 4]]]
    # -0 is 0, and what is no number is above all, as a sort has it
    row = torch.tensor([[[-0.0, 0.0, float("-inf"), float("nan"), float("inf"), -3.0]]])
    assert places(row, 1, 0.5) == [[[3]]]
    assert places(row, 3, 0.5) == [[[0, 3, 4]]]


def test_products_and_sum_are_rounded_apart():
    """Frames whose two products, fused, come out one bit off and turn a tie over."""
    random = torch.Generator().manual_seed(1)
    scores = torch.rand(1, 2, 4000, generator=random)
    smooth = 0.3 * scores[:, 1:] + 0.7 * scores[:, :-1]
    fused = (0.3 * scores[:, 1:].double() + 0.7 * scores[:, :-1].double()).float()
    assert not torch.equal(smooth, fused)
    want = smooth[0, 0].sort(descending=True, stable=True).indices[:1500].sort().values
    assert places(scores, 1500, 0.3)[0][1] == want.tolist()


@pytest.mark.parametrize("positions", [1, 63, 100])
def test_every_frame_keeps_the_same_number(positions):
    torch.manual_seed(positions)
    scores = torch.randn(2, 4, positions)
    for keep in (1, positions // 2 or 1, positions):
        stays = smooth_select(scores, keep, 0.5)
        assert stays.dtype == torch.bool and stays.shape == scores.shape
        assert (stays.sum(-1) == keep).all()
    assert stays.all()


def test_the_highest_stay_smoothed_by_the_latent_frame_before():
    grid, length = TokenGrid(2, 1, 3, start=1), 8
    given = torch.tensor([[0.0, 5.0, 1.0, 3.0, 0.0, 2.0]])
    # 0.5: the second latent frame is (1.5, 2.5, 1.5)
    for alpha, second in ((1.0, 4), (0.5, 5), (0.0, 5)):
        chosen = select_tokens(given, grid, length, 1, alpha=alpha)
        assert chosen.index.tolist() == [[0, 2, second, 7]]
    # unless asked for nothing is smoothed
    given = torch.tensor([[0.0, 5.0, 2.0, 3.0, 0.0, 3.5]])
    assert select_tokens(given, grid, length, 1).index.tolist() == [[0, 2, 6, 7]]


def test_anchored_frames_lose_nothing():
    grid = TokenGrid(4, 3, 3)
    chosen = select_tokens(scores(grid), grid, 36, 2, anchored=[True, False, False, True])
    assert (chosen.index[0] // 9).bincount(minlength=4).tolist() == [9, 2, 2, 9]
    assert chosen.per_frame == (9, 2, 2, 9)
    loose = select_tokens(scores(grid), grid, 36, 2)
    assert (loose.index[0] // 9).bincount(minlength=4).tolist() == [2, 2, 2, 2]


def test_a_choice_moves_with_a_reference_in_front():
    old, new = TokenGrid(2, 1, 3), TokenGrid(3, 1, 3, start=2)
    there = Selection(torch.tensor([[0, 2, 4]]), 6, (2, 1)).moved(old, new, 12)
    # the latent frame that is new stays whole, as does what lies outside of the grid
    assert there.index.tolist() == [[0, 1, 2, 4, 6, 8, 9, 10, 11]]
    assert there.per_frame == (2, 1, 3)
    # and back
    back = there.moved(new, old, 6)
    assert back.index.tolist() == [[0, 2, 4]] and back.per_frame == (2, 1)


def test_attention_finds_the_token_that_all_look_at():
    grid = TokenGrid(2, 4, 4)
    noise = torch.randn(2, 1, 32, 2, 6, generator=torch.Generator().manual_seed(0))
    direction = torch.nn.functional.normalize(torch.ones(6), dim=0)
    q = direction.expand(1, 32, 2, 6) + 0.01 * noise[0]
    k = 0.01 * noise[1]
    k[0, [5, 27]] += 30 * direction
    received = attention_received(grid, q, k)
    assert select_tokens(received, grid, 32, 1).index.tolist() == [[5, 27]]


def test_gather_shares_rotary_tables_between_samples():
    table = torch.randn(1, 9, 1, 3, 2, 2)
    index = torch.tensor([[0, 3], [1, 2]])
    got = gather_tokens(table, index)
    assert got.shape == (2, 2, 1, 3, 2, 2)
    assert torch.equal(got[1, 0], table[0, 1])
    assert gather_tokens(table, index[:1]).shape == (1, 2, 1, 3, 2, 2)


def test_the_videos_part_of_a_sequence():
    grid = TokenGrid(2, 3, 4, start=2)
    assert (grid.per_frame, grid.tokens) == (12, 24)
    sequence = torch.arange(2 * 30).view(2, 30)
    assert grid.cut(sequence).tolist() == [list(range(2, 26)), list(range(32, 56))]
    assert TokenGrid(2, 3, 4).cut(sequence)[0, 0] == 0


def test_a_latent_frame_is_given_where_all_of_it_is():
    """Of two samples, four latent frames of 2 x 3."""
    mask = torch.zeros(2, 4, 4, 2, 3)
    # one of four pixel frames is enough, but not a part of the picture
    mask[0, 2, 1] = mask[1, 0, 3] = 1
    mask[0, :, 2, 0] = 1
    assert masked_as_given(mask).tolist() == [False, True, False, True]
    assert masked_as_given(mask[:1]).tolist() == [False, True, False, False]
    # by timesteps of frames, or of each frame's tokens; it is given to all samples or to none
    frames = torch.tensor([[0.0, 7.0, 0.0], [0.0, 7.0, 7.0]])
    assert timed_as_given(frames, 3).tolist() == [True, False, False]
    tokens = torch.tensor([[0.0, 0.0, 0.0, 7.0, 7.0, 7.0]])
    assert timed_as_given(tokens, 3).tolist() == [True, False, False]


def test_rows_are_put_back_in_a_copy_or_in_place():
    hidden, kept = torch.zeros(2, 3, 2), torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    index = torch.tensor([[2], [0]])
    put = scatter_tokens(hidden, index, kept)
    assert put.tolist() == [[[0, 0], [0, 0], [1, 2]], [[3, 4], [0, 0], [0, 0]]]
    assert hidden.sum() == 0
    assert scatter_tokens(hidden, index, kept, in_place=True) is hidden and torch.equal(hidden, put)
    assert other_positions(index, 3).tolist() == [[0, 1], [1, 2]]


def test_budget_never_empties_a_frame_is_rounded_and_respects_the_window():
    grid = TokenGrid(2, 3, 4)
    assert TokenPlan(Schedule(0.01, "constant")).budget(0.5, grid) == 1
    # 5.4 and 6.6 of 12
    for keep, budget in ((0.45, 5), (0.55, 7), (1.0, 12)):
        assert TokenPlan(Schedule(keep, "constant")).budget(0.5, grid) == budget
    window = TokenPlan(Schedule(0.7), start=0.2, end=0.6)
    assert [window.keep_at(p) < 1 for p in (0.1, 0.2, 0.6, 0.7)] == [False, True, True, False]


def test_tape_is_the_papers():
    plan = paper_plan(0.7, start=0.1)
    assert (plan.reselect_every, plan.alpha, plan.start) == (10, 0.5, 0.1)
    assert plan.schedule == Schedule(0.7, "falling")
    assert [plan.reselects(block) for block in (0, 9, 10, 20, 25)] == [
        True,
        False,
        True,
        True,
        False,
    ]


def test_what_lies_at_the_edge_is_allowed():
    for options in ({"reselect_every": 1}, {"alpha": 0.0}, {"alpha": 1.0}):
        plan = TokenPlan(Schedule(0.7), **options)
        assert all(getattr(plan, name) == value for name, value in options.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reselect_every": 0}, "reselect_every.*got 0"),
        ({"alpha": -0.1}, "alpha.*got -0.1"),
        ({"alpha": 1.5}, "alpha.*got 1.5"),
        ({"start": 0.8, "end": 0.2}, "start <= end.*0.8 and 0.2"),
    ],
)
def test_bad_values_say_what_was_expected(options, said):
    with pytest.raises(ValueError, match=said):
        TokenPlan(Schedule(0.7), **options)
