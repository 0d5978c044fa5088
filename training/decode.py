"""Makes mp4 files of a run's test videos: `python -m wantrim.training.decode FOLDER --model WAN`.

Training a real Wan writes its test videos as latents; here each becomes the teacher's video beside
the student's.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors import SafetensorError
from safetensors.torch import load_file

from .video_files import FRAME_RATE
from .videos import write_mp4

log = logging.getLogger(__name__)


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Pixels [3, frames, h, w] in 0..1 of latents [c, f, h, w] as the transformer has them."""
    mean, std = (
        torch.tensor(values, device=vae.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    given = latents[None].to(vae.device).float() * std + mean
    pixels = vae.decode(given.to(vae.dtype), return_dict=False)[0][0]
    return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()


def decode_folder(
    folder: Path, vae: AutoencoderKLWan, frame_rate: float = FRAME_RATE
) -> list[Path]:
    """Decode what is not decoded yet; returns the files that were made.

    Raises:
        ValueError: there are no latents, or, when the others are decoded, some cannot be read.
        OSError: a video cannot be written.
    """
    found = sorted(folder.rglob("videos/step-*.safetensors")) or sorted(
        folder.glob("step-*.safetensors")
    )
    if not found:
        raise ValueError(
            f"{folder}: expected test videos of a run (videos/step-N.safetensors), found none"
        )
    made, bad = [], 0
    for path in found:
        video = path.with_suffix(".mp4")
        if video.exists():
            continue
        try:
            latents = load_file(path)
            both = [decode(vae, latents[name]) for name in ("teacher", "student")]
        except (SafetensorError, KeyError, RuntimeError) as error:
            log.error(
                "%s: expected latents of a teacher and a student for this VAE, got others (%.200r)",
                path,
                error,
            )
            bad += 1
            continue
        write_mp4(video, torch.cat(both, 3), frame_rate)
        log.info("%s", video)
        made.append(video)
    if bad:
        raise ValueError(f"{folder}: {bad} of {len(found)} could not be decoded, as was said")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="wantrim.training.decode", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="of a run, a stage or its videos")
    parser.add_argument("--model", type=Path, required=True, help="local diffusers folder of a Wan")
    parser.add_argument("--frame-rate", type=float, default=FRAME_RATE, help="default 16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if not args.frame_rate > 0:
        parser.error(f"--frame-rate: expected more than 0, got {args.frame_rate}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        vae = AutoencoderKLWan.from_pretrained(args.model, subfolder="vae", local_files_only=True)
        decode_folder(args.folder, vae.to(args.device), args.frame_rate)
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
