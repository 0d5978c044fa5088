"""The tables that an artist meets first: on the first page, and in the templates' notes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .cases import DEFAULT, PAPER, SKIP, STUDY_TARGET
from .table import TASKS, fixed, psnr_of, truth_of

TEMPLATES = Path(__file__).parents[1] / "workflows"
HEADLINE_HEAD = (
    "| sampling | method | FLOPs | PSNR to dense (95 %), dB | motion / dense "
    "| colour / shape / direction right |\n|---|---|---|---|---|---|"
)
# what the first page shows, at the study's share of the FLOPs
HEADLINE = {
    "dense": "dense (baseline)",
    "fewer_steps": "dense, fewer steps",
    "easycache": "step cache (EasyCache)",
    "sea_cache": "step cache (SeaCache)",
    "mag_cache": "step cache (MagCache)",
    DEFAULT: "**WanTrim** (default)",
    SKIP: "WanTrim, context off",
    PAPER: "WanTrim, paper (TAPE)",
    "tome": "token merging (ToMe)",
}
# rows of a template's note
SHORT = ("dense", "fewer_steps", DEFAULT)
MARK = "| on the tiny Wan, "
IN_NOTE = re.compile(r"\| on the tiny Wan, .*?\|(?=\\n\\n)")
SHORT_HEAD = "| on the tiny Wan, {} | FLOPs | PSNR, dB | motion | colour / shape / direction |"


def headline_table(rows: Sequence[dict[str, str]], points: Iterable[tuple[str, str]]) -> str:
    """A few methods at one share of the FLOPs, for the first page."""
    lines = [HEADLINE_HEAD]
    for task, steps in points:
        mine = _by_method(rows, task, steps)
        sampling = f"{TASKS[task]}, {steps} steps"
        for method, name in HEADLINE.items():
            if method in mine:
                lines.append(_line(sampling, name, *_cells(mine[method])))
                sampling = ""
    return "\n".join(lines)


def template_table(rows: Sequence[dict[str, str]], task: str, steps: str) -> str:
    """What the note of a template shows: dense, fewer steps and the default."""
    mine = _by_method(rows, task, steps)
    lines = [SHORT_HEAD.format(f"{TASKS[task]}, {steps} steps"), "|---" * 5 + "|"]
    lines += [_line(HEADLINE[m], *_cells(mine[m])) for m in SHORT if m in mine]
    return "\n".join(lines)


def fill_templates(folder: Path, made: Mapping[str, str]) -> dict[Path, str]:
    """The text of every workflow whose note has such a table, with the table made anew.

    Raises:
        ValueError: a table names a task and steps that there are no rows for.
    """
    known = {
        table.partition("\n")[0]: table
        for name, table in made.items()
        if name.startswith("template")
    }
    found = {}
    for path in sorted(folder.glob("*.json")):
        text = path.read_text("utf-8")
        if MARK in text:
            found[path] = IN_NOTE.sub(lambda note, path=path: _anew(note[0], known, path), text)
    return found


def _anew(note: str, known: Mapping[str, str], path: Path) -> str:
    # as JSON has it in a string
    head = note.partition("\\n")[0]
    if head not in known:
        raise ValueError(f"{path.name}: expected one of {', '.join(known)}; got {head!r}")
    return json.dumps(known[head], ensure_ascii=False)[1:-1]


def _by_method(rows: Sequence[dict[str, str]], task: str, steps: str) -> dict[str, dict[str, str]]:
    return {
        r["method"]: r
        for r in rows
        if (r["task"], r["steps"]) == (task, steps) and float(r["target"]) in (STUDY_TARGET, 1.0)
    }


def _cells(row: dict[str, str]) -> tuple[str, ...]:
    psnr = "" if row["method"] == "dense" else psnr_of(row)
    truth = truth_of(row, "colour_ok", "shape_ok", "direction_ok")
    return fixed(row, "flops_ratio"), psnr, fixed(row, "motion_ratio"), truth


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
