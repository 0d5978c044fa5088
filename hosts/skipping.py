"""Which blocks a sampling run skips, and what stands in for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..methods.depth import BlockPlan, choose_blocks
from ..methods.routers import Content
from .compiled import gather_tokens, outside_graphs

if TYPE_CHECKING:
    from .call import BlockCall
    from .past import Past

# hosts round a sigma on its way through the timestep
SAME_SIGMA = 1e-4
# first and last block of a stretch
Piece = tuple[int, int]


@dataclass(frozen=True)
class StepBlocks:
    """What one step does with the blocks.

    Args:
        skipped: blocks that do not run.
        remember: stretches of blocks whose update a later step gives again.
        known: stretches whose update is remembered.
        reuse: whether skipped blocks should give an update again.
    """

    num_blocks: int
    skipped: frozenset[int] = frozenset()
    remember: tuple[Piece, ...] = ()
    known: tuple[Piece, ...] = ()
    reuse: bool = False
    # tells how much a block added, as the router wants it, or None
    observe: Callable[[int, torch.Tensor], None] | None = field(default=None, compare=False)

    @property
    def idle(self) -> bool:
        """Whether the host's model may run untouched."""
        return not self.skipped and not self.remember and self.observe is None


class Skips:
    """The router's decisions over one sampling run: one for every sigma."""

    def __init__(self, plan: BlockPlan):
        self.plan = plan
        self._run = None
        self._at: float | None = None
        self._now: StepBlocks | None = None
        # a later step's set, when it had to be known before
        self._ahead: tuple[float, frozenset[int]] | None = None
        self._began = False
        # steps in a row that each block was skipped
        self._ages: list[int] = []

    def step(
        self, sigma: float, progress: float, content: Content, num_blocks: int,
        upcoming: tuple[float, float] | None,
    ) -> StepBlocks:  # fmt: skip
        """What the step at `sigma` does.

        Args:
            upcoming: sigma and progress of the next step, as far as the host knows it.
        """
        if self._run is None:
            self._run = self.plan.router.run(num_blocks)
            self._ages = [0] * num_blocks
        if self._at == sigma:
            return self._now
        skipped = self._choose(sigma, progress, content, num_blocks)
        known, remember = (), ()
        if self.plan.skipped == "reuse":
            if skipped and not self._began:
                # nothing to give again yet
                self._began, skipped = True, frozenset()
            self._ages = [age + 1 if i in skipped else 0 for i, age in enumerate(self._ages)]
            held = self._now.known + self._now.remember if self._now else ()
            known = tuple(p for p in held if set(range(p[0], p[1] + 1)) <= skipped)
            if upcoming is not None:
                after = self._choose(*upcoming, content, num_blocks)
                self._ahead = (upcoming[0], after)
                # a sampler may come back to this sigma, so that nothing known can go before
                free = max(0, self.plan.memory - len(known))
                remember = tuple(_stretches(after - skipped)[:free])
        observe = None
        if self._run.watches:

            def observe(index: int, size: torch.Tensor) -> None:
                self._run.observe(sigma, index, size)

        reuse = self.plan.skipped == "reuse"
        self._at = sigma
        self._now = StepBlocks(num_blocks, skipped, remember, known, reuse, observe)
        return self._now

    def planned(self, sigma: float, progress: float, num_blocks: int) -> int:
        """Blocks that the plan runs in a step; asked before `step`."""
        waits = not self._began or (self._at == sigma and not self._now.skipped)
        if self.plan.skipped == "reuse" and waits:
            return num_blocks
        return self.plan.count(sigma, progress, num_blocks)

    def unread(self) -> list[torch.Tensor]:
        """Scalars that the router was told and has not read yet."""
        return [] if self._run is None else self._run.unread()

    def read(self, values: Sequence[float]) -> None:
        """Give the router the values of what was unread, which somebody else waited for."""
        self._run.read(values)

    def _choose(self, sigma, progress, content: Content, num_blocks: int) -> frozenset[int]:
        if self._ahead is not None and abs(self._ahead[0] - sigma) < SAME_SIGMA:
            return self._ahead[1]
        count = self.plan.count(sigma, progress, num_blocks)
        if count >= num_blocks:
            return frozenset()
        logits = self._run.logits(sigma, content)
        ages = self.plan.skipped == "reuse" and self.plan.router.follows_budget
        if ages and self.plan.max_age:
            old = torch.tensor(self._ages)
            logits = torch.where(old >= self.plan.max_age, logits.max() + old, logits)
        runs = choose_blocks(logits, count)
        return frozenset(range(num_blocks)) - frozenset(runs)


