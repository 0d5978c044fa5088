"""Training samples of the toy world; scenes that are held out never come up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .text import encode_prompt
from .vae import ToyVAE, image_condition
from .world import PIXEL_FRAMES, random_scene, render

# how often a scene has one, two and three objects
OBJECT_SHARES = (0.65, 0.25, 0.10)


def draw_sample(
    rng: np.random.Generator, drop_text: float, object_shares: Sequence[float] = OBJECT_SHARES
) -> tuple[torch.Tensor, torch.Tensor]:
    """A video [3, f, h, w] in 0..1 and the embedding of its prompt.

    Args:
        drop_text: share of the samples whose prompt is empty.
    """
    while True:
        scene = random_scene(rng, 1 + int(rng.choice(len(object_shares), p=object_shares)))
        if not scene.held_out:
            break
    video = torch.from_numpy(render(scene, rng)).permute(3, 0, 1, 2)
    return video, encode_prompt("" if rng.random() < drop_text else scene.prompt())


def encode_samples(
    vae: ToyVAE, videos: Sequence[torch.Tensor], with_image: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and image condition of videos; the condition is zero where `with_image` is not set."""
    video = torch.stack(list(videos))
    condition = image_condition(vae, video[:, :, 0], PIXEL_FRAMES)
    keep = torch.from_numpy(with_image).view(-1, 1, 1, 1, 1)
    return vae.encode(video), condition * keep
