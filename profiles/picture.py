"""Draws a profile: role map, intra-slice ratio and importance maps."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from PIL import Image

from ..methods.heads import role
from ..report.picture import (
    FAINT,
    HEAT_LOW,
    INK,
    KEPT,
    MARGIN,
    TIME,
    WIDTH,
    canvas,
    font_of,
    stacked,
)  # fmt: skip
from .profile import Profile

ROLES = {"spatial": KEPT, "mixed": (122, 128, 141), "temporal": (232, 150, 72)}
# two maps beside each other
PANEL = (WIDTH - 3 * MARGIN) // 2
MAP_HEIGHT = 240


def summary(profile: Profile) -> str:
    """The profile in an artist's words."""
    model = profile.model
    lines = [f"WanTrim profile of a Wan with {model.describe()}"]
    lines += [_whole_run(one) for one in profile.tuned]
    if not profile.calls:
        lines.append("Nothing was recorded with WanTrim Profile: Heads and Slim cannot use it.")
        return "\n".join(lines)
    lines.append(
        f"{profile.calls} model calls in {len(profile.runs)} recorded runs "
        "(a call is one video at one step, with the positive prompt)."
    )
    roles = Counter(role(r) for r in profile.ratio().flatten().tolist())
    lines.append("Heads: " + ", ".join(f"{roles[name]} {name}" for name in ROLES) + ".")
    within = float(profile.ratio().mean())
    lines.append(f"Attention within the own latent frame, mean of all heads: {within:.0%}.")
    for number, run in enumerate(profile.runs, 1):
        lines += ["", f"Run {number}: {', '.join(_run(run))}"]
        notes = run.get("notes")
        lines += [f"- {note}" for note in notes] if isinstance(notes, list) else []
    return "\n".join(lines)


def _whole_run(kept: dict) -> str:
    """A trial or a recorded run; the dial is who reads and judges it."""
    sigmas, speedup = kept.get("sigmas"), kept.get("speedup")
    steps = f" in {len(sigmas) - 1} steps" if isinstance(sigmas, list) else ""
    if kept.get("chosen", "") is None:
        return f"A whole run{steps} was recorded: WanTrim can be solved by it."
    wish = f" at {str(speedup):.8}x" if isinstance(speedup, int | float) else ""
    return f"A trial{wish}{steps} chose: {str(kept.get('chosen')):.200}."


def _run(run: dict) -> list[str]:
    parts = []
    if isinstance(run.get("grid"), list):
        parts.append("latent frames, rows, columns of tokens " + " x ".join(map(str, run["grid"])))
    if isinstance(run.get("sigmas"), list):
        parts.append(f"{len(run['sigmas'])} noise levels")
    return parts + [f"{name} {run[name]}" for name in ("calls", "shift", "plan") if name in run]


def draw_profile(profile: Profile, name: str = "") -> Image.Image:
    """The profile as a picture, block across and head down in each map."""
    image, draw = canvas(84)
    draw.text((MARGIN, 12), f"WanTrim profile {name}".strip()[:72], INK, font_of(22))
    line = f"{profile.model.describe()}; {profile.calls} calls in {len(profile.runs)} runs"
    draw.text((MARGIN, 46), line, FAINT, font_of(16))
    if not profile.calls:
        return image
    ratio, rows = profile.ratio(), [image]
    roles = [[role(r) for r in heads] for heads in ratio.T.tolist()]
    counts = Counter(name for heads in roles for name in heads)
    colours = {"spatial": "green", "mixed": "grey", "temporal": "orange"}
    legend = ", ".join(f"{counts[name]} {name} ({colours[name]})" for name in ROLES)
    panels = [
        _panel("head roles", np.array([[ROLES[one] for one in heads] for heads in roles]), legend),
        _panel("intra-slice ratio", *_heat(ratio, KEPT, whole=True)),
        _panel("importance, self-attention", *_heat(profile.importance("self"), TIME)),
        _panel("importance, cross-attention", *_heat(profile.importance("cross"), TIME)),
    ]
    while panels:
        pair, panels = panels[:2], panels[2:]
        page, _ = canvas(pair[0].height + MARGIN)
        for column, panel in enumerate(pair):
            page.paste(panel, (MARGIN + column * (PANEL + MARGIN), 0))
        rows.append(page)
    return stacked(rows)


def _panel(title: str, cells: np.ndarray, spread: str) -> Image.Image:
    """A map [heads, blocks, 3] with its title and what its colours mean."""
    image, draw = canvas(MAP_HEIGHT + 66, PANEL)
    draw.text((0, 0), title, INK, font_of(17))
    drawing = Image.fromarray(cells.astype(np.uint8))
    image.paste(drawing.resize((PANEL, MAP_HEIGHT), Image.Resampling.NEAREST), (0, 24))
    draw.text((0, MAP_HEIGHT + 28), spread, FAINT, font_of(15))
    heads, blocks, _ = cells.shape
    axes = f"block 0 to {blocks - 1} across, head 0 to {heads - 1} down"
    draw.text((0, MAP_HEIGHT + 46), axes, FAINT, font_of(13))
    return image


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
