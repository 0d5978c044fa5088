"""What a step costs on the clock, dense and trimmed, in one run: `python -m wantrim.benchmarks.speed`.

Each case is one row of benchmarks/results/speed.csv: the measured speed-up of a model's forward
beside the one that the cost model predicts from FLOPs. Weights and inputs are random.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ..hosts.diffusers.attach import attach
from ..hosts.diffusers.shape import wan_shape
from ..hosts.diffusers.weights import new_transformer
from ..hosts.session import TrimPlan
from ..methods.cost import forward_flops
from ..methods.grid import TokenGrid
from ..methods.heads import FRAME, FULL, OFF, HeadPlan
from .table import RESULTS, commit, merge_rows

log = logging.getLogger(__name__)
COLUMNS = (
    "case", "host", "device", "dtype", "tokens", "plan", "dense_ms", "trimmed_ms", "speedup",
    "predicted", "efficiency", "peak_mb", "compiled", "commit", "torch",
)  # fmt: skip
KEY = ("case", "host", "device", "dtype", "tokens", "plan", "compiled")
TEXT_TOKENS = 512


@dataclass(frozen=True)
class Size:
    """A Wan of few blocks, as wide as a real one, and a video.

    Args:
        latent: (f, h, w).
    """

    name: str
    dim: int
    heads: int
    ffn_dim: int
    blocks: int
    latent: tuple[int, int, int]

    @property
    def grid(self) -> TokenGrid:
        frames, height, width = self.latent
        return TokenGrid(frames, height // 2, width // 2)


# 1.3B wide: 21 latent frames of 16 x 32 tokens, where attention is nearly half of the FLOPs
SIZES = {"1.3B, 1 block": Size("1.3B, 1 block", 1536, 12, 8960, 1, (21, 32, 64))}


def plans(size: Size) -> dict[str, TrimPlan]:
    """What is timed, by its words in the column `plan`."""
    n, blocks = size.heads, size.blocks
    whole = ((FULL,) * n,) * blocks

    def heads(**counts: int) -> TrimPlan:
        names = [name for name, count in counts.items() for _ in range(count)]
        row = (*names, *[FULL] * (n - len(names)))
        return TrimPlan(heads=HeadPlan((row,) * blocks, whole))

    third, half = n // 3, n // 2
    return {
        "neutral": TrimPlan(heads=HeadPlan.full(blocks, n)),
        f"{third} of {n} heads off": heads(**{OFF: third}),
        f"{half} of {n} heads within latent frames": heads(**{FRAME: half}),
        f"{half} of {n} heads within tiles of 2 x 2": heads(tile2=half),
        f"of {n} heads {third} frame, {third} tile3, 1 off": heads(
            **{FRAME: third, "tile3": third, OFF: 1}
        ),
    }


def build(size: Size, device: str, dtype: torch.dtype):
    """The model and its inputs."""
    torch.manual_seed(0)
    model = new_transformer(
        dim=size.dim,
        num_heads=size.heads,
        num_layers=size.blocks,
        ffn_dim=size.ffn_dim,
        in_dim=16,
        out_dim=16,
        text_dim=4096,
    )
    model = model.to(device, dtype).requires_grad_(False)
    latent = torch.randn(1, 16, *size.latent, device=device, dtype=dtype)
    text = torch.randn(1, TEXT_TOKENS, 4096, device=device, dtype=dtype)
    timestep = torch.tensor([500.0], device=device)
    return model, lambda: model(latent, timestep, text, return_dict=False)


@torch.no_grad()
def time_plan(
    model, forward: Callable[[], object], plan: TrimPlan, repeats: int, sync: Callable[[], None]
) -> tuple[float, float]:
    """Median milliseconds of a dense and of a trimmed forward, taken in turns."""
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        for trimmed in (False, True):
            with ExitStack() as stack:
                if trimmed:
                    stack.enter_context(attach(model, plan))
                sync()
                began = time.perf_counter()
                forward()
                sync()
                seconds = time.perf_counter() - began
            taken[trimmed].append(1000 * seconds)
    return statistics.median(taken[False]), statistics.median(taken[True])


def measure(
    size: Size, built: tuple, name: str, plan: TrimPlan, args: argparse.Namespace
) -> dict[str, object]:
    """One row, on what `build` made."""
    model, forward = built
    cuda = args.device.startswith("cuda")
    sync = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    dense, trimmed = time_plan(model, forward, plan, args.repeats, sync)
    shape = wan_shape(model, TEXT_TOKENS)
    full = forward_flops(shape, size.grid.tokens)
    left = forward_flops(shape, size.grid.tokens, grid=size.grid, heads=plan.heads)
    speedup, predicted = dense / trimmed, full / left
    return {
        "case": size.name,
        "host": "diffusers",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": args.dtype,
        "tokens": size.grid.tokens,
        "plan": name,
        "dense_ms": dense,
        "trimmed_ms": trimmed,
        "speedup": speedup,
        "predicted": predicted,
        "efficiency": speedup / predicted,
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20 if cuda else "",
        "compiled": "no",
        "commit": commit(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=1, help="of torch, on the CPU")
    add("--results", type=Path, default=RESULTS, help="folder of speed.csv")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    rows = []
    for size in SIZES.values():
        built = build(size, args.device, getattr(torch, args.dtype))
        with torch.no_grad():
            # to warm up
            built[1]()
        for name, plan in plans(size).items():
            row = measure(size, built, name, plan, args)
            rows.append(row)
            log.info(
                "%s, %s: %.0f ms dense, %.0f ms trimmed, %.2fx of %.2fx",
                size.name, name, row["dense_ms"], row["trimmed_ms"], row["speedup"],
                row["predicted"],
            )  # fmt: skip
            merge_rows(args.results / "speed.csv", rows, COLUMNS, KEY)


if __name__ == "__main__":
    main()
