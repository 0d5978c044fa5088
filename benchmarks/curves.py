"""Records the solver's curves on a tiny Wan: `python -m wantrim.benchmarks.curves`.

Rows of benchmarks/results/curves.csv, from which solve/priors.py is made (`--write`). Prompts are
the last of the bench's, which no other study uses; sampled as the bench samples (cases.POINTS).
"""

from __future__ import annotations

import argparse
import csv
import logging
from contextlib import contextmanager
from itertools import islice, pairwise, product
from pathlib import Path

import numpy as np
import torch

from ..engine.engine import COND, UNCOND
from ..engine.plan import TrimPlan
from ..hosts.diffusers.attach import attach
from ..hosts.diffusers.sample import denoise, sigmas_for
from ..methods.carry import carried, persistence
from ..methods.shares import TRIED, Shares, held_by_most, token_change
from ..solve.curves import Curves, clock
from ..toy.worlds import FIRST, WORLDS
from .bench import sampling_of
from .cases import POINTS, Point
from .quality import load_subject, refuse_rows
from .subjects import MAX_TOY_PROMPTS, ToySubject
from .table import commit, merge_rows

log = logging.getLogger(__name__)
ROWS = Path(__file__).parent / "results" / "curves.csv"
PRIORS = Path(__file__).parents[1] / "solve" / "priors.py"
# names in solve/priors.py: guided runs were recorded in 20 steps, others in 4
SETS = (
    ("TEXT_TO_VIDEO", "t2v", 20),
    ("TEXT_TO_VIDEO_UNGUIDED", "t2v", 4),
    ("IMAGE_TO_VIDEO", "i2v", 20),
    ("IMAGE_TO_VIDEO_UNGUIDED", "i2v", 4),
)
# steps that are tried on a part of their tokens
PARTIAL = {20: (2, 3, 5, 8, 12, 16), 4: (2, 3)}
# how far apart two velocities may be, and how far ahead of them one is foretold, in steps
APART, AHEAD = 3, 4
KEY = ("model", "task", "steps", "step")
COLUMNS = (
    *KEY, "sigma", "change", "amplified", "reach", *(f"left_{share:g}" for share in TRIED),
    *(f"held_{share:g}" for share in TRIED), "commit"
)  # fmt: skip
# a bad prompt and not the mean: what breaks one video in ten is not worth what it saves in nine
QUANTILE = 0.8


def latents_of(subject: ToySubject, items, shares, point: Point, count: int) -> list[torch.Tensor]:
    """The latents after each of the first `count` steps [b, c, f, h, w], in fp32."""
    steps, guidance, shift = point.steps, point.guidance, point.shift
    text = torch.stack([item.text for item in items]).float()
    condition = None
    if items[0].condition is not None:
        condition = torch.stack([item.condition for item in items])
    sigmas = tuple(sigmas_for(steps, shift)[:-1].tolist())
    both = (COND,) if guidance == 1 else (COND, UNCOND)
    plan = TrimPlan(shares=Shares(sigmas, shares))
    options = {"steps": steps, "guidance": guidance, "shift": shift, "condition": condition}
    with attach(subject.model, plan, cond_or_uncond=both, shift=shift):
        return list(islice(denoise(subject.model, text, subject.size, **options), count))


def record(subject: ToySubject, task: str, point: Point, prompts: int) -> list[dict]:
    """Rows of one task and step count: change, amplification and concentration by step."""
    items = subject.items(task, MAX_TOY_PROMPTS[subject.world.name], 1)[-prompts:]
    steps = point.steps
    sigmas = sigmas_for(steps, point.shift).tolist()
    whole = (1.0,) * steps
    with keeping_calls(subject.model) as calls:
        dense = latents_of(subject, items, whole, point, steps)
    # the prompts' own rows come first
    seen = [velocity[: len(items)].float() for _, velocity in calls]
    inputs = [hidden[: len(items), : seen[0].shape[1]].float() for hidden, _ in calls]
    ways = velocities(inputs, dense[-1], sigmas)
    size, rows = dense[0][0].numel() ** 0.5, []
    grid = sampling_of(subject, point, items[0]).grid
    for step in range(1, steps):
        skipped = latents_of(subject, items, _with(whole, step, 0.0), point, steps)
        local = (skipped[step] - dense[step]).flatten(1).norm(dim=1).clamp(min=1e-9)
        final = (skipped[-1] - dense[-1]).flatten(1).norm(dim=1)
        change = (ways[step] - ways[step - 1]).flatten(1).norm(dim=1) / size
        row = {
            "model": subject.name,
            "task": task,
            "steps": steps,
            "step": step,
            "sigma": sigmas[step],
            "change": float(change.quantile(QUANTILE)),
            "amplified": float((final / local).quantile(QUANTILE)),
            "reach": reach_of(ways, sigmas, step),
        }
        if step in PARTIAL[steps]:
            last = token_change(seen[step - 1] - seen[step - 2], grid)
            row |= {
                f"held_{p:g}": held
                for p, held in zip(TRIED, held_by_most(last).tolist(), strict=True)
            }
        for share in TRIED if step in PARTIAL[steps] else ():
            partial = latents_of(subject, items, _with(whole, step, share), point, step + 1)
            off = (partial[step] - dense[step]).flatten(1).norm(dim=1)
            row[f"left_{share:g}"] = float((off / local).square().quantile(QUANTILE))
        row = {k: v if isinstance(v, str | int) else f"{v:.5g}" for k, v in row.items()}
        rows.append(row | {"commit": commit()})
        log.info("%s", row)
    return rows


