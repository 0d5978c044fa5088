"""TAPE's importance: attention that a token receives (arXiv 2605.17837, 3.1), from sampled queries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..kernels import token_mass
from .grid import TokenGrid

# share of the tokens that are queries, and how many at least (paper not stated)
QUERY_RATIO, MIN_QUERIES = 1 / 64, 256
GOLDEN = (math.sqrt(5) - 1) / 2


def query_count(grid: TokenGrid, ratio: float, at_least: int = MIN_QUERIES) -> int:
    """Queries that `sample_queries` takes: a share of the tokens, but no noise from too few."""
    wanted = max(ratio * grid.tokens, min(at_least, grid.tokens))
    return grid.frames * min(grid.per_frame, math.ceil(wanted / grid.frames))


def sample_queries(grid: TokenGrid, ratio: float, at_least: int = MIN_QUERIES) -> torch.Tensor:
    """Positions int64 [m] of a stratified query sample: the same count from every latent frame.

    Each latent frame starts at its own golden-ratio offset, so that the sample does not line up
    with the rows of the grid.
    """
    each = query_count(grid, ratio, at_least) // grid.frames
    return spread([grid.per_frame] * grid.frames, each)


def spread(counts: Sequence[int], each: int) -> torch.Tensor:
    """Positions int64 [frames * each], as many of every latent frame's `counts` tokens, evenly."""
    count = torch.tensor(counts, dtype=torch.float64)[:, None]
    step = count / each
    frame = torch.arange(len(counts), dtype=torch.float64)[:, None]
    offset = (frame * GOLDEN) % 1.0 * step
    position = torch.arange(each, dtype=torch.float64) * step + offset
    return (position.floor().minimum(count - 1) + count.cumsum(0) - count).long().flatten()


def scoring_queries(grid: TokenGrid) -> int:
    """Queries of `attention_received`."""
    return query_count(grid, QUERY_RATIO, MIN_QUERIES)


def attention_received(grid: TokenGrid, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Attention that each token receives in self-attention, mean over heads, fp32 [b, tokens].

    Args:
        q, k: [b, s, n, d] after RoPE.
    """
    index = sample_queries(grid, QUERY_RATIO, MIN_QUERIES).to(q.device, non_blocking=True)
    # queries imprint their neighbourhood only when they are sampled, and a small grid has no room
    sampled = len(index) < grid.tokens
    exclude_radius = 2 if sampled and min(grid.height, grid.width) >= 16 else 0
    size = (grid.frames, grid.height, grid.width)
    return token_mass(q, k, size, index, start=grid.start, exclude_radius=exclude_radius)
