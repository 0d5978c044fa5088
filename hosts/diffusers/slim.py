"""Slim checkpoints in diffusers' WanTransformer3DModel."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from ...slim.file import (
    DTYPES,
    PREFIX,
    Entry,
    SlimHeader,
    list_entries,
    read_header,
    read_tensor,
    write_tensors,
)
from .checkpoints import config_from_shapes, empty_model, make_rope
from .weights import to_diffusers_keys, to_original_keys


def load_slim(path: Path, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """Build diffusers' transformer with the widths of a slim file.

    Raises:
        ValueError: it is not a slim file, or of a model that diffusers' class cannot be.
    """
    model, entries = empty_slim(path)
    tensors = {name: read_tensor(path, entry).to(dtype) for name, entry in entries.items()}
    model.load_state_dict(tensors, assign=True)
    make_rope(model)
    return model.requires_grad_(False)


def empty_slim(path: Path) -> tuple[WanTransformer3DModel, dict[str, Entry]]:
    """The transformer of a slim file on the meta device, and where its weights are, by their names.

    Raises:
        ValueError: as `load_slim`.
    """
    header = read_header(path)
    kept = set(header.kept())
    found = {e.name.removeprefix(PREFIX): e for e in list_entries(path)[0] if e.name not in kept}
    try:
        shapes = {name: entry.shape for name, entry in found.items()}
        sizes = {"ffn_dim": header.model.ffn_dim}
        model = empty_model(config_from_shapes(shapes, header.model.num_heads) | sizes)
        narrow(model, header)
        entries = to_diffusers_keys(found)
        # says what is missing, too much or misshapen
        model.load_state_dict(
            {n: torch.empty(e.shape, device="meta") for n, e in entries.items()}, assign=True
        )
    except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path.name} does not fit diffusers' Wan: {str(error):.1000}") from error
    return model.eval(), entries


def save_slim(
    path: Path, tensors: dict[str, torch.Tensor], header: SlimHeader, dtype: torch.dtype
) -> int:
    """Write a slim model's state dict (diffusers' names); returns the size in bytes.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    kept = header.kept()
    weights = {PREFIX + name: tensor for name, tensor in to_original_keys(tensors).items()}
    name_of = {value: key for key, value in DTYPES.items()}
    entries = [Entry(name, "I32", tuple(tensor.shape)) for name, tensor in kept.items()]
    entries += [
        Entry(name, name_of[dtype], tuple(tensor.shape)) for name, tensor in weights.items()
    ]

    def make(entry: Entry) -> torch.Tensor:
        return kept[entry.name] if entry.name in kept else weights[entry.name].to(dtype)

    return write_tensors(path, entries, header.metadata(), make)


def narrow(model: WanTransformer3DModel, header: SlimHeader) -> None:
    """Give a freshly built full model layers of a slim one, without weights (on meta)."""
    width, dim, d = header.width, header.model.dim, header.model.head_dim
    with torch.device("meta"):
        for index, block in enumerate(model.blocks):
            for attention, heads in (
                (block.attn1, width.self_heads[index]),
                (block.attn2, width.cross_heads[index]),
            ):
                if len(heads) == header.model.num_heads:
                    continue
                inner = len(heads) * d
                attention.heads = len(heads)
                attention.inner_dim = attention.kv_inner_dim = inner
                for name in ("to_q", "to_k", "to_v"):
                    setattr(attention, name, nn.Linear(dim, inner))
                attention.to_out[0] = nn.Linear(inner, dim)
                norms = ["norm_q", "norm_k"]
                if attention.add_k_proj is not None:
                    attention.add_k_proj = nn.Linear(dim, inner)
                    attention.add_v_proj = nn.Linear(dim, inner)
                    norms.append("norm_added_k")
                for name in norms:
                    setattr(attention, name, nn.RMSNorm(inner, eps=getattr(attention, name).eps))
            channels = len(width.ffn_channels[index])
            if channels != header.model.ffn_dim:
                block.ffn.net[0].proj = nn.Linear(dim, channels)
                block.ffn.net[2] = nn.Linear(channels, dim)
