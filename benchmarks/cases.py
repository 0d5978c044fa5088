"""What the quality bench compares: methods, their settings, and the compute they may use.

The default is what the dial solves for a wanted speed-up. Of TAPE the keep ratio is solved from the
cost model, so that the whole run costs the target share of dense; its numbers of blocks are the
paper's, for 40 blocks, and are scaled to the depth of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..engine.plan import TrimPlan
from ..methods.schedule import Schedule
from ..methods.tokens import TokenPlan
from ..solve.dial import Dial, Run
from .peers import PEERS

TARGETS = (0.75, 0.67, 0.5, 0.4)
STUDY_TARGET = 0.67
PAPER_BLOCKS = 40
# a row of tokens or blocks further from its target than this is not shown
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


# many steps with the guidance that calibration asks for; few without, as step-distilled LoRAs run
POINTS = (Point(4, 1.0, shift=5.0), Point(20, 8.0))


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        group: the questions that the row belongs to, separated by spaces.
        target: share of dense FLOPs.
        tokens: TAPE without its keep ratio, `every` in blocks of 40 and `schedule` by direction;
            None for everything else.
        dial: of the default; None for everything else.
        context: whether the dial may plan steps that compute a part of their tokens.
    """

    group: str
    method: str
    setting: str
    target: float
    tokens: Mapping[str, object] | None = field(default=None, hash=False)
    dial: Dial | None = None
    context: bool = True

    @property
    def groups(self) -> list[str]:
        return self.group.split()

    @property
    def key(self) -> str:
        words = f"{self.method} {self.setting} {self.target}"
        return "".join(c if c.isalnum() or c in ".+-" else "_" for c in words)


# what WanTrim does by itself, the same without context, and TAPE
DEFAULT, SKIP, PAPER = "default", "skip", "paper"
OURS = (DEFAULT, SKIP, PAPER)
# 16 blocks count 40 here, so that "every 10" is every 4th
TAPE: Mapping[str, object] = {"schedule": "falling", "every": 10}
# one choice for all blocks, by attention alone
PLAIN: Mapping[str, object] = {"schedule": "constant", "every": PAPER_BLOCKS, "alpha": 1.0}
NAMED = {PAPER: TAPE, "evit": PLAIN}


def dial_case(group: str, target: float, method: str = DEFAULT, **options) -> Case:
    """A row of what the dial solves for a share of dense, with further `options` of `Dial`."""
    dial = Dial(1 / target, **options)
    words = [f"{name.replace('_', ' ')} {value}" for name, value in options.items()]
    return Case(group, method, ", ".join(words), target, None, dial, method != SKIP)


def setting_of(tokens: Mapping[str, object]) -> str:
    """A plan in words, its parts always in the same order."""
    alpha = tokens.get("alpha", 0.5)
    words = [
        "attention",
        "unsmoothed" if alpha == 1 else f"alpha {alpha:g}",
        str(tokens["schedule"]),
        "chosen once" if tokens["every"] >= PAPER_BLOCKS else f"every {tokens['every']} of 40",
        "identity",
    ]
    if "query_ratio" in tokens:
        words.append(f"queries 1/{1 / tokens['query_ratio']:.0f}")
    return ", ".join(words)


def all_cases() -> list[Case]:
    """Every row, the most telling first; a plan in two questions is run once."""
    cases = []
    for target in (STUDY_TARGET, *(t for t in TARGETS if t != STUDY_TARGET)):
        cases.append(Case("methods", "fewer_steps", "", target))
        cases += [dial_case("methods", target, name) for name in (DEFAULT, SKIP)]
        cases.append(tokens_case("methods", target, TAPE))
        cases += [Case("methods", name, "", target) for name in PEERS]
    target = STUDY_TARGET
    for parts in ({}, {"alpha": 0.5}, {"every": 10}, {"schedule": "falling"}):
        cases.append(tokens_case("ablation", target, PLAIN | parts))
    cases.append(tokens_case("ablation", target, TAPE))
    for ratio in (1 / 4, 1 / 16, 1 / 64):
        plan = TAPE | {"query_ratio": ratio, "min_queries": 1}
        cases.append(tokens_case("queries", target, plan))
    for direction in ("falling", "constant", "rising"):
        cases.append(tokens_case("schedule", target, TAPE | {"schedule": direction}))
    for every in (5, 10, 15, PAPER_BLOCKS):
        cases.append(tokens_case("reselection", target, TAPE | {"every": every}))
    return once(cases)


def once(cases: list[Case]) -> list[Case]:
    """The cases, a plan in two questions only once and in both groups."""
    unique: dict[str, Case] = {}
    for case in cases:
        known = unique.setdefault(case.key, case)
        if case.group not in known.groups:
            unique[case.key] = replace(known, group=f"{known.group} {case.group}")
    return list(unique.values())


def tokens_case(group: str, target: float, tokens: Mapping[str, object]) -> Case:
    """A row of TAPE, or of TAPE with other parts; a plan that has a name keeps it."""
    setting = setting_of(tokens)
    names = (name for name, plan in NAMED.items() if setting_of(plan) == setting)
    return Case(group, next(names, "tokens"), setting, target, tokens)


def token_plan(tokens: Mapping[str, object], keep_ratio: float, num_blocks: int) -> TokenPlan:
    """The plan for a model of this depth."""
    options = dict(tokens)
    every = max(1, round(options.pop("every") * num_blocks / PAPER_BLOCKS))
    schedule = Schedule(keep_ratio, options.pop("schedule"))
    return TokenPlan(schedule, reselect_every=every, **options)


def solve_plan(case: Case, run: Run) -> TrimPlan | None:
    """The plan whose run costs closest to the case's target; None when no keep ratio comes near.

    A dial's plan is what it gives, however near that is.
    """
    if case.dial is not None:
        return case.dial.solve(replace(run, partial=case.context)).plan
    found, distance = None, TOLERANCE
    for keep in range(2, 200):
        plan = TrimPlan(token_plan(case.tokens, keep / 200, run.shape.num_blocks))
        off = abs(1 / run.speedup(plan) - case.target)
        if off < distance:
            found, distance = plan, off
    return found
