"""Draws a report: kept tokens over the video, work and seconds per step, work per block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..engine.record import Record
from .figures import measured_speed, step_work

WIDTH = 960
MARGIN = 16
BACKGROUND = (24, 26, 31)
INK = (225, 228, 235)
FAINT = (160, 166, 178)
KEPT = (92, 184, 122)
TIME = (98, 150, 232)
OVERLAY_FRAMES = 6
# laid over what was left out; dark pictures cannot get darker
LEFT_OUT = np.array([0.16, 0.30, 0.75], np.float32)
HEAT_LOW = np.array([36, 40, 52], np.float32)


def as_pictures(images) -> torch.Tensor | None:
    """What a node got as images, in colour [n, h, w, 3]; None when it is nothing to draw."""
    if not isinstance(images, torch.Tensor) or images.ndim not in (3, 4, 5) or not images.numel():
        return None
    images = images.detach().cpu().float()
    images = images[None] if images.ndim == 3 else images.flatten(0, -4)
    # grey, or with a mask as the last channel
    return (
        images[..., :3] if images.shape[-1] >= 3 else images[..., :1].expand(*images.shape[:3], 3)
    )


def overlay(video: np.ndarray, coverage: np.ndarray, shown: Sequence[int]) -> np.ndarray:
    """Frames `shown` of a video [frames, h, w, 3] in 0..1 with a tint over what was left out.

    Token-sized squares, as blue as the share of blocks that did not compute them.

    Args:
        video: of a batch, one video behind the other.
        coverage: [b, f, gh, gw] in 0..1, share of the blocks that computed each token; b is 1 where
            all of a batch are alike.
    """
    frames, height, width, _ = video.shape
    latent_frames, each = coverage.shape[1], frames // (videos_in(frames, coverage) or 1)
    # the first pixel frame is a latent frame of its own
    stride = max((each - 1) / max(latent_frames - 1, 1), 1)
    shade = np.empty((len(shown), height, width), np.float32)
    low = min(float(coverage.min()), 0.999)
    for place, index in enumerate(shown):
        sample, frame = divmod(index, each)
        latent = min(int(np.ceil(frame / stride)), latent_frames - 1)
        light = (coverage[min(sample, len(coverage) - 1), latent] - low) / (1 - low)
        image = Image.fromarray((255 * light).astype(np.uint8))
        shade[place] = np.asarray(image.resize((width, height), Image.Resampling.NEAREST)) / 255
    veil = 0.6 * (1 - shade[..., None])
    return video[list(shown)] * (1 - veil) + LEFT_OUT * veil


def videos_in(frames: int, coverage: np.ndarray) -> int | None:
    """How many videos of the sampled length `frames` pixel frames are, or None where they do not fit.

    Args:
        coverage: as for `overlay`.
    """
    count, rest = divmod(frames, 4 * (coverage.shape[1] - 1) + 1)
    return count if rest == 0 and len(coverage) in (1, count) else None


def draw_report(record: Record, video: np.ndarray | None = None) -> Image.Image:
    """The report as a picture; `video` [frames, h, w, 3] in 0..1 gets the overlay."""
    rows = [_title(record)]
    coverage = record.coverage()
    if video is not None and coverage is not None and len(video):
        rows.append(_strip(video, coverage.numpy()))
    if record.steps:
        rows.append(_work_bars(record))
        rows.append(_time_bars(record))
        rows.append(_heat(record))
    rows.append(_notes(record))
    page = Image.new("RGB", (WIDTH, sum(row.height for row in rows) + MARGIN), BACKGROUND)
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    return page


def canvas(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    return image, ImageDraw.Draw(image)


def font_of(size: int):
    return ImageFont.load_default(size)


def _lines(text: str, font) -> list[str]:
    """A text in lines that fit on the page."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > WIDTH - 2 * MARGIN:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _title(record: Record) -> Image.Image:
    image, draw = canvas(72)
    draw.text((MARGIN, 12), f"WanTrim on {record.model}", INK, font_of(22))
    count = len(record.steps)
    steps = f"{count} {'step' if count == 1 else 'steps'}, " if count else ""
    took = f"{record.seconds:.1f} s   " if record.seconds else ""
    font = font_of(16)
    share = record.attention_share
    left = "" if share is None else f"self-attention left {share:.0%}   "
    speed = measured_speed(record)
    # a reference that warmed up is no headline
    known = speed is not None and speed.measured is not None and not speed.warming_up
    faster = f"trimmed steps {speed.measured:.2f} x as fast   " if known else ""
    line = f"{steps}{took}{faster}{left}{record.planned}"
    # the report's text has the whole of it
    while draw.textlength(line, font) > WIDTH - 2 * MARGIN:
        line = line.removesuffix(" ...").rpartition(" ")[0] + " ..."
    draw.text((MARGIN, 44), line, FAINT, font)
    return image


