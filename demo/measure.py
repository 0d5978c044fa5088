"""Samples the tiny Wan and measures whether the videos show what the prompts say."""

from __future__ import annotations

import argparse
import csv
import logging
from pathlib import Path

import numpy as np
import torch

from ..hosts.diffusers.sample import sample
from ..hosts.diffusers.weights import load_original
from ..toy import CHECKPOINT
from ..toy.metrics import adherence
from ..toy.text import encode_prompt
from ..toy.vae import ToyVAE
from ..toy.world import HEIGHT, PIXEL_FRAMES, WIDTH, Scene, held_out_scenes

log = logging.getLogger(__name__)

LATENT_SIZE = ((PIXEL_FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)


def to_video(latents: torch.Tensor, vae: ToyVAE) -> np.ndarray:
    """Model latents [b, 16, f, h, w] to videos [b, frames, h, w, 3] in 0..1."""
    return vae.decode(latents.float()).permute(0, 2, 3, 4, 1).numpy()


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


def main() -> None:
    parser = argparse.ArgumentParser(description="adherence of the tiny Wan on held-out prompts")
    parser.add_argument("--weights", type=Path, default=CHECKPOINT)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = load_original(args.weights)
    for objects in (1, 2, 3):
        scenes = held_out_scenes(args.prompts, num_objects=objects)
        scores = score_prompts(model, scenes, args.steps)
        row = {"objects": objects, "prompts": args.prompts, "steps": args.steps}
        row |= {key: f"{value:.3f}" for key, value in scores.items()}
        log.info("%s", row)
        if args.csv:
            new = not args.csv.exists()
            with args.csv.open("a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
