"""All that is trimmed of a model, as one plan."""

from __future__ import annotations

from dataclasses import dataclass

from ..methods.depth import BlockPlan
from ..methods.heads import OFF, PATTERNS, HeadPlan
from ..methods.role_plan import RolePlan
from ..methods.shares import Shares
from ..methods.tokens import TokenPlan


@dataclass(frozen=True)
class TrimPlan:
    """All that we decided to trim. None leaves that part of the model alone.

    Args:
        tokens: TAPE's token pruning, in the steps that compute something.
        heads: the pattern of every head, or a budget for patterns that are found in the run.
        shares: of the tokens, by step.
    """

    tokens: TokenPlan | None = None
    heads: HeadPlan | RolePlan | None = None
    blocks: BlockPlan | None = None
    shares: Shares | None = None

    @property
    def trims_shares(self) -> bool:
        return self.shares is not None and not self.shares.neutral

    @property
    def trims_tokens(self) -> bool:
        return self.tokens is not None and self.tokens.schedule.keep_ratio < 1.0

    @property
    def trims_heads(self) -> bool:
        return self.heads is not None and not self.heads.neutral

    @property
    def trims_blocks(self) -> bool:
        return self.blocks is not None and not self.blocks.neutral

    @property
    def finds_roles(self) -> bool:
        """Whether the run has to measure what its heads do."""
        return self.trims_heads and isinstance(self.heads, RolePlan)

    @property
    def roles_left(self) -> float | None:
        """Of self-attention, what heads leave whose patterns the run finds; None without such."""
        return self.heads.keep_ratio if self.finds_roles else None

    @property
    def neutral(self) -> bool:
        return not (self.trims_shares or self.trims_tokens or self.trims_heads or self.trims_blocks)

    @property
    def may_be_partial(self) -> bool:
        """Whether a step may compute a part of its tokens: every block must have seen all others."""
        return not (self.trims_tokens or self.trims_blocks)

    def describe(self) -> str:
        parts = []
        if self.trims_shares:
            parts.append(_describe_shares(self.shares))
        if self.trims_tokens:
            parts.append(_describe_tokens(self.tokens))
        if self.trims_heads:
            parts.append(_describe_heads(self.heads))
        if self.trims_blocks:
            parts.append(_describe_blocks(self.blocks))
        return "; ".join(parts) or "nothing trimmed"


def _describe_shares(shares: Shares) -> str:
    each = [shares.at(sigma) for sigma in shares.sigmas]
    whole, none = each.count(1.0), each.count(0.0)
    partial = len(each) - whole - none
    parts = [f"of {len(each)} steps {whole} whole"]
    if partial:
        parts.append(f"{partial} on a part of the tokens")
    if none:
        parts.append(f"{none} repeated")
    return f"{', '.join(parts)} ({' '.join(f'{share:.2g}' for share in each)})"


def _describe_tokens(t: TokenPlan) -> str:
    window = (
        "" if (t.start, t.end) == (0.0, 1.0) else f" from {t.start:.0%} to {t.end:.0%} of the run"
    )
    return (
        f"{1 - t.schedule.keep_ratio:.0%} of the tokens dropped{window} ({t.schedule.direction}, by "
        f"the attention they receive, reselected every {t.reselect_every} blocks)"
    )


def _describe_heads(plan: HeadPlan | RolePlan) -> str:
    if isinstance(plan, RolePlan):
        return f"heads by their roles, {plan.keep_ratio:.0%} of self-attention left"
    counts = ", ".join(f"{plan.count(name)} {name}" for name in PATTERNS if plan.count(name))
    cross = sum(heads.count(OFF) for heads in plan.cross_attention)
    return f"heads {counts}" + (f", {cross} cross-attention heads off" if cross else "")


def _describe_blocks(plan: BlockPlan) -> str:
    b = plan.budget
    if plan.router.name == "fixed":
        return "always the same blocks skipped"
    return f"{b.k_min:.0%} to {b.k_max:.0%} of the blocks run ({b.shape}, {plan.router.name})"
