"""What the one dial trims, in which order, and how far: a table by priority.

A mix is a way from trimming nothing to all that is sane; a wanted speed-up is a place on it
(solve.py). Numbers are from benchmarks/README.md: a toy, not 14B.
"""

from __future__ import annotations

from dataclasses import dataclass

from .presets import AUTO as AUTO_PRESET
from .presets import AUTO_GIVEN


@dataclass(frozen=True)
class Mix:
    """What a priority trims.

    Args:
        path: from nothing to the most, shares of the blocks that run (at the sparse end of their
            curve), of the tokens and of the attention that stay. The speed-up grows along it.
        schedule: direction of the token pruning, see `Schedule`.
        curve: shape of the blocks' budget, see `BlockBudget`.
        slope: share of the blocks at the full end of the curve over that at the sparse end.
        spared: shares of the run, at its beginning and at its end, in which nothing is trimmed.
        experts: how hard the high and the low noise expert of Wan2.2 are trimmed, relative to each
            other.
    """

    path: tuple[tuple[float, float, float], ...]
    schedule: str
    curve: str
    slope: float
    spared: tuple[float, float]
    experts: tuple[float, float]


# Blocks first and alone, but for motion, where tokens alone keep more; falling with PARE's slope from
# 0.435 on, the one curve with "reuse" that the bench has (20 steps: 0.68 of the blocks); rising is
# not measured, and stops earlier. Tokens to 0.35, the fewest in the bench's text to video. Heads
# last, and to 0.75 of the attention: half of it cost the toy as much quality as half of all compute
# does elsewhere.
MIXES: dict[str, Mix] = {
    # early steps decide the motion: spared by every knob, as far as the preset auto spares them
    "motion": Mix(
        path=((1, 1, 1), (1, 0.6, 1), (0.435, 0.6, 1), (0.435, 0.35, 0.75)),
        schedule="rising",
        curve="falling",
        slope=1.75,
        spared=(AUTO_PRESET["spare"], 0.0),
        experts=(0.7, 1.0),
    ),
    "balanced": Mix(
        path=((1, 1, 1), (0.435, 1, 1), (0.435, 0.6, 1), (0.435, 0.35, 0.75)),
        schedule="constant",
        curve="falling",
        slope=1.75,
        spared=(0.0, 0.0),
        experts=(1.0, 1.0),
    ),
    # late steps draw the detail
    "detail": Mix(
        path=((1, 1, 1), (0.55, 1, 1), (0.55, 0.6, 1), (0.5, 0.35, 0.75)),
        schedule="falling",
        curve="rising",
        slope=1.75,
        spared=(0.0, 1.0 - AUTO_GIVEN["end"]),
        experts=(1.0, 0.7),
    ),
}
# chosen when a run begins, by what the video begins with
AUTO = "auto"
PRIORITIES = (AUTO, *MIXES)


def candidates(priority: str, starts_given: bool) -> tuple[str, ...]:
    """The mixes that a priority may stand for, the one to prefer first.

    What AUTO prefers kept most on the bench (benchmarks/README.md, "The one dial") or ties with
    what did: a given first latent frame has settled what the early steps would decide, and without
    one they decide everything. The last candidate reaches further.

    Args:
        starts_given: whether the first latent frame is given.
    """
    if priority != AUTO:
        return (priority,)
    return ("detail" if starts_given else "motion", "balanced")


def way(mix: Mix, blocks: bool, tokens: bool, heads: bool) -> list[tuple[float, float, float]]:
    """The mix's path with the knobs that may be turned; the others stay at 1."""
    free = (blocks, tokens, heads)
    points: list[tuple[float, float, float]] = []
    for point in mix.path:
        kept = tuple(float(x) if can else 1.0 for x, can in zip(point, free, strict=True))
        if not points or kept != points[-1]:
            points.append(kept)
    return points


def knobs_at(points: list[tuple[float, float, float]], place: float) -> tuple[float, float, float]:
    """The knobs at a place on a way: 0 is its beginning, each point is 1 further."""
    index = min(int(place), len(points) - 2)
    if index < 0:
        return points[0]
    share = place - index
    low, high = points[index], points[index + 1]
    return tuple((1 - share) * a + share * b for a, b in zip(low, high, strict=True))
