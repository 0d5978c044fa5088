"""One budget for the whole model: what each head does, or how wide each block is.

PARE (arXiv 2605.27336) keeps equally many heads and channels in every block. Ours spends a budget
where the profile says that it buys most, and may demote a head to a cheap pattern.
"""

from __future__ import annotations

import math

import torch

from ..methods.attend import pattern_pairs
from ..methods.cost import Width
from ..methods.grid import TokenGrid
from ..methods.heads import FULL, OFF, HeadPlan
from ..methods.knapsack import BudgetTooSmall, Option, choose
from ..methods.role_plan import CHOICES, by_block, pattern_values
from ..profiles.fingerprint import Fingerprint
from ..profiles.profile import Profile
from ..slim.width import Signature, channel_sizes, channels, check_recorded, ffn_multiple

# of a block's FFN against one of its attentions: least squares gives back most of what dropped
# channels added, and little of what dropped heads did (benchmarks/results/old/width.csv)
FFN_WORTH = 0.5


def solve_heads(
    profile: Profile, grid: TokenGrid, budget: float, *, text_tokens: int = 512
) -> HeadPlan:
    """Full, a cheap pattern or off for every head, for the most importance within a budget.

    A head is worth its share in its block's importance (eq. 3), self- and cross-attention apart:
    between blocks, and between the two, the gates and the depth behind make sums incomparable.
    Every block keeps at least one self-attention head that is not off. Temporal heads are not protected (eq. 5): over the whole
    model that takes from the blocks that have few of them.

    Args:
        grid: of the video that will be made; what a pattern costs depends on it.
        budget: share of the attention's FLOPs that stays, self- and cross-attention together.
            Projections are computed in any case.
        text_tokens: keys of cross-attention.

    Raises:
        ValueError: not a share, too small for a head in every block, or the profile lacks a
            measurement.
    """
    check_recorded(profile, "cross_output")
    blocks, n = profile.model.num_blocks, profile.model.num_heads
    if budget == 1.0:
        return HeadPlan.full(blocks, n)
    pairs = [pattern_pairs(name, grid) for name in CHOICES]
    values = pattern_values(_share(profile.importance("self")), profile.mass().double())
    groups: list[list[Option]] = [
        list(zip(pairs, head, strict=True)) for head in values.flatten(0, 1).tolist()
    ]
    for share in _share(profile.importance("cross")).flatten().tolist():
        groups.append([(0, 0.0), (grid.tokens * text_tokens, share)])
    needed = [range(block * n, (block + 1) * n) for block in range(blocks)]
    chosen = _spend(groups, budget, needed)
    own_names = [CHOICES[option] for option in chosen[: blocks * n]]
    cross_names = [FULL if option else OFF for option in chosen[blocks * n :]]
    return HeadPlan(by_block(own_names, n), by_block(cross_names, n))


def solve_width(profile: Profile, budget: float, signature: Signature | None = None) -> Width:
    """Heads and channels of every block, for the most importance within a budget.

    A head is worth what it is in `solve_heads`, a channel its share in what the channels of its
    block add to the hidden state (`channel_sizes`), times FFN_WORTH. Every block keeps at least
    one head of each attention and one group of channels.

    Args:
        budget: share of the parameters of heads and FFN channels that stays.
        signature: as for `pare_width`; tells channels that are alike.

    Raises:
        ValueError: not a share, too small for what every block keeps, or the profile lacks a
            measurement.
    """
    check_recorded(profile, "cross_output", "channel_energy")
    model = profile.model
    blocks, n, multiple = model.num_blocks, model.num_heads, ffn_multiple(model.ffn_dim)
    head, channel = unit_parameters(model)
    scores = channel_sizes(profile)
    groups: list[list[Option]] = []
    for kind in ("self", "cross"):
        shares = _share(profile.importance(kind)).flatten().tolist()
        groups += [[(0, 0.0), (head, one)] for one in shares]
    steps = [*range(0, model.ffn_dim, multiple), model.ffn_dim]
    for block in _share(scores) * FFN_WORTH:
        total = block.sort(descending=True).values.cumsum(0).tolist()
        groups.append([(0, 0.0), *((at * channel, total[at - 1]) for at in steps[1:])])
    needed = [range(at * n, (at + 1) * n) for at in range(2 * blocks)]
    needed += [[2 * blocks * n + block] for block in range(blocks)]
    chosen = _spend(groups, budget, needed)
    taken = [chosen[at * n : (at + 1) * n] for at in range(2 * blocks)]
    heads = [tuple(h for h, option in enumerate(options) if option) for options in taken]
    counts = [steps[option] for option in chosen[2 * blocks * n :]]
    return Width(tuple(heads[:blocks]), tuple(heads[blocks:]), channels(scores, counts, signature))


def unit_parameters(model: Fingerprint) -> tuple[int, int]:
    """Numbers that a head of either attention and an FFN channel of a block store."""
    # rows of q, k and v with their biases, their part of two norms, columns of o
    return model.head_dim * (4 * model.dim + 5), 2 * model.dim + 1


def _share(contribution: torch.Tensor) -> torch.Tensor:
    """Each one's part in the sum of its block [l, n]."""
    # never quite nothing: a budget of all keeps all
    least = 1e-6 * contribution.amax(1, keepdim=True)
    least = least.clamp(min=torch.finfo(torch.float32).tiny)
    contribution = torch.maximum(contribution, least).double()
    return contribution / contribution.sum(1, keepdim=True)


def _spend(groups: list[list[Option]], budget: float, needed) -> list[int]:
    if not 0.0 < budget <= 1.0:
        raise ValueError(
            f"budget: expected more than 0 (nothing left) to 1 (all of it), got {budget}"
        )
    whole = sum(max(cost for cost, _ in options) for options in groups)
    try:
        return choose(groups, math.floor(budget * whole + 1e-6), needed)
    except BudgetTooSmall as error:
        least = math.ceil(100 * error.least / whole) / 100
        raise ValueError(
            f"budget: expected at least {least} here, so that every block keeps something; got "
            f"{budget}"
        ) from error
