"""A trimmed video beside the whole one of the same seed: numbers, a verdict, pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image

from .picture import FAINT, INK, MARGIN, WIDTH, canvas, font_of, small, text_row
from .video_metrics import SSIM_WINDOW, calm_places, flicker, motion, motion_ratio, psnr, ssim

# pixel columns between the two videos
GAP = 4
SHOWN = 6
# the verdict's words by PSNR in dB, from the best
CLOSENESS = (
    (40, "Very close to the whole video"),
    (30, "Close to the whole video, with differences in detail"),
    (20, "Clearly another rendering of the same video"),
    (-math.inf, "Another video than the whole one"),
)
# motion ratio within which nothing is said of it
MOTION = (0.85, 1.18)
# flicker that is said: times the dense video's, and in shades of 255
FLICKER_TIMES, FLICKER_LEAST = 1.5, 0.5 / 255


@dataclass(frozen=True)
class Comparison:
    """What the trimmed video is beside the whole one.

    Args:
        psnr_db: infinite for equal videos.
        frame_psnr_db: of every pixel frame.
        flicker: change over time in the half of the places that is calmest in the whole one.
    """

    psnr_db: float
    ssim: float
    motion: float
    dense_motion: float
    flicker: float
    dense_flicker: float
    frame_psnr_db: tuple[float, ...]

    @property
    def motion_ratio(self) -> float:
        return motion_ratio(self.motion, self.dense_motion)

    @property
    def worst(self) -> int:
        """Pixel frame that differs most, from 0."""
        return min(range(len(self.frame_psnr_db)), key=self.frame_psnr_db.__getitem__)

    def verdict(self) -> str:
        """One plain sentence, or two."""
        if self.psnr_db == math.inf:
            return "The two videos are equal in every pixel."
        closeness = next(words for least, words in CLOSENESS if self.psnr_db >= least)
        said = f"{closeness} (PSNR {self.psnr_db:.1f} dB, SSIM {self.ssim:.3f})"
        if len(self.frame_psnr_db) == 1:
            # one picture does not move
            return f"{said}."
        ratio, remarks = self.motion_ratio, []
        if ratio == math.inf:
            remarks.append("it moves where the whole one stands still")
        elif not MOTION[0] <= ratio <= MOTION[1]:
            more = "more" if ratio > 1 else "less"
            remarks.append(f"it moves {more} ({ratio:.2f} x the motion)")
        added = self.flicker - self.dense_flicker
        if added > FLICKER_LEAST and self.flicker > FLICKER_TIMES * self.dense_flicker:
            remarks.append("calm places flicker more")
        worst = self.frame_psnr_db[self.worst]
        if worst < self.psnr_db - 6:
            remarks.append(f"frame {self.worst + 1} is far worse than the rest ({worst:.1f} dB)")
        told = "; ".join(remarks) or "motion and flicker are the whole one's"
        return f"{said}: {told}."

    def json(self) -> dict:
        """The numbers; null stands for infinite, which JSON has not."""
        numbers = {**asdict(self), "motion_ratio": self.motion_ratio}
        frames = numbers.pop("frame_psnr_db")
        return {
            "format": 1,
            "verdict": self.verdict(),
            "equal": self.psnr_db == math.inf,
            **{name: _finite(value) for name, value in numbers.items()},
            "worst_frame": self.worst,
            "frame_psnr_db": list(map(_finite, frames)),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def why_not(video: torch.Tensor, whole: torch.Tensor | None = None) -> str | None:
    """What keeps a video [pixel_frames, h, w, 3] from being compared, behind its name, or None.

    Args:
        whole: that it is to be beside; None for the whole one itself.
    """
    if not video.isfinite().all():
        return "holds values that are no numbers"
    if min(video.shape[1:3]) < SSIM_WINDOW:
        return f"is smaller than {SSIM_WINDOW}x{SSIM_WINDOW}"
    if whole is not None and video.shape != whole.shape:
        return f"is {_size(video)}, the whole one {_size(whole)}"
    return None


def _size(video: torch.Tensor) -> str:
    frames, height, width = video.shape[:3]
    return f"{frames} {'frame' if frames == 1 else 'frames'} of {width}x{height}"


def compare(
    dense: torch.Tensor, trimmed: torch.Tensor, tick: Callable[[], None] = lambda: None
) -> Comparison:
    """The figures of two videos [pixel_frames, h, w, 3] in 0..1 of one size.

    Args:
        tick: called behind each pixel frame; what it raises ends the comparison.
    """
    calm, near, alike = calm_places(dense), [], []
    for one, other in zip(trimmed[:, None], dense[:, None], strict=True):
        near.append(psnr(one, other))
        alike.append(ssim(one, other))
        tick()
    return Comparison(
        psnr(trimmed, dense),
        statistics.fmean(alike),
        motion(trimmed),
        motion(dense),
        flicker(trimmed, calm),
        flicker(dense, calm),
        tuple(near),
    )


def side_by_side(dense: torch.Tensor, trimmed: torch.Tensor) -> torch.Tensor:
    """Dense on the left, trimmed on the right [pixel_frames, h, 2 w + GAP, 3]."""
    frames, height, _, channels = dense.shape
    between = dense.new_ones(frames, height, GAP, channels)
    return torch.cat([dense, between, trimmed], dim=2)


def draw_difference(dense: torch.Tensor, trimmed: torch.Tensor, found: Comparison) -> Image.Image:
    """Frames of both and, amplified, where they differ; the worst frame is among them."""
    count = len(dense)
    spread = np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int).tolist()
    if found.worst not in spread:
        nearest = min(range(len(spread)), key=lambda i: abs(spread[i] - found.worst))
        spread[nearest] = found.worst
    one, other = (video[spread].cpu().float().clamp(0, 1).numpy() for video in (dense, trimmed))
    apart = np.abs(one - other).max(-1)
    # of all frames shown, so that they can be compared; a shade of 255 at the least
    most = max(float(np.quantile(apart, 0.999)), 1 / 255)
    # 0..1 as black, red, yellow, white
    glow = (3 * (apart / most).clip(0, 1)[..., None] - np.arange(3)).clip(0, 1)
    white = f"difference; white is {most:.1%} of the range or more"
    rows = (("whole", one), ("trimmed", other), (white, glow))
    # a single picture need not fill the page
    cell = min((WIDTH - 2 * MARGIN) // len(spread) - 4, 320)
    height = max(round(cell * dense.shape[1] / dense.shape[2]), 1)
    title = text_row(found.verdict(), 24, INK)
    begin = title.height
    image, draw = canvas(begin + len(rows) * (height + 26) + 22)
    image.paste(title, (0, 0))
    for row, (name, frames) in enumerate(rows):
        top = begin + row * (height + 26)
        draw.text((MARGIN, top), name, FAINT, font_of(15))
        for column, frame in enumerate(frames):
            image.paste(small(frame, cell, height), (MARGIN + column * (cell + 4), top + 20))
    for column, frame in enumerate(spread):
        worst = " (worst)" if frame == found.worst and found.psnr_db != math.inf else ""
        place = (MARGIN + column * (cell + 4), begin + len(rows) * (height + 26))
        draw.text(place, f"frame {frame + 1}{worst}", FAINT, font_of(14))
    return image
