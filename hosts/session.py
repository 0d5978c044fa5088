"""One sampling run: decides once per step and runs each block on the tokens that stay.

Knows no host. A host tells it what a model call looks like (`Session.begin`) and hands it a
`BlockCall` per block, which can run the host's own block on all tokens or on some.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..methods.attend import Layout
from ..methods.budget import attention_share
from ..methods.cost import planned_tokens
from ..methods.grid import TokenGrid
from ..methods.importance import parts
from ..methods.routers import Content
from ..methods.tokens import Selection
from .call import ModelCall
from .heads import head_groups
from .past import Past
from .plan import TrimPlan
from .report import Report, Step
from .skipping import Skips, StepBlocks

COND, UNCOND = 0, 1


@dataclass
class Decision:
    """What one step keeps: made by the first call that sees the step, shared by the others."""

    sigma: float
    latent: torch.Tensor
    budget: int
    step: Step
    past: Past
    # None when every block runs in every step
    blocks: StepBlocks | None = None
    # of the velocity since the last step [b, tokens]
    change: torch.Tensor | None = None
    # all tokens are computed, for later steps to repeat
    spared: bool = False
    selections: dict[int, Selection] = field(default_factory=dict)
    # model calls so far, by prompts
    passes: Counter = field(default_factory=Counter)
    # what each block of the step's first call ran on; None is all tokens
    ran: list[Selection | None] = field(default_factory=list)


def check_latent(latent: torch.Tensor) -> None:
    """Refuse an empty latent [b, c, f, h, w].

    Raises:
        ValueError: says what came and where to look.
    """
    if latent.numel() == 0:
        raise ValueError(
            f"WanTrim got an empty latent of shape {list(latent.shape)}; expected at least one "
            "latent frame. Check width, height, length and batch size of the latent node."
        )


@dataclass(frozen=True)
class Seen:
    """What a model call has to know of its inputs, in one wait for the device.

    Args:
        largest: of the noise levels.
        mixed: chunks of the batch have different latents.
        again: the latent is that of the decision before.
        anchored: per latent frame, whether it is given; None when none is.
    """

    largest: float
    mixed: bool
    again: bool
    anchored: tuple[bool, ...] | None


class Session:
    """State of one sampling run. Make a new one for every run.

    Args:
        report: filled as the run goes on.
        told: called with every step that is done.
    """

    def __init__(self, plan: TrimPlan, report: Report, told: Callable[[Step], None] | None = None):
        self.report = report
        self._told = told
        self.decision: Decision | None = None
        # False where a first latent frame that is given may be a reference instead of a start
        self.tells_start = True
        # one for every part of the video that is sampled apart
        self.pasts: dict[Hashable, Past] = {}
        # sigma of the first step that leaves tokens out
        self.first_trimmed: float | None = None
        # of whole sequences, by grid and length
        self.layouts: dict[tuple[TokenGrid, int], Layout] = {}
        # whether any call so far had prompts of different areas
        self._mixed = False
        self._began = 0.0
        self._started = time.perf_counter()
        self.take(plan)

    def take(self, plan: TrimPlan) -> None:
        """Go by this plan; later only when it cannot be made before the first model call."""
        self.plan = plan
        self.skips = Skips(plan.blocks) if plan.trims_blocks else None
        self.heads = head_groups(plan.heads) if plan.trims_heads else None
        self.report.heads = plan.heads if plan.trims_heads else None
        self.report.keeps_kv = plan.trims_tokens and plan.tokens.dropped_kv == "keep"

    def look(
        self,
        levels: torch.Tensor,
        latent: torch.Tensor,
        cond_or_uncond: Sequence[int],
        anchored: torch.Tensor | None = None,
    ) -> Seen:
        """Read what `begin` decides by; the clock of a step is honest because of this wait.

        Args:
            levels: noise levels, of any shape.
            latent, cond_or_uncond: as for `begin`.
            anchored: bool [f], latent frames that are given and must not lose tokens.
        """
        if len(latent) % len(cond_or_uncond):
            raise ValueError(
                f"cond_or_uncond: expected one entry per chunk of the batch, got "
                f"{len(cond_or_uncond)} for a batch of {len(latent)}"
            )
        chunks = latent.chunk(len(cond_or_uncond))
        decider, last = _decider(cond_or_uncond), self.decision
        asked = [levels.max()]
        asked += [(chunks[0] == chunk).all() for chunk in chunks[1:]]
        alike = last is not None and _alike(last.latent, chunks[decider])
        if alike:
            asked.append((last.latent == chunks[decider]).all())
        # what the blocks of the call before told the router comes along
        unread = [] if self.skips is None else self.skips.unread()
        told = torch.stack([value.to(latent.device).float() for value in asked + unread])
        if anchored is not None:
            told = torch.cat([told, anchored.to(told)])
        largest, *told = told.tolist()
        mixed = not all(told[: len(chunks) - 1])
        again = alike and bool(told[len(chunks) - 1])
        told = told[len(asked) - 1 :]
        if unread:
            self.skips.read(told[: len(unread)])
        given = tuple(value > 0 for value in told[len(unread) :])
        return Seen(largest, mixed, again, given if any(given) else None)

    def begin(
        self,
        *,
        latent: torch.Tensor,
        sigma: float,
        progress: float,
        cond_or_uncond: Sequence[int],
        grid: TokenGrid,
        num_blocks: int,
        window: Hashable = None,
        patch_frames: int = 1,
        prompts: Hashable = None,
        clip: torch.Tensor | None = None,
        upcoming: tuple[float, float] | None = None,
        seen: Seen | None = None,
    ) -> ModelCall:
        """Start a model call.

        Calls with the same sigma and latent belong to one step, however the host splits them.

        Args:
            latent: the model's input, chunks of the same samples in the order of `cond_or_uncond`.
            cond_or_uncond: COND or UNCOND per chunk of the batch.
            window: which part of the video this is, when the host samples it in parts.
            patch_frames: latent frames in a token.
            prompts: which prompts these are, when the host has a name for them.
            clip: class embedding of a given image [b, c], chunks like those of `latent`.
            upcoming: sigma and progress of the next step, when the host knows them.
            seen: what `look` saw of this call; None to look now, with no latent frame given.
        """
        if seen is None:
            seen = self.look(torch.tensor(sigma), latent, cond_or_uncond)
        chunks, mixed = latent.chunk(len(cond_or_uncond)), seen.mixed
        self._mixed |= mixed
        if mixed and self.plan.trims_tokens:
            self.report.note(
                "prompts of different areas of the picture came in one model call: all tokens were "
                "computed there"
            )
        if self.decision is None:
            self._settle(seen)
        decider = _decider(cond_or_uncond)
        latent = chunks[decider]
        last = self.decision
        same = seen.again and last.sigma == sigma
        now = time.perf_counter()
        if not same:
            self._close_step(now)
            self._began = now
            keep_ratio, budget = 1.0, grid.per_frame
            if self.plan.trims_tokens:
                keep_ratio = self.plan.tokens.keep_at(progress)
                budget = self.plan.tokens.budget(progress, grid)
            step = Step(sigma, progress, keep_ratio, grid, num_blocks)
            self.report.steps.append(step)
            if self.plan.trims_heads and self.report.attention_share is None:
                share = attention_share(self.plan.heads, grid, text_tokens=0)
                self.report.attention_share = share
            latent = latent.detach().clone()
            trimmed = budget < grid.per_frame
            spared = self.plan.trims_tokens and self.plan.tokens.spares(progress)
            spared = spared and self.plan.tokens.remembers
            if trimmed and self.first_trimmed is None:
                self.first_trimmed = sigma
            past = self._past(window, last and last.sigma, sigma)
            self._note_plan(step, past, seen.anchored)
            change = past.see(sigma, latent, grid, patch_frames, trimmed)
            blocks = None
            if self.skips is not None:
                clip = None if clip is None else clip.chunk(len(chunks))[decider]
                content = Content(latent, clip)
                blocks = self.skips.step(sigma, progress, content, num_blocks, upcoming)
            past.lasting |= trimmed or spared
            self.decision = Decision(sigma, latent, budget, step, past, blocks, change, spared)
            if COND not in cond_or_uncond and self.plan.trims_tokens:
                self.report.note(
                    "the unconditional prompt came first in a step and decided which tokens stay"
                )
        self.decision.step.calls += 1
        return ModelCall(
            self, grid, seen.anchored, cond_or_uncond, decider, num_blocks, mixed, prompts
        )

    def _settle(self, seen: Seen) -> None:
        """Choose between the plans for a first latent frame that is given and for one that is not."""
        tokens = self.plan.tokens
        if tokens is not None and tokens.given is not None:
            starts_given = self.tells_start and seen.anchored is not None and seen.anchored[0]
            self.take(replace(self.plan, tokens=tokens.settled(starts_given)))
            self.report.planned = self.plan.describe()

    def _note_plan(self, step: Step, past: Past, anchored: Sequence[bool] | None) -> None:
        """What the step would do if nothing came in its way."""
        step.planned_blocks = step.num_blocks
        step.planned_tokens = [step.grid.tokens] * step.num_blocks
        if self.skips is not None:
            step.planned_blocks = self.skips.planned(step.sigma, step.progress, step.num_blocks)
        if self.plan.trims_tokens:
            tokens = self.plan.tokens
            if anchored is not None and tokens.anchor:
                step.anchored_frames = sum(anchored)
            # the first step that leaves tokens out may have to compute what later ones repeat
            seen = [step.progress] * (2 if past.lasting else 1)
            step.planned_tokens = planned_tokens(
                tokens, step.grid, step.num_blocks, seen, step.anchored_frames
            )[-1]

    def heads_at(self, progress: float) -> list | None:
        """Heads of every block in a step at this progress; None when all run as they are."""
        return self.heads if self.heads and self.plan.heads.trims_at(progress) else None

    def finish(self, completed: bool) -> Report:
        """Close the run and drop everything that it held."""
        now = time.perf_counter()
        self._close_step(now)
        if self.first_trimmed is not None:
            self._note_unknown_change()
        for step in self.report.steps:
            step.settle()
        for past in self.pasts.values():
            past.clear()
        self.pasts.clear()
        self.report.seconds = now - self._started
        self.report.finished = completed
        self.layouts.clear()
        if self.plan.trims_tokens and self.report.steps and self.report.kept_share == 1.0:
            self.report.note(
                "no token was left out in any step. Reasons can be: a run of one step (the first "
                "one computes what later ones repeat), reselect_every 1, all steps "
                "outside start_percent and end_percent or in what preset auto spares (the first "
                "quarter of the run, or the end where the first frame is given), only given latent frames, or a prune ratio "
                f"too small for {self.report.steps[0].grid.per_frame} tokens in a latent frame"
            )
        return self.report

    def _past(self, window: Hashable, last: float | None, sigma: float) -> Past:
        """The past of a part of the video; parts that this step and the last one left alone go."""
        if last != sigma:
            recent = {last, sigma}
            for key in [k for k, past in self.pasts.items() if past.sigma not in recent]:
                self.pasts.pop(key).clear()
        return self.pasts.setdefault(window, Past())

    def _note_unknown_change(self) -> None:
        wants = "velocity_change" in parts(self.plan.tokens.importance)
        if wants and not any(past.knew_change for past in self.pasts.values()):
            self.report.note(
                "tokens were chosen by how long they had been left out alone: how much they change "
                "is known from the third step of a run on, and each expert of Wan 2.2 is a run"
            )

    def _close_step(self, now: float) -> None:
        if self.decision is None:
            return
        step = self.decision.step
        step.seconds = now - self._began
        heads = self.heads_at(step.progress) is not None
        trims = heads or self.decision.budget < step.grid.per_frame
        trims |= self.decision.blocks is not None and not self.decision.blocks.idle
        trims |= self.decision.spared and not self._mixed
        step.record(self.decision.ran, nothing_ran=trims and not self.decision.ran)
        if step.kept_share == 0:
            self.report.note("the model's blocks did not run in some steps: another node's cache")
        self.decision = None
        if self._told is not None:
            self._told(step)


def _decider(cond_or_uncond: Sequence[int]) -> int:
    """Which chunk of a batch decides: hosts put the first conditional prompt last."""
    cond = [i for i, role in enumerate(cond_or_uncond) if role == COND]
    return cond[-1] if cond else len(cond_or_uncond) - 1


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device
