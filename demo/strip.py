"""A picture of what was gained: frames of the whole and of the trimmed video, and the work of each step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# large letters: ComfyUI's list of templates shows the picture at 264 pixels
WIDTH, MARGIN, GAP = 640, 16, 6
CAPTION, SAID, MARK = 30, 28, 22
BARS = 84
# ComfyUI's list lays the template's kind over the corner on the left
TOP = 58
BACKGROUND, INK, FAINT = (24, 26, 31), (235, 238, 244), (165, 171, 183)
DONE, LEFT_OUT = (92, 184, 122), (52, 57, 68)
TEST_BENCH = "tiny Wan, test bench"


def draw_strip(
    rows: Sequence[tuple[str, np.ndarray]], said: str, work: Sequence[float] = (), frames: int = 4
) -> Image.Image:
    """Rows of frames under their captions, then `said` and a bar for each step.

    Args:
        rows: caption and video [pixel_frames, h, w, 3] in 0..1.
        work: of each step, over a step of the whole model.
        frames: shown of each video, spread evenly.
    """
    cell = (WIDTH - 2 * MARGIN - (frames - 1) * GAP) // frames
    row_height = CAPTION + 10 + cell + GAP
    bars = BARS + GAP if work else 0
    height = TOP + len(rows) * row_height + SAID + 12 + bars + MARGIN
    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(MARK)
    draw.text((WIDTH - MARGIN, TOP / 2), TEST_BENCH, FAINT, font, anchor="rm")
    top = TOP
    for caption, video in rows:
        draw.text((MARGIN, top), caption, INK, ImageFont.load_default(CAPTION))
        shown = np.linspace(0, len(video) - 1, frames).round().astype(int)
        for place, frame in enumerate(video[shown]):
            picture = Image.fromarray((255 * frame.clip(0, 1)).astype(np.uint8))
            at = (MARGIN + place * (cell + GAP), top + CAPTION + 10)
            image.paste(picture.resize((cell, cell), Image.Resampling.BICUBIC), at)
        top += row_height
    draw.text((MARGIN, top + 4), said, DONE, ImageFont.load_default(SAID))
    if work:
        _bars(draw, work, top + SAID + 12)
    return image


def _bars(draw: ImageDraw.ImageDraw, work: Sequence[float], top: int) -> None:
    slot = (WIDTH - 2 * MARGIN) / len(work)
    for index, share in enumerate(work):
        left = MARGIN + index * slot
        right = left + max(slot - 4, 1)
        draw.rectangle((left, top, right, top + BARS), LEFT_OUT)
        draw.rectangle((left, top + round(BARS * (1 - min(share, 1))), right, top + BARS), DONE)


def draw_beside(whole: np.ndarray, trimmed: np.ndarray, work: Sequence[float]) -> Image.Image:
    """Both videos [pixel_frames, h, w, 3] and what each step of the trimmed one cost."""
    share = sum(work) / len(work)
    rows = [
        (f"whole model, {len(work)} steps", whole),
        (f"WanTrim: {share:.0%} of the work", trimmed),
    ]
    return draw_strip(rows, f"{steps_in_words(work)}:", work)


def steps_in_words(work: Sequence[float]) -> str:
    """How many steps were whole, partial and repeated: "12 steps whole, 6 in part, 2 repeated"."""
    repeated = sum(share < 0.01 for share in work)
    partial = sum(0.01 <= share < 0.99 for share in work)
    whole = len(work) - repeated - partial
    parts = [f"{whole} {'step' if whole == 1 else 'steps'} whole"]
    parts += [f"{partial} in part"] if partial else []
    parts += [f"{repeated} repeated"] if repeated else []
    return ", ".join(parts)
