"""Inputs, outputs and checks that several nodes have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from comfy_api.latest import io, ui


def model_input():
    return io.Model.Input("model", tooltip="A Wan 2.1 or 2.2 model, after its LoRAs.")


def prune_input(most: float, tooltip: str):
    return io.Float.Input(
        "prune_ratio",
        default=0.30,
        min=0.0,
        max=most,
        step=0.01,
        display_mode=io.NumberDisplay.slider,
        tooltip=tooltip,
    )


def percent_inputs(what: str) -> list:
    """start_percent and end_percent of `what`."""
    return [
        io.Float.Input(
            f"{name}_percent",
            default=default,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip=f"Progress of the whole run (both experts) at which {what} {name}s.",
        )
        for name, default in (("start", 0.0), ("end", 1.0))
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


def check_range(node: str, name: str, value: float, most: float, least: float = 0) -> None:
    """Refuse a value outside of its range; a linked one passes by what ComfyUI checks.

    Raises:
        ValueError: says what was expected.
    """
    if not least <= value <= most:
        raise ValueError(f"{node}: {name}: expected {least:g} to {most:g}, got {value}")


def check_choice(node: str, name: str, value: object, choices: Sequence[str]) -> None:
    """As `check_range`, of a name."""
    if value not in choices:
        raise ValueError(f"{node}: {name}: expected one of {', '.join(choices)}, got {value!r:.60}")
