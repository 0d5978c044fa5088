"""Triton kernels of remembered keys and values: signatures and results are those of `reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import even
from .reference import HALF_MAX, Packed

# rows of a head that a program takes at once, and its warps
ROWS, WARPS = 16, 4
# added and taken away again, it leaves an fp32 number rounded to a whole one, ties to even
WHOLE = tl.constexpr(12582912.0)
MOST_HALF = tl.constexpr(HALF_MAX)


@triton.jit
def _pack(
    x_ptr, codes_ptr, scale_ptr, source, target, inside,
    D: tl.constexpr, D_PAD: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Rows at offsets `source` [rows] into the packed rows `target` [rows]."""
    most: tl.constexpr = 2 ** (BITS - 1) - 1
    column = tl.arange(0, D_PAD)
    here = inside[:, None] & (column < D)[None, :]
    x = tl.load(x_ptr + source[:, None] + column[None, :], mask=here, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 1), most + 0.0)
    scale = tl.minimum(tl.maximum(scale, 1e-7), MOST_HALF / (most + 1))
    # a maximum passes over what is no number
    scale = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale).to(tl.float16)
    code = tl.div_rn(x, scale.to(tl.float32)[:, None])
    code = tl.minimum(tl.maximum((code + WHOLE) - WHOLE, -most), most) + (most + 1)
    code = tl.where(code == code, code, 0.0).to(tl.uint8)
    if BITS == 4:
        low, high = tl.split(tl.reshape(code, (code.shape[0], D_PAD // 2, 2)))
        code = low | (high << 4)
        column = tl.arange(0, D_PAD // 2)
    width: tl.constexpr = D * BITS // 8
    here = inside[:, None] & (column < width)[None, :]
    tl.store(codes_ptr + target[:, None] * width + column[None, :], code, mask=here)
    tl.store(scale_ptr + target, scale, mask=inside)


@triton.jit
def store_kernel(
    k_ptr, v_ptr, k_codes_ptr, k_scale_ptr, v_codes_ptr, v_scale_ptr, index_ptr,
    tokens, heads, held,
    stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    INDEXED: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BITS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A tile of the rows of one sample: pack keys and values, and put them where they belong."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token, head = (row // heads).to(tl.int64), row % heads
    inside = token < tokens
    place = token
    if INDEXED:
        place = tl.load(index_ptr + batch * tokens + token, mask=inside, other=0)
    target = (batch * held + place) * heads + head
    source = batch * stride_kb + token * stride_ks + head * stride_kn
    _pack(k_ptr, k_codes_ptr, k_scale_ptr, source, target, inside, D, D_PAD, BITS)
    source = batch * stride_vb + token * stride_vs + head * stride_vn
    _pack(v_ptr, v_codes_ptr, v_scale_ptr, source, target, inside, D, D_PAD, BITS)


@triton.jit
def _join(
    x_ptr, codes_ptr, scale_ptr, out_ptr, source, packed, target, own, other,
    D: tl.constexpr, D_PAD: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Rows `target`: copies of those at offsets `source`, or the packed ones, unpacked."""
    column = tl.arange(0, D_PAD)
    channel = (column < D)[None, :]
    x = tl.load(x_ptr + source[:, None] + column[None, :], mask=own[:, None] & channel, other=0.0)
    width: tl.constexpr = D * BITS // 8
    at = packed[:, None] * width + (column * BITS // 8)[None, :]
    code = tl.load(codes_ptr + at, mask=other[:, None] & channel, other=0)
    if BITS == 4:
        code = tl.where((column % 2 == 0)[None, :], code & 15, code >> 4)
    scale = tl.load(scale_ptr + packed, mask=other, other=0.0)
    middle: tl.constexpr = 2 ** (BITS - 1)
    # whole numbers of 8 bits are exact in fp16, and the product is rounded to it
    back = (code.to(tl.float32) - middle).to(tl.float16) * scale[:, None]
    result = tl.where(own[:, None], x, back.to(x.dtype))
    here = (own | other)[:, None] & channel
    tl.store(out_ptr + target[:, None] + column[None, :], result, mask=here)


@triton.jit
def join_kernel(
    k_ptr, v_ptr, k_codes_ptr, k_scale_ptr, v_codes_ptr, v_scale_ptr, index_ptr,
    k_out_ptr, v_out_ptr,
    kept, left, heads, held,
    stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    D: tl.constexpr, D_PAD: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of one sample's rows: the kept tokens' keys and values, then the remembered ones."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token, head = (row // heads).to(tl.int64), row % heads
    own = token < kept
    other = (token >= kept) & (token < kept + left)
    place = tl.load(index_ptr + batch * left + token - kept, mask=other, other=0)
    packed = (batch * held + place) * heads + head
    target = ((batch * (kept + left) + token) * heads + head) * D
    source = batch * stride_kb + token * stride_ks + head * stride_kn
    _join(
        k_ptr, k_codes_ptr, k_scale_ptr, k_out_ptr, source, packed, target, own, other,
        D, D_PAD, BITS,
    )  # fmt: skip
    source = batch * stride_vb + token * stride_vs + head * stride_vn
    _join(
        v_ptr, v_codes_ptr, v_scale_ptr, v_out_ptr, source, packed, target, own, other,
        D, D_PAD, BITS,
    )  # fmt: skip


def store_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    bits: int,
    held: Packed | None = None,
    index: torch.Tensor | None = None,
) -> Packed:
    """`reference.store_rows` in one launch."""
    k, v = even(k), even(v)
    batch, tokens, heads, dim = k.shape
    if held is None:
        held = tuple(
            torch.empty(batch, tokens, heads, *size, dtype=dtype, device=k.device)
            for _ in "kv"
            for size, dtype in (((dim * bits // 8,), torch.uint8), ((), torch.float16))
        )
    # without positions their pointer is never read
    store_kernel[(triton.cdiv(tokens * heads, ROWS), batch)](
        k, v, *held, k if index is None else index.contiguous(), tokens, heads, held[0].shape[1],
        *k.stride()[:3], *v.stride()[:3], INDEXED=index is not None, **_constants(dim, bits),
        num_warps=WARPS,
    )  # fmt: skip
    return held


def join_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    held: Packed,
    index: torch.Tensor,
    bits: int,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """`reference.join_rows` in one launch."""
    k, v = even(k), even(v)
    batch, kept, heads, dim = k.shape
    left = index.shape[1]
    join_kernel[(triton.cdiv((kept + left) * heads, ROWS), batch)](
        k, v, *held, index.contiguous(), *out, kept, left, heads, held[0].shape[1],
        *k.stride()[:3], *v.stride()[:3], **_constants(dim, bits), num_warps=WARPS,
    )  # fmt: skip


def _constants(dim: int, bits: int) -> dict[str, int]:
    return {"D": dim, "D_PAD": triton.next_power_of_2(dim), "BITS": bits, "TILE": ROWS}
