"""The registry of the quality bench: methods, the compute they may use, and how videos are sampled.

The default is what the dial solves for a wanted speed-up. Of TAPE the keep ratio is solved from the
cost model, so that the whole run costs the target share of dense; its numbers of blocks are the
paper's, for 40 blocks, and are scaled to the depth of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..engine.plan import TrimPlan
from ..methods.schedule import Schedule
from ..methods.tokens import TokenPlan
from ..solve.dial import Dial, Run
from .peers.registry import PEERS

TARGETS = (0.75, 0.67, 0.5, 0.4)
STUDY_TARGET = 0.67
PAPER_BLOCKS, PAPER_EVERY = 40, 10
# a keep ratio that comes no nearer to its target has no row
TOLERANCE = 0.03
# rows whose shares of the dense FLOPs differ by more are not compared
FAIR = 0.035


@dataclass(frozen=True)
class Point:
    """How videos are sampled: Euler steps, guidance (1 is none) and flow shift."""

    steps: int
    guidance: float
    shift: float = 3.0

    @property
    def prompts(self) -> int:
        """Rows of a model call."""
        return 1 if self.guidance == 1 else 2


MANY_STEPS = 50
# by world. The first one's guidance bends its paths as published figures ask for; the second has
# Wan's own, and in four steps the shift that its LoRA was distilled with
POINTS = {
    "1": (Point(4, 1.0, shift=5.0), Point(20, 8.0)),
    "2": (Point(4, 1.0), Point(20, 5.0), Point(MANY_STEPS, 5.0)),
}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        target: share of dense FLOPs.
        setting: the method in words, where its name alone does not say it.
    """

    method: str
    target: float
    setting: str = ""

    @property
    def key(self) -> str:
        words = f"{self.method} {self.setting} {self.target}"
        return "".join(c if c.isalnum() or c in ".+-" else "_" for c in words)

    @property
    def dial(self) -> Dial:
        return Dial(1 / self.target)


DENSE = Case("dense", 1.0)
# what WanTrim does by itself, the same in whole and repeated steps only, and TAPE
DEFAULT, SKIP, PAPER = "default", "skip", "paper"
OURS = (DEFAULT, SKIP, PAPER)
DIALLED = (DEFAULT, SKIP)
METHODS = ("fewer_steps", *OURS, *PEERS)
# so many steps take long: the default and the two peers that keep most in 20
LONG_METHODS, LONG_TARGETS = (DEFAULT, "easycache", "sea_cache"), (STUDY_TARGET, 0.5)
SETTINGS = {
    PAPER: "attention, alpha 0.5, falling, every 10 of 40, identity",
    "random": "random, unsmoothed, constant, every 10 of 40, identity",
}


def case_of(method: str, target: float) -> Case:
    """The case of a method at a share of the dense FLOPs."""
    return Case(method, target, SETTINGS.get(method, ""))


def cases_at(steps: int) -> list[Case]:
    """Every case of a number of steps but dense, the most telling target first."""
    if steps >= MANY_STEPS:
        return [case_of(name, target) for target in LONG_TARGETS for name in LONG_METHODS]
    targets = (STUDY_TARGET, *(target for target in TARGETS if target != STUDY_TARGET))
    return [case_of(name, target) for target in targets for name in METHODS]


def paper_plan_of(keep_ratio: float, num_blocks: int) -> TokenPlan:
    """TAPE for a model of this depth."""
    every = max(1, round(PAPER_EVERY * num_blocks / PAPER_BLOCKS))
    return TokenPlan(Schedule(keep_ratio, "falling"), reselect_every=every)


def case_run(case: Case, run: Run) -> Run:
    """The run as the dial of a case knows it."""
    return replace(run, partial=case.method == DEFAULT)


def solve_plan(case: Case, run: Run) -> TrimPlan | None:
    """The plan whose run costs closest to the case's target; None when no keep ratio comes near.

    A dial's plan is what it gives, however near that is.
    """
    if case.method in DIALLED:
        return case.dial.solve(case_run(case, run)).plan
    found, distance = None, TOLERANCE
    for keep in range(2, 200):
        plan = TrimPlan(paper_plan_of(keep / 200, run.shape.num_blocks))
        off = abs(1 / run.speedup(plan) - case.target)
        if off < distance:
            found, distance = plan, off
    return found
