"""Draws the second toy world. Textures are sums of plane waves no shorter than 16 pixels.

A plane wave over a picture that only shifts and grows is a sum of two outer products, so grounds
and light are one small matrix product a pixel frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .world import DIRECTIONS, shape_distance
from .world2 import CAMERAS, COLOURS, HEIGHT, PIXEL_FRAMES, WIDTH, Object, Scene

# radius of the largest extent, in pixels, at the middle of the video
RADIUS_RANGE = (14.0, 28.0)
# pixels per pixel_frame over the ground
OBJECT_SPEEDS = (1.0, 2.8)
# slowly and fast; pixels per pixel_frame, and growth per pixel_frame (natural logarithm)
PAN_SPEEDS = ((0.8, 1.6), (2.4, 4.0))
ZOOM_RATES = ((0.008, 0.014), (0.024, 0.036))
# what is drawn again when paths do not fit into the picture or objects hide each other
TRIES = 24
# of the ground: low saturation and middle brightness, because objects are found by their hue
GROUND_VALUE = (0.32, 0.58)
GROUND_TINT = 0.05
GROUND_DEPTH = (0.08, 0.17)
GROUND_WAVELENGTHS = (32.0, 96.0)
OBJECT_DEPTH = (0.10, 0.22)
OBJECT_WAVELENGTHS = (16.0, 34.0)
# change of the light from the first to the last pixel_frame, and its unevenness
LIGHT_DRIFT = 0.30
LIGHT_DEPTH = 0.10


@dataclass(frozen=True)
class Motion:
    """A camera: the picture's place on the ground, linear in time about the middle of the video.

    Args:
        pan: of the view over the ground, pixels per pixel_frame (x, y).
        rate: growth of the picture per pixel_frame, natural logarithm.
    """

    pan: np.ndarray
    rate: float

    def scale(self, times: np.ndarray) -> np.ndarray:
        return np.exp(self.rate * times)

    def to_picture(self, place: np.ndarray, times: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Where places [t, 2] on the ground are seen, at times [t] from the middle."""
        return centre + self.scale(times)[:, None] * (place - times[:, None] * self.pan - centre)

    def to_ground(self, seen: np.ndarray, times: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Inverse of `to_picture`."""
        return centre + (seen - centre) / self.scale(times)[:, None] + times[:, None] * self.pan


def draw_motion(camera: str, rng: np.random.Generator) -> Motion:
    """A motion that the words `camera` describe, slow or fast."""
    x, y, growth = CAMERAS[camera]
    fast = int(rng.integers(2))
    speed, rate = rng.uniform(*PAN_SPEEDS[fast]), rng.uniform(*ZOOM_RATES[fast])
    return Motion(np.array([x, y]) * speed, growth * rate)


def times_of(pixel_frames: int) -> np.ndarray:
    """Times of pixel frames from the middle of the video, in pixel frames."""
    return np.arange(pixel_frames) - (pixel_frames - 1) / 2


def render(
    scene: Scene,
    rng: np.random.Generator,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> np.ndarray:
    """Video [PIXEL_FRAMES, height, width, 3], float32 in 0..1.

    What the scene leaves open is drawn from `rng`. Objects stay inside the picture and are seen for
    most of the video as far as the picture is large enough for it.
    """
    times, size = times_of(PIXEL_FRAMES), np.array([width, height])
    motion, paths, radii = _place(scene, rng, times, size)
    video = _ground(rng, motion, times, width, height)
    scale = motion.scale(times)
    for index in rng.permutation(len(scene.objects)):
        _draw(video, scene.objects[index], paths[index], radii[index] * scale, scale, rng)
    video *= _light(rng, times, width, height)[..., None]
    return np.clip(video, 0, 1, out=video)


def _place(scene, rng, times, size):
    """Camera, paths [t, 2] in the picture and radii of a draw that fits, or of the last one."""
    centre = (size - 1) / 2
    for _ in range(TRIES):
        motion, fits, paths = draw_motion(scene.camera, rng), True, []
        radii = rng.uniform(*RADIUS_RANGE, size=len(scene.objects))
        for obj, radius in zip(scene.objects, radii, strict=True):
            velocity = np.array(DIRECTIONS[obj.direction]) * rng.uniform(*OBJECT_SPEEDS)
            moved = times[:, None] * velocity
            scale = motion.scale(times)[:, None]
            # where the object may stand in the middle, for the picture's edges at every time
            low = (motion.to_ground(np.zeros(2), times, centre) + radius - moved).max(0)
            high = (motion.to_ground(size - 1.0, times, centre) - radius - moved).min(0)
            fits &= bool((low <= high).all())
            middle = np.where(low < high, rng.uniform(low, np.maximum(low, high)), (low + high) / 2)
            paths.append(centre + scale * (middle + moved - times[:, None] * motion.pan - centre))
        if fits and not _hidden(paths, radii):
            break
    return motion, paths, radii


def _hidden(paths, radii) -> bool:
    """Two objects are in each other's way for more than half of the video."""
    for one in range(len(paths)):
        for other in range(one):
            apart = np.linalg.norm(paths[one] - paths[other], axis=1)
            if (apart < radii[one] + radii[other]).mean() > 0.5:
                return True
    return False


def _waves(rng: np.random.Generator, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Wave vectors [n, 2] in radians per pixel and amplitudes [n] of a ground.

    Every kind has waves of several directions: one direction alone would not show which way a
    picture shifts.
    """
    if kind == 0:
        # a weave: two crossed waves
        angles = rng.uniform(0, np.pi) + np.array([0, np.pi / 2]) + rng.uniform(-0.3, 0.3, 2)
        amplitudes = rng.uniform(0.7, 1.0, 2)
    elif kind == 1:
        # blobs: waves of all directions
        angles = np.arange(6) * np.pi / 6 + rng.uniform(-0.25, 0.25, 6)
        amplitudes = rng.uniform(0.3, 0.7, 6)
    else:
        # ripples: one strong wave that two others break up
        angles = rng.uniform(0, np.pi) + np.array([0, 1.1, 2.1]) + rng.uniform(-0.2, 0.2, 3)
        amplitudes = np.array([0.8, 0.5, 0.5])
    length = np.exp(rng.uniform(*np.log(GROUND_WAVELENGTHS), size=len(angles)))
    vectors = 2 * np.pi / length[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    return vectors, amplitudes


def _wave_sum(vectors, amplitudes, phases, xs, ys) -> np.ndarray:
    """Sum of waves [t, h, w] for coordinates xs [t, w] and ys [t, h], float32."""
    across = xs[:, None] * vectors[:, 0, None] + phases[:, None]
    down = ys[:, None] * vectors[:, 1, None]
    rows = np.concatenate([np.cos(down), np.sin(down)], 1) * np.tile(amplitudes, 2)[:, None]
    columns = np.concatenate([np.sin(across), np.cos(across)], 1)
    return rows.transpose(0, 2, 1).astype(np.float32) @ columns.astype(np.float32)


def _ground(rng, motion: Motion, times, width: int, height: int) -> np.ndarray:
    vectors, amplitudes = _waves(rng, int(rng.integers(3)))
    phases = rng.uniform(0, 2 * np.pi, len(vectors))
    centre = np.array([width - 1, height - 1]) / 2
    corner = motion.to_ground(np.zeros((len(times), 2)), times, centre)
    step = 1 / motion.scale(times)[:, None]
    xs = corner[:, :1] + step * np.arange(width)
    ys = corner[:, 1:] + step * np.arange(height)
    wave = _wave_sum(vectors, amplitudes, phases, xs, ys)
    # half of the grounds have patches with soft edges, half soft waves
    if rng.integers(2):
        wave = np.tanh(2 * wave)
    base = rng.uniform(*GROUND_VALUE) + rng.uniform(-GROUND_TINT, GROUND_TINT, 3)
    depth = rng.uniform(*GROUND_DEPTH) + rng.uniform(-GROUND_TINT, GROUND_TINT, 3) / 2
    video = np.empty((*wave.shape, 3), np.float32)
    for channel in range(3):
        np.multiply(wave, np.float32(depth[channel]), out=video[..., channel])
        video[..., channel] += np.float32(base[channel])
    return video


def _light(rng, times, width: int, height: int) -> np.ndarray:
    """Factor [t, h, w]: a lamp that brightens or dims while its uneven light moves on."""
    drift = rng.uniform(-LIGHT_DRIFT, LIGHT_DRIFT) / 2
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(250, 500)
    vector = 2 * np.pi / length * np.array([[np.cos(angle), np.sin(angle)]])
    shift = times[:, None] * rng.uniform(0, 3)
    shape = len(times), 1
    xs = np.broadcast_to(np.arange(width), (len(times), width)) + shift * vector[0, 0]
    ys = np.broadcast_to(np.arange(height), (len(times), height)) + shift * vector[0, 1]
    depth = np.array([rng.uniform(0, LIGHT_DEPTH)])
    uneven = _wave_sum(vector, depth, rng.uniform(0, 2 * np.pi, 1), xs, ys)
    level = 1 + drift * times / max(abs(times[0]), 1)
    return uneven + level.reshape(*shape, 1).astype(np.float32)


def _draw(video, obj: Object, path, radius, scale, rng) -> None:
    """Draw an object with path [t, 2] and radius [t] into a video, and a texture that goes along."""
    frames, height, width, _ = video.shape
    reach = int(radius.max()) + 2
    corner = np.floor(path).astype(int) - reach
    span = np.arange(2 * reach + 2)
    x = (corner[:, :1] + span - path[:, :1]).astype(np.float32)
    y = (corner[:, 1:] + span - path[:, 1:]).astype(np.float32)
    distance = shape_distance(
        obj.shape, x[:, None, :], y[:, :, None], radius[:, None, None].astype(np.float32)
    )
    cover = np.clip(0.5 - distance, 0, 1).astype(np.float32)[..., None]
    texture = 1 + _object_waves(rng, x / scale[:, None], y / scale[:, None])
    fill = texture[..., None] * np.array(COLOURS[obj.colour], np.float32)
    for index in range(frames):
        left, top = corner[index]
        x0, x1 = max(left, 0), min(left + len(span), width)
        y0, y1 = max(top, 0), min(top + len(span), height)
        if x0 >= x1 or y0 >= y1:
            continue
        inside = index, slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
        patch = video[index, y0:y1, x0:x1]
        patch += cover[inside] * (fill[inside] - patch)


def _object_waves(rng, xs, ys) -> np.ndarray:
    """Stripes or a weave [t, h, w] about 0."""
    count = int(rng.integers(1, 3))
    angles = rng.uniform(0, np.pi) + np.arange(count) * np.pi / 2
    length = rng.uniform(*OBJECT_WAVELENGTHS)
    vectors = 2 * np.pi / length * np.stack([np.cos(angles), np.sin(angles)], 1)
    amplitudes = np.full(count, rng.uniform(*OBJECT_DEPTH) / np.sqrt(count))
    return _wave_sum(vectors, amplitudes, rng.uniform(0, 2 * np.pi, count), xs, ys)
