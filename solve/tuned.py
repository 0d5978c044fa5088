"""What a whole run of somebody's own model showed, for the dial to go by (ours).

A trial samples one seed whole and under several settings; WanTrim Profile records a run that is
whole. Of either the change of the velocity from step to step is known, for that model, prompt and
size. What an error is worth later on, and what a part of the tokens leaves of it, one whole run does
not tell: these stay those of the curves that ship. In how many tokens change lies a run sees itself
before its first partial step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate

import torch

from .curves import Curves

# tokens of two runs of one resolution class: within this factor
SAME_SIZE = 1.5
# sigmas of two runs of one schedule
SAME_SIGMA = 0.05
MOST_STEPS = 1000
# schedulers of other models begin above 1
MOST_SIGMA = 1e3


@dataclass(frozen=True)
class Travel:
    """How far a model's velocity went in a whole run.

    Args:
        sigmas: falling, one for each step.
        travel: root mean square change of the velocity along the way from the first sigma.
    """

    sigmas: tuple[float, ...]
    travel: tuple[float, ...]

    def on(self, curves: Curves) -> Curves:
        """`curves` with this travel in place of theirs; where it says nothing theirs, to its scale."""
        first, last = self.sigmas[0], self.sigmas[-1]
        before = tuple(sigma for sigma in curves.sigmas if sigma > first)
        behind = tuple(sigma for sigma in curves.sigmas if sigma < last)
        at = {s: float(t) for s, t in zip(curves.sigmas, curves.travel, strict=True)}
        begins, ends = (float(value) for value in curves.travel_at((first, last)))
        span = self.travel[-1] - self.travel[0]
        scale = span / (ends - begins) if ends > begins else 1.0
        start = scale * (begins - at[before[0]]) - self.travel[0] if before else 0.0
        travel = (
            *(scale * (at[sigma] - at[before[0]]) for sigma in before),
            *(start + value for value in self.travel),
            *(start + self.travel[-1] + scale * (at[sigma] - ends) for sigma in behind),
        )
        sigmas = (*before, *self.sigmas, *behind)
        amplified, reach = (
            tuple(float(value) for value in at(sigmas))
            for at in (curves.amplified_at, curves.reach_at)
        )
        return replace(curves, sigmas=sigmas, travel=travel, amplified=amplified, reach=reach)

    def joined(self, later: Travel) -> Travel:
        """This expert's, and behind it the other's; nothing is repeated from one to the other."""
        # a sampler of two calls a step calls this one at the other's first sigma too
        own = sum(sigma > later.sigmas[0] for sigma in self.sigmas)
        whole = (*self.travel[:own], *(self.travel[-1] + value for value in later.travel))
        return Travel((*self.sigmas[:own], *later.sigmas), whole)


class Way:
    """Takes in the velocities of a run, one at a time, and tells how far they went."""

    def __init__(self):
        self._sigmas: list[float] = []
        self._changes: list[torch.Tensor] = []
        # one velocity is held at a time
        self._last: torch.Tensor | None = None

    def see(self, sigma: float, velocity: torch.Tensor) -> None:
        """Take in one, guidance included, of any shape; second calls of a step are left out."""
        last = self._last
        if last is not None:
            if sigma >= self._sigmas[-1] or velocity.shape != last.shape:
                return
            self._changes.append((velocity - last).square().mean().sqrt())
        self._last = velocity
        self._sigmas.append(sigma)

    def ended(self) -> Travel | None:
        """All of it, in one wait for the device; None of too few steps, or where it is no numbers."""
        self._last = None
        sigmas = tuple(min(1.0, sigma) for sigma in self._sigmas)
        if len(sigmas) < 2 or not _falls(sigmas):
            return None
        travel = tuple(accumulate(torch.stack(self._changes).tolist(), initial=0.0))
        return Travel(sigmas, travel) if math.isfinite(travel[-1]) else None


@dataclass(frozen=True)
class Tuned:
    """The outcome of one trial, or a run that WanTrim Profile recorded, for one model.

    Args:
        sigmas: of the model's own steps, the last included.
        prompts: 2 with guidance, 1 without.
        starts_given: whether the first latent frame is given.
        tokens: of the video.
        speedup: that was asked for.
        chosen: what won, in words; None of a recorded run.
        shares: of the plan that won, one for each step; None when what won is not a plan of ours.
        travel: of the whole run.
        heads: of self-attention, what was left by heads whose patterns the run finds, where the
            trial put them beside the plan.
    """

    sigmas: tuple[float, ...]
    prompts: int
    starts_given: bool
    tokens: int
    speedup: float
    chosen: str | None
    shares: tuple[float, ...] | None
    travel: Travel
    heads: float | None = None

    @property
    def partial(self) -> bool:
        return any(0.0 < share < 1.0 for share in self.shares or ())

    @property
    def recorded(self) -> bool:
        """Whether WanTrim Profile recorded it, and no trial chose anything."""
        return self.chosen is None

    def resembles(
        self, sigmas: Sequence[float], prompts: int, starts_given: bool, tokens: int
    ) -> bool:
        """Whether another run is of this one's steps, guidance, task and resolution class."""
        return (
            len(sigmas) == len(self.sigmas)
            and (prompts, starts_given) == (self.prompts, self.starts_given)
            and abs(math.log(tokens / self.tokens)) <= math.log(SAME_SIZE) + 1e-9
            and all(abs(a - b) <= SAME_SIGMA for a, b in zip(sigmas, self.sigmas, strict=True))
        )

    @property
    def facts(self) -> tuple:
        """What `resembles` asks of a run."""
        return self.sigmas, self.prompts, self.starts_given, self.tokens

    def to_json(self) -> dict:
        """As plain data, as it comes out of a file."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: object) -> Tuned:
        """Read what `to_json` wrote."""
        if not isinstance(data, dict) or not isinstance(data.get("travel"), dict):
            raise ValueError(f"expected what a whole run showed, got {data!r:.80}")
        sigmas = _numbers(data, "sigmas", MOST_SIGMA, at_least=2)
        shares = None if data.get("shares") is None else _numbers(data, "shares", 1.0)
        if shares is not None and len(shares) != len(sigmas) - 1:
            raise ValueError(f"expected a share for each of {len(sigmas) - 1} steps")
        way = Travel(
            _numbers(data["travel"], "sigmas", MOST_SIGMA, at_least=2),
            _numbers(data["travel"], "travel", math.inf, at_least=2),
        )
        if len(way.sigmas) != len(way.travel) or not _falls(way.sigmas) or not _falls(sigmas):
            raise ValueError("expected sigmas that fall, and as many values of travel")
        if not _falls([-value for value in way.travel], strictly=False):
            raise ValueError("expected travel that rises")
        counts = (data.get("prompts"), data.get("tokens"))
        if not all(type(count) is int and 0 < count < 1 << 31 for count in counts):
            raise ValueError(f"expected numbers of prompts and tokens, got {counts!r:.80}")
        [speedup] = _numbers({"speedup": [data.get("speedup")]}, "speedup", 1e3, least=1.0)
        chosen, given = data.get("chosen"), data.get("starts_given")
        said = chosen is None or (isinstance(chosen, str) and len(chosen) <= 200)
        if not said or type(given) is not bool:
            raise ValueError(f"expected what won in words, got {chosen!r:.80}")
        heads = data.get("heads")
        if heads is not None:
            [heads] = _numbers({"heads": [heads]}, "heads", 1.0)
        return cls(sigmas, counts[0], given, counts[1], speedup, chosen, shares, way, heads)


def of_both(high: Sequence[Tuned], low: Sequence[Tuned]) -> list[tuple[Tuned, ...]]:
    """What both experts go by: where both parts of a run were recorded by all of it, as in a trial."""
    found = [list(high), list(low)]
    for i, one in enumerate(high):
        for j, other in enumerate(low):
            same = one.recorded and other.recorded and one.facts[1:] == other.facts[1:]
            if same and abs(one.sigmas[-1] - other.sigmas[0]) <= SAME_SIGMA:
                way = one.travel.joined(other.travel)
                found[0][i], found[1][j] = replace(one, travel=way), replace(other, travel=way)
    return [tuple(runs) for runs in found]


def _numbers(
    data: dict, name: str, most: float, at_least: int = 1, least: float = 0.0
) -> tuple[float, ...]:
    values = data.get(name)
    good = isinstance(values, list) and at_least <= len(values) <= MOST_STEPS
    # no NaN either
    if not good or not all(
        type(value) in (int, float) and least <= value <= min(most, 1e30) for value in values
    ):
        raise ValueError(
            f"{name}: expected {at_least} or more numbers from {least:g}, got {values!r:.80}"
        )
    return tuple(float(value) for value in values)


def _falls(values: Sequence[float], strictly: bool = True) -> bool:
    return all(a > b or (not strictly and a == b) for a, b in zip(values, values[1:], strict=False))
