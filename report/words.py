"""A record in an artist's words."""

from __future__ import annotations

import statistics

from ..engine.record import Record, Step
from .figures import mean_work, speed_lines, step_work


def record_text(record: Record) -> str:
    """The whole report."""
    if not record.steps and not record.finished:
        return "WanTrim: no sampling run seen yet."
    remarks = ["What did not happen, and why:"]
    remarks += [f"- {note}" for note in record.notes] or ["- nothing: everything ran as planned."]
    lines = [f"WanTrim on {record.model}: {record.planned}"]
    if not record.steps:
        if record.seconds:
            lines.append(f"The model ran untouched, {record.seconds:.1f} s in all.")
        return "\n".join([*lines, "", *remarks])
    computed = [step for step in record.steps if not step.repeated] or record.steps
    seconds = statistics.median(step.seconds for step in computed)
    count = len(record.steps)
    each = "per step" if len(computed) == count else "per step that computed something"
    lines += [
        f"{count} {'step' if count == 1 else 'steps'}, {record.seconds:.1f} s in all, "
        f"{seconds:.2f} s {each} (median).",
        *_repeated_line(record),
        *_work_lines(record),
        *_heads_line(record),
        *_blocks_line(record),
        *_context_line(record),
        *speed_lines(record),
        "",
        # before the table: a long run would push them out of sight
        *remarks,
        "",
        "step  sigma   kept  planned  token work   FLOPs  blocks  calls  seconds",
    ]
    lines += [_row(record, i + 1, step) for i, step in enumerate(record.steps)]
    if not record.finished:
        lines.append("The run did not finish (cancelled or failed).")
    return "\n".join(lines)


def _work_lines(record: Record) -> list[str]:
    work, lines = mean_work(record), []
    if work is not None:
        lines.append(
            f"Work done: {work:.1%} of an untouched model's FLOPs, by the cost model "
            "(time falls less than work on small videos)."
        )
    # with whole tokens and blocks it would seem that a plan of heads did nothing
    if work is None or record.kept_share < 1.0 or record.attention_share is None:
        lines.append(
            f"Token work done: {record.kept_share:.1%} of block x token (an untouched model does "
            "100%)."
        )
    return lines


def _repeated_line(record: Record) -> list[str]:
    count = sum(step.repeated for step in record.steps)
    if not count:
        return []
    if count == 1:
        return ["One step repeats what an earlier one gave, and runs no block."]
    return [f"{count} steps repeat what an earlier one gave, and run no block."]


def _heads_line(record: Record) -> list[str]:
    if record.attention_share is None:
        return []
    return [f"Self-attention work left by the heads' patterns: {record.attention_share:.1%}."]


def _blocks_line(record: Record) -> list[str]:
    """The real mean: how many steps lie at high noise is the sampler's and the shift's doing."""
    run = [step.blocks_run for step in record.steps if not step.repeated]
    num_blocks = record.steps[0].num_blocks
    if not run or min(run) == num_blocks:
        return []
    per_step = " ".join(str(count) for count in run)
    return [f"Blocks run: {statistics.fmean(run):.1f} of {num_blocks} (per step: {per_step})."]


def _context_line(record: Record) -> list[str]:
    return [] if record.context is None else [f"Context: {record.context}."]


def _row(record: Record, number: int, step: Step) -> str:
    work = step_work(record, step)
    return (
        f"{number:>4}  {step.sigma:.4f}  {step.keep_ratio:>4.0%}  {step.program.work:>7.1%}"
        f"  {step.kept_share:>10.1%}  {'-' if work is None else format(work, '.1%'):>6}"
        f"  {step.blocks_run:>6}  {step.calls:>5}  {step.seconds:>7.2f}{_remark(step)}"
    )


def _remark(step: Step) -> str:
    """What a step without work was."""
    if step.repeated:
        return "  repeated"
    return "  answered by another node" if step.answered else ""
