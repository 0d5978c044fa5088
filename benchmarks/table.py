"""Rows in CSV files: written whole, one row per measurement, newer ones in place of older."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TASKS = {"t2v": "text to video", "i2v": "image to video"}
UNKNOWN = "unknown"
# a row of the same values here is the same measurement
KEY = (
    "method",
    "setting",
    "model",
    "task",
    "steps",
    "guidance",
    "shift",
    "size",
    "prompts",
    "seeds",
    "target",
    "device",
)
COLUMNS = (
    "method", "setting", "knob", "model", "task", "steps", "guidance", "shift",
    "size", "prompts", "seeds", "target", "flops_ratio", "predicted_ratio",
    "psnr_db", "psnr_lo", "psnr_hi", "exact", "vs_steps_db", "vs_steps_lo", "vs_steps_hi", "vs_steps",
    "vs_default_db", "vs_default_lo", "vs_default_hi", "vs_default", "ssim", "motion_ratio",
    "first_frame_db", "colour_ok", "shape_ok", "direction_ok", "camera_ok",
    "commit", "torch", "device",
)  # fmt: skip


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none when there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def merge_rows(path: Path, rows: Sequence[dict[str, object]], columns=COLUMNS, key=KEY) -> None:
    """Add rows to a CSV file; a row with the same key takes the older one's place.

    Columns that only the file has stay.
    """
    merged = {key_of(row, key): row for row in read_rows(path)}
    older = next(iter(merged.values()), {})
    columns = [*columns, *(name for name in older if name not in columns)]
    for row in rows:
        text = {name: _text(row.get(name, "")) for name in columns}
        merged[key_of(text, key)] = text
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())
    partial.replace(path)


def partial_of(path: Path) -> Path:
    """Where this process writes a file before it is whole."""
    return path.with_suffix(f".{os.getpid()}.partial")


def full_rows(rows: Sequence[dict[str, str]], models: Sequence[str]) -> list[dict[str, str]]:
    """Of each measurement the row with the most videos, and of these the last; only of `models`."""
    best: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if row["model"] not in models:
            continue
        key = tuple(row[name] for name in ("method", "task", "steps", "guidance", "target"))
        if key not in best or _videos(row) >= _videos(best[key]):
            best[key] = row
    return list(best.values())


def _videos(row: dict[str, str]) -> int:
    return int(row["prompts"]) * int(row["seeds"])


@lru_cache(maxsize=1)
def commit(root: Path = RESULTS.parents[1]) -> str:
    """What the rows were made with: a short hash, "-dirty" where more than rows was changed.

    UNKNOWN where there is no git, or this is no repository of its own.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=root)
        return done.stdout.strip()

    try:
        # in somebody else's repository its hash says nothing
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return UNKNOWN
        head = git("rev-parse", "--short=7", "HEAD")
        changed = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return f"{head}-dirty" if changed else head


def key_of(row: dict[str, object], key: Sequence[str]) -> tuple[str, ...]:
    """What tells a row from others, as a file has it."""
    return tuple(_text(row.get(name, "")) for name in key)


def fixed(row: dict[str, str], key: str) -> str:
    """A number with two digits; empty where there is none."""
    return f"{float(row[key]):.2f}" if row[key] else ""


def psnr_of(row: dict[str, str]) -> str:
    """PSNR with its interval."""
    mean, low, high = (f"{float(row[name]):.1f}" for name in ("psnr_db", "psnr_lo", "psnr_hi"))
    return f"{mean} ({low} to {high})"


def truth_of(row: dict[str, str], *keys: str) -> str:
    """Shares that are right, in percent; of real weights there are none."""
    return " / ".join(f"{float(row[key]):.0%}" if row[key] else "" for key in keys)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return str(value)
