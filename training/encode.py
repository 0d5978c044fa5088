"""Encodes a folder of videos into training data: `python -m wantrim.training.encode VIDEOS OUT`.

Latents and embeddings come from the VAE, text encoder and, for Wan2.1 image-to-video, CLIP of a
local diffusers folder. The command can be stopped with Ctrl+C and started again: it goes on behind
the last finished video.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from rich.logging import RichHandler
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .shard_files import Sample, ShardWriter, write_json

log = logging.getLogger(__name__)

VIDEOS = {".mp4", ".mkv", ".mov", ".webm"}
SKIPPED = "skipped.json"
# what every Wan is given, padded; diffusers' image branch counts on it
TEXT_TOKENS = 512
# pictures a second that Wan2.1 was trained with
FRAME_RATE = 16.0
# a video may be this much slower than it says
SLACK = 0.98
# channels of Wan's first-frame condition beside the noise: mask and image
CONDITION_CHANNELS = 20
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Video:
    """A video of the folder: `name` is its path in it."""

    path: Path
    name: str
    caption: str


@dataclass(frozen=True)
class Size:
    """What a video becomes."""

    width: int
    height: int
    pixel_frames: int
    frame_rate: float = FRAME_RATE

    def __post_init__(self):
        if min(self.width, self.height) < 16 or self.width % 16 or self.height % 16:
            raise ValueError(
                f"size: expected multiples of 16, got {self.width}x{self.height}; Wan was trained "
                "with 832x480 and 1280x720"
            )
        if self.pixel_frames < 1 or (self.pixel_frames - 1) % 4:
            raise ValueError(f"pixel-frames: expected 4n + 1, as 81, got {self.pixel_frames}")
        if not 0 <= self.frame_rate < math.inf:
            raise ValueError(f"frame-rate: expected 0 or more, got {self.frame_rate}")

    def sample_name(self, video: Video) -> str:
        return f"{video.name}@{self.width}x{self.height}x{self.pixel_frames}"


def find_videos(folder: Path) -> tuple[list[Video], dict[str, str]]:
    """The videos of a folder that have a caption, and why others are left out.

    A caption is the text in a .txt file of the video's name, or a row of captions.csv or
    captions.jsonl with `file` and `caption`.

    Raises:
        ValueError: no folder, no videos in it, or captions that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of videos; there is none")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS)
    if not paths:
        raise ValueError(f"{folder}: expected videos ({', '.join(sorted(VIDEOS))}), found none")
    listed = _listed_captions(folder)
    videos, skipped = [], {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        beside = path.with_suffix(".txt")
        try:
            text = beside.read_text("utf-8") if beside.is_file() else listed.get(name, "")
        except (OSError, UnicodeError) as error:
            skipped[name] = f"its caption cannot be read ({error})"
            continue
        if text.strip():
            videos.append(Video(path, name, text.strip()))
        else:
            skipped[name] = f"no caption: expected {beside.name} or a row of captions.csv"
    return videos, skipped


def _listed_captions(folder: Path) -> dict[str, str]:
    found = {}
    for name in ("captions.csv", "captions.jsonl"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file) if name.endswith("csv") else _json_lines(file)
                found |= {str(row["file"]): str(row["caption"] or "") for row in rows}
        except (OSError, KeyError, TypeError, ValueError, csv.Error, RecursionError) as error:
            raise ValueError(
                f"{name}: expected rows with `file` and `caption`, got something else ({error!r:.200})"
            ) from error
    return found


def _json_lines(file) -> Iterator[dict]:
    return (json.loads(line) for line in file if line.strip())


def read_video(path: Path, size: Size) -> torch.Tensor:
    """The first pictures of a video at the size's frame rate, uint8 [pixel_frames, h, w, 3].

    Scaled so that it covers the size, and cut in the middle.

    Raises:
        ValueError: it is damaged, too short or too slow; says which.
    """
    frames: list[torch.Tensor] = []
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise ValueError("it has no pictures")
            stream = file.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.guessed_rate or 0)
            if size.frame_rate and rate < size.frame_rate * SLACK:
                raise ValueError(
                    f"it has {rate:g} pictures a second, expected {size.frame_rate:g} or more"
                )
            for frame in _at_rate(file.decode(stream), rate, size.frame_rate):
                frames.append(fit(frame, size, frame.rotation))
                if len(frames) == size.pixel_frames:
                    return torch.stack(frames)
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    raise ValueError(f"it is too short: {len(frames)} of {size.pixel_frames} pictures")


def _at_rate(frames: Iterator[av.VideoFrame], own: float, rate: float) -> Iterator[av.VideoFrame]:
    """The pictures nearest to 0, 1, 2... / rate seconds; all of them when rate is 0."""
    count, first = 0, None
    for frame in frames:
        if frame.is_corrupt:
            raise ValueError("it has damaged pictures")
        if not rate or frame.time is None:
            yield frame
            continue
        first = frame.time if first is None else first
        if frame.time - first >= count / rate - 0.5 / own:
            count += 1
            yield frame


