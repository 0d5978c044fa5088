"""The tables that an artist meets first: on the first page, and in the templates' notes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..toy.worlds import FIRST, SECOND, World
from .cases import DEFAULT, FAIR, PAPER, SKIP, STUDY_TARGET
from .table import TASKS, fixed, full_rows, psnr_of

TEMPLATES = Path(__file__).parents[1] / "workflows"
# names of methods, as pictures and templates show them
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
# rows of the first page's table: the default against what is free
FREE = ("fewer_steps", "easycache", "sea_cache", "mag_cache", DEFAULT)
# by number of steps, whose rows the first page shows: the second tiny Wan has no four-step version
SHOWN = {20: SECOND, 4: FIRST}
# rows of a template's note
SHORT = ("dense", "fewer_steps", DEFAULT)
# share of the FLOPs by number of steps: the templates with four steps are at 1.3x
IN_TEMPLATES = {"20": STUDY_TARGET, "4": 0.75}
MARK = "| on the first tiny Wan, "
IN_NOTE = re.compile(r"\| on the first tiny Wan, .*?\|(?=\\n\\n)")
SHORT_HEAD = "| on the first tiny Wan, {} | work | PSNR, dB |"


def models_of(world: World) -> tuple[str, str]:
    """Names in the column `model` of a world's tiny Wan."""
    return world.checkpoint.stem, world.four_step_lora.stem


def shown_rows(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Those of the first page's table and picture."""
    return [
        row
        for steps, world in SHOWN.items()
        for row in full_rows(rows, models_of(world))
        if int(row["steps"]) == steps
    ]


def headline_table(rows: Sequence[dict[str, str]], points: Iterable[tuple[str, str]]) -> str:
    """PSNR of the default and of what is free at the study's share of the FLOPs, by (task, steps).

    A cell that met another share says which.
    """
    mine = {(task, steps): _by_method(rows, task, steps) for task, steps in points}
    heads = ["PSNR in dB", *(f"{TASKS[task]}, {steps} steps" for task, steps in mine)]
    lines = [_line(*heads), "|---" * len(heads) + "|"]
    for method in FREE:
        cells = [_short(by_method.get(method)) for by_method in mine.values()]
        if any(cells):
            lines.append(_line(HEADLINE[method], *cells))
    return "\n".join(lines)


def _short(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    psnr = f"{float(row['psnr_db']):.1f}"
    return psnr if met(row, STUDY_TARGET) else f"{psnr} at {fixed(row, 'flops_ratio')}"


def met(row: dict[str, str], target: float) -> bool:
    """Whether a row's share of the dense FLOPs is what it was to be."""
    return abs(float(row["flops_ratio"]) - target) <= FAIR


def template_table(rows: Sequence[dict[str, str]], task: str, steps: str) -> str:
    """What the note of a template shows: dense, fewer steps and the default."""
    mine = _by_method(rows, task, steps, IN_TEMPLATES[steps])
    lines = [SHORT_HEAD.format(f"{TASKS[task]}, {steps} steps"), "|---" * 3 + "|"]
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


def _by_method(
    rows: Sequence[dict[str, str]], task: str, steps: str, target: float = STUDY_TARGET
) -> dict[str, dict[str, str]]:
    return {
        r["method"]: r
        for r in rows
        if (r["task"], r["steps"]) == (task, steps) and float(r["target"]) in (target, 1.0)
    }


def _cells(row: dict[str, str]) -> tuple[str, str]:
    return fixed(row, "flops_ratio"), "" if row["method"] == "dense" else psnr_of(row)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
