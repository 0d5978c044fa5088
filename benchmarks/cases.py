"""What the quality bench compares: methods, their settings, and the compute they may use.

A token method is given by its plan without a keep ratio; the keep ratio is solved from the cost
model so that the whole run costs the target share of dense. Numbers of blocks are the papers',
for 40 blocks, and are scaled to the depth of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..methods.cost import WanShape, forward_flops, plan_flops
from ..methods.grid import TokenGrid
from ..methods.schedule import Schedule
from ..methods.tokens import TokenPlan
from .peers import PEERS

TARGETS = (0.75, 0.67, 0.5)
STUDY_TARGET = 0.67
PAPER_BLOCKS = 40
# a row further from its target than this is not shown
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

    def progress(self) -> list[float]:
        return [index / self.steps for index in range(self.steps)]


# many steps with the guidance that calibration asks for; few without, as step-distilled LoRAs run
POINTS = (Point(4, 1.0, shift=5.0), Point(20, 8.0))


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        group: the questions that the row belongs to, separated by spaces.
        tokens: a token plan without its keep ratio, `every` in blocks of 40 and `schedule` by
            direction; None for peers and for fewer steps.
        target: share of dense FLOPs.
    """

    group: str
    method: str
    setting: str
    target: float
    tokens: Mapping[str, object] | None = field(default=None, hash=False)

    @property
    def groups(self) -> list[str]:
        return self.group.split()

    @property
    def key(self) -> str:
        words = f"{self.method} {self.setting} {self.target}"
        return "".join(c if c.isalnum() or c in ".+-" else "_" for c in words)


# 16 blocks count 40 here, so that "every 10" is every 4th
TAPE = {"schedule": "falling", "every": 10, "importance": "attention"}
ONCE = {"every": PAPER_BLOCKS}
ROTATION = {"schedule": "constant", "every": 10, "alpha": 1.0, "importance": "rotation"}
EARLY = {"trim_reselecting": True}
METHODS = {
    "tape": TAPE,
    "evit": {**TAPE, **ONCE, "schedule": "constant", "alpha": 1.0},
    "random": {**TAPE, "schedule": "constant", "alpha": 1.0, "importance": "random"},
    "rotation_mean": {**ROTATION, **EARLY, "restore": "frame_mean"},
    "rotation_update": {**ROTATION, **EARLY, "restore": "last_update"},
    "rotation_update_once": {**ROTATION, **EARLY, **ONCE, "restore": "last_update"},
    "mixed_update_once": {
        **ROTATION,
        **EARLY,
        **ONCE,
        "alpha": 0.5,
        "importance": "velocity_change+rotation",
        "restore": "last_update",
    },
    "rotation_output": {**ROTATION, **EARLY, **ONCE, "restore": "last_output"},
}
# the preset of this name
REFRESH = "mixed_update_once"
# the default: refresh, with the steps whole that count for how the video begins
AUTO = "auto"
METHODS[AUTO] = METHODS[REFRESH] | {
    "schedule": "rising",
    "spare": 0.25,
    "given": METHODS[REFRESH] | {"schedule": "falling", "end": 0.84},
}
# its parts were studied without smoothing
UNSMOOTHED = METHODS[REFRESH] | {"alpha": 1.0}
# progress between which tokens are left out. A plan that remembers computes all of its own first
# step: of 20 steps the first 2, 3, 5, 7 and 9 are whole from 0.04, 0.09, 0.19, 0.29 and 0.39 on, and
# the last 1, 3 and 5 after 0.94, 0.84 and 0.74
WINDOWS = (
    {},
    {"start": 0.04},
    {"start": 0.09},
    {"start": 0.19},
    {"start": 0.29},
    {"start": 0.39},
    {"start": 0.04, "schedule": "rising"},
    {"start": 0.04, "schedule": "rising", "alpha": 1.0},
    {"start": 0.19, "schedule": "rising"},
    {"start": 0.19, "alpha": 1.0},
    {"end": 0.94},
    {"end": 0.84},
    {"end": 0.74},
    {"end": 0.94, "schedule": "falling"},
    {"end": 0.84, "schedule": "falling"},
    {"end": 0.84, "alpha": 1.0},
)
IMPORTANCES = (
    "attention",
    "key_norm",
    "hidden_norm",
    "update_norm",
    "velocity_change",
    "random",
    "rotation",
    "attention+rotation",
    "update_norm+rotation",
    "velocity_change+rotation",
)


def setting_of(tokens: Mapping[str, object]) -> str:
    """A plan in words, its parts always in the same order."""
    alpha = tokens.get("alpha", 0.5)
    words = [
        str(tokens["importance"]),
        "unsmoothed" if alpha == 1 else f"alpha {alpha:g}",
        str(tokens["schedule"]),
        "chosen once" if tokens["every"] >= PAPER_BLOCKS else f"every {tokens['every']} of 40",
        str(tokens.get("restore", "identity")),
    ]
    if tokens.get("trim_reselecting"):
        words.append("all blocks trimmed")
    if tokens.get("dropped_kv") == "keep":
        words.append("K/V kept")
    if "spare" in tokens:
        words.append(f"whole until {tokens['spare']:g}")
    if "start" in tokens:
        words.append(f"from {tokens['start']:g}")
    if "end" in tokens:
        words.append(f"until {tokens['end']:g}")
    if "query_ratio" in tokens:
        words.append(f"queries 1/{1 / tokens['query_ratio']:.0f}")
    said = ", ".join(words)
    if "given" in tokens:
        said += f"; with a given first frame {tokens['given']['schedule']}"
        said += f", until {tokens['given']['end']:g}"
    return said


