"""Inputs, outputs and checks that several nodes have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from PIL import Image

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui


def model_input():
    return io.Model.Input("model", tooltip="A Wan 2.1 or 2.2 model, after its LoRAs.")


def number(name: str, default: float, limits: tuple, tooltip: str, slider: bool = False, **more):
    """A number, whole where its default is.

    Args:
        limits: least, most and, where it is said, the step.
        more: options of ComfyUI's inputs.
    """
    kind = io.Int if isinstance(default, int) else io.Float
    least, most, *step = limits
    more |= {"step": step[0]} if step else {}
    more |= {"display_mode": io.NumberDisplay.slider} if slider else {}
    return kind.Input(name, default=default, min=least, max=most, tooltip=tooltip, **more)


def choice(name: str, options: Iterable[str], tooltip: str, **more):
    """One of some names, of which the first is the default."""
    options = list(options)
    return io.Combo.Input(name, options, default=options[0], tooltip=tooltip, **more)


def switch(name: str, default: bool, tooltip: str, **more):
    return io.Boolean.Input(name, default=default, tooltip=tooltip, **more)


def prune_input(most: float, tooltip: str):
    return number("prune_ratio", 0.30, (0.0, most, 0.01), tooltip, slider=True)


def percent_inputs(what: str) -> list:
    """start_percent and end_percent of `what`."""
    said = "Progress of the whole run (both experts) at which"
    return [
        number(f"{name}_percent", at, (0.0, 1.0, 0.01), f"{said} {what} {name}s.", advanced=True)
        for name, at in (("start", 0.0), ("end", 1.0))
    ]


def planned_output():
    return io.Model.Output(tooltip="The model with the plan on it.")


def text_output(tooltip: str, name: str = "text"):
    return io.String.Output(name, display_name=name, tooltip=tooltip)


def image_output(name: str, tooltip: str):
    return io.Image.Output(name, display_name=name, tooltip=tooltip)


def shown(cls, drawn: Image.Image, text: str) -> tuple[torch.Tensor, dict]:
    """A picture as an image [1, h, w, 3], and what a node shows of it with a text."""
    picture = torch.from_numpy(np.asarray(drawn, np.float32) / 255)[None]
    return picture, {**ui.PreviewImage(picture, cls=cls).as_dict(), "text": (text,)}


def ticking(total: int) -> Callable[[], None]:
    """Called after each of `total` parts of a long work: moves the node's bar, and cancels."""
    bar = comfy.utils.ProgressBar(total)

    def tick() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    return tick


def check_range(node: str, name: str, value: float, most: float, least: float = 0) -> None:
    """Refuse a value outside of its range; a linked one passes by what ComfyUI checks."""
    if not least <= value <= most:
        raise ValueError(f"{node}: {name}: expected {least:g} to {most:g}, got {value}")


def check_choice(node: str, name: str, value: object, choices: Sequence[str]) -> None:
    """As `check_range`, of a name."""
    if value not in choices:
        raise ValueError(f"{node}: {name}: expected one of {', '.join(choices)}, got {value!r:.60}")
