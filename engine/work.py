"""What a program costs: the sum over its rows of the block's own work and of ours."""

from __future__ import annotations

from collections.abc import Sequence

from ..methods.attend import pattern_pairs
from ..methods.cost import ROTARY_NUMBERS, WanShape, Width, Work, block_work, outside_flops
from ..methods.grid import TokenGrid
from ..methods.heads import FRAME, FULL, OFF, TILES
from ..methods.importance import scoring_queries
from ..methods.role_plan import measured_queries
from .plan import TrimPlan
from .program import KEPT, READ, SKIP, UPDATE, WRITE, Program, Row

# keys and values in 8 bits, in numbers of 16
PACKED = 2 * 8 / 16


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
        # the model's own latent is read and written
        return Work(moved=3 * prompts * program.grid.tokens * shape.out_channels)
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
            total += _scores(shape, scoring_queries(program.grid), program.grid, sizes)
        if row.measure:
            total += _scores(shape, measured_queries(program.grid), program.grid, sizes)
    return total + _moving(shape, rows, program.grid) * prompts


def _row_work(shape, row: Row, program: Program, patterns, sizes) -> Work:
    grid = program.grid
    reads = row.context in (READ, UPDATE) and row.tokens < grid.tokens
    extra = grid.tokens - row.tokens if reads else 0
    pairs = cross_heads = None
    if patterns:
        counts = _per_frame(grid, row.tokens, program.anchored)
        pairs = _pairs(patterns[0], grid, counts, reads)
        cross_heads = patterns[1].count(FULL)
    work = block_work(
        shape, row.tokens, extra, self_pairs=pairs, cross_heads=cross_heads, width=sizes
    )
    inner = shape.dim if sizes is None else sizes[0] * shape.head_dim
    moved = 0.0
    if row.context in (WRITE, UPDATE):
        # read in full, written packed
        moved += row.tokens * inner * (2 + PACKED)
    if extra:
        # those of the kept tokens, the packed ones, and both behind each other
        moved += inner * (2 * row.tokens + PACKED * extra + 2 * grid.tokens)
    return work + Work(moved=moved)


def _moving(shape: WanShape, rows: Sequence[Row], grid: TokenGrid) -> Work:
    """Taking the kept tokens out of the sequence, once a stretch of blocks, and putting them back."""
    moved, inside = 0, False
    for row in rows:
        if row.run == SKIP:
            continue
        kept = row.run == KEPT and row.tokens < grid.tokens
        if kept and not inside:
            moved += 2 * row.tokens * (shape.dim + ROTARY_NUMBERS * shape.head_dim)
            # and back: a copy of all, then the kept ones
            moved += 2 * (grid.tokens + row.tokens) * shape.dim
        inside = kept
    return Work(moved=moved)


def _scores(shape: WanShape, queries: int, grid: TokenGrid, sizes) -> Work:
    """Attention scores of some queries, by which a block chooses tokens or measures its heads."""
    inner = shape.dim if sizes is None else sizes[0] * shape.head_dim
    return Work(attention=2 * queries * grid.tokens * inner)


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
