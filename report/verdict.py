"""A trial's rows in words, as a picture and as a row that can be shared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from ..solve.variants import OWN, PLAN
from .compare import MOTION, Comparison
from .picture import BACKGROUND, FAINT, INK, KEPT, MARGIN, WIDTH, canvas, font_of, small, text_row

FORMAT = "wantrim_trial/1"
# PSNR in dB within which two candidates are as good as each other
SAME_DB = 0.5
# by how much the difference of two plans changes from video to video: its standard deviation over
# 16 prompts of benchmarks/results/verdicts.csv (those from 16 on)
ONE_VIDEO_DB = 1.8
# candidates that cost whole steps, and what the others may cost beyond the plan
BY_STEPS, SAME_WORK = ("easycache", "steps"), 0.02
# relative difference of seconds that is said
SAME_SECONDS = 0.05
SHOWN = 5
LABEL = 22
# pixels of a video in the clip of all
CELL, COLUMNS = 320, 4


@dataclass
class Row:
    """One candidate of a trial.

    Args:
        name: fixed, for the JSON row; `label` is for people.
        seconds: of its own sampling; None is not measured.
        cached: it was sampled in an earlier run, and not again for this one.
        work: of the whole run's, 0 to 1 and a little more; None is not known.
        found: beside the whole run's video; None for the whole one, and for one without a video.
        failed: why it has no video that can be judged.
        remarks: what did not happen.
    """

    name: str
    label: str
    seconds: float | None = None
    cached: bool = False
    work: float | None = None
    found: Comparison | None = None
    failed: str | None = None
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """The best row, and how it was chosen.

    Args:
        best, next: places among the rows; None where there is none.
        reason: why there is none, or what else is to be known.
    """

    best: int | None
    next: int | None
    reason: str


def choose(rows: Sequence[Row], wanted: float, steps: int) -> Choice:
    """The row that is nearest to the whole one among those that save as much work as was asked for.

    What leaves out whole steps may be half a step off. The plan by the model's own whole run is
    taken where another one is ahead by no more than one video says.

    Args:
        steps: of the whole run.
    """
    if not rows or rows[0].failed is not None:
        why = "is not there" if not rows else f"has no video ({rows[0].failed})"
        return Choice(None, None, f"the whole run {why}, and nothing can be compared without it")
    saving = enough({row.name: row.work for row in rows if row.work is not None}, wanted, steps)
    able = [at for at, row in enumerate(rows) if row.found is not None and row.name in saving]
    if not able:
        return Choice(None, None, f"no candidate with a video saves as much work as {wanted:g}x")
    ranked = sorted(able, key=lambda place: (-rows[place].found.psnr_db, rows[place].work))
    nearest = rows[ranked[0]]
    # one row at most moves to the front
    ranked.sort(key=lambda at: rows[at].name != OWN or _ahead(nearest, rows[at]) >= ONE_VIDEO_DB)
    best, after = ranked[0], ranked[1] if len(ranked) > 1 else None
    return Choice(best, after, _beside(rows, best, after, able))


def enough(works: Mapping[str, float], wanted: float, steps: int) -> set[str]:
    """Names of the candidates that save as much work as was asked for, of those that are known."""
    most = max(1 / wanted, works.get(PLAN, 0.0))
    return {
        name
        for name, work in works.items()
        if work <= most + (0.5 / steps if name in BY_STEPS else SAME_WORK) + 1e-6
    }


def _beside(rows: Sequence[Row], best: int, after: int | None, able: Sequence[int]) -> str:
    said = []
    top = rows[best]
    ahead = math.inf if after is None else _ahead(top, rows[after])
    if ahead <= -SAME_DB:
        said.append(
            f"two plans differ by {ONE_VIDEO_DB} dB more or less in the next video: the one by the "
            "whole run is taken"
        )
    elif ahead < SAME_DB:
        said.append("half a dB is no difference: take the one that you like")
    if top.found.motion_ratio == math.inf:
        said.append("it moves where the whole one stands still: watch it")
    elif not MOTION[0] <= top.found.motion_ratio <= MOTION[1]:
        said.append(f"it has {top.found.motion_ratio:.2f} x the motion of the whole one: watch it")
    timed = [place for place in able if rows[place].seconds]
    if timed and top.seconds:
        fastest = min(timed, key=lambda place: rows[place].seconds)
        if rows[fastest].seconds < top.seconds * (1 - SAME_SECONDS):
            said.append(
                f"{rows[fastest].label} was faster here ({rows[fastest].seconds:.1f} s for "
                f"{top.seconds:.1f} s)"
            )
    return "; ".join(said)


def _ahead(one: Row, other: Row) -> float:
    """By how many dB `one` is nearer to the whole run; below 0 where it is further."""
    a, b = one.found.psnr_db, other.found.psnr_db
    return 0.0 if a == b else a - b


def headline(rows: Sequence[Row], choice: Choice, wanted: float) -> str:
    """Which is best, and by how much."""
    if choice.best is None:
        return f"No best one: {choice.reason}."
    top = rows[choice.best]
    work = next((row.work for row in rows if row.name == PLAN and row.work), 1 / wanted)
    at = f"at {wanted:g}x"
    if abs(work - 1 / wanted) > SAME_WORK:
        at = f"near {wanted:g}x ({1 / work:.2g}x was possible)"
    said = f"Best {at}: {top.label}"
    if choice.next is not None:
        other = rows[choice.next]
        ahead = _ahead(top, other)
        by = "as near to the whole video as"
        if abs(ahead) >= SAME_DB:
            by = f"{abs(ahead):.1f} dB {'nearer' if ahead > 0 else 'further off here'} than"
        said += f", {by} {other.label}"
    if top.seconds and rows[0].seconds:
        said += f"; {rows[0].seconds / top.seconds:.2f}x in seconds"
    return said + (f". {choice.reason[0].upper()}{choice.reason[1:]}." if choice.reason else ".")


def verdict_text(
    rows: Sequence[Row], choice: Choice, wanted: float, notes: Sequence[str], warmed: float
) -> str:
    """The table, which is best, and what did not happen.

    Args:
        warmed: seconds that the whole run's first step took beyond a usual one.
    """
    width = max(9, *(len(row.label) for row in rows))
    lines = [
        headline(rows, choice, wanted),
        "One prompt and one seed: run it on a few before you trust it.",
        "",
        f"  {'candidate':<{width}}  seconds   work  PSNR dB   SSIM  motion  flicker",
    ]
    for place, row in enumerate(rows):
        best = ">" if place == choice.best else " "
        marks = ["*"] * row.cached + ([] if row.failed is None else [row.failed])
        lines.append("  ".join([f"{best} {row.label:<{width}}", _cells(row), *marks]))
    if any(row.cached for row in rows):
        lines.append("* cached: sampled in an earlier run, and the seconds are of that one")
    said = [f"{row.label}: {remark}" for row in rows for remark in row.remarks] + [*notes]
    if warmed >= 0.05:
        said.append(f"whole: {warmed:.1f} s of warming up in its first step are not counted")
    lines += ["", "What did not happen, and why:"]
    lines += [f"- {one}" for one in said] or ["- nothing: every candidate ran as planned."]
    return "\n".join(lines)


def _cells(row: Row) -> str:
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    work = "-" if row.work is None else f"{row.work:.0%}"
    found = row.found
    if found is None:
        return f"{seconds:>7}  {work:>5}"
    ratio = "-" if found.motion_ratio == math.inf else f"{found.motion_ratio:.2f}"
    more = "-" if not found.dense_flicker else f"{found.flicker / found.dense_flicker:.2f}"
    psnr = "equal" if found.psnr_db == math.inf else f"{found.psnr_db:.1f}"
    return f"{seconds:>7}  {work:>5}  {psnr:>7}  {found.ssim:>5.3f}  {ratio:>6}  {more:>7}"


def row_json(row: Row) -> dict:
    """The figures of a row; null stands for what is infinite or not known."""
    found = row.found
    numbers = {} if found is None else found.json()
    names = ("psnr_db", "ssim", "motion_ratio", "flicker", "dense_flicker", "equal")
    return {
        **{name: getattr(row, name) for name in ("name", "label", "seconds", "cached", "work")},
        **{name: numbers.get(name) for name in names},
        "failed": row.failed,
        "remarks": len(row.remarks),
    }


def draw_verdict(
    rows: Sequence[Row], videos: Sequence[torch.Tensor | None], choice: Choice, title: str
) -> Image.Image:
    """Frames of every candidate, one row each, with its figures."""
    shown = next((video for video in videos if video is not None), None)
    count = 0 if shown is None else len(shown)
    spread = np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int)
    cell = min(184, (WIDTH - 2 * MARGIN) // SHOWN - 4)
    height = 0 if shown is None else max(round(cell * shown.shape[1] / shown.shape[2]), 1)
    head = text_row(title, 24, INK)
    image, draw = canvas(head.height + 10 + len(rows) * (height + 38))
    image.paste(head, (0, 0))
    for place, (row, video) in enumerate(zip(rows, videos, strict=True)):
        top = head.height + place * (height + 38)
        colour = KEPT if place == choice.best else FAINT
        draw.text((MARGIN, top), f"{row.label}   {_figures(row)}", colour, font_of(22))
        if video is None:
            continue
        for column, frame in enumerate(spread):
            # videos of other lengths show their own frames
            own = video[min(int(frame), len(video) - 1)]
            image.paste(small(own.numpy(), cell, height), (MARGIN + column * (cell + 4), top + 29))
    return image


def _figures(row: Row) -> str:
    said = [] if row.seconds is None else [f"{row.seconds:.1f} s"]
    said += [] if row.work is None else [f"{row.work:.0%} of the work"]
    if row.found is not None:
        equal = row.found.psnr_db == math.inf
        said += ["equal" if equal else f"{row.found.psnr_db:.1f} dB"]
        still = row.found.motion_ratio == math.inf
        said += [
            "moves, the whole one does not" if still else f"motion {row.found.motion_ratio:.2f} x"
        ]
    said += [] if row.failed is None else [row.failed]
    return ", ".join(said)


def clip_of_all(
    rows: Sequence[Row],
    videos: Sequence[torch.Tensor | None],
    tick: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """All videos beside each other, each under its name [pixel_frames, h, w, 3].

    Small enough for eight of them; one that is shorter stands still at its end.

    Args:
        tick: called behind each pixel frame.
    """
    pairs = [(row, video) for row, video in zip(rows, videos, strict=True) if video is not None]
    if not pairs:
        return torch.zeros(1, LABEL, CELL, 3)
    _, tall, wide, _ = pairs[0][1].shape
    width = min(CELL, wide)
    height = max(round(width * tall / wide), 1)
    columns = min(COLUMNS, len(pairs))
    size = (-(-len(pairs) // columns) * (height + LABEL), columns * width)
    frames = max(len(video) for _, video in pairs)
    out = torch.empty(frames, *size, 3)
    for index in range(frames):
        page = Image.new("RGB", size[::-1], BACKGROUND)
        for place, (_, video) in enumerate(pairs):
            left, top = place % columns * width, place // columns * (height + LABEL)
            frame = video[min(index, len(video) - 1)]
            page.paste(small(frame.numpy(), width, height), (left, top + LABEL))
        out[index] = torch.from_numpy(np.asarray(page, np.float32) / 255)
        tick()
    _write_names(out, [row.label for row, _ in pairs], columns, width, height)
    return out


def _write_names(out: torch.Tensor, names: Sequence[str], columns: int, width: int, height: int):
    for place, name in enumerate(names):
        image, draw = canvas(LABEL)
        font = font_of(13)
        while len(name) > 1 and draw.textlength(name, font) > width - 6:
            name = name[:-1]
        draw.text((3, 3), name, INK, font)
        bar = torch.from_numpy(np.asarray(image, np.float32)[:, :width] / 255)
        left, top = place % columns * width, place // columns * (height + LABEL)
        out[:, top : top + LABEL, left : left + width] = bar
