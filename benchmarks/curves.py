"""Records the solver's curves on the tiny Wan: `python -m wantrim.benchmarks.curves`.

Rows of benchmarks/results/curves.csv, from which solve/priors.py is made (`--write`). Prompts are
the last of the bench's, which no other study uses.
"""

from __future__ import annotations

import argparse
import csv
import logging
from pathlib import Path

import numpy as np
import torch

from ..engine.engine import COND, UNCOND
from ..engine.plan import TrimPlan
from ..hosts.diffusers.attach import attach
from ..hosts.diffusers.sample import denoise, sigmas_for
from ..methods.grid import TokenGrid
from ..methods.shares import Shares, token_change
from .subjects import MAX_TOY_PROMPTS, Subject, toy_subject

log = logging.getLogger(__name__)
ROWS = Path(__file__).parent / "results" / "curves.csv"
PRIORS = Path(__file__).parents[1] / "solve" / "priors.py"
# steps, guidance and flow shift that the bench samples with
SETTINGS = {20: (8.0, 3.0), 4: (1.0, 5.0)}
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.67, 0.8)
# a bad prompt and not the mean: what breaks one video in ten is not worth what it saves in nine
QUANTILE = 0.8
# of a computed token's error, from keys and values of an earlier step (trial: 0.15 squared)
STALE = 0.0225


def latents_of(subject: Subject, items, shares, steps: int) -> list[torch.Tensor]:
    """The latents after every step [b, c, f, h, w], in fp32; before the first one too."""
    guidance, shift = SETTINGS[steps]
    text = torch.stack([item.text for item in items]).float()
    condition = None
    if items[0].condition is not None:
        condition = torch.stack([item.condition for item in items])
    sigmas = tuple(sigmas_for(steps, shift)[:-1].tolist())
    both = (COND,) if guidance == 1 else (COND, UNCOND)
    plan = TrimPlan(shares=Shares(sigmas, shares))
    options = {"steps": steps, "guidance": guidance, "shift": shift, "condition": condition}
    with attach(subject.model, plan, cond_or_uncond=both, shift=shift):
        return list(denoise(subject.model, text, subject.size, **options))


def record(subject: Subject, task: str, steps: int, prompts: int) -> list[dict]:
    """Rows of one task and step count: change, amplification and concentration by step."""
    items = subject.items(task, MAX_TOY_PROMPTS, 1)[-prompts:]
    sigmas = sigmas_for(steps, SETTINGS[steps][1]).tolist()
    whole = (1.0,) * steps
    dense = latents_of(subject, items, whole, steps)
    frames, height, width = subject.size
    grid = TokenGrid(frames, height // 2, width // 2)
    # velocities of the path, from the second step on; the first is measured against noise
    path = [
        (b - a) / (sigmas[i + 2] - sigmas[i + 1])
        for i, (a, b) in enumerate(zip(dense, dense[1:], strict=False))
    ]
    rows = []
    for step in range(1, steps):
        skipped = latents_of(subject, items, (*whole[:step], 0.0, *whole[step + 1 :]), steps)
        local = (skipped[step] - dense[step]).flatten(1).norm(dim=1)
        final = (skipped[-1] - dense[-1]).flatten(1).norm(dim=1)
        change = (
            local
            / abs(sigmas[step + 1] - sigmas[step])
            / local.new_tensor(dense[0][0].numel()).sqrt()
        )
        row = {
            "model": subject.name,
            "task": task,
            "steps": steps,
            "step": step,
            "sigma": sigmas[step],
            "change": float(change.quantile(QUANTILE)),
            "amplified": float((final / local.clamp(min=1e-9)).quantile(QUANTILE)),
        }
        if step >= 2 and step < len(path):
            now, before = path[step] - path[step - 1], path[step - 1] - path[step - 2]
            row |= left(token_change(now, grid), token_change(before, grid))
        rows.append(row)
        log.info("%s", {k: v if isinstance(v, str | int) else round(v, 4) for k, v in row.items()})
    return rows


def left(now: torch.Tensor, before: torch.Tensor) -> dict[str, float]:
    """Share of the change [b, tokens] that is left when the tokens that changed most before go."""
    order = before.argsort(1, descending=True)
    total = now.sum(1)
    found = {}
    for share in SHARES:
        count = max(1, round(share * now.shape[1]))
        gone = now.gather(1, order[:, :count]).sum(1)
        found[f"left_{share:g}"] = float((1 - gone / total).quantile(QUANTILE))
    return found


def curves_source(rows: list[dict]) -> str:
    """The text of solve/priors.py."""
    parts = []
    for name, task in (("TEXT_TO_VIDEO", "t2v"), ("IMAGE_TO_VIDEO", "i2v")):
        own = [row for row in rows if row["task"] == task and int(row["steps"]) == 20]
        coarse = [row for row in rows if row["task"] == task and int(row["steps"]) == 4]
        sigmas = [1.0] + [float(row["sigma"]) for row in own]
        travel = np.concatenate([[0.0], np.cumsum([float(row["change"]) for row in own])])
        fine = [float(row["amplified"]) for row in own]
        amplified = _smooth([fine[0], *fine])
        lefts = [
            float(np.mean([float(r[f"left_{s:g}"]) for r in own + coarse if r.get(f"left_{s:g}")]))
            for s in SHARES
        ]
        parts.append(
            f"{name} = Curves(\n"
            f"    sigmas={_numbers(sigmas)},\n"
            f"    travel={_numbers(travel)},\n"
            f"    amplified={_numbers(amplified)},\n"
            f"    shares={_numbers((0.0, *SHARES, 1.0))},\n"
            f"    left={_numbers((1.0, *lefts, 0.0))},\n"
            f"    stale={STALE},\n"
            ")\n"
        )
    head = (
        '"""Curves that ship, recorded on the tiny Wan (`python -m wantrim.benchmarks.curves --write`).'
        '"""\n\nfrom .curves import Curves\n\n# fmt: off\n'
    )
    return head + "\n".join(parts) + "# fmt: on\n"


def _smooth(values: list[float]) -> list[float]:
    """Geometric mean of each with its neighbours: single steps are noisy."""
    logs = np.log(np.maximum(values, 1e-6))
    padded = np.pad(logs, 1, mode="edge")
    return list(np.exp((padded[:-2] + padded[1:-1] + padded[2:]) / 3))


def _numbers(values) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="write solve/priors.py too")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    subject = toy_subject()
    rows = [
        row
        for task in ("t2v", "i2v")
        for steps in SETTINGS
        for row in record(subject, task, steps, args.prompts)
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    partial = ROWS.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(ROWS)
    if args.write:
        text = curves_source(rows)
        PRIORS.with_suffix(".partial").write_text(text, "utf-8")
        PRIORS.with_suffix(".partial").replace(PRIORS)


if __name__ == "__main__":
    main()
