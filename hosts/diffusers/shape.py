"""Sizes of diffusers' WanTransformer3DModel, and of what it is given."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel

from ...methods.cost import WanShape
from ...methods.grid import TokenGrid


def token_grid(model: WanTransformer3DModel, latent: torch.Tensor) -> TokenGrid:
    """The tokens that the model makes of a latent [b, c, f, h, w]."""
    sizes = zip(latent.shape[2:], model.config.patch_size, strict=True)
    return TokenGrid(*(size // patch for size, patch in sizes))


def wan_shape(model: WanTransformer3DModel, text_tokens: int, image_tokens: int = 0) -> WanShape:
    """The model's sizes, with the number of text (and CLIP) tokens that it is given."""
    config = model.config
    return WanShape(
        dim=config.num_attention_heads * config.attention_head_dim,
        ffn_dim=config.ffn_dim,
        num_blocks=len(model.blocks),
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        patch=tuple(config.patch_size),
        text_tokens=text_tokens,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        image_tokens=image_tokens,
        image_dim=config.image_dim or 0,
        head_dim=config.attention_head_dim,
    )
