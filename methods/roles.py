"""Head roles: where in time a self-attention head looks (PARE, arXiv 2605.27336, eq. 4)."""

from __future__ import annotations

# intra-slice ratio above / below which a head is spatial / temporal; mixed between them
SPATIAL, TEMPORAL = 0.7, 0.3


def role(ratio: float) -> str:
    """Name of a head's role for its intra-slice ratio: spatial, temporal or mixed."""
    if ratio > SPATIAL:
        return "spatial"
    return "temporal" if ratio < TEMPORAL else "mixed"
