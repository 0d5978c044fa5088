"""Reads colour, shape, direction and speed back out of a toy video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SPEEDS,
    STRIPE_DEPTH,
    Scene,
    shape_distance,
)

# area of each shape in units of radius squared
SHAPE_AREA = {"circle": np.pi, "square": 2.89, "triangle": 1.71, "cross": 2.2576}
# centre of mass of each shape below its centre, in units of radius
SHAPE_CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 0.2, "cross": 0.0}
MIN_PIXELS = 40
# pixels per pixel_frame below which an object has no direction
MIN_SPEED = 0.25 * min(SPEEDS.values())
# what a prompt says of an object
WORDS = ("colour", "shape", "direction")


@dataclass(frozen=True)
class Seen:
    """One object. `shape_scores` are intersection over union with each shape's template."""

    colour: str
    shape: str
    direction: str
    shape_scores: dict[str, float]

    def matches(self, obj) -> dict[str, bool]:
        """What of an object of a scene was seen as the scene says it."""
        return {f"{name}_ok": getattr(self, name) == getattr(obj, name) for name in WORDS}


@dataclass(frozen=True)
class Detection(Seen):
    """One object of the first world; its speed in pixels per pixel_frame, its path [t, 2]."""

    speed: float
    path: np.ndarray

    def matches(self, obj) -> dict[str, bool]:
        row = super().matches(obj)
        # the nearest direction is found for what stands still, too
        return row | {"direction_ok": row["direction_ok"] and self.speed >= MIN_SPEED}


def every_object(scene, find: Callable[[str | None], Seen | None]) -> dict[str, bool]:
    """What is right of all objects of a scene: colour_ok, shape_ok and direction_ok.

    Args:
        find: looks for an object of a colour, or for the largest one where the scene has only one.
    """
    row = {f"{name}_ok": True for name in WORDS}
    for obj in scene.objects:
        seen = find(obj.colour if len(scene.objects) > 1 else None)
        matches = seen.matches(obj) if seen else dict.fromkeys(row, False)
        row = {key: row[key] and matches[key] for key in row}
    return row


def read_scene(video: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Whether a video [f, h, w, 3] in 0..1 shows what the scene says; every object has to."""
    return every_object(scene, lambda colour: detect(video, colour))


def classify_pixels(video: np.ndarray) -> np.ndarray:
    """Index of the nearest object colour per pixel, -1 for background; video [f, h, w, 3] in 0..1."""
    palette = list(COLOURS.values())
    dark = STRIPE_DEPTH
    grounds = list(BACKGROUNDS.values())
    grounds += [tuple(c + s * dark for c in BACKGROUNDS["striped"]) for s in (-1, 1)]
    colours = np.array(palette + grounds, np.float32)
    # |a-b|^2 without |a|^2, which is the same for every colour
    scores = video @ (-2 * colours.T) + (colours**2).sum(1)
    nearest = scores.argmin(-1)
    return np.where(nearest < len(palette), nearest, -1)


def detect(video: np.ndarray, colour: str | None = None) -> Detection | None:
    """Find one object in a video [f, h, w, 3] (0..1): `colour`'s, or the largest.

    Returns None when no colour covers enough pixels in at least half of the frames.
    """
    video = np.asarray(video, np.float32)
    classes = classify_pixels(video)
    names = list(COLOURS)
    counts = np.stack([(classes == i).sum((1, 2)) for i in range(len(names))], 1)
    index = names.index(colour) if colour else int(np.median(counts, 0).argmax())
    seen = np.flatnonzero(counts[:, index] >= MIN_PIXELS)
    if len(seen) < max(len(video) / 2, 2):
        return None
    masks = classes[seen] == index
    area = masks.sum((1, 2)).astype(np.float64)
    ys, xs = np.arange(video.shape[1]), np.arange(video.shape[2])
    path = np.stack([(masks.sum(1) @ xs) / area, (masks.sum(2) @ ys) / area], 1)
    velocity = np.polyfit(seen, path, 1)[0]
    direction = max(DIRECTIONS, key=lambda d: float(velocity @ np.array(DIRECTIONS[d])))
    shape_scores = {s: _template_iou(s, masks, area, path, xs, ys) for s in SHAPES}
    shape = max(shape_scores, key=shape_scores.get)
    speed = float(np.linalg.norm(velocity))
    return Detection(names[index], shape, direction, shape_scores, speed, path)


def _template_iou(shape, masks, area, path, xs, ys) -> float:
    ious = []
    for mask, pixels, (cx, cy) in zip(masks, area, path, strict=True):
        radius = np.sqrt(pixels / SHAPE_AREA[shape])
        y = ys[:, None] - (cy - SHAPE_CENTROID[shape] * radius)
        template = shape_distance(shape, xs[None, :] - cx, y, radius) < 0
        ious.append((mask & template).sum() / max((mask | template).sum(), 1))
    return float(np.mean(ious))
