"""What trimming heads and channels costs in quality: `python -m wantrim.benchmarks.width`.

The quality bench (benchmarks/quality.py) on PARE's width, on the tiny Wan: rows of
benchmarks/results/width.csv. In place a target is the share of the attention's FLOPs that stays;
of slim models it is the share of heads and channels that PARE's rule keeps, and the other rules get
the same width or the same parameters. Profile and calibration are recorded on further prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engine.engine import COND, UNCOND
from ..engine.plan import TrimPlan
from ..engine.work import plan_work
from ..hosts.diffusers.profiling import profile_run
from ..hosts.diffusers.slim import load_slim
from ..methods.budget import attention_share, solve_heads, solve_width, width_share
from ..methods.calibration import load_calibration
from ..methods.heads import HeadPlan
from ..methods.profile import Profile, load_profile
from ..methods.width import Width, ffn_count, kept_count, pare_heads, pare_width
from ..slim.export import export_slim
from ..slim.source import open_source
from ..toy import CHECKPOINT
from .bench import Bench
from .cases import TOLERANCE, Case
from .quality import DENSE, paired, paired_rows, parse_args, run_cases, selected
from .table import COLUMNS

IN_PLACE_TARGETS = (0.75, 0.5)
SLIM_TARGETS = (0.7, 0.8, 0.9)
FAST_TARGETS = (0.75, 0.7)
# shares of the steps that cost about as much as the cases
STEPS_TARGETS = (0.95, 0.9, 0.85, 0.75)
# method -> the one that it is compared with
IN_PLACE = {
    "pare": "",
    "pare_cross_full": "pare",
    "drop": "pare",
    "demote": "drop",
    "pare_uniform": "pare",
    "pare_magnitude": "pare",
    "random": "pare",
}
RAW, NORMS, REFIT = "raw", "norms corrected", "norms corrected, least squares"
CORRECTIONS = (RAW, NORMS, REFIT)
# rules of slim models; all but the first are compared with it
SLIM = (
    "slim_pare", "slim_uniform", "slim_magnitude", "slim_random", "slim_budget",
    "slim_budget_flops", "slim_budget_even", "slim_budget_quarter",
)  # fmt: skip
# what a block's FFN is worth against one of its attentions, where it is not the default
WORTH = {"budget_even": 1.0, "budget_quarter": 0.25}
# rules that get all corrections one by one
CORRECTED = ("slim_pare", "slim_budget")
CALIBRATED_ON = 16
WIDTH_COLUMNS = tuple(
    column
    for name in COLUMNS
    if not name.startswith(("vs_refresh", "vs_default"))
    for column in (
        ("against", "vs_db", "vs_lo", "vs_hi", "vs", name)
        if name == "vs_steps_db"
        else ("attention_ratio", "parameter_ratio", name)
        if name == "time_ratio"
        else (name,)
    )
)


@dataclass(frozen=True)
class WidthCase(Case):
    """A row of a head plan or of a slim model.

    Args:
        method: of `IN_PLACE` or `SLIM`.
        setting: of a slim model its corrections.
        against: method and setting of the row at the same target that this one is compared with.
    """

    against: tuple[str, str] | None = None


def all_cases() -> list[Case]:
    """Every row, the most telling first."""
    cases: list[Case] = []
    for target in IN_PLACE_TARGETS:
        for name, other in IN_PLACE.items():
            against = (other, "") if other else None
            cases.append(WidthCase("in_place", name, "", target, against=against))
    for target in SLIM_TARGETS:
        for name in SLIM:
            twins: dict[str, tuple[str, str] | None] = {REFIT: (SLIM[0], REFIT)}
            if name in CORRECTED:
                twins = {RAW: None, NORMS: (name, RAW)} | twins
            if name == SLIM[0]:
                twins[REFIT] = (name, NORMS)
            for setting, against in twins.items():
                cases.append(WidthCase("sliced", name, setting, target, against=against))
    cases += [Case("in_place sliced", "fewer_steps", "", target) for target in STEPS_TARGETS]
    return cases


def random_heads(profile: Profile, count: int, random: torch.Generator) -> list[list[int]]:
    """`count` heads of every block, ascending."""
    model = profile.model
    orders = (torch.randperm(model.num_heads, generator=random) for _ in range(model.num_blocks))
    return [sorted(order[:count].tolist()) for order in orders]


def plan_in_place(case: Case, profile: Profile, grid, text_tokens: int) -> HeadPlan:
    """The head plan of a case; none computes more of the attention than the target."""
    if case.method in ("demote", "drop"):
        demote = case.method == "demote"
        return solve_heads(profile, grid, case.target, demote=demote, text_tokens=text_tokens)
    n, blocks = profile.model.num_heads, profile.model.num_blocks
    ratio = 1 - case.target
    if case.method == "random":
        random = torch.Generator().manual_seed(0)
        count = kept_count(n, ratio)
        return HeadPlan.keeping(n, *(random_heads(profile, count, random) for _ in range(2)))
    rule = case.method.removeprefix("pare_")
    rule = rule if rule in ("uniform", "magnitude") else "role_aware"
    own, cross = (pare_heads(profile, ratio, kind=kind, rule=rule) for kind in ("self", "cross"))
    if case.method == "pare_cross_full":
        cross = [range(n)] * blocks
    return HeadPlan.keeping(n, own, cross)


def plan_slim(case: Case, profile: Profile, grid, shape, signature) -> Width:
    """The width of a case."""
    ratio = 1 - case.target
    rule = case.method.removeprefix("slim_")
    if rule in ("uniform", "magnitude"):
        return pare_width(profile, ratio, signature, rule=rule)
    model = profile.model
    if rule == "random":
        random = torch.Generator().manual_seed(0)
        count, keep = kept_count(model.num_heads, ratio), ffn_count(model.ffn_dim, ratio)
        orders = (torch.randperm(model.ffn_dim, generator=random) for _ in range(model.num_blocks))
        parts = [random_heads(profile, count, random) for _ in range(2)]
        parts.append([sorted(order[:keep].tolist()) for order in orders])
        return Width(*(tuple(tuple(block) for block in part) for part in parts))
    pare = pare_width(profile, ratio, signature)
    if rule == "pare":
        return pare
    counted = grid if rule == "budget_flops" else None
    worth = {"ffn_worth": WORTH[rule]} if rule in WORTH else {}
    budget = width_share(pare, shape, counted)
    sizes = {"grid": counted, "text_tokens": shape.text_tokens}
    return solve_width(profile, budget, signature, **sizes, **worth)


class WidthBench(Bench):
    """Head plans and slim models beside the bench's own cases."""

    @property
    def _files(self) -> tuple[Path, Path]:
        return tuple(
            self.folder / f"{kind}_{self.subject.name}_{self.name}.safetensors"
            for kind in ("profile", "calibration")
        )

    def dense(self) -> torch.Tensor:
        # processes that share the folder start on its cases when the dense videos are there
        if not all(path.exists() for path in self._files):
            self._record(*self._files)
        return super().dense()

    def _record(self, profile: Path, calibration: Path) -> None:
        items = self.subject.items(self.task, self.prompts + CALIBRATED_ON, 1)[self.prompts :]
        with profile_run(
            self.model, cond_or_uncond=self._roles(), shift=self.point.shift, calibrate="all"
        ) as recorder:
            for item in items:
                self.sample(item)
        recorder.calibration.save(calibration)
        recorder.profile().save(profile)

    def _roles(self) -> tuple[int, ...]:
        return (COND, UNCOND) if self.point.prompts == 2 else (COND,)

    def _prepare(self, case: Case):
        steps = self.point.steps
        if case.method == "fewer_steps":
            off = abs(round(case.target * steps) / steps - case.target)
            if off > TOLERANCE:
                raise ValueError("no number of steps comes near the target")
        if not isinstance(case, WidthCase):
            return super()._prepare(case)
        profile = load_profile(self._files[0])
        if case.method in IN_PLACE:
            return self._in_place(case, profile)
        return self._slim(case, profile)

    def _in_place(self, case: Case, profile: Profile):
        heads = plan_in_place(case, profile, self.grid, self.shape.text_tokens)
        share = attention_share(heads, self.grid, self.shape.text_tokens, self.shape.image_tokens)
        self.facts["attention_ratio"] = share
        plan = TrimPlan(heads=heads)
        counts = {name: heads.count(name) for name in ("full", "off")}
        cheap = profile.model.num_blocks * profile.model.num_heads - sum(counts.values())
        cross = sum(block.count("off") for block in heads.cross_attention)
        knob = f"{counts['full']} full, {cheap} cheap, {counts['off']} off, {cross} cross off"
        predicted = 1 / self.sampling.speedup(plan)
        return knob, self.trimmed(plan), self.point.steps, predicted

    def _slim(self, case: Case, profile: Profile):
        source = open_source(CHECKPOINT)
        width = plan_slim(case, profile, self.grid, self.shape, source.signature)
        self.facts["parameter_ratio"] = width_share(width, self.shape)
        calibration = load_calibration(self._files[1])
        path = self.folder / f"slim_{self.name}_{case.key}.safetensors"
        try:
            export_slim(
                source,
                path,
                width,
                profile=None if case.setting == RAW else profile,
                gram=calibration.gram if case.setting == REFIT else None,
            )
            model = load_slim(path)
        finally:
            path.unlink(missing_ok=True)

        @contextmanager
        def method():
            self.model = model
            try:
                yield
            finally:
                self.model = self.subject.model

        sizes = (sum(map(len, part)) for part in (width.self_heads, width.cross_heads))
        knob = f"{' + '.join(map(str, sizes))} heads, {sum(map(len, width.ffn_channels))} channels"
        programs = self.sampling.programs(TrimPlan())
        slim, whole = (
            plan_work(self.shape, programs, TrimPlan(), width=cut).flops for cut in (width, None)
        )
        return knob, method, self.point.steps, slim / whole


