"""Heads by the role that they show in the run itself (ours; the roles are PARE's, arXiv 2605.27336).

A whole step measures, from a few queries, how much each head adds and what each cheap pattern
would keep of its attention. From the next step on a budget goes to the heads that need it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..kernels import frame_mass
from .attend import pattern_pairs
from .grid import TokenGrid
from .heads import CHEAP, FULL, OFF, TILES, HeadPlan
from .importance import query_count, sample_queries
from .knapsack import choose

# share of the tokens that are queries of a measurement, and how many at least
QUERY_RATIO, MIN_QUERIES = 1 / 256, 64
# what a head may do, from the cheapest on
CHOICES = (OFF, *CHEAP, FULL)


@dataclass(frozen=True)
class RolePlan:
    """Heads in patterns that are found in the run. Plain data, independent of a run.

    Args:
        keep_ratio: share of self-attention's query-key pairs that stays.
        num_heads: of the model, in each block.
    """

    keep_ratio: float
    num_heads: int

    @property
    def neutral(self) -> bool:
        return self.keep_ratio == 1.0

    def expected(self, num_blocks: int) -> HeadPlan:
        """What a run costs before its roles are known: heads that are full or off, spread evenly."""
        total = num_blocks * self.num_heads
        whole = math.floor(total * self.keep_ratio + 1e-6)
        names = [
            FULL if (at + 1) * whole // total > at * whole // total else OFF for at in range(total)
        ]
        return _plan(names, self.num_heads)

    def solved(
        self, shown: Mapping[int, torch.Tensor], grid: TokenGrid, num_blocks: int
    ) -> HeadPlan:
        """The pattern of every head, for the most of what heads add within the budget.

        A head is worth its share in what its block's heads add. Each block keeps at least one head
        that is not off.

        Args:
            shown: by block what `measure_roles` gave; heads of blocks that are not there stay full.
        """
        pairs = [pattern_pairs(name, grid) for name in CHOICES]
        groups = []
        for block in range(num_blocks):
            if block not in shown:
                groups += [[(pairs[-1], 1.0)]] * self.num_heads
                continue
            added, mass = shown[block].double().split([1, len(CHEAP)], 1)
            kept = pattern_values(added[:, 0] / added.sum().clamp(min=1e-30), mass)
            groups += [list(zip(pairs, values, strict=True)) for values in kept.tolist()]
        needed = [range(at, at + self.num_heads) for at in range(0, len(groups), self.num_heads)]
        budget = math.floor(self.keep_ratio * pairs[-1] * len(groups) + 1e-6)
        # less than a head in every block, and all of those that were not seen, is not possible
        least = sum(group[-1][0] for group in groups if len(group) == 1) + num_blocks * pairs[-1]
        chosen = [
            FULL if len(group) == 1 else CHOICES[option]
            for group, option in zip(
                groups, choose(groups, max(budget, least), needed), strict=True
            )
        ]
        return _plan(chosen, self.num_heads)


def pattern_values(share: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """What each of `CHOICES` leaves of heads that are worth `share` [..., n]: [..., n, choices].

    One that is off keeps nothing; a cheap pattern keeps 2 m - 1 where m is the attention mass that
    it keeps, as the rest of the attention goes astray.

    Args:
        mass: of each cheap pattern [..., n, patterns].
    """
    share = share[..., None]
    return torch.cat([0 * share, (2 * mass - 1).clamp(0, 1) * share, share], -1)


def by_block(names: list[str], heads: int) -> tuple[tuple[str, ...], ...]:
    """Patterns of all heads, block after block, as rows."""
    return tuple(tuple(names[at : at + heads]) for at in range(0, len(names), heads))


def _plan(names: list[str], heads: int) -> HeadPlan:
    own = by_block(names, heads)
    return HeadPlan(own, ((FULL,) * heads,) * len(own))


def measure_roles(
    q: torch.Tensor, k: torch.Tensor, out: torch.Tensor, grid: TokenGrid
) -> torch.Tensor:
    """What each head adds, and what each pattern of `CHEAP` keeps: fp32 [n, 1 + patterns].

    The first is the root mean square of its output (eq. 3, without the output projection's norm),
    the others are its attention mass within the pattern; both of sampled queries of all samples.

    Args:
        q, k, out: self-attention's [b, s, n, d], q and k after RoPE, of all tokens.
    """
    index = sample_queries(grid, QUERY_RATIO, MIN_QUERIES).to(q.device, non_blocking=True)
    size = (grid.frames, grid.height, grid.width)
    mass = frame_mass(q, k, size, index, start=grid.start, tiles=tuple(TILES.values())).mean(0)
    added = out.index_select(1, index + grid.start).float().square().mean((0, 1, 3)).sqrt()
    return torch.cat([added[:, None], mass], 1)


def measured_queries(grid: TokenGrid) -> int:
    """Queries of a measurement."""
    return query_count(grid, QUERY_RATIO, MIN_QUERIES)
