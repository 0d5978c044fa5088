"""Student and teacher as an objective asks them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .gate import Routing, Taps
from .shards import Batch


@dataclass
class Pair:
    """Student and teacher with their hooks.

    Args:
        taps, teacher_taps: None where no block is looked at or left out.
        routing: of the student, from stage II on.
        negative: text of the unconditional prompt [t, d].
        dtype: that all compute in.
        critic: of the stage "self_forcing": a model that learns what the student makes.
    """

    student: nn.Module
    teacher: nn.Module
    taps: Taps | None
    teacher_taps: Taps | None
    routing: Routing | None
    negative: torch.Tensor
    dtype: torch.dtype = torch.float32
    critic: nn.Module | None = None

    def ask(self, x: torch.Tensor, sigma: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The student's velocity at latents x [b, c, f, h, w], its blocks chosen by the router."""
        if self.routing is not None:
            self.taps.gate = self.routing.gate(sigma, x, batch.clip)
        return velocity(self.student, x, sigma, batch, self.dtype)

    def criticise(self, x: torch.Tensor, sigma: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The critic's velocity, of what the student would have made."""
        return velocity(self.critic, x, sigma, batch, self.dtype)

    def teach(self, x: torch.Tensor, sigma: torch.Tensor, batch: Batch, guidance: float = 1.0):
        """The teacher's velocity, with guidance."""
        with torch.no_grad():
            wanted = velocity(self.teacher, x, sigma, batch, self.dtype)
            if guidance == 1.0:
                return wanted
            text = self.negative.to(batch.text).expand_as(batch.text)
            free = Batch(batch.latents, text, batch.condition, batch.clip)
            without = velocity(self.teacher, x, sigma, free, self.dtype)
            return without + guidance * (wanted - without)


def velocity(
    model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, batch: Batch, dtype: torch.dtype
) -> torch.Tensor:
    """A Wan's velocity [b, c, f, h, w] in fp32 for noisy latents and sigmas [b]."""
    given = x if batch.condition is None else torch.cat([x, batch.condition.to(x)], 1)
    out = model(
        given.to(dtype),
        # exact: bf16 knows only every fourth timestep
        1000 * sigma,
        batch.text.to(dtype),
        None if batch.clip is None else batch.clip.to(dtype),
        return_dict=False,
    )
    return out[0].float()
