"""What a toy video is worth: against its prompt, and against the dense video of the same seed.

Videos are float arrays [frames, h, w, 3] in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .detector import classify_pixels, detect
from .world import Scene


def adherence(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of the videos whose colour, shape and direction are those of the prompt's object.

    With several objects, every one of them has to be right.
    """
    rows = []
    for video, scene in zip(videos, scenes, strict=True):
        row = dict.fromkeys(("colour_ok", "shape_ok", "direction_ok"), True)
        for obj in scene.objects:
            seen = detect(video, obj.colour if len(scene.objects) > 1 else None)
            matches = seen.matches(obj) if seen else dict.fromkeys(row, False)
            row = {key: row[key] and matches[key] for key in row}
        rows.append(row)
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal videos."""
    error = float(np.mean((video.astype(np.float64) - reference) ** 2))
    return float("inf") if error == 0 else -10 * np.log10(error)


def motion(video: np.ndarray) -> float:
    """Mean absolute change from one pixel frame to the next."""
    return float(np.abs(np.diff(video, axis=0)).mean())


def flicker(video: np.ndarray) -> float:
    """Mean absolute change over time of the pixels that are background in both frames."""
    ground = classify_pixels(video) < 0
    still = ground[1:] & ground[:-1]
    change = np.abs(np.diff(video, axis=0)).mean(-1)
    return float(change[still].mean()) if still.any() else 0.0
