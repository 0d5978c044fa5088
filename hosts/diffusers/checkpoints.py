"""Full Wan checkpoints as they are downloaded, as diffusers' transformer; nothing is fetched."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open

from .weights import to_diffusers_keys

# every published Wan; their checkpoints do not say it
HEAD_DIM = 128
# ComfyUI saves under the first
PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def _bare(key: str) -> str:
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def config_from_shapes(shapes: Mapping[str, Sequence[int]], num_heads: int | None = None) -> dict:
    """The arguments of diffusers' transformer, from shapes by Wan's original key names.

    Args:
        shapes: of a full checkpoint; of a slim one the layers that are never cut are enough.
        num_heads: None for heads of 128 channels, which every published Wan has.
    """
    dim, in_channels, *patch_size = shapes["patch_embedding.weight"]
    heads = num_heads or dim // HEAD_DIM
    return {
        "patch_size": tuple(patch_size),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": in_channels,
        "out_channels": shapes["head.head.weight"][0] // math.prod(patch_size),
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": len({key.split(".")[1] for key in shapes if key.startswith("blocks.")}),
        "image_dim": shapes.get("img_emb.proj.0.weight", [None])[0],
        "added_kv_proj_dim": dim if "blocks.0.cross_attn.k_img.weight" in shapes else None,
        "pos_embed_seq_len": shapes.get("img_emb.emb_pos", [None, None])[1],
    }


def checkpoint_config(path: Path) -> dict:
    """The arguments of diffusers' transformer, read from the shapes of a checkpoint.

    Raises:
        ValueError: it is not a whole Wan in its original key names.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("config", "{}")).get("transformer", {})
            shapes = {_bare(key): file.get_slice(key).get_shape() for key in file.keys()}
        config = config_from_shapes(shapes, header.get("num_heads"))
        found = to_diffusers_keys(shapes)
        expected = {key: [*value.shape] for key, value in empty_model(config).state_dict().items()}
        names = sorted(expected.keys() | found.keys())
        wrong = [name for name in names if expected.get(name) != found.get(name)]
        if wrong:
            raise ValueError(f"{len(wrong)} weights are missing or misshapen, as {wrong[0]}")
    except (SafetensorError, OSError, KeyError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path.name}: expected a Wan checkpoint in the original key names, in bf16, fp16 "
            f"or fp32: {error!r}"
        ) from error
    return config


def empty_model(config: dict) -> WanTransformer3DModel:
    """A transformer without weights, on the meta device."""
    with torch.device("meta"):
        return WanTransformer3DModel(**config)


def make_rope(model: WanTransformer3DModel) -> None:
    """Give a model that was made on the meta device its tables; they are in no checkpoint."""
    c = model.config
    model.rope = type(model.rope)(c.attention_head_dim, c.patch_size, c.rope_max_seq_len)


def load_checkpoint(
    path: Path, dtype: torch.dtype, config: dict | None = None
) -> WanTransformer3DModel:
    """Build the transformer on the CPU; what diffusers keeps in fp32 stays so.

    Raises:
        ValueError: it is not a whole Wan in its original key names.
    """
    # diffusers' own from_single_file would fetch the configuration from the network
    model = empty_model(config or checkpoint_config(path))
    make_rope(model)
    fp32 = set(model._keep_in_fp32_modules)
    with safe_open(path, "pt") as file:
        names = to_diffusers_keys({_bare(key): key for key in file.keys()})
        tensors = {
            name: file.get_tensor(key).to(torch.float32 if fp32 & {*name.split(".")} else dtype)
            for name, key in names.items()
        }
    model.load_state_dict(tensors, assign=True)
    return model
