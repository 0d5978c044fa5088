"""What a token gets in the blocks that left it out.

TAPE (arXiv 2605.17837) gives it nothing: it keeps its hidden state. The others here stand in for
the update that the block would have made, from the kept tokens of the same latent frame or from
what the token got in the step before.
"""

from __future__ import annotations

import torch

from .grid import TokenGrid

# by block, from the kept tokens; from the step before, over a stretch of blocks
FROM_KEPT = ("frame_mean", "nearest")
FROM_LAST_STEP = ("last_update", "last_output")
RESTORE = ("identity", *FROM_KEPT, *FROM_LAST_STEP)


def frame_weights(kept: torch.Tensor, grid: TokenGrid, dtype: torch.dtype) -> torch.Tensor:
    """Matrix [b, f, kept] that takes the mean of the kept tokens of every latent frame.

    A matrix product and not a scatter, for the same bytes every time on a GPU; weights and not a
    sum that is divided later, which would overflow in fp16.
    """
    number = torch.arange(grid.frames, device=kept.device)[:, None]
    # tokens outside the grid belong to no latent frame
    own = (frame_of(kept, grid)[:, None, :] == number).float()
    return (own / own.sum(-1, keepdim=True).clamp(min=1)).to(dtype)


def frame_of(index: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Latent frame int64 of positions [b, n]; outside 0..f for tokens outside the grid."""
    return torch.div(index - grid.start, grid.per_frame, rounding_mode="floor")


def nearest_kept(kept: torch.Tensor, dropped: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """For each dropped token the place in `kept` of its nearest kept token in its latent frame.

    Args:
        kept, dropped: int64 [b, n], ascending positions in the sequence; every latent frame that
            lost a token has a kept one.

    Returns:
        int64 [b, dropped], places in 0..kept. Ties go to the lowest position.
    """
    per_frame = grid.per_frame
    cell = torch.arange(per_frame, device=kept.device)
    row, column = cell // grid.width, cell % grid.width
    found = torch.empty_like(dropped)
    for b in range(len(kept)):
        frame = frame_of(dropped[b], grid)
        for number in frame.unique().tolist():
            first = grid.start + number * per_frame
            place = ((kept[b] >= first) & (kept[b] < first + per_frame)).nonzero()[:, 0]
            near, lost = kept[b, place] - first, frame == number
            far = dropped[b, lost] - first
            distance = (row[far, None] - row[near]) ** 2 + (column[far, None] - column[near]) ** 2
            found[b, lost] = place[distance.argmin(-1)]
    return found
