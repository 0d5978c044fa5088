"""Fewer tokens without our engine: ToMe, and TAPE's skeleton with random tokens.

ToMe (arXiv 2210.09461) is as for diffusion (arXiv 2303.17604).

As in the second paper, the match is made once per block, on its input; self-attention,
cross-attention and feed-forward each run on the merged sequence, and what they put out is copied to
all tokens of a group before the skip connection. The hidden state itself is never averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import ModelHook
from torch.nn.functional import normalize

from ...hosts.diffusers.one_video import OneVideo, one_video
from ...hosts.diffusers.shape import token_grid
from ...methods.grid import TokenGrid, masked_as_given
from .random_router import millionths


@dataclass(frozen=True)
class Merge:
    """Groups of tokens, each with one token that stands for it.

    Args:
        kept: int64 [kept], ascending positions of the tokens that stand for a group.
        group: int64 [s], for every token the place in `kept` of its group.
    """

    kept: torch.Tensor
    group: torch.Tensor

    def merge(self, tokens: torch.Tensor) -> torch.Tensor:
        """[b, s, c] to the means of the groups [b, kept, c]."""
        sums = tokens.new_zeros(len(tokens), len(self.kept), tokens.shape[2])
        return sums.index_add_(1, self.group, tokens) / self.group.bincount()[:, None]

    def unmerge(self, merged: torch.Tensor) -> torch.Tensor:
        """[b, kept, c] to [b, s, c]: every token gets a copy of its group's."""
        return merged[:, self.group]


