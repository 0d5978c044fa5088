"""Rows of the quality bench beside each other: PSNR less that of two others, paired by video."""

from __future__ import annotations

from collections.abc import Sequence

from .cases import DEFAULT, FAIR
from .metrics import difference
from .table import key_of

# columns of a verdict, by the method that it is against
TWINS = {"vs_steps": "fewer_steps", "vs_default": DEFAULT}
# rows of the same videos
CELL = ("model", "task", "steps", "guidance", "shift", "size", "prompts", "seeds", "device")


def paired_rows(results: dict[tuple, dict]) -> list[dict]:
    """The rows, with their PSNR less that of two others at the same target, paired by video.

    `vs_steps*` is against fewer steps, `vs_default*` against the default, each where it costs as
    much within FAIR of the dense FLOPs; with its 95% interval, and "tie" where that holds 0.
    """
    rows = []
    for (task, point, case), result in results.items():
        if "row" not in result:
            continue
        row = dict(result["row"])
        for name, method in TWINS.items():
            twins = [
                r
                for (t, p, _), r in results.items()
                if (t, p) == (task, point) and r.get("row", {}).get("method") == method
            ]
            twin = min(twins, key=lambda r: apart(r["row"], row), default=None)
            near = twin and apart(twin["row"], row) <= FAIR
            if near and case.method not in ("dense", method):
                row |= paired(name, result, twin)
        rows.append(row)
    return rows


def outdated(
    older: Sequence[dict[str, str]], rows: Sequence[dict], key: Sequence[str]
) -> list[dict]:
    """Older rows whose verdict is against one that `rows` bring anew, without that verdict.

    Their videos are not there any more to be paired with the new ones.

    Args:
        key: of the table.
    """
    before = {key_of(row, key): row for row in older}
    made = {key_of(row, key) for row in rows}
    changed = []
    for row in rows:
        old = before.get(key_of(row, key))
        if old is None or old["commit"] != row["commit"]:
            changed += [row, *([old] if old else [])]
    found = []
    for name, row in before.items():
        blank = {}
        for column, method in TWINS.items():
            if row.get(column) and any(_compared(row, one, method) for one in changed):
                blank |= {f"{column}{end}": "" for end in ("", "_db", "_lo", "_hi")}
        if blank and name not in made:
            found.append(row | blank)
    return found


def _compared(row: dict, twin: dict, method: str) -> bool:
    same = key_of(row, CELL) == key_of(twin, CELL) and twin["method"] == method
    # rows have four digits
    return same and apart(row, twin) <= FAIR + 1e-4


def apart(one: dict, other: dict) -> float:
    """Of the dense FLOPs, what two rows differ by."""
    return abs(float(one["flops_ratio"]) - float(other["flops_ratio"]))


def paired(name: str, result: dict, twin: dict) -> dict[str, object]:
    """Columns `name`* of a result: its PSNR less a twin's, with the interval and the verdict."""
    mean, low, high = difference(result["psnr"], twin["psnr"], result["clusters"])
    verdict = "tie" if low <= 0 <= high else ("better" if mean > 0 else "worse")
    return {f"{name}_db": mean, f"{name}_lo": low, f"{name}_hi": high, name: verdict}
