"""Keeps a run on its wish: what a sampler announces is not what it will run.

The dial is solved when the run begins, for one model call at each step that was announced. Where
other calls come (two at a step, none, the ones behind a jump), or steps computed something else than
was planned, it is solved anew for what is still to come, with what was done as it was. So it is
where the run's own whole steps show that change lies in more tokens than in the curves, and where
they do not show yet that changes go on: then the first step that was to be left out waits.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np

from ..engine.engine import Engine, Seen
from ..engine.plan import TrimPlan
from ..engine.program import ALL, Row
from ..engine.record import Step
from ..methods.shares import Shares
from .dial import Cost, Dial, Run, Solved

# of a share: below it a step ran as it was planned
SAME = 1e-6
# of the persistence of changes: below it what the video shows is not decided yet
DECIDED = 0.1
# ratio of squared errors, 12 dB: waiting for a video to be decided may cost as much by the curves. On
# the first tiny Wan, text to video at half of the compute, undecided videos kept 15 to 20 dB where it
# was 6, and one that waited for as long as the wish could be met, 20.7, 25 in place of 31
WAITED = 10.0**1.2
# of the error that is left at a share of the tokens: below it a run is as it was taken to be
ALIKE = 0.1


class Course:
    """Gives an engine its plan, now and whenever it has to be another one.

    Args:
        plan: what other nodes decided.
        told: called with everything that is solved.
    """

    def __init__(
        self,
        dial: Dial,
        run: Run,
        plan: TrimPlan,
        cost: Cost,
        engine: Engine,
        told: Callable[[Solved], None] = lambda solved: None,
    ):
        self._dial, self._plan, self._cost, self._told = dial, plan, cost, told
        self._engine, self._run, self._at = engine, run, 0
        # model calls that came at each step, by the part of the video
        self._came = [Counter() for _ in range(run.steps)]
        # of steps that are over, by their place in memory
        self._prices: dict[int, float] = {}
        # expected before anything waited
        self._error: float | None = None
        self.solved = self._solve()
        engine.take(self.solved.plan)
        told(self.solved)
        engine.steer = self.step

    def _solve(self) -> Solved:
        return self._dial.solve(self._run, self._plan, self._cost)

    def step(self, sigma: float, where: Hashable, seen: Seen) -> None:
        """A step of a part of the video is about to begin."""
        held, goes_on = seen.held, seen.goes_on
        at = self.solved.plan.shares.place(sigma)
        # all parts of a step go by what was seen before it; samplers that go back and forth see too
        # little of how far the video came
        if self._came[at] or max(self._calls()) > 1:
            held = goes_on = None
        self._came[at][where] += 1
        self._at = max(self._at, at)
        memory, run, steps = self._engine.memory, self._run, self._engine.record.steps
        # what began at a step goes on as it began, while there are others
        begun = self._calls()[self._at] > 1
        done, costs = self._done(self._at + begun)
        now = replace(
            run,
            calls=self._expected(),
            done=done,
            costs=costs,
            held=memory.holds_context,
            parts=any(0.0 < share < 1.0 for share in self.solved.plan.shares.shares[at:]),
            partial=run.partial and not memory.lost,
            # what looks between the blocks is known when a call ran
            alone=steps[-1].program.alone if steps else run.alone,
            concentration=run.concentration if held is None else (sigma, held),
        )
        shares = self.solved.plan.shares.shares
        known = run.calls or (1,) * run.steps
        as_planned = all(
            abs(share - planned) < SAME or not count
            for share, planned, count in zip(now.done, shares, now.calls, strict=False)
        )
        as_seen = self._as_seen(run, now)
        same = known == now.calls and (run.partial, run.alone) == (now.partial, now.alone)
        anew = not (same and as_planned and as_seen)
        if anew:
            self._run = now
            if begun and self._at == run.steps - 1:
                self._go_by(self._last())
                return
            self.solved = self._solve()
        if self._waits(now, goes_on) or anew:
            self._go_by(self.solved.plan.shares)

    def _go_by(self, shares: Shares) -> None:
        self._engine.share(shares)
        self._told(self.solved)

    def _waits(self, now: Run, goes_on: float | None) -> bool:
        """Whether the first step that was to be left out is whole instead: changes do not go on yet,
        the wish can still be met, and what is left out later in its place is not far worse.
        """
        left_out = self.solved.plan.shares.shares[self._at] < 1.0
        if goes_on is None or goes_on >= DECIDED or not left_out or min(now.done) < 1.0:
            return False
        if self.solved.chosen:
            # it waited in the trial, where it did
            return False
        solved = self._dial.solve(replace(now, waits=self._at), self._plan, self._cost)
        error = self._error or self.solved.error
        if solved.why is not None or solved.error > WAITED * error:
            return False
        self._run, self.solved, self._error = now, solved, error
        return True

    def _as_seen(self, run: Run, now: Run) -> bool:
        """Whether change lies where the plan took it to lie, or nothing depends on it."""
        if now.concentration in (None, run.concentration) or not now.partial:
            return True
        one, other = (self._dial.curves(each).left for each in (run, now))
        return np.abs(np.subtract(one, other)).max() < ALIKE

    def _last(self) -> Shares:
        """Another share for a call at the last step, where nothing is left to make up for it."""
        *others, mean = self._run.done
        *before, cost = self._run.costs
        count, now = self._calls()[-1], self._engine.plan.shares
        found = []
        for share in (now.shares[-1], 1.0, 0.0):
            # near enough: whole and repeated calls cost their share, a part somewhat more
            done, costs = (
                (*first, (last * (count - 1) + share) / count)
                for first, last in ((others, mean), (before, cost))
            )
            run = replace(self._run, done=done, costs=costs)
            solved = self._dial.solve(run, self._plan, self._cost)
            found.append((abs(math.log(solved.all / solved.wanted)), share, solved))
        _, share, self.solved = min(found, key=lambda one: one[0])
        return replace(now, shares=(*now.shares[:-1], share))

    @property
    def ran(self) -> Run | None:
        """What ran of the steps that were announced; None before the first one."""
        if not any(self._came):
            return None
        count = self._at + 1
        sigmas, calls = self._run.sigmas[: count + 1], tuple(self._calls()[:count])
        done, costs = self._done(count)
        ran = replace(self._run, sigmas=sigmas, calls=calls, done=done, costs=costs)
        plan = replace(self._plan, shares=Shares(sigmas[:-1], ran.done))
        return replace(ran, spent=sum(calls) / ran.speedup(plan, self._cost))

    @property
    def ended(self) -> Solved | None:
        """What came of the wish, by the steps that ran; None before the first one."""
        return None if self.ran is None else self._dial.solve(self.ran, self._plan, self._cost)

    def _calls(self) -> list[int]:
        """Model calls of each step so far."""
        return [max(came.values(), default=0) for came in self._came]

    def _expected(self) -> tuple[float, ...]:
        """Model calls of each step, those to come as those that came.

        The first step is no measure where there are others: the second call of a step is often at
        the sigma of the next one.
        """
        came, at = self._calls(), self._at
        each = statistics.median(came[1:at] or came[:1])
        if at < 2:
            each = max(came[at], each)
        calls = [*came[:at], *(each,) * (len(came) - at)]
        if self._run.sigmas[-1] == 0.0:
            # what a sampler calls between two steps it does not call on the way to 0
            calls[-1] = max(1, each - (came[0] - 1))
        calls[at] = max(came[at], calls[at])
        return tuple(calls)

    def _done(self, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The share that each of the first steps computed, and what a call of it cost."""
        place = self.solved.plan.shares.place
        shares, costs = ([[] for _ in range(count)] for _ in range(2))
        for step in self._engine.record.steps:
            at = place(step.sigma)
            if at < count:
                whole = 1.0 if step.kept_share == 1.0 else step.program.share
                shares[at].append(0.0 if step.answered else whole)
                costs[at].append(0.0 if step.answered else self._price(step))
        return _means(shares), _means(costs)

    def _price(self, step: Step) -> float:
        """What a step cost, in untouched calls."""
        known = self._prices.get(id(step))
        if known is None:
            # windows may be of several sizes
            whole = [Row(ALL, step.grid.tokens)] * step.num_blocks
            spent = self._run.work(step.program, self._engine.plan, step.rows or None)
            dense = self._run.work(step.program, TrimPlan(), whole)
            known = self._cost(spent) / self._cost(dense)
            # one that is not over may still be another one
            if step.rows:
                self._prices[id(step)] = known
        return known


def _means(found: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(statistics.fmean(one) if one else 0.0 for one in found)


def run_before(run: Run, earlier: Sequence[Run]) -> Run | None:
    """What was sampled of a run's video before it, as one; None is nothing.

    Args:
        earlier: in order; a part that goes lower than the next one begins is of another video, or
            of an earlier pass.
    """
    found = run
    parts: list[Run] = []
    for one in reversed(earlier):
        if one.grid != run.grid or one.sigmas[-2] <= found.sigmas[0]:
            break
        parts.insert(0, one)
        found = one
    if not parts:
        return None
    return replace(
        parts[-1],
        sigmas=(*(at for one in parts for at in one.sigmas[:-1]), parts[-1].sigmas[-1]),
        calls=tuple(count for one in parts for count in one.calls),
        done=tuple(share for one in parts for share in one.done),
        spent=None if None in (spent := [one.spent for one in parts]) else sum(spent),
        before=None,
    )
