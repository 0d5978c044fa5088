"""PARE's depth: which blocks run at a step (arXiv 2605.27336, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .routers import Router
from .schedule import check_window

SHAPES = ("falling", "constant", "rising")
# of 40 blocks, in the paper: 20 and 35
K_MIN, K_MAX = 0.5, 0.875


@dataclass(frozen=True)
class BlockBudget:
    """How many blocks run, as a function of sigma (eq. 8).

    K(sigma) = K_min + (K_max - K_min) * sigma, in fractions of the blocks.

    Args:
        k_min, k_max: fractions of the blocks at the two ends (paper 0.5 and 0.875).
        shape: "falling" runs most blocks at high noise (paper), "rising" at low noise,
            "constant" their mean throughout.
    """

    k_min: float = K_MIN
    k_max: float = K_MAX
    shape: str = "falling"

    def __post_init__(self):
        if not 0.0 < self.k_min <= self.k_max <= 1.0:
            raise ValueError(
                f"k_min and k_max: expected 0 < k_min <= k_max <= 1, got {self.k_min} and {self.k_max}"
            )
        if self.shape not in SHAPES:
            raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {self.shape!r}")

    def fraction(self, sigma: float) -> float:
        at = min(1.0, max(0.0, sigma))
        if self.shape == "constant":
            return (self.k_min + self.k_max) / 2
        if self.shape == "rising":
            at = 1 - at
        return self.k_min + (self.k_max - self.k_min) * at

    def blocks(self, sigma: float, num_blocks: int) -> int:
        """Blocks that run; the first and the last always do and count."""
        return max(min(2, num_blocks), round(self.fraction(sigma) * num_blocks))


def choose_blocks(logits: torch.Tensor, count: int) -> tuple[int, ...]:
    """The `count` blocks that run (eq. 10), ascending: the first, the last and the highest logits.

    Args:
        logits: [l]; of equals the first. What is no number comes before all others.
        count: at least 2, as the first and the last always run.
    """
    if count >= len(logits):
        return tuple(range(len(logits)))
    order = logits[1:-1].argsort(descending=True, stable=True) + 1
    return (0, *sorted(order[: count - 2].tolist()), len(logits) - 1)


@dataclass(frozen=True)
class BlockPlan:
    """Which blocks to skip; a skipped block is the identity (eq. 12). Independent of a run.

    Args:
        router: says which blocks matter; see routers.py.
        start, end: progress between which blocks are skipped.
    """

    router: Router
    budget: BlockBudget = BlockBudget()
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        check_window(self.start, self.end)

    @property
    def neutral(self) -> bool:
        return self.router.skips_nothing or self.budget.k_min == 1.0

    def count(self, sigma: float, progress: float, num_blocks: int) -> int:
        """Blocks that run in a step."""
        if not self.start <= progress <= self.end:
            return num_blocks
        return self.blocks(sigma, num_blocks)

    def blocks(self, sigma: float, num_blocks: int) -> int:
        """Blocks that run at this sigma, where any may be skipped."""
        return self.router.count(num_blocks, self.budget.blocks(sigma, num_blocks))

    def skipped(
        self, sigma: float, progress: float, num_blocks: int, logits: torch.Tensor | None
    ) -> frozenset[int]:
        """Blocks that do not run in a step.

        Args:
            logits: per block; None where only how many is known: evenly spread then, but never the
                first and the last.
        """
        count = self.count(sigma, progress, num_blocks)
        if logits is not None:
            return frozenset(range(num_blocks)) - frozenset(choose_blocks(logits, count))
        left, inner = num_blocks - count, num_blocks - 2
        return frozenset(1 + (2 * i + 1) * inner // (2 * left) for i in range(left))
