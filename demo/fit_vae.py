"""Fits a toy VAE's basis: `python -m wantrim.demo.fit_vae` rewrites toy/toy_vae.safetensors."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from safetensors.torch import save_file

from ..toy.vae import LATENT_CHANNELS, SPACE_STRIDE, TIME_STRIDE, to_patches
from ..toy.worlds import FIRST, WORLDS, World

PATCH_VALUES = TIME_STRIDE * SPACE_STRIDE * SPACE_STRIDE * 3
SCENES = 600
SEED = 11


def fit(world: World) -> dict[str, torch.Tensor]:
    """Mean and basis of the principal components of a world's patches."""
    rng = np.random.default_rng(SEED)
    total = torch.zeros(PATCH_VALUES, dtype=torch.float64)
    gram = torch.zeros(PATCH_VALUES, PATCH_VALUES, dtype=torch.float64)
    count = 0
    for index in range(SCENES):
        video = world.render(world.random_scene(rng, 1 + index % 3), rng)
        values = to_patches(torch.from_numpy(video).permute(3, 0, 1, 2)[None])
        values = values.reshape(-1, PATCH_VALUES).double()
        total += values.sum(0)
        gram += values.T @ values
        count += len(values)
    mean = total / count
    covariance = gram / count - torch.outer(mean, mean)
    variance, basis = torch.linalg.eigh(covariance)
    basis = basis.flip(1)[:, :LATENT_CHANNELS]
    std = variance.flip(0)[:LATENT_CHANNELS].sqrt()
    # half-whitened: coarse colour stays louder than fine edges, overall unit scale
    scale = std.sqrt()
    scale *= torch.sqrt(((std / scale) ** 2).mean())
    encoder, decoder = basis / scale, (basis * scale).T
    if world is not FIRST:
        # turned towards the first world's latents, so that its tiny Wan can be the start of another
        left, _, right = torch.linalg.svd(
            encoder.T @ covariance @ FIRST.load_vae().encoder.double()
        )
        encoder, decoder = encoder @ left @ right, (left @ right).T @ decoder
    tensors = {"mean": mean, "encoder": encoder, "decoder": decoder}
    return {k: v.float().contiguous() for k, v in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=list(WORLDS), default=FIRST.name)
    world = WORLDS[parser.parse_args().world]
    partial = world.vae_file.with_suffix(".partial")
    save_file(fit(world), partial)
    partial.replace(world.vae_file)


if __name__ == "__main__":
    main()
