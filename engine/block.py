"""One run of a host's block: what the engine gives it, and what it wants of its attention calls.

A host hands over each call as q, k, v [b, s, n, d] with its own attention function; a block's first
call is self-attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..methods.attend import Attention, Layout, Pair
from ..methods.grid import gather_tokens
from ..methods.tokens import Selection
from .compiled import outside_graphs


@outside_graphs
class Places:
    """Where the kept tokens of a choice lie, and what was gathered for them: once, not per block.

    Attributes:
        index: int64 [b, kept] positions for every row of the batch, and of the others [b, dropped].
    """

    def __init__(self, selection: Selection, chunks: int):
        self.selection = selection
        self.index = selection.index.repeat(chunks, 1)
        self.dropped = selection.dropped.repeat(chunks, 1)
        self._taken: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._layout: Layout | None = None

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of a tensor [b or 1, s, ...] that is the same in every block."""
        return self.once(tensor, lambda t: gather_tokens(t, self.index))

    @torch.compiler.disable
    def once(self, tensor: torch.Tensor, make: Callable) -> torch.Tensor:
        """make(tensor), for the same tensor only once."""
        known = self._taken.get(id(tensor))
        if known is None:
            # the tensor is held, so that its id stays its own
            known = self._taken[id(tensor)] = (tensor, make(tensor))
        return known[1]

    def layout(self, make: Callable[[], Layout]) -> Layout:
        """The layout of these tokens, made once."""
        if self._layout is None:
            self._layout = make()
        return self._layout


@dataclass(eq=False)
class Attend:
    """What the engine wants of one run of a block.

    Args:
        look: told self-attention's q, k and v [b, s, n, d].
        join: self-attention's keys and values, in place of its own k and v [b, s, n, d].
        heads: what each head computes; needs self-attention's layout.
        show: told self-attention's own q, k and v [b, s, n, d], and the host's attention.
        seen: whether self-attention came by.
    """

    look: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None
    join: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    heads: Pair | None = None
    layout: Layout | None = None
    show: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Attention], None] | None = None
    seen: bool = False

    def __call__(self, q, k, v, attention: Attention) -> torch.Tensor:
        """One attention call of the block; the result is [b, s, n, d]."""
        # another node may put more attention calls in front, or more keys into the block's own: these
        # are not of the heads' patterns
        own = not self.seen and q.shape[1] == k.shape[1]
        if own:
            self.seen = True
            if self.look is not None:
                self.look(q, k, v)
            if self.show is not None:
                self.show(q, k, v, attention)
            if self.join is not None:
                k, v = self.join(k, v)
        if self.heads is None or not self.seen:
            return attention(q, k, v)
        heads = self.heads[0] if own else self.heads[1]
        return heads.attend(q, k, v, attention, self.layout if own else None)


class HostBlock(Protocol):
    """The host's own block with its inputs, ready to run."""

    # [b, s, c], of all tokens or of those that the engine keeps
    hidden: torch.Tensor
    # whether it can run on a part of the tokens
    movable: bool

    def run(
        self, hidden: torch.Tensor, places: Places | None, attend: Attend | None
    ) -> torch.Tensor:
        """The block on `hidden` [b, n, c]: all tokens, or those at `places`.

        Args:
            attend: takes over the block's attention calls; None leaves them alone.
        """
