"""The plan for a wanted speed-up: what to trim in a run, so that it costs what was asked for.

One number is turned into tokens, blocks and heads along the way of a priority (mixes.py), by
bisection on a cost. The cost is one function of a run and its parts, in FLOPs here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from .budget import solve_heads
from .cost import WanShape, Work, plan_work, planned_tokens
from .depth import BlockBudget, BlockPlan, blocks_per_step
from .floor import Rates
from .grid import TokenGrid
from .heads import HeadPlan
from .mixes import MIXES, Mix, knobs_at, way
from .presets import preset_plan
from .profile import Profile
from .routers import ProfiledRouter
from .schedule import SAME_PROGRESS, progress_at
from .tokens import TokenPlan
from .width import Width

# relative distance of a cost within which a speed-up counts as met
TOLERANCE = 0.03
HALVINGS = 16


@dataclass(frozen=True)
class Run:
    """What is known of a sampling run when it begins.

    Args:
        sigmas: the sampler's, the last included: one more than there are steps.
        shift: the model's flow shift.
        prompts: 2 with guidance, 1 without.
        anchored_frames: latent frames that are given.
        starts_given: whether the video's first latent frame is among them.
        width: of a slim model.
    """

    shape: WanShape
    grid: TokenGrid
    sigmas: tuple[float, ...]
    shift: float = 1.0
    prompts: int = 2
    anchored_frames: int = 0
    starts_given: bool = False
    width: Width | None = None

    def __post_init__(self):
        if len(self.sigmas) < 2:
            raise ValueError(
                f"sigmas: expected those of one step at least, got {len(self.sigmas)} of them"
            )

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def progress(self) -> list[float]:
        """Where each step lies in the whole run of the model, or of both experts."""
        return [progress_at(sigma, self.shift) for sigma in self.sigmas[:-1]]


@dataclass(frozen=True)
class Parts:
    """A plan's parts; None leaves that part of the model alone."""

    tokens: TokenPlan | None = None
    heads: HeadPlan | None = None
    blocks: BlockPlan | None = None

    def settled(self, run: Run) -> Parts:
        """The parts as they are in this run."""
        if self.tokens is None:
            return self
        return replace(self, tokens=self.tokens.settled(run.starts_given))


# what a run with these parts costs, in any unit
Cost = Callable[[Run, Parts], float]


def flops_cost(run: Run, parts: Parts) -> float:
    """FLOPs of the whole run."""
    return _work(run, parts).flops


def floor_cost(rates: Rates) -> Cost:
    """Seconds of the whole run at the floor of a device."""
    return lambda run, parts: rates.seconds(_work(run, parts))


def _work(run: Run, parts: Parts) -> Work:
    return plan_work(
        run.shape,
        parts.tokens,
        run.grid,
        run.progress,
        run.anchored_frames,
        run.prompts,
        heads=parts.heads,
        blocks_run=blocks_run(run, parts),
        width=run.width,
    )


def blocks_run(run: Run, parts: Parts) -> list[int] | None:
    """Blocks that run at each step; None is all in every step."""
    if parts.blocks is None:
        return None
    return blocks_per_step(parts.blocks, run.sigmas[:-1], run.shift, run.shape.num_blocks)


def whole_steps(run: Run, parts: Parts) -> list[bool]:
    """Which steps compute every token in every block."""
    counts = blocks_run(run, parts) or [run.shape.num_blocks] * run.steps
    whole = [count == run.shape.num_blocks for count in counts]
    if parts.tokens is None:
        return whole
    sizes = (run.grid, run.shape.num_blocks, run.progress, run.anchored_frames)
    kept = planned_tokens(parts.tokens, *sizes)
    return [all_of and set(k) == {run.grid.tokens} for all_of, k in zip(whole, kept, strict=True)]


