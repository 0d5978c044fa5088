"""The second toy world: textured shapes before textured grounds, and a camera that moves.

A prompt names each object's colour, shape and direction, and the camera. All else is left open and
drawn by `render`: texture, place, size, speed, light, and who stands in front of whom.

Directions are relative to the ground: an object that moves left passes what it stands before on
its left, whatever the camera does. A camera is named by its own motion: it pans left when the view
goes left over the ground, so that the ground moves right in the picture, and it zooms in when the
ground grows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from . import held_out, world
from .world import DIRECTIONS, MAX_OBJECTS, SHAPES, Described, read_objects

WIDTH = HEIGHT = 192
PIXEL_FRAMES = 17
# those of the first world that have a hue: a textured object is found by it
COLOURS = {name: rgb for name, rgb in world.COLOURS.items() if name != "white"}
# what the camera does -> motion of the view over the ground (x, y) and growth of the picture
CAMERAS = {
    "holds": (0.0, 0.0, 0.0),
    **{f"pans {name}": (x, y, 0.0) for name, (x, y) in DIRECTIONS.items()},
    "zooms in": (0.0, 0.0, 1.0),
    "zooms out": (0.0, 0.0, -1.0),
}
EXAMPLE = "a red circle moving left, the camera pans right"


@dataclass(frozen=True)
class Object:
    """One moving shape, in the words of the grammar."""

    colour: str
    shape: str
    direction: str

    def phrase(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"


@dataclass(frozen=True)
class Scene(Described):
    """Objects in any order, and what the camera does."""

    camera: str

    def around(self) -> tuple[str, str, str]:
        return "<camera>", ", ", f"the camera {self.camera}"


def parse_prompt(prompt: str) -> Scene:
    """The scene that a prompt of the grammar describes.

    Raises:
        ValueError: the prompt is not of the grammar; the message gives an example.
    """
    text = " ".join(re.sub(r"[,.]", " ", prompt.lower()).split())
    body, _, camera = text.rpartition(" the camera ")
    objects = read_objects(body, Object, (COLOURS, SHAPES, DIRECTIONS))
    if objects and camera in CAMERAS:
        return Scene(objects, camera)
    raise ValueError(
        f"the second toy world does not know the prompt {prompt!r}. Expected for example "
        f"{EXAMPLE!r} with colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; "
        f"directions {', '.join(DIRECTIONS)}; the camera {', '.join(CAMERAS)}; up to "
        f"{MAX_OBJECTS} objects joined by 'and'"
    )


def random_scene(rng: np.random.Generator, num_objects: int = 1) -> Scene:
    """A scene of `num_objects` differently coloured objects, drawn uniformly."""
    colours = rng.choice(list(COLOURS), size=num_objects, replace=False)
    objects = tuple(
        Object(str(colour), str(rng.choice(SHAPES)), str(rng.choice(list(DIRECTIONS))))
        for colour in colours
    )
    return Scene(objects, str(rng.choice(list(CAMERAS))))


def held_out_scenes(count: int, seed: int = 0, num_objects: int = 1) -> list[Scene]:
    """`count` different scenes that training never saw; as in the first world.

    Raises:
        ValueError: there are not so many.
    """
    return held_out.held_out_scenes(count, seed, num_objects, random_scene)
