"""Samples the tiny Wan and measures whether the videos show what the prompts say."""

from __future__ import annotations

import numpy as np
import torch

from ..hosts.diffusers.sample import sample
from ..toy.metrics import adherence
from ..toy.text import encode_prompt
from ..toy.vae import ToyVAE
from ..toy.world import HEIGHT, PIXEL_FRAMES, WIDTH, Scene

LATENT_SIZE = ((PIXEL_FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)


def to_video(latents: torch.Tensor, vae: ToyVAE) -> np.ndarray:
    """Model latents [b, 16, f, h, w] to videos [b, frames, h, w, 3] in 0..1."""
    return vae.decode(latents.float().cpu()).permute(0, 2, 3, 4, 1).numpy()


def score_prompts(
    model, scenes: list[Scene], steps: int = 30, seed: int = 0, **options
) -> dict[str, float]:
    """Adherence of text-to-video samples, in batches of 16."""
    vae, videos = ToyVAE.load(), []
    for first in range(0, len(scenes), 16):
        text = torch.stack([encode_prompt(s.prompt()) for s in scenes[first : first + 16]])
        latents = sample(model, text, LATENT_SIZE, steps=steps, seed=seed + first, **options)
        videos.extend(to_video(latents, vae))
    return adherence(videos, scenes)
