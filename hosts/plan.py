"""All that is trimmed of a model, as one plan."""

from __future__ import annotations

from dataclasses import dataclass

from ..methods.depth import BlockPlan
from ..methods.dial import Dial
from ..methods.heads import OFF, PATTERNS, HeadPlan
from ..methods.solve import Parts
from ..methods.tokens import TokenPlan


@dataclass(frozen=True)
class TrimPlan:
    """All that we decided to trim. None leaves that part of the model alone.

    Args:
        dial: decides the parts that are None when a run begins; a session wants it solved.
    """

    tokens: TokenPlan | None = None
    heads: HeadPlan | None = None
    blocks: BlockPlan | None = None
    dial: Dial | None = None

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
    def final(self) -> bool:
        """Whether the dial wants the model untouched, whatever the other parts say."""
        return self.dial is not None and self.dial.final

    @property
    def solves(self) -> bool:
        """Whether the dial has something to decide when a run begins."""
        return self.dial is not None and not (self.dial.off or self.dial.final)

    @property
    def neutral(self) -> bool:
        trims = self.trims_tokens or self.trims_heads or self.trims_blocks or self.solves
        return self.final or not trims

    @property
    def parts(self) -> Parts:
        return Parts(self.tokens, self.heads, self.blocks)

    def solved(self, parts: Parts | None = None) -> TrimPlan:
        """What a session runs: these parts, or this plan's own, and no dial."""
        if parts is None:
            parts = Parts() if self.final else self.parts
        return TrimPlan(parts.tokens, parts.heads, parts.blocks)

    def describe(self) -> str:
        if self.final:
            return "final render, nothing trimmed"
        parts = [self.dial.describe()] if self.solves else []
        if self.trims_tokens:
            parts.append(_describe_tokens(self.tokens))
        if self.trims_heads:
            parts.append(_describe_heads(self.heads))
        if self.trims_blocks:
            parts.append(_describe_blocks(self.blocks))
        return "; ".join(parts) or "nothing trimmed"


def _describe_tokens(t: TokenPlan) -> str:
    window = (
        "" if (t.start, t.end) == (0.0, 1.0) else f" from {t.start:.0%} to {t.end:.0%} of the run"
    )
    text = (
        f"{1 - t.schedule.keep_ratio:.0%} of the tokens dropped{window} ({t.schedule.direction}, "
        f"importance {t.importance}, reselected every {t.reselect_every} blocks"
    )
    if t.trim_reselecting:
        text += ", the choosing block trimmed too"
    if t.restore != "identity":
        text += f", dropped tokens get their {t.restore.replace('_', ' ')}"
    if t.start < t.spare and t.remembers:
        text += f", after the first {t.spare:.0%} of the run on all tokens"
    elif t.remembers:
        text += ", after a first step on all tokens"
    text += ", keys and values kept)" if t.dropped_kv == "keep" else ")"
    if t.given is not None:
        text += f"; of a video that begins with a given picture {_describe_tokens(t.given)}"
    return text


def _describe_heads(plan: HeadPlan) -> str:
    counts = ", ".join(f"{plan.count(name)} {name}" for name in PATTERNS if plan.count(name))
    cross = sum(heads.count(OFF) for heads in plan.cross_attention)
    return f"heads {counts}" + (f", {cross} cross-attention heads off" if cross else "")


def _describe_blocks(plan: BlockPlan) -> str:
    b = plan.budget
    if plan.router.name == "fixed":
        text = "always the same blocks skipped"
    else:
        text = f"{b.k_min:.0%} to {b.k_max:.0%} of the blocks run ({b.shape}, {plan.router.name})"
    return text + (", skipped ones repeat their last update" if plan.skipped == "reuse" else "")
