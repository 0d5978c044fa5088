"""TAPE: training-free token pruning (arXiv 2605.17837).

At every reselecting block all tokens run and each gets an importance; until the next reselection
only the most important tokens of each latent frame are computed, the others keep their hidden
state. What to keep is decided once per step and shared by the conditional and unconditional rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..kernels import smooth_select
from .grid import TokenGrid, other_positions, positions
from .importance import NEEDS_ATTENTION, NEEDS_BLOCK, Evidence, parts, score
from .restore import FROM_LAST_STEP, RESTORE
from .schedule import SAME_PROGRESS, Schedule

DROPPED_KV = ("leave", "keep")


@dataclass(frozen=True)
class TokenPlan:
    """Which tokens to leave out, and when. Plain data, independent of a run.

    Args:
        schedule: keep ratio over the run (paper: mean 0.8, 0.7 or 0.6, falling).
        reselect_every: blocks between two reselections; the reselecting block runs on all tokens
            (paper 10, of 40 blocks).
        alpha: weight of a latent frame's own score in the temporal smoothing (paper 0.5; 1 = off).
        importance: name in `IMPORTANCE` (paper "attention"), or several joined by "+".
        dropped_kv: "leave" drops keys and values with their token (paper, fastest); "keep" lets
            dropped tokens still be attended to (safer, costs their projections).
        restore: what a dropped token gets, name in `RESTORE`: "identity" nothing (paper);
            "frame_mean" or "nearest" in every block the mean update of its latent frame's kept
            tokens, or that of the nearest one; "last_update" what the same blocks gave it when it
            was last computed; "last_output" the whole model's last result for it.
        trim_reselecting: choose before the reselecting block, so that it is trimmed too.
        anchor: never drop tokens of conditioned latent frames (image-to-video, references).
        start, end: progress between which tokens are dropped.
        spare: progress up to which all tokens are computed, and remembered for the first step that
            drops some.
        given: the plan in place of this one where the video's first latent frame is given; None is
            this one.
        query_ratio: share of the tokens used as queries for "attention" (paper not stated; 1/64).
        min_queries: but at least this many.
        exclude_radius: tube exclusion in rows and columns; None chooses by the grid's size.
    """

    schedule: Schedule
    reselect_every: int = 10
    alpha: float = 0.5
    importance: str = "attention"
    dropped_kv: str = "leave"
    restore: str = "identity"
    trim_reselecting: bool = False
    anchor: bool = True
    start: float = 0.0
    end: float = 1.0
    spare: float = 0.0
    query_ratio: float = 1 / 64
    min_queries: int = 256
    exclude_radius: int | None = None
    given: TokenPlan | None = None

    def __post_init__(self):
        if self.reselect_every < 1:
            raise ValueError(f"reselect_every: expected at least 1, got {self.reselect_every}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha: expected 0 to 1, got {self.alpha}")
        early = NEEDS_BLOCK.intersection(parts(self.importance))
        if self.trim_reselecting and early:
            raise ValueError(
                f"importance: {' and '.join(sorted(early))} can only be known after the "
                "reselecting block; choose another importance or leave that block whole"
            )
        if self.dropped_kv not in DROPPED_KV:
            raise ValueError(
                f"dropped_kv: expected one of {', '.join(DROPPED_KV)}, got {self.dropped_kv!r}"
            )
        if self.restore not in RESTORE:
            raise ValueError(f"restore: expected one of {', '.join(RESTORE)}, got {self.restore!r}")
        if self.restore == "last_output" and not self.trim_reselecting:
            raise ValueError(
                "restore: last_output leaves tokens out of all blocks; it needs trim_reselecting"
            )
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(
                f"start and end: expected 0 <= start <= end <= 1, got {self.start} and {self.end}"
            )
        if not 0.0 <= self.spare <= 1.0:
            raise ValueError(f"spare: expected 0 to 1, got {self.spare}")
        if not 0.0 < self.query_ratio <= 1.0:
            raise ValueError(
                f"query_ratio: expected more than 0 and at most 1, got {self.query_ratio}"
            )

    def settled(self, starts_given: bool) -> TokenPlan:
        """The plan of a run, once it is known whether the first latent frame is given."""
        chosen = self.given if starts_given and self.given is not None else self
        return chosen if chosen.given is None else replace(chosen, given=None)

    def keep_at(self, progress: float) -> float:
        """Share of each latent frame's tokens that stays at this progress."""
        inside = self.start <= progress <= self.end and not self.spares(progress)
        return self.schedule.at(progress) if inside else 1.0

    def spares(self, progress: float) -> bool:
        """Whether a step at this progress computes everything, for later ones to repeat."""
        return self.start <= progress < self.spare - SAME_PROGRESS

    def budget(self, progress: float, grid: TokenGrid) -> int:
        """Tokens per latent frame that stay at this progress: at least one."""
        return max(1, round(self.keep_at(progress) * grid.per_frame))

    def reselects(self, block_index: int) -> bool:
        if self.restore == "last_output":
            return block_index == 0
        return block_index % self.reselect_every == 0

    @property
    def needs_attention(self) -> bool:
        """Whether the importance looks at the reselecting block's q and k."""
        return bool(NEEDS_ATTENTION.intersection(parts(self.importance)))

    @property
    def remembers(self) -> bool:
        """Whether dropped tokens get something from an earlier step."""
        return self.restore in FROM_LAST_STEP


