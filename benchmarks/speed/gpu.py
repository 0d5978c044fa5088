"""The speed bench on a GPU: kernels beside torch, and Wan's real sizes with random weights."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from ...engine.context import Room
from ...engine.plan import TrimPlan
from ...methods.importance import attention_received
from ...methods.tokens import select_tokens
from .comfyui import rows_in_comfyui
from .kernels import KERNEL_PLAN, KERNELS, attention_rows, kernel_rows
from .models import Runner, build, sharing
from .plans import (
    ATTACHED,
    ATTACHED_NAME,
    COMPILED_PLANS,
    PAPER,
    PARTIAL,
    PINNED,
    PLANS,
    SHARE,
    WHOLE,
    WRITING,
    WRITING_NAME,
    Size,
    plans,
    ratio,
    steady_work,
)
from .probes import take_turns, time_overhead
from .scale import GPU, LATENTS, MODELS, Scale, measured_rates, milliseconds
from .traffic import peak_bytes

log = logging.getLogger(__name__)
Row = dict[str, object]
COMMAND = "python -m wantrim.benchmarks.speed --gpu"
# seconds after which nothing begins; eight minutes with what had begun
LIMIT = 450.0
# in order of worth
SIZES = (("14B", "480p"), ("1.3B", "480p"), ("14B", "720p"), ("1.3B", "720p"))
SELECTION = "choosing tokens"
TOKEN_PLANS = (PARTIAL, PAPER)
OVERHEAD = {ATTACHED_NAME: ATTACHED, WRITING_NAME: WRITING}


def real_sizes() -> list[Size]:
    """14B and 1.3B at 480p and 720p, with the blocks that are timed."""
    return [GPU.size(*names) for names in SIZES]


def ask_for_gpu() -> None:
    """Refuse to go on without a GPU.

    Raises:
        SystemExit: there is none that torch can use.
    """
    if not torch.cuda.is_available():
        raise SystemExit("--gpu: expected a GPU that torch can use, found none; leave --gpu out")


def gpu_rows(
    row: Callable[..., Row],
    comfyui: Path | None = None,
    scale: Scale = GPU,
    limit: float = LIMIT,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Row]]:
    """Rows as they come, the most telling parts first; what there is no time for is said.

    Args:
        row: makes one from a size, a plan's name and milliseconds.
        comfyui: a checkout, to time the sizes in it too.
        limit: seconds after which no part begins and no row is begun; what runs in ComfyUI is stopped.
    """
    ends = clock() + limit
    for name, make in _parts(row, scale, comfyui, lambda: ends - clock()):
        if clock() >= ends:
            log.warning("%s: not measured, the time is used up", name)
            continue
        try:
            for rows in make():
                yield rows
                if clock() >= ends:
                    log.warning("%s: not to its end, the time is used up", name)
                    break
        except subprocess.TimeoutExpired:
            log.warning("%s: not to its end, the time is used up", name)
        except (RuntimeError, subprocess.CalledProcessError, ValueError) as error:
            # what was measured stays, and the parts behind it may go
            log.warning("%s: %s: %s", name, type(error).__name__, error)
        if scale.device == "cuda":
            torch.cuda.empty_cache()


def _parts(row, scale: Scale, comfyui: Path | None, left: Callable[[], float]):
    """Name and rows of every part, in order of worth; `left` are the seconds that there are."""

    def inside(size: Size, compiled: str) -> Iterator[list[Row]]:
        return rows_in_comfyui(row, size, scale, comfyui, compiled, left())

    latents = list(scale.latents.values())
    yield "kernels", lambda: kernel_rows(row, scale, latents[:1])
    for at, names in enumerate(SIZES):
        size = scale.size(*names)
        yield f"{size.name}, diffusers", partial(_time_size, row, size, scale)
        if comfyui is not None:
            yield f"{size.name}, ComfyUI", partial(inside, size, "no")
            yield f"{size.name}, ComfyUI, compiled", partial(inside, size, scale.compiled)
        if at == 0:
            yield f"{size.name}, overhead", partial(_overhead_rows, row, size, scale)
            yield "attention kernels", lambda: attention_rows(row, scale)
    for names in SIZES[:1]:
        size = scale.size(*names)
        yield (
            f"{size.name}, diffusers, compiled",
            partial(_time_size, row, size, scale, scale.compiled),
        )
    yield "kernels, larger", lambda: kernel_rows(row, scale, latents[1:])


def rows_to_fill() -> Iterator[Row]:
    """Rows that need a GPU, with the command that measures them."""
    blank = {"device": "GPU", "dtype": "bfloat16", "compiled": "no"}
    note = f"not measured: {COMMAND}"
    chooses = [f"{SELECTION}, {name}" for name in TOKEN_PLANS]
    for at, size in enumerate(real_sizes()):
        # what is measured once is of the first size
        once = OVERHEAD if at == 0 else ()
        compiled = ("comfyui",) if at else ("diffusers", "comfyui")
        parts = [("diffusers", "no", [*PLANS, *chooses, *once]), ("comfyui", "no", PLANS)]
        parts += [(host, GPU.compiled, COMPILED_PLANS) for host in compiled]
        for host, backend, names in parts:
            more = " --comfyui FOLDER" if host == "comfyui" else ""
            for plan in names:
                yield blank | {
                    "case": size.name, "host": host, "tokens": size.grid.tokens, "plan": plan,
                    "compiled": backend, "note": note + more,
                }  # fmt: skip
    for name in KERNELS:
        for resolution, latent in LATENTS.items():
            size = Size(f"14B, {resolution}", *MODELS["14B"], latent)
            yield blank | {
                "case": f"kernel {name}", "host": "torch", "tokens": size.grid.tokens,
                "plan": KERNEL_PLAN, "note": note,
            }  # fmt: skip


def _overhead_rows(row: Callable[..., Row], size: Size, scale: Scale) -> Iterator[list[Row]]:
    model = build(size, scale.device, scale.dtype)
    yield time_overhead(row, size, model, OVERHEAD, 2 * scale.rounds, **scale.named)


def _time_size(
    row: Callable[..., Row], size: Size, scale: Scale, compiled: str = "no"
) -> Iterator[list[Row]]:
    rates = measured_rates(size, scale)
    log.info("%s: %s", size.name, rates)
    model = build(size, scale.device, scale.dtype)
    whole = steady_work(size, TrimPlan())
    state = scale.dtype.itemsize * size.grid.tokens * size.dim
    # each compiles blocks of its own
    dense = Runner(model if compiled == "no" else sharing(model), size, compiled=compiled)
    dense.step()
    dense_peak = peak_bytes(dense.step)
    # one plan at a time, since each holds what it remembers
    for name in PLANS if compiled == "no" else COMPILED_PLANS:
        plan = plans(size)[PARTIAL if name == PINNED else name]
        room = Room(torch.device("cpu")) if name == PINNED else None
        other = Runner(model, size, plan, compiled, room)
        run = partial(_steps, other, WHOLE + 1)
        peak = peak_bytes(run)
        taken = take_turns(dense, {name: other}, scale.rounds)[name]
        other.close()
        predicted = ratio(rates.seconds, whole, steady_work(size, plan))
        floor = 1000 * rates.seconds(steady_work(size, plan))
        note = f"floor {floor:.3g} ms at the rates measured in this run"
        more = {"peak_mb": peak / 2**20, "extra_states": (peak - dense_peak) / state}
        more |= {"compiled": compiled, **scale.named}
        made = row(size, name, taken, predicted=predicted, note=note, **more)
        rows = [made]
        if name in TOKEN_PLANS and compiled == "no":
            rows.append(_selection_row(row, size, name, plan, made["trimmed_ms"], scale))
        yield rows


def _steps(runner: Runner, count: int) -> None:
    for _ in range(count):
        runner.step()


def _selection_row(row, size: Size, name: str, plan: TrimPlan, forward: float, scale) -> Row:
    """Scores, smoothing and top-k of a step beside its trimmed forward."""
    grid, tokens = size.grid, plan.tokens
    options = {"device": scale.device, "dtype": scale.dtype}
    q = k = torch.randn(1, grid.tokens, size.heads, size.dim // size.heads, **options)
    change = torch.rand(1, grid.tokens, device=scale.device)
    times = 1
    if tokens is not None:
        times = sum(tokens.reselects(i) for i in range(size.blocks - 1))

    def choose() -> None:
        if tokens is None:
            select_tokens(change, grid, grid.tokens, round(SHARE * grid.per_frame))
            return
        received = attention_received(grid, q, k)
        budget = tokens.budget(0.5, grid)
        select_tokens(received, grid, grid.tokens, budget, alpha=tokens.alpha)

    took = times * milliseconds(choose, scale)
    made = row(size, f"{SELECTION}, {name}", [(forward, took)], **scale.named)
    share = f"scores, smoothing and top-k: {took / forward:.2%} of the trimmed forward"
    return made | {"speedup": "", "predicted": "", "efficiency": "", "note": share}
