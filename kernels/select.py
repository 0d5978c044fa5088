"""Triton kernel of smooth_select: signature and results are those of `reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def smooth_select_kernel(
    scores_ptr, index_ptr, inverse_ptr, positions, keep, frames, alpha, rest,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One latent frame of one sample: smooth, find the keep-th largest score, write who stays."""
    frame, batch = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < positions
    row = (batch * frames + frame).to(tl.int64)
    score = tl.load(scores_ptr + row * positions + column, mask=inside, other=0.0)
    if frame > 0:
        before = tl.load(scores_ptr + (row - 1) * positions + column, mask=inside, other=0.0)
        score = alpha * score + rest * before
    # -0 equals 0 for a sort
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    # an unsigned number in the order of the scores; a sort puts NaN above all
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    rank = tl.where(score != score, 0xFFFFFFFF, rank)
    # the largest threshold that at least `keep` reach, bit by bit
    threshold = tl.full((), 0, tl.uint32)
    for bit in range(0, 32):
        higher = threshold | (tl.full((), 1, tl.uint32) << tl.cast(31 - bit, tl.uint32))
        reach = tl.sum(((rank >= higher) & inside).to(tl.int32), 0)
        threshold = tl.where(reach >= keep, higher, threshold)
    above = (rank > threshold) & inside
    level = (rank == threshold) & inside
    room = keep - tl.sum(above.to(tl.int32), 0)
    # ties go to the lowest positions
    stays = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))
    place = tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(index_ptr + row * keep + place, column, mask=stays)
    tl.store(inverse_ptr + row * positions + column, tl.where(stays, place, -1), mask=inside)


def warps_of(positions: int) -> int:
    """Warps for so many positions of a latent frame: more positions a thread spill registers."""
    return 4 if positions <= 1024 else 8 if positions <= 4096 else 16


def smooth_select(
    scores: torch.Tensor, keep: int, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.smooth_select` in one launch."""
    scores = scores.contiguous()
    batch, frames, positions = scores.shape
    index = torch.empty(batch, frames, keep, dtype=torch.int64, device=scores.device)
    inverse = torch.empty(batch, frames, positions, dtype=torch.int64, device=scores.device)
    smooth_select_kernel[(frames, batch)](
        scores, index, inverse, positions, keep, frames, alpha, 1 - alpha,
        BLOCK=triton.next_power_of_2(positions), num_warps=warps_of(positions),
        # a fused multiply-add rounds once where torch rounds twice
        enable_fp_fusion=False,
    )  # fmt: skip
    return index, inverse
