"""Heads on the bench: by the roles that a run shows, by a profile, and what has to be beaten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..engine.plan import TrimPlan
from ..methods.attend import pattern_pairs
from ..methods.grid import TokenGrid
from ..methods.heads import FRAME, FULL, OFF, HeadPlan
from ..methods.knapsack import Option
from ..methods.role_plan import RolePlan, by_block, pattern_values
from ..profiles.profile import Profile
from ..slim.width import check_recorded, pare_heads, share_in_block, spend
from ..solve.dial import Dial, Run
from .cases import FAIR, MANY_STEPS, STUDY_TARGET, Case

ONLINE, PROFILED, SHUFFLED, BARE = "heads", "heads_profiled", "heads_shuffled", "heads_bare"
# equally many full ones in every block, whatever they do; PARE's masks; the dial beside heads
UNIFORM, PARE, BESIDE = "heads_uniform", "pare_heads", "default_and_heads"
HEADS = (ONLINE, PROFILED, SHUFFLED, BARE, UNIFORM, PARE, BESIDE)
# of self-attention, what heads leave beside a dial
LEFT = 0.75
TARGETS = {BESIDE: (STUDY_TARGET, 0.5)}


class Shuffled(RolePlan):
    """The patterns that the roles ask for, at other heads of the same block."""

    def solved(self, shown, grid, num_blocks: int) -> HeadPlan:
        found = super().solved(shown, grid, num_blocks)
        random = torch.Generator().manual_seed(0)
        heads = [
            tuple(names[at] for at in torch.randperm(len(names), generator=random))
            for names in found.self_attention
        ]
        return replace(found, self_attention=tuple(heads))


class Bare(RolePlan):
    """The patterns that the roles ask for, and nothing given back."""

    def solved(self, shown, grid, num_blocks: int) -> HeadPlan:
        return replace(super().solved(shown, grid, num_blocks), corrected=False)


# by method, heads that are found in the run
FOUND = {ONLINE: RolePlan, SHUFFLED: Shuffled, BARE: Bare}


def head_cases(steps: int) -> list[Case]:
    """Every case of a number of steps."""
    if steps >= MANY_STEPS:
        return []
    return [
        Case(name, target) for name in HEADS for target in TARGETS.get(name, (0.75, STUDY_TARGET))
    ]


def head_plan(case: Case, run: Run, profile: Callable[[], Profile]) -> TrimPlan:
    """The plan whose run costs the case's share of the dense FLOPs.

    Args:
        profile: of the model, where a case needs one.

    Raises:
        ValueError: no share of the attention comes near the target.
    """
    heads, blocks = run.shape.dim // run.shape.head_dim, run.shape.num_blocks
    if case.method == BESIDE:
        return Dial(1 / case.target).solve(run, TrimPlan(heads=RolePlan(LEFT, heads))).plan
    known = profile() if case.method in (PROFILED, PARE) else None

    def plan(keep: float) -> TrimPlan:
        if case.method == PROFILED:
            return TrimPlan(
                heads=solve_heads(known, run.grid, keep, text_tokens=run.shape.text_tokens)
            )
        if case.method == PARE:
            kept = [pare_heads(known, 1 - keep, kind=kind) for kind in ("self", "cross")]
            return TrimPlan(heads=HeadPlan.keeping(heads, *kept))
        if case.method == UNIFORM:
            return TrimPlan(heads=RolePlan(keep, heads).expected(blocks))
        return TrimPlan(heads=FOUND[case.method](keep, heads))

    found = min(
        (plan(keep / 200) for keep in range(20, 200)), key=lambda p: _off(p, run, case.target)
    )
    if _off(found, run, case.target) > FAIR:
        raise ValueError(
            f"at most {1 / run.speedup(plan(0.1)):.3f} of the dense FLOPs is left out by heads"
        )
    return found


def solve_heads(
    profile: Profile, grid: TokenGrid, budget: float, *, text_tokens: int = 512
) -> HeadPlan:
    """Full, a cheap pattern or off for every head by a recorded profile, for the most importance (PARE,
    arXiv 2605.27336, eq. 3) within a budget; in place of what a run measures of itself.

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


def _off(plan: TrimPlan, run: Run, target: float) -> float:
    return abs(1 / run.speedup(plan) - target)
