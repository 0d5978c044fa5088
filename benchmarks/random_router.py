"""Blocks by chance: what any router has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..methods.routers import Budgeted, Constant, Content


def millionths(sigma: float) -> int:
    """A whole number of a noise level, for seeds; of what is no number, 0."""
    return round(1e6 * min(1e6, max(0.0, sigma)))


class _Random(Constant):
    def __init__(self, num_blocks: int, seed: int):
        super().__init__(torch.zeros(num_blocks))
        self._seed = seed

    def logits(self, sigma: float, content: Content) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + millionths(sigma))
        return torch.rand(len(self._logits), generator=generator)


@dataclass(frozen=True)
class RandomRouter(Budgeted):
    """Blocks by chance, anew at every sigma: what any router has to beat."""

    seed: int = 0
    name = "random"

    def run(self, num_blocks: int) -> _Random:
        return _Random(num_blocks, self.seed)
