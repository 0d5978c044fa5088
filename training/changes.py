"""Changes to a recipe from the command line: `--set width.protection=1 data.batch=8`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# of a recipe, beside its stages; a file may have none of them
TABLES = ("data", "run")
# a text whose quotes a shell took away
BARE = re.compile(r"""[^\s"'#\[\]{}=]([^"'#\[\]{}=\n]*[^\s"'#\[\]{}=])?""")


def change(given: dict, changes: Sequence[str]) -> None:
    """Put KEY=VALUE pairs into a recipe's tables; VALUE as in TOML, or a text without its quotes.

    A key goes down the tables by dots. A stage is named by its kind; of several of one kind all
    are meant.

    Raises:
        ValueError: no KEY=VALUE, no TOML value, or no such stage.
    """
    for text in changes:
        key, sign, value = text.partition("=")
        try:
            value = tomllib.loads(f"value = {value}")["value"]
        except ValueError as error:
            value = value.strip()
            if not BARE.fullmatch(value):
                raise ValueError(
                    f"--set {text}: expected KEY=VALUE with a value as in TOML, for example "
                    "width.protection=1.0 or router.content=none"
                ) from error
        first, *rest = key.strip().split(".")
        if not sign or not first:
            raise ValueError(f"--set {text}: expected KEY=VALUE")
        tables = [given]
        if first not in given and first not in TABLES and rest:
            stages = given.get("stage")
            known = stages if isinstance(stages, list) else []
            tables = [s for s in known if isinstance(s, dict) and s.get("kind") == first]
            if not tables:
                kinds = ", ".join(str(s.get("kind")) for s in known if isinstance(s, dict))
                raise ValueError(
                    f"--set {text}: expected a table of the recipe or a stage ({kinds}), got "
                    f"{first!r}"
                )
        else:
            rest = [first, *rest]
        for table in tables:
            inner = table
            for name in rest[:-1]:
                inner = inner.setdefault(name, {})
                if not isinstance(inner, dict):
                    raise ValueError(f"--set {text}: {name} is no table")
            inner[rest[-1]] = value
