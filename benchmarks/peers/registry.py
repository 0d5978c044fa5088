"""The peers by name, and the knob that gives each of them a share of the dense FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from ...hosts.diffusers.easycache import easycache
from ...hosts.diffusers.one_video import a_fifth
from . import of_diffusers
from .caches import teacache, zeus_like
from .merging import random_tokens, tome

# a method on the model for one video
Method = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Peer:
    """A method with one knob, searched between two ends.

    Args:
        knob: its name in `put_on`'s keywords; without ends it is the target itself.
        near: how far below the target the search stops; a step of 20 is 0.05.
    """

    put_on: Callable[..., AbstractContextManager[None]]
    knob: str
    low: float | None = None
    high: float | None = None
    whole: bool = False
    near: float = 0.02


PEERS = {
    "easycache": Peer(easycache, "threshold", 0.0, 1.0),
    # order 1, diffusers' default, keeps far less here: an extrapolation with guidance overshoots
    "sea_cache": Peer(partial(of_diffusers.sea_cache, order=0), "threshold", 0.0, 2.0),
    "teacache": Peer(teacache, "threshold", 0.0, 1.0),
    "first_block_cache": Peer(of_diffusers.first_block_cache, "threshold", 0.0, 1.0),
    "mag_cache": Peer(of_diffusers.mag_cache, "threshold", 0.0, 1.0),
    "zeus_like": Peer(zeus_like, "computed"),
    "tome": Peer(tome, "keep_ratio", 0.25, 1.0, near=0.005),
    "random": Peer(random_tokens, "keep_ratio", 0.02, 1.0, near=0.005),
}
# beside published figures only; over all timesteps, between the default ones it saves too little
PYRAMID = "pyramid_attention"
CALIBRATED = {
    PYRAMID: Peer(
        partial(of_diffusers.pyramid_attention_broadcast, timesteps=(-1, 1001)),
        "self_every",
        1,
        8,
        whole=True,
    )
}


class Tuner:
    """Finds the knobs of the peers on a few videos, for one model, task and number of steps.

    Args:
        sample: sampling functions of the videos to tune on; each samples one with the model as it
            is at the time.
        ratio: FLOPs ratio of some work to the same videos' dense sampling.
    """

    def __init__(self, model, steps: int, shift: float, sample, ratio):
        self.model, self.steps, self.shift = model, steps, shift
        self.sample, self.ratio = sample, ratio
        self._ratios: dict[tuple[str, float], float] = {}
        self._mag_ratios: list[float] | None = None

    def tune(self, name: str, target: float) -> tuple[str, Method]:
        """The knob in words, and the peer with it.

        Raises:
            ValueError: the peer cannot come down to the target.
        """
        peer = (PEERS | CALIBRATED)[name]

        def run(knob: float) -> float:
            if (name, knob) not in self._ratios:
                self._ratios[name, knob] = self.ratio(self._method(peer, knob))
            return self._ratios[name, knob]

        if peer.low is None:
            return f"{peer.knob} {target:.3g}", self._method(peer, target)
        ends = (peer.low, peer.high)
        knob, _ = knob_for(target, run, *ends, near=peer.near, tries=12, whole=peer.whole)
        return f"{peer.knob} {knob:.3g}", self._method(peer, knob)

    def _method(self, peer: Peer, knob: float) -> Method:
        options = {peer.knob: knob}
        if peer.put_on is of_diffusers.mag_cache:
            if self._mag_ratios is None:
                self._mag_ratios = of_diffusers.calibrate_mag_ratios(
                    self.model, self.sample, steps=self.steps
                )
            # the retention of a cache that is used for four steps is one step
            retention = a_fifth(self.steps) / self.steps
            options |= {"mag_ratios": self._mag_ratios, "retention": retention}
        return partial(peer.put_on, self.model, steps=self.steps, shift=self.shift, **options)


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
