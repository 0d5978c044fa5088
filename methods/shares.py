"""Which share of a step's tokens is computed: all, a part of them, or none (ours).

A step of share 0 computes nothing, and each prompt's velocity goes on as it changed last (carry.py);
one between 0 and 1 computes the tokens that are worth it, and the velocity of the others goes on
likewise. What tokens attend to stays whole: keys and values of the tokens that are left out are
remembered by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .grid import TokenGrid

# shares of the tokens at which it is known how much of the change they hold
TRIED = (0.1, 0.2, 0.35, 0.5, 0.8)
# of the way between two steps, by how much a sigma may be off
ROUNDED = 0.1


@dataclass(frozen=True)
class Shares:
    """Share of the tokens that each step of a run computes, as a function of sigma.

    Args:
        sigmas: of the steps that the sampler announces, falling, without the last, 0.
        shares: one for each of them, 0 to 1.
        context: whether keys and values of left out tokens may be remembered; without it a step is
            whole or repeated.
    """

    sigmas: tuple[float, ...]
    shares: tuple[float, ...]
    context: bool = True

    @property
    def neutral(self) -> bool:
        return all(share == 1.0 for share in self.shares)

    @property
    def partial(self) -> bool:
        """Whether any step computes a part of its tokens."""
        return self.context and any(0.0 < share < 1.0 for share in self.shares)

    def place(self, sigma: float) -> int:
        """Index of the announced step that a sigma belongs to.

        That is the last one that begins at it or before, so that all calls that a sampler makes on
        its way to the next one are of one step; a sigma may be rounded by a tenth of the way.
        """
        return place_of(self.sigmas, sigma)

    def at(self, sigma: float) -> float:
        share = self.shares[self.place(sigma)]
        return share if self.context or share == 0.0 else 1.0

    def needs_context(self, sigma: float) -> bool:
        """Whether a later step computes a part of its tokens before one computes all."""
        later = (self.at(self.sigmas[i]) for i in range(self.place(sigma) + 1, len(self.sigmas)))
        following = next((share for share in later if share > 0.0), 1.0)
        return following < 1.0


def place_of(sigmas: Sequence[float], sigma: float) -> int:
    """Index of the last of falling `sigmas` at or above `sigma`, which may be a little above it."""
    begun = (
        i
        for i in range(1, len(sigmas))
        if sigma <= sigmas[i] + ROUNDED * max(0.0, sigmas[i - 1] - sigmas[i])
    )
    return max(begun, default=0)


def token_change(difference: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Mean square of a latent's difference [b, c, f, h, w] at each token, fp32 [b, tokens].

    A token at the edge, half of which the patch embedding pads, is the mean of what is there; tokens
    behind the video (references) never change.
    """
    square = difference.float().square().mean(1)
    counts = (min(square.shape[1], grid.frames), grid.height, grid.width)
    patch = [-(-size // count) for size, count in zip(square.shape[1:], counts, strict=True)]
    pool = torch.nn.functional.avg_pool3d
    if patch[0] == 1:
        # as a token of Wan's is of one latent frame, and Macs pool in two dimensions alone
        pool, patch = torch.nn.functional.avg_pool2d, patch[1:]
    tokens = pool(square, patch, ceil_mode=True).flatten(1)
    return torch.nn.functional.pad(tokens, (0, grid.tokens - tokens.shape[1]))


def held_by_most(change: torch.Tensor, shares: Sequence[float] = TRIED) -> torch.Tensor:
    """Share of a change [b, tokens] that lies in each share of the tokens, those that change most.

    Mean over samples, fp32 [shares]; 0 of a sample that does not change at all.
    """
    ordered = change.float().sort(1, descending=True).values
    total = ordered.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    counts = [max(1, round(share * change.shape[1])) for share in shares]
    return torch.stack([(ordered[:, :count].sum(1) / total).mean() for count in counts])


def expected_error(change: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
    """What leaving a token out once more is expected to cost [b, tokens].

    A velocity that changes evenly is off by the steps that it was repeated.

    Args:
        change: squared change of each token's velocity when it was last seen.
        age: steps in a row that it was left out.
    """
    return change * (1.0 + age).square()


def latent_mask(kept: torch.Tensor, grid: TokenGrid, latent: Sequence[int]) -> torch.Tensor:
    """Where a latent of size (f, h, w) was computed: bool [b, 1, f, h, w].

    Args:
        kept: bool [b, tokens] of the grid.
    """
    mask = kept.view(-1, grid.frames, grid.height, grid.width)
    for axis, (size, tokens) in enumerate(
        zip(latent, (grid.frames, grid.height, grid.width), strict=True), 1
    ):
        patch = -(-size // tokens)
        mask = mask.repeat_interleave(patch, axis).narrow(axis, 0, size)
    return mask[:, None]
