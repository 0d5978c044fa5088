"""What a run's figures come to: FLOPs beside seconds, and the plan beside what was done."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..methods.cost import Work, block_works, outside_flops
from ..methods.floor import device_rates
from ..methods.heads import FULL, PATTERNS, HeadPlan

if TYPE_CHECKING:
    from .report import Report, Step

FORMAT = 1


def step_work(report: Report, step: Step) -> float | None:
    """FLOPs of a step over those of an untouched model's step, or None when its sizes are unknown.

    Counts matrix products and attention by methods/cost.py; control branches are not in it.
    """
    works = _works(report, step)
    return None if works is None else works[0].flops / works[1].flops


def step_floor(report: Report, step: Step) -> float | None:
    """As `step_work`, in the least time that the device takes where its rates are known."""
    works, rates = _works(report, step), device_rates(report.device)
    if works is None or rates is None:
        return step_work(report, step)
    return rates.seconds(works[0]) / rates.seconds(works[1])


def _works(report: Report, step: Step) -> tuple[Work, Work] | None:
    """Work of a step, and of an untouched model's."""
    if report.shape is None:
        return None
    ran = [index for index, kept in enumerate(step.kept_per_block) if kept]
    heads = None
    if step.patterned:
        plan = report.heads

        def rows(kind: tuple) -> tuple:
            whole = (FULL,) * len(kind[0])
            return tuple(kind[i] if i in step.patterned else whole for i in ran)

        heads = HeadPlan(rows(plan.self_attention), rows(plan.cross_attention))
    tokens = step.grid.tokens
    done = block_works(
        replace(report.shape, num_blocks=len(ran)),
        tokens,
        [step.kept_per_block[index] for index in ran],
        report.keeps_kv,
        grid=step.grid,
        anchored_frames=step.anchored_frames,
        heads=heads,
    )
    outside = Work(outside_flops(report.shape, tokens))
    return sum(done, outside), sum(block_works(report.shape, tokens), outside)


def mean_work(report: Report) -> float | None:
    """`step_work` over all steps, or None."""
    work = [step_work(report, step) for step in report.steps]
    return statistics.fmean(work) if work and None not in work else None


@dataclass(frozen=True)
class Speed:
    """Seconds of trimmed steps beside those of whole ones.

    Args:
        whole_steps: numbers of the whole steps of this run, from 1; none when one was timed apart.
        whole, trimmed: median seconds of a step.
        run: seconds of all steps, had all been whole, over what they took.
        expected, expected_run: the same two ratios by the cost model, or None.
    """

    whole_steps: tuple[int, ...]
    whole: float
    trimmed: float
    run: float
    expected: float | None
    expected_run: float | None

    @property
    def measured(self) -> float:
        return self.whole / self.trimmed

    @property
    def warming_up(self) -> bool:
        """Whether the only whole step is the first, which warms up as well."""
        return self.whole_steps == (1,)


def measured_speed(report: Report) -> Speed | None:
    """Compared are steps of one grid and as many model calls; None without both kinds of step."""
    trimmed = [step for step in report.steps if not step.whole and step.kept_share > 0]
    if not trimmed:
        return None
    (grid, calls), _ = Counter((s.grid, s.calls) for s in trimmed).most_common(1)[0]
    alike = [s for s in report.steps if (s.grid, s.calls) == (grid, calls)]
    whole = [s for s in alike if s.whole]
    trimmed = [s for s in alike if not s.whole and s.kept_share > 0]
    # without a clock that moved there is nothing to compare
    if not all(s.seconds > 0 for s in alike):
        return None
    # the first step warms up: of several whole steps it is not the measure
    later = [s for s in whole if s is not report.steps[0]] or whole
    if report.dense_seconds is not None and alike[0] is report.steps[0]:
        later, reference = [], report.dense_seconds
    elif not whole:
        return None
    else:
        reference = statistics.median(s.seconds for s in later)
    counted = [*later, *trimmed]
    work = [step_floor(report, s) for s in counted]
    known = all(share is not None for share in work)
    return Speed(
        tuple(i + 1 for i, s in enumerate(report.steps) if any(s is one for one in later)),
        reference,
        statistics.median(s.seconds for s in trimmed),
        len(counted) * reference / sum(s.seconds for s in counted),
        1 / statistics.median(work[len(later) :]) if known else None,
        len(counted) / sum(work) if known else None,
    )


