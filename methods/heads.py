"""What each attention head of each block computes: full attention, a cheap pattern, or nothing.

PARE (arXiv 2605.27336) drops heads. Ours also demotes: a head whose attention stays in its own
latent frame needs no other keys, and one that looks through time at one place needs only its
quarter of every latent frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FULL, FRAME, OFF = "full", "frame", "off"
# tiles per side of the picture. With smaller ones beside them the bench keeps no more, and a
# measurement takes all keys and values out once more for each
TILES = {"tile2": 2}
CHEAP = (FRAME, *TILES)
PATTERNS = (FULL, *CHEAP, OFF)
# intra-slice ratio above / below which a head is spatial / temporal; mixed between them
SPATIAL, TEMPORAL = 0.7, 0.3


def role(ratio: float) -> str:
    """Name of a head's role for its intra-slice ratio (PARE, eq. 4): spatial, temporal or mixed."""
    if ratio > SPATIAL:
        return "spatial"
    return "temporal" if ratio < TEMPORAL else "mixed"


@dataclass(frozen=True)
class HeadPlan:
    """The pattern of every head. Plain data, independent of a run.

    Args:
        self_attention: name in `PATTERNS` per block and head.
        cross_attention: FULL or OFF per block and head; text and image part alike.
        corrected: what patterns leave out of self-attention is given back as its mean over each
            latent frame (ours), which a few queries tell that attend to everything.
    """

    self_attention: tuple[tuple[str, ...], ...]
    cross_attention: tuple[tuple[str, ...], ...]
    corrected: bool = False

    @property
    def num_blocks(self) -> int:
        return len(self.self_attention)

    @property
    def neutral(self) -> bool:
        return not any(self.changes(index) for index in range(self.num_blocks))

    def changes(self, block_index: int) -> bool:
        """Whether any head of this block does less than full attention."""
        heads = (*self.self_attention[block_index], *self.cross_attention[block_index])
        return any(name != FULL for name in heads)

    def count(self, pattern: str) -> int:
        """Self-attention heads of this pattern in the whole model."""
        return sum(heads.count(pattern) for heads in self.self_attention)

    @classmethod
    def full(cls, num_blocks: int, num_heads: int) -> HeadPlan:
        heads = ((FULL,) * num_heads,) * num_blocks
        return cls(heads, heads)

    @classmethod
    def keeping(
        cls, num_heads: int, self_kept: Sequence[Sequence[int]], cross_kept: Sequence[Sequence[int]]
    ) -> HeadPlan:
        """Drop every head that is not among those kept, per block."""

        def patterns(blocks):
            return tuple(
                tuple(FULL if head in set(kept) else OFF for head in range(num_heads))
                for kept in blocks
            )

        return cls(patterns(self_kept), patterns(cross_kept))
