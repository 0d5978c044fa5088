"""What repeating a step's velocity costs: the curves that the solver goes by (ours).

All are functions of sigma, so that one recording serves every number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curves:
    """How a model's velocity changes on the way, and what an error is worth there.

    Args:
        sigmas: falling, at which `travel` and `amplified` are known; linear between.
        travel: root mean square change of the velocity along the way from the first sigma, so that
            repeating it from a to b is off by travel(b) - travel(a).
        amplified: by how much an error of the velocity grows until the video is done, relative.
        shares: rising from 0 to 1, at which `left` is known.
        tried: sigmas, falling, at which it is known.
        left: by sigma and share, the share of a repeated step's squared error that is left when
            this share of the tokens is computed, those that are expected to be off most, on
            remembered keys and values.
    """

    sigmas: tuple[float, ...]
    travel: tuple[float, ...]
    amplified: tuple[float, ...]
    shares: tuple[float, ...]
    tried: tuple[float, ...]
    left: tuple[tuple[float, ...], ...]

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
