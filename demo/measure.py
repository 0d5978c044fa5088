"""Measures what a model makes: does the video show what the prompt says?"""

from __future__ import annotations

import numpy as np
import torch

from ..toy.detector import detect
from ..toy.text import encode_prompt
from ..toy.vae import ToyVAE
from ..toy.world import Scene
from .sample import sample


def to_video(latents: torch.Tensor, vae: ToyVAE) -> np.ndarray:
    """Model latents [b, 16, f, h, w] to videos [b, frames, h, w, 3] in 0..1."""
    return vae.decode(latents.float()).permute(0, 2, 3, 4, 1).numpy()


def adherence(videos: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """Share of single-object videos whose colour, shape and direction are the prompt's."""
    rows = []
    for video, scene in zip(videos, scenes, strict=True):
        seen = detect(video)
        obj = scene.objects[0]
        none = dict.fromkeys(("colour_ok", "shape_ok", "direction_ok"), False)
        rows.append(seen.matches(obj) if seen else none)
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def score_prompts(
    model, scenes: list[Scene], steps: int = 30, seed: int = 0, **options
) -> dict[str, float]:
    """Adherence of text-to-video samples for single-object scenes, in one batch."""
    text = torch.stack([encode_prompt(scene.prompt()) for scene in scenes])
    latents = sample(model, text, steps=steps, seed=seed, **options)
    return adherence(to_video(latents, ToyVAE.load()), scenes)
