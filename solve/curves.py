"""What repeating a step's velocity costs: the curves that the solver goes by (ours).

All are functions of sigma, so that one recording serves every number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..methods.schedule import progress_at

# flow shift of the clock in which curves say how far a change goes on, and the power of the distance
# by which less of it does; fitted on both tiny Wans
SHIFT, FALLS = 3.0, 1.5
# of the ratio of what the most changed tokens hold: they are chosen by it, and what they read of the
# others is as old. On the second tiny Wan what is left lies between the powers 2 and 3
POWER = 2.0


@dataclass(frozen=True)
class Curves:
    """How a model's velocity changes on the way, and what an error is worth there.

    Args:
        sigmas: falling, at which `travel` and `amplified` are known; linear between.
        travel: root mean square change of the velocity along the way from the first sigma, so that
            what stays as it was at a is off by travel(b) - travel(a) at b.
        amplified: by how much an error of the velocity grows until the video is done, relative.
        shares: rising from 0 to 1, at which `left` is known.
        tried: sigmas, falling, at which it is known.
        left: by sigma and share, the share of a repeated step's squared error that is left when
            this share of the tokens is computed, those that are expected to be off most, on
            remembered keys and values.
        held: by sigma and share, the share of the velocity's squared change, when it was last seen,
            that lay in the tokens that changed most; () is not known.
        reach: how far changes of the velocity go on, in `clock` (methods/carry.py), at `sigmas`; 0 is
            not at all, () nowhere.
    """

    sigmas: tuple[float, ...]
    travel: tuple[float, ...]
    amplified: tuple[float, ...]
    shares: tuple[float, ...]
    tried: tuple[float, ...]
    left: tuple[tuple[float, ...], ...]
    held: tuple[tuple[float, ...], ...] = ()
    reach: tuple[float, ...] = ()

    def reach_at(self, sigma: Sequence[float]) -> np.ndarray:
        known = self.reach or (0.0,) * len(self.sigmas)
        return np.interp(sigma, self.sigmas[::-1], known[::-1])

    def travel_at(self, sigma: Sequence[float]) -> np.ndarray:
        sigmas, travel = self.sigmas, self.travel
        if len(sigmas) > 1 and sigmas[-1] > 0.0:
            # below the last one on as before: a few steps tell nothing of the end of many
            slope = (travel[-1] - travel[-2]) / (sigmas[-2] - sigmas[-1])
            sigmas, travel = (*sigmas, 0.0), (*travel, travel[-1] + slope * sigmas[-1])
        return np.interp(sigma, sigmas[::-1], travel[::-1])

    def amplified_at(self, sigma: Sequence[float]) -> np.ndarray:
        return np.exp(np.interp(sigma, self.sigmas[::-1], np.log(self.amplified)[::-1]))

    def left_at(self, share: float, sigma: float) -> float:
        """Share of the squared error that is left at a share of the tokens."""
        at = [float(np.interp(share, self.shares, row)) for row in self.left]
        return float(np.interp(sigma, self.tried[::-1], at[::-1]))

    @staticmethod
    def missed(distance: float, reach: float) -> float:
        """Share of the squared error of repeating that is left where changes go on.

        Args:
            distance: in `clock`, from the older of the two velocities that tell of a change.
            reach: how far such changes go on.
        """
        return 1.0 if reach <= 0.0 else 1.0 - math.exp(-((distance / reach) ** FALLS))

    def held_by(self, held: Sequence[float], sigma: float) -> Curves:
        """These for a run whose change is less concentrated than in the recording.

        What a share of the tokens takes away of the error goes with the square of what it holds of
        the change: where all tokens change alike, a partial step is worth little. No more is taken
        away than in the recording.

        Args:
            held: of the run, by share, as seen at the beginning of a step.
            sigma: of that step.
        """
        if not self.held:
            return self
        known = [
            np.interp(sigma, self.tried[::-1], column[::-1])
            for column in zip(*self.held, strict=True)
        ]
        less = [
            min(1.0, now / max(then, 1e-6)) ** POWER for now, then in zip(held, known, strict=True)
        ]
        left = tuple(
            tuple(1.0 - (1.0 - one) * by for one, by in zip(row, less, strict=True))
            for row in self.left
        )
        return replace(self, left=left)


def clock(sigma: float) -> float:
    """Where on the way from 0 to 1 a sigma lies, whatever the shift of a run."""
    return progress_at(sigma, SHIFT)
