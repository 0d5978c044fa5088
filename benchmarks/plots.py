"""Pictures of results/*.csv: `python -m wantrim.benchmarks.plots`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from .cases import DEFAULT, OURS, STUDY_TARGET
from .headline import HEADLINE
from .peers import PEERS
from .table import PLAN, RESULTS, TASKS, read_rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

STUDIES = ("ablation", "importance", "restore", "schedule", "window", "reselection", "queries")
DPI = 110


def full_rows(rows: Sequence[dict[str, str]], model: str = "tiny_wan") -> list[dict[str, str]]:
    """Of each measurement the row with the most videos, and only those of `model`."""
    best: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if row["model"] != model:
            continue
        names = ("method", "setting", "task", "steps", "guidance", "target")
        key = tuple(row[name] for name in names)
        if key not in best or _videos(row) > _videos(best[key]):
            best[key] = row
    return list(best.values())


def _videos(row: dict[str, str]) -> int:
    return int(row["prompts"]) * int(row["seeds"])


def plot_methods(
    rows: Sequence[dict[str, str]],
    path: Path,
    names: Mapping[str, str],
    looks: Mapping[str, dict[str, object]],
) -> None:
    """PSNR against share of FLOPs; one panel per task and number of steps.

    Args:
        names: method -> what the legend says.
        looks: method -> line and marker.
    """
    rows = [row for row in rows if row["method"] in names]
    points = sorted({(int(row["steps"]), row["task"]) for row in rows}, key=lambda p: (p[0], p[1]))
    steps = sorted({p[0] for p in points})
    tasks = [task for task in ("t2v", "i2v") if any(p[1] == task for p in points)]
    size = (5.4 * len(steps) + 2.2, 3.7 * len(tasks))
    figure, axes = plt.subplots(
        len(tasks), len(steps), figsize=size, squeeze=False, constrained_layout=True
    )
    for line, task in zip(axes, tasks, strict=True):
        for axis, count in zip(line, steps, strict=True):
            for name, label in names.items():
                mine = [
                    r
                    for r in rows
                    if (r["method"], r["task"], int(r["steps"])) == (name, task, count)
                ]
                if mine:
                    _line(axis, mine, label, looks[name])
            if (count, task) not in points:
                axis.set_visible(False)
                continue
            axis.set(
                title=f"{TASKS[task]}, {count} steps",
                xlabel="share of the dense FLOPs",
                ylabel="PSNR to the dense video (dB)",
            )
            axis.grid(alpha=0.3)
    handles = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    _save(figure, path)


def _looks() -> dict[str, dict[str, object]]:
    """Ours solid, peers dotted, fewer steps (the one to beat) black."""
    looks: dict[str, dict[str, object]] = {
        "fewer_steps": {"color": "black", "marker": "D", "ls": "--", "lw": 1.8}
    }
    for name, colour in zip(OURS, plt.get_cmap("tab10").colors, strict=False):
        looks[name] = {"color": colour, "marker": "o", "ls": "-", "lw": 1.6}
    shades = plt.get_cmap("Dark2").colors
    for index, name in enumerate(PEERS):
        marker = "sv^<>pPX*h"[index % 10]
        looks[name] = {
            "color": shades[index % len(shades)], "marker": marker, "ls": ":", "lw": 1.0,
        }  # fmt: skip
    return looks


def _line(axis, rows: list[dict[str, str]], label: str, look: dict[str, object]) -> None:
    # two targets can lead to the same levels of a step cache
    levels = {row["flops_ratio"]: row for row in rows}
    rows = sorted(levels.values(), key=lambda row: float(row["flops_ratio"]))
    x, y, low, high = (
        np.array([float(row[key]) for row in rows])
        for key in ("flops_ratio", "psnr_db", "psnr_lo", "psnr_hi")
    )
    axis.errorbar(x, y, (y - low, high - y), label=label, capsize=2, ms=5, **look)


def plot_study(rows: Sequence[dict[str, str]], group: str, path: Path) -> None:
    """One study: PSNR and motion of its token plans, at one share of the FLOPs."""
    mine = [r for r in rows if group in r["group"].split() and float(r["target"]) == STUDY_TARGET]
    panels = sorted(
        {(int(r["steps"]), r["task"]) for r in mine}, key=lambda p: (p[0], p[1] != "t2v")
    )
    if not mine:
        return
    first = {r["setting"]: float(r["psnr_db"]) for r in reversed(mine) if _panel(r) == panels[0]}
    names = sorted({r["setting"] for r in mine}, key=lambda name: (first.get(name, 0.0), name))
    # a panel of a few plans says nothing
    panels = [p for p in panels if sum(_panel(r) == p for r in mine) >= len(names) / 2]
    size = (4.2 * len(panels) + 4.5, 0.27 * len(names) + 1.4)
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, squeeze=False, sharey=True, constrained_layout=True
    )
    for axis, (steps, task) in zip(axes[0], panels, strict=True):
        for place, name in enumerate(names):
            for row in mine:
                if (row["setting"], *_panel(row)) == (name, steps, task):
                    y, low, high = (float(row[k]) for k in ("psnr_db", "psnr_lo", "psnr_hi"))
                    axis.errorbar(
                        y, place, xerr=[[y - low], [high - y]], fmt="o", color="tab:blue", ms=4
                    )
                    text = f" {float(row['motion_ratio']):.2f}"
                    axis.annotate(text, (high, place), fontsize=7, va="center", color="grey")
        axis.set(title=f"{TASKS[task]}, {steps} steps", xlabel="PSNR (dB); grey: motion ratio")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.margins(x=0.15)
        axis.grid(alpha=0.3)
    _save(figure, path)


def guidance_rows(results: Path) -> list[dict[str, str]]:
    """The rows of guidance.csv, and what the same plans keep with the guidance of the bench."""
    rows = full_rows(read_rows(results / "guidance.csv"))
    wanted = {tuple(r[name] for name in PLAN) for r in rows if r["method"] != "dense"}
    known = {tuple(r[name] for name in (*PLAN, "guidance")) for r in rows}
    rows += [
        r
        for r in full_rows(read_rows(results / "quality.csv"))
        if tuple(r[name] for name in PLAN) in wanted
        and tuple(r[name] for name in (*PLAN, "guidance")) not in known
    ]
    return sorted((r for r in rows if r["method"] != "dense"), key=lambda r: float(r["guidance"]))


def plot_guidance(rows: Sequence[dict[str, str]], path: Path) -> None:
    """PSNR of each method by guidance, at one share of the FLOPs."""
    if not rows:
        return
    figure, axis = plt.subplots(figsize=(7.6, 4.2), constrained_layout=True)
    looks = _looks()
    for name in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == name]
        x, y, low, high = (
            np.array([float(r[key]) for r in mine])
            for key in ("guidance", "psnr_db", "psnr_lo", "psnr_hi")
        )
        look = looks.get(name, {"color": "tab:red", "marker": "D", "ls": "-", "lw": 1.6})
        label = name.replace("_", " ")
        axis.errorbar(x, y, (y - low, high - y), label=label, capsize=2, ms=5, **look)
    axis.set(xlabel="guidance", ylabel="PSNR to the dense video (dB)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


def plot_speed(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Measured against predicted speed-up of every plan that was timed; the line is efficiency 1."""
    mine = [r for r in rows if r["dense_ms"] and r["efficiency"]]
    if not mine:
        return
    figure, axis = plt.subplots(figsize=(6.4, 5.4), constrained_layout=True)
    cases = dict.fromkeys((r["device"], r["case"], r["compiled"]) for r in mine)
    top = max(max(float(r["predicted"]), float(r["speedup"])) for r in mine) + 0.1
    axis.plot([0.9, top], [0.9, top], color="grey", lw=1, label="efficiency 1")
    axis.plot([0.9, top], [0.81, 0.9 * top], color="grey", lw=1, ls=":", label="efficiency 0.90")
    for device, case, compiled in cases:
        some = [
            r for r in mine if (r["device"], r["case"], r["compiled"]) == (device, case, compiled)
        ]
        x, y = ([float(r[name]) for r in some] for name in ("predicted", "speedup"))
        label = f"{case} ({device})" + ("" if compiled == "no" else ", compiled")
        axis.plot(x, y, "o", ms=5, label=label)
    axis.set(xlabel="speed-up by the cost model", ylabel="speed-up on the clock")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    _save(figure, path)


def _panel(row: dict[str, str]) -> tuple[int, str]:
    return int(row["steps"]), row["task"]


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw(results: Path) -> list[Path]:
    """All pictures of a results folder."""
    rows = full_rows(read_rows(results / "quality.csv"))
    paths, looks = [results / "quality.png", results / "headline.png"], _looks()
    every = {name: name.replace("_", " ") for name in ("fewer_steps", *OURS, *PEERS)}
    plot_methods(rows, paths[0], every, looks)
    looks[DEFAULT] = looks[DEFAULT] | {"color": "tab:red", "lw": 3.0}
    first_page = {n: label.replace("*", "") for n, label in HEADLINE.items() if n in every}
    plot_methods(rows, paths[1], first_page, looks)
    for group in STUDIES:
        paths.append(results / f"study_{group}.png")
        plot_study(rows, group, paths[-1])
    paths.append(results / "guidance.png")
    plot_guidance(guidance_rows(results), paths[-1])
    paths.append(results / "speed.png")
    plot_speed(read_rows(results / "speed.csv"), paths[-1])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    draw(parser.parse_args().results)


if __name__ == "__main__":
    main()
