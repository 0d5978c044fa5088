"""What a Wan forward costs in FLOPs, dense or trimmed; 1 multiply-add is 2 FLOPs.

Counts matrix products and attention, as torch's flop counter does. Rates, bytes and times are not
here: a FLOP saved is not a second saved on a small video.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .grid import TokenGrid
from .importance import query_count
from .tokens import TokenPlan


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


def block_flops(shape: WanShape, tokens: int, extra_keys: int = 0) -> int:
    """One block on `tokens` tokens of one sample.

    Args:
        extra_keys: dropped tokens that still serve as keys and values; the host's own block makes
            their q, k and v.
    """
    d, text, image = shape.dim, shape.text_tokens, shape.image_tokens
    projections = 8 * tokens * d * d + 6 * extra_keys * d * d
    attention = 4 * tokens * (tokens + extra_keys) * d
    cross = 4 * (tokens + text + image) * d * d + 4 * tokens * (text + image) * d
    return projections + attention + cross + 4 * tokens * d * shape.ffn_dim


def outside_flops(shape: WanShape, tokens: int) -> int:
    """Everything outside the blocks, once a sample: patches, text, time, image and the head."""
    d, patch = shape.dim, math.prod(shape.patch)
    patches = 2 * tokens * patch * d * (shape.in_channels + shape.out_channels)
    text = 2 * shape.text_tokens * (shape.text_dim * d + d * d)
    time = 2 * (shape.freq_dim * d + 7 * d * d)
    clip = shape.image_tokens * (2 * shape.image_dim**2 + 2 * shape.image_dim * d)
    return patches + text + time + clip


def forward_flops(
    shape: WanShape, tokens: int, kept_per_block: Sequence[int] | None = None, extra_keys=False
) -> int:
    """One forward of one sample.

    Args:
        kept_per_block: tokens that each block computes; None is all in every block.
        extra_keys: dropped tokens stay as keys and values.
    """
    if kept_per_block is None:
        kept_per_block = [tokens] * shape.num_blocks
    blocks = (block_flops(shape, k, tokens - k if extra_keys else 0) for k in kept_per_block)
    return outside_flops(shape, tokens) + sum(blocks)


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
    plan: TokenPlan,
    grid: TokenGrid,
    progress: Sequence[float],
    anchored_frames: int = 0,
    prompts: int = 2,
) -> int:
    """A whole sampling run of one video, choosing the tokens included.

    Args:
        prompts: 2 with guidance, 1 without.
    """
    total = 0
    chooses = [
        i
        for i in range(shape.num_blocks - 1)
        if plan.reselects(i) and not (plan.reselects(i + 1) and not plan.trim_reselecting)
    ]
    keep_kv = plan.dropped_kv == "keep"
    scored = 2 * query_count(grid, plan.query_ratio, plan.min_queries) * grid.tokens * shape.dim
    per_step = planned_tokens(plan, grid, shape.num_blocks, progress, anchored_frames)
    for kept, at in zip(per_step, progress, strict=True):
        total += prompts * forward_flops(shape, grid.tokens, kept, keep_kv)
        trims = plan.budget(at, grid) < grid.per_frame
        if trims and plan.needs_attention:
            total += len(chooses) * scored
        if trims and plan.restore == "frame_mean":
            rows = (2 * grid.frames * k * shape.dim for k in kept if k < grid.tokens)
            total += prompts * sum(rows)
    return total