def match_tokens(hidden: torch.Tensor, grid: TokenGrid, keep_ratio: float) -> Merge | None:
    """Bipartite soft matching in every latent frame; None if nothing is to be merged.

    The top-left token of each 2x2 cell is a destination, the others are sources; the sources that
    are most similar (cosine) to a destination of their latent frame join the group of that one.

    Args:
        hidden: [s, c], of the row that decides.
        keep_ratio: share of the tokens that is left in each latent frame; all destinations stay.
    """
    position = torch.arange(grid.per_frame, device=hidden.device)
    corner = (position // grid.width % 2 == 0) & (position % grid.width % 2 == 0)
    target, source = position[corner], position[~corner]
    count = min(grid.per_frame - round(keep_ratio * grid.per_frame), len(source))
    if count == 0:
        return None
    unit = normalize(hidden.float().view(grid.frames, grid.per_frame, -1), dim=-1)
    score, into = (unit[:, source] @ unit[:, target].mT).max(-1)
    # stable: sources of equal score are taken in the same order everywhere
    merged = score.argsort(dim=-1, descending=True, stable=True)[:, :count]
    owner = position.repeat(grid.frames, 1)
    owner = owner.scatter(1, source[merged], target[into.gather(1, merged)])
    first = torch.arange(grid.frames, device=hidden.device)[:, None] * grid.per_frame
    owner = (owner + first).flatten()
    stands = owner == torch.arange(len(owner), device=hidden.device)
    place = stands.cumsum(0) - 1
    return Merge(stands.nonzero()[:, 0], place[owner])


class _Matching:
    """What the hooks of a run share: the grid of the call, and the merge of the block that runs."""

    def __init__(self, keep_ratio: float):
        self.keep_ratio = keep_ratio
        self.grid: TokenGrid | None = None
        self.merge: Merge | None = None


class _ModelHook(ModelHook):
    def __init__(self, matching: _Matching):
        super().__init__()
        self.matching = matching

    def pre_forward(self, module, hidden_states, *args, **kwargs):
        self.matching.grid = token_grid(module, hidden_states)
        return (hidden_states, *args), kwargs


class _BlockHook(ModelHook):
    def __init__(self, matching: _Matching):
        super().__init__()
        self.matching = matching

    def pre_forward(self, module, hidden_states, *args, **kwargs):
        m = self.matching
        # the conditional row is the first and decides for both
        m.merge = match_tokens(hidden_states[0], m.grid, m.keep_ratio)
        return (hidden_states, *args), kwargs


class _PartHook(ModelHook):
    """An attention or feed-forward on merged tokens."""

    def __init__(self, matching: _Matching):
        super().__init__()
        self.matching = matching

    def new_forward(self, module, hidden_states, *args):
        forward, merge = self.fn_ref.original_forward, self.matching.merge
        if merge is None:
            return forward(hidden_states, *args)
        if args and args[-1] is not None:
            # self-attention: who stands for a group keeps its own position
            args = (*args[:-1], tuple(part[:, merge.kept] for part in args[-1]))
        return merge.unmerge(forward(merge.merge(hidden_states), *args))


@contextmanager
def tome(
    model: WanTransformer3DModel, *, steps: int, shift: float, keep_ratio: float
) -> Iterator[None]:
    """Token merging in every block at every step.

    Args:
        keep_ratio: share of the tokens that is left in each latent frame, 0 < keep_ratio <= 1. One
            token of every 2x2 cell always stays, so that 0.25 (of an even grid) is the least.

    Raises:
        ValueError: keep_ratio is out of range.
    """
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio: expected more than 0 and at most 1, got {keep_ratio}")
    matching = _Matching(keep_ratio)
    hooks = [(model, _ModelHook(matching))]
    for block in model.blocks:
        hooks.append((block, _BlockHook(matching)))
        hooks += [(part, _PartHook(matching)) for part in (block.attn1, block.attn2, block.ffn)]
    with one_video(model, OneVideo(steps), *hooks):
        yield


class _Drawing(ModelHook):
    """On the model: draws the tokens that are kept."""

    def __init__(self, keep_ratio: float):
        super().__init__()
        self.keep_ratio = keep_ratio
        self.grid: TokenGrid | None = None
        self.sigma, self.anchored = 1.0, None
        # positions of the kept tokens; None are all
        self.kept: torch.Tensor | None = None

    def pre_forward(self, module, hidden_states, timestep, *args, **kwargs):
        self.grid, self.sigma = token_grid(module, hidden_states), float(timestep.max()) / 1000
        channels = module.config.out_channels
        mask = hidden_states[:1, channels : channels + 4]
        # latent frames that the image condition gives stay whole, as with `paper`
        self.anchored = masked_as_given(mask).cpu() if mask.shape[1] else None
        return (hidden_states, timestep, *args), kwargs

    def draw(self, block_index: int, device: torch.device) -> None:
        grid = self.grid
        # one sequence of choices for all videos
        random = torch.Generator().manual_seed(1000 * millionths(self.sigma) + block_index)
        rank = torch.rand(grid.frames, grid.per_frame, generator=random).argsort(1).argsort(1)
        chosen = rank < max(1, round(self.keep_ratio * grid.per_frame))
        if self.anchored is not None:
            chosen[self.anchored] = True
        kept = chosen.flatten().nonzero()[:, 0].to(device)
        self.kept = None if len(kept) == grid.tokens else kept


class _DroppingBlock(ModelHook):
    def __init__(self, drawing: _Drawing, index: int, chooses: bool):
        super().__init__()
        self.drawing, self.index, self.chooses = drawing, index, chooses

    def new_forward(self, module, hidden_states, text, temb, rotary):
        forward, drawing = self.fn_ref.original_forward, self.drawing
        if self.chooses:
            drawing.draw(self.index, hidden_states.device)
        kept = drawing.kept
        if self.chooses or kept is None:
            return forward(hidden_states, text, temb, rotary)
        rotary = tuple(part[:, kept] for part in rotary)
        out = hidden_states.clone()
        out[:, kept] = forward(hidden_states[:, kept], text, temb, rotary)
        return out


@contextmanager
def random_tokens(
    model: WanTransformer3DModel, *, steps: int, shift: float, keep_ratio: float
) -> Iterator[None]:
    """TAPE's skeleton (arXiv 2605.17837) with tokens chosen at random: what a choice has to beat.

    Every quarter of the blocks begins with a block on all tokens, which chooses; until the next one
    the others keep their hidden state.

    Args:
        keep_ratio: share of the tokens of each latent frame that is kept; 1 keeps all.
    """
    drawing, blocks = _Drawing(keep_ratio), model.blocks
    every = max(1, round(len(blocks) / 4))
    hooks = [
        (block, _DroppingBlock(drawing, index, index % every == 0))
        for index, block in enumerate(blocks)
    ]
    with one_video(model, OneVideo(steps), (model, drawing), *hooks):
        yield
