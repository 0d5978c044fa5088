"""Slim checkpoints in diffusers' WanTransformer3DModel."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from ...methods.slim import whole_width
from ..slim_file import PREFIX, SlimHeader, list_entries, read_header, read_tensor
from .weights import new_transformer, to_diffusers_keys


def load_slim(path: Path, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """Build diffusers' transformer with the widths of a slim file.

    Raises:
        ValueError: it is not a slim file, or of a model that diffusers' class cannot be.
    """
    header = read_header(path)
    entries, _ = list_entries(path)
    kept = set(header.kept())
    tensors = {
        entry.name.removeprefix(PREFIX): read_tensor(path, entry).to(dtype)
        for entry in entries
        if entry.name not in kept
    }
    try:
        with torch.device("meta"):
            model = new_transformer(**_config(header, tensors))
        narrow(model, header)
        model.load_state_dict(to_diffusers_keys(tensors), assign=True)
    except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path.name} does not fit diffusers' Wan: {str(error):.1000}") from error
    c = model.config
    # its tables are no part of a checkpoint
    model.rope = type(model.rope)(c.attention_head_dim, c.patch_size, c.rope_max_seq_len)
    return model.eval().requires_grad_(False)


def _config(header: SlimHeader, tensors: dict[str, torch.Tensor]) -> dict:
    names = ("dim", "num_heads", "num_layers", "ffn_dim")
    return {
        **{name: header.transformer[name] for name in names},
        "in_dim": header.model.in_channels,
        "out_dim": header.model.out_channels,
        "text_dim": tensors["text_embedding.0.weight"].shape[1],
        "freq_dim": tensors["time_embedding.0.weight"].shape[1],
    }


def narrow(model: WanTransformer3DModel, header: SlimHeader) -> None:
    """Give a freshly built full model layers of a slim one, without weights (on meta)."""
    whole, width, d = whole_width(header.model), header.width, header.model.head_dim
    dim = header.model.dim
    with torch.device("meta"):
        for index, block in enumerate(model.blocks):
            for attention, heads, full in (
                (block.attn1, width.self_heads[index], whole.self_heads[index]),
                (block.attn2, width.cross_heads[index], whole.cross_heads[index]),
            ):
                if heads == full:
                    continue
                inner = len(heads) * d
                attention.heads = len(heads)
                attention.inner_dim = attention.kv_inner_dim = inner
                for name in ("to_q", "to_k", "to_v"):
                    setattr(attention, name, nn.Linear(dim, inner))
                attention.to_out[0] = nn.Linear(inner, dim)
                for name in ("norm_q", "norm_k"):
                    setattr(attention, name, nn.RMSNorm(inner, eps=getattr(attention, name).eps))
            channels = len(width.ffn_channels[index])
            if channels != header.model.ffn_dim:
                block.ffn.net[0].proj = nn.Linear(dim, channels)
                block.ffn.net[2] = nn.Linear(channels, dim)
