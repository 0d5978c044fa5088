"""One sampling run: decides once per step and runs each block on the tokens that stay.

Knows no host. A host tells it what a model call looks like (`Session.begin`) and hands it a
`BlockCall` per block, which can run the host's own block on all tokens or on some.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..methods.tokens import (
    Evidence,
    Selection,
    TokenGrid,
    TokenPlan,
    attention_received,
    scatter_tokens,
    select_tokens,
)
from .report import Report, Step

COND, UNCOND = 0, 1


@dataclass(frozen=True)
class TrimPlan:
    """All that we decided to trim. None leaves that part of the model alone."""

    tokens: TokenPlan | None = None

    @property
    def neutral(self) -> bool:
        return self.tokens is None or self.tokens.schedule.keep_ratio == 1.0

    def describe(self) -> str:
        if self.neutral:
            return "nothing trimmed"
        t = self.tokens
        text = (
            f"{1 - t.schedule.keep_ratio:.0%} of the tokens dropped ({t.schedule.direction}, "
            f"importance {t.importance}, reselected every {t.reselect_every} blocks"
        )
        return text + (", keys and values kept)" if t.dropped_kv == "keep" else ")")


class BlockCall(Protocol):
    """The host's own block with its inputs, ready to run."""

    hidden: torch.Tensor

    def run(self) -> torch.Tensor:
        """All tokens."""

    def run_watched(self, look: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
        """All tokens; calls look(q, k) with self-attention's q and k [b, s, n, d] as it runs."""

    def run_subset(self, index: torch.Tensor, others: torch.Tensor | None) -> torch.Tensor:
        """Tokens `index` [b, kept] only, as hidden state [b, kept, c].

        With `others` [b, dropped] those tokens still serve as keys and values.
        """


@dataclass
class Decision:
    """What one step keeps: made by the first call that sees the step, shared by the others."""

    sigma: float
    latent: torch.Tensor
    budget: int
    step: Step
    selections: dict[int, Selection] = field(default_factory=dict)
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


class Session:
    """State of one sampling run. Make a new one for every run."""

    def __init__(self, plan: TrimPlan, report: Report):
        self.plan = plan
        self.report = report
        self.decision: Decision | None = None
        self._began = 0.0
        self._started = time.perf_counter()

    def begin(
        self,
        *,
        latent: torch.Tensor,
        sigma: float,
        progress: float,
        cond_or_uncond: Sequence[int],
        grid: TokenGrid,
        anchored: torch.Tensor | None,
        num_blocks: int,
    ) -> ModelCall:
        """Start a model call.

        Calls with the same sigma and latent belong to one step, however the host splits them.

        Args:
            latent: the model's input, chunks of the same samples in the order of `cond_or_uncond`.
            cond_or_uncond: COND or UNCOND per chunk of the batch.
            anchored: bool [f], latent frames that are given and must not lose tokens.
        """
        if len(latent) % len(cond_or_uncond):
            raise ValueError(
                f"cond_or_uncond: expected one entry per chunk of the batch, got "
                f"{len(cond_or_uncond)} for a batch of {len(latent)}"
            )
        chunks = latent.chunk(len(cond_or_uncond))
        # hosts put the first conditional prompt last in a batch
        cond = [i for i, role in enumerate(cond_or_uncond) if role == COND]
        decider = cond[-1] if cond else len(cond_or_uncond) - 1
        latent = chunks[decider]
        last = self.decision
        # comparing also waits for the device, which makes the clock below honest
        same = last is not None and last.sigma == sigma and _equal(last.latent, latent)
        now = time.perf_counter()
        if not same:
            self._close_step(now)
            self._began = now
            tokens = self.plan.tokens
            step = Step(sigma, progress, tokens.keep_at(progress), grid, num_blocks)
            self.report.steps.append(step)
            budget = tokens.budget(progress, grid)
            self.decision = Decision(sigma, latent.detach().clone(), budget, step)
            if not cond:
                self.report.note(
                    "the unconditional prompt came first in a step and decided which tokens stay"
                )
        self.decision.step.calls += 1
        return ModelCall(self, grid, anchored, len(cond_or_uncond), decider, num_blocks)

    def finish(self, completed: bool) -> Report:
        """Close the run and drop everything that it held."""
        now = time.perf_counter()
        self._close_step(now)
        self.report.seconds = now - self._started
        self.report.finished = completed
        if self.report.steps and self.report.kept_share == 1.0:
            self.report.note(
                "no token was left out in any step. Reasons can be: reselect_every 1, all steps "
                "outside start_percent and end_percent, only given latent frames, or a prune ratio "
                f"too small for {self.report.steps[0].grid.per_frame} tokens in a latent frame"
            )
        return self.report

    def _close_step(self, now: float) -> None:
        if self.decision is None:
            return
        step = self.decision.step
        step.seconds = now - self._began
        trims = self.decision.budget < step.grid.per_frame
        step.record(self.decision.ran, nothing_ran=trims and not self.decision.ran)
        if step.kept_share == 0:
            self.report.note("the model's blocks did not run in some steps: another node's cache")
        self.decision = None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)


