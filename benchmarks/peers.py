"""The peers by name, and the knob that gives each of them a share of the dense FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch

from . import diffusers_caches as of_diffusers
from .baselines import a_fifth, knob_for, static_blocks
from .caches import easycache, teacache
from .merging import tome

# what `Settings.put_on` gives: a method on the model for one video
Method = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Peer:
    """A method with one knob, searched between two ends.

    Args:
        knob: its name in `put_on`'s keywords.
        guided: works only with guidance.
    """

    put_on: Callable[..., AbstractContextManager[None]]
    knob: str
    low: float
    high: float
    whole: bool = False
    guided: bool = False


PEERS = {
    "tome": Peer(tome, "keep_ratio", 0.25, 1.0),
    "static_blocks": Peer(static_blocks, "skip", 0, 12, whole=True),
    "easycache": Peer(easycache, "threshold", 0.0, 1.0),
    "teacache": Peer(teacache, "threshold", 0.0, 1.0),
    "first_block_cache": Peer(of_diffusers.first_block_cache, "threshold", 0.0, 1.0),
    "mag_cache": Peer(of_diffusers.mag_cache, "threshold", 0.0, 1.0),
    # order 1, diffusers' default, keeps far less here: an extrapolation with guidance overshoots
    "sea_cache": Peer(partial(of_diffusers.sea_cache, order=0), "threshold", 0.0, 2.0),
    "taylorseer": Peer(of_diffusers.taylorseer, "every", 1, 8, whole=True),
    "taylorseer_order_0": Peer(
        partial(of_diffusers.taylorseer, order=0, warmup=1), "every", 1, 8, whole=True
    ),
    # over all timesteps: between the default ones it saves too little to be compared
    "pyramid_attention": Peer(
        partial(of_diffusers.pyramid_attention_broadcast, timesteps=(-1, 1001)),
        "self_every",
        1,
        8,
        whole=True,
    ),  # fmt: skip
    "faster_cache": Peer(of_diffusers.faster_cache, "uncond_every", 1, 8, whole=True, guided=True),
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
        self._fixed: dict[str, object] = {}

    def tune(self, name: str, target: float) -> tuple[str, Method]:
        """The knob in words, and the peer with it.

        Raises:
            ValueError: the peer cannot come down to the target.
        """
        peer = PEERS[name]

        def run(knob: float) -> float:
            if (name, knob) not in self._ratios:
                self._ratios[name, knob] = self.ratio(self._method(peer, knob))
            return self._ratios[name, knob]

        knob, _ = knob_for(target, run, peer.low, peer.high, tries=12, whole=peer.whole)
        words = f"{len(self._skipped(knob))} blocks" if peer.knob == "skip" else f"{knob:.3g}"
        return f"{peer.knob} {words}", self._method(peer, knob)

    def _method(self, peer: Peer, knob: float) -> Method:
        options = {peer.knob: self._skipped(knob) if peer.knob == "skip" else knob}
        if peer.put_on is of_diffusers.mag_cache:
            if "mag" not in self._fixed:
                self._fixed["mag"] = of_diffusers.calibrate_mag_ratios(
                    self.model, self.sample, steps=self.steps
                )
            # the retention of a cache that is used for four steps is one step
            options |= {
                "mag_ratios": self._fixed["mag"],
                "retention": a_fifth(self.steps) / self.steps,
            }
        return partial(peer.put_on, self.model, steps=self.steps, shift=self.shift, **options)

    def _skipped(self, count: float) -> tuple[int, ...]:
        """The blocks that change the hidden state least; the first and the last stay."""
        if "order" not in self._fixed:
            self._fixed["order"] = self._by_residual()
        return tuple(sorted(self._fixed["order"][: int(count)]))

    def _by_residual(self) -> list[int]:
        blocks = list(self.model.blocks)
        change = torch.zeros(len(blocks))

        def record(index):
            def hook(module, args, out):
                change[index] += float((out - args[0]).norm() / args[0].norm())

            return hook

        handles = [b.register_forward_hook(record(i)) for i, b in enumerate(blocks)]
        try:
            for sample in self.sample:
                sample()
        finally:
            for handle in handles:
                handle.remove()
        inner = range(1, len(blocks) - 1)
        return sorted(inner, key=lambda index: float(change[index]))
