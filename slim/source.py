"""Full Wan checkpoints as they are downloaded: which can be cut, and which model they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..profiles.fingerprint import Fingerprint, sample_modulation
from .cut import find_cut
from .file import Entry, is_slim, list_entries, read_tensor, transformer_config

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
MARK = "head.modulation"
# what Wan checkpoints have beside the blocks, none of it as wide as the heads
TOP = (
    "patch_embedding.", "text_embedding.", "time_embedding.", "time_projection.", "img_emb.",
    "head.", "ref_conv.", "control_adapter.",
)  # fmt: skip
WHOLE_IN_BLOCK = ("modulation", "norm3.weight", "norm3.bias", "self_attn.o.bias",
                  "cross_attn.o.bias", "ffn.2.bias")  # fmt: skip
# part of a key -> what the checkpoint is
VARIANTS = {
    "vace_": "Wan VACE",
    "casual_audio_encoder": "Wan S2V",
    "audio_injector": "Wan S2V",
    "audio_proj": "Wan HuMo",
    "audio_cross_attn": "Wan HuMo",
    "face_adapter": "Wan Animate",
    "face_encoder": "Wan Animate",
    "pose_patch_embedding": "Wan Animate",
    "patch_embedding_pose": "SCAIL",
    "patch_embedding_mask": "SCAIL",
    "patch_embedding_global": "WanDancer",
}
QUANTISED = re.compile(
    r"(^|\.)(scaled_fp8|comfy_quant|scale_weight|scale_input|weight_scale(_\d)?|input_scale"
    r"|weight_scale_inv|absmax|quant_map|quant_state.*)$"
)
PLAIN = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
INSTEAD = "Choose the bf16, fp16, fp32 or plain fp8 safetensors file of the same model."


@dataclass
class Source:
    """A full Wan checkpoint that can be cut.

    Args:
        prefix: in front of every key in the file.
        entries: tensors of the transformer by Wan's original key.
        config: the file's `config` metadata.
    """

    path: Path
    prefix: str
    entries: dict[str, Entry]
    model: Fingerprint
    config: str | None

    def tensor(self, key: str) -> torch.Tensor:
        return read_tensor(self.path, self.entries[key])

    def signature(self, block: int) -> torch.Tensor:
        """What tells a block's FFN channels apart (eq. 7): W_up's rows, W_down's columns."""
        up, down = (self.tensor(f"blocks.{block}.ffn.{layer}.weight") for layer in (0, 2))
        # nothing can be computed in fp8, and a file may have one of them so
        wide = (t.bfloat16() if t.dtype.itemsize == 1 else t for t in (up, down.T))
        return torch.cat(list(wide), 1)


def open_source(path: Path) -> Source:
    """Look at a full checkpoint without reading its weights."""
    _refuse_by_name(path)
    listed, metadata = list_entries(path)
    if is_slim(metadata):
        raise ValueError(
            f"{path.name}: expected a full Wan checkpoint, got one that is slim already. Choose the "
            "full model that it was made from."
        )
    names = {entry.name for entry in listed}
    prefix = next((prefix for prefix in PREFIXES if prefix + MARK in names), None)
    if prefix is None:
        if any("attn1.to_q" in name for name in names):
            raise ValueError(
                f"{path.name}: expected Wan's original key names, got those of diffusers. Choose the "
                "single-file checkpoint (as ComfyUI's Load Diffusion Model reads it)."
            )
        raise ValueError(
            f"{path.name}: expected a Wan checkpoint, but it has no {MARK}. Choose a Wan 2.1 or 2.2 "
            "video model."
        )
    entries = {
        entry.name.removeprefix(prefix): entry for entry in listed if entry.name.startswith(prefix)
    }
    for key, entry in entries.items():
        reason = _why_not(key, entry)
        if reason is not None:
            raise ValueError(f"{path.name}: cannot be cut: {reason}")
    hollow = [key for key, entry in entries.items() if 0 in entry.shape]
    if hollow:
        raise ValueError(
            f"{path.name}: {hollow[0]} is empty: damaged file. Download the checkpoint again."
        )
    config = metadata.get("config")
    model = _fingerprint(path, prefix, entries, config)
    for key, entry in entries.items():
        shape = _expected(key, model)
        if shape is not None and entry.shape != shape:
            raise ValueError(
                f"{path.name}: {key}: expected a shape of {shape}, got {entry.shape!r:.60}: damaged "
                "file. Download it again."
            )
    return Source(path, prefix, entries, model, config)


