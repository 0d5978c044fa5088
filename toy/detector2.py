"""Reads colour, shape, direction and camera back out of a video of the second toy world.

Objects are found by their hue. The camera is the motion out of a small set that takes the ground of
one pixel frame to that of a later one with the least left over, measured as the correlation of
what both show, which a change of the light does not lower. Directions are measured on the ground.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, grid_sample, max_pool2d

from .detector import MIN_PIXELS, SHAPE_AREA, SHAPE_CENTROID, Seen, every_object
from .render2 import Motion, times_of
from .world import DIRECTIONS, SHAPES, shape_distance
from .world2 import CAMERAS, COLOURS, Scene

# share of a colour's own chroma from which a pixel is of that colour
CHROMA_SHARE = 0.36
# the ground is compared in pictures that are so many times smaller
REDUCE = 4
# distances in time, in pixel frames, at which the ground is compared
GAPS = (2, 5, 9)
# the slowest and fastest camera that is looked for, and how many between
PAN_SPEEDS = np.linspace(0.5, 4.5, 9)
ZOOM_RATES = np.linspace(0.006, 0.040, 8)
# a video whose ground no motion explains has no camera
LEAST_CORRELATION = 0.3


@dataclass(frozen=True)
class SeenOnGround(Seen):
    """One object; `velocity` (x, y) is on the ground, in pixels per pixel_frame."""

    velocity: np.ndarray


@dataclass(frozen=True)
class Camera:
    """What the camera does in the grammar's words, how, and how well that explains the ground."""

    name: str
    motion: Motion
    correlation: float


def classify_pixels(video: np.ndarray) -> np.ndarray:
    """Index of each pixel's object colour, -1 for the ground; video [f, h, w, 3] in 0..1."""
    palette = np.array(list(COLOURS.values()), np.float32)
    palette -= palette.mean(1, keepdims=True)
    strength = np.linalg.norm(palette, axis=1)
    # along each colour's chroma, over its own strength; gray has none
    along = video @ (palette / strength[:, None]).T
    nearest = along.argmax(-1)
    return np.where(along.max(-1) > CHROMA_SHARE * strength[nearest], nearest, -1)


def find_camera(video: np.ndarray, classes: np.ndarray | None = None) -> Camera | None:
    """What the camera does in a video [f, h, w, 3]; None when no motion explains the ground.

    Args:
        classes: of `classify_pixels`, if they are known.
    """
    classes = classify_pixels(video) if classes is None else classes
    gray = torch.from_numpy(np.ascontiguousarray(video.mean(-1)))[:, None]
    objects = torch.from_numpy((classes >= 0).astype(np.float32))[:, None]
    small = avg_pool2d(gray, REDUCE)
    ground = (max_pool2d(objects, REDUCE + 2, REDUCE, 1) == 0).float()
    ground = ground[:, :, : small.shape[2], : small.shape[3]]
    both = torch.cat([small, ground], 1)
    candidates = [("holds", 0.0)]
    candidates += [(name, s) for name in CAMERAS if "pans" in name for s in PAN_SPEEDS]
    candidates += [(name, r) for name in CAMERAS if "zooms" in name for r in ZOOM_RATES]
    scores = _correlations(both, [_motion(*c) for c in candidates])
    name, speed = candidates[int(np.argmax(scores))]
    finer = [speed]
    if name != "holds":
        steps = PAN_SPEEDS if "pans" in name else ZOOM_RATES
        finer = speed + (steps[1] - steps[0]) * np.linspace(-0.5, 0.5, 5)
    motions = [_motion(name, value) for value in finer]
    scores = _correlations(both, motions)
    best = int(np.argmax(scores))
    if scores[best] < LEAST_CORRELATION:
        return None
    return Camera(name, motions[best], float(scores[best]))


def _motion(name: str, speed: float) -> Motion:
    x, y, growth = CAMERAS[name]
    return Motion(np.array([x, y]) * speed, growth * speed)


def _correlations(both: torch.Tensor, motions: list[Motion]) -> np.ndarray:
    """Correlation of the ground with itself later, per motion: mean over gaps and pairs.

    Args:
        both: brightness and ground mask [f, 2, h, w] of the smaller pictures.
    """
    frames, _, height, width = both.shape
    size = torch.tensor([width, height], dtype=torch.float32)
    axes = torch.arange(height), torch.arange(width)
    y, x = (axis.float() for axis in torch.meshgrid(*axes, indexing="ij"))
    offset = torch.stack([x, y], -1) - (size - 1) / 2
    totals = np.zeros(len(motions))
    gaps = [gap for gap in GAPS if gap < frames]
    for gap in gaps:
        first = torch.arange(0, frames - gap, 2)
        now, later = both[first], both[first + gap]
        # where every pixel of the earlier picture is in the later one, as grid_sample counts
        grids = [
            ((offset - torch.from_numpy(m.pan).float() * gap / REDUCE) * np.exp(m.rate * gap))
            * 2 / size
            for m in motions
        ]  # fmt: skip
        for index, grid in enumerate(grids):
            moved = grid_sample(later, grid.expand(len(first), -1, -1, -1), align_corners=False)
            weight = now[:, 1] * (moved[:, 1] > 0.99)
            totals[index] += float(_weighted_correlation(now[:, 0], moved[:, 0], weight).mean())
    return totals / max(len(gaps), 1)


