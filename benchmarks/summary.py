"""The tables of both READMEs and of the templates: `python -m wantrim.benchmarks.summary` writes them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .cases import FAIR, STUDY_TARGET
from .headline import TEMPLATES, fill_templates, headline_table, template_table
from .plots import STUDIES, full_rows, guidance_rows
from .table import PLAN, RESULTS, TASKS, fixed, psnr_of, read_rows, truth_of

READMES = (Path(__file__).parent / "README.md", Path(__file__).parents[1] / "README.md")
BEGIN, END = "<!-- table {} -->", "<!-- end -->"
METHODS_HEAD = (
    "| asked | method | FLOPs | time | PSNR (95 %), dB | against fewer steps | against the default "
    "| SSIM | motion | colour / shape / direction |\n|---|---|---|---|---|---|---|---|---|---|"
)
STUDY_HEAD = (
    "| plan | FLOPs | PSNR (95 %), dB | against the default | SSIM | motion | shape / direction |"
    "\n|---|---|---|---|---|---|---|"
)
PARTS_HEAD = (
    "| asked | plan | FLOPs | PSNR (95 %), dB | compared | against fewer steps | motion "
    "| colour / shape / direction |\n|---|---|---|---|---|---|---|---|"
)
CONFIRM_HEAD = (
    "| sampling | method | PSNR (95 %) on the bench, dB | on other prompts | against fewer steps "
    "| against the default | motion | shape / direction |\n|---|---|---|---|---|---|---|---|"
)
SPEED_HEAD = (
    "| device | model | plan | speed-up (95 %) | predicted | efficiency | extra memory | note |"
    "\n|---|---|---|---|---|---|---|---|"
)
# studies of the parts: file -> its groups
PARTS = {
    "width": ("in_place", "sliced"),
    "depth": ("methods", "curve", "age", "memory"),
    "dial": ("speedup", "options", "dial"),
    "students": ("width", "router", "tokens", "steps"),
}


def methods_table(rows: Iterable[dict[str, str]], task: str, steps: str) -> str:
    """All methods of one task and number of steps, by share of the FLOPs asked for."""
    mine = [r for r in rows if (r["task"], r["steps"]) == (task, steps) and _is_method(r)]
    mine.sort(key=lambda r: (-float(r["target"]), -float(r["psnr_db"])))
    lines = [METHODS_HEAD]
    for r in mine:
        cells = (
            r["target"], r["method"].replace("_", " "), fixed(r, "flops_ratio"),
            fixed(r, "time_ratio"), psnr_of(r), _verdict(r, "vs_steps"),
            _verdict(r, "vs_default"), fixed(r, "ssim"), fixed(r, "motion_ratio"),
            truth_of(r, "colour_ok", "shape_ok", "direction_ok"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overview_table(rows: Iterable[dict[str, str]], points: Sequence[tuple[str, str]]) -> str:
    """Every method at the study's share of the FLOPs: PSNR and motion by task and steps.

    A cell of a method that met another share says which.
    """
    found: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    for r in rows:
        if _is_method(r) and float(r["target"]) == STUDY_TARGET:
            found.setdefault(r["method"], {})[r["task"], r["steps"]] = r
    lines = ["| method | " + " | ".join(f"{TASKS[t]}, {n} steps" for t, n in points) + " |"]
    lines.append("|---" * (1 + len(points)) + "|")
    # what has no row in the first column comes last
    first = {
        name: float(mine.get(points[0], {"psnr_db": 0})["psnr_db"]) for name, mine in found.items()
    }
    for name in sorted(found, key=first.get, reverse=True):
        cells = [name.replace("_", " ")]
        for point in points:
            r = found[name].get(point)
            cell = f"{float(r['psnr_db']):.1f} dB, {fixed(r, 'motion_ratio')}" if r else ""
            if r and abs(float(r["flops_ratio"]) - STUDY_TARGET) > FAIR:
                cell += f" (at {fixed(r, 'flops_ratio')})"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def study_table(rows: Iterable[dict[str, str]], group: str, task: str, steps: str) -> str:
    """One study's plans, best first."""
    mine = [
        r
        for r in rows
        if (r["task"], r["steps"]) == (task, steps)
        and group in r["group"].split()
        and float(r["target"]) == STUDY_TARGET
    ]
    mine.sort(key=lambda r: -float(r["psnr_db"]))
    lines = [STUDY_HEAD]
    for r in mine:
        cells = (
            r["setting"], fixed(r, "flops_ratio"), psnr_of(r), _verdict(r, "vs_default"),
            fixed(r, "ssim"),
            fixed(r, "motion_ratio"), truth_of(r, "shape_ok", "direction_ok"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts_table(rows: Iterable[dict[str, str]], group: str, task: str, steps: str) -> str:
    """Plans of heads, widths or blocks beside fewer steps, by share asked for, best first."""
    mine = [
        r
        for r in rows
        if (r["task"], r["steps"]) == (task, steps) and group in r["group"].split()
        if r["method"] != "dense"
    ]
    mine.sort(key=lambda r: (-float(r["target"]), -float(r["psnr_db"])))
    lines = [PARTS_HEAD]
    for r in mine:
        name = ", ".join(filter(None, (r["method"].replace("_", " "), r["setting"])))
        compared = _verdict(r, "vs")
        if compared:
            compared = f"vs {r['against'].replace('_', ' ')}: {compared}"
        cells = (
            r["target"], name, fixed(r, "flops_ratio"), psnr_of(r), compared,
            _verdict(r, "vs_steps"), fixed(r, "motion_ratio"),
            truth_of(r, "colour_ok", "shape_ok", "direction_ok"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    known = {(r["case"], r["plan"]) for r in measured}
    waiting: dict[tuple[str, ...], list[str]] = {}
    for r in rows:
        if not r["dense_ms"] and (r["case"], r["plan"]) not in known:
            command = r["note"].removeprefix("not measured: ")
            waiting.setdefault((r["device"], r["case"], r["tokens"], command), []).append(r["plan"])
    for (device, case, tokens, command), names in waiting.items():
        cells = (
            device, f"{case}, {int(tokens):,} tokens", "; ".join(names), "not measured", "", "", "",
            f"`{command}`",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernels_table(rows: Iterable[dict[str, str]]) -> str:
    """Registers, shared memory and matrix instructions of each kernel in bf16, by architecture."""
    rows = [r for r in rows if "float16" not in r["config"].replace("bfloat16", "")]
    rows = [r for r in rows if "float32" not in r["config"]]
    targets = list(dict.fromkeys(r["target"] for r in rows))
    found: dict[str, dict[str, str]] = {}
    for r in rows:
        # tiles differ between architectures
        words = [w for w in r["config"].split(", ") if w in ("exclusion",) or " of " in w]
        words += [r["config"]] if "positions" in r["config"] else []
        name = ", ".join([r["kernel"].removesuffix("_kernel"), *words])
        cell = f"{r['registers']} / {int(r['shared_bytes']) / 1024:.0f}"
        if r["matrix_instructions"]:
            cell += f" / {r['matrix_instructions']}"
        found.setdefault(name, {})[r["target"]] = cell
    lines = ["| kernel | " + " | ".join(targets) + " |", "|---" * (1 + len(targets)) + "|"]
    for name, cells in found.items():
        row = (cells.get(target, "torch") for target in targets)
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def sampling_table(rows: Iterable[dict[str, str]]) -> str:
    """Rank agreement of sampled queries with all of them."""
    lines = [
        "| tokens | queries | tube left out | rank agreement (worst) | dropped alike |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        cells = (
            r["grid"], r["queries"], r["exclude_radius"],
            f"{fixed(r, 'spearman')} ({fixed(r, 'spearman_worst')})", truth_of(r, "dropped_alike"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def calibration_table(rows: Sequence[dict[str, str]]) -> str:
    """Published figures beside the toy's, one column per number of steps and guidance.

    The last line is the root mean square of the differences.
    """
    points = sorted({(int(r["steps"]), float(r["guidance"])) for r in rows})
    heads = [f"{steps} steps, guidance {guidance:g}" for steps, guidance in points]
    lines = ["| published | speed-up | PSNR there, dB | nearest here | " + " | ".join(heads) + " |"]
    lines.append("|---" * (4 + len(points)) + "|")
    # the row with the most prompts
    rows = sorted(rows, key=lambda r: int(r["prompts"]))
    names = ("published", "speedup", "method")

    def of(r: dict[str, str]) -> tuple[str, ...]:
        return tuple(r[name] for name in names)

    found = {(*of(r), int(r["steps"]), float(r["guidance"])): r for r in rows}
    apart: dict[tuple[int, float], list[float]] = {point: [] for point in points}
    for key in dict.fromkeys(of(r) for r in rows):
        name, speedup, method = key
        there = next(r for r in rows if of(r) == key)["published_psnr_db"]
        cells = [name, f"{speedup}x", there, method.replace("_", " ")]
        for point in points:
            row = found.get((*key, *point))
            if row is None or not row["psnr_db"]:
                cells.append("not reached" if row else "")
                continue
            cells.append(f"{float(row['psnr_db']):.1f} ({1 / float(row['flops_ratio']):.2f}x)")
            if there:
                apart[point].append(float(row["psnr_db"]) - _middle(there))
        lines.append("| " + " | ".join(cells) + " |")
    cells = [f"{np.sqrt(np.mean(np.square(apart[p]))):.1f}" if apart[p] else "" for p in points]
    lines.append("| all, root mean square of the differences | | | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _middle(published: str) -> float:
    """Of "22.5-25", "14.5" or "15.8 (14B)"."""
    ends = [float(end) for end in published.partition(" ")[0].split("-")]
    return sum(ends) / len(ends)


def guidance_table(rows: Sequence[dict[str, str]]) -> str:
    """PSNR of each method by guidance, and what it is against fewer steps."""
    columns = list(dict.fromkeys(r["guidance"] for r in rows))
    found = {(r["method"], r["guidance"]): r for r in rows}
    head = ["method", *(f"guidance {column}" for column in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(r["method"] for r in rows):
        cells = [name.replace("_", " ")]
        for column in columns:
            r = found.get((name, column))
            words = r and [f"{float(r['psnr_db']):.1f} dB", _verdict(r, "vs_steps")]
            cells.append(", ".join(filter(None, words)) if words else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def confirm_table(
    others: Sequence[dict[str, str]],
    bench: Iterable[dict[str, str]],
    points: Sequence[tuple[str, str]],
) -> str:
    """What the bench says, and what the same plans keep on prompts that nothing was chosen on.

    Verdicts, motion and truth are those of the other prompts.
    """
    seen = {tuple(r[name] for name in PLAN): r for r in bench}
    lines = [CONFIRM_HEAD]
    for task, steps in points:
        mine = [
            r for r in others if (r["task"], r["steps"]) == (task, steps) and r["method"] != "dense"
        ]
        sampling = f"{TASKS[task]}, {steps} steps"
        for r in sorted(mine, key=lambda r: -float(r["psnr_db"])):
            same = seen.get(tuple(r[name] for name in PLAN))
            cells = (
                sampling, r["method"].replace("_", " "), psnr_of(same) if same else "", psnr_of(r),
                _verdict(r, "vs_steps"), _verdict(r, "vs_default"), fixed(r, "motion_ratio"),
                truth_of(r, "shape_ok", "direction_ok"),
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
            sampling = ""
    return "\n".join(lines)


def tables(results: Path) -> dict[str, str]:
    """Every table by its name in the README."""
    rows = full_rows(read_rows(results / "quality.csv"))
    points = sorted(
        {(r["task"], r["steps"]) for r in rows}, key=lambda p: (p[0] != "t2v", -int(p[1]))
    )
    made = {f"methods {task} {steps}": methods_table(rows, task, steps) for task, steps in points}
    for group in STUDIES:
        for task, steps in points:
            made[f"{group} {task} {steps}"] = study_table(rows, group, task, steps)
    made["headline"] = headline_table(rows, points)
    made |= {
        f"template {task} {steps}": template_table(rows, task, steps) for task, steps in points
    }
    made["overview"] = overview_table(rows, points)
    others = full_rows(read_rows(results / "confirm.csv"))
    made["confirm"] = confirm_table(others, rows, points)
    for name, groups in PARTS.items():
        rows = full_rows(read_rows(results / f"{name}.csv"))
        for task, steps in sorted({(r["task"], r["steps"]) for r in rows}):
            for group in groups:
                made[f"{name} {group} {task} {steps}"] = parts_table(rows, group, task, steps)
    made["guidance"] = guidance_table(guidance_rows(results))
    made["kernels"] = kernels_table(read_rows(results / "kernels_aot.csv"))
    made["sampling"] = sampling_table(read_rows(results / "token_mass.csv"))
    made["speed"] = speed_table(read_rows(results / "speed.csv"))
    calibration = read_rows(results / "calibration.csv")
    if calibration:
        made["calibration"] = calibration_table(calibration)
    return made


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


def _is_method(row: dict[str, str]) -> bool:
    return "methods" in row["group"].split() and row["method"] != "dense"


def _verdict(row: dict[str, str], name: str) -> str:
    return f"{row[name]} ({float(row[name + '_db']):+.1f})" if row.get(name) else ""


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
