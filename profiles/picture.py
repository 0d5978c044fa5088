"""Draws a profile: role map, importance maps, and the attention mass that cheap patterns keep."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..methods.heads import CHEAP, FRAME, TILES
from ..methods.roles import role
from ..report.picture import BACKGROUND, FAINT, HEAT_LOW, INK, KEPT, MARGIN, TIME, WIDTH
from .profile import Profile

ROLES = {"spatial": KEPT, "mixed": (122, 128, 141), "temporal": (232, 150, 72)}
# two maps beside each other
PANEL = (WIDTH - 3 * MARGIN) // 2
MAP_HEIGHT = 240
SHOWN = {
    FRAME: "own latent frame",
    **{name: f"1 of {side} x {side} tiles, all frames" for name, side in TILES.items()},
}


def summary(profile: Profile) -> str:
    """The profile in an artist's words."""
    model = profile.model
    lines = [
        f"WanTrim profile of a Wan with {model.describe()}",
        f"{profile.calls} model calls in {len(profile.runs)} recorded runs "
        "(a call is one video at one step, with the positive prompt).",
    ]
    roles = Counter(role(r) for r in profile.ratio().flatten().tolist())
    lines.append("Heads: " + ", ".join(f"{roles[name]} {name}" for name in ROLES) + ".")
    mass = profile.mass().flatten(0, 1).mean(0).tolist()
    lines.append(
        "Attention mass kept, mean of all heads: "
        + ", ".join(f"{SHOWN[name]} {value:.0%}" for name, value in zip(CHEAP, mass, strict=True))
        + "."
    )
    for number, run in enumerate(profile.runs, 1):
        lines += ["", *_run(number, run)]
    return "\n".join(lines)


def _run(number: int, run: dict) -> list[str]:
    parts = [f"Run {number}:"]
    if isinstance(run.get("grid"), list):
        parts.append("latent frames, rows, columns of tokens " + " x ".join(map(str, run["grid"])))
    if isinstance(run.get("sigmas"), list):
        parts.append(f"{len(run['sigmas'])} noise levels")
    parts += [f"{name} {run[name]}" for name in ("calls", "shift", "plan") if name in run]
    notes = run.get("notes")
    notes = notes if isinstance(notes, list) else []
    return [parts[0] + " " + ", ".join(parts[1:]), *(f"- {note}" for note in notes)]


def draw_profile(profile: Profile, name: str = "") -> Image.Image:
    """The profile as a picture, block across and head down in each map."""
    mass, ratio = profile.mass(), profile.ratio()
    image, draw = _canvas(WIDTH, 84)
    title = "WanTrim profile" + (f" {name}" if name else "")
    draw.text((MARGIN, 12), title[:72], INK, _font(22))
    line = f"{profile.model.describe()}; {profile.calls} calls in {len(profile.runs)} runs"
    draw.text((MARGIN, 46), line, FAINT, _font(16))
    rows = [image]
    panels = [
        _panel("head roles", _roles(ratio), _legend(ratio)),
        _panel("importance, self-attention", *_heat(profile.importance("self"), TIME)),
        _panel("importance, cross-attention", *_heat(profile.importance("cross"), TIME)),
    ]
    for at, pattern in enumerate(CHEAP):
        cells, spread = _heat(mass[..., at], KEPT, whole=True)
        panels.append(_panel(f"mass kept: {SHOWN[pattern]}", cells, spread))
    while panels:
        pair, panels = panels[:2], panels[2:]
        page = Image.new("RGB", (WIDTH, pair[0].height + MARGIN), BACKGROUND)
        for column, panel in enumerate(pair):
            page.paste(panel, (MARGIN + column * (PANEL + MARGIN), 0))
        rows.append(page)
    page = Image.new("RGB", (WIDTH, sum(row.height for row in rows)), BACKGROUND)
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    return page


def _panel(title: str, cells: np.ndarray, spread: str) -> Image.Image:
    """A map [heads, blocks, 3] with its title and what its colours mean."""
    image, draw = _canvas(PANEL, MAP_HEIGHT + 66)
    draw.text((0, 0), title, INK, _font(17))
    drawing = Image.fromarray(cells.astype(np.uint8))
    image.paste(drawing.resize((PANEL, MAP_HEIGHT), Image.Resampling.NEAREST), (0, 24))
    draw.text((0, MAP_HEIGHT + 28), spread, FAINT, _font(15))
    heads, blocks, _ = cells.shape
    axes = f"block 0 to {blocks - 1} across, head 0 to {heads - 1} down"
    draw.text((0, MAP_HEIGHT + 46), axes, FAINT, _font(13))
    return image


def _roles(ratio: torch.Tensor) -> np.ndarray:
    return np.array([[ROLES[role(r)] for r in heads] for heads in ratio.T.tolist()])


def _legend(ratio: torch.Tensor) -> str:
    counts = Counter(role(r) for r in ratio.flatten().tolist())
    colours = {"spatial": "green", "mixed": "grey", "temporal": "orange"}
    return ", ".join(f"{counts[name]} {name} ({colours[name]})" for name in ROLES)


def _heat(values: torch.Tensor, colour, whole: bool = False) -> tuple[np.ndarray, str]:
    """Cells [heads, blocks, 3] of values [blocks, heads], and what they range over.

    Args:
        whole: 0 is dark and 1 is bright; else the smallest and the largest value are.
    """
    low, high = float(values.min()), float(values.max())
    if whole:
        light, spread = values, f"{low:.0%} to {high:.0%}; bright is all of it"
    else:
        # a few heads stand far out
        light = (values / max(high, 1e-12)).clamp(min=0).sqrt()
        spread = f"{low:.3g} to {high:.3g}; bright is important"
    light = light.clamp(0, 1).T[..., None].numpy()
    return HEAT_LOW + light * (np.array(colour, np.float32) - HEAT_LOW), spread


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), BACKGROUND)
    return image, ImageDraw.Draw(image)


def _font(size: int):
    return ImageFont.load_default(size)
