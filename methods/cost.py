"""What a Wan forward costs in FLOPs and bytes, dense or trimmed; 1 multiply-add is 2 FLOPs.

Counts matrix products and attention, as torch's flop counter does, and what the steps between them
read and write. Rates and times are in floor.py.
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


@dataclass(frozen=True)
class Work:
    """What a piece of a model does.

    Args:
        linear: FLOPs of products with weights.
        attention: FLOPs of the scores and weighted sums of attention.
        moved: numbers that the steps between these read and write; their own traffic is not in it.
    """

    linear: float = 0
    attention: float = 0
    moved: float = 0

    @property
    def flops(self) -> float:
        return self.linear + self.attention

    def __add__(self, other: Work) -> Work:
        return Work(
            self.linear + other.linear,
            self.attention + other.attention,
            self.moved + other.moved,
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.linear * times, self.attention * times, self.moved * times)


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


# Times that a block goes over [s, c] between its products, reads and writes alike, with one kernel
# for each step, as ComfyUI runs it: norm and modulation 4, gate 3, norm 2, sum 3, norm and
# modulation 4, gate 3. Over the heads' part: RMS norm and RoPE of q and k 8, RMS norm of the
# cross-attention's q 2. Over the FFN's channels: GELU 2.
PASSES, QK_PASSES, CROSS_PASSES, FFN_PASSES = 19, 8, 2, 2
# a rotary row holds a 2 x 2 rotation in fp32 for every pair of channels of a head
ROTARY_NUMBERS = 4


def block_work(
    shape: WanShape,
    tokens: int,
    extra_keys: int = 0,
    *,
    self_pairs: int | None = None,
    cross_heads: int | None = None,
    width: tuple[int, int, int] | None = None,
    trimmed: bool = False,
) -> Work:
    """One block on `tokens` tokens of one sample.

    Args:
        extra_keys: dropped tokens that still serve as keys and values; the host's own block makes
            their q, k and v.
        self_pairs: query-key pairs of all self-attention heads together; None is full attention.
        cross_heads: cross-attention heads that are computed; None is all that the block has.
        width: self-attention heads, cross-attention heads and FFN channels of a slim block.
        trimmed: its tokens are taken out of the sequence and put back.
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
    cross = 4 * (tokens + context) * d * cross_inner
    moved = tokens * (
        PASSES * d + QK_PASSES * inner + CROSS_PASSES * cross_inner + FFN_PASSES * channels
    )
    if extra_keys:
        # norm and modulation, then norm and RoPE of q and k
        moved += extra_keys * (4 * d + QK_PASSES * inner)
    if trimmed:
        moved += 4 * (tokens + extra_keys / 2) * d
        moved += 2 * (tokens + extra_keys) * ROTARY_NUMBERS * shape.head_dim
    return Work(
        projections + cross + 4 * tokens * d * channels,
        attention + 4 * tokens * context * attended,
        moved,
    )


def block_flops(shape: WanShape, tokens: int, extra_keys: int = 0, **options) -> int:
    """FLOPs of `block_work`, with its options."""
    return block_work(shape, tokens, extra_keys, **options).flops


def outside_flops(shape: WanShape, tokens: int) -> int:
    """Everything outside the blocks, once a sample: patches, text, time, image and the head."""
    d, patch = shape.dim, math.prod(shape.patch)
    patches = 2 * tokens * patch * d * (shape.in_channels + shape.out_channels)
    text = 2 * shape.text_tokens * (shape.text_dim * d + d * d)
    time = 2 * (shape.freq_dim * d + 7 * d * d)
    clip = shape.image_tokens * (2 * shape.image_dim**2 + 2 * shape.image_dim * d)
    return patches + text + time + clip


