"""What a sampling run remembers of its earlier steps."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from ..methods.grid import TokenGrid
from ..methods.tokens import Selection


class Past:
    """Velocities, ages and updates of tokens in one sampling run.

    Attributes:
        age: selections in a row that left each token out, int64 [b, tokens]; None is never.
    """

    def __init__(self):
        self.age: torch.Tensor | None = None
        self._kept: dict[Hashable, torch.Tensor] = {}
        self._point: tuple[float, torch.Tensor] | None = None
        self._velocity: torch.Tensor | None = None

    def see(
        self, sigma: float, latent: torch.Tensor, grid: TokenGrid, trimmed: bool
    ) -> torch.Tensor | None:
        """Take in a new step's latent [b, c, f, h, w].

        Returns:
            How much the velocity changed between the last two steps, as mean size per token
            [b, tokens]; None while fewer than three steps of one size were seen.
        """
        if not trimmed:
            self.age = None
        last, old = self._point, self._velocity
        self._point, self._velocity = (sigma, latent), None
        if last is None or last[0] == sigma or last[1].shape != latent.shape:
            return None
        # the path is a straight line between two steps, whatever the sampler
        self._velocity = (latent - last[1]).float() / (sigma - last[0])
        if old is None:
            return None
        change = (self._velocity - old).abs().mean(1)
        size = (grid.frames, grid.height, grid.width)
        return torch.nn.functional.adaptive_avg_pool3d(change, size).flatten(1)

    def chose(self, selection: Selection, grid: TokenGrid) -> None:
        """Count how long each token has been left out."""
        age = self.age
        if age is None or age.shape != (len(selection.index), grid.tokens):
            age = torch.zeros(
                len(selection.index), grid.tokens, dtype=torch.int64, device=selection.index.device
            )
        dropped = torch.zeros_like(age, dtype=torch.bool)
        dropped.scatter_(1, selection.dropped - grid.start, True)
        self.age = torch.where(dropped, age + 1, 0)

    def recall(self, key: Hashable, like: torch.Tensor) -> torch.Tensor | None:
        """What was remembered under `key`, unless the call's layout changed since."""
        known = self._kept.get(key)
        same = known is not None and known.shape == like.shape and known.device == like.device
        return known if same else None

    def remember(self, key: Hashable, value: torch.Tensor) -> None:
        self._kept[key] = value
