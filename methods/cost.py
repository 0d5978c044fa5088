"""What a Wan forward costs in FLOPs, dense or trimmed; 1 multiply-add is 2 FLOPs.

Counts matrix products and attention, as torch's flop counter does. Rates, bytes and times are not
here: a FLOP saved is not a second saved on a small video.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .attend import pattern_pairs
from .fingerprint import Fingerprint
from .grid import TokenGrid
from .heads import FRAME, FULL, OFF, TILES, HeadPlan
from .importance import query_count
from .tokens import TokenPlan
from .width import Width


@dataclass(frozen=True)
class WanShape:
    """Sizes of a Wan transformer.

    Args:
        patch: (t, h, w) of the patch embedding.
        text_tokens: length of the text that the model is given, padding included.
        image_tokens: CLIP tokens of Wan2.1 image-to-video, else 0.
    """

    dim: int
    ffn_dim: int
    num_blocks: int
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    text_tokens: int = 512
    text_dim: int = 4096
    freq_dim: int = 256
    image_tokens: int = 0
    image_dim: int = 1280
    head_dim: int = 128

    @classmethod
    def of(cls, model: Fingerprint, text_tokens: int = 512, image_tokens: int = 0) -> WanShape:
        """The sizes that a fingerprint has; the others are those of every Wan."""
        return cls(
            model.dim,
            model.ffn_dim,
            model.num_blocks,
            model.in_channels,
            model.out_channels,
            text_tokens=text_tokens,
            image_tokens=image_tokens,
            head_dim=model.head_dim,
        )


def block_parameters(shape: WanShape, width: tuple[int, int, int] | None = None) -> int:
    """Numbers that a block stores.

    Args:
        width: self-attention heads, cross-attention heads and FFN channels of a slim block.
    """
    d, inner, cross_inner, channels = shape.dim, shape.dim, shape.dim, shape.ffn_dim
    if width is not None:
        inner, cross_inner = width[0] * shape.head_dim, width[1] * shape.head_dim
        channels = width[2]

    def attention(inner: int) -> int:
        # q, k, v with their biases, the norms of q and k, and o
        return 3 * inner * (d + 1) + 2 * inner + d * (inner + 1)

    image = cross_inner * (2 * (d + 1) + 1) if shape.image_tokens else 0
    ffn = channels * (d + 1) + d * (channels + 1)
    # the modulation and the norm before cross-attention
    return attention(inner) + attention(cross_inner) + image + ffn + 8 * d


def block_flops(
    shape: WanShape,
    tokens: int,
    extra_keys: int = 0,
    *,
    self_pairs: int | None = None,
    cross_heads: int | None = None,
    width: tuple[int, int, int] | None = None,
) -> int:
    """One block on `tokens` tokens of one sample.

    Args:
        extra_keys: dropped tokens that still serve as keys and values; the host's own block makes
            their q, k and v.
        self_pairs: query-key pairs of all self-attention heads together; None is full attention.
        cross_heads: cross-attention heads that are computed; None is all that the block has.
        width: self-attention heads, cross-attention heads and FFN channels of a slim block.
    """
    d, context = shape.dim, shape.text_tokens + shape.image_tokens
    inner, cross_inner, channels = d, d, shape.ffn_dim
    if width is not None:
        inner, cross_inner = width[0] * shape.head_dim, width[1] * shape.head_dim
        channels = width[2]
    attention = 4 * tokens * (tokens + extra_keys) * inner
    if self_pairs is not None:
        attention = 4 * self_pairs * shape.head_dim
    attended = cross_inner if cross_heads is None else cross_heads * shape.head_dim
    projections = (8 * tokens + 6 * extra_keys) * d * inner
    cross = 4 * (tokens + context) * d * cross_inner + 4 * tokens * context * attended
    return projections + attention + cross + 4 * tokens * d * channels


def outside_flops(shape: WanShape, tokens: int) -> int:
    """Everything outside the blocks, once a sample: patches, text, time, image and the head."""
    d, patch = shape.dim, math.prod(shape.patch)
    patches = 2 * tokens * patch * d * (shape.in_channels + shape.out_channels)
    text = 2 * shape.text_tokens * (shape.text_dim * d + d * d)
    time = 2 * (shape.freq_dim * d + 7 * d * d)
    clip = shape.image_tokens * (2 * shape.image_dim**2 + 2 * shape.image_dim * d)
    return patches + text + time + clip


def forward_flops(
    shape: WanShape,
    tokens: int,
    kept_per_block: Sequence[int] | None = None,
    extra_keys=False,
    *,
    grid: TokenGrid | None = None,
    anchored_frames: int = 0,
    heads: HeadPlan | None = None,
    width: Width | None = None,
) -> int:
    """One forward of one sample.

    Args:
        kept_per_block: tokens that each block computes; None is all in every block.
        extra_keys: dropped tokens stay as keys and values.
        grid: of these tokens; `heads` needs it.
        anchored_frames: latent frames that keep all their tokens.
        heads: patterns in place: the projections of a head that is off are still computed.
        width: of a slim model; the heads of `heads` are then those that it keeps.

    Raises:
        ValueError: heads without a grid.
    """
    if kept_per_block is None:
        kept_per_block = [tokens] * shape.num_blocks
    if heads is not None and grid is None:
        raise ValueError("grid: expected the token grid, which the heads' patterns depend on")
    total = outside_flops(shape, tokens)
    for index, kept in enumerate(kept_per_block):
        extra = tokens - kept if extra_keys else 0
        pairs = cross_heads = sizes = None
        if heads is not None:
            counts = _per_frame(grid, kept, anchored_frames)
            pairs = _pairs(heads.self_attention[index], grid, counts, extra > 0)
            cross_heads = heads.cross_attention[index].count(FULL)
        if width is not None:
            sizes = width.sizes(index)
        total += block_flops(
            shape, kept, extra, self_pairs=pairs, cross_heads=cross_heads, width=sizes
        )
    return total


def _per_frame(grid: TokenGrid, kept: int, anchored_frames: int) -> list[int]:
    """Tokens of each latent frame, of `kept` in all."""
    if kept == grid.tokens:
        return [grid.per_frame] * grid.frames
    free = grid.frames - anchored_frames
    each = (kept - anchored_frames * grid.per_frame) // free
    return [grid.per_frame] * anchored_frames + [each] * free


def _pairs(patterns: Sequence[str], grid: TokenGrid, counts: list[int], keep_kv: bool) -> int:
    """Query-key pairs of a block's self-attention; with `keep_kv` dropped tokens are keys too."""
    total, own = 0, sum(counts)
    left = [grid.per_frame - count for count in counts]
    for name in set(patterns) - {OFF}:
        pairs = pattern_pairs(name, grid, counts)
        if keep_kv and name == FRAME:
            pairs += sum(a * b for a, b in zip(counts, left, strict=True))
        elif keep_kv:
            # tiles of one frame differ by a token at most
            pairs += own * sum(left) // (TILES[name] ** 2 if name in TILES else 1)
        total += patterns.count(name) * pairs
    return total


