"""Heads by the role that they show in the run itself (ours; the roles are PARE's, arXiv 2605.27336).

A whole step measures, from a few queries, what a head that is off and each cheap pattern would
lack. From the next step on a budget goes to the heads that need it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .attend import Attention, Layout, attend_few, pattern_pairs
from .grid import TokenGrid
from .heads import CHEAP, FULL, OFF, HeadPlan
from .knapsack import choose

# what a head may do
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
            added, lacks = shown[block].double().clamp(min=1e-30).split([1, len(CHEAP)], 1)
            values = pattern_values(added[:, 0] / added.sum(), 1 - lacks / added)
            groups += [list(zip(pairs, head, strict=True)) for head in values.tolist()]
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


def pattern_values(share: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """What each of `CHOICES` leaves of heads that are worth `share` [..., n]: [..., n, choices].

    Args:
        kept: share of it that each cheap pattern keeps [..., n, patterns]; below 0 is nothing.
    """
    share = share[..., None]
    return torch.cat([0 * share, kept.clamp(0, 1) * share, share], -1)


def by_block(names: list[str], heads: int) -> tuple[tuple[str, ...], ...]:
    """Patterns of all heads, block after block, as rows."""
    return tuple(tuple(names[at : at + heads]) for at in range(0, len(names), heads))


def _plan(names: list[str], heads: int) -> HeadPlan:
    own = by_block(names, heads)
    return HeadPlan(own, ((FULL,) * heads,) * len(own), corrected=True)


def measure_roles(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention, layout: Layout
) -> torch.Tensor:
    """What each head lacks where it is off, and in each pattern of `CHEAP`: fp32 [n, 1 + patterns].

    The root mean square of what a correction leaves of it (`HeadPlan.corrected`): how far it is, at
    the sampled queries of all samples, from its mean over their latent frame.

    Args:
        q, k, v: self-attention's [b, s, n, d], of all tokens.
    """
    some = layout.sampled(q.device)
    few = q.index_select(1, some)
    exact, found = attention(few, k, v).float(), []
    for pattern in CHOICES[:-1]:
        given = 0.0 if pattern == OFF else attend_few(few, k, v, attention, layout, pattern).float()
        lacks = (exact - given).unflatten(1, (layout.grid.frames, -1))
        found.append(lacks.var(2, correction=0).mean((0, 1, 3)).sqrt())
    return torch.stack(found, 1)
