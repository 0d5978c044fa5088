"""Which blocks matter at a step: one logit per block from sigma and content.

PARE: arXiv 2605.27336, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Content:
    """What a router may look at besides sigma.

    Args:
        latent: the model's input of the conditional prompt [b, c, f, h, w].
        clip: class embedding of the given image [b, c], or None.
    """

    latent: torch.Tensor
    clip: torch.Tensor | None = None


class Router:
    """Says which blocks matter. Plain data, independent of a run."""

    name: str
    skips_nothing = False
    # logits [l] for a sigma [1] that are read with the step's other facts; None: by `logits`
    ask: Callable[[torch.Tensor, Content], torch.Tensor] | None = None

    def check(self, num_blocks: int) -> None:
        """Refuse a model of another number of blocks than this was made for."""

    def count(self, num_blocks: int, budget: int) -> int:
        """Blocks that run where the budget asks for `budget`."""
        return budget

    def logits(self, num_blocks: int, sigma: float) -> torch.Tensor:
        """One logit per block [l]; the highest run."""
        raise NotImplementedError


@dataclass(frozen=True)
class FixedRouter(Router):
    """Always the same blocks, whatever the budget.

    Args:
        skipped: blocks that never run; the first and the last block run all the same.
    """

    skipped: tuple[int, ...]
    name = "fixed"

    @property
    def skips_nothing(self) -> bool:
        return not self.skipped

    def check(self, num_blocks: int) -> None:
        outside = [index for index in self.skipped if not 0 <= index < num_blocks]
        if outside:
            raise ValueError(f"blocks: expected numbers from 0 to {num_blocks - 1}, got {outside}")

    def count(self, num_blocks: int, budget: int) -> int:
        return num_blocks - len(set(self.skipped) - {0, num_blocks - 1})

    def logits(self, num_blocks: int, sigma: float) -> torch.Tensor:
        logits = torch.ones(num_blocks)
        logits[sorted(set(self.skipped) - {0, num_blocks - 1})] = 0
        return logits


def latent_statistics(latent: torch.Tensor) -> torch.Tensor:
    """Statistics of a noisy latent [b, c, f, h, w] as content [b, 4 * c].

    Mean, standard deviation, mean absolute difference in time and mean absolute spatial gradient of
    every channel. Which ones is not stated in the paper.
    """
    x = latent.float()
    over = (2, 3, 4)
    parts = [x.mean(over), x.std(over, correction=0)]
    for axes in ((2,), (3, 4)):
        change = [x.diff(dim=axis).abs().flatten(2) for axis in axes if x.shape[axis] > 1]
        still = torch.zeros_like(parts[0])
        parts.append(torch.cat(change, 2).mean(2) if change else still)
    return torch.cat(parts, 1)


class RouterMLP(nn.Module):
    """The trained router (eq. 9): three layers with SiLU, one logit per block.

    Args:
        content_dim: 0 leaves the content out (the paper's timestep-only router).
    """

    def __init__(self, num_blocks: int, content_dim: int, hidden: int = 256, time_dim: int = 256):
        super().__init__()
        self.num_blocks, self.content_dim = num_blocks, content_dim
        self.hidden, self.time_dim = hidden, time_dim
        self.layers = nn.Sequential(
            nn.Linear(time_dim + content_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, num_blocks),
        )

    def forward(self, sigma: torch.Tensor, content: torch.Tensor | None) -> torch.Tensor:
        """Logits [b, l] for sigma [b] and content [b, content_dim]."""
        half = self.time_dim // 2
        steps = torch.arange(half, device=sigma.device, dtype=torch.float32)
        angles = 1000 * sigma.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
        given = torch.cat([angles.cos(), angles.sin()], 1)
        if self.content_dim:
            given = torch.cat([given, content.float()], 1)
        return self.layers(given.to(self.layers[0].weight.dtype))
