"""TAPE: training-free token pruning (arXiv 2605.17837).

At every reselecting block all tokens run and each gets an importance; until the next reselection
only the most important tokens of each latent frame are computed, the others keep their hidden
state. What to keep is decided once per step and shared by the conditional and unconditional rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..kernels.reference import smooth_select, token_mass
from .schedule import Schedule

DROPPED_KV = ("leave", "keep")
# below this many queries sampling is noise: use more of them
MIN_QUERIES = 256


@dataclass(frozen=True)
class TokenGrid:
    """Where the video's tokens lie in the sequence: s[start : start + frames*height*width]."""

    frames: int
    height: int
    width: int
    start: int = 0

    @property
    def per_frame(self) -> int:
        return self.height * self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.per_frame


@dataclass(frozen=True)
class TokenPlan:
    """Which tokens to leave out, and when. Plain data, independent of a run.

    Args:
        schedule: keep ratio over the run (paper: mean 0.8, 0.7 or 0.6, falling).
        reselect_every: blocks between two reselections; the reselecting block runs on all tokens
            (paper 10, of 40 blocks).
        alpha: weight of a latent frame's own score in the temporal smoothing (paper 0.5; 1 = off).
        importance: name in `IMPORTANCE` (paper "attention").
        dropped_kv: "leave" drops keys and values with their token (paper, fastest); "keep" lets
            dropped tokens still be attended to (safer, costs their projections).
        anchor: never drop tokens of conditioned latent frames (image-to-video, references).
        start, end: progress between which tokens are dropped.
        query_ratio: share of the tokens used as queries for "attention" (paper not stated; 1/64).
        exclude_radius: tube exclusion in rows and columns; None chooses by the grid's size.
    """

    schedule: Schedule
    reselect_every: int = 10
    alpha: float = 0.5
    importance: str = "attention"
    dropped_kv: str = "leave"
    anchor: bool = True
    start: float = 0.0
    end: float = 1.0
    query_ratio: float = 1 / 64
    exclude_radius: int | None = None

    def __post_init__(self):
        if self.reselect_every < 1:
            raise ValueError(f"reselect_every: expected at least 1, got {self.reselect_every}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha: expected 0 to 1, got {self.alpha}")
        if self.importance not in IMPORTANCE:
            raise ValueError(
                f"importance: expected one of {', '.join(IMPORTANCE)}, got {self.importance!r}"
            )
        if self.dropped_kv not in DROPPED_KV:
            raise ValueError(
                f"dropped_kv: expected one of {', '.join(DROPPED_KV)}, got {self.dropped_kv!r}"
            )
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(
                f"start and end: expected 0 <= start <= end <= 1, got {self.start} and {self.end}"
            )
        if not 0.0 < self.query_ratio <= 1.0:
            raise ValueError(
                f"query_ratio: expected more than 0 and at most 1, got {self.query_ratio}"
            )

    def keep_at(self, progress: float) -> float:
        """Share of each latent frame's tokens that stays at this progress."""
        inside = self.start <= progress <= self.end
        return self.schedule.at(progress) if inside else 1.0

    def budget(self, progress: float, grid: TokenGrid) -> int:
        """Tokens per latent frame that stay at this progress: at least one."""
        return max(1, round(self.keep_at(progress) * grid.per_frame))

    def reselects(self, block_index: int) -> bool:
        return block_index % self.reselect_every == 0


@dataclass
class Evidence:
    """What an importance may look at, for the rows that decide.

    Args:
        before, after: hidden state [b, s, c] around the reselecting block.
        received: `attention_received` [b, tokens], for the importance "attention".
        seed: differs per step and block.
    """

    plan: TokenPlan
    grid: TokenGrid
    before: torch.Tensor
    after: torch.Tensor
    received: torch.Tensor | None = None
    seed: int = 0


def sample_queries(grid: TokenGrid, ratio: float) -> torch.Tensor:
    """Positions int64 [m] of a stratified query sample: the same count from every latent frame.

    Each latent frame starts at its own golden-ratio offset, so that the sample does not line up
    with the rows of the grid.
    """
    wanted = max(ratio * grid.tokens, min(MIN_QUERIES, grid.tokens))
    per_frame = min(grid.per_frame, math.ceil(wanted / grid.frames))
    step = grid.per_frame / per_frame
    golden = (math.sqrt(5) - 1) / 2
    frame = torch.arange(grid.frames, dtype=torch.float64)[:, None]
    offset = (frame * golden) % 1.0 * step
    position = (torch.arange(per_frame, dtype=torch.float64) * step + offset).long()
    return (position.clamp(max=grid.per_frame - 1) + frame.long() * grid.per_frame).flatten()


