"""Heads by a recorded profile, in place of what a run measures of itself, to be compared.

One budget for the whole model is spent where the profile's importance (PARE, arXiv 2605.27336, eq. 3)
and its intra-slice ratio (eq. 4) say that it buys most; a head may be kept to its latent frame.
"""

from __future__ import annotations

from ..methods.attend import pattern_pairs
from ..methods.grid import TokenGrid
from ..methods.heads import FRAME, FULL, OFF, HeadPlan
from ..methods.knapsack import Option
from ..methods.role_plan import by_block, pattern_values
from ..profiles.profile import Profile
from ..slim.width import check_recorded, share_in_block, spend


def solve_heads(
    profile: Profile, grid: TokenGrid, budget: float, *, text_tokens: int = 512
) -> HeadPlan:
    """Full, a cheap pattern or off for every head, for the most importance within a budget.

    A head is worth its share in its block's importance (eq. 3), self- and cross-attention apart:
    between blocks, and between the two, the gates and the depth behind make sums incomparable.
    Every block keeps at least one self-attention head that is not off. Temporal heads are not protected
    (eq. 5): over the whole model that takes from the blocks that have few of them.

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
    choices = (OFF, FRAME, FULL)
    pairs = [pattern_pairs(name, grid) for name in choices]
    # what a pattern does not keep of the attention goes astray; of tiles a profile says nothing
    kept = 2 * profile.ratio().double()[..., None] - 1
    values = pattern_values(share_in_block(profile.importance("self")), kept)
    groups: list[list[Option]] = [
        list(zip(pairs, head, strict=True)) for head in values.flatten(0, 1).tolist()
    ]
    for share in share_in_block(profile.importance("cross")).flatten().tolist():
        groups.append([(0, 0.0), (grid.tokens * text_tokens, share)])
    needed = [range(block * n, (block + 1) * n) for block in range(blocks)]
    chosen = spend(groups, budget, needed)
    own_names = [choices[option] for option in chosen[: blocks * n]]
    cross_names = [FULL if option else OFF for option in chosen[blocks * n :]]
    return HeadPlan(by_block(own_names, n), by_block(cross_names, n), corrected=True)