def why_no_speed(report: Report) -> str:
    """Why `measured_speed` is None, and what to do."""
    if all(step.whole for step in report.steps):
        return "nothing was left out in any step, so there is nothing to compare"
    return (
        "no step of this run that can be compared was whole, so there is no measured reference and "
        "no speed-up is claimed; run it once at prune ratio 0 and compare the seconds, or turn "
        "measure_dense_step on at WanTrim Report"
    )


def speed_lines(report: Report) -> list[str]:
    """Measured and expected speed in an artist's words."""
    speed = measured_speed(report)
    if speed is None:
        lines = [f"Measured speed-up: none: {why_no_speed(report)}."]
        expected = _expected(report)
        if expected is not None:
            lines.append(f"Expected from {_by(report)} over these steps: {expected:.2f} x.")
        return lines
    lines = [
        f"Measured: a trimmed step {speed.trimmed:.2f} s, a whole one {speed.whole:.2f} s "
        f"({_which(speed)}): {speed.measured:.2f} x; all steps {speed.run:.2f} x."
    ]
    if speed.expected is not None:
        lines.append(
            f"Expected from {_by(report)}: a trimmed step {speed.expected:.2f} x; all steps "
            f"{speed.expected_run:.2f} x."
        )
    if speed.warming_up:
        lines.append(
            "The whole step was the first one, which warms up as well: the measured figure may be "
            "too good."
        )
    return lines


def _which(speed: Speed) -> str:
    """The steps that are the reference, in words."""
    if not speed.whole_steps:
        return "timed apart, without the sampler's own work"
    numbers = ", ".join(map(str, speed.whole_steps))
    return f"{'step' if len(speed.whole_steps) == 1 else 'steps'} {numbers} of this run"


def reports_json(reports: Sequence[Report]) -> dict:
    """Several reports as one, and the version of their form."""
    return {"format": FORMAT, "reports": [report_json(report) for report in reports]}


def report_json(report: Report) -> dict:
    """All that the report knows, as plain data for JSON."""
    speed = measured_speed(report) if report.steps else None
    whole = None
    if speed is not None:
        whole = {
            "what": _which(speed),
            "steps": list(speed.whole_steps),
            "seconds": speed.whole,
            "warming_up": speed.warming_up,
        }
    return {
        "model": report.model,
        "plan": report.planned,
        "finished": report.finished,
        "seconds": report.seconds,
        "attention_share": report.attention_share,
        "token_work": report.kept_share if report.steps else None,
        "flops_share": mean_work(report),
        "reference": whole,
        "no_reference": why_no_speed(report) if report.steps and speed is None else None,
        "measured": speed
        and {"trimmed_step_seconds": speed.trimmed, "step": speed.measured, "run": speed.run},
        "expected": {
            "by": _by(report),
            "step": speed and speed.expected,
            "run": speed.expected_run if speed else _expected(report),
        },
        "steps": [_step_json(report, step) for step in report.steps],
        "did_not_happen": list(report.notes),
    }


def _step_json(report: Report, step: Step) -> dict:
    planned: dict = {"blocks": step.planned_blocks, "tokens_per_block": step.planned_tokens}
    done: dict = {"blocks": step.blocks_run, "tokens_per_block": step.kept_per_block}
    if report.heads is not None:
        blocks = range(step.num_blocks)
        planned["heads"] = _heads(report.heads, blocks, blocks)
        ran = [index for index, kept in enumerate(step.kept_per_block) if kept]
        done["heads"] = _heads(report.heads, ran, step.patterned)
    return {
        "sigma": step.sigma,
        "progress": step.progress,
        "tokens": step.grid.tokens,
        "grid": [step.grid.frames, step.grid.height, step.grid.width],
        "planned": planned,
        "executed": done,
        "token_work": step.kept_share,
        "flops_share": step_work(report, step),
        "calls": step.calls,
        "seconds": step.seconds,
    }


def _heads(plan: HeadPlan, ran: Sequence[int], patterned) -> dict[str, int]:
    """Self-attention heads by pattern over the blocks that ran."""
    names = Counter(
        name if index in patterned else FULL for index in ran for name in plan.self_attention[index]
    )
    return {name: names[name] for name in PATTERNS if names[name]}


def _expected(report: Report) -> float | None:
    floors = [step_floor(report, step) for step in report.steps]
    return 1 / statistics.fmean(floors) if floors and None not in floors else None


def _by(report: Report) -> str:
    """What the cost model goes by on this device."""
    return "FLOPs" if device_rates(report.device) is None else f"the rates of {report.device}"
