"""Random numbers of a training step, as a function of the seed, the stage and the step alone.

So nothing has to be saved for a run to go on bit for bit, and a sample gets the same noise on
however many GPUs the batch is spread.
"""

from __future__ import annotations

import numpy as np
import torch

from ..methods.schedule import sigma_at

# kinds of numbers that a sample draws
STREAMS = 3


class Draws:
    """What chance decides in one step of one stage.

    Args:
        first: place of this process's first sample in the batch of all processes.
    """

    def __init__(self, seed: int, stage: int, step: int, first: int = 0):
        self._key, self.step, self.first = (seed, stage, step), step, first
        # the same on every process: what the whole batch shares
        self.shared = np.random.default_rng([*self._key, 0])

    def noise(self, shape: torch.Size, use: int = 0) -> torch.Tensor:
        """Standard normal [b, ...], a stream of its own for each sample and use."""
        own = self._own(1 + STREAMS * use, shape[0])
        return torch.stack([torch.randn(shape[1:], generator=g) for g in own])

    def uniform(self, count: int, use: int = 0) -> torch.Tensor:
        """One number in 0..1 for each of `count` samples; others for another use."""
        own = self._own(2 + STREAMS * use, count)
        return torch.cat([torch.rand(1, generator=g) for g in own])

    def choice(self, count: int, options: int) -> torch.Tensor:
        """One of `options`, int64, for each of `count` samples."""
        return torch.cat([torch.randint(options, (1,), generator=g) for g in self._own(3, count)])

    def blocks(self, num_blocks: int, count: int) -> tuple[int, ...]:
        """`count` different blocks, the same for all samples, ascending."""
        count = min(count, num_blocks)
        return tuple(sorted(self.shared.choice(num_blocks, count, replace=False).tolist()))

    def _own(self, stream: int, count: int):
        for sample in range(self.first, self.first + count):
            words = np.random.SeedSequence([*self._key, stream, sample]).generate_state(2)
            yield torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


def shifted(u: torch.Tensor, shift: float) -> torch.Tensor:
    """Sigmas for `u` in 0..1, 1 at pure noise, under a flow shift."""
    return sigma_at(1 - u, shift)


def noisy(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Flow matching's straight path: (1 - sigma) * latents + sigma * noise, sigma [b]."""
    s = sigma.view(-1, 1, 1, 1, 1)
    return (1 - s) * latents + s * noise
