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
# whose rows the first page shows, and by number of steps the share of the FLOPs: 1.3x in four
SHOWN, SHARES = SECOND, {"20": STUDY_TARGET, "4": 0.75}
# rows of a template's note, and by number of steps whose: the template without downloads runs the first
SHORT = ("dense", "fewer_steps", DEFAULT)
NOTED = {"20": FIRST, "4": SECOND}
WORDS = {FIRST.name: "first", SECOND.name: "second"}
IN_NOTE = re.compile(r"\| on the (?:first|second) tiny Wan, .*?\|(?=\\n\\n)")
SHORT_HEAD = "| on the {} tiny Wan, {} | work | PSNR, dB |"


def models_of(world: World) -> tuple[str, str]:
    """Names in the column `model` of a world's tiny Wan."""
    return world.checkpoint.stem, world.four_step_lora.stem


def shown_rows(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Those of the first page's table and picture."""
    return [row for row in full_rows(rows, models_of(SHOWN)) if row["steps"] in SHARES]


def headline_table(rows: Sequence[dict[str, str]], points: Iterable[tuple[str, str]]) -> str:
    """PSNR of the default and of what is free at a share of the FLOPs, by (task, steps).

    A cell that met another share says which.
    """
    mine = {(task, n): _by_method(rows, task, n, SHARES[n]) for task, n in points}
    heads = ["PSNR in dB", *(f"{TASKS[task]}, {n} steps, at {SHARES[n]:g}" for task, n in mine)]
    lines = [_line(*heads), "|---" * len(heads) + "|"]
    for method in FREE:
        cells = [_short(found.get(method), SHARES[n]) for (_, n), found in mine.items()]
        if any(cells):
            lines.append(_line(HEADLINE[method], *cells))
    return "\n".join(lines)


def _short(row: dict[str, str] | None, target: float) -> str:
    if row is None:
        return ""
    psnr = f"{float(row['psnr_db']):.1f}"
    return psnr if met(row, target) else f"{psnr} at {fixed(row, 'flops_ratio')}"


def met(row: dict[str, str], target: float) -> bool:
    """Whether a row's share of the dense FLOPs is what it was to be."""
    return abs(float(row["flops_ratio"]) - target) <= FAIR


def template_table(rows: Sequence[dict[str, str]], task: str, steps: str) -> str:
    """What the note of a template shows: dense, fewer steps and the default."""
    world = NOTED[steps]
    mine = _by_method(full_rows(rows, models_of(world)), task, steps, SHARES[steps])
    lines = [SHORT_HEAD.format(WORDS[world.name], f"{TASKS[task]}, {steps} steps")]
    lines.append("|---" * 3 + "|")
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
        if IN_NOTE.search(text):
            found[path] = IN_NOTE.sub(lambda note, path=path: _anew(note[0], known, path), text)
    return found


def _anew(note: str, known: Mapping[str, str], path: Path) -> str:
    # as JSON has it in a string
    head = note.partition("\\n")[0]
    if head not in known:
        raise ValueError(f"{path.name}: expected one of {', '.join(known)}; got {head!r}")
    return json.dumps(known[head], ensure_ascii=False)[1:-1]


def _by_method(
    rows: Sequence[dict[str, str]], task: str, steps: str, target: float
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
