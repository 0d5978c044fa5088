"""Videos on disk: which have a caption, and their pictures at a size and a frame rate."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import torch

VIDEOS = {".mp4", ".mkv", ".mov", ".webm"}
# pictures a second that Wan2.1 was trained with
FRAME_RATE = 16.0
# a video may be this much slower than it says
SLACK = 0.98


@dataclass(frozen=True)
class Video:
    """A video of the folder: `name` is its path in it."""

    path: Path
    name: str
    caption: str

    @property
    def source(self) -> str:
        """What tells it, with its caption, from another of its name."""
        # a link that leads nowhere is a video too, which cannot be read
        size = self.path.stat().st_size if self.path.exists() else 0
        said = f"{size} {self.caption}"
        return hashlib.sha256(said.encode()).hexdigest()[:16]


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

    @property
    def suffix(self) -> str:
        """Of the names of its samples."""
        return f"@{self.width}x{self.height}x{self.pixel_frames}"

    def sample_name(self, video: Video) -> str:
        return video.name + self.suffix


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of a command's WIDTHxHEIGHT."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, as 832x480, got {text!r}")
    return int(width), int(height)


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
