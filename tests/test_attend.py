"""Heads in cheap patterns against dense attention with the mask that the pattern stands for."""

import pytest
import torch
import torch.nn.functional as F

from wantrim.engine.block import Attend
from wantrim.methods.attend import SAMPLED, HeadGroups, Layout, attend_few, pattern_pairs
from wantrim.methods.grid import TokenGrid, other_positions
from wantrim.methods.heads import CHEAP, FULL, OFF, TILES, HeadPlan

EVERY = (FULL, *CHEAP, OFF)
# frames, height, width, tokens before and behind the grid, batch
GRIDS = [
    (3, 4, 6, 0, 0, 2),
    (5, 6, 6, 0, 0, 1),
    (2, 5, 7, 3, 2, 2),
    (1, 1, 1, 0, 0, 1),
    (3, 3, 5, 0, 4, 1),
    (3, 9, 7, 0, 0, 1),
]


def attention(q, k, v, mask=None) -> torch.Tensor:
    parts = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2)


def some_kept(grid: TokenGrid, length: int, batch: int, anchored: bool):
    """Positions [b, kept] with two thirds of each latent frame, and how many each keeps."""
    per_frame = [max(1, grid.per_frame * 2 // 3)] * grid.frames
    if anchored:
        per_frame[0] = grid.per_frame
    random = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(batch):
        mask = torch.ones(length, dtype=torch.bool)
        for frame, count in enumerate(per_frame):
            start = grid.start + frame * grid.per_frame
            left_out = torch.randperm(grid.per_frame, generator=random)[count:]
            mask[start + left_out] = False
        rows.append(mask.nonzero()[:, 0])
    return torch.stack(rows), per_frame


def group_of(position: torch.Tensor, grid: TokenGrid, pattern: str) -> torch.Tensor:
    """Number of the group that each position [s] belongs to, -1 outside the grid."""
    at = position - grid.start
    frame = at // grid.per_frame
    inside = (at >= 0) & (at < grid.tokens)
    if pattern == "frame":
        return torch.where(inside, frame, -1)
    side, group = TILES[pattern], torch.full_like(position, -1)
    for number in range(grid.frames):
        here = (inside & (frame == number)).nonzero()[:, 0]
        y, x = at[here] % grid.per_frame // grid.width, at[here] % grid.width
        tile = (y * side // grid.height) * side + x * side // grid.width
        for part, some in enumerate(torch.tensor_split(here[tile.argsort(stable=True)], side**2)):
            group[some] = part
    return group


KEPT = ["all", "some", "anchored", "others are keys"]


def a_call(size, kept: str, scale: float = 1.0):
    """Of one self-attention: layout, positions of queries and of further keys, and q, k, v in fp64."""
    frames, height, width, before, after, batch = size
    grid = TokenGrid(frames, height, width, before)
    length = before + grid.tokens + after
    position, per_frame, others = torch.arange(length).expand(batch, -1), None, None
    layout = Layout(grid, length)
    if kept != "all":
        position, per_frame = some_kept(grid, length, batch, kept == "anchored")
        others = other_positions(position, length) if kept == "others are keys" else None
        layout = Layout(grid, length, position, per_frame, others)
    keys = position.shape[1] + (0 if others is None else others.shape[1])
    random = torch.Generator().manual_seed(1)
    q = torch.randn(batch, position.shape[1], len(EVERY), 8, dtype=torch.float64, generator=random)
    k, v = torch.randn(2, batch, keys, len(EVERY), 8, dtype=torch.float64, generator=random)
    return layout, position, others, scale * q, k, v


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_every_pattern_is_dense_attention_with_its_mask(size, kept):
    layout, position, others, q, k, v = a_call(size, kept)
    grid, batch = layout.grid, len(q)

    out = HeadGroups(EVERY).attend(q, k, v, attention, layout)

    assert torch.equal(out[:, :, EVERY.index(OFF)], torch.zeros_like(q[:, :, 0]))
    for head, pattern in enumerate(EVERY[:-1]):
        for b in range(batch):
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
            if pattern != FULL:
                mine = group_of(position[b], grid, pattern)
                theirs = mine
                if others is not None:
                    theirs = torch.cat([mine, group_of(others[b], grid, pattern)])
                mask = (mine[:, None] == theirs) | (mine[:, None] < 0) | (theirs < 0)
            one = slice(head, head + 1)
            dense = attention(
                q[b : b + 1, :, one], k[b : b + 1, :, one], v[b : b + 1, :, one], mask
            )
            torch.testing.assert_close(out[b : b + 1, :, one], dense, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_each_latent_frame_is_given_back_the_mean_of_what_a_few_tokens_lack(size, kept):
    layout, position, _, q, k, v = a_call(size, kept, scale=2.0)
    grid, some = layout.grid, layout.sampled(q.device)
    frame_of = (position[0] - grid.start).div(grid.per_frame, rounding_mode="floor")
    few = min(SAMPLED, *layout.counts())
    assert frame_of[some].tolist() == [f for f in range(grid.frames) for _ in range(few)]
    assert len(set(some.tolist())) == len(some)

    bare = HeadGroups(EVERY).attend(q, k, v, attention, layout)
    out = HeadGroups(EVERY, corrected=True).attend(q, k, v, attention, layout)

    lacks = attention(q, k, v) - bare
    wanted = bare.clone()
    inside = (frame_of >= 0) & (frame_of < grid.frames)
    means = [lacks[:, some[frame_of[some] == f]].mean(1, keepdim=True) for f in range(grid.frames)]
    for f, mean in enumerate(means):
        wanted[:, frame_of == f] += mean
    # a head that is off tells the others nothing, any other one lets them see everything
    off = EVERY.index(OFF)
    wanted[:, ~inside, off] = torch.cat(means, 1).mean(1, keepdim=True)[:, :, off]
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)
    assert torch.equal(out[:, :, EVERY.index(FULL)], bare[:, :, EVERY.index(FULL)])


@pytest.mark.parametrize("kept", KEPT)
def test_gradients_go_through_what_is_given_back(kept):
    layout, _, _, q, k, v = a_call(GRIDS[2], kept)
    inputs = [t[..., :2].clone().requires_grad_(True) for t in (q, k, v)]

    def corrected(*given):
        return HeadGroups(EVERY, corrected=True).attend(*given, attention, layout)

    torch.autograd.gradcheck(corrected, inputs, fast_mode=True)


@pytest.mark.parametrize("pattern", CHEAP)
@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_a_few_tokens_alone_get_what_they_get_among_all(size, pattern):
    layout, _, _, q, k, v = a_call(size, "all")
    some = layout.sampled(q.device)
    among = HeadGroups([pattern] * len(EVERY)).attend(q, k, v, attention, layout)[:, some]
    alone = attend_few(q[:, some], k, v, attention, layout, pattern)
    torch.testing.assert_close(alone, among, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reshaping_loses_no_more_than_dense_attention_does(dtype):
    grid = TokenGrid(5, 9, 7)
    random = torch.Generator().manual_seed(2)
    exact = torch.randn(3, 2, grid.tokens, 4, 16, dtype=torch.float64, generator=random)
    patterns = ("frame", "tile2", "tile2", "frame")
    layout = Layout(grid, grid.tokens)
    truth = HeadGroups(patterns).attend(*exact, attention, layout)
    rounded = HeadGroups(patterns).attend(*exact.to(dtype), attention, layout)
    budget = (attention(*exact.to(dtype)).double() - attention(*exact)).abs().max()
    assert rounded.dtype == dtype
    # shorter sequences average less of the rounding away
    assert (rounded.double() - truth).abs().max() < 8 * budget


def test_tiles_are_rectangles_where_the_picture_divides():
    grid = TokenGrid(2, 4, 6)
    groups, _ = Layout(grid, grid.tokens).groups("tile2", torch.device("cpu"))
    first = groups.order[0, : groups.sizes[0]].tolist()
    corner = [0, 1, 2, 6, 7, 8]
    assert first == corner + [24 + at for at in corner]
    assert groups.sizes == [12] * 4


def test_all_heads_full_is_the_hosts_one_call():
    calls = []

    def counted(q, k, v):
        calls.append(q.shape)
        return attention(q, k, v)

    grid = TokenGrid(2, 3, 5)
    q, k, v = torch.randn(3, 1, grid.tokens, 4, 8)
    out = HeadGroups([FULL] * 4).attend(q, k, v, counted, Layout(grid, grid.tokens))
    assert torch.equal(out, attention(q, k, v)) and calls == [q.shape]


def test_heads_that_are_off_are_never_computed():
    widths = []

    def counted(q, k, v):
        widths.append((q.shape[1], q.shape[2]))
        return attention(q, k, v)

    grid = TokenGrid(3, 4, 4)
    q, k, v = torch.randn(3, 1, grid.tokens, 5, 8)
    patterns = [OFF, FULL, OFF, "frame", "frame"]
    HeadGroups(patterns).attend(q, k, v, counted, Layout(grid, grid.tokens))
    # the frames are a batch of their own
    assert sorted(widths) == [(16, 2), (48, 1)]


def test_pairs_of_a_pattern_are_those_that_are_computed():
    for grid in (TokenGrid(3, 4, 6), TokenGrid(2, 5, 7)):
        for per_frame in (None, [7] * grid.frames, [grid.per_frame, *[5] * (grid.frames - 1)]):
            if per_frame is None:
                layout = Layout(grid, grid.tokens)
            else:
                kept = torch.cat(
                    [torch.arange(n) + f * grid.per_frame for f, n in enumerate(per_frame)]
                )
                layout = Layout(grid, grid.tokens, kept[None], per_frame)
            for pattern in EVERY:
                pairs = []

                def counted(q, k, v, pairs=pairs):
                    pairs.append(q.shape[0] * q.shape[1] * k.shape[1])
                    return attention(q, k, v)

                q = torch.randn(1, sum(layout.counts()), 1, 4)
                HeadGroups([pattern]).attend(q, q, q, counted, layout)
                assert sum(pairs) == pattern_pairs(pattern, grid, per_frame), (grid, pattern)


def test_head_plans_know_what_they_are():
    full = HeadPlan.full(3, 4)
    assert full.neutral and full.count(FULL) == 12
    some = HeadPlan.keeping(4, [[0, 1], [0, 1, 2, 3]], [[0, 1, 2, 3], [3]])
    assert some.self_attention[0] == (FULL, FULL, OFF, OFF)
    assert some.cross_attention[1] == (OFF, OFF, OFF, FULL)
    assert some.changes(0) and some.changes(1) and not some.neutral


@pytest.mark.parametrize("keys", [7, 29], ids=["fewer", "more"])
def test_a_call_on_other_keys_in_front_is_left_whole(keys):
    """What another node puts in front of self-attention is neither of its patterns nor of the text's."""
    grid = TokenGrid(2, 3, 4)
    q, k, v, text = (torch.randn(1, n, 2, 8) for n in (24, 24, 24, 5))
    other = torch.randn(1, keys, 2, 8)
    looked = []
    pair = HeadGroups(["frame", OFF]), HeadGroups([OFF, FULL])
    attend = Attend(lambda *seen: looked.append(seen), heads=pair, layout=Layout(grid, 24))
    assert torch.equal(attend(q, other, other, attention), attention(q, other, other))
    assert not attend.seen and not looked
    own = attend(q, k, v, attention)
    assert attend.seen and len(looked) == 1
    assert torch.equal(own, pair[0].attend(q, k, v, attention, attend.layout))
    assert not own[:, :, 1].any() and not torch.equal(own, attention(q, k, v))
    of_text = attend(q, text, text, attention)
    assert torch.equal(of_text, pair[1].attend(q, text, text, attention))
    assert not of_text[:, :, 0].any()
