"""What the values of a recipe's tables can be."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import MISSING, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Expected:
    """What a value of a recipe can be: a choice, or a type between two ends."""

    kind: type
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    choices: tuple[str, ...] = ()
    inner: type | None = None
    several: bool = False

    def __str__(self) -> str:
        if self.several:
            return "a text, or a list of them"
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        if self.inner is not None:
            return "a table" if self.kind is dict else "one or more tables"
        names = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
        said = names[self.kind]
        if self.above:
            said += f" above {self.low:g}"
        elif self.low > -math.inf:
            said += f" of {self.low:g} or more" if self.high == math.inf else f" from {self.low:g}"
        if self.high < math.inf:
            said += f" to {self.high:g}" if not self.above else f" and at most {self.high:g}"
        return said

    def fits(self, value: object) -> bool:
        if self.several and isinstance(value, tuple):
            return bool(value) and all(isinstance(one, str) and one for one in value)
        if self.choices:
            return value in self.choices if isinstance(value, str) else False
        if self.kind in (str, bool):
            return isinstance(value, self.kind)
        # true and false are whole numbers to Python
        right = int | float if self.kind is float else int
        if not isinstance(value, right) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)


def value(kind: type, default: Any = MISSING, **limits) -> Any:
    return field(default=default, metadata={"expected": Expected(kind, **limits)})


def choice(default: Any, *choices: str) -> Any:
    return value(str, default, choices=choices)


def table(cls: type, default: Any = MISSING, many: bool = False) -> Any:
    return value(list if many else dict, default, inner=cls)


class Checked:
    """A table of a recipe; a value that does not fit is refused, wherever it comes from."""

    def __post_init__(self):
        for key, expected in expected_of(type(self)).items():
            value = getattr(self, key)
            if expected.inner is None and not expected.fits(value):
                raise ValueError(f"{key}: expected {expected}, got {value!r:.80}")


def expected_of(cls: type) -> dict[str, Expected]:
    return {item.name: item.metadata["expected"] for item in dataclasses.fields(cls)}


def refuse_unread(table: Checked, key: str, by: str, place: str = "") -> None:
    """Refuse another value than a key's default."""
    value, default = getattr(table, key), type(table).__dataclass_fields__[key].default
    if value != default:
        raise ValueError(
            f"{place}{key}: {by} does not read it, got {value!r:.80}. Leave it out ({default!r:.80})."
        )
