"""What really happened in a sampling run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import torch

from ..methods.cost import WanShape
from ..methods.grid import TokenGrid
from ..methods.heads import HeadPlan
from ..methods.tokens import Selection
from .outcome import mean_work, speed_lines, step_work

# in place of a selection: the block did not run
SKIPPED = "skipped"


@dataclass
class Step:
    """One denoising step (or one model call of a sampler that makes several)."""

    sigma: float
    progress: float
    keep_ratio: float
    grid: TokenGrid
    num_blocks: int
    calls: int = 0
    seconds: float = 0.0
    # tokens of the grid that each block was to compute if it ran, and blocks that were to run
    planned_tokens: list[int] = field(default_factory=list)
    planned_blocks: int = 0
    # latent frames that kept all their tokens because they are given
    anchored_frames: int = 0
    # tokens of the grid that each block computed
    kept_per_block: list[int] = field(default_factory=list)
    # blocks whose heads ran as the heads' plan has them
    patterned: set[int] = field(default_factory=set)
    # share of the blocks that computed each token [f, h, w], first sample of the batch; known when
    # the run is over
    coverage: torch.Tensor | None = None
    # dropped positions of each choice, and how many blocks went by it
    _dropped: list[tuple[torch.Tensor, int]] = field(default_factory=list, repr=False)
    _everywhere: float = field(default=1.0, repr=False)

    def record(self, ran: list[Selection | str | None], nothing_ran: bool = False) -> None:
        """Take in what each block ran on.

        Args:
            ran: per block, None for all tokens, SKIPPED for none; empty when the host's model ran
                untouched.
            nothing_ran: another node answered the step, and no block ran at all.
        """
        grid = self.grid
        self._everywhere = 0.0 if nothing_ran else 1.0
        self.kept_per_block = [0 if nothing_ran else grid.tokens] * self.num_blocks
        choices: dict[int, list] = {}
        for block_index, selection in enumerate(ran):
            if selection == SKIPPED:
                self._everywhere -= 1 / self.num_blocks
                self.kept_per_block[block_index] = 0
            elif selection is not None:
                # most blocks share a choice
                choices.setdefault(id(selection), [selection, 0])[1] += 1
                self.kept_per_block[block_index] -= selection.dropped.shape[1]
        # reading them waits for the device; positions fit in half the memory until then
        self._dropped = [
            (selection.dropped[0].to(torch.int32), blocks) for selection, blocks in choices.values()
        ]

    def settle(self) -> None:
        """Work out the coverage when the run is over."""
        grid = self.grid
        coverage = torch.full((grid.tokens,), self._everywhere)
        for dropped, blocks in self._dropped:
            coverage[dropped.cpu().long() - grid.start] -= blocks / self.num_blocks
        self._dropped = []
        self.coverage = coverage.view(grid.frames, grid.height, grid.width)

    @property
    def blocks_run(self) -> int:
        return sum(kept > 0 for kept in self.kept_per_block)

    @property
    def whole(self) -> bool:
        """Whether the step did all that an untouched model does."""
        return self.kept_share == 1.0 and not self.patterned

    @property
    def planned_share(self) -> float | None:
        """Share of block x token work that was planned; None when nobody said."""
        if not self.planned_tokens:
            return None
        each = sum(self.planned_tokens) / (self.grid.tokens * self.num_blocks)
        return each * self.planned_blocks / self.num_blocks

    @property
    def kept_share(self) -> float:
        """Share of block x token work that was done."""
        return sum(self.kept_per_block) / (self.grid.tokens * self.num_blocks)


@dataclass
class Report:
    """A run: its steps in order, and everything that did not happen with its reason."""

    model: str = ""
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    planned: str = ""
    finished: bool = False
    # of the whole run, also when nothing was trimmed
    seconds: float = 0.0
    # of the self-attention's query-key pairs, what the heads' patterns leave; None without a plan
    attention_share: float | None = None
    # the heads' plan, and whether dropped tokens stayed as keys and values
    heads: HeadPlan | None = None
    keeps_kv: bool = False
    # of the model, for the cost model; None when the host cannot tell it
    shape: WanShape | None = None
    # torch's name for it; empty for one without
    device: str = ""
    # of a whole step of the first step's size, when one was timed apart from the run
    dense_seconds: float | None = None

    def note(self, text: str) -> None:
        """Say once what did not happen and why."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def kept_share(self) -> float:
        return statistics.fmean(s.kept_share for s in self.steps) if self.steps else 1.0

    def _work_lines(self) -> list[str]:
        work, lines = mean_work(self), []
        if work is not None:
            lines.append(
                f"Work done: {work:.1%} of an untouched model's FLOPs, by the cost model "
                "(time falls less than work on small videos)."
            )
        # with whole tokens and blocks it would seem that a plan of heads did nothing
        if work is None or self.kept_share < 1.0 or self.attention_share is None:
            lines.append(
                f"Token work done: {self.kept_share:.1%} of block x token (an untouched model does "
                "100%)."
            )
        return lines

    def _heads_line(self) -> list[str]:
        if self.attention_share is None:
            return []
        return [f"Self-attention work left by the heads' patterns: {self.attention_share:.1%}."]

    def _blocks_line(self) -> list[str]:
        """The real mean: how many steps lie at high noise is the sampler's and the shift's doing."""
        run = [step.blocks_run for step in self.steps]
        num_blocks = self.steps[0].num_blocks
        if min(run) == num_blocks:
            return []
        per_step = " ".join(str(count) for count in run)
        return [f"Blocks run: {statistics.fmean(run):.1f} of {num_blocks} (per step: {per_step})."]

    def coverage(self) -> torch.Tensor | None:
        """Mean over the steps of the share of blocks that computed each token [f, h, w]."""
        maps = [s.coverage for s in self.steps if s.coverage is not None]
        same = [m for m in maps if m.shape == maps[0].shape]
        return torch.stack(same).mean(0) if same else None

    def text(self) -> str:
        """The report in an artist's words."""
        if not self.steps and not self.finished:
            return "WanTrim: no sampling run seen yet."
        remarks = ["What did not happen, and why:"]
        remarks += [f"- {note}" for note in self.notes] or ["- nothing: everything ran as planned."]
        lines = [f"WanTrim on {self.model}: {self.planned}"]
        if not self.steps:
            lines.append(f"The model ran untouched, {self.seconds:.1f} s in all.")
            return "\n".join([*lines, "", *remarks])
        seconds = statistics.median(step.seconds for step in self.steps)
        lines += [
            f"{len(self.steps)} steps, {self.seconds:.1f} s in all, {seconds:.2f} s per step (median).",
            *self._work_lines(),
            *self._heads_line(),
            *self._blocks_line(),
            *speed_lines(self),
            "",
            # before the table: a long run would push them out of sight
            *remarks,
            "",
            "step  sigma   kept  planned  token work   FLOPs  blocks  calls  seconds",
        ]
        lines += [self._row(i + 1, step) for i, step in enumerate(self.steps)]
        if not self.finished:
            lines.append("The run did not finish (cancelled or failed).")
        return "\n".join(lines)

    def _row(self, number: int, step: Step) -> str:
        planned, work = (
            "-" if share is None else f"{share:.1%}"
            for share in (step.planned_share, step_work(self, step))
        )
        return (
            f"{number:>4}  {step.sigma:.4f}  {step.keep_ratio:>4.0%}  {planned:>7}"
            f"  {step.kept_share:>10.1%}  {work:>6}  {step.blocks_run:>6}  {step.calls:>5}"
            f"  {step.seconds:>7.2f}"
        )
