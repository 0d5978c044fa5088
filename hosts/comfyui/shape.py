"""Sizes of ComfyUI's Wan networks for the cost model."""

from __future__ import annotations

import torch

from ...methods.cost import WanShape


def device_name(device: torch.device) -> str:
    """torch's name for a GPU, by which the cost model knows its rates; empty for others."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def clip_tokens(network, clip_fea: torch.Tensor | None) -> int:
    """Tokens of a CLIP image that the network takes in, of `clip_fea` [b, tokens, c]."""
    return 0 if clip_fea is None or network.img_emb is None else clip_fea.shape[1]


def wan_shape(network, text_tokens: int, image_tokens: int = 0) -> WanShape | None:
    """Sizes of the diffusion_model of a MODEL, with the tokens of text (and CLIP) it is given.

    None for a slim model, whose blocks have sizes of their own.
    """
    if any(block.self_attn.num_heads != network.num_heads for block in network.blocks):
        return None
    return full_shape(network, text_tokens, image_tokens)


def full_shape(network, text_tokens: int, image_tokens: int = 0) -> WanShape:
    """As `wan_shape`; of a slim model the sizes of the full one that it was made of."""
    return WanShape(
        dim=network.dim,
        ffn_dim=network.ffn_dim,
        num_blocks=len(network.blocks),
        in_channels=network.in_dim,
        out_channels=network.out_dim,
        patch=tuple(network.patch_size),
        text_tokens=text_tokens,
        text_dim=network.text_dim,
        freq_dim=network.freq_dim,
        image_tokens=image_tokens,
        head_dim=network.dim // network.num_heads,
    )
