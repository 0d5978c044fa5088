"""Encodes a folder of videos into training data: `python -m wantrim.training.encode VIDEOS OUT`.

Latents and embeddings come from the VAE, text encoder and, for Wan2.1 image-to-video, CLIP of a
local diffusers folder. On several GPUs: `torchrun --nproc-per-node 8 -m wantrim.training.encode ...`.
The command can be stopped with Ctrl+C, or killed, and started again, on any number of processes: it
goes on behind the last finished shard of each.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from rich.logging import RichHandler
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .encoder import TEXT_TOKENS, Encoder
from .parallel import DTYPES, World, world
from .shard_files import ShardWriter, write_json
from .video_files import FRAME_RATE, Size, Video, find_videos, parse_size, read_video

log = logging.getLogger(__name__)

SKIPPED = "skipped.json"
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
# videos that are read while others are encoded
READERS = 4


def encode_folder(
    folder: Path,
    out: Path,
    encoder: Encoder,
    size: Size,
    shard_size: int = 64,
    batch: int = 1,
    processes: World | None = None,
) -> dict[str, str]:
    """Encode what is not in `out` yet; returns the videos that were skipped, and why.

    Every process takes every so many-th of the videos and writes shards of its own; the first one
    lists them all when the others are done. Processes that know nothing of each other may write into
    one folder too: they do some of the work twice, and nothing is lost.

    Args:
        batch: videos that are encoded at once.
        processes: that share the work; None is this one alone.

    Raises:
        ValueError: nothing to encode, or `out` holds samples of another model or other videos.
        OSError: the disk is full or cannot be written.
        KeyboardInterrupt: after the finished videos were written.
    """
    rank, count = (processes.rank, processes.size) if processes else (0, 1)
    videos, skipped = find_videos(folder)
    for name, why in skipped.items() if rank == 0 else ():
        log.warning("%s: %s: skipped", name, why)
    made = {**encoder.made(), "frame_rate": size.frame_rate}
    prompts = dict(zip(("empty", "negative"), encoder.texts(["", NEGATIVE]), strict=True))
    # checksums are taken by one, and known to the others
    if processes and rank:
        processes.wait()
    writer = ShardWriter(out, made, TEXT_TOKENS, prompts, shard_size)
    if processes and not rank:
        processes.wait()
    _same_sources(folder, videos, size, writer)
    done = writer.done
    own = [video for video in videos[rank::count] if size.sample_name(video) not in done]
    there = sum(size.sample_name(video) in done for video in videos)
    if there and not rank:
        log.info("%d of %d videos are there already", there, len(videos) + len(skipped))
    try:
        _encode(own, encoder, size, writer, batch, skipped, show=rank == 0)
    except KeyboardInterrupt:
        writer.flush()
        if not rank:
            _note_skipped(out, skipped, size, writer.done)
        raise
    writer.write_shard()
    for other in processes.gather(skipped) if processes else ():
        skipped |= other
    if rank:
        return skipped
    index = writer.flush()
    _note_skipped(out, skipped, size, writer.done)
    if not index.shards:
        raise ValueError(f"{folder}: none of its {len(videos) + len(skipped)} videos can be used")
    log.info("%d samples in %s, %d videos skipped", len(writer.done), out, len(skipped))
    return skipped


def _same_sources(folder: Path, videos: Sequence[Video], size: Size, writer: ShardWriter) -> None:
    """Refuse a folder whose videos are others than those of the same name that are encoded."""
    shards = writer.index.shards
    # of shards that say it
    made = {n: s for shard in shards for n, s in zip(shard.names, shard.sources, strict=False)}
    sources = ((size.sample_name(video), video.source) for video in videos)
    others = [name for name, source in sources if (made.get(name) or source) != source]
    if others:
        raise ValueError(
            f"{writer.folder}: {len(others)} of its samples ({', '.join(others[:3])}) are of another "
            f"file or caption than the videos in {folder}. One OUT is for one VIDEOS: choose another "
            "OUT; training takes several."
        )


def _note_skipped(out: Path, skipped: dict[str, str], size: Size, done: set[str]) -> None:
    """Write which videos were skipped at this size, beside what other runs skipped."""
    path = out / SKIPPED
    try:
        before = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        before = {}
    now = dict(before) if isinstance(before, dict) else {}
    now |= {f"{name}{size.suffix}": why for name, why in skipped.items()}
    write_json(path, {name: why for name, why in now.items() if name not in done})


def _encode(
    videos: Sequence[Video],
    encoder: Encoder,
    size: Size,
    writer: ShardWriter,
    batch: int,
    skipped: dict[str, str],
    show: bool,
) -> None:
    """Encode all of these; notes in `skipped` those that were skipped, and why."""
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )

    def skip(video: Video, error: ValueError) -> None:
        skipped[video.name] = str(error)
        log.warning("%s: %s: skipped", video.name, error)

    with Progress(*columns, disable=not show) as progress:
        task = progress.add_task("encoding", total=len(videos), said="")
        waiting: list[tuple[Video, torch.Tensor]] = []
        for number, (video, reading) in enumerate(_read_ahead(videos, size), 1):
            progress.update(task, said=video.name)
            try:
                waiting.append((video, reading.result()))
            except ValueError as error:
                skip(video, error)
            if len(waiting) == batch or (waiting and number == len(videos)):
                pictures, captions = [w[1] for w in waiting], [w[0].caption for w in waiting]
                samples = encoder.samples(pictures, captions)
                for (one, _), sample in zip(waiting, samples, strict=True):
                    try:
                        writer.add(size.sample_name(one), sample, one.source)
                    except ValueError as error:
                        skip(one, error)
                waiting = []
            progress.update(task, completed=number)


def _read_ahead(videos: Sequence[Video], size: Size) -> Iterator[tuple[Video, Future]]:
    """Each video and its pictures to come; some are read while those before are in use."""
    pool = ThreadPoolExecutor(READERS)
    reading: list[Future] = []
    try:
        for number, video in enumerate(videos):
            for following in videos[number + len(reading) : number + READERS]:
                reading.append(pool.submit(read_video, following.path, size))
            yield video, reading.pop(0)
    finally:
        pool.shutdown(cancel_futures=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="wantrim.training.encode", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("folder", type=Path, help="videos, each with a caption")
    add("out", type=Path, help="folder for the shards of these videos, and of no others")
    add("--model", type=Path, required=True, help="local diffusers folder of a Wan")
    add("--size", type=parse_size, default=(832, 480), help="default 832x480")
    add("--pixel-frames", type=int, default=81, help="4n + 1, default 81")
    add("--frame-rate", type=float, default=FRAME_RATE, help="default 16; 0 takes every picture")
    add("--task", choices=("t2v", "i2v"), default="t2v")
    add("--batch", type=int, default=1, help="videos encoded at once, default 1")
    add("--shard-size", type=int, default=64, help="samples in a shard")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=default)
    add("--dtype", choices=sorted(DTYPES), default="bf16", help="that is stored")
    add("--vae-dtype", choices=sorted(DTYPES), default="fp32", help="that the VAE computes in")
    args = parser.parse_args(arguments)
    for name in ("shard_size", "batch"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            parser.error(f"--{flag}: expected 1 or more, got {getattr(args, name)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    try:
        size = Size(*args.size, args.pixel_frames, args.frame_rate)
        with world(args.device) as processes:
            encoder = Encoder(
                args.model, args.task, processes.device, DTYPES[args.dtype], DTYPES[args.vae_dtype]
            )
            encode_folder(
                args.folder, args.out, encoder, size, args.shard_size, args.batch, processes
            )
    except KeyboardInterrupt:
        log.warning("stopped; the same command goes on from here")
        return 130
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
