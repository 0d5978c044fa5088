"""Writes what the demo made: videos, contact sheet, plots, report.json and report.html."""

from __future__ import annotations

import html
import json
from pathlib import Path

import av
import matplotlib
import numpy as np
from PIL import Image

from ..report.picture import draw_report
from ..report.words import record_text
from .run import Result, Run

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

FPS = 8
ZOOM = 2
SHEET_FRAMES = 5
COLUMNS = {
    "name": ("run", "{}"),
    "steps": ("steps", "{}"),
    "seconds_per_step": ("s / step", "{:.3f}"),
    "flops_per_step": ("GFLOP / step", "{:.2f}"),
    "speedup_measured": ("faster, measured", "{:.2f}x"),
    "speedup_flops": ("faster, by FLOPs", "{:.2f}x"),
    "psnr_db": ("PSNR to dense (dB)", "{:.1f}"),
    "motion_ratio": ("motion / dense", "{:.2f}"),
    "flicker": ("flicker", "{:.4f}"),
    "colour_ok": ("colour", "{:.0%}"),
    "shape_ok": ("shape", "{:.0%}"),
    "direction_ok": ("direction", "{:.0%}"),
}


def write_page(result: Result, out: Path) -> None:
    """Write everything under `out`; report.json and report.html come last."""
    for run in result.runs:
        write_video(out / f"{run.task}_{run.name}.mp4", np.concatenate(list(run.videos), 2))
        if run.record is not None:
            draw_report(run.record, run.videos[0]).save(out / f"{run.task}_{run.name}_report.png")
            _write(out / f"{run.task}_{run.name}_report.txt", record_text(run.record))
    for task in dict.fromkeys(run.task for run in result.runs):
        runs = [run for run in result.runs if run.task == task]
        rows = [np.concatenate(list(run.videos), 2) for run in runs]
        write_video(out / f"{task}_side_by_side.mp4", np.concatenate(rows, 1))
        contact_sheet(runs).save(out / f"{task}_contact_sheet.png")
    plot(result.runs, out / "plots.png")
    data = {
        "environment": result.environment,
        "neutral_exact": result.neutral_exact,
        "prompts": result.prompts,
        "runs": [run.row() for run in result.runs],
    }
    _write(out / "report.json", json.dumps(data, indent=2))
    _write(out / "report.html", _html(result))


def write_video(path: Path, video: np.ndarray) -> None:
    """Video [frames, h, w, 3] in 0..1 as mp4, enlarged so that its pixels can be seen."""
    pixels = (255 * video.clip(0, 1)).astype(np.uint8).repeat(ZOOM, 1).repeat(ZOOM, 2)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("h264", rate=FPS)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16"}
        for picture in pixels:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def contact_sheet(runs: list[Run]) -> Image.Image:
    """One row per run: a few frames of its first two videos."""
    rows = []
    for run in runs:
        index = np.linspace(0, len(run.videos[0]) - 1, SHEET_FRAMES).round().astype(int)
        cells = [video[i] for video in run.videos[:2] for i in index]
        rows.append(np.concatenate([np.pad(c, ((1, 1), (1, 1), (0, 0))) for c in cells], 1))
    sheet = (255 * np.concatenate(rows).clip(0, 1)).astype(np.uint8)
    return Image.fromarray(sheet)


def plot(runs: list[Run], path: Path) -> None:
    """Kept tokens per step, and PSNR against compute."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
    for run in runs:
        if run.record is not None and run.task == "t2v":
            shares = [100 * step.kept_share for step in run.record.steps]
            left.step(range(1, len(shares) + 1), shares, where="mid", label=run.name)
    left.set(xlabel="step", ylabel="token work done (%)", ylim=(0, 105), title="work per step, t2v")
    left.legend()
    for task, marker in (("t2v", "o"), ("i2v", "s")):
        points = [run for run in runs if run.task == task and run.psnr_db is not None]
        for run in points:
            right.scatter(1 / run.speedup_flops, run.psnr_db, marker=marker, color="tab:blue")
            right.annotate(f" {task} {run.name}", (1 / run.speedup_flops, run.psnr_db), fontsize=7)
    right.set(
        xlabel="compute against dense", ylabel="PSNR to dense (dB)", title="quality per compute"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _cell(run: Run, key: str) -> str:
    value = getattr(run, key)
    if value is None:
        return "&ndash;"
    return html.escape(COLUMNS[key][1].format(value / 1e9 if key == "flops_per_step" else value))


def _table(runs: list[Run]) -> str:
    head = "".join(f"<th>{title}</th>" for title, _ in COLUMNS.values())
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(run, key)}</td>" for key in COLUMNS) + "</tr>" for run in runs
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _html(result: Result) -> str:
    parts = []
    for task, title in (("t2v", "Text to video"), ("i2v", "Image to video")):
        runs = [run for run in result.runs if run.task == task]
        names = ", ".join(run.name for run in runs)
        said = next(record_text(run.record) for run in runs if run.name == "default")
        parts.append(
            f"<h2>{title}</h2>{_table(runs)}"
            f"<p>Rows from top: {names}; one column per prompt.</p>"
            f"<video src='{task}_side_by_side.mp4' autoplay loop muted controls></video>"
            f"<p>Contact sheet, rows from top: {names}.</p>"
            f"<img src='{task}_contact_sheet.png'>"
            f"<p>What the default did:</p><pre>{html.escape(said)}</pre>"
            f"<img src='{task}_default_report.png'>"
        )
    prompts = "".join(f"<li>{html.escape(prompt)}</li>" for prompt in result.prompts)
    exact = "yes" if result.neutral_exact else "NO: this is a defect"
    environment = ", ".join(f"{k} {v}" for k, v in result.environment.items())
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>WanTrim demo</title>
<style>body{{font:15px system-ui;max-width:1100px;margin:2rem auto;padding:0 1rem;background:#16181d;
color:#e1e4eb}}table{{border-collapse:collapse;width:100%}}td,th{{padding:.3rem .5rem;text-align:right;
border-bottom:1px solid #333}}td:first-child,th:first-child{{text-align:left}}img,video{{max-width:100%;
image-rendering:pixelated}}p,li{{color:#aab}}</style>
<h1>WanTrim: the tiny Wan, dense against trimmed</h1>
<p>A real Wan of 3.9 M parameters on a toy world: a test bench, not a promise about the 14B model. At
this size a step is mostly overhead, so the measured time falls less than the FLOPs. The video changes
when tokens are dropped. Untouched when nothing is dropped (bit for bit): {exact}.</p>
<p>{html.escape(environment)}</p><ol>{prompts}</ol>
{"".join(parts)}<h2>Work and quality</h2><img src="plots.png"></html>
"""
