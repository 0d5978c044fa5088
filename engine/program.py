"""A step is a table: what every block does in it, made before the first block runs.

`compile_step` is the one place that decides. The engine obeys the table, the cost model sums it, the
record holds the same rows as they happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..methods.grid import TokenGrid
from ..methods.heads import HeadPlan
from ..methods.schedule import progress_at
from .plan import TrimPlan

# what a block runs on
ALL, KEPT, SKIP = "all", "kept", "skip"
# keys and values of all tokens: remembered, attended to, or both
WRITE, READ, UPDATE = "write", "read", "update"


@dataclass(frozen=True)
class Row:
    """One block in one step.

    Args:
        run: ALL tokens, the KEPT ones, or SKIP: the block is the identity.
        tokens: of the grid that it computes, for each sample.
        choose: tokens are chosen by what this block shows, for the blocks behind it.
        heads: its heads run in their patterns.
        context: what is done with remembered keys and values; "" is nothing.
        measure: it shows what its heads do.
    """

    run: str = ALL
    tokens: int = 0
    choose: bool = False
    heads: bool = False
    context: str = ""
    measure: bool = False

    @property
    def looked_into(self) -> bool:
        """Whether the block's attention has something to do or to show."""
        return self.choose or self.heads or bool(self.context) or self.measure

    @property
    def untouched(self) -> bool:
        """Whether the host's block may run without us."""
        return self.run == ALL and not self.looked_into


@dataclass(frozen=True)
class Program:
    """What one step does.

    Args:
        budget: tokens that stay of a latent frame that is not anchored.
        share: of the tokens that the step was to compute; 0 repeats the velocity.
        anchored: latent frames that keep all their tokens.
        remembers: what the model gives is kept for later steps.
        heads: what they run in where their row says so; None is not known, or not planned.
        remarks: what was planned otherwise, and why.
        alone: kept tokens stay short from block to block, because nobody else looks at them there.
        bits: of a remembered key's or value's number.
    """

    rows: tuple[Row, ...]
    grid: TokenGrid
    budget: int
    share: float = 1.0
    anchored: int = 0
    remembers: bool = False
    heads: HeadPlan | None = None
    remarks: tuple[str, ...] = ()
    alone: bool = True
    bits: int = 8

    @property
    def repeats(self) -> bool:
        """Whether the velocity is repeated without running the model."""
        return self.share == 0.0

    @property
    def partial(self) -> bool:
        """Whether tokens are chosen before the first block, by how their velocity changed."""
        return 0.0 < self.share < 1.0

    @property
    def whole(self) -> bool:
        """Whether every block computes everything."""
        return all(row.run == ALL and not row.heads for row in self.rows)

    @property
    def untouched(self) -> bool:
        """Whether the host's model may run without us: neutral is every row is all."""
        return all(row.untouched for row in self.rows)

    def without_context(self) -> Program:
        """The same where no keys and values can be remembered: what attends to them is whole."""
        rows = tuple(replace(row, context="") for row in self.rows)
        if not self.partial:
            return replace(self, rows=rows)
        tokens = self.grid.tokens
        rows = tuple(
            row if row.run == SKIP else replace(row, run=ALL, tokens=tokens) for row in rows
        )
        return replace(self, rows=rows, budget=self.grid.per_frame, share=1.0)


@dataclass(frozen=True)
class Facts:
    """What is known when a step begins.

    Args:
        anchored: per latent frame, whether it is given; None when none is.
        inside: why no block may be looked into, or None.
        mixed: prompts of different areas came in one call.
        known: the velocity of every prompt of the call is remembered.
        seen: steps that computed something so far; how tokens change is known from the second.
        begun: another part of the video had earlier steps.
        context: keys and values of all tokens could be remembered.
        remembered: those of every prompt of the call are, if that is asked.
        skipped: blocks that the router leaves out; None is not known yet, only how many.
        heads: patterns that were found in this run; None is none yet.
        by_frame: the host modulates each latent frame apart, and spreads that over equally many
            tokens.
        alone: nobody else touches the hidden state between the blocks.
        bits: of the numbers of remembered keys and values.
    """

    sigma: float
    progress: float
    grid: TokenGrid
    num_blocks: int
    anchored: Sequence[bool] | None = None
    inside: str | None = None
    mixed: bool = False
    known: bool = False
    seen: int = 0
    begun: bool = False
    context: bool = True
    remembered: bool = True
    skipped: frozenset[int] | None = frozenset()
    heads: HeadPlan | None = None
    by_frame: bool = False
    alone: bool = True
    bits: int = 8


# parts of a latent frame in which its budget is counted where tokens share rows of modulation: so
# coarse that the rows take less room than the dropped tokens leave
PARTS = 24
MIXED = "prompts of different areas of the picture came in one model call: all tokens were computed there"
ALL_GIVEN = "every latent frame is given and anchored: all tokens were computed"
NOT_REMEMBERED = (
    "after the first steps nothing was remembered for a part of the video (context windows that "
    "move, prompts that came anew, or LoRAs whose strength changes): all its tokens were computed"
)
NO_CONTEXT = (
    "the keys and values of left out tokens were not remembered: steps that were to compute a part "
    "of the tokens computed all of them"
)