def _weighted_correlation(a, b, weight) -> torch.Tensor:
    """Pearson correlation [t] of pictures [t, h, w] over the pixels that count."""
    total = weight.sum((1, 2)).clamp(min=1)

    def mean(values):
        return (weight * values).sum((1, 2)) / total

    da, db = a - mean(a)[:, None, None], b - mean(b)[:, None, None]
    spread = torch.sqrt(mean(da * da) * mean(db * db)).clamp(min=1e-6)
    return mean(da * db) / spread * (total > weight[0].numel() / 8)


def find_object(
    classes: np.ndarray, camera: Camera | None, colour: str | None = None
) -> SeenOnGround | None:
    """One object of `classify_pixels`' classes [f, h, w]: `colour`'s, or the largest.

    Pixel frames in which another object is close count less. Without a camera the direction is
    that in the picture.

    Returns None when no colour covers enough pixels in at least half of the frames.
    """
    names = list(COLOURS)
    counts = np.stack([(classes == i).sum((1, 2)) for i in range(len(names))], 1)
    index = names.index(colour) if colour else int(np.median(counts, 0).argmax())
    seen = np.flatnonzero(counts[:, index] >= MIN_PIXELS)
    if len(seen) < max(len(classes) / 2, 2):
        return None
    masks = [_Mask(classes[frame], index) for frame in seen]
    free = np.array([mask.free for mask in masks])
    # the freest third at least, all that are nearly as free
    keep = free >= min(np.quantile(free, 0.67), 0.97)
    kept = [mask for mask, use in zip(masks, keep, strict=True) if use]
    path = np.array([mask.centre for mask in kept])
    size = np.array([classes.shape[2], classes.shape[1]])
    times = times_of(len(classes))[seen[keep]]
    if camera is not None:
        path = camera.motion.to_ground(path, times, (size - 1) / 2)
    velocity = np.polyfit(times, path, 1)[0] if len(times) > 1 else np.zeros(2)
    direction = max(DIRECTIONS, key=lambda d: float(velocity @ np.array(DIRECTIONS[d])))
    scores = {s: float(np.mean([mask.overlap(s) for mask in kept])) for s in SHAPES}
    return SeenOnGround(names[index], max(scores, key=scores.get), direction, scores, velocity)


class _Mask:
    """One object in one pixel frame, cut out with a margin."""

    def __init__(self, classes: np.ndarray, index: int):
        ys, xs = np.nonzero(classes == index)
        # a few stray pixels must not stretch the cut
        x0, x1 = np.quantile(xs, (0.01, 0.99)).astype(int) + (0, 1)
        y0, y1 = np.quantile(ys, (0.01, 0.99)).astype(int) + (0, 1)
        margin = max(x1 - x0, y1 - y0) // 4 + 3
        y0, x0 = max(y0 - margin, 0), max(x0 - margin, 0)
        cut = classes[y0 : y1 + margin, x0 : x1 + margin]
        self.mask = cut == index
        self.others = (cut >= 0) & ~self.mask
        self.area = float(self.mask.sum())
        self.free = 1 - self.others.sum() / self.area
        y, x = np.nonzero(self.mask)
        self.local = np.array([x.mean(), y.mean()])
        self.centre = self.local + (x0, y0)

    def overlap(self, shape: str) -> float:
        """Intersection over union with a shape of the same area and centre of mass."""
        height, width = self.mask.shape
        radius = np.sqrt(self.area / SHAPE_AREA[shape])
        x = np.arange(width)[None, :] - self.local[0]
        y = np.arange(height)[:, None] - self.local[1] + SHAPE_CENTROID[shape] * radius
        template = (shape_distance(shape, x, y, radius) < 0) & ~self.others
        return float((self.mask & template).sum() / max((self.mask | template).sum(), 1))


def read_scene(video: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Whether a video [f, h, w, 3] in 0..1 shows what the scene says; every object has to."""
    video = np.asarray(video, np.float32)
    classes = classify_pixels(video)
    camera = find_camera(video, classes)
    row = every_object(scene, lambda colour: find_object(classes, camera, colour))
    return row | {"camera_ok": camera is not None and camera.name == scene.camera}
