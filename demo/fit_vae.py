"""Fits the toy VAE's basis: `python -m wantrim.demo.fit_vae` rewrites toy/toy_vae.safetensors."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save_file

from ..toy.vae import LATENT_CHANNELS, PATCH_VALUES, VAE_FILE, to_patches
from ..toy.world import random_scene, render

SCENES = 600
SEED = 11


def main() -> None:
    rng = np.random.default_rng(SEED)
    total = torch.zeros(PATCH_VALUES, dtype=torch.float64)
    gram = torch.zeros(PATCH_VALUES, PATCH_VALUES, dtype=torch.float64)
    count = 0
    for index in range(SCENES):
        video = render(random_scene(rng, 1 + index % 3), rng)
        values = to_patches(torch.from_numpy(video).permute(3, 0, 1, 2)[None])
        values = values.reshape(-1, PATCH_VALUES).double()
        total += values.sum(0)
        gram += values.T @ values
        count += len(values)
    mean = total / count
    variance, basis = torch.linalg.eigh(gram / count - torch.outer(mean, mean))
    basis = basis.flip(1)[:, :LATENT_CHANNELS]
    std = variance.flip(0)[:LATENT_CHANNELS].sqrt()
    # half-whitened: coarse colour stays louder than fine edges, overall unit scale
    scale = std.sqrt()
    scale *= torch.sqrt(((std / scale) ** 2).mean())
    encoder, decoder = basis / scale, (basis * scale).T
    tensors = {"mean": mean, "encoder": encoder, "decoder": decoder}
    save_file({k: v.float().contiguous() for k, v in tensors.items()}, VAE_FILE)


if __name__ == "__main__":
    main()
