"""What PARE's recovery training keeps: `python -m wantrim.benchmarks.students`.

The students that `make train-demo` leaves in out/training, in the quality bench's runner: rows of
benchmarks/results/students.csv. Every video is compared with the full model's of 20 guided steps.
Two further ones say what weighing the samples of stage I is worth:

    python -m wantrim.training tiny --stages width --set width.steps=300 --out out/training/tiny_alike
    python -m wantrim.training tiny --stages width --set width.steps=300 width.weighting=log \
        --out out/training/tiny_log
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..engine.engine import COND, UNCOND
from ..engine.plan import TrimPlan
from ..hosts.diffusers.attach import attach
from ..hosts.diffusers.sample import sigmas_for
from ..hosts.diffusers.slim import load_slim
from ..methods.depth import BlockBudget, BlockPlan
from ..slim.file import read_header
from ..slim.router import load_router
from .bench import Bench
from .cases import DENSE, POINTS, Case
from .flops import plan_work
from .pairs import paired, paired_rows
from .peers.random_router import RandomRouter
from .quality import parse_args, refuse_rows, run_cases
from .table import COLUMNS

RUNS = Path("out/training")
# prompts and seeds of all rows
VIDEOS = (32, 1)
FEW_STEPS = 4
STAGES = ("1-width", "2-router", "3-router", "4-steps")
FORCING = "tiny_forcing/1-self_forcing"
ALIKE, LOG = "tiny_alike/1-width", "tiny_log/1-width"
# shares of dense FLOPs that the kinds of students have, about
WIDTH, ROUTED, FEW = 0.75, 0.5, 0.1
# settings whose rows are held against another one's
AGAINST = {
    "stage II's student, random blocks": "stage II",
    "stage III, 4 steps": "full model, 4 steps",
    "self-forcing, 4 steps": "full model, 4 steps",
}
VERDICT = ("against", "vs_db", "vs_lo", "vs_hi", "vs")


@dataclass(frozen=True)
class StudentCase(Case):
    """A student, or the full model, at some way of sampling.

    Args:
        student: file or stage's folder within RUNS; empty is the full model.
        router: "" runs all blocks; else "trained" or "random".
        steps, guidance: of the sampling; None is the dense videos' own.
    """

    student: str = ""
    router: str = ""
    steps: int | None = None
    guidance: float | None = None

    @property
    def path(self) -> Path:
        """Of the student's weights."""
        path = RUNS / self.student
        return path if path.suffix else path / "student.safetensors"

    @property
    def key(self) -> str:
        """With the files, so that a student that was trained anew is another case."""
        if not self.student or not self.path.is_file():
            return super().key
        files = (self.path, self.path.with_name("router.safetensors"))
        told = b"".join(file.read_bytes() for file in files if file.is_file())
        return f"{super().key}_{hashlib.sha256(told).hexdigest()[:8]}"


def all_cases() -> list[Case]:
    """Every row, the most telling first."""
    one, _, two, three = (f"tiny/{name}" for name in STAGES)
    few = {"steps": FEW_STEPS, "guidance": 1.0}

    def student(setting: str, target: float, path: str = "", **options) -> StudentCase:
        return StudentCase("student" if path else "dense_few", target, setting, path, **options)

    return [
        student("stage II", ROUTED, two, router="trained"),
        student("stage II's student, random blocks", ROUTED, two, router="random"),
        student("stage I", WIDTH, one),
        student("cut, not trained", WIDTH, "tiny/start.safetensors"),
        student("stage I, 300 steps", WIDTH, ALIKE),
        student("stage I, 300 steps, weighting log", WIDTH, LOG),
        student("full model, 4 steps", FEW, **few),
        student("full model, 4 steps, guided", FEW, steps=FEW_STEPS),
        student("stage III, 4 steps", FEW, three, router="trained", **few),
        student("self-forcing, 4 steps", FEW, FORCING, router="trained", **few),
        *(Case("fewer_steps", target) for target in (WIDTH, ROUTED)),
    ]


class StudentBench(Bench):
    """Students beside the bench's own cases."""

    def _prepare(self, case: Case):
        if not isinstance(case, StudentCase):
            return super()._prepare(case)
        steps = case.steps or self.point.steps
        guidance = case.guidance or self.point.guidance
        sigmas = sigmas_for(steps, self.point.shift).tolist()
        model, header, plan, share = self.subject.model, None, TrimPlan(), 1.0
        if case.student:
            path = case.path
            if not path.is_file():
                raise ValueError(
                    f"{path} is not there: `python -m wantrim.benchmarks.students --help` says what makes it"
                )
            model, header = load_slim(path), read_header(path)
        if case.router:
            trained = header.made["trained"][-1]
            budget = BlockBudget(trained["k_min"], trained["k_max"])
            counts = [budget.blocks(sigma, len(model.blocks)) for sigma in sigmas[:-1]]
            share = sum(counts) / len(counts) / len(model.blocks)
            learnt = case.router == "trained"
            router = load_router(path.with_name("router.safetensors")) if learnt else RandomRouter()
            plan = TrimPlan(blocks=BlockPlan(router, budget))
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

        width = None if header is None else header.width
        run, whole = replace(self.sampling, sigmas=tuple(sigmas)), TrimPlan()
        mine = plan_work(self.shape, run.programs(plan), plan, prompts=len(roles), width=width)
        dense = plan_work(self.shape, self.sampling.programs(whole), whole, self.point.prompts)
        knob = f"{share:.3f} of the blocks" if case.router else ""
        return knob, method, steps, mine.flops / dense.flops


def compared_rows(results: dict[tuple, dict]) -> list[dict]:
    """As `paired_rows`, with `vs*`: some students' PSNR less that of what they are held `against`."""
    found = {case.setting: result for (_, _, case), result in results.items() if "row" in result}
    rows = paired_rows(results)
    for row in rows:
        name = AGAINST.get(row["setting"])
        if name in found:
            row |= {"against": name, **paired("vs", found[row["setting"]], found[name])}
    return rows


def _parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    args = parse_args(__doc__, StudentBench, Path("out/students"), ("t2v",), VIDEOS)
    if args.weights:
        raise SystemExit("--weights: the students are the tiny Wan's; leave it out")
    refuse_rows(args.results, args.world)
    (point,) = (point for point in POINTS["1"] if point.steps == 20)
    known = {point: [DENSE, *all_cases()]}
    table = args.results / "students.csv"
    columns = (*COLUMNS, "parameter_ratio", *VERDICT)
    run_cases(args, known, known, table, compared_rows, columns)


if __name__ == "__main__":
    main()
