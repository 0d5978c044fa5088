"""The search for the knob that gives a peer of WanTrim its share of the compute."""

from __future__ import annotations

from collections.abc import Callable


def knob_for(
    target_ratio: float,
    run: Callable[[float], float],
    low: float,
    high: float,
    *,
    tolerance: float = 0.02,
    near: float = 0.005,
    tries: int = 12,
    whole: bool = False,
) -> tuple[float, float]:
    """The knob, and its ratio, that comes closest to a target ratio of FLOPs without passing it.

    Bisection between `low` and `high`, whichever of them costs more. Step caches have few levels,
    so that the target itself is seldom met.

    Args:
        target_ratio: wanted FLOPs over the dense model's.
        run: the ratio counted with a knob.
        tolerance: how far above the target a ratio may be.
        near: how far below it the search stops.
        tries: runs at most, the two ends among them.
        whole: the knob is an integer.

    Raises:
        ValueError: no knob came down to the target.
    """
    seen = {knob: run(knob) for knob in (low, high)}
    cheap, costly = sorted(seen, key=seen.get)
    while len(seen) < tries and seen[cheap] < target_ratio - near and seen[costly] > target_ratio:
        middle = (cheap + costly) / 2
        if whole:
            middle = round(middle)
        if middle in seen:
            break
        seen[middle] = run(middle)
        if seen[middle] > target_ratio:
            costly = middle
        else:
            cheap = middle
    good = [knob for knob in seen if seen[knob] <= target_ratio + tolerance]
    if not good:
        raise ValueError(
            f"expected a knob of {low} to {high} with at most {target_ratio + tolerance:.3f} of "
            f"the dense FLOPs, got {min(seen.values()):.3f} at best: widen the range"
        )
    best = min(good, key=lambda knob: abs(seen[knob] - target_ratio))
    return best, seen[best]
