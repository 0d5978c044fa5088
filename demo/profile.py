"""Records the profile of the tiny Wan that ships: `python -m wantrim.demo.profile`.

Held-out prompts of the toy world, text- and image-to-video, as the quality bench samples them. The
same command on the same machine gives the same file.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import torch

from ..engine.engine import COND, UNCOND
from ..hosts.diffusers.profiling import profile_run
from ..hosts.diffusers.sample import sample
from ..hosts.diffusers.weights import load_original
from ..profiles.picture import draw_profile, summary
from ..profiles.profile import Profile
from ..toy import CHECKPOINT, PROFILE
from ..toy.batches import image_condition
from ..toy.held_out import held_out_scenes
from ..toy.text import encode_prompt
from ..toy.vae import ToyVAE
from ..toy.world import PIXEL_FRAMES, Scene, render
from .measure import LATENT_SIZE

log = logging.getLogger(__name__)
TEXT_PROMPTS, IMAGE_PROMPTS = 16, 8
# the last of so many: the quality bench measures with the first ones
SCENES = 100
SEED = 4
STEPS, GUIDANCE, SHIFT = 20, 8.0, 3.0


def record(
    model, text_prompts: int = TEXT_PROMPTS, image_prompts: int = IMAGE_PROMPTS, steps: int = STEPS
) -> Profile:
    """A profile of the tiny Wan: text-to-video and image-to-video, one run each."""
    scenes = held_out_scenes(SCENES)[-text_prompts - image_prompts :]
    first = _sampled(model, scenes[:text_prompts], steps, None)
    if not image_prompts:
        return first
    scenes = scenes[text_prompts:]
    rng = np.random.default_rng([SEED, 5])
    images = np.stack([render(scene, rng)[0] for scene in scenes])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    condition = image_condition(ToyVAE.load(), pixels, PIXEL_FRAMES)
    return first.merged(_sampled(model, scenes, steps, condition))


def _sampled(model, scenes: list[Scene], steps: int, condition: torch.Tensor | None) -> Profile:
    text = torch.stack([encode_prompt(scene.prompt()) for scene in scenes])
    with profile_run(model, cond_or_uncond=(COND, UNCOND), shift=SHIFT) as recorder:
        sample(
            model,
            text,
            LATENT_SIZE,
            steps=steps,
            guidance=GUIDANCE,
            shift=SHIFT,
            seed=SEED,
            condition=condition,
        )
    return recorder.profile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=PROFILE)
    parser.add_argument(
        "--prompts", type=int, default=TEXT_PROMPTS, help="text-to-video, 1 or more"
    )
    parser.add_argument("--images", type=int, default=IMAGE_PROMPTS, help="image-to-video")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--picture", type=Path, help="draw it into this file, too")
    args = parser.parse_args()
    if args.prompts < 1 or args.images < 0 or args.prompts + args.images > SCENES or args.steps < 1:
        parser.error(f"expected 1 step or more, and 1 to {SCENES} prompts and images together")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    profile = record(load_original(args.weights), args.prompts, args.images, args.steps)
    profile.save(args.out)
    log.info("%s", summary(profile))
    if args.picture is not None:
        draw_profile(profile, args.weights.stem).save(args.picture)


if __name__ == "__main__":
    main()
