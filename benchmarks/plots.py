"""Pictures of results/*.csv: `python -m wantrim.benchmarks.plots`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np

from .cases import DEFAULT, OURS
from .headline import HEADLINE, shown_rows
from .table import RESULTS, TASKS, read_rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

DPI = 110


def plot_methods(rows: Sequence[dict[str, str]], path: Path) -> None:
    """PSNR of the first page's methods against share of FLOPs, by task and number of steps.

    The default is red, fewer steps (the one to beat) black, peers are dotted.
    """
    names = {name: label.replace("*", "") for name, label in HEADLINE.items() if name != "dense"}
    looks = {}
    for name, colour in zip(names, cycle(plt.get_cmap("Dark2").colors), strict=False):
        own = name in OURS
        looks[name] = {"color": colour, "marker": "o" if own else "s", "ls": "-" if own else ":"}
    looks["fewer_steps"] = {"color": "black", "marker": "D", "ls": "--"}
    looks[DEFAULT] = {"color": "tab:red", "marker": "o", "lw": 3.0}
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


def _line(axis, rows: list[dict[str, str]], label: str, look: dict[str, object]) -> None:
    # two targets can lead to the same levels of a step cache
    levels = {row["flops_ratio"]: row for row in rows}
    rows = sorted(levels.values(), key=lambda row: float(row["flops_ratio"]))
    x, y, low, high = (
        np.array([float(row[key]) for row in rows])
        for key in ("flops_ratio", "psnr_db", "psnr_lo", "psnr_hi")
    )
    axis.errorbar(x, y, (y - low, high - y), label=label, capsize=2, ms=5, **look)


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


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw(results: Path) -> list[Path]:
    """All pictures of a results folder."""
    paths = [results / "headline.png", results / "speed.png"]
    plot_methods(shown_rows(read_rows(results / "quality.csv")), paths[0])
    plot_speed(read_rows(results / "speed.csv"), paths[1])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    draw(parser.parse_args().results)


if __name__ == "__main__":
    main()