def compile_step(plan: TrimPlan, facts: Facts) -> Program:
    """The program of a step."""
    grid, remarks = facts.grid, []
    share = _share(plan, facts, remarks)
    skipped = facts.skipped
    if share == 0.0 or not plan.trims_blocks:
        skipped = frozenset()
    elif skipped is None:
        skipped = plan.blocks.skipped(facts.sigma, facts.progress, facts.num_blocks, None)
    budget, anchored = grid.per_frame, 0
    if 0.0 < share < 1.0:
        budget = max(1, round(share * grid.per_frame))
    elif share == 1.0 and plan.trims_tokens:
        budget = plan.tokens.budget(facts.progress, grid)
        if budget < grid.per_frame and (facts.inside or facts.mixed):
            remarks.append(facts.inside or MIXED)
            budget = grid.per_frame
        if budget < grid.per_frame and plan.tokens.anchor and facts.anchored is not None:
            anchored = sum(facts.anchored)
            if anchored == grid.frames:
                remarks.append(ALL_GIVEN)
                budget, anchored = grid.per_frame, 0
            elif facts.by_frame:
                most = max(1, grid.per_frame // PARTS)
                group = max(n for n in range(1, most + 1) if grid.per_frame % n == 0)
                budget = max(group, budget // group * group)
    heads, patterned, measured = _heads(plan, facts, share, remarks)
    kept = anchored * grid.per_frame + (grid.frames - anchored) * budget
    if share == 0.0:
        rows = [Row(SKIP)] * facts.num_blocks
    elif budget == grid.per_frame:
        rows = [Row(ALL, grid.tokens)] * facts.num_blocks
    elif 0.0 < share < 1.0:
        rows = [Row(KEPT, kept)] * facts.num_blocks
    else:
        rows = _reselecting(plan.tokens, facts, skipped, kept)
    context = _context(plan, facts, share)
    rows = [
        Row(SKIP)
        if index in skipped or row.run == SKIP
        else replace(
            row,
            heads=patterned and heads.changes(index),
            context=context,
            measure=measured and row.run == ALL,
        )
        for index, row in enumerate(rows)
    ]
    return Program(
        tuple(rows), grid, budget, share, anchored, plan.trims_shares, heads, tuple(remarks),
        facts.alone, facts.bits,
    )  # fmt: skip


def _share(plan: TrimPlan, facts: Facts, remarks: list[str]) -> float:
    if plan.shares is None:
        return 1.0
    share = plan.shares.at(facts.sigma)
    if share == 1.0:
        return share
    if not facts.known:
        if facts.seen or facts.begun:
            remarks.append(NOT_REMEMBERED)
        return 1.0
    if share > 0.0:
        why = facts.inside or (MIXED if facts.mixed else None)
        if why is None and not (facts.context and facts.remembered and plan.may_be_partial):
            why = NO_CONTEXT
        if why is not None:
            remarks.append(why)
        if why is not None or facts.seen < 2:
            return 1.0
    return share


def _heads(
    plan: TrimPlan, facts: Facts, share: float, remarks: list[str]
) -> tuple[HeadPlan | None, bool, bool]:
    """The step's patterns, whether heads run in them, and whether it measures what they do."""
    if not plan.trims_heads:
        return None, False, False
    heads = facts.heads if plan.finds_roles else plan.heads
    if facts.inside:
        remarks.append(facts.inside)
        return heads, False, False
    measured = plan.finds_roles and share == 1.0 and not facts.mixed
    return heads, heads is not None, measured


def _context(plan: TrimPlan, facts: Facts, share: float) -> str:
    if plan.shares is None or not facts.context or facts.inside or facts.mixed or share == 0.0:
        return ""
    needed = plan.may_be_partial and plan.shares.needs_context(facts.sigma)
    if share < 1.0:
        return UPDATE if needed else READ
    return WRITE if needed else ""


def _reselecting(tokens, facts: Facts, skipped: frozenset[int], kept: int) -> list[Row]:
    """TAPE's rows (arXiv 2605.17837): choosing blocks run on all tokens, the others on the kept."""
    rows, chosen, grid = [], False, facts.grid
    for index in range(facts.num_blocks):
        due = tokens.reselects(index)
        if index in skipped:
            # nothing to choose by; the next block that runs does
            chosen = chosen and not due
            rows.append(Row(SKIP))
        elif due or not chosen:
            last = index == facts.num_blocks - 1
            chosen = not (last or tokens.reselects(index + 1))
            rows.append(Row(ALL, grid.tokens, choose=chosen))
        else:
            rows.append(Row(KEPT, kept))
    return rows


def expected_programs(
    plan: TrimPlan,
    sigmas: Sequence[float],
    shift: float,
    grid: TokenGrid,
    num_blocks: int,
    anchored: Sequence[bool] | None = None,
    *,
    alone: bool = True,
    bits: int = 8,
) -> list[Program]:
    """The programs of a run in which nothing comes in the way.

    Args:
        sigmas: of the steps, without the last, 0.
        shift: the model's flow shift.
        alone, bits: as in `Facts`.
    """
    programs, seen = [], 0
    for sigma in sigmas:
        facts = Facts(
            sigma, progress_at(sigma, shift), grid, num_blocks, anchored,
            known=seen > 0, seen=seen, skipped=None,
            heads=plan.heads.expected(num_blocks) if plan.finds_roles and seen else None,
            alone=alone, bits=bits,
        )  # fmt: skip
        programs.append(compile_step(plan, facts))
        seen += not programs[-1].repeats
    return programs
