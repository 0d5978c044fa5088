"""Blocks by chance: what any router has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...methods.routers import Router


def millionths(sigma: float) -> int:
    """A whole number of a noise level, for seeds; of what is no number, 0."""
    return round(1e6 * min(1e6, max(0.0, sigma)))


@dataclass(frozen=True)
class RandomRouter(Router):
    """Blocks by chance, anew at every sigma: what any router has to beat."""

    seed: int = 0
    name = "random"

    def logits(self, num_blocks: int, sigma: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + millionths(sigma))
        return torch.rand(num_blocks, generator=generator)
