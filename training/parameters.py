"""Numbers that a Wan stores, full or slim."""

from __future__ import annotations

import math

from ..methods.cost import WanShape


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


def outside_parameters(shape: WanShape) -> int:
    """Numbers outside of the blocks."""
    d, patch = shape.dim, math.prod(shape.patch)
    patches = d * (shape.in_channels * patch + 1) + (d + 1) * shape.out_channels * patch
    text = d * (shape.text_dim + 1) + d * (d + 1)
    time = d * (shape.freq_dim + 1) + d * (d + 1) + 6 * d * (d + 1)
    e = shape.image_dim
    image = 2 * e + e * (e + 1) + d * (e + 1) + 2 * d if shape.image_tokens else 0
    # the head's modulation
    return patches + text + time + image + 2 * d


def parameters(shape: WanShape, width: tuple[int, int, int] | None = None) -> int:
    """Numbers that a model stores.

    Args:
        width: self-attention heads, cross-attention heads and FFN channels of a slim model.
    """
    return shape.num_blocks * block_parameters(shape, width) + outside_parameters(shape)
