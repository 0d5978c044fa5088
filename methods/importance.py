"""What makes a token worth computing: TAPE's importance (arXiv 2605.17837, 3.1) and simpler ones.

An importance gives one score per token from what is known when tokens are chosen. Names can be
mixed with "+": the mean of their ranks within each latent frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernels import token_mass
from .grid import TokenGrid


@dataclass
class Evidence:
    """What an importance may look at, for the rows that decide. None is "not known here".

    Args:
        before, after: hidden state [b, s, c] around the reselecting block.
        received: `attention_received` [b, tokens].
        keys: norm of the self-attention keys [b, tokens], mean over the heads.
        change: size of the last change of the velocity at each token [b, tokens].
        age: selections in a row that left the token out, int64 [b, tokens].
        seed: differs per step and block.
    """

    grid: TokenGrid
    before: torch.Tensor
    after: torch.Tensor | None = None
    received: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    change: torch.Tensor | None = None
    age: torch.Tensor | None = None
    seed: int = 0


def query_count(grid: TokenGrid, ratio: float, at_least: int = 256) -> int:
    """Queries that `sample_queries` takes: a share of the tokens, but no noise from too few."""
    wanted = max(ratio * grid.tokens, min(at_least, grid.tokens))
    return grid.frames * min(grid.per_frame, math.ceil(wanted / grid.frames))


def sample_queries(grid: TokenGrid, ratio: float, at_least: int = 256) -> torch.Tensor:
    """Positions int64 [m] of a stratified query sample: the same count from every latent frame.

    Each latent frame starts at its own golden-ratio offset, so that the sample does not line up
    with the rows of the grid.
    """
    per_frame = query_count(grid, ratio, at_least) // grid.frames
    step = grid.per_frame / per_frame
    golden = (math.sqrt(5) - 1) / 2
    frame = torch.arange(grid.frames, dtype=torch.float64)[:, None]
    offset = (frame * golden) % 1.0 * step
    position = (torch.arange(per_frame, dtype=torch.float64) * step + offset).long()
    return (position.clamp(max=grid.per_frame - 1) + frame.long() * grid.per_frame).flatten()


def attention_received(
    grid: TokenGrid,
    q: torch.Tensor,
    k: torch.Tensor,
    query_ratio: float = 1 / 64,
    exclude_radius: int | None = None,
    min_queries: int = 256,
) -> torch.Tensor:
    """The paper's importance: attention that a token receives in self-attention, fp32 [b, tokens].

    Args:
        q, k: [b, s, n, d] after RoPE.
        query_ratio: share of the tokens used as queries (paper not stated).
        exclude_radius: tube exclusion in rows and columns; None chooses by the grid's size.
        min_queries: use more of them on a small video.
    """
    index = sample_queries(grid, query_ratio, min_queries).to(q.device, non_blocking=True)
    if exclude_radius is None:
        # the imprint only exists when queries are sampled, and a small grid has no room for a tube
        sampled = len(index) < grid.tokens
        exclude_radius = 2 if sampled and min(grid.height, grid.width) >= 16 else 0
    size = (grid.frames, grid.height, grid.width)
    return token_mass(q, k, size, index, start=grid.start, exclude_radius=exclude_radius)


def key_size(grid: TokenGrid, k: torch.Tensor) -> torch.Tensor:
    """Norm of each token's keys, mean over the heads, fp32 [b, tokens]; k [b, s, n, d]."""
    return _norm(grid.cut(k)).mean(-1)


def random_importance(evidence: Evidence) -> torch.Tensor:
    """Control: uniform scores, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(evidence.seed)
    scores = torch.rand(len(evidence.before), evidence.grid.tokens, generator=generator)
    return scores.to(evidence.before.device, non_blocking=True)


def hidden_norm(evidence: Evidence) -> torch.Tensor:
    """Norm of the hidden state after the block, or before it when it has not run."""
    known = evidence.before if evidence.after is None else evidence.after
    return _norm(evidence.grid.cut(known))


def update_norm(evidence: Evidence) -> torch.Tensor:
    """Norm of what the block added to the hidden state."""
    cut = evidence.grid.cut
    return _norm(cut(evidence.after) - cut(evidence.before))


def rotation(evidence: Evidence) -> torch.Tensor:
    """Longest left out first; among equals evenly spread, another set in every latent frame."""
    grid = evidence.grid
    golden = (math.sqrt(5) - 1) / 2
    order = torch.arange(grid.tokens, dtype=torch.float64) * golden % 1.0
    order = order.float().to(evidence.before.device, non_blocking=True)
    order = order.expand(len(evidence.before), -1)
    return order if evidence.age is None else evidence.age + order


def velocity_change(evidence: Evidence) -> torch.Tensor:
    """Where the velocity changed most since the last step; `rotation` while that is unknown."""
    return rotation(evidence) if evidence.change is None else evidence.change


def _norm(hidden: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)


IMPORTANCE: dict[str, Callable[[Evidence], torch.Tensor]] = {
    "attention": lambda evidence: evidence.received,
    "update_norm": update_norm,
    "hidden_norm": hidden_norm,
    "random": random_importance,
    "key_norm": lambda evidence: evidence.keys,
    "velocity_change": velocity_change,
    "rotation": rotation,
}
# these need the reselecting block to have run; the second kind its q and k
NEEDS_BLOCK = {"attention", "update_norm", "key_norm"}
NEEDS_ATTENTION = {"attention", "key_norm"}


def parts(importance: str) -> list[str]:
    """The names in an importance such as "attention+rotation".

    Raises:
        ValueError: one of them is not known.
    """
    names = importance.split("+")
    if not all(name in IMPORTANCE for name in names):
        raise ValueError(
            f"importance: expected {', '.join(IMPORTANCE)}, or some of them joined by '+', "
            f"got {importance!r}"
        )
    return names


def score(importance: str, evidence: Evidence) -> torch.Tensor:
    """Scores fp32 [b, f, p] of the grid's tokens, higher is kept."""
    grid, names = evidence.grid, parts(importance)
    scores = [IMPORTANCE[name](evidence).view(-1, grid.frames, grid.per_frame) for name in names]
    if len(scores) == 1:
        return scores[0]
    ranks = [part.sort(stable=True, dim=-1).indices.sort(-1).indices for part in scores]
    return torch.stack(ranks).float().mean(0)
