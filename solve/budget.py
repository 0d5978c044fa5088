"""One budget for the whole model: what each head does, or how wide each block is.

PARE (arXiv 2605.27336) keeps equally many heads and channels in every block. Ours spends a budget
where the profile says that it buys most, and may demote a head to a cheap pattern.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..methods.attend import pattern_pairs
from ..methods.cost import WanShape, Width, block_flops, block_parameters
from ..methods.grid import TokenGrid
from ..methods.heads import CHEAP, FULL, OFF, HeadPlan
from ..methods.knapsack import BudgetTooSmall, Option, choose
from ..profiles.profile import Profile
from ..slim.width import Signature, channels, check_recorded, ffn_multiple, ffn_scores, protected

TEXT_TOKENS = 512
# of a block's FFN against one of its attentions: least squares gives back most of what dropped
# channels added, and little of what dropped heads did (benchmarks/results/old/width.csv)
FFN_WORTH = 0.5


def check_budget(budget: float) -> None:
    """Refuse a share that is not one.

    Raises:
        ValueError: says what was expected.
    """
    if not 0.0 < budget <= 1.0:
        raise ValueError(
            f"budget: expected more than 0 (nothing left) to 1 (all of it), got {budget}"
        )


def solve_heads(
    profile: Profile,
    grid: TokenGrid,
    budget: float,
    patterns: Sequence[str] = CHEAP,
    *,
    demote: bool = True,
    text_tokens: int = TEXT_TOKENS,
    image_tokens: int = 0,
    protection: float = 1.0,
) -> HeadPlan:
    """Full, a cheap pattern or off for every head, for the most importance within a budget.

    A head is worth its share in its block's importance (eq. 3), self- and cross-attention apart:
    between blocks, and between the two, the gates and the depth behind make sums incomparable. One
    that is off keeps nothing of it; a cheap pattern keeps 2 m - 1 where m is the attention mass
    that it keeps, as the rest of the attention goes astray. Every block keeps at least one
    self-attention head that is not off.

    Args:
        grid: of the video that will be made; what a pattern costs depends on it.
        budget: share of the attention's FLOPs that stays, self- and cross-attention together.
            Projections are computed in any case.
        patterns: the cheap ones that may be used.
        demote: False drops only, as PARE does.
        text_tokens, image_tokens: keys of cross-attention.
        protection: of temporal heads (eq. 5; PARE's is 1.5). 1 here: over the whole model it takes
            from the blocks that have few of them.

    Raises:
        ValueError: not a share, too small for a head in every block, or the profile lacks a
            measurement.
    """
    check_budget(budget)
    check_recorded(profile, "cross_output")
    blocks, n = profile.model.num_blocks, profile.model.num_heads
    if budget == 1.0:
        return HeadPlan.full(blocks, n)
    names = [OFF, *(name for name in CHEAP if demote and name in patterns), FULL]
    pairs = [pattern_pairs(name, grid) for name in names]
    values = _share(protected(profile, protection))[..., None] * _retained(profile, names)
    cross_pairs = grid.tokens * (text_tokens + image_tokens)
    groups: list[list[Option]] = [
        list(zip(pairs, head, strict=True)) for head in values.flatten(0, 1).tolist()
    ]
    for share in _share(profile.importance("cross")).flatten().tolist():
        groups.append([(0, 0.0), (cross_pairs, share)])
    needed = [range(block * n, (block + 1) * n) for block in range(blocks)]
    chosen = _spend(groups, budget, needed)
    own_names = [names[option] for option in chosen[: blocks * n]]
    cross_names = [FULL if option else OFF for option in chosen[blocks * n :]]
    return HeadPlan(_rows(own_names, n), _rows(cross_names, n))


def solve_width(
    profile: Profile,
    budget: float,
    signature: Signature | None = None,
    *,
    grid: TokenGrid | None = None,
    text_tokens: int = TEXT_TOKENS,
    image_tokens: int = 0,
    protection: float = 1.0,
    ffn_worth: float = FFN_WORTH,
) -> Width:
    """Heads and channels of every block, for the most importance within a budget.

    A head is worth what it is in `solve_heads`, a channel its share in what the channels of its
    block add to the hidden state (`ffn_scores` by energy), times `ffn_worth`. Every block keeps at
    least one head of each attention and one group of channels.

    Args:
        budget: share of what can be cut (heads, FFN channels) that stays.
        signature: as for `pare_width`; tells channels that are alike.
        grid: counts FLOPs of a video of this size; None counts parameters.
        text_tokens, image_tokens: keys of cross-attention.
        protection: of temporal heads, see `solve_heads`.
        ffn_worth: what all of a block's channels are worth against all heads of one attention.

    Raises:
        ValueError: not a share, too small for what every block keeps, or the profile lacks a
            measurement.
    """
    check_budget(budget)
    check_recorded(profile, "cross_output", "channel_energy")
    model = profile.model
    blocks, n, multiple = model.num_blocks, model.num_heads, ffn_multiple(model.ffn_dim)
    shape = model.shape(text_tokens, image_tokens)
    head, cross_head, channel = unit_costs(shape, grid)
    scores = ffn_scores(profile, "energy")
    groups: list[list[Option]] = []
    for importance, cost in (
        (protected(profile, protection), head),
        (profile.importance("cross"), cross_head),
    ):
        groups += [[(0, 0.0), (cost, one)] for one in _share(importance).flatten().tolist()]
    steps = [*range(0, model.ffn_dim, multiple), model.ffn_dim]
    for block in _share(scores) * ffn_worth:
        total = block.sort(descending=True).values.cumsum(0).tolist()
        groups.append([(0, 0.0), *((at * channel, total[at - 1]) for at in steps[1:])])
    needed = [range(at * n, (at + 1) * n) for at in range(2 * blocks)]
    needed += [[2 * blocks * n + block] for block in range(blocks)]
    chosen = _spend(groups, budget, needed)
    taken = [chosen[at * n : (at + 1) * n] for at in range(2 * blocks)]
    heads = [tuple(h for h, option in enumerate(options) if option) for options in taken]
    counts = [steps[option] for option in chosen[2 * blocks * n :]]
    return Width(tuple(heads[:blocks]), tuple(heads[blocks:]), channels(scores, counts, signature))


def unit_costs(shape: WanShape, grid: TokenGrid | None = None) -> tuple[int, int, int]:
    """What one self-attention head, one cross-attention head and one FFN channel of a block cost.

    Args:
        grid: FLOPs of a video of this size; None counts parameters.
    """

    def cost(*sizes: int) -> int:
        if grid is None:
            return block_parameters(shape, sizes)
        return block_flops(shape, grid.tokens, width=sizes)

    none = cost(0, 0, 0)
    return cost(1, 0, 0) - none, cost(0, 1, 0) - none, cost(0, 0, 1) - none


def width_share(width: Width, shape: WanShape, grid: TokenGrid | None = None) -> float:
    """Share of what can be cut that a width keeps, as `solve_width` counts its budget."""
    costs = unit_costs(shape, grid)
    num_heads = shape.dim // shape.head_dim
    full = (num_heads, num_heads, shape.ffn_dim)
    kept = [width.sizes(block) for block in range(width.num_blocks)]
    left = sum(cost * size for sizes in kept for cost, size in zip(costs, sizes, strict=True))
    return left / (len(kept) * sum(cost * size for cost, size in zip(costs, full, strict=True)))


def _share(contribution: torch.Tensor) -> torch.Tensor:
    """Each one's part in the sum of its block [l, n]."""
    # never quite nothing: a budget of all keeps all
    least = 1e-6 * contribution.amax(1, keepdim=True)
    least = least.clamp(min=torch.finfo(torch.float32).tiny)
    contribution = torch.maximum(contribution, least).double()
    return contribution / contribution.sum(1, keepdim=True)


def _retained(profile: Profile, names: Sequence[str]) -> torch.Tensor:
    """Share of a head's importance that each pattern keeps [l, n, names]."""
    kept = (2 * profile.mass().double() - 1).clamp(0, 1)
    zero, one = torch.zeros_like(kept[..., 0]), torch.ones_like(kept[..., 0])
    shares = {OFF: zero, FULL: one, **{name: kept[..., p] for p, name in enumerate(CHEAP)}}
    return torch.stack([shares[name] for name in names], -1)


def _spend(groups: list[list[Option]], budget: float, needed) -> list[int]:
    whole = sum(max(cost for cost, _ in options) for options in groups)
    try:
        return choose(groups, math.floor(budget * whole + 1e-6), needed)
    except BudgetTooSmall as error:
        least = math.ceil(100 * error.least / whole) / 100
        raise ValueError(
            f"budget: expected at least {least} here, so that every block keeps something; got "
            f"{budget}"
        ) from error


def _rows(names: list[str], n: int) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(names[at : at + n]) for at in range(0, len(names), n))
