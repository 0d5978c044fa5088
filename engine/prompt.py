"""What a prompt got last in a sampling run, and how it goes on from there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..methods.carry import carried
from .context import Context, ContextInRam


@dataclass
class Prompt:
    """What one prompt got last.

    Args:
        velocity: [b, c, f, h, w], each token's when it was last computed.
        clean: the video that it pointed at [b, c, f, h, w].
        sigma: at which something was last computed.
        since: sigma at which each token was, [b, 1, f, h, w] or of less sizes.
        turn: how each token's velocity changed then, fp32 [b, c, f, h, w]; None is not known.
        gap: from how far above `since`, like it.
        foretold: what `turn` would be, had the one before it gone on, where the last call computed;
            None is nothing to learn from.
        context: keys and values of every block, of all tokens; None is of none.
    """

    velocity: torch.Tensor | None = None
    clean: torch.Tensor | None = None
    sigma: float = math.inf
    since: torch.Tensor | None = None
    turn: torch.Tensor | None = None
    gap: torch.Tensor | None = None
    foretold: torch.Tensor | None = None
    context: Context | ContextInRam | None = None

    def at(self, sigma: float, persistence: torch.Tensor | None) -> torch.Tensor:
        """The velocity at a sigma where it is not computed [b, c, f, h, w]."""
        if self.turn is None or persistence is None:
            return self.velocity
        reach = carried(persistence, (self.since - sigma) / self.gap)
        return torch.addcmul(self.velocity.float(), self.turn, reach).to(self.velocity.dtype)

    def take(self, velocity: torch.Tensor, sigma: float, mask: torch.Tensor | None) -> None:
        """Take in a velocity [b, c, f, h, w] that was computed where `mask` [b, 1, f, h, w] is set."""
        before, self.sigma = self.sigma, sigma
        since = velocity.new_full((len(velocity), 1, 1, 1, 1), sigma, dtype=torch.float32)
        if mask is not None:
            velocity = torch.where(mask, velocity, self.velocity)
            since = torch.where(mask, since, self.since)
        old, self.velocity = self.velocity, velocity
        self.foretold = None
        if old is None or sigma > before:
            # the sampler went back: another path
            self.turn = None
        elif sigma < before:
            self._turned(velocity.float() - old.float(), self.since - since, mask)
        self.since = since

    def _turned(self, turn: torch.Tensor, gap: torch.Tensor, mask: torch.Tensor | None) -> None:
        if self.turn is not None:
            self.foretold = self.turn * (gap / self.gap)
        if mask is not None:
            known = self.turn is not None
            turn = torch.where(mask, turn, self.turn if known else 0.0)
            gap = torch.where(mask, gap, self.gap if known else 1.0)
        self.turn, self.gap = turn, gap

    @property
    def blocks(self) -> dict[int, object]:
        """Keys and values, by block."""
        return {} if self.context is None else self.context.blocks

    def forget_context(self) -> None:
        if self.context is not None:
            self.context.clear()
            self.context = None