def block_works(
    shape: WanShape,
    tokens: int,
    kept_per_block: Sequence[int] | None = None,
    extra_keys: bool = False,
    *,
    grid: TokenGrid | None = None,
    anchored_frames: int = 0,
    heads: HeadPlan | None = None,
    width: Width | None = None,
) -> list[Work]:
    """Each block in one forward of one sample.

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
    works = []
    for index, kept in enumerate(kept_per_block):
        extra = tokens - kept if extra_keys else 0
        pairs = cross_heads = sizes = None
        if heads is not None:
            counts = _per_frame(grid, kept, anchored_frames)
            pairs = _pairs(heads.self_attention[index], grid, counts, extra > 0)
            cross_heads = heads.cross_attention[index].count(FULL)
        if width is not None:
            sizes = width.sizes(index)
        options = {"self_pairs": pairs, "cross_heads": cross_heads, "width": sizes}
        works.append(block_work(shape, kept, extra, trimmed=kept < tokens, **options))
    return works


def forward_flops(
    shape: WanShape,
    tokens: int,
    kept_per_block: Sequence[int] | None = None,
    extra_keys: bool = False,
    **options,
) -> int:
    """FLOPs of one forward of one sample, with the options of `block_works`."""
    works = block_works(shape, tokens, kept_per_block, extra_keys, **options)
    return outside_flops(shape, tokens) + sum(work.flops for work in works)


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
        remembered |= plan.spares(at)
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


def plan_work(
    shape: WanShape,
    plan: TokenPlan | None,
    grid: TokenGrid,
    progress: Sequence[float],
    anchored_frames: int = 0,
    prompts: int = 2,
    *,
    heads: HeadPlan | None = None,
    width: Width | None = None,
    blocks_run: Sequence[int] | None = None,
) -> Work:
    """A whole sampling run of one video, choosing the tokens included.

    Args:
        plan: None computes all tokens.
        prompts: 2 with guidance, 1 without.
        heads, width: as for `block_works`; heads are trimmed between their plan's start and end.
        blocks_run: how many blocks run at each step, as `depth.blocks_per_step` has them; which
            ones is the router's, and here each as often as any other but the first and the last.
    """
    sizes = {"grid": grid, "width": width}
    outside = Work(outside_flops(shape, grid.tokens))
    if blocks_run is None:
        blocks_run = [shape.num_blocks] * len(progress)
    per_step = [[grid.tokens] * shape.num_blocks] * len(progress)
    keep_kv = plan is not None and plan.dropped_kv == "keep"
    if plan is not None:
        per_step = planned_tokens(plan, grid, shape.num_blocks, progress, anchored_frames)
        if plan.anchor:
            sizes["anchored_frames"] = anchored_frames
    total = Work()
    # most steps are like others
    known: dict[tuple, list[Work]] = {}
    for kept, at, running in zip(per_step, progress, blocks_run, strict=True):
        patterns = heads if heads is not None and heads.trims_at(at) else None
        key = (*kept, patterns is None)
        if key not in known:
            options = {**sizes, "heads": patterns}
            known[key] = block_works(shape, grid.tokens, kept, keep_kv, **options)
        works = known[key]
        trims = plan is not None and plan.budget(at, grid) < grid.per_frame
        if trims and plan.restore == "frame_mean":
            mean = 2 * grid.frames * shape.dim
            works = [
                w + Work(mean * k * (k < grid.tokens)) for w, k in zip(works, kept, strict=True)
            ]
        step = outside + _running(works, kept, running)
        total += step * prompts
        if trims and plan.needs_attention:
            total += Work(0, _scoring(shape, plan, grid, width))
    return total


def _running(works: Sequence[Work], kept: Sequence[int], count: int) -> Work:
    """The blocks of a step of which `count` run.

    A skipped block that was to choose tokens leaves that to the next one, so that as many blocks
    as ever compute all tokens.
    """
    last = len(works) - 1
    fewest = min(kept)
    always = [i in (0, last) or kept[i] > fewest for i in range(len(works))]
    sure = sum((w for w, yes in zip(works, always, strict=True) if yes), Work())
    others = sum((w for w, yes in zip(works, always, strict=True) if not yes), Work())
    if count == len(works):
        return sure + others
    share = max(0, count - sum(always)) / max(1, always.count(False))
    return sure + others * share


def _scoring(shape: WanShape, plan: TokenPlan, grid: TokenGrid, width: Width | None) -> int:
    """FLOPs of the attention scores of the blocks that choose tokens by it, in one step."""
    chooses = [
        i
        for i in range(shape.num_blocks - 1)
        if plan.reselects(i) and not (plan.reselects(i + 1) and not plan.trim_reselecting)
    ]
    queries = query_count(grid, plan.query_ratio, plan.min_queries)
    inner = [shape.dim if width is None else width.sizes(i)[0] * shape.head_dim for i in chooses]
    return 2 * queries * grid.tokens * sum(inner)


def plan_flops(
    shape: WanShape,
    plan: TokenPlan | None,
    grid: TokenGrid,
    progress: Sequence[float],
    anchored_frames: int = 0,
    prompts: int = 2,
    **options,
) -> int:
    """FLOPs of `plan_work`, with its options."""
    return round(plan_work(shape, plan, grid, progress, anchored_frames, prompts, **options).flops)
