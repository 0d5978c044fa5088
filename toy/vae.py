"""A fixed linear VAE on Wan's grid: 4x8x8 pixels and 3 colours to 16 latent channels.

The basis is the principal components of a toy world's own pixels (fit by `python -m
wantrim.demo.fit_vae`), one for each world. The first pixel frame is a latent frame of its own, as in Wan's causal
VAE: it is encoded as if it had stood still for four frames.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file

LATENT_CHANNELS = 16
TIME_STRIDE = 4
SPACE_STRIDE = 8
VAE_FILE = Path(__file__).parent / "toy_vae.safetensors"
VAE_FILE_2 = VAE_FILE.with_name("toy_vae_2.safetensors")

# Wan2.1's published latent statistics: the hosts normalise with them, so the toy VAE speaks them
# too and its latents reach the model with unit scale
WAN_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def to_patches(video: torch.Tensor) -> torch.Tensor:
    """Video [b, 3, 4n+1, h, w] to patch values [b, n+1, h/8, w/8, 768]."""
    still = video[:, :, :1].expand(-1, -1, TIME_STRIDE - 1, -1, -1)
    return rearrange(
        torch.cat([still, video], 2),
        "b c (f t) (h p) (w q) -> b f h w (c t p q)",
        t=TIME_STRIDE,
        p=SPACE_STRIDE,
        q=SPACE_STRIDE,
    )


def from_patches(patches: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_patches`; the still frames in front are averaged into the first."""
    video = rearrange(
        patches,
        "b f h w (c t p q) -> b c (f t) (h p) (w q)",
        t=TIME_STRIDE,
        p=SPACE_STRIDE,
        q=SPACE_STRIDE,
    )
    first = video[:, :, :TIME_STRIDE].mean(2, keepdim=True)
    return torch.cat([first, video[:, :, TIME_STRIDE:]], 2)


class ToyVAE:
    """Encode and decode between pixels in 0..1 and model latents of about unit scale."""

    def __init__(self, mean: torch.Tensor, encoder: torch.Tensor, decoder: torch.Tensor):
        self.mean = mean
        self.encoder = encoder
        self.decoder = decoder

    @classmethod
    def load(cls, path: Path = VAE_FILE) -> ToyVAE:
        tensors = load_file(path)
        return cls(tensors["mean"], tensors["encoder"], tensors["decoder"])

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Pixels [b, 3, 4n+1, h, w] in 0..1 to model latents [b, 16, n+1, h/8, w/8].

        Raises:
            ValueError: frames are not 4n+1, or height or width is not a multiple of 8.
        """
        frames, height, width = video.shape[2:]
        if (frames - 1) % TIME_STRIDE or height % SPACE_STRIDE or width % SPACE_STRIDE:
            raise ValueError(
                "the toy VAE expects 4n+1 pixel frames and sides that are multiples of "
                f"{SPACE_STRIDE}; got {frames} frames of {width}x{height}"
            )
        latents = (to_patches(video) - self.mean.to(video)) @ self.encoder.to(video)
        return rearrange(latents, "b f h w c -> b c f h w")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Model latents [b, 16, f, h, w] to pixels [b, 3, 4(f-1)+1, 8h, 8w] in 0..1."""
        values = rearrange(latents, "b c f h w -> b f h w c") @ self.decoder.to(latents)
        return from_patches(values + self.mean.to(latents)).clamp(0, 1)


def to_wan_scale(latents: torch.Tensor) -> torch.Tensor:
    """Model latents to what Wan's own VAE would hand out (the host undoes this)."""
    mean, std = _statistics(latents)
    return latents * std + mean


def from_wan_scale(latents: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_wan_scale`."""
    mean, std = _statistics(latents)
    return (latents - mean) / std


def _statistics(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, LATENT_CHANNELS, 1, 1, 1)
    return like.new_tensor(WAN_LATENT_MEAN).view(shape), like.new_tensor(WAN_LATENT_STD).view(shape)
