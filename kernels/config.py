"""Tile sizes of the kernels: one static choice for each architecture, so that nothing is tuned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# compute capabilities with 99 KB of shared memory, without and with registers to spare
SMALL, SMALL_BLACKWELL = (86, 87, 89), (120, 121)
AMD = ("gfx942", "gfx1100")
LEAST_CAPABILITY = 80


@dataclass(frozen=True)
class Config:
    """Sizes of the tiles [queries, keys] of each pass, and how they are run.

    Args:
        precision: of fp32 products, in Triton's words.
        upcast: bf16 and fp16 are multiplied as fp32, which the interpreter needs for bf16.
    """

    lse: tuple[int, int] = (128, 64)
    mass: tuple[int, int] = (64, 128)
    frame: tuple[int, int] = (64, 64)
    warps: int = 8
    stages: int = 2
    precision: str | None = None
    upcast: bool = False


INTERPRETED = Config((32, 32), (32, 32), (32, 32), 1, 1, "ieee", upcast=True)


def even(tensor: torch.Tensor) -> torch.Tensor:
    """As the kernels step over it: batch, tokens and heads with any stride, but not channels."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def config_of(arch: int | str, dtype: torch.dtype) -> Config | None:
    """The tiles for a compute capability such as 90, or for an AMD architecture's name.

    None where every choice that we tried spills registers.
    """
    wide = dtype == torch.float32
    if arch == "gfx1100":
        return None if wide else Config((64, 32), (32, 64), (64, 32), stages=1)
    if arch == "gfx942":
        side = 32 if wide else 64
        return Config((side, side), (side, side), (side, side), stages=1, precision="ieee")
    if wide:
        # exact products are no tensor cores' business, and take registers
        return Config((32, 32), (16, 32), (16, 32), stages=1, precision="ieee")
    if arch in SMALL_BLACKWELL:
        return Config()
    if arch in SMALL:
        return Config(mass=(64, 64))
    return Config(lse=(128, 128), stages=3)
