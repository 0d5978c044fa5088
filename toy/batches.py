"""Training samples of the toy worlds; scenes that are held out never come up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .text import encode_prompt
from .vae import ToyVAE
from .worlds import FIRST, World

# how often a scene has one, two and three objects
OBJECT_SHARES = (0.65, 0.25, 0.10)


def draw_sample(
    rng: np.random.Generator,
    drop_text: float,
    object_shares: Sequence[float] = OBJECT_SHARES,
    world: World = FIRST,
    side: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A video [3, f, h, w] in 0..1 and the embedding of its prompt.

    Args:
        drop_text: share of the samples whose prompt is empty.
        side: of the video, in pixels; None is the world's own.
    """
    while True:
        scene = world.random_scene(rng, 1 + int(rng.choice(len(object_shares), p=object_shares)))
        if not scene.held_out:
            break
    side = side or world.side
    video = world.render(scene, rng, width=side, height=side)
    text = encode_prompt("" if rng.random() < drop_text else scene.prompt(), world.parse)
    return torch.from_numpy(video).permute(3, 0, 1, 2), text


def encode_samples(
    vae: ToyVAE, videos: Sequence[torch.Tensor], with_image: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and image condition of videos; the condition is zero where `with_image` is not set."""
    latents = torch.stack([vae.encode(video[None])[0] for video in videos])
    condition = latents.new_zeros(len(videos), 4 + latents.shape[1], *latents.shape[2:])
    for index in np.flatnonzero(with_image):
        video = videos[index][None]
        condition[index] = image_condition(vae, video[:, :, 0], video.shape[2])[0]
    return latents, condition


def image_condition(vae: ToyVAE, first_frame: torch.Tensor, pixel_frames: int) -> torch.Tensor:
    """Wan's image-to-video condition [b, 20, f, h, w]: 4 mask channels and the image's latents.

    Args:
        first_frame: [b, 3, h, w] in 0..1. The other pixel frames are gray, as in Wan.
    """
    batch, _, height, width = first_frame.shape
    video = first_frame.new_full((batch, 3, pixel_frames, height, width), 0.5)
    video[:, :, 0] = first_frame
    latents = vae.encode(video)
    mask = latents.new_zeros(batch, 4, *latents.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], 1)
