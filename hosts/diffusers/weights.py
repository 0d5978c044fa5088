"""Wan checkpoints under their original key names, in and out of diffusers' transformer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# original name -> diffusers name; the block's norm2 and norm3 swap their meaning
_TOP = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "patch_embedding": "patch_embedding",
}
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in _ATTENTION.items()},
}


def _rename(key: str, top: dict[str, str], block: dict[str, str]) -> str:
    match = re.fullmatch(r"(blocks\.\d+)\.(.+)", key)
    prefix, name, names = (match[1] + ".", match[2], block) if match else ("", key, top)
    for leaf in ("", ".weight", ".bias"):
        stem = name.removesuffix(leaf) if leaf else name
        if stem in names and name.endswith(leaf):
            return prefix + names[stem] + leaf
    raise ValueError(f"unexpected Wan weight {key!r}: not a key of Wan's transformer")


def to_diffusers_keys(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a state dict from Wan's original names to diffusers' names."""
    return {_rename(key, _TOP, _BLOCK): value for key, value in tensors.items()}


def to_original_keys(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a state dict from diffusers' names to Wan's original names."""
    top = {new: old for old, new in _TOP.items()}
    block = {new: old for old, new in _BLOCK.items()}
    return {_rename(key, top, block): value for key, value in tensors.items()}


def save_original(
    path: Path, model: WanTransformer3DModel, dtype: torch.dtype, metadata: dict[str, str]
) -> None:
    """Write a checkpoint in Wan's original key names, whole or not at all.

    The `config` metadata is what ComfyUI's model detection reads and what `load_original` needs.
    """
    c = model.config
    if c.image_dim is not None:
        raise ValueError("model: expected a Wan without a CLIP branch, got one with image_dim")
    config = {
        "model_type": "t2v",
        "dim": c.num_attention_heads * c.attention_head_dim,
        "num_heads": c.num_attention_heads,
        "num_layers": c.num_layers,
        "ffn_dim": c.ffn_dim,
        "in_dim": c.in_channels,
        "out_dim": c.out_channels,
        "text_dim": c.text_dim,
        "freq_dim": c.freq_dim,
    }
    tensors = to_original_keys(model.state_dict())
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in tensors.items()}
    header = {**metadata, "config": json.dumps({"transformer": config})}
    partial = Path(path).with_suffix(".partial")
    save_file(tensors, partial, header)
    partial.replace(path)


def load_original(path: Path) -> WanTransformer3DModel:
    """Build diffusers' transformer in fp32 from a checkpoint that `save_original` wrote.

    Raises:
        ValueError: not a readable safetensors file, or one without the model's config.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a readable safetensors checkpoint: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors checkpoint: {error}") from error
    try:
        config = json.loads(header["config"])["transformer"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} has no readable 'config' metadata with a 'transformer' entry; "
            "expected a Wan checkpoint written by WanTrim"
        ) from error
    try:
        _check_config(config)
        tensors = to_diffusers_keys(tensors)
        model = new_transformer(**config)
        model.load_state_dict(tensors)
    except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit its own config: {str(error):.1000}") from error
    return model.eval()


def _check_config(config: object) -> None:
    """Sizes that a Wan can have; what else it takes is not known before it is built."""
    given = config if isinstance(config, dict) else {}
    sizes = {name: value for name, value in given.items() if name != "model_type"}
    if not sizes or not all(type(value) is int and 0 < value < 1 << 20 for value in sizes.values()):
        raise ValueError(f"expected sizes, got {config!r:.200}")


def new_transformer(
    *,
    dim: int,
    num_heads: int,
    num_layers: int,
    ffn_dim: int,
    in_dim: int,
    out_dim: int,
    text_dim: int,
    freq_dim: int = 256,
    model_type: str = "t2v",
) -> WanTransformer3DModel:
    """diffusers' transformer from a configuration in Wan's original words."""
    if model_type != "t2v":
        raise ValueError(f"expected model_type 't2v' (no CLIP branch), got {model_type!r}")
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=num_heads,
        attention_head_dim=dim // num_heads,
        in_channels=in_dim,
        out_channels=out_dim,
        text_dim=text_dim,
        freq_dim=freq_dim,
        ffn_dim=ffn_dim,
        num_layers=num_layers,
    )