class ModelCall:
    """One forward pass through the model's blocks, in order."""

    def __init__(
        self, session: Session, grid, anchored, chunks: int, decider: int, num_blocks: int
    ):
        self.plan: TokenPlan = session.plan.tokens
        self.report = session.report
        self.decision: Decision = session.decision
        self.grid: TokenGrid = grid
        self.anchored: torch.Tensor | None = anchored
        self.chunks = chunks
        self.decider = decider
        self.num_blocks = num_blocks
        self.current: Selection | None = None
        self.records = self.decision.step.calls == 1

    @property
    def trims(self) -> bool:
        """False when this step keeps everything: then the host's model runs untouched."""
        return self.decision.budget < self.grid.per_frame

    def block(self, block_index: int, call: BlockCall) -> torch.Tensor:
        """Run one block; the result is always the full-length hidden state [b, s, c]."""
        if self.plan.reselects(block_index) or self.current is None:
            self._record(None)
            return self._reselect(block_index, call)
        self._record(self.current)
        if not self.current.dropped.numel():
            self.report.note("every latent frame is given and anchored: all tokens were computed")
            return call.run()
        index = self.current.rows(self.chunks)
        others = None
        if self.plan.dropped_kv == "keep":
            others = self.current.dropped_rows(self.chunks)
        return scatter_tokens(call.hidden, index, call.run_subset(index, others))

    def _reselect(self, block_index: int, call: BlockCall) -> torch.Tensor:
        known = self.decision.selections.get(block_index)
        unused = block_index == self.num_blocks - 1 or self.plan.reselects(block_index + 1)
        if known is not None or unused:
            length = call.hidden.shape[1]
            if known is not None and known.length != length:
                # only one of the prompts has a reference
                known = known.moved(self.decision.step.grid, self.grid, length)
            self.current = known
            return call.run()
        before = self._decider(call.hidden)
        received = None

        def look(q: torch.Tensor, k: torch.Tensor) -> None:
            # scored at once: held through the block's FFN, q and k would add to its peak of memory
            nonlocal received
            rows = (self._decider(q), self._decider(k))
            received = attention_received(self.plan, self.grid, *rows)

        by_attention = self.plan.importance == "attention"
        after = call.run_watched(look) if by_attention else call.run()
        if by_attention and received is None:
            self.report.note(
                f"block {block_index} ran no self-attention (another node replaced it), so tokens "
                "were not chosen anew there"
            )
            return after
        evidence = Evidence(
            self.plan,
            self.grid,
            before,
            self._decider(after),
            received,
            seed=round(self.decision.sigma * 1e6) * 1000 + block_index,
        )
        self.current = select_tokens(evidence, self.decision.budget, self.anchored)
        self.decision.selections[block_index] = self.current
        return after

    def _decider(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.chunk(self.chunks)[self.decider]

    def _record(self, selection: Selection | None) -> None:
        # the other calls of a step do the same work
        if self.records:
            self.decision.ran.append(selection)
