"""What a Wan forward costs in FLOPs and bytes, dense or trimmed; 1 multiply-add is 2 FLOPs.

Counts matrix products and attention, as torch's flop counter does, and what the steps between them
read and write. Rates and times are in floor.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


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


@dataclass(frozen=True)
class Width:
    """What each block keeps, as ascending indices. The residual width is never cut.

    Args:
        self_heads, cross_heads: kept heads per block.
        ffn_channels: kept FFN channels per block.
    """

    self_heads: tuple[tuple[int, ...], ...]
    cross_heads: tuple[tuple[int, ...], ...]
    ffn_channels: tuple[tuple[int, ...], ...]

    @property
    def num_blocks(self) -> int:
        return len(self.self_heads)

    def sizes(self, block_index: int) -> tuple[int, int, int]:
        """Self-attention heads, cross-attention heads and FFN channels of a block."""
        parts = (self.self_heads, self.cross_heads, self.ffn_channels)
        return tuple(len(part[block_index]) for part in parts)


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
            self.linear + other.linear, self.attention + other.attention, self.moved + other.moved
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.linear * times, self.attention * times, self.moved * times)


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
) -> Work:
    """One block on `tokens` tokens of one sample.

    Args:
        extra_keys: remembered keys and values that self-attention sees beside its own.
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
    cross = 4 * (tokens + context) * d * cross_inner
    moved = tokens * (
        PASSES * d + QK_PASSES * inner + CROSS_PASSES * cross_inner + FFN_PASSES * channels
    )
    return Work(
        8 * tokens * d * inner + cross + 4 * tokens * d * channels,
        attention + 4 * tokens * context * attended,
        moved,
    )


def outside_flops(shape: WanShape, tokens: int) -> int:
    """Everything outside the blocks, once a sample: patches, text, time, image and the head."""
    d, patch = shape.dim, math.prod(shape.patch)
    patches = 2 * tokens * patch * d * (shape.in_channels + shape.out_channels)
    text = 2 * shape.text_tokens * (shape.text_dim * d + d * d)
    time = 2 * (shape.freq_dim * d + 7 * d * d)
    clip = shape.image_tokens * (2 * shape.image_dim**2 + 2 * shape.image_dim * d)
    return patches + text + time + clip
