"""Runs the program of each step on the host's own blocks. Knows no host.

A host tells what a model call looks like (`Engine.begin`), hands over each block (`HostBlock`) and
what the model gave (`Call.output`). What a block does was decided before: the engine obeys.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from ..methods.attend import head_groups
from ..methods.grid import TokenGrid
from ..methods.heads import HeadPlan
from ..methods.routers import Content
from ..methods.schedule import progress_at
from ..methods.shares import Shares
from .call import OUT_OF_MEMORY, Call, Shared, StepState
from .memory import ROUNDING, STRAYED
from .plan import TrimPlan
from .program import ALL, SKIP, Facts, Row, compile_step
from .record import Record, Step

COND, UNCOND = 0, 1


def check_latent(latent: torch.Tensor) -> None:
    """Refuse an empty latent [b, c, f, h, w]."""
    if latent.numel() == 0:
        raise ValueError(
            f"WanTrim got an empty latent of shape {list(latent.shape)}; expected at least one "
            "latent frame. Check width, height, length and batch size of the latent node."
        )


@dataclass(frozen=True)
class Seen:
    """What a model call has to know of its inputs, in one wait for the device.

    Args:
        largest: of the sigmas.
        mixed: chunks of the batch have different latents.
        again: the latent is that of the step before.
        strayed: share of the path since the last step that no guidance explains.
        anchored: per latent frame, whether it is given; None when none is.
        logits: of a trained router, a block each; None where there is none.
        held: share of the last change that lies in each of TRIED of the tokens; None where it is
            not known.
        goes_on: the persistence of changes of the velocity, mean of the samples; None where the last
            step did not tell.
    """

    largest: float
    mixed: bool
    again: bool
    strayed: float
    anchored: tuple[bool, ...] | None
    logits: tuple[float, ...] | None = None
    held: tuple[float, ...] | None = None
    goes_on: float | None = None


class Engine(Shared):
    """State of one sampling run. Make a new one for every run.

    Args:
        record: filled as the run goes on.
        told: called with every step that is done.

    Attributes:
        steer: called with the sigma and the part of the video of a step that is about to begin, and
            with what was seen, when the one before is in the record; it may `share` anew. None is
            nobody.
    """

    def __init__(self, plan: TrimPlan, record: Record, told: Callable[[Step], None] | None = None):
        super().__init__(plan, record)
        self._told = told
        self.now: StepState | None = None
        self.steer: Callable[[float, Hashable, Seen], None] | None = None
        self._began = 0.0
        # what heads do, by block, and the plan that follows from it
        self._shown: dict[int, torch.Tensor] = {}
        self._heads: HeadPlan | None = None
        self._measured = False
        # whether a block ever ran through us
        self._asked = False
        self._started = time.perf_counter()
        self.take(plan)

    def take(self, plan: TrimPlan) -> None:
        """Go by this plan; later only when it cannot be made before the first model call."""
        self.plan = plan
        self.heads = self._heads = None
        if plan.trims_heads and not plan.finds_roles:
            self.heads = head_groups(plan.heads)
        self.record.plan, self.record.planned = plan, plan.describe()

    def share(self, shares: Shares) -> None:
        """Go on by other shares."""
        self.plan = self.record.plan = replace(self.plan, shares=shares)

    def begin(
        self,
        *,
        levels: torch.Tensor,
        latent: torch.Tensor,
        cond_or_uncond: Sequence[int],
        grid: TokenGrid,
        num_blocks: int,
        unit: float = 1.0,
        shift: float = 1.0,
        anchored: torch.Tensor | None = None,
        window: Hashable = None,
        prompts: Sequence[Hashable] = (),
        due: Sequence[tuple[Hashable, int]] = (),
        clip: torch.Tensor | None = None,
        inside: str | None = None,
        alone: bool = True,
        by_frame: bool = False,
    ) -> Call:
        """Start a model call.

        Calls with the same sigma and latent belong to one step, however the host splits them.

        Args:
            levels: sigmas times `unit`, of any shape.
            latent: the model's input, chunks of the same samples in the order of `cond_or_uncond`.
            cond_or_uncond: COND or UNCOND per chunk of the batch.
            shift: the model's flow shift.
            anchored: bool [f], latent frames that are given.
            window: which part of the video this is, when the host samples it in parts.
            prompts: names of the chunks' prompts, when the host has some.
            due: (name, COND or UNCOND) of prompts that another call of this step brings, where the
                host knows.
            clip: class embedding of a given image [b, c], chunks like those of `latent`.
            inside: why no block may be looked into, or None.
            alone: nobody else touches the hidden state between the blocks.
            by_frame: the host modulates each latent frame apart.
        """
        if len(latent) % len(cond_or_uncond):
            raise ValueError(
                f"cond_or_uncond: expected one entry per chunk of the batch, got "
                f"{len(cond_or_uncond)} for a batch of {len(latent)}"
            )
        chunks, decider = latent.chunk(len(cond_or_uncond)), _decider(cond_or_uncond)
        names = list(prompts) if len(prompts) == len(chunks) else [None] * len(chunks)
        # a prompt can have an area of its own, whose unconditional prompt shares its name
        where = (window, names[decider])
        seen = self._look(levels, unit, chunks, decider, where, anchored, clip)
        sigma, last = seen.largest, self.now
        if last is not None and abs(last.step.sigma - sigma) < ROUNDING:
            sigma = last.step.sigma
        if not (seen.again and last.step.sigma == sigma and last.window == window):
            now = time.perf_counter()
            self._close_step(now)
            self._began = now
            if self.steer is not None:
                self.steer(sigma, where, seen)
            part = self.memory.part(where, last and last.step.sigma, sigma)
            if self.memory.lost:
                self.record.note(OUT_OF_MEMORY)
            if not part.fits(chunks[decider]):
                part.clear()
            part.noisy |= seen.strayed > STRAYED
            pairs = [*zip(names, cond_or_uncond, strict=True), *due]
            keys = [(*pair, 1) for pair in dict.fromkeys(pairs)]
            self._find_roles(grid, num_blocks)
            progress = progress_at(sigma, shift)
            facts = Facts(
                sigma, progress, grid, num_blocks, seen.anchored, inside, seen.mixed,
                known=part.known(keys), seen=part.seen,
                begun=any(one.sigma != sigma and not one.answered for one in self.record.steps),
                context=not self.memory.lost,
                skipped=self._skipped(sigma, progress, num_blocks, seen.logits),
                heads=self._heads,
                by_frame=by_frame,
                alone=alone,
                bits=self.memory.room.bits,
            )  # fmt: skip
            program = compile_step(self.plan, facts)
            if program.partial and not part.has_context(keys):
                program = compile_step(self.plan, replace(facts, remembered=False))
            step = Step(sigma, progress, program)
            self.record.steps.append(step)
            for remark in program.remarks:
                self.record.note(remark)
            later = self.plan.shares is not None and self.plan.shares.needs_context(sigma)
            # neither this step nor a later one reads keys and values that are there
            if self.memory.lost or not (later or any(row.context for row in program.rows)):
                part.forget_context()
            part.begin(sigma, chunks[decider].detach().clone())
            if program.repeats:
                part.skipped()
            if COND not in cond_or_uncond and not (program.whole or program.repeats):
                self.record.note(
                    "the unconditional prompt came first in a step and decided which tokens stay"
                )
            self.now = StepState(step, part, window, seen.anchored)
        state = self.now
        state.step.calls += 1
        keys = []
        for pair in zip(names, cond_or_uncond, strict=True):
            state.passes[pair] += 1
            keys.append((*pair, state.passes[pair]))
        return Call(self, state, grid, chunks, keys, decider, alone)

    def _look(self, levels, unit: float, chunks, decider: int, where, anchored, clip) -> Seen:
        """Read what a call decides by; the clock of a step is honest because of this wait."""
        own, last = chunks[decider], self.now
        asked: dict[Hashable, torch.Tensor | None] = {"largest": levels.max(), "anchored": anchored}
        if len(chunks) > 1:
            asked["alike"] = torch.stack([(chunks[0] == one).all() for one in chunks[1:]]).all()
        before = None if last is None else last.part.latent
        if before is not None and (before.shape, before.device) == (own.shape, own.device):
            asked["again"] = (before == own).all()
        part = self.memory.parts.get(where)
        if part is not None and part.fits(own) and self.plan.trims_shares:
            asked["strayed"], goes_on = part.look(levels.max().float() / unit, own)
            asked["goes_on"] = None if goes_on is None else goes_on.mean()
            asked["held"] = part.held()
        ask = self.plan.blocks.router.ask if self.plan.trims_blocks else None
        if ask is not None:
            level = levels.max().float().reshape(1) / unit
            image = None if clip is None else clip.chunk(len(chunks))[decider]
            asked["logits"] = ask(level, Content(own, image))
        shown = {} if last is None else last.shown
        told = _read({**asked, **shown}, own.device)
        self._take_shown({block: told.pop(block) for block in shown})
        shown.clear()
        told = {name: value.tolist() for name, value in told.items()}
        strayed, goes_on = told.get("strayed", 0.0), told.get("goes_on")
        # where noise is added every velocity is another path's
        if goes_on is not None and (part.noisy or strayed > STRAYED):
            goes_on = None
        given = tuple(value > 0 for value in told.get("anchored", ()))
        return Seen(
            told["largest"] / unit,
            not told.get("alike", 1.0),
            bool(told.get("again", 0.0)),
            strayed,
            given if any(given) else None,
            tuple(told["logits"]) if "logits" in told else None,
            tuple(told["held"]) if "held" in told else None,
            goes_on,
        )

    def _take_shown(self, shown: dict[int, torch.Tensor]) -> None:
        """Take in what a step measured, by block; it is used from the next one on."""
        self._shown |= shown
        self._measured |= bool(shown)

    def _find_roles(self, grid: TokenGrid, num_blocks: int) -> None:
        """Heads by what was measured last."""
        if not self._measured:
            return
        self._measured = False
        self._heads = self.plan.heads.solved(self._shown, grid, num_blocks)
        self.heads = head_groups(self._heads)

    def _skipped(self, sigma, progress, num_blocks: int, logits) -> frozenset[int]:
        """Blocks that the router leaves out of a step."""
        if not self.plan.trims_blocks:
            return frozenset()
        router = self.plan.blocks.router
        router.check(num_blocks)
        known = router.logits(num_blocks, sigma) if logits is None else torch.tensor(logits)
        return self.plan.blocks.skipped(sigma, progress, num_blocks, known)

    def finish(self, completed: bool) -> Record:
        """Close the run and drop everything that it held."""
        now = time.perf_counter()
        self._close_step(now, completed)
        for step in self.record.steps:
            step.settle()
        self.memory.clear()
        self.layouts.clear()
        # whoever steers holds the engine
        self.steer = None
        self.record.seconds = now - self._started
        self.record.finished = completed
        self._compare(completed)
        return self.record

    def _compare(self, completed: bool) -> None:
        """Say where the record is not what the programs say, and where a plan did nothing."""
        steps, note = self.record.steps, self.record.note
        # a step that was cancelled is no deviation
        done = steps if completed else steps[:-1]
        if any(step.answered for step in done):
            note("the model's blocks did not run in some steps: another node's cache")
        if any(step.ignored for step in steps):
            note(
                "the model ran without asking what its blocks should do: another node put a forward "
                "of its own in its place, and nothing was trimmed there"
            )
        if any(not (step.answered or step.ignored or step.as_planned) for step in done):
            note(
                "some blocks did not run as planned: another node ran them its own way, or replaced "
                "their attention"
            )
        # of steps that never ran it cannot be said that the plan left nothing out
        idle = completed and not any(step.answered for step in steps)
        if completed and steps and self.plan.trims_shares:
            announced = set(filter(math.isfinite, self.plan.shares.sigmas))
            came = {self.plan.shares.place(step.sigma) for step in steps}
            missing = len(announced) - len(came)
            if missing > 0:
                note(
                    f"{missing} of {len(announced)} steps that the sampler announced never came to "
                    "the model: another node's cache, or a sampler that goes its own way"
                )
                idle = False
        if not idle or not steps or self.plan.neutral:
            return
        if any(step.program.remarks or not step.program.whole for step in steps):
            return
        count = steps[0].grid.per_frame
        if self.plan.trims_tokens:
            note(
                "no token was left out in any step. Reasons can be: reselect_every 1, all steps "
                "outside start_percent and end_percent, or a prune ratio too small for "
                f"{count} {'token' if count == 1 else 'tokens'} in a latent frame"
            )
        else:
            note("nothing was left out: all steps lie outside of what the plan trims")

    def _close_step(self, now: float, whole: bool = True) -> None:
        """Close the step; one that was not cancelled is known to have run whole."""
        state, self.now = self.now, None
        if state is None:
            return
        state.step.seconds = now - self._began
        self.record.context_bytes = max(self.record.context_bytes, self.memory.context_bytes)
        rows, planned = [], state.step.program.rows
        self._asked |= bool(state.rows)
        # a cache does not answer before anything ran
        passed_by = state.step.watched and state.reached and not self._asked
        if state.rows or (whole and passed_by):
            # of blocks that never asked it cannot be said that they saved anything
            other = Row(ALL, state.step.grid.tokens) if whole else Row(SKIP)
            rows = [state.rows.get(index, other) for index in range(len(planned))]
        missing = len(state.rows) < len(planned)
        state.step.close(rows, state.choices, state.reached, missing, whole)
        if self._told is not None:
            self._told(state.step)


def _decider(cond_or_uncond: Sequence[int]) -> int:
    """Which chunk of a batch decides: the conditional prompt that also comes first, call by call."""
    cond = [i for i, role in enumerate(cond_or_uncond) if role == COND]
    return cond[0] if cond else 0


def _read(asked: dict[Hashable, torch.Tensor | None], device: torch.device) -> dict:
    """What there is of these in fp32 on the CPU, read in one wait for the device."""
    there = {name: value for name, value in asked.items() if value is not None}
    moved = (value.to(device, non_blocking=True) for value in there.values())
    flat = torch.cat([value.float().flatten() for value in moved]).cpu()
    parts = flat.split([value.numel() for value in there.values()])
    return {
        name: part.view(value.shape)
        for (name, value), part in zip(there.items(), parts, strict=True)
    }
