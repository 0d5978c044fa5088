"""What the default was to reach on the bench, and what it reached."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from ..toy.worlds import FIRST, WORLDS
from .cases import DEFAULT, FAIR, SKIP, STUDY_TARGET
from .headline import met, models_of
from .pairs import apart
from .peers.registry import PEERS
from .table import TASKS, full_rows

# what the default is to be held against; ToMe and random tokens are far below
BASELINES = ("fewer_steps", *(name for name in PEERS if name not in ("tome", "random")))
WON, LEVEL, LOST = "better", "level", "worse"
MOTION = (0.95, 1.05)
# (model, task, steps, share of the FLOPs): what trials promised, dB
PROMISED = {
    ("tiny_wan", "t2v", "20", "0.67"): 47,
    ("tiny_wan", "t2v", "20", "0.5"): 34,
    ("tiny_wan", "t2v", "4", "0.67"): 33,
}
# a student of the first tiny Wan (`quality --slim`)
SLIM = f"{FIRST.checkpoint.stem}_slim"
Rows = Sequence[dict[str, str]]
# of a cell of the tables
_KEY = itemgetter("model", "task", "steps", "target")


def aims_table(read: Rows, verdicts: Rows) -> str:
    """The aims of the quality bench beside its rows, and beside those of prompts and of a model on
    which nothing was chosen.
    """
    rows = [row for world in WORLDS.values() for row in full_rows(read, models_of(world))]
    found = {key: _outcome(key, rows) for key in map(_KEY, rows) if _default(key, rows)}
    found = {key: outcome for key, outcome in found.items() if outcome is not None}
    count = {one: sum(way == one for way, _ in found.values()) for one in (WON, LEVEL, LOST)}
    lost = [f"{_words(key)}: {why}" for key, (way, why) in found.items() if way == LOST]
    lines = ["| aim | reached |", "|---|---|"]
    lines.append(
        "| nowhere worse than the best of fewer steps and the step caches at like FLOPs, outside the "
        f"interval | in {count[LOST]} of {len(found)} cells worse ({'; '.join(lost)}) |"
    )
    lines.append(f"| better in half of the cells | {count[WON]}; level in {count[LEVEL]} |")
    study = [r for r in rows if r["method"] == DEFAULT and r["target"] == f"{STUDY_TARGET}"]
    off = [
        f"{_words(_KEY(r))} {float(r['motion_ratio']):.2f}"
        for r in study
        if not MOTION[0] <= round(float(r["motion_ratio"]), 2) <= MOTION[1]
    ]
    low, high = MOTION
    lines.append(
        f"| motion {low} to {high} at {STUDY_TARGET} | in {len(study) - len(off)} of {len(study)}; "
        f"not in {', '.join(off)} |"
    )
    for key, wanted in PROMISED.items():
        row = _default(key, rows)
        lines.append(f"| {_words(key)}: {wanted} dB | {float(row['psnr_db']):.1f} |")
    fresh = {
        r["candidate"]: float(r["psnr_db"]) for r in verdicts if r["first"] == "32" and r["psnr_db"]
    }
    lines.append(
        "| on prompts that nothing was chosen on not below whole and repeated steps | second, text to "
        f"video, 20 steps, 16 prompts: {fresh['plan']:.1f} dB, they {fresh['repeats']:.1f}; EasyCache "
        f"{fresh['easycache']:.1f}, fewer steps {fresh['steps']:.1f} |"
    )
    slim = full_rows(read, (SLIM,))
    for ours in (row for row in slim if row["method"] == DEFAULT):
        others = {r["method"]: r for r in slim if _KEY(r) == _KEY(ours)}
        said = ", ".join(
            f"{name.replace('_', ' ')} {float(r['psnr_db']):.1f}"
            for name, r in others.items()
            if name not in (DEFAULT, SKIP)
        )
        lines.append(
            f"| the same on a model that nothing was chosen on | the first one slimmed and trained on, "
            f"{TASKS[ours['task']]}, {ours['steps']} steps, {ours['target']}: {float(ours['psnr_db']):.1f} "
            f"dB, they {float(others[SKIP]['psnr_db']):.1f}; {said} |"
        )
    return "\n".join(lines)


def _default(key: tuple, rows: Rows) -> dict[str, str] | None:
    return next((r for r in rows if r["method"] == DEFAULT and _KEY(r) == key), None)


def _outcome(key: tuple, rows: Rows) -> tuple[str, str] | None:
    """What the default is beside what is free in a cell; None where there is nothing like it."""
    ours = _default(key, rows)
    free = [
        r for r in rows if r["method"] in BASELINES and _KEY(r) == key and apart(r, ours) <= FAIR
    ]
    if not met(ours, float(key[-1])) or not free:
        return None
    ways = {r["method"]: _way(r, ours) for r in free}
    above = [r for r in free if ways[r["method"]] == LOST]
    if above:
        best = max(above, key=lambda r: float(r["psnr_db"]))
        name = best["method"].replace("_", " ")
        return LOST, f"{name} {float(best['psnr_db']):.1f}, we {float(ours['psnr_db']):.1f}"
    return (WON if set(ways.values()) == {WON} else LEVEL), ""


def _way(row: dict[str, str], ours: dict[str, str]) -> str:
    """How the default does beside a row: paired by video where it is, else by both intervals."""
    if row["vs_default"]:
        return {"better": LOST, "worse": WON, "tie": LEVEL}[row["vs_default"]]
    if float(row["psnr_lo"]) > float(ours["psnr_hi"]):
        return LOST
    return WON if float(row["psnr_hi"]) < float(ours["psnr_lo"]) else LEVEL


def _words(key: tuple[str, str, str, str]) -> str:
    model, task, steps, target = key
    which = "second" if model.startswith("tiny_wan_2") else "first"
    return f"{which}, {TASKS[task]}, {steps} steps, {target}"
