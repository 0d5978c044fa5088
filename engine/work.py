"""What a program costs: the sum over its rows of the block's own work and of ours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..methods.attend import pattern_pairs, sampled_queries
from ..methods.cost import ROTARY_NUMBERS, WanShape, Width, Work, block_work, outside_flops
from ..methods.grid import TokenGrid
from ..methods.heads import FRAME, FULL, OFF, TILES
from ..methods.importance import scoring_queries
from ..methods.role_plan import CHOICES
from .plan import TrimPlan
from .program import KEPT, READ, SKIP, UPDATE, WRITE, Program, Row

# times that repeating a prompt's velocity goes over its latent in fp32 and in its own numbers, in
# numbers of 16 bits; as counted
REPEATING = 136
# times that a correction goes over what its few queries give; as counted
SAMPLED_PASSES = 10


def program_work(
    shape: WanShape,
    program: Program,
    plan: TrimPlan,
    prompts: int = 1,
    *,
    width: Width | None = None,
    rows: Sequence[Row] | None = None,
) -> Work:
    """A step of one video, ours included.

    Args:
        prompts: 2 with guidance, 1 without; what is chosen is chosen once.
        width: of a slim model; the heads of the plan are then those that it keeps.
        rows: what ran, in place of what the program says.
    """
    rows = program.rows if rows is None else rows
    if all(row.run == SKIP for row in rows) and program.repeats:
        latent = program.grid.tokens * math.prod(shape.patch) * shape.out_channels
        return Work(moved=REPEATING * prompts * latent)
    total = Work(outside_flops(shape, program.grid.tokens)) * prompts
    known: dict[tuple, Work] = {}
    for index, row in enumerate(rows):
        if row.run == SKIP:
            continue
        sizes = None if width is None else width.sizes(index)
        heads = program.heads
        patterns = row.heads and (heads.self_attention[index], heads.cross_attention[index])
        key = (row.tokens, row.context, patterns, sizes)
        if key not in known:
            known[key] = _row_work(shape, row, program, patterns, sizes)
        total += known[key] * prompts
        if row.choose:
            queries = scoring_queries(program.grid)
            total += Work(attention=2 * queries * program.grid.tokens * _inner(shape, sizes))
        if row.measure:
            total += _measurement(shape, program.grid, sizes)
    return total + Work(moved=_moving(shape, rows, program)) * prompts


def _row_work(shape, row: Row, program: Program, patterns, sizes) -> Work:
    grid = program.grid
    reads = row.context in (READ, UPDATE) and row.tokens < grid.tokens
    extra = grid.tokens - row.tokens if reads else 0
    pairs = cross_heads = None
    few = 0
    if patterns:
        counts, (own, cross) = _per_frame(grid, row.tokens, program.anchored), patterns
        pairs, cross_heads = _pairs(own, grid, counts, reads), cross.count(FULL)
        if program.heads.corrected and own.count(FULL) < len(own):
            # queries that attend to everything
            few = sampled_queries(counts)
            pairs += len(own) * few * (row.tokens + extra)
    work = block_work(
        shape, row.tokens, extra, self_pairs=pairs, cross_heads=cross_heads, width=sizes
    )
    inner = _inner(shape, sizes)
    # keys and values, and their scales in fp16, in numbers of 16 bits for each of `inner`
    packed = 2 * (program.bits / 16 + 1 / shape.head_dim)
    moved = 0.0
    if row.context in (WRITE, UPDATE):
        # read in full, written packed
        moved += row.tokens * inner * (2 + packed)
    if extra:
        # those of the kept tokens, the packed ones, and both behind each other
        moved += inner * (2 * row.tokens + packed * extra + 2 * grid.tokens)
    if patterns:
        moved += _apart(own, row.tokens, row.tokens + extra) * shape.head_dim
        if few:
            moved += (2 * row.tokens + SAMPLED_PASSES * few) * inner
        # the image's tokens are attended to in a call of their own
        for keys in filter(None, (shape.text_tokens, shape.image_tokens)):
            moved += _apart(cross, row.tokens, keys) * shape.head_dim
    return work + Work(moved=moved)


def _apart(patterns: Sequence[str], queries: int, keys: int) -> int:
    """Rows of heads that are read and written beside attention where they go in patterns."""
    off = patterns.count(OFF)
    if patterns.count(FULL) == len(patterns):
        return 0
    # q, k and v are taken out and the result put in; of a head that is off zeros are
    return 4 * (queries + keys) * (len(patterns) - off) + queries * off


def _moving(shape: WanShape, rows: Sequence[Row], program: Program) -> int:
    """Numbers moved to take the kept tokens out of the sequence and to put them back.

    Once a stretch of blocks where nobody else looks at them there, else around each block.
    """
    tokens, moved = program.grid.tokens, 0
    short = rotary = chose = False
    for row in rows:
        if row.run == SKIP:
            continue
        kept = row.run == KEPT and row.tokens < tokens
        if kept and not rotary:
            moved += 2 * row.tokens * ROTARY_NUMBERS * shape.head_dim
        if kept and not (short and program.alone):
            # back into what the choosing block gave if nobody else has it, else into a copy
            copied = 0 if chose and program.alone else tokens
            moved += 2 * (2 * row.tokens + copied) * shape.dim
        short, chose = kept, row.choose
        # taken once a choice
        rotary = (rotary or kept) and not chose
    return moved


def _measurement(shape: WanShape, grid: TokenGrid, sizes) -> Work:
    """What a block's heads lack in each pattern, at a few queries of one prompt."""
    inner, queries = _inner(shape, sizes), sampled_queries([grid.per_frame] * grid.frames)
    seen = sum(pattern_pairs(name, grid) for name in CHOICES) / grid.tokens
    # keys and values of tiles are taken out
    moved = 4 * grid.tokens * inner * len(TILES)
    return Work(attention=4 * queries * seen * inner, moved=moved)


def _inner(shape: WanShape, sizes) -> int:
    return shape.dim if sizes is None else sizes[0] * shape.head_dim


def _per_frame(grid: TokenGrid, kept: int, anchored_frames: int) -> list[int]:
    """Tokens of each latent frame, of `kept` in all."""
    if kept == grid.tokens:
        return [grid.per_frame] * grid.frames
    free = grid.frames - anchored_frames
    each = (kept - anchored_frames * grid.per_frame) // free
    return [grid.per_frame] * anchored_frames + [each] * free


def _pairs(patterns: Sequence[str], grid: TokenGrid, counts: list[int], reads: bool) -> int:
    """Query-key pairs of a block's self-attention; with `reads` left out tokens are keys too."""
    total, own = 0, sum(counts)
    left = [grid.per_frame - count for count in counts]
    for name in set(patterns) - {OFF}:
        pairs = pattern_pairs(name, grid, counts)
        if reads and name == FRAME:
            pairs += sum(a * b for a, b in zip(counts, left, strict=True))
        elif reads:
            # tiles of one frame differ by a token at most
            pairs += own * sum(left) // (TILES[name] ** 2 if name in TILES else 1)
        total += patterns.count(name) * pairs
    return total
