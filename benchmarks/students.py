"""What recovery training is worth: `python -m wantrim.benchmarks.students`.

The quality bench (benchmarks/quality.py) on the students that PARE's stages make of the tiny Wan:
rows of benchmarks/results/students.csv. Every video is compared with the full model's of 20 guided
steps. The students are read from out/training, where `make train-demo` and the commands of
benchmarks/README.md put them.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..engine.engine import COND, UNCOND
from ..engine.plan import TrimPlan
from ..engine.work import plan_work
from ..hosts.diffusers.attach import attach
from ..hosts.diffusers.sample import sigmas_for
from ..hosts.diffusers.slim import load_slim
from ..methods.depth import BlockBudget, BlockPlan
from ..methods.routers import FixedRouter, ProfiledRouter, RandomRouter, Router, load_router
from ..slim.file import read_header
from .bench import Bench
from .cases import Case
from .depth import least_blocks, shipped_profile
from .quality import DENSE, parse_args, run_cases, selected
from .width import WIDTH_COLUMNS, compared_rows

RUNS = Path("out/training")
# shares of dense FLOPs that the kinds of students have, about
WIDTH, ROUTED, FEW = 0.75, 0.5, 0.1
GROUPS = {WIDTH: "width", ROUTED: "router", FEW: "steps"}
# stage III and its rivals
FEW_STEPS = 4
STAGES = ("1-width", "2-router", "3-router", "4-steps")


@dataclass(frozen=True)
class StudentCase(Case):
    """A student, or the full model, at some way of sampling.

    Args:
        student: file or stage's folder within RUNS; empty is the full model.
        router: "" runs all blocks; else "trained", "profiled", "random" or "static".
        steps, guidance: of the sampling; None is the dense videos' own.
        against: method and setting of the row at the same target that this one is compared with.
    """

    student: str = ""
    router: str = ""
    steps: int | None = None
    guidance: float | None = None
    against: tuple[str, str] | None = None


def student(setting: str, target: float, path: str, against: str = "", **options) -> StudentCase:
    """A row of method "student"; `against` is another one's setting."""
    twin = ("student", against) if against else None
    kinds = {"student": path, "against": twin} | options
    return StudentCase(GROUPS[target], "student", setting, target, **kinds)


def all_cases() -> list[Case]:
    """Every row, the most telling first."""
    raw, first, half, second = "cut, not trained", "stage I", "stage II, first pass", "stage II"
    # the ablations of stage II are as long as its first pass
    one, once, twice, few = (f"tiny/{name}" for name in STAGES)
    trained = {"router": "trained"}
    cases: list[Case] = [
        student(second, ROUTED, twice, **trained),
        student(first, WIDTH, one, raw),
        student(raw, WIDTH, "tiny/start.safetensors"),
        student(half, ROUTED, once, second, **trained),
    ]
    for name in ("profiled", "random", "static"):
        cases.append(
            student(f"stage II's student, {name} blocks", ROUTED, twice, second, router=name)
        )
    for name in ("profiled", "random"):
        cases.append(student(f"stage I's student, {name} blocks", ROUTED, one, second, router=name))
    cases += [
        student("stage I without temporal loss", WIDTH, "no_temporal/1-width", first),
        student("stage I without temporal protection", WIDTH, "no_protection/1-width", first),
        student(f"{half}, router without content", ROUTED, "no_content/2-router", half, **trained),
    ]
    cases += [Case(GROUPS[target], "fewer_steps", "", target) for target in (WIDTH, ROUTED)]
    dense, short = "full model, 4 steps", {"steps": FEW_STEPS}
    cases += [
        StudentCase("steps", "dense_few", dense, FEW, guidance=1.0, **short),
        StudentCase("steps", "dense_few", f"{dense}, guided", FEW, **short),
        student("stage II, 4 steps, guided", FEW, twice, **trained, **short),
        student("stage III, 4 steps", FEW, few, guidance=1.0, **trained, **short),
    ]
    cases[-1] = replace(cases[-1], against=("dense_few", dense))
    return cases


class StudentBench(Bench):
    """Students beside the bench's own cases."""

    def _prepare(self, case: Case):
        if not isinstance(case, StudentCase):
            return super()._prepare(case)
        steps = case.steps or self.point.steps
        guidance = case.guidance or self.point.guidance
        all_sigmas = sigmas_for(steps, self.point.shift).tolist()
        sigmas = all_sigmas[:-1]
        model, header = self.subject.model, None
        if case.student:
            model, header = self._load(case.student)
        plan, share = TrimPlan(), 1.0
        if case.router:
            # a student of stage I is asked for what stage II has
            said = header if case.router == "trained" else self._load(f"tiny/{STAGES[2]}")[1]
            trained = said.made["trained"][-1]
            budget = BlockBudget(trained["k_min"], trained["k_max"])
            chosen, share = self._blocks(case, budget, sigmas, len(model.blocks))
            plan = TrimPlan(blocks=chosen)
        blocks = sum(_parameters(block) for block in model.blocks)
        active = _parameters(model) - blocks * (1 - share)
        self.facts["parameter_ratio"] = active / _parameters(self.subject.model)
        roles = (COND,) if guidance == 1 else (COND, UNCOND)

        @contextmanager
        def method():
            self.model, self.guidance = model, guidance
            try:
                with attach(model, plan, cond_or_uncond=roles, shift=self.point.shift):
                    yield
            finally:
                self.model, self.guidance = self.subject.model, self.point.guidance

        knob = f"{share:.3f} of the blocks" if case.router else ""
        width = None if header is None else header.width
        sizes = {"prompts": len(roles), "width": width}
        run = replace(self.sampling, sigmas=tuple(all_sigmas))
        mine = plan_work(self.shape, run.programs(plan), plan, **sizes).flops
        whole = TrimPlan()
        dense = plan_work(self.shape, self.sampling.programs(whole), whole, self.point.prompts)
        predicted = mine / dense.flops
        return knob, method, steps, predicted

    def _load(self, name: str):
        path = RUNS / name
        path = path if path.suffix else path / "student.safetensors"
        if not path.is_file():
            raise ValueError(f"{path} is not there; `make train-demo` and benchmarks/README.md")
        return load_slim(path), read_header(path)

    def _blocks(
        self, case: StudentCase, budget: BlockBudget, sigmas: list[float], num_blocks: int
    ) -> tuple[BlockPlan, float]:
        """The plan, and the mean share of the blocks that run."""
        counts = [budget.blocks(sigma, num_blocks) for sigma in sigmas]
        share = sum(counts) / len(counts) / num_blocks
        router: Router
        if case.router == "trained":
            router = load_router(RUNS / case.student / "router.safetensors")
        elif case.router == "profiled":
            router = ProfiledRouter(shipped_profile())
        elif case.router == "random":
            router = RandomRouter()
        else:
            skipped = num_blocks - round(share * num_blocks)
            router = FixedRouter(least_blocks(shipped_profile(), sigmas, skipped))
            share = 1 - skipped / num_blocks
        return BlockPlan(router, budget), share


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    args = parse_args(__doc__, StudentBench, Path("out/students"), ("t2v",))
    if args.weights:
        raise SystemExit("--weights: the students are the tiny Wan's; leave it out")
    args.points = [point for point in args.points if point.guidance > 1]
    torch.set_num_threads(args.threads)
    known = [DENSE, *all_cases()]
    cases = selected(True, args.only, args.targets, known[1:])
    table = args.results / "students.csv"
    run_cases(args, cases, known, table, compared_rows, WIDTH_COLUMNS)


if __name__ == "__main__":
    main()