@dataclass(frozen=True)
class Solved:
    """A plan for a run, and what it is expected to give.

    Args:
        parts: those that were fixed among them.
        wanted, reached: speed-ups; reached by the cost.
        priority: name in `MIXES` of the way that was gone.
        why: what is in the way when they are not the same, else None.
    """

    parts: Parts
    wanted: float
    reached: float
    priority: str
    why: str | None = None


def window(run: Run, first: int, last: int) -> tuple[float, float] | None:
    """Progress between which the steps lie that are neither first nor last; None without any."""
    progress, ends = run.progress, run.steps - last
    if first >= ends:
        return None
    start = 0.0 if first == 0 else (progress[first - 1] + progress[first]) / 2
    end = 1.0 if last == 0 else (progress[ends - 1] + progress[ends]) / 2
    if progress[0] > progress[-1]:
        # a sampler that adds noise
        start, end = (0.0 if last == 0 else end), (1.0 if first == 0 else start)
    return (start, end) if start <= end else None


def guarded_steps(run: Run, mix: Mix, first: int, last: int) -> tuple[int, int]:
    """Steps at the beginning and at the end that stay whole: those asked for or the mix's own."""
    begin, end = mix.spared[0] - SAME_PROGRESS, mix.spared[1] + SAME_PROGRESS
    early = sum(at < begin for at in run.progress)
    late = sum(at > 1 - end for at in run.progress) if mix.spared[1] else 0
    # no more than with even steps, or schedulers that crowd them there would leave few to trim
    span = abs(progress_at(run.sigmas[-1], run.shift) - run.progress[0])
    whole = run.steps / max(span, SAME_PROGRESS)
    early, late = (
        min(steps, math.ceil(share * whole - SAME_PROGRESS))
        for steps, share in zip((early, late), mix.spared, strict=True)
    )
    return max(first, early), max(last, late)


def solve(
    run: Run,
    wanted: float,
    priority: str = "balanced",
    profile: Profile | None = None,
    *,
    dense_first: int = 0,
    dense_last: int = 0,
    fixed: Parts | None = None,
    cost: Cost = flops_cost,
) -> Solved:
    """The parts whose cost is that of the dense run over `wanted`, or the nearest that there is.

    Args:
        wanted: speed-up, at least 1; 1 trims nothing.
        priority: name in `MIXES`.
        profile: None trims tokens only; blocks and heads are chosen by it.
        dense_first, dense_last: steps of this run that compute everything.
        fixed: parts that are decided already, and count.

    Raises:
        ValueError: a speed-up below 1, or no such priority.
    """
    if not wanted >= 1.0:
        raise ValueError(f"speedup: expected 1 (off) or more, got {wanted}")
    if priority not in MIXES:
        raise ValueError(f"priority: expected one of {', '.join(MIXES)}, got {priority!r}")
    fixed = (fixed or Parts()).settled(run)
    mix, dense = MIXES[priority], cost(run, Parts())
    guarded = guarded_steps(run, mix, dense_first, dense_last)
    points = [(1.0, 1.0, 1.0)]
    # what remembers needs a step to remember, and one more
    if wanted > 1.0 and window(run, max(1, guarded[0]), guarded[1]) is not None:
        free = profile is not None
        heads = free and fixed.heads is None and run.width is None
        points = way(mix, free and fixed.blocks is None, fixed.tokens is None, heads)
    make = _maker(run, mix, points, profile, guarded, fixed)
    goal, place = dense / wanted, float(len(points) - 1)
    least, most = cost(run, make(0.0)), cost(run, make(place))
    if least <= goal:
        place, reached = 0.0, least
    elif most > goal:
        reached = most
    else:
        place, reached = _bisect(lambda p: cost(run, make(p)), place, least, most, goal)
    parts, reached = make(place), dense / reached
    why = None
    if wanted > 1.0 and abs(reached / wanted - 1) > TOLERANCE:
        why = _why(run, parts, fixed, wanted, reached, profile, guarded, place == len(points) - 1)
    return Solved(_without_idle(run, parts, fixed), wanted, reached, priority, why)