def planned_tokens(
    plan: TokenPlan,
    grid: TokenGrid,
    num_blocks: int,
    progress: Sequence[float],
    anchored_frames: int = 0,
) -> list[list[int]]:
    """Tokens that each block will compute, per step: the session's rules without a run."""
    anchored = anchored_frames if plan.anchor else 0
    steps, remembered = [], False
    for at in progress:
        budget = plan.budget(at, grid)
        kept = anchored * grid.per_frame + (grid.frames - anchored) * budget
        if plan.remembers and budget < grid.per_frame and not remembered:
            # nothing to fall back on in the first step that drops tokens
            kept, remembered = grid.tokens, True
        whole = budget == grid.per_frame
        steps.append(
            [
                grid.tokens if whole or (plan.reselects(i) and not plan.trim_reselecting) else kept
                for i in range(num_blocks)
            ]
        )
    return steps


def plan_flops(
    shape: WanShape,
    plan: TokenPlan | None,
    grid: TokenGrid,
    progress: Sequence[float],
    anchored_frames: int = 0,
    prompts: int = 2,
    *,
    heads: HeadPlan | None = None,
    width: Width | None = None,
) -> int:
    """A whole sampling run of one video, choosing the tokens included.

    Args:
        plan: None computes all tokens.
        prompts: 2 with guidance, 1 without.
        heads, width: as for `forward_flops`.
    """
    sizes = {"grid": grid, "heads": heads, "width": width}
    if plan is None:
        return len(progress) * prompts * forward_flops(shape, grid.tokens, **sizes)
    total = 0
    chooses = [
        i
        for i in range(shape.num_blocks - 1)
        if plan.reselects(i) and not (plan.reselects(i + 1) and not plan.trim_reselecting)
    ]
    keep_kv = plan.dropped_kv == "keep"
    queries = query_count(grid, plan.query_ratio, plan.min_queries)
    inner = [shape.dim if width is None else width.sizes(i)[0] * shape.head_dim for i in chooses]
    scored = 2 * queries * grid.tokens * sum(inner)
    if plan.anchor:
        sizes["anchored_frames"] = anchored_frames
    per_step = planned_tokens(plan, grid, shape.num_blocks, progress, anchored_frames)
    for kept, at in zip(per_step, progress, strict=True):
        total += prompts * forward_flops(shape, grid.tokens, kept, keep_kv, **sizes)
        trims = plan.budget(at, grid) < grid.per_frame
        if trims and plan.needs_attention:
            total += scored
        if trims and plan.restore == "frame_mean":
            rows = (2 * grid.frames * k * shape.dim for k in kept if k < grid.tokens)
            total += prompts * sum(rows)
    return total


