"""What a router was trained with, as its file says (PARE, arXiv 2605.27336, eq. 8 and 12)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Conditions:
    """The budget and the kind of skipping that a router learned under.

    Args:
        k_min, k_max: shares of the blocks that run, at no noise and at full noise.
        curve: how the budget moves with the noise, name in `depth.SHAPES`.
        skipped: what a skipped block gives; "identity" is nothing (eq. 12).
        shift: flow shift of the noise levels.
    """

    k_min: float
    k_max: float
    curve: str = "falling"
    skipped: str = "identity"
    shift: float = 1.0

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> Conditions:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            made = cls(**data)
            numbers = [float(n) for n in (made.k_min, made.k_max, made.shift)]
            words = (made.curve, made.skipped)
            right = all(map(math.isfinite, numbers)) and made.shift > 0
            right &= 0 < made.k_min <= made.k_max <= 1
            right &= all(isinstance(w, str) and len(w) <= 20 for w in words)
        except (TypeError, ValueError, OverflowError):
            right = False
        if not right:
            raise ValueError(f"trained: expected what a router was trained with, got {data!r:.200}")
        return made

    def settle(
        self, chosen: Mapping[str, object], usual: Mapping[str, object]
    ) -> tuple[dict, list[str]]:
        """Values to sample with, and what to say about those that are not the router's own.

        Args:
            chosen: by name of a field; what is `usual` here stands for "as it was trained".
            usual: what an input has when nobody touched it.
        """
        settled, said = {}, []
        for name, value in chosen.items():
            own = getattr(self, name)
            settled[name] = own if value == usual[name] else value
            if settled[name] != own:
                said.append(f"{name}: {value} is set here; the router was trained with {own}")
        return settled, said

    def describe(self) -> str:
        return (
            f"The router was trained with k_min {self.k_min:g}, k_max {self.k_max:g}, "
            f"{self.curve}, {self.skipped}, shift {self.shift:g}."
        )
