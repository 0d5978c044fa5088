"""What a run came to, in one line: as numbers, which every language can say, and in English."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..engine.program import Program
from ..engine.record import Record, Step
from .figures import SAME, expected_speedup, how_fast, measured_speed

# fractions that have a name
NAMES = {
    (1, 50): "a fiftieth", (1, 20): "a twentieth", (1, 10): "a tenth", (1, 9): "a ninth",
    (1, 8): "an eighth", (1, 7): "a seventh", (1, 6): "a sixth", (1, 5): "a fifth",
    (1, 4): "a quarter", (1, 3): "a third", (2, 5): "two fifths", (1, 2): "half",
    (3, 5): "three fifths", (2, 3): "two thirds", (3, 4): "three quarters", (4, 5): "four fifths",
    (9, 10): "nine tenths",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What the steps of a run are, or will be.

    Args:
        whole, part, patterned, repeated, answered: steps that compute everything, a part of it,
            everything but with heads in their patterns, nothing, or are another node's.
        least, most: what the parts are of a whole step's blocks and tokens, as fractions.
        less: times less work; None where it is not known.
        faster: times faster, measured here; None where there is nothing to compare.
        asked: times less work that were asked for and could not be reached.
        starved: nothing behind the first step is computed.
        calls: these are model calls, of which a step makes several.
    """

    steps: int
    whole: int
    part: int
    patterned: int
    repeated: int
    answered: int
    least: tuple[int, int] | None = None
    most: tuple[int, int] | None = None
    less: float | None = None
    faster: float | None = None
    asked: float | None = None
    starved: bool = False
    calls: bool = False

    def line(self) -> str:
        """In English, without a full stop."""
        part = ""
        if self.part:
            part = f"at {NAMES[self.least]}"
            part += "" if self.least == self.most else f" to {NAMES[self.most]}"
        kinds = (
            (self.whole, "whole"),
            (self.part, part),
            (self.patterned, "with heads in patterns"),
            (self.repeated, "repeated"),
            (self.answered, "answered by another node"),
        )
        said = [f"{count} {what}" for count, what in kinds if count]
        noun = ("model call" if self.calls else "step") + "s" * (self.steps != 1)
        count, what = said[0].split(" ", 1)
        begin = f"all {count}" if count == str(self.steps) and self.steps > 1 else count
        of = "" if count == str(self.steps) else f" of {self.steps}"
        said[0] = f"{begin}{of} {noun} {what}"
        return ", ".join(said) + self._gains()

    def _gains(self) -> str:
        gains = []
        if self.less is not None and self.less > 1 + SAME:
            gains.append(f"{self.less:.2g}x less work")
        if self.asked is not None:
            gains.append(f"{self.asked:.3g}x was asked for")
        if self.starved:
            gains.append("too little for a video")
        if self.faster is not None:
            gains.append(f"{how_fast(self.faster)} here")
        return f": {', '.join(gains)}" if gains else ""


def fraction(share: float) -> tuple[int, int]:
    """The named fraction that is nearest."""
    return min(NAMES, key=lambda nd: abs(nd[0] / nd[1] / share - 1))


def outcome(record: Record) -> Outcome:
    """Of the steps that ran to their end, of which there is one at least."""
    record = record.without_cut()
    kinds = [_kind(step) for step in record.steps]
    speed, faster = measured_speed(record), None
    # a reference that warmed up is no measure
    if speed is not None and not speed.warming_up:
        counted = speed.counted + kinds.count("answered")
        faster = speed.run if counted == len(kinds) else None
    shares = [step.kept_share for step in record.steps]
    # what another node answered is no gain of ours
    own = replace(record, steps=[step for step in record.steps if not step.answered])
    came = _outcome(record, kinds, shares, expected_speedup(own), faster)
    return replace(came, calls=record.by_calls)


def planned(record: Record, programs: Sequence[Program]) -> Outcome:
    """Of a run that a dial decided and whose steps do what these programs say."""
    steps = [Step(0.0, 0.0, program, rows=list(program.rows)) for program in programs]
    return _outcome(
        record, [*map(_kind, steps)], [step.kept_share for step in steps], record.expected
    )


def _kind(step: Step) -> str:
    if step.answered:
        return "answered"
    if step.whole:
        return "whole"
    share = step.kept_share
    return "patterned" if share == 1 else "part" if share else "repeated"


def _outcome(record: Record, kinds, shares, less, faster=None) -> Outcome:
    parts = [share for kind, share in zip(kinds, shares, strict=True) if kind == "part"]
    names = ("whole", "part", "patterned", "repeated", "answered")
    counts = [kinds.count(name) for name in names]
    alone = record.asked is not None and not record.both
    return Outcome(
        len(kinds),
        *counts,
        fraction(min(parts)) if parts else None,
        fraction(max(parts)) if parts else None,
        less,
        faster,
        record.asked if record.missed else None,
        alone and len(kinds) == counts[0] + counts[3] > counts[0] == 1,
    )