def compared_rows(results: dict[tuple, dict]) -> list[dict]:
    """`paired_rows`, and each case beside the one that it names, as `vs*`."""
    rows = paired_rows(results)
    done = [(one, result) for one, result in results.items() if "row" in result]
    for row, ((task, point, case), result) in zip(rows, done, strict=True):
        against = getattr(case, "against", None)
        twin = next(
            (
                other
                for (t, p, c), other in done
                if (t, p, c.target) == (task, point, case.target)
                and (c.method, c.setting) == against
            ),
            None,
        )
        if twin is not None:
            row |= {"against": " ".join(filter(None, against)), **paired("vs", result, twin)}
    return rows


def chosen(full: bool, only: Sequence[str] | None, targets: Sequence[float] | None) -> list[Case]:
    """The cases to run; without an option, one budget of either kind."""
    if not (full or only or targets):
        targets = FAST_TARGETS
    return selected(True, only, targets, all_cases())


def main() -> None:
    args = parse_args(__doc__, WidthBench, Path("out/width"), ("t2v",))
    if args.weights:
        raise SystemExit("--weights: this study cuts the tiny Wan's checkpoint; leave it out")
    torch.set_num_threads(args.threads)
    cases = chosen(args.full, args.only, args.targets)
    table, known = args.results / "width.csv", [DENSE, *all_cases()]
    run_cases(args, cases, known, table, compared_rows, WIDTH_COLUMNS)


if __name__ == "__main__":
    main()
