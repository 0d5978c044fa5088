"""One dial for a model, or one for the two experts of Wan2.2: a wish, solved when a run begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter, mul

from ..engine.plan import TrimPlan
from ..engine.program import Program, Row, expected_programs
from ..engine.work import program_work
from ..methods.cost import WanShape, Width, Work
from ..methods.grid import TokenGrid
from ..methods.schedule import progress_at, sigma_at
from ..methods.shares import Shares
from . import priors
from .curves import Curves
from .solver import TOLERANCE, Known, Task, plan_error, solve_nearest
from .tuned import Travel, Tuned

MAX_SPEEDUP = 4.0
MAX_DENSE_STEPS = 100
HIGH, LOW = "high", "low"
# sigma at which Wan 2.2 changes experts, without and with a start image
BOUNDARY, BOUNDARY_GIVEN = 0.875, 0.9
# of the other expert: steps at all, and of the first one for each of the second one's
MOST_STEPS, MOST_BEFORE = 100, 3.0
# what a work costs, in any unit
Cost = Callable[[Work], float]
flops: Cost = attrgetter("flops")


@dataclass(frozen=True)
class Run:
    """What is known of a sampling run when it begins.

    Args:
        sigmas: the sampler's, the last included: one more than there are steps.
        shift: the model's flow shift.
        prompts: 2 with guidance, 1 without.
        anchored: per latent frame, whether it is given; None when none is.
        starts_given: whether the video's first latent frame is among them.
        width: of a slim model.
        calls: model calls of each step, also in parts; None is one each.
        partial: whether the model may be looked into and there is room for the context.
        done: shares of the first steps, where these ran already.
        costs: of a model call of each of those, in untouched ones; shorter is none known of the rest.
        held: whether the context of the last whole one of those is there.
        parts: whether its plan so far has steps to come on a part of the tokens.
        before: what was sampled of the same video before, by this model or the pair's other one.
        spent: whole untouched calls that all of it came to by its own plan; None is not known.
        waits: a step that is to be whole; None is none.
        concentration: a sigma, and what each of TRIED of the tokens held of the change there; None
            is not seen yet.
        alone, bits: as in `Facts`.
    """

    shape: WanShape
    grid: TokenGrid
    sigmas: tuple[float, ...]
    shift: float = 1.0
    prompts: int = 2
    anchored: tuple[bool, ...] | None = None
    starts_given: bool = False
    width: Width | None = None
    calls: tuple[float, ...] | None = None
    partial: bool = True
    done: tuple[float, ...] = ()
    costs: tuple[float, ...] = ()
    held: bool = True
    parts: bool = False
    before: Run | None = None
    spent: float | None = None
    waits: int | None = None
    concentration: tuple[float, tuple[float, ...]] | None = None
    alone: bool = True
    bits: int = 8

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def shares_done(self) -> tuple[float | None, ...]:
        """Of each step, None for those to come."""
        return (*self.done, *(None,) * (self.steps - len(self.done)))

    def programs(self, plan: TrimPlan, sigmas: Sequence[float] = ()) -> list[Program]:
        """Of all its steps, or of steps at other sigmas."""
        sizes = (self.grid, self.shape.num_blocks, self.anchored)
        sigmas, host = sigmas or self.sigmas[:-1], {"alone": self.alone, "bits": self.bits}
        return expected_programs(plan, sigmas, self.shift, *sizes, **host)

    def speedup(self, plan: TrimPlan, cost: Cost = flops) -> float:
        """Cost of the untouched run over that of a plan."""
        calls, came = self.calls or (1,) * self.steps, len(self.costs)

        def total(plan: TrimPlan, first: int = 0) -> float:
            programs = zip(self.programs(plan)[first:], calls[first:], strict=True)
            works = (self.work(program, plan) * count for program, count in programs)
            return cost(sum(works, Work()))

        dense = total(TrimPlan())
        spent = sum(map(mul, self.costs, calls)) / sum(calls) * dense
        return dense / (spent + total(plan, came))

    def work(self, program: Program, plan: TrimPlan, rows: Sequence[Row] | None = None) -> Work:
        """Of a model call by a plan's program, or of the rows of it that ran."""
        return program_work(self.shape, program, plan, self.prompts, width=self.width, rows=rows)


