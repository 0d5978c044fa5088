"""The GPU bench's kernels: ours against their references and their floor, and attention kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch.utils._pytree import tree_leaves

from ... import kernels
from ...kernels import reference
from ...methods.cost import Work
from ...methods.importance import sample_queries
from ...solve.floor import device_rates
from .plans import Size
from .scale import GPU, LATENTS, Scale, measured_rates, milliseconds

Row = dict[str, object]
KERNELS = ("token_mass", "frame_mass", "store_rows", "join_rows")
KERNEL_PLAN, ATTENTION_PLAN = "kernel against the reference", "attention kernel against torch's"


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

    def result(self, module, **more) -> list[torch.Tensor]:
        """What the function gives or fills."""
        made = self.call(module, **more)
        return [t.clone() for t in tree_leaves(self.arguments[-1] if made is None else made)]


def kernel_cases(
    scale: Scale = GPU, latents: Sequence[tuple[int, int, int]] = tuple(LATENTS.values())
) -> Iterator[KernelCase]:
    """A call of every kernel that has a reference, one after the other."""
    dim, heads, ffn_dim, blocks = scale.models["14B"]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=scale.device, dtype=scale.dtype)

    for latent in latents:
        size = Size("14B", dim, heads, ffn_dim, blocks, latent)
        grid = size.grid
        index = sample_queries(grid, 1 / 64).to(scale.device)
        mass = (
            draw(1, grid.tokens, heads, dim // heads),
            draw(1, grid.tokens, heads, dim // heads),
        )
        mass = (*mass, (grid.frames, grid.height, grid.width), index)
        # the scores once for the softmax's sum and once for what each key gets
        twice = Work(0, 4 * len(index) * grid.tokens * dim, 2 * grid.tokens * dim)
        k, v = mass[:2]
        held = reference.store_rows(k, v, 8)
        left = grid.tokens - round(0.3 * grid.tokens)
        dropped = torch.randperm(grid.tokens, device=scale.device)[None, :left].sort().values
        short = (k[:, left:].contiguous(), v[:, left:].contiguous())
        out = (torch.empty_like(k), torch.empty_like(v))
        # in numbers of 2 bytes: 8 bits beside what they were made of
        stored = Work(0, 0, 3 * grid.tokens * dim)
        joined = Work(0, 0, 2 * (2 * grid.tokens * dim) - left * dim)
        for name, arguments, options, work in (
            ("store_rows", (k, v, 8), {}, stored),
            ("join_rows", (*short, held, dropped, 8, out), {}, joined),
            ("token_mass", mass, {"exclude_radius": 2}, twice),
            ("frame_mass", mass, {}, twice),
        ):
            yield KernelCase(name, replace(size, name=f"kernel {name}"), arguments, options, work)


def kernel_rows(row: Callable[..., Row], scale: Scale, latents) -> Iterator[list[Row]]:
    """Right before fast: what differs from its reference is not timed, and has a row that says so."""
    rates = scale.device == "cuda" and device_rates(torch.cuda.get_device_name())
    for case in kernel_cases(scale, latents):
        # the scores' own rounding in half precision; a choice may differ where two are equal
        want, got = case.result(reference), case.result(kernels, backend=scale.backend)
        wrong = next(filter(None, map(differs, got, want)), "")
        common = {**scale.named, "host": "torch"}
        if wrong:
            blank = row(case.size, KERNEL_PLAN, [(1.0, 1.0)], note=f"not timed: {wrong}", **common)
            yield [{**blank, **dict.fromkeys(("dense_ms", "trimmed_ms", "speedup"), "")}]
            continue
        eager = milliseconds(lambda case=case: case.call(reference), scale)
        took = milliseconds(lambda case=case: case.call(kernels, backend=scale.backend), scale)
        floor = 1000 * (rates or measured_rates(case.size, scale)).seconds(case.work)
        note = f"floor {floor:.3f} ms, {floor / took:.0%} of it reached"
        made = row(case.size, KERNEL_PLAN, [(eager, took)], note=note, **common)
        yield [made | {"predicted": "", "efficiency": ""}]


def differs(got: torch.Tensor, want: torch.Tensor) -> str:
    """How a kernel's result is not the reference's; empty where it is, within rounding."""
    if got.shape != want.shape:
        return f"{tuple(got.shape)} in place of {tuple(want.shape)}"
    off = ((got.float() - want.float()).norm() / want.float().norm()).item()
    # also false for what is no number
    return "" if off < 0.01 else f"{off:.2%} off the reference"


def attention_rows(row: Callable[..., Row], scale: Scale) -> Iterator[list[Row]]:
    """Attention kernels that are installed, beside torch's own at one block's size."""
    size = scale.size("14B", "480p")
    options = {"device": scale.device, "dtype": scale.dtype}
    q = torch.randn(1, size.heads, size.grid.tokens, size.dim // size.heads, **options)
    torchs = partial(torch.nn.functional.scaled_dot_product_attention, q, q, q)
    mine = milliseconds(torchs, scale)
    for name, call in installed_attention().items():
        took = milliseconds(lambda call=call: call(q), scale)
        shown = replace(size, name=f"attention {name}")
        more = {**scale.named, "host": "torch"}
        made = row(shown, ATTENTION_PLAN, [(mine, took)], **more)
        yield [made | {"predicted": "", "efficiency": ""}]


def installed_attention() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Self-attention of [b, n, s, d] by the name of what is installed."""
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    if find_spec("sageattention") is not None:
        sage = import_module("sageattention").sageattn
        found["sage"] = lambda q: sage(q, q, q, tensor_layout="HND")
    if find_spec("flash_attn") is not None:
        flash = import_module("flash_attn").flash_attn_func
        found["flash"] = lambda q: flash(*[q.transpose(1, 2)] * 3)
    return found
