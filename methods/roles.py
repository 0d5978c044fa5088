"""Head roles: where in time a self-attention head looks (PARE, arXiv 2605.27336, eq. 4)."""

from __future__ import annotations

import torch

from ..kernels import frame_mass
from .grid import TokenGrid

# intra-slice ratio above / below which a head is spatial / temporal; mixed between them
SPATIAL, TEMPORAL = 0.7, 0.3


def intra_slice_ratio(
    q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, query_index: torch.Tensor
) -> torch.Tensor:
    """Share of each head's attention that stays in the query's own latent frame: fp32 [b, n].

    Args:
        q, k: [b, s, n, d] after RoPE.
        query_index: int64 [m], positions within the grid of the sampled queries.
    """
    size = (grid.frames, grid.height, grid.width)
    return frame_mass(q, k, size, query_index, start=grid.start, tiles=())[..., 0]


def role(ratio: float) -> str:
    """Name of a head's role for its intra-slice ratio: spatial, temporal or mixed."""
    if ratio > SPATIAL:
        return "spatial"
    return "temporal" if ratio < TEMPORAL else "mixed"