@dataclass(frozen=True)
class Solved:
    """A plan for a run, and what it is expected to give.

    Args:
        wanted, reached: speed-ups of this model's run; reached by the cost.
        together: what both experts reach, where `reached` is of the own part of a pair; else None.
        why: what is in the way when they are not the same, else None.
        run: that it was solved for.
        tuned: what of an earlier trial or run the plan goes by, in words, or None.
        chosen: the plan is the one that won the trial.
        error: squared, that the curves expect of the plan; 0 where the trial's is gone by.
    """

    plan: TrimPlan
    wanted: float
    reached: float
    together: float | None = None
    why: str | None = None
    run: Run | None = None
    tuned: str | None = None
    chosen: bool = False
    error: float = 0.0

    @property
    def all(self) -> float:
        """Of the whole video, both experts together."""
        return self.together or self.reached


@dataclass(frozen=True)
class Dial:
    """What an artist wants.

    Args:
        speedup: of the whole run, 1 (off) to 4.
        dense_first_steps, dense_last_steps: steps that compute everything, of this model's run, or
            of both experts' together.
        final: nothing is trimmed, by this dial or by anything else.
        expert: HIGH or LOW noise expert of a pair that shares the speed-up; None is a model alone.
        boundary: sigma at which the pair changes experts; 0 takes it from the sampler's steps.
        start, end: progress between which steps are trimmed.
        travel: of this model's own whole run, in place of that of the curves that ship.
        tuned: outcomes of trials on this model, and recorded runs; the one like this run is gone by.
    """

    speedup: float = 1.5
    dense_first_steps: int = 0
    dense_last_steps: int = 0
    final: bool = False
    expert: str | None = None
    boundary: float = 0.0
    start: float = 0.0
    end: float = 1.0
    travel: Travel | None = None
    tuned: tuple[Tuned, ...] = ()

    def __post_init__(self):
        if not self.speedup >= 1.0:
            raise ValueError(f"speedup: expected 1 (off) or more, got {self.speedup}")
        for name in ("dense_first_steps", "dense_last_steps"):
            if not 0 <= (steps := getattr(self, name)) <= MAX_DENSE_STEPS:
                raise ValueError(f"{name}: expected 0 to {MAX_DENSE_STEPS}, got {steps}")
        if not 0.0 <= self.boundary < 1.0:
            raise ValueError(f"boundary: expected 0 to less than 1, got {self.boundary}")

    @property
    def off(self) -> bool:
        return self.speedup == 1.0

    def describe(self) -> str:
        pair = "" if self.expert is None else f" of both experts, here the {self.expert} noise one"
        return f"{self.speedup:.2f}x{pair}"

    def solve(self, run: Run, plan: TrimPlan | None = None, cost: Cost = flops) -> Solved:
        """The plan for a run, with the parts that others decided."""
        plan = replace(plan or TrimPlan(), shares=None)
        switch, boundary = self._switch(run)
        alone = self.expert is None or switch is not None
        other = None if alone else other_slice(run, self.expert, boundary)
        first, last = (None, other) if self.expert == HIGH else (other, None)
        parts = [part for part in (run.before or first, run, last) if part is not None]
        before = parts[0].steps if parts[0] is not run else 0
        sigmas = (*(sigma for part in parts for sigma in part.sigmas[:-1]), parts[-1].sigmas[-1])
        # each expert's first step begins anew
        fresh = frozenset({0, before, before + (switch or (run.steps if last else 0))})
        own = run.calls or (1,) * run.steps
        asked = self._whole(sigmas, run.shift, fresh)
        asked |= set() if run.waits is None else {before + run.waits}
        done = [share for part in parts for share in part.shares_done]
        task = Task(
            sigmas,
            tuple(n for part in parts for n in part.calls or (own[-1],) * part.steps),
            frozenset(
                step for step, share in enumerate(done)
                if share == 1.0 or (share is None and step in asked)
            ),
            fresh,
            # of one token in a latent frame there is no part
            run.partial and plan.may_be_partial and run.grid.per_frame > 1,
            tuple(done), run.held, run.parts,
        )  # fmt: skip
        trial = self.trial_of(run)
        own_whole = {step - before for step in asked}
        if trial is not None and self._chosen_again(trial, task, own_whole, plan, run.done):
            chosen = replace(plan, shares=Shares(run.sigmas[:-1], trial.shares, task.partial))
            said = f"the plan that your trial chose ({trial.chosen})"
            reached = run.speedup(chosen, cost)
            return Solved(chosen, self.speedup, reached, run=run, tuned=said, chosen=True)
        shares = self._shares(task, run, plan, cost)
        mine = shares[before : before + run.steps]
        solved = replace(plan, shares=Shares(run.sigmas[:-1], mine, task.partial))
        reached, together = run.speedup(solved, cost), task_speedup(task, shares, run, plan, cost)
        far = abs(self.speedup / together - 1) > TOLERANCE
        why = self._why(task, asked, plan, together, shares) if far else None
        whose = "of your trial" if trial and trial.chosen else "that WanTrim Profile recorded"
        said = None if trial is None else f"solved by the whole run {whose}"
        error = plan_error(task, Known(task, self.curves(run)), shares)
        both = None if len(parts) == 1 else together
        return Solved(solved, self.speedup, reached, both, why, run, said, error=error)

    def trial_of(self, run: Run) -> Tuned | None:
        """The trial whose run was like this one, else such a recorded run, or None."""
        facts = (run.sigmas, run.prompts, run.starts_given, run.grid.tokens)
        like = [one for one in self.tuned if one.resembles(*facts)]
        return min(like, key=attrgetter("recorded"), default=None)

    def _chosen_again(
        self, trial: Tuned, task: Task, whole: set[int], plan: TrimPlan, done: Sequence[float]
    ) -> bool:
        """Whether the plan that won a trial is what is asked for now, and what was done is of it."""
        shares = trial.shares
        return (
            shares is not None
            and trial.heads in (None, plan.roles_left)
            and abs(self.speedup / trial.speedup - 1) <= TOLERANCE
            and (task.partial or not trial.partial)
            and all(shares[step] == 1.0 for step in whole if 0 <= step < len(shares))
            and all(map(math.isclose, shares, done))
        )

    def _switch(self, run: Run) -> tuple[int | None, float]:
        """Where the experts change: a step of this run, else the sigma that `other_slice` takes.

        A high noise expert may be told that it ends at 0. Where its steps go on behind Wan's own
        boundary, its sampler announces both's and will stop on the way: what is solved has to be good
        for either end. Where they do not, only its last one was made to end there.
        """
        if self.expert != HIGH or progress_at(run.sigmas[-1], run.shift) < 1 - 1e-6:
            return None, self.boundary
        at = self.boundary or (BOUNDARY_GIVEN if run.starts_given else BOUNDARY)
        count = sum(sigma >= at for sigma in run.sigmas[:-1])
        # one that begins behind the boundary does the other's part
        return (count if count < run.steps else None), at

    def _whole(self, sigmas, shift: float, fresh: frozenset[int]) -> frozenset[int]:
        steps = len(sigmas) - 1
        places = [progress_at(sigma, shift) for sigma in sigmas[:-1]]
        outside = {i for i, at in enumerate(places) if not self.start <= at <= self.end}
        first, last = range(self.dense_first_steps), range(steps - self.dense_last_steps, steps)
        return frozenset({*fresh, *first, *last, *outside}.intersection(range(steps)))

    def _shares(self, task: Task, run: Run, plan: TrimPlan, cost: Cost) -> tuple[float, ...]:
        price = _price(run, plan, cost)
        dense = sum(task.calls) * _price(run, TrimPlan(), cost)(1.0)
        # in whole calls of the plan that others made
        whole = price(1.0)
        budget = (dense / self.speedup - _beside(task, run, plan, cost)) / whole
        if budget >= sum(task.calls):
            return tuple(1.0 if share is None else share for share in task.done)
        curves = self.curves(run)
        return solve_nearest(task, curves, budget, lambda share: price(share) / whole)

    def curves(self, run: Run) -> Curves:
        """What a run is solved by: the curves that ship, with what was measured on this model."""
        trial, curves = self.trial_of(run), curves_of(run)
        travel = self.travel if trial is None else trial.travel
        curves = curves if travel is None else travel.on(curves)
        if run.concentration is not None:
            sigma, held = run.concentration
            curves = curves.held_by((0.0, *held, 1.0), sigma)
        return curves

    def _why(self, task: Task, asked, plan: TrimPlan, together: float, shares) -> str:
        """What is in the way, in an artist's words."""
        said, parts = [], ("tokens", "heads", "blocks")
        theirs = [part.title() for part in parts if getattr(plan, f"trims_{part}")]
        if theirs:
            nodes = " and ".join(f"WanTrim {name}" for name in theirs)
            said.append(
                f"what {nodes} {'decide' if len(theirs) > 1 else 'decides'} is taken as it is"
            )
        rest = [share for step, share in enumerate(shares) if step not in asked]
        if together < self.speedup and not any(rest):
            count, steps = len(asked), "step" if task.steps == 1 else "steps"
            first = "the first of each expert" if len(task.fresh) > 1 else "the first"
            said.append(
                f"{count} of {task.steps} {steps} {'computes' if count == 1 else 'compute'} everything "
                f"({first}, and those asked for)"
            )
        elif any(share is not None for share in task.done):
            said.append("the steps that are left cannot make up for those that came")
        elif not task.partial or not said:
            said.append(self._beyond(task, together, shares, not theirs))
        return "; ".join(said)

    def _beyond(self, task: Task, together: float, shares, alone: bool) -> str:
        """Why it is not nearer, and, where nobody else trims, what lies beyond the wish."""
        computed = shares.count(1.0) + (1 if together > self.speedup else -1)
        counted = set(shares) <= {0.0, 1.0} and len(set(task.calls)) == 1 <= computed
        side = f" ({task.steps / computed:.3g}x)" if counted and alone else ""
        if task.partial:
            return f"steps are so few that the next plan{side} is further away"
        return f"steps are whole or repeated, and the next number of them{side} is further away"