@dataclass
class Selection:
    """Kept tokens of one reselection, for every sample of the batch.

    Args:
        index: int64 [b, kept], ascending positions in the whole sequence; tokens outside the grid
            and anchored latent frames are always among them.
        length: tokens in the whole sequence.
        per_frame: how many tokens each latent frame keeps.
        extra: what `restore` worked out from this choice, for the blocks that follow.
    """

    index: torch.Tensor
    length: int
    per_frame: tuple[int, ...]
    dropped: torch.Tensor = field(init=False)
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.dropped = other_positions(self.index, self.length)

    def moved(self, old: TokenGrid, new: TokenGrid, length: int) -> Selection:
        """The same choice in a sequence of another layout; latent frames new to it stay whole."""
        dropped = self.dropped - old.start
        # rows drop equally many tokens of every latent frame, in order
        dropped = dropped[:, : int((dropped[0] < new.tokens).sum())] + new.start
        added = (new.per_frame,) * max(0, new.frames - old.frames)
        per_frame = (*self.per_frame[: new.frames], *added)
        return Selection(other_positions(dropped, length), length, per_frame)

    def rows(self, repeats: int) -> torch.Tensor:
        """Kept index for `repeats` chunks of the same samples, as cond and uncond are batched."""
        return self.index.repeat(repeats, 1)

    def dropped_rows(self, repeats: int) -> torch.Tensor:
        return self.dropped.repeat(repeats, 1)


def select_tokens(
    plan: TokenPlan, evidence: Evidence, budget: int, anchored: Sequence[bool] | None = None
) -> Selection:
    """Choose `budget` tokens in every latent frame that is not anchored.

    Args:
        anchored: one for each latent frame; these keep all their tokens.
    """
    grid = evidence.grid
    length, device = evidence.before.shape[1], evidence.before.device
    scores = score(plan.importance, evidence)
    keep = smooth_select(scores, budget, plan.alpha)[1] >= 0
    per_frame = [budget] * grid.frames
    if anchored is not None and plan.anchor:
        for frame in (number for number, given in enumerate(anchored) if given):
            keep[:, frame], per_frame[frame] = True, grid.per_frame
    mask = torch.ones(len(keep), length, dtype=torch.bool, device=device)
    mask[:, grid.start : grid.start + grid.tokens] = keep.flatten(1)
    count = length - grid.tokens + sum(per_frame)
    return Selection(positions(mask, count), length, tuple(per_frame))
