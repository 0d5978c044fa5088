"""The heads of a block as the session runs them: each attention call in its heads' patterns."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..methods.attend import Attention, HeadGroups, Layout
from ..methods.heads import HeadPlan

# kept positions and further keys' positions of a run of the block -> its layout
FindLayout = Callable[[torch.Tensor | None, torch.Tensor | None], Layout]


class BlockHeads:
    """One block's heads in one model call.

    Args:
        ran: called when self-attention ran as planned.
    """

    def __init__(
        self,
        self_attention: HeadGroups,
        cross_attention: HeadGroups,
        find_layout: FindLayout,
        ran: Callable[[], None],
    ):
        self.self_attention, self.cross_attention = self_attention, cross_attention
        self.layout, self._ran = find_layout, ran

    def attend(self, q, k, v, attention: Attention, layout: Layout | None) -> torch.Tensor:
        """One attention call of the block, q, k, v [b, s, n, d]; cross-attention has no layout."""
        heads = self.cross_attention if layout is None else self.self_attention
        if layout is not None:
            self._ran()
        return heads.attend(q, k, v, attention, layout)


def head_groups(plan: HeadPlan) -> list[tuple[HeadGroups, HeadGroups] | None]:
    """Self- and cross-attention heads per block; None where a block is left alone."""
    pairs = zip(plan.self_attention, plan.cross_attention, strict=True)
    return [
        (HeadGroups(own), HeadGroups(cross)) if plan.changes(index) else None
        for index, (own, cross) in enumerate(pairs)
    ]


def check_heads(plan: HeadPlan, num_blocks: int, num_heads: int) -> None:
    """Refuse a plan made for a model of another size.

    Raises:
        ValueError: says what came and what was expected.
    """
    came = (plan.num_blocks, len(plan.self_attention[0]) if plan.num_blocks else 0)
    if came != (num_blocks, num_heads):
        raise ValueError(
            f"heads: expected a plan for {num_blocks} blocks of {num_heads} heads, got one for "
            f"{came[0]} blocks of {came[1]} heads: the profile is of another model"
        )
