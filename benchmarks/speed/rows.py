"""The rows of speed.csv, whatever measured them."""

from __future__ import annotations

import logging
import random
import statistics
from collections.abc import Sequence

import torch

from ..table import commit
from .plans import Size

log = logging.getLogger(__name__)
COLUMNS = (
    "case", "host", "device", "dtype", "tokens", "plan", "dense_ms", "trimmed_ms", "speedup",
    "speedup_lo", "speedup_hi", "predicted", "efficiency", "peak_mb", "extra_states", "compiled",
    "commit", "torch", "note",
)  # fmt: skip
KEY = ("case", "host", "device", "dtype", "tokens", "plan", "compiled")


def row(size: Size, plan: str, taken: Sequence[tuple[float, float]], **more) -> dict[str, object]:
    """One row, of milliseconds (dense, trimmed); `more` are further columns."""
    ratios = [dense / trimmed for dense, trimmed in taken]
    speedup, predicted = statistics.median(ratios), more.get("predicted", 1.0)
    low, high = interval(ratios) if len(ratios) > 2 else ("", "")
    return dict.fromkeys(COLUMNS, "") | {
        "case": size.name,
        "host": "diffusers",
        "device": "cpu",
        "dtype": "float32",
        "tokens": size.grid.tokens,
        "plan": plan,
        "dense_ms": statistics.median(dense for dense, _ in taken),
        "trimmed_ms": statistics.median(trimmed for _, trimmed in taken),
        "speedup": speedup,
        "speedup_lo": low,
        "speedup_hi": high,
        "predicted": predicted,
        "efficiency": speedup / predicted if predicted else "",
        "compiled": "no",
        "commit": commit(),
        "torch": torch.__version__,
        **more,
    }


def interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def say(made: dict[str, object]) -> None:
    if made["dense_ms"] == "":
        log.warning("%s, %s: %s", made["case"], made["plan"], made["note"])
        return
    expected = made["predicted"]
    log.info(
        "%s, %s (compiled: %s): %.1f ms dense, %.1f ms trimmed, %.3fx%s",
        made["case"], made["plan"], made["compiled"], made["dense_ms"], made["trimmed_ms"],
        made["speedup"],
        f" of {expected:.3f}x, efficiency {made['efficiency']:.2f}" if expected else "",
    )  # fmt: skip
