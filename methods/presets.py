"""Token plans that have a name."""

from __future__ import annotations

from collections.abc import Mapping

from .schedule import Schedule
from .tokens import TokenPlan

# TAPE as published (arXiv 2605.17837): section 3 and its experiments
PAPER = {
    "schedule": "falling",
    "reselect_every": 10,
    "alpha": 0.5,
    "importance": "attention",
    "dropped_kv": "leave",
    "restore": "identity",
    "trim_reselecting": False,
}
# of all token plans what kept most on the quality bench (benchmarks/README.md): a toy, not 14B
REFRESH = {
    "schedule": "constant",
    # one choice for a whole step: more blocks than any Wan has
    "reselect_every": 100,
    "alpha": 0.5,
    "importance": "velocity_change+rotation",
    "dropped_kv": "leave",
    "restore": "last_update",
    "trim_reselecting": True,
}
PRESETS: dict[str, Mapping[str, object]] = {"refresh": REFRESH, "paper": PAPER}


def preset_plan(name: str, keep_ratio: float, **options) -> TokenPlan:
    """The preset's plan at a mean keep ratio; `options` are further fields of `TokenPlan`.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    fields = dict(PRESETS[name]) | options
    return TokenPlan(Schedule(keep_ratio, fields.pop("schedule")), **fields)
