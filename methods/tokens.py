"""TAPE: training-free token pruning (arXiv 2605.17837), with sampled attention.

At every reselecting block all tokens run and each gets an importance, the attention that it
receives; until the next reselection only the most important tokens of each latent frame are
computed, the others keep their hidden state. What to keep is decided once per step and shared by
the conditional and unconditional rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .grid import TokenGrid, other_positions, positions
from .schedule import Schedule, check_window


@dataclass(frozen=True)
class TokenPlan:
    """Which tokens to leave out, and when. Plain data, independent of a run.

    Args:
        schedule: keep ratio over the run (paper: mean 0.8, 0.7 or 0.6, falling).
        reselect_every: blocks between two reselections; the reselecting block runs on all tokens
            (paper 10, of 40 blocks).
        alpha: weight of a latent frame's own score in the temporal smoothing (paper 0.5; 1 = off).
        anchor: never drop tokens of conditioned latent frames (image-to-video, references; ours).
        start, end: progress between which tokens are dropped.
    """

    schedule: Schedule
    reselect_every: int = 10
    alpha: float = 0.5
    anchor: bool = True
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if self.reselect_every < 1:
            raise ValueError(f"reselect_every: expected at least 1, got {self.reselect_every}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha: expected 0 to 1, got {self.alpha}")
        check_window(self.start, self.end)

    def keep_at(self, progress: float) -> float:
        """Share of each latent frame's tokens that stays at this progress."""
        return self.schedule.at(progress) if self.start <= progress <= self.end else 1.0

    def budget(self, progress: float, grid: TokenGrid) -> int:
        """Tokens per latent frame that stay at this progress: at least one."""
        return max(1, round(self.keep_at(progress) * grid.per_frame))

    def reselects(self, block_index: int) -> bool:
        return block_index % self.reselect_every == 0


def paper_plan(keep_ratio: float, **options) -> TokenPlan:
    """TAPE at a mean keep ratio (section 3 and its experiments); `options` of `TokenPlan`."""
    return TokenPlan(Schedule(keep_ratio, "falling"), **options)


@dataclass
class Selection:
    """Kept tokens of one choice, for every sample of the batch.

    Args:
        index: int64 [b, kept], ascending positions in the whole sequence; tokens outside the grid
            and anchored latent frames are always among them.
        length: tokens in the whole sequence.
        per_frame: how many tokens each latent frame keeps.
    """

    index: torch.Tensor
    length: int
    per_frame: tuple[int, ...]
    dropped: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.dropped = other_positions(self.index, self.length)

    def moved(self, old: TokenGrid, new: TokenGrid, length: int) -> Selection:
        """The same choice in a sequence of another layout; latent frames new to it stay whole."""
        dropped = self.dropped - old.start
        # rows drop equally many tokens of every latent frame, in order
        left_out = sum(old.per_frame - kept for kept in self.per_frame[: new.frames])
        dropped = dropped[:, :left_out] + new.start
        added = (new.per_frame,) * max(0, new.frames - old.frames)
        per_frame = (*self.per_frame[: new.frames], *added)
        return Selection(other_positions(dropped, length), length, per_frame)


def smooth_select(scores: torch.Tensor, keep: int, alpha: float) -> torch.Tensor:
    """Smooth scores over latent frames and take the top `keep` of each (eq. 2).

    s~[n, i] = alpha * s[n, i] + (1 - alpha) * s[n-1, i] with the previous latent frame's original
    score; the first latent frame is not smoothed. Both products and the sum are rounded, so that
    every device chooses the same; ties go to the lowest positions.

    Args:
        scores: fp32 [b, f, p], p positions in a latent frame.

    Returns:
        bool [b, f, p], which positions stay.
    """
    smooth = scores.clone()
    smooth[:, 1:] = alpha * scores[:, 1:] + (1 - alpha) * scores[:, :-1]
    order = smooth.sort(stable=True, dim=-1, descending=True).indices
    stays = torch.zeros_like(order, dtype=torch.bool)
    return stays.scatter_(-1, order[..., :keep], True)


def select_tokens(
    scores: torch.Tensor,
    grid: TokenGrid,
    length: int,
    budget: int,
    *,
    alpha: float = 1.0,
    anchored: Sequence[bool] | None = None,
) -> Selection:
    """Choose the `budget` highest tokens of every latent frame that is not anchored.

    Args:
        scores: fp32 [b, tokens] of the grid.
        length: tokens in the whole sequence.
        alpha: weight of a latent frame's own score in the smoothing (eq. 2); 1 is none.
        anchored: one for each latent frame; these keep all their tokens.
    """
    keep = smooth_select(scores.view(-1, grid.frames, grid.per_frame), budget, alpha)
    per_frame = [budget] * grid.frames
    for frame in (number for number, given in enumerate(anchored or ()) if given):
        keep[:, frame], per_frame[frame] = True, grid.per_frame
    mask = torch.ones(len(keep), length, dtype=torch.bool, device=scores.device)
    mask[:, grid.start : grid.start + grid.tokens] = keep.flatten(1)
    count = length - grid.tokens + sum(per_frame)
    return Selection(positions(mask, count), length, tuple(per_frame))
