"""A record in an artist's words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..engine.record import Record, Step, join_records
from .figures import attention_left, measured_speed, speed_lines, step_work
from .line import outcome

NOTHING = "nothing: everything ran as planned"


def verdict(records: Sequence[Record]) -> str:
    """What was asked, what was done and the seconds of a step, of runs that made one video."""
    both = len(records) > 1 and all(record.steps for record in records)
    record = join_records([record for record in records if record.steps] or records)
    ended = "" if record.finished else "The run did not finish (cancelled or failed). "
    cut, record = record.steps, record.without_cut()
    if cut and not record.steps:
        return f"{ended}It did not come to the end of its first step."
    if not record.steps:
        if ended:
            return ended.strip()
        if record.seconds:
            return f"Nothing was left out: the model ran untouched, {record.seconds:.1f} s in all."
        return "No run to report on: why is said below."
    came, said = outcome(record), []
    if record.asked is not None:
        whose = " of both experts, this one" if record.both and not both else ","
        said.append(f"asked {record.asked:.3g}x{whose} did {came.less or 1:.2f}x")
    elif came.whole == came.steps:
        said.append("nothing was left out")
    elif came.less is not None:
        said.append(f"{came.less:.2f}x less work")
    seconds, instead = statistics.fmean(step.seconds for step in record.steps), ""
    if came.faster is not None:
        speed = measured_speed(record)
        seconds, instead = speed.whole / speed.run, f" instead of {speed.whole:.2f} s"
    said.append(f"a {'model call' if came.calls else 'step'} took {seconds:.2f} s{instead}")
    line = "; ".join(said)
    return f"{ended}{line[0].upper()}{line[1:]}."


def steps_line(record: Record) -> str:
    """What the steps were, and the seconds of the run."""
    took = f"; {record.seconds:.1f} s in all" if record.seconds else ""
    done = record.without_cut()
    line = outcome(done).line() if done.steps else "no step was finished"
    return f"{record.model}: {line}{took}."


def record_text(record: Record) -> str:
    """The whole report of a run."""
    remarks = ["What did not happen, and why:"]
    nothing = NOTHING if record.finished else "nothing, as far as the run came"
    remarks += [f"- {note}" for note in record.notes] or [f"- {nothing}."]
    lines = [verdict([record])]
    if not record.steps:
        return "\n".join([*lines, f"{record.model}: {record.planned}.", "", *remarks])
    lines.append(steps_line(record))
    left = attention_left(record)
    if left is not None:
        lines.append(f"Self-attention work left by the heads' patterns: {left:.1%}.")
    run = [step.blocks_run for step in record.steps if not step.repeated]
    num_blocks = record.steps[0].num_blocks
    if run and min(run) < num_blocks:
        # the real mean: how many steps lie at high noise is the sampler's and the shift's doing
        mean, each = statistics.fmean(run), " ".join(map(str, run))
        lines.append(f"Blocks run: {mean:.1f} of {num_blocks} (per step: {each}).")
    unit = "call" if record.by_calls else "step"
    # before the rest: a long run would push them out of sight
    lines += ["", *remarks, "", f"Plan: {record.planned}."]
    lines += [] if record.held is None else [f"Context: {record.held}."]
    lines += [*speed_lines(record), "", f"{unit}  sigma   work  seconds  computed"]
    for number, step in enumerate(record.steps, 1):
        work = step_work(record, step)
        done = "-" if work is None else f"{work:.0%}"
        what = f"{step.seconds:>7.2f}  {computed(step)}"
        lines.append(f"{number:>4}  {step.sigma:.3f}  {done:>5}  {what}")
    return "\n".join(lines)


def computed(step: Step) -> str:
    """What a step computed, in a word or two."""
    if step.cut:
        return "not finished"
    if step.answered:
        return "answered by another node"
    if step.repeated:
        return "repeated"
    if step.whole:
        return "whole"
    said, ran = [], step.blocks_run
    tokens = step.kept_share * step.num_blocks / ran
    if tokens < 1:
        said.append(f"{tokens:.0%} of the tokens")
    if ran < step.num_blocks:
        said.append(f"{ran} of {step.num_blocks} blocks")
    if step.patterned:
        said.append("heads in patterns")
    return ", ".join(said)
