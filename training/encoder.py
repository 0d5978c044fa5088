"""The parts of a diffusers folder that turn videos and captions into training data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from .parallel import DTYPES
from .shard_files import Sample

# what every Wan is given, padded; diffusers' image branch counts on it
TEXT_TOKENS = 512
# channels of Wan's first-frame condition beside the noise: mask and image
CONDITION_CHANNELS = 20


class Encoder:
    """The parts of a diffusers folder that make training data.

    Args:
        dtype: of what is stored, and of the text encoder.
        vae_dtype: that the VAE computes in.

    Raises:
        ValueError: the folder is not one, lacks a part, or holds a model for another task.
    """

    def __init__(
        self,
        folder: Path,
        task: str,
        device: torch.device,
        dtype: torch.dtype,
        vae_dtype: torch.dtype = torch.float32,
    ):
        self.task, self.device, self.dtype = task, device, dtype
        config = _transformer_config(folder, task)
        try:
            # the transformer is many gigabytes and makes nothing here
            self.pipe = WanImageToVideoPipeline.from_pretrained(
                folder,
                transformer=None,
                transformer_2=None,
                dtype={"default": dtype, "vae": vae_dtype},
                local_files_only=True,
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder}: expected a diffusers folder of a Wan with vae, text_encoder and "
                f"tokenizer: {error}"
            ) from error
        self.pipe.to(device)
        # its reading of prompts works without ftfy, that of image-to-video does not
        self.prompts = WanPipeline(
            self.pipe.tokenizer, self.pipe.text_encoder, self.pipe.vae, self.pipe.scheduler
        )
        self.uses_clip = task == "i2v" and config.get("image_dim") is not None
        if self.uses_clip and self.pipe.image_encoder is None:
            raise ValueError(f"{folder}: expected image_encoder, which this model needs for i2v")

    def made(self) -> dict[str, str | None]:
        """What tells these parts from others; their checksums are of weights in these formats."""
        clip = self.pipe.image_encoder if self.uses_clip else None
        names = {dtype: name for name, dtype in DTYPES.items()}
        return {
            "task": self.task,
            "dtype": names[self.dtype],
            "vae_dtype": names[self.pipe.vae.dtype],
            "vae": _digest(self.pipe.vae),
            "text_encoder": _digest(self.pipe.text_encoder),
            "image_encoder": clip and _digest(clip),
        }

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embeddings [prompts, tokens, dim], padded with zeros."""
        embeddings, _ = self.prompts.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_TOKENS,
            device=self.device,
        )
        return embeddings.to(self.dtype)

    @torch.no_grad()
    def samples(self, videos: Sequence[torch.Tensor], captions: Sequence[str]) -> list[Sample]:
        """Videos of one size, each uint8 [f, h, w, 3], and their captions as training data."""
        vae, pixels = self.pipe.vae, torch.stack(list(videos)).to(self.device)
        pixels = (pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(vae.dtype)
        latents = vae.encode(pixels).latent_dist.mode().float()
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents = ((latents - mean) / std).to(self.dtype)
        texts = self.texts(captions)
        conditions = clips = [None] * len(videos)
        if self.task == "i2v":
            conditions = [self._condition(*one) for one in zip(pixels, latents, strict=True)]
        if self.uses_clip:
            images = [video[0].numpy() for video in videos]
            clips = self.pipe.encode_image(images, self.device).to(self.dtype)
        made = zip(latents, texts, conditions, clips, strict=True)
        return [Sample(*parts) for parts in made]

    def _condition(self, pixels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Wan's condition [20, f, h, w] of a video's first picture, as the host's pipeline has it."""
        frames, height, width = pixels.shape[1:]
        size = {"height": height, "width": width, "num_frames": frames}
        _, condition = self.pipe.prepare_latents(
            pixels[None, :, 0], 1, len(latents), **size, latents=latents.float(), device=self.device
        )
        return condition[0].to(self.dtype)


def _transformer_config(folder: Path, task: str) -> dict:
    path = folder / "transformer" / "config.json"
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder}: expected a diffusers folder of a Wan; it has no model_index.json"
        )
    if not path.is_file() and task == "t2v":
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
        extra = config["in_channels"] - config["out_channels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a Wan transformer's config ({error!r:.200})") from error
    expected = CONDITION_CHANNELS if task == "i2v" else 0
    if extra != expected:
        raise ValueError(
            f"{folder}: expected a model with {expected} condition channels for task {task!r}, "
            f"got {extra}"
        )
    return config


def _digest(module: torch.nn.Module) -> str:
    """Class and a checksum over the beginning of every weight."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        beginning = value.flatten()[:8].float().cpu().numpy().tobytes()
        digest.update(f"{name} {list(value.shape)} ".encode() + beginning)
    return f"{type(module).__name__} {digest.hexdigest()[:16]}"
