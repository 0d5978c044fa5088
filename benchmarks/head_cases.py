"""Heads on the bench: by the roles that a run shows, by a profile, and what has to be beaten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..engine.plan import TrimPlan
from ..methods.heads import HeadPlan
from ..methods.role_plan import RolePlan
from ..profiles.profile import Profile
from ..slim.width import pare_heads
from ..solve.dial import Dial, Run
from .cases import FAIR, MANY_STEPS, STUDY_TARGET, Case
from .profiled_heads import solve_heads

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


def _off(plan: TrimPlan, run: Run, target: float) -> float:
    return abs(1 / run.speedup(plan) - target)
