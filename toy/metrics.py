"""What a toy video is worth against its prompt.

Videos are float arrays [frames, h, w, 3] in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .detector import read_scene


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
