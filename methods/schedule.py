"""How much is kept when: TAPE's timestep budget as a function of sigma (arXiv 2605.17837, 3.3).

The paper's prune ratio falls linearly over the sampling steps, in equal stages. Here the place in
the run is `progress`: 0 at pure noise, 1 at the finished video, computed from sigma and the model's
flow shift and never from a local step index, so that an expert that sees only a slice of the
sigmas, a two-call sampler and a run with skipped calls all get the same ratio at the same sigma.
"""

from __future__ import annotations

from dataclasses import dataclass

# equal stages of a run, and how far the ratio moves to either side of its mean (paper 5 and 0.10)
STAGES, SPREAD = 5, 0.10
DIRECTIONS = ("falling", "constant", "rising")
# parts of 0..1 in which a profile keeps what it measured
BINS = 10


def progress_at(sigma: float, shift: float = 1.0) -> float:
    """Share of the steps done at `sigma` under a flow shift: 0 at sigma 1, 1 at sigma 0.

    Inverse of sigma = shift * u / (1 + (shift - 1) * u) with progress = 1 - u.
    """
    # schedulers of other models begin above 1, where the inverse has a pole; no number is 0
    sigma = min(1.0, max(0.0, sigma))
    u = sigma / (shift - (shift - 1) * sigma)
    return min(max(1.0 - u, 0.0), 1.0)


def sigma_at(progress: float, shift: float = 1.0) -> float:
    """The sigma at which that share of the steps is done under a flow shift."""
    u = 1.0 - progress
    return shift * u / (1 + (shift - 1) * u)


def check_window(start: float, end: float) -> None:
    """Refuse what is no part of a run."""
    if not 0.0 <= start <= end <= 1.0:
        raise ValueError(f"start and end: expected 0 <= start <= end <= 1, got {start} and {end}")


def sigma_bin(sigma: float) -> int:
    """Which of BINS equal parts of 0..1 a sigma falls into."""
    return min(BINS - 1, int(min(1.0, max(0.0, sigma)) * BINS))


@dataclass(frozen=True)
class Schedule:
    """Keep ratio over progress.

    Args:
        keep_ratio: mean share of tokens that stays, 0 < keep_ratio <= 1. With few steps the mean
            of a run is a little off, as no step starts in the last stage (4 steps: by 0.025).
        direction: of the *pruning*: "falling" as in the paper (prunes most at high noise),
            "constant", or "rising" (spares the early steps that decide the motion).
    """

    keep_ratio: float
    direction: str = "falling"

    def __post_init__(self):
        if not 0.0 < self.keep_ratio <= 1.0:
            raise ValueError(
                f"keep_ratio: expected more than 0 and at most 1, got {self.keep_ratio}"
            )
        if self.direction not in DIRECTIONS:
            raise ValueError(
                f"schedule: expected one of {', '.join(DIRECTIONS)}, got {self.direction!r}"
            )

    def at(self, progress: float) -> float:
        """Keep ratio at a progress in 0..1. A mean of 1 keeps everything at every step."""
        if self.keep_ratio == 1.0 or self.direction == "constant":
            return self.keep_ratio
        stage = min(int(progress * STAGES + 1e-6), STAGES - 1)
        # narrower near 0 and 1, so that the mean stays what was asked for
        spread = min(SPREAD, self.keep_ratio, 1.0 - self.keep_ratio)
        offset = spread * (1 - 2 * stage / (STAGES - 1))
        return self.keep_ratio - (offset if self.direction == "falling" else -offset)
