"""The video's tokens in the sequence, and moving some of them in and out of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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

    def cut(self, sequence: torch.Tensor) -> torch.Tensor:
        """The grid's part [b, tokens, ...] of a sequence [b, s, ...]."""
        return sequence[:, self.start : self.start + self.tokens]


def masked_as_given(mask: torch.Tensor) -> torch.Tensor:
    """bool [f]: latent frames that Wan's mask channels [b, 4, f, h, w] say are given.

    All of a latent frame has to be; of its four pixel frames one is enough.
    """
    return (mask.amax(1) > 0).all(-1).all(-1).any(0)


def timed_as_given(timestep: torch.Tensor, frames: int) -> torch.Tensor:
    """bool [f]: latent frames at timestep 0 (TI2V), by timesteps of frames or of tokens [b, ...]."""
    return (timestep.view(len(timestep), frames, -1) == 0).all(-1).all(0)


def gather_tokens(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` [b, kept] of `tensor` [b, s, ...]; a batch of 1 is shared by all samples.

    Works for hidden states [b, s, c], rotary tables [1, s, ...] and modulation.
    """
    if tensor.shape[0] == 1 and len(index) > 1:
        tensor = tensor.expand(len(index), *tensor.shape[1:])
    index = index.view(*index.shape, *[1] * (tensor.ndim - 2))
    return tensor.gather(1, index.expand(-1, -1, *tensor.shape[2:]))


def scatter_tokens(
    hidden: torch.Tensor, index: torch.Tensor, kept: torch.Tensor, in_place: bool = False
) -> torch.Tensor:
    """A copy of `hidden` [b, s, c], or that itself, with the rows `index` replaced by `kept`."""
    put = hidden.scatter_ if in_place else hidden.scatter
    return put(1, index[..., None].expand_as(kept), kept)


def positions(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Where a mask [b, s] is set, `count` times in every row: int64 [b, count], ascending.

    The number is known beforehand, so that nothing waits for the device to count.
    """
    order = mask.to(torch.uint8).sort(dim=1, stable=True, descending=True).indices
    return order[:, :count]


def other_positions(index: torch.Tensor, length: int) -> torch.Tensor:
    """The positions of 0..length that are not in `index` [b, n]."""
    mask = torch.ones(len(index), length, dtype=torch.bool, device=index.device)
    return positions(mask.scatter_(1, index, False), length - index.shape[1])
