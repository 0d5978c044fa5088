"""Writes what the demo made: videos, pictures, report.json and report.html."""

from __future__ import annotations

import html
import json
from pathlib import Path

import av
import matplotlib
import numpy as np

from ..report.picture import draw_report
from ..report.words import record_text
from .run import CACHE, FEWER, PAPER, SPEEDUP, TASKS, WANTRIM, WHOLE, Result, Run
from .strip import draw_beside

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

FPS = 8
ZOOM = 2
NAMES = {
    WHOLE: "the whole model",
    WANTRIM: f"WanTrim (default, {SPEEDUP}x)",
    FEWER: "fewer steps",
    CACHE: "a step cache (EasyCache)",
    PAPER: "the paper's plan (TAPE), for reference",
}
# beside the whole model's videos, by PSNR in dB
NEAR = (
    (40, "look the same"),
    (30, "differ in details"),
    (20, "are clearly different"),
    (0, "are other videos"),
)
HEADS = (
    "sampled with",
    "steps",
    "work",
    "seconds a video",
    "faster here",
    "near the whole (PSNR, dB)",
    "motion",
    "colour / shape / direction as the prompt says",
)


def write_page(result: Result, out: Path) -> None:
    """Write everything under `out`; report.json and report.html come last."""
    for task in TASKS:
        runs = result.of(task)
        for run in runs.values():
            write_video(out / f"{task}_{run.name}.mp4", np.concatenate(list(run.videos), 2))
            if run.record is not None:
                picture = draw_report(run.record, run.videos[0])
                picture.save(out / f"{task}_{run.name}_report.png")
                _write(out / f"{task}_{run.name}_report.txt", record_text(run.record))
        rows = [np.concatenate(list(run.videos), 2) for run in runs.values()]
        write_video(out / f"{task}_side_by_side.mp4", np.concatenate(rows, 1))
        whole, ours = runs[WHOLE], runs[WANTRIM]
        strip = draw_beside(whole.videos[0], ours.videos[0], ours.steps_work)
        strip.save(out / f"{task}_strip.png")
    plot(result, out / "plots.png")
    data = {
        "gained": gained(result),
        "environment": result.environment,
        "neutral_exact": result.neutral_exact,
        "prompts": result.prompts,
        "runs": [run.row() for run in result.runs],
    }
    _write(out / "report.json", json.dumps(data, indent=2))
    _write(out / "report.html", _html(result))


def gained(result: Result) -> str:
    """What the default gained and what about the same work is worth elsewhere, in plain words."""
    parts = []
    for task, title in TASKS.items():
        runs = result.of(task)
        ours, fewer, cache = runs[WANTRIM], runs[FEWER], runs[CACHE]
        parts.append(
            f"{title.capitalize()}: WanTrim does {ours.work:.0%} of the work "
            f"({ours.faster:.1f}x as fast here), and beside the whole model's the videos {_near(ours)}. "
            f"In {fewer.steps} of {ours.steps} steps ({fewer.work:.0%} of the work) they "
            f"{_near(fewer)}; with a step cache ({cache.work:.0%}) they {_near(cache)}."
        )
    return " ".join(parts)


def _near(run: Run) -> str:
    if run.psnr_db is None:
        return "are the same"
    return next(words for least, words in NEAR if run.psnr_db >= least)


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


def plot(result: Result, path: Path) -> None:
    """How near each way stays, by its work."""
    figure, places = plt.subplots(1, len(TASKS), figsize=(11, 3.6), constrained_layout=True)
    for place, (task, title) in zip(places, TASKS.items(), strict=True):
        for run in result.of(task).values():
            if run.psnr_db is not None:
                colour = "tab:green" if run.name == WANTRIM else "tab:gray"
                place.scatter(100 * run.work, run.psnr_db, color=colour)
                place.annotate(f" {run.name.replace('_', ' ')}", (100 * run.work, run.psnr_db))
        place.set(xlabel="work (% of the whole model's)", title=title, xlim=(40, 100))
        place.set_ylabel("near the whole model's video (PSNR, dB)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _table(runs: dict[str, Run]) -> str:
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in HEADS) + "</tr>"]
    for run in runs.values():
        cells = (
            NAMES[run.name],
            run.steps,
            f"{run.work:.0%}",
            f"{run.seconds:.2f}",
            f"{run.faster:.2f}x",
            "&ndash;" if run.psnr_db is None else f"{run.psnr_db:.1f}",
            f"{run.motion_ratio:.2f}x",
            f"{run.colour_ok:.0%} / {run.shape_ok:.0%} / {run.direction_ok:.0%}",
        )
        mark = " class='ours'" if run.name == WANTRIM else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _html(result: Result) -> str:
    parts = []
    for task, title in TASKS.items():
        runs = result.of(task)
        names = "; ".join(NAMES[name] for name in runs)
        said = html.escape(record_text(runs[WANTRIM].record))
        parts.append(
            f"<h2>{title.capitalize()}</h2><img class='strip' src='{task}_strip.png'>"
            f"{_table(runs)}"
            f"<video src='{task}_side_by_side.mp4' autoplay loop muted controls></video>"
            f"<p>Rows from top: {names}. One column per prompt.</p>"
            f"<details><summary>What WanTrim did, step by step</summary><pre>{said}</pre>"
            f"<img src='{task}_{WANTRIM}_report.png'></details>"
        )
    prompts = "".join(f"<li>{html.escape(prompt)}</li>" for prompt in result.prompts)
    exact = "yes" if result.neutral_exact else "NO: this is a defect"
    environment = html.escape(", ".join(f"{k} {v}" for k, v in result.environment.items()))
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>WanTrim demo</title>
<style>body{{font:15px system-ui;max-width:1100px;margin:2rem auto;padding:0 1rem;background:#16181d;
color:#e1e4eb}}h1{{font-size:1.35rem;line-height:1.5}}table{{border-collapse:collapse;width:100%;
margin:1rem 0}}td,th{{padding:.3rem .5rem;text-align:right;border-bottom:1px solid #333}}
td:first-child,th:first-child{{text-align:left}}.ours{{color:#7fd49b}}img,video{{max-width:100%}}
video{{image-rendering:pixelated}}.strip{{width:480px}}p,li{{color:#aab}}</style>
<h1>{html.escape(gained(result))}</h1>
<p>A real Wan of 3.9 M parameters on a toy world: a test bench, not a promise about the 14B model. A
step this small is mostly overhead, so that the time falls less than the work, and leaving steps out
costs this model far less than a large one. Nothing trimmed is bit for bit the untouched model: {exact}.</p>
{"".join(parts)}<h2>How near, for how much work</h2><img src="plots.png">
<h2>Prompts</h2><ol>{prompts}</ol><p>{environment}</p></html>
"""