def _expected(key: str, model: Fingerprint) -> tuple[int, ...] | None:
    """Shape of a weight that is cut, or None for others."""
    if re.fullmatch(r"blocks\.\d+\.(self|cross)_attn\.(q|k|v|o|k_img|v_img)\.weight", key):
        return model.dim, model.dim
    found = re.fullmatch(r"blocks\.\d+\.ffn\.([02])\.weight", key)
    if found is None:
        return None
    shape = model.ffn_dim, model.dim
    return shape if found[1] == "0" else shape[::-1]


def _refuse_by_name(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path.name}: there is no such file. Choose a Wan checkpoint.")
    with path.open("rb") as file:
        magic = file.read(4)
    if path.suffix.lower() == ".gguf" or magic == b"GGUF":
        raise ValueError(
            f"{path.name}: a GGUF file cannot be cut: its weights are quantised in blocks that run "
            f"across heads and channels. {INSTEAD}"
        )
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path.name}: expected a .safetensors file, got {path.suffix or 'none'}.")


def _why_not(key: str, entry: Entry) -> str | None:
    if QUANTISED.search(key):
        return f"its weights are quantised with scales ({key}). {INSTEAD}"
    for part, variant in VARIANTS.items():
        if part in key:
            return (
                f"it is {variant} ({key}), whose extra layers are not supported yet. Use WanTrim "
                "Heads, which trims in place, or the plain Wan model."
            )
    if entry.dtype not in PLAIN:
        return f"{key} is {entry.dtype}, not a plain number format. {INSTEAD}"
    block = re.fullmatch(r"blocks\.\d+\.(.+)", key)
    if block is not None:
        known = find_cut(key) is not None or block[1] in WHOLE_IN_BLOCK
    else:
        known = key.startswith(TOP)
    if known:
        return None
    return f"it has {key}, which is no part of a plain Wan model. Choose a Wan 2.1 or 2.2 model."


def _fingerprint(
    path: Path, prefix: str, entries: dict[str, Entry], config: str | None
) -> Fingerprint:
    numbers = {int(key.split(".")[1]) for key in entries if key.startswith("blocks.")}
    blocks = len(numbers)
    if not blocks or numbers != set(range(blocks)):
        raise ValueError(f"{path.name}: expected blocks 0, 1, 2 ..., got {sorted(numbers)!r:.80}")
    try:
        dim = entries[MARK].shape[-1]
        ffn_dim = entries["blocks.0.ffn.0.weight"].shape[0]
        names = [f"blocks.{index}.modulation" for index in range(blocks)] + [MARK]
        tables = [read_tensor(path, entries[name]) for name in names]
        in_channels = entries["patch_embedding.weight"].shape[1]
        patch = entries["patch_embedding.weight"].shape[2:]
        out_channels = entries["head.head.weight"].shape[0] // (patch[0] * patch[1] * patch[2])
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{path.name}: expected a whole Wan checkpoint: {error} is missing"
        ) from error
    # Wan's own head_dim is 128; other sizes say so in the file
    heads = transformer_config(config).get("num_heads", dim // 128)
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise ValueError(
            f"{path.name}: expected heads of 128 channels or a 'config' that says how many heads, "
            f"got dim {dim} and {heads!r:.40} heads"
        )
    return Fingerprint(
        dim, ffn_dim, blocks, heads, in_channels, out_channels, sample_modulation(tables)
    )
