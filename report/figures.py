"""What a run's figures come to: FLOPs beside seconds, and the plan beside what was done."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.plan import TrimPlan
from ..engine.program import ALL, SKIP, Row
from ..engine.record import Record, Step
from ..engine.work import program_work
from ..methods.attend import attention_share
from ..methods.cost import Work
from ..methods.heads import FULL, PATTERNS
from ..solve.floor import device_rates

FORMAT = 3
# relative difference of work and of seconds that is said
SAME = 0.05


def step_work(record: Record, step: Step) -> float | None:
    """FLOPs of a step over those of an untouched model's step, or None when its sizes are unknown.

    Of a slim model untouched is slim as it is.
    Counts matrix products and attention by methods/cost.py; control branches are not in it.
    """
    works = _works(record, step)
    return None if works is None else works[0].flops / works[1].flops


def step_floor(record: Record, step: Step) -> float | None:
    """As `step_work`, in the least time that the device takes where its rates are known."""
    works, rates = _works(record, step), device_rates(record.of(step).device)
    if works is None or rates is None:
        return step_work(record, step)
    return rates.seconds(works[0]) / rates.seconds(works[1])


def _works(record: Record, step: Step) -> tuple[Work, Work] | None:
    """Work of a step, and of an untouched model's."""
    record = record.of(step)
    if record.shape is None or record.plan is None:
        return None
    whole = [Row(ALL, step.grid.tokens)] * step.num_blocks
    options = {"width": record.width}
    dense = program_work(record.shape, step.program, TrimPlan(), rows=whole, **options)
    if step.answered:
        return Work(), dense
    return program_work(record.shape, step.program, record.plan, rows=step.rows, **options), dense


def attention_left(record: Record) -> float | None:
    """Of self-attention's query-key pairs, what the heads' last patterns leave; None without."""
    found = [step.program for step in record.steps if step.program.heads is not None]
    return attention_share(found[-1].heads, found[-1].grid, text_tokens=0) if found else None


def mean_work(record: Record) -> float | None:
    """`step_work` over all steps, or None."""
    work = [step_work(record, step) for step in record.steps]
    return statistics.fmean(work) if work and None not in work else None


@dataclass(frozen=True)
class Speed:
    """Seconds of trimmed steps beside those of whole ones.

    Args:
        whole_steps: numbers of the whole steps of this run, from 1; none when one was timed apart.
        whole, trimmed: median seconds of a step; trimmed ones are those that compute a part, None
            when the others only repeat.
        counted: steps of one size that ran.
        run: seconds of those steps, had all been whole, over what they took.
        warming_up: the only whole steps are the first ones of their runs, which warm up as well.
    """

    whole_steps: tuple[int, ...]
    whole: float
    trimmed: float | None
    counted: int
    run: float
    warming_up: bool

    @property
    def measured(self) -> float | None:
        return None if self.trimmed is None else self.whole / self.trimmed


def measured_speed(record: Record) -> Speed | None:
    """Compared are steps of one grid and as many model calls; None without both kinds of step."""
    record = record.without_cut()
    trimmed = [step for step in record.steps if not step.whole and not step.answered]
    if not trimmed:
        return None
    (grid, calls), _ = Counter((s.grid, s.calls) for s in trimmed).most_common(1)[0]
    alike = [s for s in record.steps if (s.grid, s.calls) == (grid, calls)]
    whole = [s for s in alike if s.whole]
    trimmed = [s for s in alike if not s.whole and not s.answered]
    # without a clock that moved there is nothing to compare
    if not all(s.seconds > 0 for s in alike):
        return None
    # the first step of each run warms up: of several whole steps it is not the measure
    first = [part.steps[0] for part in record.parts or (record,) if part.steps]
    later = [s for s in whole if s not in first]
    warming_up, later = not later, later or whole
    apart = record.dense_seconds is not None and alike[0] is record.steps[0]
    if not (apart or whole):
        return None
    reference = record.dense_seconds if apart else statistics.median(s.seconds for s in later)
    counted = [*whole, *trimmed]
    # a first step that warmed up counts as if it had not: else a run seems to save more than it does
    steps = [*later, *trimmed]
    took = [s.seconds if s in steps else reference for s in counted]
    # repeated steps cost next to nothing: they count in the run alone
    partial = [s for s in trimmed if s.kept_share > 0]
    return Speed(
        tuple(i for i, s in enumerate(record.steps, 1) if not apart and s in later),
        reference,
        statistics.median(s.seconds for s in partial) if partial else None,
        len(counted),
        len(counted) * reference / sum(took),
        warming_up and not apart,
    )


def why_no_speed(record: Record) -> str:
    """Why `measured_speed` is None, and what to do."""
    if all(step.whole or step.cut for step in record.steps):
        return "nothing was left out in any step, so there is nothing to compare"
    return (
        "no step of this run that can be compared was whole, so there is no measured reference and "
        "no speed-up is claimed; run it once with speedup 1 (or prune ratio 0) and compare the "
        "seconds, or turn measure_dense_step on at WanTrim Report"
    )