def curves_of(run: Run) -> Curves:
    """The curves to solve a run by: guidance makes early changes larger and less alike."""
    task = "IMAGE_TO_VIDEO" if run.starts_given else "TEXT_TO_VIDEO"
    return getattr(priors, task if run.prompts > 1 else f"{task}_UNGUIDED")


def _price(run: Run, plan: TrimPlan, cost: Cost) -> Callable[[float], float]:
    """Cost of a model call at a share, context included."""
    sigmas, known = (0.9, 0.8, 0.7), {}

    def price(share: float) -> float:
        if share not in known:
            shares = None if share == 1.0 else Shares(sigmas, (1.0, 1.0, share))
            *_, last = run.programs(replace(plan, shares=shares), sigmas)
            known[share] = cost(run.work(last, plan))
        return known[share]

    return price


def _beside(task: Task, run: Run, plan: TrimPlan, cost: Cost) -> float:
    """What is spent beyond what the shares cost by this plan: what came before went by its own, steps
    that ran cost what they did, and in first steps heads are measured, and run in full.
    """
    price, dense, known = _price(run, plan, cost), _price(run, TrimPlan(), cost)(1.0), 0.0
    own = task.sigmas.index(run.sigmas[0])
    ran = set(range(own, own + len(run.costs)))
    for step, share, spent in zip(sorted(ran), run.done, run.costs, strict=False):
        known += (spent * dense - price(share)) * task.calls[step]
    if run.before is not None and run.before.spent is not None:
        ran |= set(range(run.before.steps))
        known += run.before.spent * dense
        known -= sum(map(mul, map(price, run.before.done), run.before.calls))
    if not plan.finds_roles:
        return known
    (program,) = run.programs(plan, run.sigmas[:1])
    first = cost(run.work(program, plan))
    return known + (first - price(1.0)) * sum(task.calls[step] for step in task.fresh - ran)


