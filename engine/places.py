"""Where the kept tokens of a choice lie in a call's sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..methods.attend import Layout
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
