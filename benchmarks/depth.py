"""What each way of choosing blocks costs in quality: `python -m wantrim.benchmarks.depth`.

The quality bench (benchmarks/quality.py) on PARE's depth, on the tiny Wan: rows of
benchmarks/results/depth.csv. A target is the mean share of the blocks that run.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from ..engine.plan import TrimPlan
from ..hosts.diffusers.sample import sigmas_for
from ..methods.depth import SHAPES, BlockBudget, BlockPlan, blocks_per_step
from ..methods.profile import Profile, load_profile, sigma_bin
from ..methods.routers import (
    FixedRouter,
    ProfiledRouter,
    RandomRouter,
    Router,
    residual_sizes,
)
from ..toy import PROFILE
from .bench import Bench
from .cases import TOLERANCE, Case, Point, once
from .quality import DENSE, parse_args, run_cases, selected

# mean shares of the blocks; the fast subset runs the first
TARGETS = (0.68, 0.75)
# k_max over k_min in the paper: 35 to 20 blocks
PAPER_RATIO = 1.75
ROUTERS = ("profiled", "random", "static")


@dataclass(frozen=True)
class DepthCase(Case):
    """A row of a block plan; its budget is solved for the target.

    Args:
        method: the router's name, one of `ROUTERS`.
        curve: shape of the budget.
    """

    curve: str = "falling"


def depth_case(group: str, target: float, router: str, curve: str = "falling") -> DepthCase:
    """A row, its setting in words."""
    words = "identity" if router == "static" else f"{curve}, identity"
    return DepthCase(group, router, words, target, curve=curve)


def all_cases() -> list[Case]:
    """Every row, the most telling first; a plan in two questions is run once."""
    cases: list[Case] = []
    for target in TARGETS:
        cases.append(Case("methods", "fewer_steps", "", target))
        cases += [depth_case("methods", target, name) for name in ROUTERS]
        cases += [depth_case("curve", target, "profiled", curve) for curve in SHAPES]
    return once(cases)


@lru_cache(maxsize=1)
def shipped_profile() -> Profile:
    return load_profile(Path(PROFILE))


def least_blocks(profile: Profile, sigmas: list[float], count: int) -> tuple[int, ...]:
    """The `count` blocks that add least over these sigmas, relative to their input, ascending.

    The first and the last block stay.
    """
    size = residual_sizes(profile)[[sigma_bin(sigma) for sigma in sigmas]].mean(0)
    return tuple(sorted((size[1:-1].argsort(stable=True)[:count] + 1).tolist()))


def solve_plan(case: DepthCase, point: Point, profile: Profile) -> tuple[BlockPlan, float] | None:
    """The plan whose mean share of the blocks comes closest to the target, and that share."""
    num_blocks = profile.model.num_blocks
    sigmas = sigmas_for(point.steps, point.shift)[:-1].tolist()
    found, best, distance = None, 0.0, TOLERANCE
    for router, budget in _candidates(case, profile, sigmas):
        plan = BlockPlan(router, budget)
        share = statistics.fmean(blocks_per_step(plan, sigmas, point.shift, num_blocks))
        share /= num_blocks
        if abs(share - case.target) < distance:
            found, best, distance = plan, share, abs(share - case.target)
    return None if found is None else (found, best)


def _candidates(case: DepthCase, profile: Profile, sigmas: list[float]):
    if case.method == "static":
        for count in range(1, profile.model.num_blocks - 2):
            yield FixedRouter(least_blocks(profile, sigmas, count)), BlockBudget()
        return
    router = _router(case.method, profile)
    for thousandths in range(100, 1000, 5):
        k_min = thousandths / 1000
        k_max = min(1.0, PAPER_RATIO * k_min)
        yield router, BlockBudget(k_min, k_max, case.curve)


def _router(name: str, profile: Profile) -> Router:
    return ProfiledRouter(profile) if name == "profiled" else RandomRouter()


class DepthBench(Bench):
    """Block plans beside the bench's own cases."""

    def _prepare(self, case: Case):
        if not isinstance(case, DepthCase):
            return super()._prepare(case)
        solved = solve_plan(case, self.point, shipped_profile())
        if solved is None:
            raise ValueError("no budget comes near the target")
        plan, share = solved
        knob = f"k {plan.budget.k_min:.3f} to {plan.budget.k_max:.3f}"
        if isinstance(plan.router, FixedRouter):
            knob = "without " + " ".join(map(str, plan.router.skipped))
        plan = TrimPlan(blocks=plan)
        predicted = 1 / self.sampling.speedup(plan)
        return f"{knob}, mean {share:.3f}", self.trimmed(plan), self.point.steps, predicted


def main() -> None:
    args = parse_args(__doc__, DepthBench, Path("out/depth"), ("t2v",))
    if args.weights:
        raise SystemExit("--weights: the profile of this study is the tiny Wan's; leave it out")
    torch.set_num_threads(args.threads)
    known = [DENSE, *all_cases()]
    cases = selected(True, args.only, args.targets, known[1:])
    if not (args.full or args.only or args.targets):
        cases = [c for c in cases if c is DENSE or "methods" in c.groups]
        cases = [c for c in cases if c is DENSE or c.target == TARGETS[0]]
    run_cases(args, cases, known, args.results / "depth.csv")


if __name__ == "__main__":
    main()
