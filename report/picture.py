"""Draws a report: the verdict, the video and what was left out of it, work and seconds per step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..engine.record import Record, Step
from ..methods.heads import FRAME, FULL, OFF, PATTERNS
from .figures import measured_speed, step_work
from .words import NOTHING, steps_line, verdict

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
# of heads: those of a tile lie between the frame's and off's
TILE = (176, 126, 216)
HEADS = {FULL: KEPT, FRAME: TIME, OFF: (52, 56, 68)}


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


def cleaned(frames: np.ndarray) -> np.ndarray:
    """Frames with what is no number, or outside of 0..1, as the nearest that can be drawn."""
    return np.nan_to_num(frames).clip(0, 1)


def overlay(video: np.ndarray, coverage: np.ndarray, shown: Sequence[int]) -> np.ndarray:
    """Frames `shown` of a video [frames, h, w, 3] in 0..1 with a tint over what was left out.

    Token-sized squares, as blue as the share of blocks that did not compute them: none is as it was.

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
    for place, index in enumerate(shown):
        sample, frame = divmod(index, each)
        latent = min(int(np.ceil(frame / stride)), latent_frames - 1)
        light = coverage[min(sample, len(coverage) - 1), latent]
        image = Image.fromarray((255 * light).astype(np.uint8))
        shade[place] = np.asarray(image.resize((width, height), Image.Resampling.NEAREST)) / 255
    veil = 0.6 * (1 - shade[..., None])
    return cleaned(video[list(shown)]) * (1 - veil) + LEFT_OUT * veil


def videos_in(frames: int, coverage: np.ndarray) -> int | None:
    """How many videos of the sampled length `frames` pixel frames are, or None where they do not fit.

    Args:
        coverage: as for `overlay`.
    """
    count, rest = divmod(frames, 4 * (coverage.shape[1] - 1) + 1)
    return count if rest == 0 and len(coverage) in (1, count) else None


def draw_report(record: Record, video: np.ndarray | None = None, title: str = "") -> Image.Image:
    """The report as a picture.

    Args:
        video: [frames, h, w, 3] in 0..1, gets the overlay.
        title: the first line, in place of the verdict of this run alone.
    """
    rows = [text_row(title or verdict([record]), 24, INK)]
    if record.steps:
        rows.append(text_row(steps_line(record), 17, FAINT))
    if video is not None and len(video):
        rows.append(_strip(video, record))
    if record.steps:
        rows += [_work_bars(record), _time_bars(record), _heat(record)]
    patterned = [step for step in record.steps if step.patterned and step.program.heads]
    if patterned:
        rows.append(_heads(patterned[-1], record.steps.index(patterned[-1]) + 1))
    return stacked([*rows, _notes(record), canvas(MARGIN)[0]])