def _bisect(cost, place: float, least: float, most: float, goal: float) -> tuple[float, float]:
    """Place on the way and cost nearest to the goal, of a cost that falls along it."""
    low, high = (0.0, least), (place, most)
    for _ in range(HALVINGS):
        middle = (low[0] + high[0]) / 2
        here = middle, cost(middle)
        if here[1] <= goal:
            high = here
        else:
            low = here
    # steps of a small video are coarse
    return min(high, low, key=lambda found: abs(math.log(found[1] / goal)))


def _maker(run: Run, mix: Mix, points, profile, guarded, fixed: Parts) -> Callable[[float], Parts]:
    router = None if profile is None else ProfiledRouter(profile)
    first, last = guarded
    # what remembers computes everything in its own first step, which is the last of the guarded
    start, end = window(run, max(0, first - 1), last) or (0.0, 1.0)
    heads_start, heads_end = window(run, first, last) or (0.0, 1.0)
    plans: dict[float, HeadPlan] = {}

    def heads_at(share: float) -> HeadPlan:
        if share not in plans:
            shape = run.shape
            texts = {"text_tokens": shape.text_tokens, "image_tokens": shape.image_tokens}
            plan = solve_heads(profile, run.grid, share, **texts)
            plans[share] = replace(plan, start=heads_start, end=heads_end)
        return plans[share]

    def make(place: float) -> Parts:
        blocks, tokens, attention = knobs_at(points, place)
        parts = fixed
        if blocks < 1.0:
            budget = BlockBudget(blocks, min(1.0, mix.slope * blocks), mix.curve)
            plan = BlockPlan(router, budget, skipped="reuse", start=start, end=end)
            parts = replace(parts, blocks=plan)
        if tokens < 1.0:
            options = {"schedule": mix.schedule, "start": start, "end": end}
            parts = replace(parts, tokens=preset_plan("refresh", tokens, **options))
        # the knapsack is slow on 1600 heads
        if (share := round(attention, 2)) < 1.0:
            parts = replace(parts, heads=heads_at(share))
        return parts

    return make


def _without_idle(run: Run, parts: Parts, fixed: Parts) -> Parts:
    """Leave out parts of ours that trim no step."""
    for name in ("tokens", "blocks"):
        part = getattr(parts, name)
        ours = part is not None and getattr(fixed, name) is None
        if ours and all(whole_steps(run, Parts(**{name: part}))):
            parts = replace(parts, **{name: None})
    return parts


def _why(run, parts, fixed, wanted, reached, profile, guarded, at_end: bool) -> str:
    """What is in the way, in an artist's words."""
    said = []
    theirs = [name for name in ("tokens", "heads", "blocks") if getattr(fixed, name) is not None]
    if theirs:
        nodes = " and ".join(f"WanTrim {name.capitalize()}" for name in theirs)
        said.append(f"what {nodes} {'decide' if len(theirs) > 1 else 'decides'} is taken as it is")
    if not at_end or reached > wanted:
        return "; ".join(said) or "this video is so small that the next step is further away"
    whole = whole_steps(run, parts)
    if any(whole):
        said.append(_about_whole_steps(sum(whole), run.steps, guarded))
    if run.anchored_frames >= run.grid.frames:
        said.append("all latent frames are given and must not lose tokens")
    elif not all(whole):
        said.append("the others are trimmed as far as is sane")
    if profile is None:
        said.append("without a profile only tokens are left out, with one blocks and heads too")
    return "; ".join(said)


def _about_whole_steps(whole: int, steps: int, guarded: tuple[int, int]) -> str:
    first, last = guarded
    reasons = [
        f"the first {first} on purpose" if first > 1 else "the first for later ones to repeat"
    ]
    if last:
        reasons.append(f"the last {last} on purpose")
    return f"{whole} of {steps} steps compute everything ({', '.join(reasons)})"
