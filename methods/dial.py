"""One dial for a model, or one for the two experts of Wan2.2: a wish, solved when a run begins."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .mixes import AUTO, MIXES, PRIORITIES, candidates
from .profile import Profile
from .routers import residual_sizes
from .schedule import progress_at, sigma_at
from .solve import TOLERANCE, Cost, Parts, Run, Solved, flops_cost, solve
from .width import check_recorded

MAX_SPEEDUP = 4.0
MAX_DENSE_STEPS = 100
HIGH, LOW = "high", "low"
# more than any path allows
OUT_OF_REACH = 1e6
HALVINGS = 40


@dataclass(frozen=True, eq=False)
class Dial:
    """What an artist wants; compared by identity, as its profile is.

    Args:
        speedup: of the whole run, 1 (off) to 4.
        priority: name in `PRIORITIES`.
        profile: of this model; None trims tokens only.
        dense_first_steps, dense_last_steps: steps that compute everything, of this model's run, or
            of both experts' together.
        final: nothing is trimmed, by this dial or by anything else.
        expert: HIGH or LOW noise expert of a pair that shares the speed-up; None is a model alone.
        partner: the other expert's profile.
        boundary: sigma at which the pair changes experts; 0 takes it from the sampler's steps.

    Raises:
        ValueError: says what was expected.
    """

    speedup: float = 1.5
    priority: str = AUTO
    profile: Profile | None = None
    dense_first_steps: int = 0
    dense_last_steps: int = 0
    final: bool = False
    expert: str | None = None
    partner: Profile | None = None
    boundary: float = 0.0

    def __post_init__(self):
        if not 1.0 <= self.speedup <= MAX_SPEEDUP:
            raise ValueError(f"speedup: expected 1 (off) to {MAX_SPEEDUP:g}, got {self.speedup}")
        if self.priority not in PRIORITIES:
            raise ValueError(
                f"priority: expected one of {', '.join(PRIORITIES)}, got {self.priority!r:.60}"
            )
        for name in ("dense_first_steps", "dense_last_steps"):
            if not 0 <= getattr(self, name) <= MAX_DENSE_STEPS:
                raise ValueError(
                    f"{name}: expected 0 to {MAX_DENSE_STEPS}, got {getattr(self, name)}"
                )
        if not 0.0 <= self.boundary < 1.0:
            raise ValueError(f"boundary: expected 0 to less than 1, got {self.boundary}")
        for profile in (self.profile, self.partner):
            if profile is not None:
                # what the blocks' router and the heads' budget read
                residual_sizes(profile)
                check_recorded(profile, "cross_output")

    @property
    def off(self) -> bool:
        return self.speedup == 1.0

    def describe(self, solved: Solved | None = None) -> str:
        """The wish in words; with what it has become, when that is known."""
        pair = "" if self.expert is None else f" of both experts, here the {self.expert} noise one"
        became = "" if solved is None or self.priority != AUTO else f" ({solved.priority})"
        return f"{self.speedup:.2f}x{pair}, priority {self.priority}{became}"

    def solve(self, run: Run, fixed: Parts | None = None, cost: Cost = flops_cost) -> Solved:
        """The plan for a run, with the parts that others decided."""
        runs, tried = self._both(run), []
        names = candidates(self.priority, run.starts_given)
        # what a pair reaches is a guess of each expert; both must take the same
        for priority in names[:1] if runs is not None else names:
            wanted, together = self._share(runs, priority, cost)
            options = self._guards(self.expert) | {"fixed": fixed, "cost": cost}
            solved = solve(run, wanted, priority, self.profile, **options)
            if together is None:
                together = solved.reached
            elif together < self.speedup * (1 - TOLERANCE):
                why = filter(None, (self._why(runs, together), solved.why))
                solved = replace(solved, why="; ".join(why))
            tried.append((min(together, self.speedup), solved))
            if together >= self.speedup * (1 - TOLERANCE):
                break
        # of equals the one that is preferred
        return max(tried, key=lambda one: one[0])[1]

    def _guards(self, expert: str | None) -> dict[str, int]:
        """The guarded steps of an expert's run; None is a model alone."""
        return {
            "dense_first": 0 if expert == LOW else self.dense_first_steps,
            "dense_last": 0 if expert == HIGH else self.dense_last_steps,
        }

    def _share(
        self, runs: tuple[Run, Run] | None, priority: str, cost: Cost
    ) -> tuple[float, float | None]:
        """This expert's own speed-up, and what both together reach; None for a model alone.

        Each expert sees only its own sigmas. The other's are taken to be spread as evenly, so that
        both find the same split, each on its own.
        """
        if runs is None:
            return self.speedup, None
        high = self.expert == HIGH
        profiles = (self.profile, self.partner) if high else (self.partner, self.profile)
        most = []
        for one, profile, expert in zip(runs, profiles, (HIGH, LOW), strict=True):
            guards = self._guards(expert)
            end = solve(one, OUT_OF_REACH, priority, profile, **guards, cost=cost)
            most.append(1 - 1 / end.reached)
        steps = [one.steps for one in runs]
        shares = [count / sum(steps) for count in steps]
        saved = split(1 - 1 / self.speedup, shares, most, MIXES[priority].experts)
        together = 1 / (1 - sum(a * b for a, b in zip(shares, saved, strict=True)))
        return 1 / (1 - saved[0 if high else 1]), together

    def _both(self, run: Run) -> tuple[Run, Run] | None:
        """The runs of the high and of the low noise expert; None for a model alone."""
        if self.expert is None:
            return None
        partner = other_slice(run, self.expert == HIGH, self.boundary)
        if partner is None:
            return None
        return (run, partner) if self.expert == HIGH else (partner, run)

    def _why(self, runs: tuple[Run, Run], together: float) -> str:
        high, low = runs
        return (
            f"both experts together reach {together:.2f}x of the {self.speedup:.2f}x: with about "
            f"{high.steps} + {low.steps} steps, of which each expert computes at least one whole"
        )


def other_slice(run: Run, high: bool, boundary: float = 0.0) -> Run | None:
    """The run of the pair's other expert, as far as this one's sigmas tell; None when it has none.

    Args:
        high: whether `run` is the high noise expert's.
        boundary: sigma at which the experts change; 0 is where this run ends or begins.
    """
    at = boundary or run.sigmas[-1 if high else 0]
    done = progress_at(at, run.shift)
    own, other = (done, 1 - done) if high else (1 - done, done)
    if min(own, other) < 1e-6:
        return None
    count = max(1, round(run.steps * other / own))
    begins, ends = (done, 1.0) if high else (0.0, done)
    places = [begins + (ends - begins) * i / count for i in range(count + 1)]
    return replace(run, sigmas=tuple(sigma_at(place, run.shift) for place in places))


def split(wanted: float, shares, most, weights) -> list[float]:
    """What each expert saves of its own cost, so that both together save `wanted`.

    Args:
        shares: of the whole cost; they add up to 1.
        most: that each can save.
        weights: savings relative to each other, until one of them is at its most.
    """

    def saved(scale: float) -> list[float]:
        return [min(limit, scale * weight) for limit, weight in zip(most, weights, strict=True)]

    def total(scale: float) -> float:
        return sum(a * b for a, b in zip(shares, saved(scale), strict=True))

    low, high = 0.0, 1 / min(weights)
    if total(high) <= wanted:
        return saved(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) < wanted else (low, middle)
    return saved(high)
