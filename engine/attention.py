"""One block's attention calls in one model call, the same for every host.

A host hands over each call as q, k, v [b, s, n, d] with its own attention function; a block's first
call is self-attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..methods.attend import Attention, HeadGroups, Layout
from ..methods.heads import HeadPlan

# self- and cross-attention heads of a block
Pair = tuple[HeadGroups, HeadGroups]


class Attend:
    """What the engine wants of one run of a block.

    Args:
        look: told self-attention's q, k and v [b, s, n, d].
        join: self-attention's keys and values, in place of its own k and v [b, s, n, d].
        heads: what each head computes; needs self-attention's layout.
        show: told self-attention's q and k, and what came out of it [b, s, n, d].

    Attributes:
        seen: whether self-attention came by.
    """

    def __init__(
        self,
        look: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
        join: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
        heads: Pair | None = None,
        layout: Layout | None = None,
        show: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
    ):
        self._look, self._join, self._heads, self._layout = look, join, heads, layout
        self._show, self.seen = show, False

    def __call__(self, q, k, v, attention: Attention) -> torch.Tensor:
        """One attention call of the block; the result is [b, s, n, d]."""
        # another node may put more attention calls in front, on keys of another length
        own = not self.seen and q.shape[1] == k.shape[1]
        keys = k
        if own:
            self.seen = True
            if self._look is not None:
                self._look(q, k, v)
            if self._join is not None:
                k, v = self._join(k, v)
        if self._heads is None:
            out = attention(q, k, v)
        else:
            heads = self._heads[0] if own else self._heads[1]
            out = heads.attend(q, k, v, attention, self._layout if own else None)
        if own and self._show is not None:
            self._show(q, keys, out)
        return out


def head_groups(plan: HeadPlan) -> list[Pair | None]:
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
