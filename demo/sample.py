"""Denoising with the tiny Wan on diffusers: a plain Euler flow sampler with guidance."""

from __future__ import annotations

import torch

from ..toy.vae import LATENT_CHANNELS

LATENT_SHAPE = (LATENT_CHANNELS, 5, 12, 12)


def sigmas_for(steps: int, shift: float) -> torch.Tensor:
    """Descending sigmas [steps + 1] from 1 to 0 with the flow shift that Wan's samplers use."""
    u = torch.linspace(1, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


@torch.no_grad()
def sample(
    model,
    text: torch.Tensor,
    *,
    steps: int = 30,
    guidance: float = 4.0,
    shift: float = 3.0,
    seed: int = 0,
    condition: torch.Tensor | None = None,
    on_step=None,
) -> torch.Tensor:
    """Sample model latents [b, 16, f, h, w] in fp32.

    Args:
        text: embeddings [b, tokens, text_dim]; the unconditional text is all zeros.
        condition: Wan's image condition [b, 20, f, h, w], or None for text-to-video.
        on_step: called as on_step(step_index, sigma, latents) after every step.
    """
    batch = len(text)
    shape = LATENT_SHAPE if condition is None else (LATENT_CHANNELS, *condition.shape[2:])
    random = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, *shape), generator=random)
    extra = model.config.in_channels - LATENT_CHANNELS
    if extra and condition is None:
        condition = x.new_zeros(batch, extra, *shape[1:])
    sigmas = sigmas_for(steps, shift)
    both = torch.cat([text, torch.zeros_like(text)]) if guidance != 1 else text
    repeat = len(both) // batch
    for index in range(steps):
        model_input = x if not extra else torch.cat([x, condition], 1)
        timestep = (sigmas[index] * 1000).expand(len(both))
        velocity = model(model_input.repeat(repeat, 1, 1, 1, 1), timestep, both, return_dict=False)[
            0
        ]
        if repeat == 2:
            cond, uncond = velocity.chunk(2)
            velocity = uncond + guidance * (cond - uncond)
        x = x + (sigmas[index + 1] - sigmas[index]) * velocity
        if on_step:
            on_step(index, float(sigmas[index]), x)
    return x