def all_cases() -> list[Case]:
    """Every row, the most telling first; a plan in two questions is run once."""
    cases = []
    for target in (STUDY_TARGET, *(t for t in TARGETS if t != STUDY_TARGET)):
        cases.append(Case("methods", "fewer_steps", "", target))
        cases += [tokens_case("methods", target, plan, name) for name, plan in METHODS.items()]
        cases += [Case("methods", name, "", target) for name in PEERS]
    target = STUDY_TARGET
    for parts in ({}, {"alpha": 0.5}, {"every": 10}, {"schedule": "falling"}):
        cases.append(tokens_case("ablation", target, METHODS["evit"] | parts))
    cases.append(tokens_case("ablation", target, TAPE))
    for importance in IMPORTANCES:
        for alpha in (0.5, 1.0):
            plan = TAPE | {"importance": importance, "alpha": alpha}
            cases.append(tokens_case("importance", target, plan))
    for ratio in (1 / 4, 1 / 16, 1 / 64):
        plan = TAPE | {"query_ratio": ratio, "min_queries": 1}
        cases.append(tokens_case("queries", target, plan))
    for importance in ("attention", "random", "rotation"):
        plain = ROTATION | {"importance": importance}
        for restore in ("identity", "frame_mean", "nearest", "last_update"):
            cases.append(tokens_case("restore", target, plain | {"restore": restore}))
            if importance != "attention":
                early = plain | EARLY | {"restore": restore}
                cases.append(tokens_case("restore", target, early))
    for restore in ("identity", "frame_mean", "last_update"):
        plan = ROTATION | EARLY | {"restore": restore, "dropped_kv": "keep"}
        cases.append(tokens_case("restore", target, plan))
    for plan in (TAPE, UNSMOOTHED):
        cases.append(tokens_case("restore", target, plan | {"dropped_kv": "keep"}))
    for base in (TAPE, METHODS["rotation_mean"], UNSMOOTHED):
        for direction in ("falling", "constant", "rising"):
            cases.append(tokens_case("schedule", target, base | {"schedule": direction}))
        for every in (5, 10, 15, PAPER_BLOCKS):
            cases.append(tokens_case("reselection", target, base | {"every": every}))
    for direction in ("falling", "rising"):
        cases.append(tokens_case("schedule", target, METHODS[REFRESH] | {"schedule": direction}))
    for window in WINDOWS:
        cases.append(tokens_case("window", target, METHODS[REFRESH] | window))
    cases += [tokens_case("importance", target, plan) for plan in (METHODS[REFRESH], UNSMOOTHED)]
    for base in ("rotation_mean", "rotation_update_once", "rotation_output"):
        for importance in ("velocity_change", "velocity_change+rotation", "hidden_norm", "random"):
            plan = METHODS[base] | {"importance": importance}
            cases.append(tokens_case("importance", target, plan))
    unique: dict[str, Case] = {}
    for case in cases:
        known = unique.setdefault(case.key, case)
        if case.group not in known.groups:
            unique[case.key] = replace(known, group=f"{known.group} {case.group}")
    return list(unique.values())


def tokens_case(group: str, target: float, tokens, method: str | None = None) -> Case:
    """A row of a token plan; a plan that has a name keeps it."""
    names = (name for name, plan in METHODS.items() if setting_of(plan) == setting_of(tokens))
    method = method or next(names, "tokens")
    return Case(group, method, setting_of(tokens), target, tokens)


def token_plan(tokens: Mapping[str, object], keep_ratio: float, num_blocks: int) -> TokenPlan:
    """The plan for a model of this depth."""
    options = dict(tokens)
    if "given" in options:
        options["given"] = token_plan(options["given"], keep_ratio, num_blocks)
    every = max(1, round(options.pop("every") * num_blocks / PAPER_BLOCKS))
    schedule = Schedule(keep_ratio, options.pop("schedule"))
    return TokenPlan(schedule, reselect_every=every, **options)


def solve_plan(
    case: Case, shape: WanShape, grid: TokenGrid, point: Point, anchored_frames: int
) -> TokenPlan | None:
    """The plan whose run costs closest to the case's target; None when none comes near."""
    dense = point.steps * point.prompts * forward_flops(shape, grid.tokens)
    found, distance = None, TOLERANCE
    for keep in range(2, 200):
        plan = token_plan(case.tokens, keep / 200, shape.num_blocks)
        run = plan.settled(anchored_frames > 0)
        total = plan_flops(
            shape, run, grid, point.progress(), anchored_frames, prompts=point.prompts
        )
        off = abs(total / dense - case.target)
        if off < distance:
            found, distance = plan, off
    return found