def run_flops(
    shape: WanShape,
    grid: TokenGrid,
    progress: Sequence[float],
    anchored_frames: int = 0,
    prompts: int = 2,
    *,
    tokens: TokenPlan | None = None,
    heads: HeadPlan | None = None,
    blocks_run: Sequence[int] | None = None,
    width: Width | None = None,
) -> float:
    """A whole sampling run in which tokens, heads and blocks are trimmed together.

    Which blocks a step skips is the router's choice, so that a skipped one counts as their mean.

    Args:
        tokens: None computes all of them.
        heads: trimmed at a progress between its start and end.
        blocks_run: blocks that run at each step; None is all in every step.
        prompts, width: as for `plan_flops`.
    """
    blocks, outside = shape.num_blocks, outside_flops(shape, grid.tokens)
    anchored = anchored_frames if tokens is not None and tokens.anchor else 0
    keep_kv = tokens is not None and tokens.dropped_kv == "keep"
    per_step = [[grid.tokens] * blocks] * len(progress)
    if tokens is not None:
        per_step = planned_tokens(tokens, grid, blocks, progress, anchored_frames)
    known: dict[tuple, int] = {}

    def forward(kept: list[int], plan: HeadPlan | None) -> int:
        key = (*kept, plan is None)
        if key not in known:
            sizes = {"grid": grid, "anchored_frames": anchored, "heads": plan, "width": width}
            known[key] = forward_flops(shape, grid.tokens, kept, keep_kv, **sizes)
        return known[key]

    total = 0.0
    if tokens is not None and (tokens.needs_attention or tokens.restore == "frame_mean"):
        # what choosing and standing in cost
        total = plan_flops(shape, tokens, grid, progress, anchored_frames, prompts, width=width)
        total -= prompts * sum(forward(kept, None) for kept in per_step)
    for index, (at, kept) in enumerate(zip(progress, per_step, strict=True)):
        inside = heads is not None and heads.trims_at(at)
        share = 1.0 if blocks_run is None else blocks_run[index] / blocks
        whole = forward(kept, heads if inside else None)
        total += prompts * (outside + share * (whole - outside))
    return total
