"""Token plans that have a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .schedule import Schedule
from .tokens import TokenPlan

# TAPE (arXiv 2605.17837, section 3 and its experiments), with attention measured by sampled queries
PAPER = {
    "schedule": "falling",
    "reselect_every": 10,
    "alpha": 0.5,
    "importance": "attention",
    "dropped_kv": "leave",
    "restore": "identity",
    "trim_reselecting": False,
}
# of all kinds of token plans what kept most on the quality bench (benchmarks/README.md): a toy, not
# 14B
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
# refresh, when it costs least there: early steps decide what moves where, which a given first frame
# has settled; then it is what is left out late that stays visible
AUTO = REFRESH | {"schedule": "rising", "spare": 0.25}
AUTO_GIVEN = REFRESH | {"schedule": "falling", "end": 0.84}
PRESETS: dict[str, Mapping[str, object]] = {"auto": AUTO, "refresh": REFRESH, "paper": PAPER}


def preset_plan(name: str, keep_ratio: float, **options) -> TokenPlan:
    """The preset's plan at a mean keep ratio; `options` are further fields of `TokenPlan`.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    plan = _plan(PRESETS[name], keep_ratio, options)
    return replace(plan, given=_plan(AUTO_GIVEN, keep_ratio, options)) if name == "auto" else plan


def _plan(preset: Mapping[str, object], keep_ratio: float, options: dict) -> TokenPlan:
    fields = dict(preset) | options
    if "end" in preset:
        # the earlier of the two
        fields["end"] = max(fields.get("start", 0.0), min(preset["end"], fields["end"]))
    return TokenPlan(Schedule(keep_ratio, fields.pop("schedule")), **fields)