def _strip(video: np.ndarray, coverage: np.ndarray) -> Image.Image:
    shown = np.linspace(0, len(video) - 1, min(OVERLAY_FRAMES, len(video))).round().astype(int)
    tinted = overlay(video, coverage, shown)
    cell = (WIDTH - 2 * MARGIN) // len(shown) - 4
    # of a narrow strip something is left to see, and a high one does not fill the page
    height = min(max(round(cell * video.shape[1] / video.shape[2]), 1), 2 * WIDTH)
    videos = videos_in(len(video), coverage)
    said = "the video, and below it what was left out (bluer = computed in fewer blocks)"
    if videos is None:
        # frames that were cut off or made afterwards, or a part of a batch
        said += "; other frames were sampled, so the tint is misplaced"
    elif videos > 1:
        said += f"; {videos} videos, one behind the other"
    font = font_of(17)
    lines = _lines(said, font)
    top = 24 * len(lines)
    image, draw = canvas(2 * height + 20 + top)
    for number, line in enumerate(lines):
        draw.text((MARGIN, 24 * number), line, FAINT, font)
    for row, frames in enumerate((video[shown], tinted)):
        for column, frame in enumerate(frames):
            pixels = (255 * frame.clip(0, 1)).astype(np.uint8)
            picture = Image.fromarray(pixels).resize((cell, height), Image.Resampling.BILINEAR)
            image.paste(picture, (MARGIN + column * (cell + 4), top + row * (height + 4)))
    return image


def _work_bars(record: Record) -> Image.Image:
    work = [step_work(record, step) for step in record.steps]
    title = "work done per step, of an untouched model's FLOPs"
    if None in work:
        work, title = [step.kept_share for step in record.steps], "token work done per step"
    title += f": {min(work):.0%} to {max(work):.0%}"
    repeated = sum(step.repeated for step in record.steps)
    if repeated:
        title += f"; {repeated} {'repeats' if repeated == 1 else 'repeat'} an earlier step"
    return _bars(title, work, KEPT, [f"{value:.0%}" for value in work])


def _time_bars(record: Record) -> Image.Image:
    times, speed = [step.seconds for step in record.steps], measured_speed(record)
    title = f"seconds per step: {min(times):.2f} to {max(times):.2f} s"
    whole = None if speed is None else speed.whole
    if speed is not None:
        title += f"; the line is a whole step, {whole:.2f} s"
    return _bars(title, times, TIME, [f"{value:.2f}" for value in times], whole)


def _bars(title: str, values: list[float], colour, labels: list[str], line=None) -> Image.Image:
    """Bars of a share of 1 or, in TIME's colour, of the highest; `line` is a value to compare."""
    top = 1.0 if colour == KEPT else max(*values, line or 0.0, 1e-9)
    image, draw = canvas(132)
    draw.text((MARGIN, 2), title, FAINT, font_of(17))
    slot = (WIDTH - 2 * MARGIN) / len(values)
    for index, value in enumerate(values):
        left = MARGIN + index * slot
        height = 74 * value / top
        draw.rectangle((left, 106 - height, left + max(slot - 3, 1), 106), colour)
        if slot > 34:
            draw.text((left + 2, 108), labels[index], INK, font_of(15))
    if line is not None:
        level = 106 - 74 * line / top
        for left in range(MARGIN, WIDTH - MARGIN, 12):
            draw.line((left, level, left + 6, level), INK)
    return image


def _heat(record: Record) -> Image.Image:
    blocks = record.steps[0].num_blocks
    shares = [
        [kept / step.grid.tokens for kept in step.tokens_per_block]
        for step in record.steps
        if step.num_blocks == blocks
    ]
    cells = HEAT_LOW + np.array(shares, np.float32).T[..., None] * (np.array(KEPT) - HEAT_LOW)
    height = max(min(8 * blocks, 320), 64)
    image, draw = canvas(height + 30)
    draw.text(
        (MARGIN, 0),
        "tokens computed, block (down) by step (across); bright = all, dark = none",
        FAINT,
        font_of(17),
    )
    heat = Image.fromarray(cells.astype(np.uint8))
    image.paste(heat.resize((WIDTH - 2 * MARGIN, height), Image.Resampling.NEAREST), (MARGIN, 24))
    return image


def _notes(record: Record) -> Image.Image:
    notes = record.notes or ["nothing: everything ran as planned"]
    lines, font = [], font_of(17)
    for note in notes:
        first, *others = _lines(f"- {note}", font)
        lines += [first, *(f"  {line}" for line in others)]
    image, draw = canvas(34 + 22 * len(lines))
    draw.text((MARGIN, 6), "what did not happen, and why", FAINT, font_of(17))
    for index, line in enumerate(lines):
        draw.text((MARGIN, 30 + 22 * index), line, INK, font)
    return image
