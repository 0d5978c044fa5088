"""Checks rows that people share and prints them: `python -m wantrim.benchmarks.rows FILES...`.

A row is what WanTrim Verdict gives as JSON: a trial of one seed on somebody's own model. A file
holds one row, a list of them, or one a line. What is damaged, of another kind or holds more than a
row should is refused in words; the other rows are printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from ..profiles.fingerprint import Fingerprint
from ..report.verdict import FORMAT

log = logging.getLogger(__name__)

# a row has some KB
MOST_BYTES = 1 << 20
MOST_TEXT = 100
RUN = {
    "pixels": list, "grid": list, "steps": int, "sampler": str, "guidance": float,
    "prompts": int, "shift": float, "start_image": bool,
}  # fmt: skip
VERSIONS = ("wantrim", "comfyui", "torch")
ROW = {
    "name": str, "label": str, "seconds": float, "cached": bool, "work": float, "psnr_db": float,
    "ssim": float, "motion_ratio": float, "flicker": float, "dense_flicker": float, "equal": bool,
    "failed": str, "remarks": int,
}  # fmt: skip
TOP = {"format", "models", "run", "device", "versions", "wanted", "best", "rows"}
# (least, most) of what is measured
LIMITS = {
    "seconds": (0, 1e7), "work": (0, 2), "psnr_db": (-50, 400), "ssim": (-1, 1.001),
    "motion_ratio": (0, 1e6), "flicker": (0, 1), "dense_flicker": (0, 1), "remarks": (0, 1e4),
    "guidance": (-100, 1000), "shift": (0, 1000), "steps": (0, 2000), "prompts": (1, 16),
}  # fmt: skip
MODEL = {"class", "width", "sample"}
SIZES = {"dim", "ffn_dim", "num_blocks", "num_heads", "in_channels", "out_channels"}


def check_row(row: object) -> dict:
    """The row, when it is one.

    Raises:
        ValueError: says what was expected and what came.
    """
    if not isinstance(row, dict) or row.get("format") != FORMAT:
        came = row.get("format") if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"expected a row of WanTrim Verdict ({FORMAT}), got {came!r:.80}")
    _only(row, TOP, "the row")
    models = row["models"]
    if not isinstance(models, list) or not 1 <= len(models) <= 2:
        raise ValueError("models: expected one, or two experts")
    for model in models:
        Fingerprint.from_json(model)
        _only(model, MODEL | SIZES, "a model", optional={"width", "sample"})
        _typed(model["class"], "class", str)
    _fields(row["run"], RUN, "run")
    for name in ("pixels", "grid"):
        _size(row["run"][name], name)
    _only(row["versions"], set(VERSIONS), "versions")
    for name in VERSIONS:
        _typed(row["versions"][name], name, str)
    _typed(row["device"], "device", str)
    _number(row["wanted"], "wanted", (1, 100))
    rows = row["rows"]
    if not isinstance(rows, list) or not 1 <= len(rows) <= 32:
        raise ValueError("rows: expected 1 to 32 candidates")
    for one in rows:
        _fields(one, ROW, "a candidate")
    names = [one["name"] for one in rows]
    if names[0] != "whole" or len(set(names)) < len(names):
        raise ValueError(f"rows: expected the whole run first and names that differ, got {names}")
    if row["best"] is not None and row["best"] not in names[1:]:
        raise ValueError(f"best: expected the name of a candidate, got {row['best']!r:.80}")
    return row


def _only(data: object, names: set[str], what: str, optional: set[str] = frozenset()) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{what}: expected fields, got {data!r:.80}")
    missing, more = names - optional - set(data), set(data) - names
    if missing or more:
        raise ValueError(
            f"{what}: expected {', '.join(sorted(names))}; missing {sorted(missing)}, not known "
            f"{sorted(map(str, more))}"
        )


def _fields(data: object, kinds: dict[str, type], what: str) -> None:
    _only(data, set(kinds), what)
    for name, kind in kinds.items():
        if data[name] is not None or name == "name":
            _typed(data[name], name, kind)


def _typed(value: object, name: str, kind: type) -> None:
    if kind is str:
        # a path or a text of somebody's has no place in a row
        short = isinstance(value, str) and len(value) <= MOST_TEXT and value.isprintable()
        if not short or "/" in value or "\\" in value:
            raise ValueError(f"{name}: expected a short text without a path, got {value!r:.80}")
    elif kind in (int, float):
        _number(value, name, LIMITS[name])
    elif not isinstance(value, kind):
        raise ValueError(f"{name}: expected {kind.__name__}, got {value!r:.80}")


def _number(value: object, name: str, limits: tuple[float, float]) -> None:
    # no NaN either
    if type(value) not in (int, float) or not limits[0] <= value <= limits[1]:
        raise ValueError(f"{name}: expected {limits[0]:g} to {limits[1]:g}, got {value!r:.80}")


def _size(value: object, name: str) -> None:
    good = isinstance(value, list) and len(value) == 3
    if value is not None and not (good and all(type(n) is int and 0 < n < 1e6 for n in value)):
        raise ValueError(f"{name}: expected frames, height and width, got {value!r:.80}")


def read_rows(path: Path) -> Iterator[tuple[str, dict | ValueError]]:
    """Every row of a file with its place, or what is wrong with it."""
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"expected some KB, got {path.stat().st_size} bytes")
        found = _parsed(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        yield path.name, ValueError(f"cannot be read ({error})")
        return
    for number, row in enumerate(found, 1):
        place = path.name if len(found) == 1 else f"{path.name}, row {number}"
        try:
            yield place, check_row(row)
        except ValueError as error:
            yield place, error


def _parsed(text: str) -> list:
    """One row, a list of them, or one a line."""
    try:
        try:
            data = json.loads(text)
        except ValueError:
            data = [json.loads(line) for line in text.splitlines() if line.strip()]
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    return data if isinstance(data, list) else [data]


def table(rows: list[dict]) -> str:
    """Rows as text: a block for each trial, a line for each candidate."""
    lines = []
    for row in rows:
        run = row["run"]
        sizes = "x".join(map(str, run["pixels"] or ["?"]))
        model = row["models"][0]
        pair = " pair" if len(row["models"]) == 2 else ""
        lines += [
            f"{model['class']}{pair}, {model['num_blocks']} blocks, dim {model['dim']}, {sizes}, "
            f"{run['steps']} steps {run['sampler']}, guidance {run['guidance']}, "
            f"{row['wanted']:g}x on {row['device']}",
        ]
        width = max(len(one["label"] or one["name"]) for one in row["rows"])
        for one in row["rows"]:
            cells = [
                _cell(one["seconds"], "{:8.1f} s"),
                _cell(one["work"], "{:5.0%}"),
                "   equal" if one["equal"] else _cell(one["psnr_db"], "{:5.1f} dB"),
                _cell(one["ssim"], "{:.3f}"),
                _cell(one["motion_ratio"], "{:.2f}x"),
            ]
            mark = "  <- best" if one["name"] == row["best"] else ""
            failed = "" if one["failed"] is None else f"  {one['failed']}"
            label = one["label"] or one["name"]
            lines.append(f"  {label:<{width}}  {'  '.join(cells)}{mark}{failed}")
        lines.append("")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return form.format(value) if value is not None else " " * len(form.format(0))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    good, refused = [], 0
    for path in args.files:
        for place, row in read_rows(path):
            if isinstance(row, ValueError):
                refused += 1
                log.warning("refused: %s: %s", place, row)
            else:
                good.append(row)
    if good:
        sys.stdout.write(table(good))
    log.info("%d rows are good, %d are refused", len(good), refused)
    return 1 if refused or not good else 0


if __name__ == "__main__":
    sys.exit(main())