def _stretches(blocks: frozenset[int]) -> list[Piece]:
    """Blocks that follow each other, as (first, last), the longest first."""
    found: list[list[int]] = []
    for index in sorted(blocks):
        if found and found[-1][1] == index - 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return sorted(map(tuple, found), key=lambda p: (p[0] - p[1], p[0]))


@outside_graphs
class Skipped:
    """A block that does not run, in place of the host's.

    Args:
        update: what it adds all the same [b, s, c], or None.
    """

    def __init__(self, call: BlockCall, update: torch.Tensor | None):
        self.hidden = call.hidden
        self._update = update

    def run(self) -> torch.Tensor:
        return self.hidden if self._update is None else self.hidden + self._update

    def run_watched(self, look) -> torch.Tensor:
        return self.run()

    def run_subset(self, index, others) -> torch.Tensor:
        out = gather_tokens(self.hidden, index)
        return out if self._update is None else out + gather_tokens(self._update, index)


@outside_graphs
class Watched:
    """The host's block, which also tells what it added.

    Args:
        told: called with the tokens that ran [b, n] (None for all), their input and update.
    """

    def __init__(self, call: BlockCall, told: Callable):
        self.hidden, self._call, self._told = call.hidden, call, told

    def run(self) -> torch.Tensor:
        return self._tell(None, self._call.run())

    def run_watched(self, look) -> torch.Tensor:
        return self._tell(None, self._call.run_watched(look))

    def run_subset(self, index, others) -> torch.Tensor:
        return self._tell(index, self._call.run_subset(index, others))

    def _tell(self, index, out: torch.Tensor) -> torch.Tensor:
        before = self.hidden if index is None else gather_tokens(self.hidden, index)
        self._told(index, before, out - before)
        return out


@outside_graphs
class BlockCalls:
    """The blocks of one model call, some of them skipped.

    Args:
        past: remembers the updates from step to step.
        identity: of the call among those of its step.
        decide: takes the deciding prompt's rows out of a batch.
        observes: whether this call's blocks are those that the router wants to know about.
        note: takes in what did not happen.
    """

    def __init__(self, step: StepBlocks, past: Past, identity, decide, observes: bool, note):
        self.step, self._past, self._identity = step, past, identity
        self._decide, self._observes, self._note = decide, observes, note
        # stretches by their last block; open ones by any of their blocks
        self._known = {piece[1]: piece for piece in step.known}
        self._open = {i: p for p in step.remember for i in range(p[0], p[1] + 1)}
        self._total: torch.Tensor | None = None
        past.retain(identity, step.known)
        held = {i for p in step.known for i in range(p[0], p[1] + 1)}
        if step.reuse and not step.skipped <= held:
            note(
                "some skipped blocks had no update to repeat and added nothing: more of them than "
                "'memory' holds, or the step before did not know that they would be skipped together"
            )

    def skips(self, block_index: int) -> bool:
        return block_index in self.step.skipped

    def wrap(self, block_index: int, call: BlockCall) -> BlockCall:
        """The block as it is to be run."""
        if self.skips(block_index):
            piece, update = self._known.get(block_index), None
            if piece is not None:
                update = self._past.recall((self._identity, piece), call.hidden)
                if update is None:
                    self._note(
                        "some skipped blocks had no update to repeat and added nothing: the step "
                        "before was another node's cache, or context windows or prompts changed"
                    )
            return Skipped(call, update)
        observe = self.step.observe if self._observes else None
        piece = self._open.get(block_index)
        if observe is None and piece is None:
            return call

        def told(index, before: torch.Tensor, update: torch.Tensor) -> None:
            if observe is not None:
                mine, size = self._decide(before).float(), self._decide(update).float()
                observe(block_index, size.norm() / mine.norm().clamp(min=1e-12))
            if piece is not None:
                self._remember(piece, block_index, index, call.hidden, update)

        return Watched(call, told)

    def _remember(self, piece: Piece, block_index: int, index, hidden, update) -> None:
        if index is not None:
            places = index[..., None].expand_as(update)
            update = torch.zeros_like(hidden).scatter_(1, places, update)
        self._total = update if block_index == piece[0] else self._total.add_(update)
        if block_index == piece[1]:
            self._past.remember((self._identity, piece), self._total)
            self._total = None