def how_fast(times: float, form: str = ".2g") -> str:
    """A speed-up in words, which may be none."""
    if times > 1 + SAME:
        return f"{times:{form}}x faster"
    return "not faster" if times > 1 - SAME else f"{1 / times:{form}}x slower"


def speed_lines(record: Record) -> list[str]:
    """What the seconds and the work of the verdict are by, in an artist's words."""
    speed, lines = measured_speed(record), []
    unit = "model call" if record.by_calls else "step"
    if speed is None:
        lines.append(f"No seconds are compared: {why_no_speed(record)}.")
    else:
        trimmed = "the others repeated"
        if speed.trimmed is not None:
            trimmed = f"a trimmed one {speed.trimmed:.2f} s, {how_fast(speed.measured, '.2f')}"
        alike = "" if speed.counted == len(record.steps) else f", of {speed.counted} {unit}s alike"
        lines.append(
            f"Seconds: a whole {unit} {speed.whole:.2f} s ({_which(speed, unit)}), {trimmed}{alike}."
        )
        if speed.warming_up:
            first = f"{unit} was the first one, which warms up"
            if len(speed.whole_steps) > 1:
                first = f"{unit}s were the first ones of their runs, which warm up"
            lines.append(
                f"The whole {first} as well: the seconds of a whole one may be too many, so no gain "
                "is claimed."
            )
    if record.shape is not None:
        lines.append(f"Work: by {_by(record)} of the steps as they ran.")
    return lines


def _which(speed: Speed, unit: str = "step") -> str:
    """The steps that are the reference, in words."""
    if not speed.whole_steps:
        return "timed apart, without the sampler's own work"
    numbers = ", ".join(map(str, speed.whole_steps))
    return f"{unit if len(speed.whole_steps) == 1 else f'{unit}s'} {numbers} of this run"


def reports_json(reports: Sequence[Record]) -> dict:
    """Several reports as one, and the version of their form."""
    return {"format": FORMAT, "reports": [report_json(record) for record in reports]}


def report_json(record: Record) -> dict:
    """All that the record knows, as plain data for JSON."""
    speed = measured_speed(record) if record.steps else None
    whole = None
    if speed is not None:
        whole = {
            "what": _which(speed),
            "steps": list(speed.whole_steps),
            "seconds": speed.whole,
            "warming_up": speed.warming_up,
        }
    return {
        "model": record.model,
        "plan": record.planned,
        "finished": record.finished,
        "seconds": record.seconds,
        "attention_share": attention_left(record),
        "context": record.held,
        "token_work": record.kept_share if record.steps else None,
        "flops_share": mean_work(record),
        "reference": whole,
        "no_reference": why_no_speed(record) if record.steps and speed is None else None,
        "measured": speed
        and {"trimmed_step_seconds": speed.trimmed, "step": speed.measured, "run": speed.run},
        "asked": record.asked,
        "expected": record.expected,
        "done": {"by": _by(record), "run": expected_speedup(record)},
        "steps": [_step_json(record, step) for step in record.steps],
        "did_not_happen": list(record.notes),
    }


def _step_json(record: Record, step: Step) -> dict:
    planned, done = (_rows_json(step, rows) for rows in (step.program.rows, step.rows))
    return {
        "sigma": step.sigma,
        "progress": step.progress,
        "tokens": step.grid.tokens,
        "grid": [step.grid.frames, step.grid.height, step.grid.width],
        "share": step.program.share,
        "repeated": step.repeated,
        "answered": step.answered,
        "cut": step.cut,
        "planned": planned,
        "executed": done,
        "token_work": step.kept_share,
        "flops_share": step_work(record, step),
        "calls": step.calls,
        "seconds": step.seconds,
    }


def _rows_json(step: Step, rows: Sequence[Row]) -> dict:
    found: dict = {
        "blocks": sum(row.run != SKIP for row in rows),
        "tokens_per_block": [row.tokens for row in rows],
    }
    if step.program.heads is not None:
        # self-attention heads by pattern over the blocks that ran
        pairs = zip(rows, step.program.heads.self_attention, strict=True)
        ran = [(row, heads) for row, heads in pairs if row.run != SKIP]
        names = Counter(name if row.heads else FULL for row, heads in ran for name in heads)
        found["heads"] = {name: names[name] for name in PATTERNS if names[name]}
    return found


def expected_speedup(record: Record) -> float | None:
    """What all steps come to, by the cost model, or None."""
    floors = [step_floor(record, step) for step in record.steps]
    known = floors and None not in floors and sum(floors) > 0
    return 1 / statistics.fmean(floors) if known else None


def _by(record: Record) -> str:
    """What the cost model goes by on this device."""
    return "FLOPs" if device_rates(record.device) is None else f"the rates of {record.device}"