def fit(frame: av.VideoFrame, size: Size, rotation: int = 0) -> torch.Tensor:
    """A picture turned upright, scaled until it covers the size and cut: uint8 [h, w, 3].

    Args:
        rotation: degrees counterclockwise, as cameras note it.
    """
    turns = round(rotation / 90)
    width, height = (size.height, size.width) if turns % 2 else (size.width, size.height)
    scale = max(width / frame.width, height / frame.height)
    wide, high = (
        max(needed, round(given * scale))
        for needed, given in ((width, frame.width), (height, frame.height))
    )
    scaled = frame.reformat(wide, high, "rgb24", interpolation="BICUBIC")
    x, y = (wide - width) // 2, (high - height) // 2
    picture = torch.from_numpy(scaled.to_ndarray())[y : y + height, x : x + width]
    return picture.rot90(turns, (0, 1)).contiguous()


class Encoder:
    """The parts of a diffusers folder that make training data.

    Raises:
        ValueError: the folder is not one, lacks a part, or holds a model for another task.
    """

    def __init__(self, folder: Path, task: str, device: torch.device, dtype: torch.dtype):
        self.task, self.device, self.dtype = task, device, dtype
        config = _transformer_config(folder, task)
        try:
            # the transformer is many gigabytes and makes nothing here
            self.pipe = WanImageToVideoPipeline.from_pretrained(
                folder,
                transformer=None,
                transformer_2=None,
                dtype={"default": dtype, "vae": torch.float32},
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
        """What tells these parts from others."""
        clip = self.pipe.image_encoder if self.uses_clip else None
        return {
            "task": self.task,
            "vae": _digest(self.pipe.vae),
            "text_encoder": _digest(self.pipe.text_encoder),
            "image_encoder": clip and _digest(clip),
        }

    @torch.no_grad()
    def text(self, prompt: str) -> torch.Tensor:
        """Embedding [tokens, dim], padded with zeros."""
        embedding, _ = self.prompts.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_TOKENS,
            device=self.device,
        )
        return embedding[0].to(self.dtype)

    @torch.no_grad()
    def sample(self, pictures: torch.Tensor, caption: str) -> Sample:
        """A video, uint8 [f, h, w, 3], and its caption as training data."""
        video = pictures.to(self.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        latents = self.pipe.vae.encode(video).latent_dist.mode()
        config = self.pipe.vae.config
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        latents = (latents - mean) / std
        condition = clip = None
        if self.task == "i2v":
            frames, height, width = video.shape[2:]
            size = {"height": height, "width": width, "num_frames": frames}
            _, condition = self.pipe.prepare_latents(
                video[:, :, 0], 1, latents.shape[1], **size, device=self.device, latents=latents
            )
            condition = condition[0].to(self.dtype)
        if self.uses_clip:
            clip = self.pipe.encode_image(pictures[0].numpy(), self.device)[0].to(self.dtype)
        return Sample(latents[0].to(self.dtype), self.text(caption), condition, clip)


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


def encode_folder(
    folder: Path, out: Path, encoder: Encoder, size: Size, shard_size: int = 64
) -> dict[str, str]:
    """Encode what is not in `out` yet; returns the videos that were skipped, and why.

    Raises:
        ValueError: nothing to encode, or `out` holds samples of another model.
        OSError: the disk is full or cannot be written.
        KeyboardInterrupt: after the finished videos were written.
    """
    videos, skipped = find_videos(folder)
    for name, why in skipped.items():
        log.warning("%s: %s: skipped", name, why)
    made = {**encoder.made(), "frame_rate": size.frame_rate}
    prompts = {"empty": encoder.text(""), "negative": encoder.text(NEGATIVE)}
    writer = ShardWriter(out, made, TEXT_TOKENS, prompts, shard_size)
    done = writer.done
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("encoding", total=len(videos), said="")
        try:
            for video in videos:
                name = size.sample_name(video)
                progress.update(task, said=video.name)
                if name not in done:
                    try:
                        pictures = read_video(video.path, size)
                        writer.add(name, encoder.sample(pictures, video.caption))
                    except ValueError as error:
                        skipped[video.name] = str(error)
                        log.warning("%s: %s: skipped", video.name, error)
                progress.advance(task)
        except KeyboardInterrupt:
            writer.flush()
            raise
    writer.flush()
    write_json(out / SKIPPED, skipped)
    if not writer.index.shards:
        raise ValueError(f"{folder}: none of its {len(videos) + len(skipped)} videos can be used")
    log.info("%d samples in %s, %d videos skipped", len(writer.done), out, len(skipped))
    return skipped


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, as 832x480, got {text!r}")
    return int(width), int(height)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="wantrim.training.encode", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="videos, each with a caption")
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--model", type=Path, required=True, help="local diffusers folder of a Wan")
    parser.add_argument("--size", type=_size, default=(832, 480), help="default 832x480")
    parser.add_argument("--pixel-frames", type=int, default=81, help="4n + 1, default 81")
    parser.add_argument(
        "--frame-rate", type=float, default=FRAME_RATE, help="default 16; 0 takes every picture"
    )
    parser.add_argument("--task", choices=("t2v", "i2v"), default="t2v")
    parser.add_argument("--shard-size", type=int, default=64, help="samples in a shard")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="that is stored")
    args = parser.parse_args(arguments)
    if args.shard_size < 1:
        parser.error(f"--shard-size: expected 1 or more, got {args.shard_size}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    try:
        size = Size(*args.size, args.pixel_frames, args.frame_rate)
        encoder = Encoder(args.model, args.task, torch.device(args.device), DTYPES[args.dtype])
        encode_folder(args.folder, args.out, encoder, size, args.shard_size)
    except KeyboardInterrupt:
        log.warning("stopped; the same command goes on from here")
        return 130
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
