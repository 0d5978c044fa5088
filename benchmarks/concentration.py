"""How concentrated the change between steps is: `python -m wantrim.benchmarks.concentration`.

Of one dense run: the share of the squared change of the velocity between two steps that lies in
the tokens that change most, by step. What is 0.30 for 30 % of the tokens is spread evenly, and
leaving out tokens then saves no more than leaving out anything else. On the tiny Wans, and with
`--weights FOLDER` on real weights; rows go into benchmarks/results/concentration.csv.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from ..hosts.diffusers.sample import denoise, sigmas_for
from ..methods.grid import TokenGrid
from ..methods.shares import held_by_most, token_change
from ..toy.worlds import FIRST, WORLDS
from .curves import velocities
from .quality import add_real_weights, load_subject, real_size, refuse_rows
from .subjects import Item, Subject, toy_subject
from .table import RESULTS, commit, merge_rows

log = logging.getLogger(__name__)
# that the tiny Wans were trained with
TINY_SHIFT = 3.0
SHARES = (0.15, 0.30, 0.60)
KEY = ("model", "task", "steps", "guidance", "shift", "size", "prompts", "step")
TOPS = tuple(f"top_{round(100 * share)}" for share in SHARES)
COLUMNS = (*KEY, "sigma", "relative_change", *TOPS, "commit")


def measure(
    subject: Subject, items: Sequence[Item], steps: int, guidance: float, shift: float
) -> list[dict[str, str]]:
    """A row for each step but the first: by how much its velocity differs, and where.

    Args:
        items: of one task; each is sampled alone.
    """
    sums: dict[int, torch.Tensor] = {}
    sigmas = sigmas_for(steps, shift).tolist()
    patch = subject.model.config.patch_size
    grid = TokenGrid(*(n // p for n, p in zip(subject.size, patch, strict=True)))
    for item in items:
        # the noise that `denoise` draws of this seed
        random = torch.Generator().manual_seed(item.seed)
        shape = (1, subject.model.config.out_channels, *subject.size)
        noise = torch.randn(shape, generator=random)
        run = denoise(
            subject.model,
            item.text[None],
            subject.size,
            steps=steps,
            guidance=guidance,
            shift=shift,
            seed=item.seed,
            condition=None if item.condition is None else item.condition[None],
            negative=subject.negative,
            model_kwargs=subject.model_kwargs(item),
        )
        *before, last = noise, *(latents.cpu().float() for latents in run)
        for index, (old, new) in enumerate(pairwise(velocities(before, last, sigmas)), 1):
            change = token_change(new - old, grid)
            relative = float(change.sum() / token_change(new, grid).sum())
            found = [relative, *held_by_most(change, SHARES).tolist()]
            sums[index] = sums.get(index, 0) + torch.tensor(found, dtype=torch.float64)
        log.info("prompt %d of %d: %s", items.index(item) + 1, len(items), item.prompt)
    rows = []
    for index, total in sums.items():
        relative, *tops = (total / len(items)).tolist()
        rows.append(
            {
                "step": str(index),
                "sigma": f"{sigmas[index]:.4f}",
                "relative_change": f"{relative:.5f}",
                **{name: f"{top:.4f}" for name, top in zip(TOPS, tops, strict=True)},
            }
        )
    return rows


def concentration_table(rows: Sequence[dict[str, str]]) -> str:
    """Shares of the change in the most changing tokens, at a quarter, half and three of the run."""
    tops = " / ".join(f"{round(100 * share)}" for share in SHARES)
    quarters = (0.25, 0.5, 0.75)
    heads = ["model", "task", *(f"at {round(100 * q)} % of the steps" for q in quarters)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    runs = dict.fromkeys(tuple(r[name] for name in KEY[:-1]) for r in rows)
    for run in runs:
        mine = {r["step"]: r for r in rows if tuple(r[name] for name in KEY[:-1]) == run}
        cells = [run[0].replace("_", " "), run[1]]
        for quarter in quarters:
            r = mine[str(round(quarter * int(run[2])))]
            cells.append(" / ".join(f"{100 * float(r[name]):.0f}" for name in TOPS) + " %")
        lines.append("| " + " | ".join(cells) + " |")
    return f"In the top {tops} % of the tokens:\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=list(WORLDS), default=FIRST.name, help="of the tiny Wan")
    parser.add_argument("--task", choices=("t2v", "i2v"), default="t2v")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    add_real_weights(parser)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.device = args.device or ("cuda" if args.weights else "cpu")
    refuse_rows(args.results, None if args.weights else args.world)
    made, shift = commit(), args.shift
    if args.weights:
        subject = load_subject(args)
    else:
        torch.set_num_threads(1)
        world = WORLDS[args.world]
        subject, shift = toy_subject(device=args.device, world=world), TINY_SHIFT
    rows = measure(
        subject, subject.items(args.task, args.prompts, 1), args.steps, args.guidance, shift
    )
    run = {
        "model": subject.name,
        "task": args.task,
        "steps": args.steps,
        "guidance": f"{args.guidance:g}",
        "shift": f"{shift:g}",
        "size": real_size(args),
        "prompts": args.prompts,
        "commit": made,
    }
    merge_rows(args.results / "concentration.csv", [run | row for row in rows], COLUMNS, KEY)


if __name__ == "__main__":
    main()
