"""Sizes of ComfyUI's Wan networks for the cost model."""

from __future__ import annotations

from ...methods.cost import WanShape


def wan_shape(network, text_tokens: int, image_tokens: int = 0) -> WanShape | None:
    """Sizes of the diffusion_model of a MODEL, with the tokens of text (and CLIP) it is given.

    None for a slim model, whose blocks have sizes of their own.
    """
    if any(block.self_attn.num_heads != network.num_heads for block in network.blocks):
        return None
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
