"""What really happened in a sampling run: the rows of its steps' programs, as they ran."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..methods.cost import WanShape, Width
from ..methods.grid import TokenGrid
from ..methods.shares import place_of
from ..methods.tokens import Selection
from .plan import TrimPlan
from .program import SKIP, Program, Row


@dataclass(eq=False)
class Step:
    """One denoising step (or one model call of a sampler that makes several).

    Args:
        program: what was planned.
        rows: what each block did; known when the step is over.
        answered: another node answered the step, and no block ran.
        ignored: blocks ran that never asked what they should do.
        cut: the run was cancelled or failed before it was over.
        coverage: share of the blocks that computed each token [b, f, h, w], of each sample of the batch
            or of all alike (b = 1); known when the run is over.
    """

    sigma: float
    progress: float
    program: Program
    calls: int = 0
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    answered: bool = False
    ignored: bool = False
    cut: bool = False
    coverage: torch.Tensor | None = None
    # dropped positions of each choice, and how many blocks went by it
    _dropped: list[tuple[torch.Tensor, int]] = field(default_factory=list, repr=False)

    @property
    def grid(self) -> TokenGrid:
        return self.program.grid

    @property
    def num_blocks(self) -> int:
        return len(self.program.rows)

    @property
    def repeated(self) -> bool:
        """Whether the step gave the velocity of an earlier one, as it was to."""
        return self.program.repeats and not self.answered

    @property
    def watched(self) -> bool:
        """Whether the blocks of the step were to run through the engine."""
        return not (self.program.repeats or self.program.untouched)

    def close(
        self,
        rows: list[Row],
        choices: list[Selection | None],
        reached: bool | None = None,
        missing: bool = False,
        whole: bool = True,
    ) -> None:
        """Take in what each block of the step's first call did, and the choice that it went by.

        Args:
            reached: whether that call came to the model; None is not known.
            missing: there are blocks that never asked what they should do.
            whole: the run was not cancelled meanwhile.
        """
        planned = self.program.rows
        self.ignored = whole and missing and bool(rows)
        if reached is False:
            rows = []
        elif not self.watched:
            rows = list(planned)
        over = not missing if self.watched else self.program.repeats or reached
        self.cut = not (whole or over)
        self.answered = whole and not rows
        self.rows = rows or [Row(SKIP)] * len(planned)
        counted: dict[int, list] = {}
        for selection in choices:
            if selection is not None:
                # most blocks share a choice
                counted.setdefault(id(selection), [selection, 0])[1] += 1
        # reading them waits for the device; positions fit in half the memory until then
        self._dropped = [
            (selection.dropped.to(torch.int32), blocks) for selection, blocks in counted.values()
        ]

    def settle(self) -> None:
        """Work out the coverage when the run is over."""
        grid, ran = self.grid, sum(row.run != SKIP for row in self.rows)
        samples = max((len(dropped) for dropped, _ in self._dropped), default=1)
        coverage = torch.full((samples, grid.tokens), ran / max(len(self.rows), 1))
        for dropped, blocks in self._dropped:
            inside = dropped.cpu().long() - grid.start
            coverage.scatter_add_(1, inside, torch.full(inside.shape, -blocks / len(self.rows)))
        self._dropped = []
        self.coverage = coverage.view(samples, grid.frames, grid.height, grid.width)

    @property
    def tokens_per_block(self) -> list[int]:
        """Tokens of the grid that each block computed."""
        return [row.tokens for row in self.rows]

    @property
    def patterned(self) -> list[int]:
        """Blocks whose heads ran in their patterns."""
        return [index for index, row in enumerate(self.rows) if row.heads]

    @property
    def blocks_run(self) -> int:
        return sum(row.run != SKIP for row in self.rows)

    @property
    def whole(self) -> bool:
        """Whether the step did all that an untouched model does."""
        return self.kept_share == 1.0 and not self.patterned

    @property
    def kept_share(self) -> float:
        """Share of block x token work that was done."""
        return sum(self.tokens_per_block) / (self.grid.tokens * self.num_blocks)

    @property
    def as_planned(self) -> bool:
        """Whether every block did what the step's program says."""
        return list(self.program.rows) == self.rows