def task_speedup(
    task: Task, shares: Sequence[float], run: Run, plan: TrimPlan, cost: Cost
) -> float:
    """What shares of all steps of a task come to, both experts together."""
    price, dense = _price(run, plan, cost), _price(run, TrimPlan(), cost)(1.0)
    spent = sum(price(share) * count for share, count in zip(shares, task.calls, strict=True))
    return sum(task.calls) * dense / (spent + _beside(task, run, plan, cost))


def other_slice(run: Run, expert: str, boundary: float = 0.0) -> Run | None:
    """The run of the pair's other expert, as far as this one's sigmas tell; None when it has none.

    Each sees only its own. The other's are taken to be spread as evenly, so that both find the same
    plan. A low noise expert with a small end of the way goes over a video: nothing ran before it.

    Args:
        expert: which one `run` is of.
        boundary: sigma at which the experts change; 0 is where this run ends or begins.
    """
    high = expert == HIGH
    # one that begins above the boundary does the other's part
    at = (boundary or run.sigmas[-1]) if high else max(boundary, run.sigmas[0])
    done, first = progress_at(at, run.shift), progress_at(run.sigmas[0], run.shift)
    # where the first expert began the second one cannot know
    own, other = (done - first, 1 - done) if high else (1 - done, done)
    if min(own, other) < 1e-6 or (not high and other > MOST_BEFORE * own):
        return None
    count = min(max(1, round(run.steps * other / own)), MOST_STEPS)
    places = [(done if high else 0.0) + other * i / count for i in range(count + 1)]
    sigmas = tuple(sigma_at(place, run.shift) for place in places)
    return replace(run, sigmas=sigmas, calls=None, done=(), costs=(), before=None)