def canvas(height: int, width: int = WIDTH) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), BACKGROUND)
    return image, ImageDraw.Draw(image)


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Rows of a page below each other."""
    page, _ = canvas(sum(row.height for row in rows))
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    return page


def small(frame: np.ndarray, width: int, height: int) -> Image.Image:
    """A frame [h, w, 3] in 0..1 of another size."""
    pixels = (255 * cleaned(frame)).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


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


def text_row(text: str, size: int, colour) -> Image.Image:
    """A text on the page, in as many lines as it needs."""
    font = font_of(size)
    lines = _lines(text, font)
    image, draw = canvas(round(1.35 * size * len(lines)) + 10)
    for number, line in enumerate(lines):
        draw.text((MARGIN, 8 + round(1.35 * size * number)), line, colour, font)
    return image


def _key(draw: ImageDraw.ImageDraw, top: int, said: str, *named: tuple) -> None:
    """A title, and behind it what its colours [3] in 0..255 are."""
    font, left = font_of(17), MARGIN
    draw.text((left, top), said, FAINT, font)
    left += font.getlength(said) + 18
    for colour, name in named:
        filled = tuple(round(float(one)) for one in colour)
        draw.rectangle((left, top + 4, left + 14, top + 18), filled, (90, 96, 108))
        draw.text((left + 20, top), name, INK, font)
        left += 20 + font.getlength(name) + 16


def _strip(video: np.ndarray, record: Record) -> Image.Image:
    """Frames of the video, and below them what was left out where it was by place."""
    shown = np.linspace(0, len(video) - 1, min(OVERLAY_FRAMES, len(video))).round().astype(int)
    found, strips, remark = record.coverage(), [video[shown]], ""
    if found is not None:
        coverage = found.numpy()
        strips.append(overlay(video, coverage, shown))
        videos = videos_in(len(video), coverage)
        if videos is None:
            # frames that were cut off or made afterwards, or a part of a batch
            remark = "Other frames were sampled, so the tint is misplaced."
        elif videos > 1:
            remark = f"{videos} videos, one behind the other."
    cell = (WIDTH - 2 * MARGIN) // len(shown) - 4
    # of a narrow strip something is left to see, and a high one does not fill the page
    height = min(max(round(cell * video.shape[1] / video.shape[2]), 1), 2 * WIDTH)
    top = 28 * len(strips[1:]) + 24 * bool(remark)
    image, draw = canvas(len(strips) * (height + 4) + 12 + top)
    if found is not None:
        count = sum(0 < step.kept_share < 1 for step in record.steps)
        steps = "the step" if count == 1 else f"the {count} steps"
        grey = np.full((1, 1, 1, 3), 0.65, np.float32)
        named = [
            (255 * overlay(grey, np.full((1, 1, 1, 1), share, np.float32), [0])[0, 0, 0], name)
            for share, name in ((1, "always"), (0.5, "half of it"), (0, "never"))
        ]
        _key(draw, 2, f"how often a place was computed, in {steps} on a part:", *named)
        draw.text((MARGIN, 26), remark, FAINT, font_of(17))
    for row, frames in enumerate(strips):
        for column, frame in enumerate(frames):
            place = (MARGIN + column * (cell + 4), top + row * (height + 4))
            image.paste(small(frame, cell, height), place)
    return image


def _work_bars(record: Record) -> Image.Image:
    work = [step_work(record, step) for step in record.steps]
    title = "work of each step, of a whole one's"
    if None in work:
        work, title = [step.kept_share for step in record.steps], "tokens computed in each step"
    return _bars(title, work, KEPT, [f"{value:.0%}" for value in work])


def _time_bars(record: Record) -> Image.Image:
    times, speed = [step.seconds for step in record.steps], measured_speed(record)
    title = f"seconds of each step: {min(times):.2f} to {max(times):.2f} s"
    whole = None if speed is None else speed.whole
    if speed is not None:
        title += f"; the line is a whole one, {whole:.2f} s"
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
    named = [
        (HEAT_LOW + share * (np.array(KEPT) - HEAT_LOW), name)
        for share, name in ((1, "all"), (0.5, "half"), (0, "none"))
    ]
    said = "tokens computed, blocks down and steps across:"
    return _field(said, cells, max(min(8 * blocks, 320), 64), named)


def _heads(step: Step, number: int) -> Image.Image:
    """The self-attention heads of every block as they ran in a step, alike beside alike."""
    plan, ran = step.program.heads, set(step.patterned)
    heads = [
        sorted(names if index in ran else [FULL] * len(names), key=PATTERNS.index)
        for index, names in enumerate(plan.self_attention)
    ]
    most = max(map(len, heads))
    cells = np.empty((most, len(heads), 3), np.float32)
    cells[:] = BACKGROUND
    for block, names in enumerate(heads):
        for head, name in enumerate(names):
            cells[head, block] = HEADS.get(name, TILE)
    named = ((KEPT, "full"), (TIME, "own frame"), (TILE, "tile"), (HEADS[OFF], "off"))
    said = f"heads in step {number}, blocks across:"
    return _field(said, cells, max(min(10 * most, 200), 60), named)


def _field(said: str, cells: np.ndarray, height: int, named) -> Image.Image:
    """A field of colours [rows, columns, 3] in 0..255 under its title and key."""
    image, draw = canvas(height + 36)
    _key(draw, 0, said, *named)
    field = Image.fromarray(cells.astype(np.uint8))
    image.paste(field.resize((WIDTH - 2 * MARGIN, height), Image.Resampling.NEAREST), (MARGIN, 26))
    return image


def _notes(record: Record) -> Image.Image:
    lines, font = [], font_of(17)
    for note in record.notes or ([NOTHING] if record.finished else []):
        first, *others = _lines(f"- {note}", font)
        lines += [first, *(f"  {line}" for line in others)]
    image, draw = canvas(34 + 22 * len(lines))
    draw.text((MARGIN, 6), "what did not happen, and why", FAINT, font)
    for index, line in enumerate(lines):
        draw.text((MARGIN, 30 + 22 * index), line, INK, font)
    return image
