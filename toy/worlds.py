"""Both toy worlds behind one interface, for what trains, samples or measures in either."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from . import CHECKPOINT, CHECKPOINT_2, detector, detector2, held_out, render2, world, world2
from .text import encode_prompt
from .vae import SPACE_STRIDE, TIME_STRIDE, VAE_FILE, VAE_FILE_2, ToyVAE


@dataclass(frozen=True)
class World:
    """A grammar with its pictures and its detector.

    Args:
        side: of its videos, in pixels.
        checkpoint: the tiny Wan that was trained on it.
        parse: prompt -> scene.
        random_scene: (generator, number of objects) -> scene.
        held_out_scenes: (count, seed, number of objects) -> scenes that training never sees.
        render: (scene, generator, width, height) -> video [f, h, w, 3] in 0..1.
        read_scene: (video, scene) -> what the video has right, by name.
        scores: the names of `read_scene`.
    """

    name: str
    side: int
    pixel_frames: int
    checkpoint: Path
    vae_file: Path
    parse: Callable
    random_scene: Callable
    held_out_scenes: Callable
    render: Callable
    read_scene: Callable
    scores: tuple[str, ...]

    def encode(self, prompt: str) -> torch.Tensor:
        """Text embedding [tokens, text_dim] of a prompt."""
        return encode_prompt(prompt, self.parse)

    def load_vae(self) -> ToyVAE:
        return ToyVAE.load(self.vae_file)

    @property
    def four_step_lora(self) -> Path:
        """The LoRA that makes the tiny Wan one of four steps, whether it is there or not."""
        return self.checkpoint.with_name(f"{self.checkpoint.stem}_4_steps_lora.safetensors")

    @property
    def finished(self) -> bool:
        """Whether the training of the tiny Wan has come to its end, by its header."""
        with safe_open(self.checkpoint, "pt") as file:
            said = json.loads((file.metadata() or {}).get("wantrim", "{}"))
        return said.get("finished", True)

    def latent_size(self, side: int | None = None) -> tuple[int, int, int]:
        """Latent (f, h, w) of its videos, or of square ones of `side` pixels."""
        cells = (side or self.side) // SPACE_STRIDE
        return (self.pixel_frames - 1) // TIME_STRIDE + 1, cells, cells


FIRST = World(
    "1",
    world.WIDTH,
    world.PIXEL_FRAMES,
    CHECKPOINT,
    VAE_FILE,
    world.parse_prompt,
    world.random_scene,
    held_out.held_out_scenes,
    world.render,
    detector.read_scene,
    ("colour_ok", "shape_ok", "direction_ok"),
)
SECOND = World(
    "2",
    world2.WIDTH,
    world2.PIXEL_FRAMES,
    CHECKPOINT_2,
    VAE_FILE_2,
    world2.parse_prompt,
    world2.random_scene,
    world2.held_out_scenes,
    render2.render,
    detector2.read_scene,
    ("colour_ok", "shape_ok", "direction_ok", "camera_ok"),
)
WORLDS = {world.name: world for world in (FIRST, SECOND)}