@dataclass
class Record:
    """A run: its steps in order, and everything that did not happen with its reason.

    Args:
        plan: None while it is not known; `planned` is what it is in words.
        asked, expected: times less work that a dial was asked for, and that its plan is to give.
        missed: those are not the same.
        both: `asked` is of two experts, of which this run is one.
        seconds: of the whole run, also when nothing was trimmed.
        context: where keys and values of left out tokens were remembered, in words.
        context_bytes: that they took at most.
        shape: of the model, for the cost model; None when the host cannot tell it.
        width: of a slim model, whose `shape` is the full one's.
        device: torch's name for it; empty for one without.
        dense_seconds: of a whole step of the first step's size, when one was timed apart.
        announced: sigmas of the sampler's steps; empty where it did not say.
        parts: the runs that this one is joined of; none for a run alone.
    """

    model: str = ""
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plan: TrimPlan | None = None
    planned: str = ""
    asked: float | None = None
    expected: float | None = None
    missed: bool = False
    both: bool = False
    finished: bool = False
    seconds: float = 0.0
    context: str | None = None
    context_bytes: int = 0
    shape: WanShape | None = None
    width: Width | None = None
    device: str = ""
    dense_seconds: float | None = None
    announced: tuple[float, ...] = ()
    parts: tuple[Record, ...] = ()

    def without_cut(self) -> Record:
        """The run without a step that it did not finish."""
        return replace(self, steps=[step for step in self.steps if not step.cut])

    @property
    def by_calls(self) -> bool:
        """Whether `steps` are model calls, of which a step of the sampler makes several."""
        return any(
            len(run.steps) > len({place_of(run.announced, step.sigma) for step in run.steps})
            for run in self.parts or (self,)
            if run.announced
        )

    def of(self, step: Step) -> Record:
        """The run that a step is of."""
        return next((part for part in self.parts if step in part.steps), self)

    @property
    def held(self) -> str | None:
        """What was remembered of left out tokens, in words."""
        if self.context is None:
            return None
        took = f"{self.context_bytes / 1e9:.2g} GB"
        return f"keys and values of left out tokens, {took} {self.context}"

    def note(self, text: str) -> None:
        """Say once what did not happen and why."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def kept_share(self) -> float:
        return statistics.fmean(s.kept_share for s in self.steps) if self.steps else 1.0

    def coverage(self) -> torch.Tensor | None:
        """Mean over the steps on a part of the share of blocks that computed each token [b, f, h, w].

        Of the last step's size, where they are not all of one; b is 1 where all samples are alike.
        Steps that compute everything or nothing say nothing about places.
        """
        maps = [s.coverage for s in self.steps if s.coverage is not None and 0 < s.kept_share < 1]
        same = [m for m in maps if m.shape[1:] == maps[-1].shape[1:]]
        samples = max((len(m) for m in same), default=1)
        alike = [m.expand(samples, *m.shape[1:]) for m in same if len(m) in (1, samples)]
        return torch.stack(alike).mean(0) if alike else None


def join_records(records: Sequence[Record]) -> Record:
    """The runs that made one video, one after another, as one; a record alone as it is."""
    first, *others = records
    if not others:
        return first
    notes = dict.fromkeys(note for record in records for note in record.notes)
    planned = dict.fromkeys(record.planned for record in records)
    ran = [record for record in records if record.steps] or [first]

    def alike(name: str):
        """What all of them say, or None."""
        said = {getattr(record, name) for record in ran}
        return said.pop() if len(said) == 1 else None

    return replace(
        ran[0],
        asked=alike("asked"),
        expected=alike("expected"),
        steps=[step for record in records for step in record.steps],
        notes=list(notes),
        planned="; then ".join(planned),
        finished=all(record.finished for record in records),
        seconds=sum(record.seconds for record in records),
        missed=any(record.missed for record in records),
        context=next((record.context for record in records if record.context), None),
        context_bytes=max(record.context_bytes for record in records),
        parts=tuple(part for record in records for part in record.parts or (record,)),
    )
