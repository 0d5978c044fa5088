"""The speed bench on a GPU: kernels beside torch, and Wan's real sizes with random weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .. import kernels
from ..engine.plan import TrimPlan
from ..kernels import reference
from ..methods.cost import Work
from ..methods.importance import attention_received, sample_queries
from ..methods.tokens import select_tokens
from ..solve.dial import flops
from ..solve.floor import Rates, device_rates
from .speed_comfyui import time_in_comfyui
from .speed_models import Runner, build
from .speed_plans import PAPER, PARTIAL, SHARE, WHOLE, Size, plans, ratio, steady_work
from .speed_probes import take_turns
from .traffic import peak_bytes

log = logging.getLogger(__name__)
Row = dict[str, object]
COMMAND = "python -m wantrim.benchmarks.speed --gpu"
# 81 pixel frames at 832 x 480 and 1280 x 720
LATENTS = {"480p": (21, 60, 104), "720p": (21, 90, 160)}
MODELS = {"1.3B": (1536, 12, 8960, 30), "14B": (5120, 40, 13824, 40)}
# blocks are left out where the weights do not fit; these are enough for every plan
FEWEST = 4
# bytes that a forward needs beside the weights, in hidden states of 2 bytes a number
ROOM = 40
KERNELS = ("token_mass", "frame_mass", "smooth_select")
SELECTION = "choosing tokens"
TOKEN_PLANS = (PARTIAL, PAPER)
KERNEL_PLAN = "kernel against the reference"


def real_sizes() -> list[Size]:
    """1.3B and 14B at 480p and 720p, all blocks."""
    return [
        Size(f"{model}, {resolution}", *MODELS[model], latent)
        for model in MODELS
        for resolution, latent in LATENTS.items()
    ]


def ask_for_gpu() -> None:
    """Refuse to go on without a GPU.

    Raises:
        SystemExit: there is none that torch can use.
    """
    if not torch.cuda.is_available():
        raise SystemExit("--gpu: expected a GPU that torch can use, found none; leave --gpu out")


def gpu_rows(row: Callable[..., Row], comfyui: Path | None = None) -> Iterator[list[Row]]:
    """Rows of the kernels and of every real size, as they come.

    Args:
        row: makes one from a size, a plan's name and milliseconds.
        comfyui: a checkout, to time the sizes in it too.
    """
    for case in kernel_cases():
        yield [_kernel_row(row, case)]
    for size in real_sizes():
        fitting = _fitting(size)
        yield _time_size(row, fitting)
        torch.cuda.empty_cache()
        if comfyui is not None:
            yield comfyui_rows(row, fitting, comfyui, measured_rates(fitting))


def comfyui_rows(
    row: Callable[..., Row], size: Size, comfyui: Path, rates: Rates | None, **options
) -> list[Row]:
    """Whole steps of ComfyUI's own sampling, dense and trimmed in turns.

    Args:
        rates: of the device; None counts every FLOP as any other.
        options: of `time_in_comfyui`.
    """
    with TemporaryDirectory() as folder:
        found = time_in_comfyui(comfyui, size, 3, Path(folder), **options)
    whole, rows = steady_work(size, TrimPlan()), []
    for name, taken in found["taken"].items():
        cost = flops if rates is None else rates.seconds
        predicted = ratio(cost, whole, steady_work(size, plans(size)[name]))
        common = {"host": "comfyui", "device": found["device"], "dtype": found["dtype"]}
        rows.append(row(size, name, taken, predicted=predicted, **common))
    return rows


def rows_to_fill() -> Iterator[Row]:
    """Rows that need a GPU, with the command that measures them."""
    blank = {"device": "GPU", "dtype": "bfloat16", "compiled": "no"}
    note = f"not measured: {COMMAND}"
    for size in real_sizes():
        chooses = [f"{SELECTION}, {name}" for name in TOKEN_PLANS]
        for host, names in (("diffusers", [*plans(size), *chooses]), ("comfyui", plans(size))):
            more = " --comfyui FOLDER" if host == "comfyui" else ""
            for plan in names:
                yield blank | {
                    "case": size.name, "host": host, "tokens": size.grid.tokens, "plan": plan,
                    "note": note + more,
                }  # fmt: skip
    for name in KERNELS:
        for resolution in LATENTS:
            size = Size(f"14B, {resolution}", *MODELS["14B"], LATENTS[resolution])
            yield blank | {
                "case": f"kernel {name}", "host": "torch", "tokens": size.grid.tokens,
                "plan": KERNEL_PLAN, "note": note,
            }  # fmt: skip


def _fitting(size: Size) -> Size:
    """The size with as many of its blocks as the GPU's memory holds."""
    free, _ = torch.cuda.mem_get_info()
    # weights of 2 bytes: q, k, v, o twice, and the FFN
    block = 2 * (8 * size.dim**2 + 2 * size.dim * size.ffn_dim)
    room = free - 2 * ROOM * size.grid.tokens * size.dim
    blocks = int(max(FEWEST, min(size.blocks, room // block)))
    name = size.name if blocks == size.blocks else f"{size.name}, {blocks} of {size.blocks} blocks"
    return replace(size, name=name, blocks=blocks)


def measured_rates(size: Size) -> Rates:
    """What this GPU reaches at the size's own products, attention and copies, in bfloat16."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    tokens, dim, head_dim = size.grid.tokens, size.dim, size.dim // size.heads
    hidden = torch.randn(tokens, dim, **options)
    weight = torch.randn(size.ffn_dim, dim, **options)
    q = torch.randn(1, size.heads, tokens, head_dim, **options)
    attend = torch.nn.functional.scaled_dot_product_attention
    product = milliseconds(lambda: torch.nn.functional.linear(hidden, weight)) / 1000
    attention = milliseconds(lambda: attend(q, q, q)) / 1000
    copy = milliseconds(hidden.clone) / 1000
    return Rates(
        2 * tokens * dim * size.ffn_dim / product,
        4 * tokens**2 * dim / attention,
        2 * hidden.numel() * 2 / copy,
        "measured in this run",
    )


def milliseconds(work: Callable[[], object], repeats: int = 7) -> float:
    """Median time on the GPU's own clock."""
    for _ in range(2):
        work()
    taken = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        taken.append(began.elapsed_time(ended))
    return sorted(taken)[repeats // 2]


def _time_size(row: Callable[..., Row], size: Size, rounds: int = 3) -> list[Row]:
    rates = measured_rates(size)
    log.info("%s: %s", size.name, rates)
    model = build(size, "cuda", torch.bfloat16)
    whole, state = steady_work(size, TrimPlan()), 2 * size.grid.tokens * size.dim
    dense = Runner(model, size)
    dense_peak = peak_bytes(dense.step)
    common = {"device": torch.cuda.get_device_name(), "dtype": "bfloat16"}
    rows = []
    # one plan at a time, since each holds what it remembers
    for name, plan in plans(size).items():
        other = Runner(model, size, plan)
        peak = peak_bytes(lambda other=other: [other.step() for _ in range(WHOLE + 1)])
        taken = take_turns(dense, {name: other}, rounds)[name]
        other.close()
        predicted = ratio(rates.seconds, whole, steady_work(size, plan))
        floor = 1000 * rates.seconds(steady_work(size, plan))
        note = f"floor {floor:.0f} ms at the rates measured in this run"
        more = {"peak_mb": peak / 2**20, "extra_states": (peak - dense_peak) / state}
        rows.append(row(size, name, taken, predicted=predicted, note=note, **more, **common))
        if name in TOKEN_PLANS:
            rows.append(_selection_row(row, size, name, plan, rows[-1]["trimmed_ms"], common))
    return rows


def _selection_row(row, size: Size, name: str, plan: TrimPlan, forward: float, common) -> Row:
    """Scores, smoothing and top-k of a step beside its trimmed forward."""
    grid, tokens = size.grid, plan.tokens
    options = {"device": "cuda", "dtype": torch.bfloat16}
    q = k = torch.randn(1, grid.tokens, size.heads, size.dim // size.heads, **options)
    change = torch.rand(1, grid.tokens, device="cuda")
    times = 1
    if tokens is not None:
        times = sum(tokens.reselects(i) for i in range(size.blocks - 1))

    def choose() -> None:
        if tokens is None:
            select_tokens(change, grid, grid.tokens, round(SHARE * grid.per_frame))
            return
        received = attention_received(grid, q, k, tokens.query_ratio)
        budget = tokens.budget(0.5, grid)
        select_tokens(received, grid, grid.tokens, budget, alpha=tokens.alpha)

    took = times * milliseconds(choose)
    made = row(size, f"{SELECTION}, {name}", [(forward, took)], **common)
    share = f"scores, smoothing and top-k: {took / forward:.2%} of the trimmed forward"
    return made | {"speedup": "", "predicted": "", "efficiency": "", "note": share}


@dataclass(frozen=True)
class KernelCase:
    """A kernel's call at a size of 14B's, and the least that it has to do."""

    name: str
    size: Size
    arguments: tuple
    options: dict[str, object]
    work: Work

    def call(self, module, **more) -> object:
        """The function of this name in `module`, which is `kernels` or its reference."""
        return getattr(module, self.name)(*self.arguments, **self.options, **more)


def kernel_cases(
    device: str = "cuda", latents: Sequence[tuple[int, int, int]] = tuple(LATENTS.values())
) -> Iterator[KernelCase]:
    """A call of every kernel that has a reference, one after the other."""
    dim, heads, ffn_dim, blocks = MODELS["14B"]

    def draw(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for latent in latents:
        size = Size("14B", dim, heads, ffn_dim, blocks, latent)
        grid = size.grid
        index = sample_queries(grid, 1 / 64).to(device)
        mass = (
            draw(1, grid.tokens, heads, dim // heads),
            draw(1, grid.tokens, heads, dim // heads),
        )
        mass = (*mass, (grid.frames, grid.height, grid.width), index)
        # the scores once for the softmax's sum and once for what each key gets
        twice = Work(0, 4 * len(index) * grid.tokens * dim, 2 * grid.tokens * dim)
        scores = draw(1, grid.frames, grid.per_frame, dtype=torch.float32)
        chosen = (scores, round(0.7 * grid.per_frame), 0.5)
        # fp32 in numbers of 2 bytes: scores in and int64 positions out
        choosing = Work(0, 0, 2 * grid.tokens + 4 * round(0.7 * grid.tokens))
        for name, arguments, options, work in (
            ("token_mass", mass, {"exclude_radius": 2}, twice),
            ("frame_mass", mass, {}, twice),
            ("smooth_select", chosen, {}, choosing),
        ):
            yield KernelCase(name, replace(size, name=f"kernel {name}"), arguments, options, work)


def _kernel_row(row: Callable[..., Row], case: KernelCase) -> Row:
    """Eager torch beside the kernel; the note has the floor."""
    rates = device_rates(torch.cuda.get_device_name()) or measured_rates(case.size)
    common = {"device": torch.cuda.get_device_name(), "dtype": "bfloat16", "host": "torch"}
    eager = milliseconds(lambda: case.call(reference))
    took = milliseconds(lambda: case.call(kernels, backend="triton"))
    floor = 1000 * rates.seconds(case.work)
    note = f"floor {floor:.3f} ms, {floor / took:.0%} of it reached"
    made = row(case.size, KERNEL_PLAN, [(eager, took)], note=note, **common)
    return made | {"predicted": "", "efficiency": ""}