@contextmanager
def keeping_calls(model: torch.nn.Module):
    """A list that gets what a model is given and what it says, call by call [b, c, f, h, w]."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(module, args, kwargs, out) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        velocity = out[0] if isinstance(out, tuple) else out.sample
        calls.append((hidden.clone(), velocity.clone()))

    hook = model.register_forward_hook(see, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def velocities(latents: list[torch.Tensor], last: torch.Tensor, sigmas) -> list[torch.Tensor]:
    """What the sampler went by in each step, guidance included, from the latents before it."""
    steps = zip(pairwise([*latents, last]), pairwise(sigmas), strict=True)
    return [(after - before) / (end - start) for (before, after), (start, end) in steps]


def reach_of(ways: list[torch.Tensor], sigmas, step: int) -> float:
    """How far changes go on until a step, as the solver's curves say it.

    The step's velocity is foretold from others before it, near and far, as the engine does.
    """
    found = []
    for apart, ahead in product(range(1, APART + 1), range(1, AHEAD + 1)):
        last = step - ahead
        first, middle = last - 2 * apart, last - apart
        if first < 0:
            continue
        gap, before = sigmas[middle] - sigmas[last], sigmas[first] - sigmas[middle]
        turn = ways[last] - ways[middle]
        on = persistence((ways[middle] - ways[first]) * (gap / before), turn)
        came = ways[step] - ways[last]
        off = came - turn * carried(on, torch.tensor((sigmas[last] - sigmas[step]) / gap))
        left = (off.flatten(1).norm(dim=1) / came.flatten(1).norm(dim=1)).square()
        distance = clock(sigmas[step]) - clock(sigmas[middle])
        found.append((distance, float(left.quantile(QUANTILE))))
    if not found:
        return 0.0

    def off(reach: float) -> float:
        return sum((Curves.missed(distance, reach) - left) ** 2 for distance, left in found)

    return float(min(np.linspace(0.0, 1.0, 201), key=off))


def _with(shares: tuple[float, ...], step: int, share: float) -> tuple[float, ...]:
    return (*shares[:step], share, *shares[step + 1 :])


def curves_source(rows: list[dict], model: str) -> str:
    """The text of solve/priors.py, from the rows of one model."""
    parts = []
    rows = [row for row in rows if row["model"] == model]
    for name, task, steps in SETS:
        own = [row for row in rows if row["task"] == task and int(row["steps"]) == steps]
        sigmas = [1.0] + [float(row["sigma"]) for row in own]
        travel = np.concatenate([[0.0], np.cumsum([float(row["change"]) for row in own])])
        amplified = [float(row["amplified"]) for row in own]
        reach = [0.0] + [float(row["reach"]) for row in own]
        if steps > 4:
            amplified = _smooth(amplified)
        tried = [row for row in own if row.get(f"left_{TRIED[0]:g}") not in (None, "")]
        left = [[float(row[f"left_{share:g}"]) for share in TRIED] for row in tried]
        held = [[float(row[f"held_{share:g}"]) for share in TRIED] for row in tried]
        parts.append(
            f"{name} = Curves(\n"
            f"    sigmas={_numbers(sigmas)},\n"
            f"    travel={_numbers(travel)},\n"
            f"    amplified={_numbers([amplified[0], *amplified])},\n"
            f"    reach={_numbers(reach)},\n"
            f"    shares={_numbers((0.0, *TRIED, 1.0))},\n"
            f"    tried={_numbers([float(row['sigma']) for row in tried])},\n"
            "    left=(\n"
            + "".join(f"        {_numbers((1.0, *one, 0.0))},\n" for one in left)
            + "    ),\n    held=(\n"
            + "".join(f"        {_numbers((0.0, *one, 1.0))},\n" for one in held)
            + "    ),\n"
            ")\n"
        )
    head = (
        '"""Curves that ship, recorded on the tiny Wan (`python -m wantrim.benchmarks.curves`)."""'
        "\n\nfrom .curves import Curves\n\n# fmt: off\n"
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
    parser.add_argument("--world", choices=list(WORLDS), default=FIRST.name, help="of the tiny Wan")
    parser.add_argument("--tasks", nargs="+", default=("t2v", "i2v"), choices=("t2v", "i2v"))
    parser.add_argument("--steps", nargs="+", type=int, default=tuple(PARTIAL))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="make solve/priors.py of the rows")
    parser.add_argument("--rows", action="store_true", help="take the rows that are there")
    parser.set_defaults(weights=None, slim=None, device="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if not args.rows:
        refuse_rows(ROWS.parent, args.world)
    for point in POINTS[args.world]:
        if args.rows or point.steps not in args.steps:
            continue
        subject = load_subject(args, point)
        for task in args.tasks:
            merge_rows(ROWS, record(subject, task, point, args.prompts), COLUMNS, key=KEY)
    if args.write:
        with ROWS.open(newline="") as file:
            text = curves_source(list(csv.DictReader(file)), WORLDS[args.world].checkpoint.stem)
        PRIORS.with_suffix(".partial").write_text(text, "utf-8")
        PRIORS.with_suffix(".partial").replace(PRIORS)


if __name__ == "__main__":
    main()
