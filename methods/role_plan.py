"""Heads by the role that they show in the run itself (ours; the roles are PARE's, arXiv 2605.27336).

A whole step measures, from a few queries, what each cheap pattern would keep of each head's
attention. From the next step on the heads whose attention stays where a pattern looks run in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..kernels import frame_mass
from .attend import pattern_pairs
from .grid import TokenGrid
from .heads import CHEAP, FULL, TILES, HeadPlan
from .importance import query_count, sample_queries
from .knapsack import choose

# share of the tokens that are queries of a measurement, and how many at least
QUERY_RATIO, MIN_QUERIES = 1 / 256, 64


@dataclass(frozen=True)
class RolePlan:
    """Heads in patterns that are found in the run. Plain data, independent of a run.

    Args:
        keep_ratio: share of self-attention's query-key pairs that stays.
        num_heads: of the model, in each block.
        start, end: progress between which heads are trimmed.
    """

    keep_ratio: float
    num_heads: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not 0.0 < self.keep_ratio <= 1.0:
            raise ValueError(
                f"keep_ratio: expected more than 0 (nothing left) to 1 (all), got {self.keep_ratio}"
            )
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(
                f"start and end: expected 0 <= start <= end <= 1, got {self.start} and {self.end}"
            )

    @property
    def neutral(self) -> bool:
        return self.keep_ratio == 1.0

    def trims_at(self, progress: float) -> bool:
        """Whether a step at this progress is trimmed."""
        return not self.neutral and self.start <= progress <= self.end

    def expected(self, grid: TokenGrid, num_blocks: int) -> HeadPlan:
        """What a run costs before its roles are known: whole heads and cheap ones, spread evenly."""
        full = pattern_pairs(FULL, grid)
        cheap = min(CHEAP, key=lambda name: pattern_pairs(name, grid))
        least = pattern_pairs(cheap, grid)
        total = num_blocks * self.num_heads
        room = 1.0 if full == least else (self.keep_ratio * full - least) / (full - least)
        whole = math.floor(total * min(1.0, max(0.0, room)) + 1e-6)
        names = [
            FULL if (at + 1) * whole // total > at * whole // total else cheap
            for at in range(total)
        ]
        return _plan(names, self.num_heads, self.start, self.end)

    def solved(
        self, mass: Mapping[int, torch.Tensor], grid: TokenGrid, num_blocks: int
    ) -> HeadPlan:
        """The pattern of every head: the most attention kept within the budget.

        A pattern that keeps mass m is worth 2 m - 1: the rest of the attention goes astray.

        Args:
            mass: by block what each pattern of `CHEAP` keeps [n, patterns]; heads of blocks that are
                not there stay full.
        """
        names = (*CHEAP, FULL)
        pairs = [pattern_pairs(name, grid) for name in names]
        groups = []
        for block in range(num_blocks):
            if block not in mass:
                groups += [[(pairs[-1], 1.0)]] * self.num_heads
                continue
            worth = (2 * mass[block].double() - 1).clamp(0, 1).tolist()
            groups += [list(zip(pairs, (*kept, 1.0), strict=True)) for kept in worth]
        # what is cheapest has to fit
        least = sum(min(cost for cost, _ in options) for options in groups)
        budget = max(least, math.floor(self.keep_ratio * pairs[-1] * len(groups) + 1e-6))
        options = choose(groups, budget)
        chosen = [
            FULL if len(group) == 1 else names[option]
            for group, option in zip(groups, options, strict=True)
        ]
        return _plan(chosen, self.num_heads, self.start, self.end)


def _plan(names: list[str], heads: int, start: float, end: float) -> HeadPlan:
    own = tuple(tuple(names[at : at + heads]) for at in range(0, len(names), heads))
    return HeadPlan(own, ((FULL,) * heads,) * len(own), start, end)


def measure_roles(q: torch.Tensor, k: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Attention mass that each pattern of `CHEAP` keeps, mean over samples: fp32 [n, patterns].

    Args:
        q, k: self-attention's [b, s, n, d] after RoPE, of all tokens.
    """
    index = sample_queries(grid, QUERY_RATIO, MIN_QUERIES).to(q.device, non_blocking=True)
    size = (grid.frames, grid.height, grid.width)
    return frame_mass(q, k, size, index, start=grid.start, tiles=tuple(TILES.values())).mean(0)


def measured_queries(grid: TokenGrid) -> int:
    """Queries of a measurement."""
    return query_count(grid, QUERY_RATIO, MIN_QUERIES)
