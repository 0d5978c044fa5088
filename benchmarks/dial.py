"""What the one dial keeps, by priority, with and without a profile: `python -m wantrim.benchmarks.dial`.

The quality bench (benchmarks/quality.py) on the plans that the node WanTrim solves (methods/solve.py,
methods/mixes.py), on the tiny Wan: rows of benchmarks/results/dial.csv. A target is the share of the
dense FLOPs, one over the dial's number.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engine.engine import COND, UNCOND
from ..engine.plan import TrimPlan
from ..hosts.diffusers.attach import attach
from ..hosts.diffusers.sample import sigmas_for
from ..methods.mixes import MIXES
from ..solve.dial import TOLERANCE, Run, solve
from .cases import METHODS, REFRESH, Case, tokens_case
from .depth import DepthBench, depth_case, shipped_profile
from .quality import DENSE, parse_args, run_cases, selected

# 1.5x and 2x; the fast subset runs the first
TARGETS = (0.67, 0.5)
WITH, WITHOUT = "with a profile", "without a profile"


@dataclass(frozen=True)
class DialCase(Case):
    """A row of the dial.

    Args:
        setting: `WITH` or `WITHOUT`.
        priority: name in `MIXES`.
    """

    priority: str = "balanced"


def all_cases() -> list[Case]:
    """Every row, the most telling first, beside fewer steps and each part alone."""
    cases: list[Case] = []
    for target in TARGETS:
        cases.append(Case("dial", "fewer_steps", "", target))
        for setting in (WITH, WITHOUT):
            cases += [DialCase("dial", name, setting, target, None, name) for name in MIXES]
        cases.append(tokens_case("dial", target, METHODS[REFRESH], REFRESH))
    cases.append(depth_case("dial", TARGETS[0], "profiled", skipped="reuse"))
    return cases


class DialBench(DepthBench):
    """The dial's plans beside the bench's own cases and those of blocks."""

    def _prepare(self, case: Case):
        if not isinstance(case, DialCase):
            return super()._prepare(case)
        sigmas = sigmas_for(self.point.steps, self.point.shift).tolist()
        run = Run(
            self.shape, self.grid, tuple(sigmas), self.point.shift, self.point.prompts,
            self.anchored,
        )  # fmt: skip
        profile = shipped_profile() if case.setting == WITH else None
        solved = solve(run, 1 / case.target, case.priority, profile)
        if abs(solved.reached * case.target - 1) > TOLERANCE:
            raise ValueError(f"{solved.reached:.2f}x is the nearest: {solved.why}")
        plan = TrimPlan(solved.parts.tokens, solved.parts.heads, solved.parts.blocks)
        roles = (COND, UNCOND) if self.point.prompts == 2 else (COND,)

        @contextmanager
        def method():
            options = {"shift": self.point.shift, "sigmas": sigmas[:-1]}
            with attach(self.subject.model, plan, cond_or_uncond=roles, **options):
                yield

        return plan.describe(), method, self.point.steps, 1 / solved.reached


def main() -> None:
    args = parse_args(__doc__, DialBench, Path("out/dial"), ("t2v",))
    if args.weights:
        raise SystemExit("--weights: the profile of this study is the tiny Wan's; leave it out")
    torch.set_num_threads(args.threads)
    known = [DENSE, *all_cases()]
    targets = args.targets or (None if args.full else [TARGETS[0]])
    cases = selected(True, args.only, targets, known[1:])
    run_cases(args, cases, known, args.results / "dial.csv")


if __name__ == "__main__":
    main()
