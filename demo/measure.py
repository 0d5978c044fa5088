"""Samples a tiny Wan and measures whether the videos show what the prompts say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..hosts.diffusers.sample import sample
from ..toy.metrics import adherence
from ..toy.vae import ToyVAE
from ..toy.worlds import FIRST, World

LATENT_SIZE = FIRST.latent_size()
BATCH = 16


def to_video(latents: torch.Tensor, vae: ToyVAE) -> np.ndarray:
    """Model latents [b, 16, f, h, w] to videos [b, frames, h, w, 3] in 0..1."""
    return vae.decode(latents.float().cpu()).permute(0, 2, 3, 4, 1).numpy()


def sample_videos(
    model,
    scenes: Sequence,
    steps: int = 30,
    seed: int = 0,
    world: World = FIRST,
    side: int | None = None,
    **options,
) -> list[np.ndarray]:
    """Text-to-video samples [frames, side, side, 3] of scenes, in batches of 16.

    Args:
        side: of the videos, in pixels; None is the world's own.
        options: as for `denoise`.
    """
    vae, videos = world.load_vae(), []
    for first in range(0, len(scenes), BATCH):
        text = torch.stack([world.encode(s.prompt()) for s in scenes[first : first + BATCH]])
        size = world.latent_size(side)
        latents = sample(model, text, size, steps=steps, seed=seed + first, **options)
        videos.extend(to_video(latents, vae))
    return videos


def score_prompts(model, scenes: Sequence, steps: int = 30, seed: int = 0, **options) -> dict:
    """Adherence of text-to-video samples, by name; options as for `sample_videos`."""
    videos = sample_videos(model, scenes, steps, seed, **options)
    return adherence(videos, scenes, options.get("world", FIRST).read_scene)
