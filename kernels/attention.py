"""Triton kernels that read attention without storing it: token_mass and frame_mass.

Signatures and results are those of `reference`. Softmax arithmetic is fp32 in base 2. No program
writes what another reads and nothing is added atomically, so results are the same in every run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .config import Config, even
from .reference import mean_counts

LOG2E = math.log2(math.e)


@triton.jit
def lse_kernel(
    q_ptr, k_ptr, index_ptr, lse_ptr, num_keys, num_queries, heads,
    stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 of the softmax denominator of each sampled query over all keys, [b, n, m]."""
    head, batch = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < num_queries
    channel = tl.arange(0, D_PAD)
    in_head = channel < D
    token = tl.load(index_ptr + rows, mask=in_rows, other=0).to(tl.int64)
    q_base = q_ptr + batch.to(tl.int64) * stride_qb + head * stride_qn
    q = tl.load(
        q_base + token[:, None] * stride_qs + channel[None, :],
        mask=in_rows[:, None] & in_head[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    k_base = k_ptr + batch.to(tl.int64) * stride_kb + head * stride_kn
    column = tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, num_keys, BLOCK_N):
        in_keys = column < num_keys - first
        # [d, keys]
        k = tl.load(
            k_base + tl.cast(first, tl.int64) * stride_ks + column[None, :] * stride_ks
            + channel[:, None],
            mask=in_keys[None, :] & in_head[:, None],
            other=0.0,
        )  # fmt: skip
        if UPCAST:
            k = k.to(tl.float32)
        score = tl.dot(q, k, input_precision=PRECISION) * scale
        score = tl.where(in_keys[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(score - higher[:, None]), 1)
        top = higher
    row = (batch * heads + head).to(tl.int64) * num_queries
    tl.store(lse_ptr + row + rows, top + tl.log2(total), mask=in_rows)


@triton.jit
def mass_kernel(
    q_ptr, k_ptr, index_ptr, place_ptr, lse_ptr, out_ptr,
    tokens, start, num_queries, heads, groups, per_frame, width, radius,
    stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    HEADS: tl.constexpr, EXCLUDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention that BLOCK_N grid keys receive from all sampled queries in HEADS heads, summed.

    EXCLUDE leaves out pairs within `radius` rows and columns of each other in any latent frame.
    """
    group, batch = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < tokens
    channel = tl.arange(0, D_PAD)
    in_head = channel < D
    column = tl.arange(0, BLOCK_M)
    received = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if EXCLUDE:
        key_y = (rows % per_frame) // width + radius
        key_x = (rows % per_frame) % width + radius
        reach = tl.cast(radius, tl.uint32) * 2
    for one in range(0, HEADS):
        head = group * HEADS + one
        k_base = k_ptr + batch.to(tl.int64) * stride_kb + head * stride_kn
        # [keys, d]
        k = tl.load(
            k_base + (start + rows[:, None]).to(tl.int64) * stride_ks + channel[None, :],
            mask=in_rows[:, None] & in_head[None, :],
            other=0.0,
        )
        if UPCAST:
            k = k.to(tl.float32)
        q_base = q_ptr + batch.to(tl.int64) * stride_qb + head * stride_qn
        lse_base = lse_ptr + (batch * heads + head).to(tl.int64) * num_queries
        for first in range(0, num_queries, BLOCK_M):
            query = first + column
            in_queries = query < num_queries
            token = tl.load(index_ptr + query, mask=in_queries, other=0).to(tl.int64)
            # [d, queries]
            q = tl.load(
                q_base + token[None, :] * stride_qs + channel[:, None],
                mask=in_queries[None, :] & in_head[:, None],
                other=0.0,
            )
            if UPCAST:
                q = q.to(tl.float32)
            lse = tl.load(lse_base + query, mask=in_queries, other=float("inf"))
            mass = tl.exp2(tl.dot(k, q, input_precision=PRECISION) * scale - lse[None, :])
            if EXCLUDE:
                # y << 16 | x; |dy| <= radius as one unsigned comparison
                place = tl.load(place_ptr + query, mask=in_queries, other=0)
                dy = (key_y[:, None] - (place >> 16)[None, :]).to(tl.uint32, bitcast=True)
                dx = (key_x[:, None] - (place & 0xFFFF)[None, :]).to(tl.uint32, bitcast=True)
                mass = tl.where((dy <= reach) & (dx <= reach), 0.0, mass)
            received += mass
    out_base = out_ptr + (batch * groups + group).to(tl.int64) * tokens
    tl.store(out_base + rows, tl.sum(received, 1), mask=in_rows)


@triton.jit
def frame_mass_kernel(
    q_ptr, k_ptr, index_ptr, out_ptr, num_keys, num_queries, heads, start, per_frame,
    stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Share of each sampled query's attention on keys of its own latent frame, [b, n, m].

    One pass: the share is rescaled with the softmax's running maximum.
    """
    head, batch = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < num_queries
    channel = tl.arange(0, D_PAD)
    in_head = channel < D
    token = tl.load(index_ptr + rows, mask=in_rows, other=start).to(tl.int64)
    q_base = q_ptr + batch.to(tl.int64) * stride_qb + head * stride_qn
    q = tl.load(
        q_base + token[:, None] * stride_qs + channel[None, :],
        mask=in_rows[:, None] & in_head[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    k_base = k_ptr + batch.to(tl.int64) * stride_kb + head * stride_kn
    column = tl.arange(0, BLOCK_N)
    # where each query's latent frame begins in the sequence
    own = start + (token.to(tl.int32) - start) // per_frame * per_frame
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    kept = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, num_keys, BLOCK_N):
        in_keys = column < num_keys - first
        k = tl.load(
            k_base + tl.cast(first, tl.int64) * stride_ks + column[None, :] * stride_ks
            + channel[:, None],
            mask=in_keys[None, :] & in_head[:, None],
            other=0.0,
        )  # fmt: skip
        if UPCAST:
            k = k.to(tl.float32)
        score = tl.dot(q, k, input_precision=PRECISION) * scale
        score = tl.where(in_keys[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        mass = tl.exp2(score - higher[:, None])
        rescale = tl.exp2(top - higher)
        total = total * rescale + tl.sum(mass, 1)
        place = first + column[None, :] - own[:, None]
        kept = kept * rescale + tl.sum(tl.where((place >= 0) & (place < per_frame), mass, 0.0), 1)
        top = higher
    row = (batch * heads + head).to(tl.int64) * num_queries
    tl.store(out_ptr + row + rows, kept / total, mask=in_rows)


def token_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: tuple[int, int, int],
    query_index: torch.Tensor,
    *,
    start: int = 0,
    exclude_radius: int = 0,
    config: Config,
) -> torch.Tensor:
    """`reference.token_mass`, in two passes over tiles."""
    frames, height, width = grid
    tokens = frames * height * width
    q, k = even(q), even(k)
    batch, keys, heads, head_dim = k.shape
    index = (query_index + start).int()
    count = len(index)
    place = query_index % (height * width)
    place = ((place // width << 16) | place % width).int()
    shape = _shape(head_dim, config)
    strides = (*q.stride()[:3], *k.stride()[:3], head_dim**-0.5 * LOG2E)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    lse = torch.empty(batch, heads, count, device=q.device)
    lse_kernel[(triton.cdiv(count, config.lse[0]), heads, batch)](
        q, k, index, lse, keys, count, heads, *strides,
        BLOCK_M=config.lse[0], BLOCK_N=config.lse[1], **shape, **options,
    )  # fmt: skip
    # few programs would leave a GPU idle, many would read the queries too often
    groups = max(g for g in range(1, min(heads, 8) + 1) if heads % g == 0)
    out = torch.empty(batch, groups, tokens, device=q.device)
    mass_kernel[(triton.cdiv(tokens, config.mass[1]), groups, batch)](
        q, k, index, place, lse, out,
        tokens, start, count, heads, groups, height * width, width, exclude_radius, *strides,
        BLOCK_M=config.mass[0], BLOCK_N=config.mass[1], HEADS=heads // groups,
        EXCLUDE=exclude_radius > 0, **shape, **options,
    )  # fmt: skip
    return out.sum(1) / (mean_counts(grid, query_index, exclude_radius) * heads).clamp(min=1)


def frame_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: tuple[int, int, int],
    query_index: torch.Tensor,
    *,
    start: int = 0,
    config: Config,
) -> torch.Tensor:
    """`reference.frame_mass`, in one pass over the keys."""
    q, k = even(q), even(k)
    batch, keys, heads, head_dim = k.shape
    index = (query_index + start).int()
    count = len(index)
    out = torch.empty(batch, heads, count, device=q.device)
    frame_mass_kernel[(triton.cdiv(count, config.frame[0]), heads, batch)](
        q, k, index, out, keys, count, heads, start, grid[1] * grid[2],
        *q.stride()[:3], *k.stride()[:3], head_dim**-0.5 * LOG2E,
        BLOCK_M=config.frame[0], BLOCK_N=config.frame[1], **_shape(head_dim, config),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out.mean(2)


def _shape(head_dim: int, config: Config) -> dict[str, object]:
    """Constants that every kernel here takes."""
    return {
        "D": head_dim,
        "D_PAD": max(16, triton.next_power_of_2(head_dim)),
        "UPCAST": config.upcast,
        "PRECISION": config.precision,
    }