def attention_received(
    plan: TokenPlan, grid: TokenGrid, q: torch.Tensor, k: torch.Tensor
) -> torch.Tensor:
    """The paper's importance: attention that a token receives in self-attention, fp32 [b, tokens].

    Args:
        q, k: [b, s, n, d] after RoPE.
    """
    index = sample_queries(grid, plan.query_ratio).to(q.device)
    radius = plan.exclude_radius
    if radius is None:
        # the imprint only exists when queries are sampled, and a small grid has no room for a tube
        radius = 2 if len(index) < grid.tokens and min(grid.height, grid.width) >= 16 else 0
    size = (grid.frames, grid.height, grid.width)
    return token_mass(q, k, size, index, start=grid.start, exclude_radius=radius)


def random_importance(evidence: Evidence) -> torch.Tensor:
    """Control: uniform scores, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(evidence.seed)
    scores = torch.rand(len(evidence.before), evidence.grid.tokens, generator=generator)
    return scores.to(evidence.before.device)


def hidden_norm(evidence: Evidence) -> torch.Tensor:
    """Norm of the hidden state after the block."""
    return _norm(_on_grid(evidence.after, evidence.grid))


def update_norm(evidence: Evidence) -> torch.Tensor:
    """Norm of what the block added to the hidden state."""
    grid = evidence.grid
    return _norm(_on_grid(evidence.after, grid) - _on_grid(evidence.before, grid))


def _norm(hidden: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)


def _on_grid(hidden: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    return hidden[:, grid.start : grid.start + grid.tokens]


IMPORTANCE: dict[str, Callable[[Evidence], torch.Tensor]] = {
    "attention": lambda evidence: evidence.received,
    "update_norm": update_norm,
    "hidden_norm": hidden_norm,
    "random": random_importance,
}


@dataclass
class Selection:
    """Kept tokens of one reselection, for every sample of the batch.

    Args:
        index: int64 [b, kept], ascending positions in the whole sequence; tokens outside the grid
            and anchored latent frames are always among them.
        length: tokens in the whole sequence.
    """

    index: torch.Tensor
    length: int
    dropped: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.dropped = _others(self.index, self.length)

    def moved(self, old: TokenGrid, new: TokenGrid, length: int) -> Selection:
        """The same choice in a sequence of another layout; latent frames new to it stay whole."""
        dropped = self.dropped - old.start
        # rows drop equally many tokens of every latent frame, in order
        dropped = dropped[:, : int((dropped[0] < new.tokens).sum())] + new.start
        return Selection(_others(dropped, length), length)

    def rows(self, repeats: int) -> torch.Tensor:
        """Kept index for `repeats` chunks of the same samples, as cond and uncond are batched."""
        return self.index.repeat(repeats, 1)

    def dropped_rows(self, repeats: int) -> torch.Tensor:
        return self.dropped.repeat(repeats, 1)


def select_tokens(
    evidence: Evidence, budget: int, anchored: torch.Tensor | None = None
) -> Selection:
    """Choose `budget` tokens in every latent frame that is not anchored.

    Args:
        anchored: bool [f]; these latent frames keep all their tokens.
    """
    plan, grid = evidence.plan, evidence.grid
    length, device = evidence.before.shape[1], evidence.before.device
    scores = IMPORTANCE[plan.importance](evidence).view(-1, grid.frames, grid.per_frame)
    position = smooth_select(scores, budget, plan.alpha)
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, position, True)
    if anchored is not None and plan.anchor:
        keep |= anchored.to(device).view(1, -1, 1)
    mask = torch.ones(len(keep), length, dtype=torch.bool, device=device)
    mask[:, grid.start : grid.start + grid.tokens] = keep.flatten(1)
    return Selection(_positions(mask), length)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask [b, s] is set, the same count in every row: int64 [b, n]."""
    position = torch.arange(mask.shape[1], device=mask.device)
    return position.expand_as(mask)[mask].view(len(mask), -1)


def _others(index: torch.Tensor, length: int) -> torch.Tensor:
    """The positions of 0..length that are not in `index` [b, n]."""
    mask = torch.ones(len(index), length, dtype=torch.bool, device=index.device)
    return _positions(mask.scatter_(1, index, False))


def gather_tokens(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` [b, kept] of `tensor` [b, s, ...]; a batch of 1 is shared by all samples.

    Works for hidden states [b, s, c], rotary tables [1, s, ...] and modulation.
    """
    if tensor.shape[0] == 1 and len(index) > 1:
        tensor = tensor.expand(len(index), *tensor.shape[1:])
    index = index.view(*index.shape, *[1] * (tensor.ndim - 2))
    return tensor.gather(1, index.expand(-1, -1, *tensor.shape[2:]))


def scatter_tokens(hidden: torch.Tensor, index: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """A copy of `hidden` [b, s, c] with the rows `index` replaced by `kept`."""
    return hidden.scatter(1, index[..., None].expand_as(kept), kept)
