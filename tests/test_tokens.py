import pytest
import torch

from wantrim.methods.grid import TokenGrid, gather_tokens, scatter_tokens
from wantrim.methods.importance import (
    IMPORTANCE,
    Evidence,
    attention_received,
    key_size,
    sample_queries,
)
from wantrim.methods.schedule import Schedule
from wantrim.methods.tokens import TokenPlan, select_tokens

GRIDS = [TokenGrid(1, 1, 1), TokenGrid(2, 7, 9), TokenGrid(5, 6, 6), TokenGrid(3, 5, 4, start=7)]


def plan(**options) -> TokenPlan:
    return TokenPlan(Schedule(0.7), **options)


def evidence(grid: TokenGrid, batch=2, after=0) -> Evidence:
    torch.manual_seed(0)
    length = grid.start + grid.tokens + after
    before, update = torch.randn(2, batch, length, 12).unbind()
    q, k = torch.randn(2, batch, length, 2, 6).unbind()
    received, keys = attention_received(grid, q, k), key_size(grid, k)
    change = torch.rand(batch, grid.tokens)
    return Evidence(grid, before, before + update, received, keys, change, seed=3)


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


@pytest.mark.parametrize("name", [*IMPORTANCE, "attention+rotation"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("after", [0, 5])
def test_same_count_in_every_frame_and_nothing_outside_the_grid(name, grid, after):
    seen = evidence(grid, after=after)
    budget = max(1, grid.per_frame // 2)
    chosen = select_tokens(plan(importance=name), seen, budget)
    length = grid.start + grid.tokens + after
    for row, dropped in zip(chosen.index, chosen.dropped, strict=True):
        inside = row[(row >= grid.start) & (row < grid.start + grid.tokens)] - grid.start
        counts = (inside // grid.per_frame).bincount(minlength=grid.frames)
        assert counts.tolist() == [budget] * grid.frames
        assert set(range(grid.start)) <= set(row.tolist())
        assert set(range(grid.start + grid.tokens, length)) <= set(row.tolist())
        assert sorted(row.tolist() + dropped.tolist()) == list(range(length))


def test_anchored_frames_lose_nothing_unless_asked():
    grid = TokenGrid(4, 3, 3)
    anchored = [True, False, False, True]
    chosen = select_tokens(plan(), evidence(grid), 2, anchored)
    counts = (chosen.index[0] // 9).bincount(minlength=4)
    assert counts.tolist() == [9, 2, 2, 9]
    loose = select_tokens(plan(anchor=False), evidence(grid), 2, anchored)
    assert (loose.index[0] // 9).bincount(minlength=4).tolist() == [2, 2, 2, 2]


def test_attention_finds_the_token_that_all_look_at():
    grid = TokenGrid(2, 4, 4)
    seen = evidence(grid, batch=1)
    noise = torch.randn(2, 1, 32, 2, 6)
    direction = torch.nn.functional.normalize(torch.ones(6), dim=0)
    q = direction.expand(1, 32, 2, 6) + 0.01 * noise[0]
    k = 0.01 * noise[1]
    k[0, [5, 27]] += 30 * direction
    seen.received = attention_received(grid, q, k)
    assert select_tokens(plan(alpha=1.0), seen, 1).index.tolist() == [[5, 27]]


@pytest.mark.parametrize(("alpha", "second"), [(1.0, 3), (0.25, 4), (0.5, 4), (0.9, 3)])
def test_the_plans_alpha_smooths_where_tokens_are_chosen(alpha, second):
    """TAPE's eq. 2 by hand: token 1 had 8 in the latent frame before, 0 has 4 now.

    0 + 0.25 * 4 = 1 against 6 + 0.25 = 6.25; 0.5: 2 against 4.5; 0.9: 3.6 against 1.7.
    """
    grid = TokenGrid(2, 1, 3)
    seen = evidence(grid, batch=1)
    seen.change = torch.tensor([[0.0, 8.0, 0.0, 4.0, 1.0, 0.0]])
    chosen = select_tokens(plan(alpha=alpha, importance="velocity_change"), seen, 1)
    assert chosen.index.tolist() == [[1, second]]


def test_random_is_the_same_for_a_seed_and_differs_between_seeds():
    grid = TokenGrid(3, 5, 5)
    first, again, other = (evidence(grid) for _ in range(3))
    other.seed = 4
    chosen, same, differs = (
        select_tokens(plan(importance="random"), seen, 5).index for seen in (first, again, other)
    )
    assert torch.equal(chosen, same)
    assert not torch.equal(chosen, differs)


def test_gather_then_scatter_is_the_identity_on_kept_and_leaves_the_rest():
    hidden = torch.randn(2, 9, 4)
    index = torch.tensor([[0, 3, 8], [1, 2, 5]])
    kept = gather_tokens(hidden, index)
    assert torch.equal(kept[1, 2], hidden[1, 5])
    assert torch.equal(scatter_tokens(hidden, index, kept), hidden)
    changed = scatter_tokens(hidden, index, kept + 1)
    assert torch.equal((changed != hidden).any(-1).nonzero()[:, 1].view(2, 3), index)


def test_gather_shares_rotary_tables_between_samples():
    table = torch.randn(1, 9, 1, 3, 2, 2)
    index = torch.tensor([[0, 3], [1, 2]])
    got = gather_tokens(table, index)
    assert got.shape == (2, 2, 1, 3, 2, 2)
    assert torch.equal(got[1, 0], table[0, 1])
    assert gather_tokens(table, index[:1]).shape == (1, 2, 1, 3, 2, 2)


def test_budget_never_empties_a_frame_and_respects_the_window():
    grid = TokenGrid(2, 3, 3)
    tight = TokenPlan(Schedule(0.01, "constant"))
    assert tight.budget(0.5, grid) == 1
    window = plan(start=0.2, end=0.6)
    assert [window.keep_at(p) < 1 for p in (0.1, 0.2, 0.6, 0.7)] == [False, True, True, False]
    spared = plan(start=0.2, end=0.8, spare=0.4)
    places = (0.1, 0.2, 0.3, 0.3996, 0.4, 0.8, 0.9)
    assert [spared.spares(p) for p in places] == [False, True, True, False, False, False, False]
    assert [spared.keep_at(p) < 1 for p in places] == [False] * 3 + [True] * 3 + [False]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reselect_every": 0}, "reselect_every.*got 0"),
        ({"alpha": 1.5}, "alpha.*got 1.5"),
        ({"importance": "magic"}, "attention.*'magic'"),
        ({"dropped_kv": "maybe"}, "leave, keep.*'maybe'"),
        ({"start": 0.8, "end": 0.2}, "start <= end.*0.8 and 0.2"),
        ({"spare": 1.5}, "spare: expected 0 to 1, got 1.5"),
        ({"query_ratio": 0.0}, "query_ratio.*got 0.0"),
    ],
)
def test_bad_values_say_what_was_expected(options, said):
    with pytest.raises(ValueError, match=said):
        plan(**options)
