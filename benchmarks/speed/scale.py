"""Where the GPU's bench runs and how large it is, and its clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...solve.floor import Rates
from .plans import Size

# 81 pixel frames at 832 x 480 and 1280 x 720
LATENTS = {"480p": (21, 60, 104), "720p": (21, 90, 160)}
MODELS = {"1.3B": (1536, 12, 8960, 30), "14B": (5120, 40, 13824, 40)}
# blocks are alike: so many of them show what a block costs, and every plan needs four
BLOCKS = 8


@dataclass(frozen=True)
class Scale:
    """Where the bench runs and how large it is; a dry run goes the same way on the CPU."""

    device: str
    dtype: torch.dtype
    models: dict[str, tuple[int, int, int, int]]
    latents: dict[str, tuple[int, int, int]]
    blocks: int
    rounds: int
    # of torch.compile, and of our kernels
    compiled: str
    backend: str

    def size(self, model: str, resolution: str) -> Size:
        """A model with as many of its blocks as are timed."""
        dim, heads, ffn_dim, blocks = self.models[model]
        name = f"{model}, {resolution}, {self.blocks} of {blocks} blocks"
        return Size(name, dim, heads, ffn_dim, self.blocks, self.latents[resolution])

    @property
    def named(self) -> dict[str, str]:
        """The columns that say where a row was measured."""
        name = "cpu" if self.device == "cpu" else torch.cuda.get_device_name()
        return {"device": name, "dtype": str(self.dtype).removeprefix("torch.")}


GPU = Scale("cuda", torch.bfloat16, MODELS, LATENTS, BLOCKS, 3, "inductor", "triton")
DRY = Scale(
    "cpu",
    torch.float32,
    {"1.3B": (48, 4, 64, 30), "14B": (96, 8, 128, 40)},
    {"480p": (3, 8, 8), "720p": (3, 12, 12)},
    4,
    1,
    "eager",
    "torch",
)


def measured_rates(size: Size, scale: Scale = GPU) -> Rates:
    """What this device reaches at the size's own products, attention and copies."""
    options = {"device": scale.device, "dtype": scale.dtype}
    tokens, dim, head_dim = size.grid.tokens, size.dim, size.dim // size.heads
    hidden = torch.randn(tokens, dim, **options)
    weight = torch.randn(size.ffn_dim, dim, **options)
    q = torch.randn(1, size.heads, tokens, head_dim, **options)
    attend = torch.nn.functional.scaled_dot_product_attention
    product = milliseconds(lambda: torch.nn.functional.linear(hidden, weight), scale) / 1000
    attention = milliseconds(lambda: attend(q, q, q), scale) / 1000
    copy = milliseconds(hidden.clone, scale) / 1000
    return Rates(
        2 * tokens * dim * size.ffn_dim / product,
        4 * tokens**2 * dim / attention,
        2 * hidden.numel() * 2 / copy,
    )


def milliseconds(work: Callable[[], object], scale: Scale = GPU, repeats: int = 7) -> float:
    """Median time, on a GPU by its own clock."""
    for _ in range(2):
        work()
    taken = []
    for _ in range(repeats):
        if scale.device == "cpu":
            began = time.perf_counter()
            work()
            taken.append(1000 * (time.perf_counter() - began))
            continue
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        taken.append(began.elapsed_time(ended))
    return sorted(taken)[repeats // 2]
