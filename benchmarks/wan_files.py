"""Local files of a Wan: where its parts are, what it is, and whether the parts fit each other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import SafetensorError

from ..hosts.diffusers.checkpoints import checkpoint_config, load_checkpoint


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
                return load_checkpoint(self.weights, dtype, self.config).eval()
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
    config = _folder_config(weights) if weights.is_dir() else checkpoint_config(weights)
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
