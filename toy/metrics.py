"""What a toy video is worth against its prompt, and where it stands still.

Videos are float arrays [frames, h, w, 3] in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .detector import classify_pixels, read_scene


def adherence(
    videos: Sequence[np.ndarray], scenes: Sequence, read: Callable = read_scene
) -> dict[str, float]:
    """Share of the videos whose colour, shape and direction are those of the prompt's object.

    With several objects, every one of them has to be right.

    Args:
        read: (video, scene) -> what is right, by name; of the scenes' world.
    """
    rows = [read(video, scene) for video, scene in zip(videos, scenes, strict=True)]
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def still_ground(video: np.ndarray) -> np.ndarray:
    """Pixels that are background in a pixel frame and the next, bool [frames - 1, h, w]."""
    ground = classify_pixels(video) < 0
    return ground[1:] & ground[:-1]
