"""How the speed bench measures: turns, their certainty, the peak of memory, and traffic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ...engine.plan import TrimPlan
from .models import Runner, sharing
from .plans import WHOLE, Size
from .traffic import Traffic, in_states, no_collection, watch_blocks


def timed(runner: Runner) -> float:
    """Milliseconds of the runner's next forward.

    On the CPU those that the process ran, which other processes do not swamp.
    """
    clock = time.perf_counter if runner.model.device.type == "cuda" else time.process_time
    runner.prepare()
    sync(runner.model.device)
    began = clock()
    runner.forward()
    sync(runner.model.device)
    return 1000 * (clock() - began)


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    dense: Runner, others: dict[str, Runner], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds (dense, trimmed) of every plan, dense after every two of them.

    Each trimmed forward is held against the dense ones right before and after it, so that a clock
    that drifts does so for both.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
    names = list(others)
    with no_collection():
        before = timed(dense)
        for _ in range(rounds):
            for first in range(0, len(names), 2):
                pair = names[first : first + 2]
                trimmed = [timed(others[name]) for name in pair]
                after = timed(dense)
                for name, took in zip(pair, trimmed, strict=True):
                    taken[name].append(((before + after) / 2, took))
                before = after
    return taken


def overhead(dense: Runner, other: Runner, pairs: int) -> list[tuple[float, float]]:
    """Milliseconds (dense, other) of forwards that should take as long, in pairs, either first."""
    taken = []
    with no_collection():
        for pair in range(pairs):
            if pair % 2:
                second = timed(other)
                taken.append((timed(dense), second))
            else:
                first = timed(dense)
                taken.append((first, timed(other)))
    return taken


def time_overhead(
    row: Callable[..., dict[str, object]],
    size: Size,
    model,
    named: dict[str, TrimPlan],
    pairs: int,
    **columns,
) -> list[dict[str, object]]:
    """What plans cost that compute everything: one that attaches nothing, others that are attached.

    The note has the difference in milliseconds, which hardly depends on the model's width.
    """
    rows = []
    for name, plan in named.items():
        # copies both where one is, since a copy lies elsewhere in memory
        dense = Runner(model if plan.neutral else sharing(model), size)
        other = Runner(model, size, plan)
        for runner in (dense, other):
            runner.step()
        taken = overhead(dense, other, pairs)
        more = statistics.median(trimmed - dense for dense, trimmed in taken)
        share = more / statistics.median(dense for dense, _ in taken)
        note = f"{more:+.2f} ms a forward, {share:+.2%} of it"
        rows.append(row(size, name, taken, note=note, **columns))
        other.close()
    return rows


def trimmed_blocks(model, size: Size, plan: TrimPlan) -> list[Traffic]:
    """What each trimmed block of a steady step costs beside its own work, bytes in hidden states."""
    runner = Runner(model, size, plan)
    for _ in range(WHOLE):
        runner.step()
    with watch_blocks(runner.attachment.engine) as found:
        runner.step()
    runner.close()
    state = size.grid.tokens * size.dim * next(model.parameters()).element_size()
    return in_states(found, state)
