"""A width: which heads and FFN channels a slim model keeps. The rules that choose it are PARE's
(arXiv 2605.27336, eq. 3 to 7) and ours."""

from __future__ import annotations

from dataclasses import dataclass


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
