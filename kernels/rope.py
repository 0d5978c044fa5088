"""Triton kernel of rms_rope: signature and results are those of `reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def rms_rope_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr,
    rotary_ptr, position_ptr, kept_ptr, tokens, heads, kept, eps,
    stride_qb, stride_qs, stride_kb, stride_ks,
    HAS_POSITION: tl.constexpr, HAS_KEPT: tl.constexpr, HEADS_PAD: tl.constexpr,
    KEPT_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """One token of one sample, of q or of k: the norm over all heads, then the kept ones turned."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    if tl.program_id(1) == 0:
        x_ptr, weight_ptr, out_ptr = q_ptr, q_weight_ptr, q_out_ptr
        stride_b, stride_s = tl.cast(stride_qb, tl.int64), tl.cast(stride_qs, tl.int64)
    else:
        x_ptr, weight_ptr, out_ptr = k_ptr, k_weight_ptr, k_out_ptr
        stride_b, stride_s = tl.cast(stride_kb, tl.int64), tl.cast(stride_ks, tl.int64)
    row = x_ptr + batch * stride_b + token * stride_s
    head = tl.arange(0, HEADS_PAD)
    pair = tl.arange(0, HALF_PAD)
    channel = tl.arange(0, 2 * HALF_PAD)
    inside = (head < heads)[:, None] & (channel < 2 * HALF)[None, :]
    offset = head[:, None] * (2 * HALF) + channel[None, :]
    x = tl.load(row + offset, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(x * x, 1), 0) / (heads * 2 * HALF)
    if HAS_KEPT:
        out_head = tl.arange(0, KEPT_PAD)
        source = tl.load(kept_ptr + out_head, mask=out_head < kept, other=0).to(tl.int32)
        inside = (out_head < kept)[:, None] & (channel < 2 * HALF)[None, :]
        offset = source[:, None] * (2 * HALF) + channel[None, :]
        # read a moment ago: a cache has it
        x = tl.load(row + offset, mask=inside, other=0.0).to(tl.float32)
    else:
        out_head = head
    weight = tl.load(weight_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(mean + eps) * weight
    place = token
    if HAS_POSITION:
        place = tl.load(position_ptr + batch * tokens + token).to(tl.int64)
    # a 2 x 2 rotation for each pair of channels
    turn = rotary_ptr + place * (4 * HALF) + pair * 4
    real = pair < HALF
    a = tl.load(turn, mask=real, other=0.0)[None, :]
    b = tl.load(turn + 1, mask=real, other=0.0)[None, :]
    c = tl.load(turn + 2, mask=real, other=0.0)[None, :]
    d = tl.load(turn + 3, mask=real, other=0.0)[None, :]
    even, odd = tl.split(tl.reshape(x, (KEPT_PAD, HALF_PAD, 2)))
    turned = tl.join(a * even + b * odd, c * even + d * odd)
    turned = tl.reshape(turned, (KEPT_PAD, 2 * HALF_PAD))
    out = out_ptr + (batch * tokens + token) * kept * (2 * HALF)
    place = out_head[:, None] * (2 * HALF) + channel[None, :]
    tl.store(out + place, turned.to(out_ptr.dtype.element_ty), mask=inside)


def rms_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rotary: torch.Tensor,
    heads: int,
    *,
    position: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.rms_rope` in one launch for q and k."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, tokens, dim = q.shape
    head_dim = dim // heads
    count = heads if kept is None else len(kept)
    q_out = q.new_empty(batch, tokens, count, head_dim)
    k_out = k.new_empty(batch, tokens, count, head_dim)
    heads_pad = triton.next_power_of_2(heads)
    rms_rope_kernel[(tokens, 2, batch)](
        q, k, q_weight.contiguous(), k_weight.contiguous(), q_out, k_out, rotary.contiguous(),
        # an argument that is not read still has to be a pointer
        q if position is None else position.contiguous(), q if kept is None else kept.contiguous(),
        tokens, heads, count, eps, *q.stride()[:2], *k.stride()[:2],
        HAS_POSITION=position is not None, HAS_KEPT=kept is not None, HEADS_PAD=heads_pad,
        KEPT_PAD=heads_pad if kept is None else triton.next_power_of_2(count),
        HALF=head_dim // 2, HALF_PAD=triton.next_power_of_2(head_dim // 2),
        num_warps=4 if dim <= 2048 else 8,
    )  # fmt: skip
    return q_out, k_out
