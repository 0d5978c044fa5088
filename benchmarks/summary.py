"""The tables of both READMEs and of the templates: `python -m wantrim.benchmarks.summary` writes them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

from ..toy.worlds import WORLDS
from .aims import BASELINES, aims_table
from .calibration import calibration_table
from .cases import DEFAULT, METHODS, POINTS, STUDY_TARGET, TARGETS
from .concentration import concentration_table
from .headline import (
    TEMPLATES,
    fill_templates,
    headline_table,
    met,
    models_of,
    shown_rows,
    template_table,
)
from .metrics import MAX_DB
from .predicted import heads_table, predicted_table
from .table import RESULTS, TASKS, fixed, full_rows, psnr_of, read_rows, truth_of

READMES = (Path(__file__).parent / "README.md", Path(__file__).parents[1] / "README.md")
BEGIN, END = "<!-- table {} -->", "<!-- end -->"
NO_ROWS = "*No rows yet.*"
TRUTH = ("colour_ok", "shape_ok", "direction_ok")
# of rows that one measurement fills, whatever device it was on
SAME_SPEED = itemgetter("case", "host", "plan", "compiled")
SPEED_HEAD = (
    "| device | model | plan | speed-up (95 %) | predicted | efficiency | extra memory | note |"
    "\n|---|---|---|---|---|---|---|---|"
)


def bench_table(rows: Sequence[dict[str, str]], task: str, steps: int) -> str:
    """PSNR of every method by share of the dense FLOPs; what it keeps else at the study's share.

    A cell that met another share says which. Of those that did not, the best of a column is bold,
    and what its 95% interval reaches; but none with videos that are the dense ones.
    """
    mine = {
        (r["method"], float(r["target"])): r
        for r in rows
        if (r["task"], r["steps"]) == (task, str(steps)) and r["method"] in ("dense", *METHODS)
    }
    targets = [t for t in TARGETS if any(target == t for _, target in mine)]
    if not targets:
        return NO_ROWS
    best = {}
    for (_, target), r in mine.items():
        if met(r, target) and not _exact(r):
            best[target] = max(best.get(target, 0.0), float(r["psnr_db"]))
    heads = [f"{target:g}" for target in targets]
    heads += [f"motion at {STUDY_TARGET}", "colour / shape / direction"]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    named = {"dense": 1.0, DEFAULT: STUDY_TARGET}
    named |= {name: STUDY_TARGET for name in METHODS if name != DEFAULT}
    for name, shown in named.items():
        cells = [_cell(mine.get((name, target)), target, best) for target in targets]
        there = mine.get((name, shown))
        if any(cells) or there:
            cells += [fixed(there, "motion_ratio"), truth_of(there, *TRUTH)] if there else ["", ""]
            words = name.replace("_", " ")
            words = f"**{words}**" if name == DEFAULT else words
            lines.append("| " + " | ".join([words, *cells]) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, str] | None, target: float, best: dict[float, float]) -> str:
    if row is None:
        return ""
    if not met(row, target):
        return f"{psnr_of(row)} at {fixed(row, 'flops_ratio')}"
    bold = not _exact(row) and float(row["psnr_hi"]) >= best[target]
    return f"**{psnr_of(row)}**" if bold else psnr_of(row)


def _exact(row: dict[str, str]) -> bool:
    """Whether a video is the dense one: its PSNR is only as high as it is capped."""
    return row.get("exact", "") not in ("", "0") or float(row["psnr_hi"]) >= MAX_DB


def speed_table(rows: Sequence[dict[str, str]]) -> str:
    """Measured beside predicted speed-up; last what was not measured, by the command for it."""
    lines = [SPEED_HEAD]
    measured = [r for r in rows if r["dense_ms"]]
    for r in measured:
        compiled = "" if r["compiled"] == "no" else f", compiled ({r['compiled']})"
        speedup = fixed(r, "speedup")
        if r["speedup_lo"]:
            digits = 3 if r["predicted"] == "1" else 2
            low, mid, high = (
                f"{float(r[name]):.{digits}f}" for name in ("speedup_lo", "speedup", "speedup_hi")
            )
            speedup = f"{mid} ({low} to {high})"
        cells = (
            r["device"], f"{r['case']}, {int(r['tokens']):,} tokens", r["plan"] + compiled,
            speedup, fixed(r, "predicted"), fixed(r, "efficiency"), fixed(r, "extra_states"),
            r["note"],
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    known = {SAME_SPEED(r) for r in measured}
    waiting: dict[tuple[str, ...], list[str]] = {}
    for r in rows:
        if not r["dense_ms"] and SAME_SPEED(r) not in known:
            command = r["note"].removeprefix("not measured: ")
            plan = r["plan"] + ("" if r["compiled"] == "no" else ", compiled")
            waiting.setdefault((r["device"], r["case"], r["tokens"], command), []).append(plan)
    for (device, case, tokens, command), names in waiting.items():
        cells = (
            device, f"{case}, {int(tokens):,} tokens", "; ".join(names), "not measured", "", "", "",
            f"`{command}`",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(results: Path) -> dict[str, str]:
    """Every table by its name in the README."""
    read = read_rows(results / "quality.csv")
    made, missing = {}, []
    for world in WORLDS.values():
        rows = full_rows(read, models_of(world))
        missing += missing_cells(rows, world.name)
        for task in TASKS:
            for point in POINTS[world.name]:
                made[f"{world.name} {task} {point.steps}"] = bench_table(rows, task, point.steps)
    points = [(task, steps) for task in TASKS for steps in ("20", "4")]
    made["missing"] = missing_line(made, missing)
    made["aims"] = aims_table(read, read_rows(results / "verdicts.csv"))
    made["headline"] = headline_table(shown_rows(read), points)
    made |= {f"template {task} {n}": template_table(read, task, n) for task, n in points}
    made["predicted"] = predicted_table()
    made["predicted heads"] = heads_table()
    made["calibration"] = calibration_table(read_rows(results / "calibration.csv"))
    made["concentration"] = concentration_table(read_rows(results / "concentration.csv"))
    made["speed"] = speed_table(read_rows(results / "speed.csv"))
    return made


def missing_cells(rows: Sequence[dict[str, str]], world: str) -> list[str]:
    """What nobody measured of what is free in 20 steps, where every share can be met."""
    found = []
    for task in TASKS:
        mine = [r for r in rows if (r["task"], r["steps"]) == (task, "20")]
        there = {(r["method"], r["target"]) for r in mine}
        lacking: dict[str, list[str]] = {}
        for name in BASELINES:
            targets = [f"{t:g}" for t in TARGETS if (name, f"{t:g}") not in there]
            if mine and targets:
                lacking.setdefault(" and ".join(targets), []).append(name.replace("_", " "))
        found += [
            f"{', '.join(names)} at {targets} ({TASKS[task]}, 20 steps, tiny Wan {world})"
            for targets, names in lacking.items()
        ]
    return found


def missing_line(made: dict[str, str], cells: Sequence[str]) -> str:
    """What the registry has and nobody measured yet.

    Args:
        cells: of tables that have rows.
    """
    named = [
        f"{TASKS[task]}, {point.steps} steps, tiny Wan {world}"
        for world, points in POINTS.items()
        for point in points
        for task in TASKS
        if made[f"{world} {task} {point.steps}"] == NO_ROWS
    ]
    named += cells
    return f"Not measured yet, for want of core-hours: {'; '.join(named)}." if named else ""


def fill(text: str, made: dict[str, str]) -> str:
    """`text` with what stands between its table marks made anew.

    Raises:
        ValueError: a mark names a table that there are no rows for, or is not closed.
    """
    pieces = text.split("<!-- table ")
    out = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition(" -->")
        _, closed, after = rest.partition(END)
        if name not in made or not closed:
            raise ValueError(f"README: expected one of {', '.join(made)}, closed; got {name!r}")
        out.append(f"{BEGIN.format(name)}\n{made[name]}\n{END}{after}")
    return "".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    made = tables(args.results)
    filled = {readme: fill(readme.read_text("utf-8"), made) for readme in READMES}
    for path, text in (filled | fill_templates(TEMPLATES, made)).items():
        partial = path.with_suffix(".partial")
        partial.write_text(text, "utf-8")
        partial.replace(path)


if __name__ == "__main__":
    main()
