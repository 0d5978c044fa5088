"""Procedural videos of coloured shapes that move, with known truth.

A scene is a background and one to three objects; each object has a colour, a shape, a direction
and a speed, and all of it is said in the prompt. Objects are drawn in order, so a later one
occludes an earlier one.
"""

from __future__ import annotations

import operator
import re
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH = HEIGHT = 96
PIXEL_FRAMES = 17

COLOURS = {
    "red": (0.90, 0.14, 0.14),
    "green": (0.14, 0.78, 0.22),
    "blue": (0.20, 0.42, 0.98),
    "yellow": (0.95, 0.86, 0.14),
    "purple": (0.78, 0.20, 0.88),
    "white": (0.96, 0.96, 0.96),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
# pixels per pixel_frame
SPEEDS = {"slowly": 1.25, "quickly": 2.75}
BACKGROUNDS = {
    "black": (0.04, 0.04, 0.05),
    "gray": (0.34, 0.34, 0.34),
    "navy": (0.05, 0.07, 0.30),
    "striped": (0.22, 0.22, 0.22),
}
STRIPE_PERIOD = 24.0
STRIPE_DEPTH = 0.09
# radius of the largest extent, in pixels
RADIUS_RANGE = (13.0, 17.0)
MAX_OBJECTS = 3
# one scene in this many is never trained on
HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class Object:
    """One moving shape, in the words of the grammar."""

    colour: str
    shape: str
    direction: str
    speed: str

    def phrase(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction} {self.speed}"


@dataclass(frozen=True)
class Described:
    """What a prompt says: objects, and behind them one phrase about what is around them."""

    objects: tuple

    def around(self) -> tuple[str, str, str]:
        """(slot, what joins it to the objects, phrase) of the last phrase."""
        raise NotImplementedError

    def prompt(self) -> str:
        _, joint, around = self.around()
        return " and ".join(obj.phrase() for obj in self.objects) + joint + around

    def phrases(self) -> list[tuple[str, str]]:
        """(slot, phrase) of all that the text embedding sees."""
        slot, _, around = self.around()
        said = [(f"<phrase {index}>", obj.phrase()) for index, obj in enumerate(self.objects)]
        # what is around is its own phrase wherever it comes
        return [*said, (slot, around)]

    @property
    def held_out(self) -> bool:
        """True for the scenes that training never sees (about an eighth of all)."""
        return zlib.crc32(self.prompt().encode()) % HELD_OUT_EVERY == 0


@dataclass(frozen=True)
class Scene(Described):
    """Objects in drawing order, and the background."""

    background: str

    def around(self) -> tuple[str, str, str]:
        return "<ground>", " ", f"on a {self.background} background"


def read_objects(text: str, kind: type, known: Sequence[Collection[str]]) -> tuple | None:
    """The objects that `text` names, joined by "and"; None where it is not of the grammar.

    Args:
        kind: what is made of an object's words.
        known: colours, shapes, directions and what else follows.
    """
    pattern = r"a (\w+) (\w+) moving " + " ".join([r"(\w+)"] * (len(known) - 2))
    objects = []
    for part in text.split(" and "):
        match = re.fullmatch(pattern, part.strip())
        words = match.groups() if match else ()
        if not words or not all(map(operator.contains, known, words)):
            return None
        objects.append(kind(*words))
    return tuple(objects) if len(objects) <= MAX_OBJECTS else None


def parse_prompt(prompt: str) -> Scene:
    """The scene that a prompt of the grammar describes.

    Raises:
        ValueError: the prompt is not of the grammar; the message gives an example.
    """
    words = re.sub(r"[,.]", " ", prompt.lower()).split()
    text = " ".join(words)
    body, _, tail = text.rpartition(" on a ")
    background = tail.removesuffix(" background")
    objects = read_objects(body, Object, (COLOURS, SHAPES, DIRECTIONS, SPEEDS))
    if objects and background in BACKGROUNDS:
        return Scene(objects, background)
    raise ValueError(
        f"the toy world does not know the prompt {prompt!r}. Expected for example "
        "'a red circle moving left slowly on a black background' with "
        f"colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; "
        f"directions {', '.join(DIRECTIONS)}; speeds {', '.join(SPEEDS)}; "
        f"backgrounds {', '.join(BACKGROUNDS)}; up to {MAX_OBJECTS} objects joined by 'and'"
    )


def random_scene(rng: np.random.Generator, num_objects: int = 1) -> Scene:
    """A scene of `num_objects` differently coloured objects, drawn uniformly."""
    colours = rng.choice(list(COLOURS), size=num_objects, replace=False)
    objects = tuple(
        Object(
            str(colour),
            str(rng.choice(SHAPES)),
            str(rng.choice(list(DIRECTIONS))),
            str(rng.choice(list(SPEEDS))),
        )
        for colour in colours
    )
    return Scene(objects, str(rng.choice(list(BACKGROUNDS))))


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance (pixels, negative inside) to a shape centred at the origin; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    if shape == "cross":
        arm = 0.34 * radius
        flat = np.maximum(np.abs(x) - radius, np.abs(y) - arm)
        tall = np.maximum(np.abs(x) - arm, np.abs(y) - radius)
        return np.minimum(flat, tall)
    if shape == "triangle":
        side = (np.abs(x) * 1.8 - (y + radius) * 0.95) / np.hypot(1.8, 0.95)
        return np.maximum(side, y - 0.8 * radius)
    raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def render_background(name: str, phase: float = 0.0, width: int = WIDTH, height: int = HEIGHT):
    """Background image [height, width, 3] in 0..1; `phase` (radians) moves the stripes."""
    image = np.empty((height, width, 3), np.float32)
    image[:] = BACKGROUNDS[name]
    if name == "striped":
        wave = np.sin(np.arange(width) * (2 * np.pi / STRIPE_PERIOD) + phase)
        image += (STRIPE_DEPTH * wave).astype(np.float32)[None, :, None]
    return image


def render(
    scene: Scene,
    rng: np.random.Generator,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> np.ndarray:
    """Video [PIXEL_FRAMES, height, width, 3], float32 in 0..1.

    Start positions, sizes and the stripes' phase are drawn from `rng`; every object stays inside
    the picture for the whole video when its path is short enough to fit.
    """
    image = render_background(scene.background, rng.uniform(0, 2 * np.pi), width, height)
    video = np.repeat(image[None], PIXEL_FRAMES, axis=0)
    for obj in scene.objects:
        radius = rng.uniform(*RADIUS_RANGE)
        velocity = np.array(DIRECTIONS[obj.direction]) * SPEEDS[obj.speed]
        travel = velocity * (PIXEL_FRAMES - 1)
        low = np.array([radius, radius]) + np.maximum(-travel, 0)
        high = np.array([width - 1, height - 1]) - radius - np.maximum(travel, 0)
        start = np.where(
            high > low, rng.uniform(low, np.maximum(high, low + 1e-3)), (low + high) / 2
        )
        _draw(video, obj, start, velocity, radius)
    return video


def _draw(video, obj: Object, start, velocity, radius: float) -> None:
    frames, height, width, _ = video.shape
    colour = np.array(COLOURS[obj.colour], np.float32)
    reach = int(radius) + 2
    for index in range(frames):
        cx, cy = start + velocity * index
        x0, x1 = max(int(cx) - reach, 0), min(int(cx) + reach + 2, width)
        y0, y1 = max(int(cy) - reach, 0), min(int(cy) + reach + 2, height)
        if x0 >= x1 or y0 >= y1:
            continue
        x = np.arange(x0, x1, dtype=np.float32)[None, :] - cx
        y = np.arange(y0, y1, dtype=np.float32)[:, None] - cy
        cover = np.clip(0.5 - shape_distance(obj.shape, x, y, radius), 0, 1)[..., None]
        patch = video[index, y0:y1, x0:x1]
        patch += cover.astype(np.float32) * (colour - patch)
