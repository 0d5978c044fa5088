"""Local files of a Wan: where its parts are, what it is, and whether the parts fit each other."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import SafetensorError, safe_open

from ..hosts.diffusers.weights import to_diffusers_keys

# every published Wan; their checkpoints do not say it
HEAD_DIM = 128
# ComfyUI saves under this prefix
PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class WanFiles:
    """A Wan that was found complete and supported.

    Args:
        weights: the diffusers folder or checkpoint with the transformer.
        folder: the diffusers folder with all other parts.
        config: diffusers' configuration of the transformer.
        task: "t2v" or "i2v".
        space, time: pixels and pixel_frames per latent.
    """

    weights: Path
    folder: Path
    config: dict
    task: str
    space: int
    time: int

    @property
    def has_clip(self) -> bool:
        """Whether the transformer looks at the first image through CLIP (Wan2.1 I2V)."""
        return self.config["image_dim"] is not None

    def latent_size(self, width: int, height: int, pixel_frames: int) -> tuple[int, int, int]:
        """Latent (f, h, w) of a video in pixels; ValueError when the model cannot make it."""
        multiple = self.space * self.config["patch_size"][1]
        if min(width, height) < 1 or width % multiple or height % multiple:
            raise ValueError(
                f"width and height: expected multiples of {multiple}, got {width}x{height}"
            )
        if pixel_frames < 1 or (pixel_frames - 1) % self.time:
            raise ValueError(f"pixel_frames: expected {self.time}n + 1, got {pixel_frames}")
        return (pixel_frames - 1) // self.time + 1, height // self.space, width // self.space

    def load_model(self, dtype: torch.dtype) -> WanTransformer3DModel:
        """The transformer on the CPU; norms and time embedding stay fp32, as diffusers keeps them.

        Raises:
            ValueError: weights that are damaged, or of another model than their configuration.
        """
        try:
            if self.weights.is_file():
                return _load_checkpoint(self.weights, self.config, dtype).eval()
            model, report = WanTransformer3DModel.from_pretrained(
                self.weights,
                subfolder="transformer",
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
            )
            # diffusers only warns
            if report["missing_keys"]:
                raise ValueError(f"no weights for {sorted(report['missing_keys'])[:3]}")
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.weights.name}: the transformer cannot be read; expected the weights of a "
                f"Wan2.1 or Wan2.2: {error}"
            ) from error
        return model.eval()


def find_files(weights: Path, components: Path | None = None) -> WanFiles:
    """Look at a Wan's files without reading its weights.

    Args:
        weights: a diffusers folder, or a .safetensors checkpoint in Wan's original key names.
        components: for a checkpoint, a diffusers folder with the VAE, text encoder and tokenizer
            (and CLIP, where the transformer has an image branch).

    Raises:
        ValueError: files are missing or do not fit each other, or it is a Wan whose videos would
            come out wrong with one transformer and one image (two experts, first-and-last-frame,
            control, VACE, GGUF).
    """
    weights = Path(weights)
    folder = _component_folder(weights, components)
    index = _read_json(folder / "model_index.json")
    config = _folder_config(weights) if weights.is_dir() else _checkpoint_config(weights)
    task = _task(weights.name, config, index)
    vae = AutoencoderKLWan.load_config(folder / "vae")
    _check_fit(folder, config, vae)
    space, time = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    return WanFiles(weights, folder, config, task, space, time)


def _component_folder(weights: Path, components: Path | None) -> Path:
    if weights.suffix.lower() == ".gguf":
        raise ValueError(
            f"weights: {weights.name} is GGUF, which is not read here; expected a diffusers folder "
            "or a .safetensors checkpoint in bf16, fp16 or fp32"
        )
    if not weights.exists():
        raise ValueError(
            f"weights: {weights} is not there; expected a local folder or file, nothing is "
            "downloaded"
        )
    needed = ["model_index.json", "vae", "text_encoder", "tokenizer"]
    if weights.is_dir():
        if components is not None:
            raise ValueError("components: only for a checkpoint; a folder brings its own parts")
        folder, needed = weights, [*needed, "transformer"]
    elif weights.suffix.lower() != ".safetensors":
        raise ValueError(f"weights: expected a folder or a .safetensors file, got {weights.name}")
    elif components is None:
        raise ValueError(
            f"components: {weights.name} holds the transformer only; name a diffusers folder of "
            "the same Wan for the VAE, text encoder and tokenizer"
        )
    else:
        folder = Path(components)
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{folder}: expected a diffusers folder of a Wan; it has no {missing}")
    return folder


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error


def _folder_config(weights: Path) -> dict:
    config = _read_json(weights / "transformer" / "config.json")
    expected, found = WanTransformer3DModel.__name__, config.get("_class_name")
    if found != expected:
        raise ValueError(f"{weights.name}: expected a {expected}, got {found}; not supported here")
    return {"image_dim": None, "pos_embed_seq_len": None, **config}


def _checkpoint_config(weights: Path) -> dict:
    """The arguments of diffusers' transformer, read from the shapes of a checkpoint."""
    try:
        with safe_open(weights, "pt") as file:
            header = json.loads((file.metadata() or {}).get("config", "{}")).get("transformer", {})
            shapes = {
                key.removeprefix(PREFIX): file.get_slice(key).get_shape() for key in file.keys()
            }
        dim, in_channels, *patch_size = shapes["patch_embedding.weight"]
        heads = header.get("num_heads", dim // HEAD_DIM)
        config = {
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
        found = to_diffusers_keys(shapes)
        expected = {key: [*value.shape] for key, value in _empty_model(config).state_dict().items()}
        names = sorted(expected.keys() | found.keys())
        wrong = [name for name in names if expected.get(name) != found.get(name)]
        if wrong:
            raise ValueError(f"{len(wrong)} weights are missing or misshapen, as {wrong[0]}")
    except (SafetensorError, OSError, KeyError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{weights.name}: expected a Wan checkpoint in the original key names, in bf16, fp16 "
            f"or fp32: {error!r}"
        ) from error
    return config


def _empty_model(config: dict) -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(**config)


def _task(name: str, config: dict, index: dict) -> str:
    two = index.get("boundary_ratio") is not None or any(index.get("transformer_2") or [])
    if two or any(part in name.lower() for part in ("high_noise", "low_noise")):
        raise ValueError(
            f"{name}: Wan2.2 A14B is two experts that share the steps, and here one transformer "
            "makes all of them; use a Wan2.1 or the Wan2.2 TI2V-5B"
        )
    if config["pos_embed_seq_len"] is not None:
        raise ValueError(f"{name}: a first-and-last-frame model needs two images; use an I2V model")
    latent, channels = config["out_channels"], config["in_channels"]
    if channels == latent:
        return "t2v"
    if channels == 2 * latent + 4:
        return "i2v"
    raise ValueError(
        f"{name}: expected {latent} input channels (text-to-video) or {2 * latent + 4} "
        f"(image-to-video), got {channels}; control models are not supported here"
    )


def _check_fit(folder: Path, config: dict, vae: dict) -> None:
    """Whether VAE, text encoder and CLIP are those that the transformer was trained with."""
    text_dim = _read_json(folder / "text_encoder" / "config.json").get("d_model")
    if text_dim != config["text_dim"]:
        raise ValueError(
            f"{folder}: the transformer expects text of {config['text_dim']} channels, this text "
            f"encoder makes {text_dim}"
        )
    channels = vae.get("z_dim", 16)
    if channels != config["out_channels"]:
        raise ValueError(
            f"{folder}: the transformer makes latents of {config['out_channels']} channels, this "
            f"VAE reads {channels}"
        )
    for name in ("image_encoder", "image_processor") if config["image_dim"] is not None else ():
        if not (folder / name).is_dir():
            raise ValueError(f"{folder}: a Wan with an image branch needs {name}, which is missing")


def _load_checkpoint(weights: Path, config: dict, dtype: torch.dtype) -> WanTransformer3DModel:
    # diffusers' own from_single_file would fetch the configuration from the network
    model = _empty_model(config)
    # its tables are no weights, so they are in no checkpoint
    model.rope = type(model.rope)(
        model.config.attention_head_dim, model.config.patch_size, model.config.rope_max_seq_len
    )
    fp32 = set(model._keep_in_fp32_modules)
    with safe_open(weights, "pt") as file:
        names = to_diffusers_keys({key.removeprefix(PREFIX): key for key in file.keys()})
        tensors = {
            name: file.get_tensor(key).to(torch.float32 if fp32 & {*name.split(".")} else dtype)
            for name, key in names.items()
        }
    model.load_state_dict(tensors, assign=True)
    return model
