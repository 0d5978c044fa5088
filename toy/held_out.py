"""Scenes of the toy worlds that training never sees, for what samples or measures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .world import Scene, random_scene

# draws without a new held-out scene after which there is none left
MAX_MISSES = 20_000


def held_out_scenes(
    count: int, seed: int = 0, num_objects: int = 1, draw: Callable = random_scene
) -> list[Scene]:
    """`count` different scenes that training never saw, always the same ones for a seed.

    Args:
        draw: makes a scene of a generator and a number of objects.

    Raises:
        ValueError: there are not so many (111 with one object).
    """
    rng = np.random.default_rng([seed, num_objects, 7])
    scenes: dict[str, Scene] = {}
    misses = 0
    while len(scenes) < count:
        scene = draw(rng, num_objects)
        if scene.held_out and scene.prompt() not in scenes:
            scenes[scene.prompt()], misses = scene, 0
        elif (misses := misses + 1) > MAX_MISSES:
            raise ValueError(
                f"count: found only {len(scenes)} held-out scenes of {num_objects} objects, got {count}"
            )
    return list(scenes.values())
