"""How concentrated the change between steps is: `python -m wantrim.benchmarks.concentration`.

Of one dense run: the share of the squared change of the velocity between two steps that lies in
the tokens that change most, by step. What is 0.30 for 30 % of the tokens is spread evenly, and
leaving out tokens then saves no more than leaving out anything else. On the tiny Wans, and with
`--weights FOLDER` on real weights; rows go into benchmarks/results/concentration.csv.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from einops import rearrange

from ..hosts.diffusers.sample import denoise, sigmas_for
from ..methods.shares import held_by_most
from ..toy.worlds import FIRST, WORLDS
from .quality import add_real_weights, load_subject
from .subjects import Item, Subject, toy_subject
from .table import RESULTS, commit, merge_rows

log = logging.getLogger(__name__)
# that the tiny Wans were trained with
TINY_SHIFT = 3.0
SHARES = (0.15, 0.30, 0.60)
PATCH = 2
KEY = ("model", "task", "steps", "guidance", "shift", "prompts", "step")
TOPS = tuple(f"top_{round(100 * share)}" for share in SHARES)
COLUMNS = (*KEY, "sigma", "relative_change", *TOPS, "commit")


def token_change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Squared change of velocities [b, c, f, h, w] by token: [b, f * h/2 * w/2] in fp32."""
    change = (after.float() - before.float()).square()
    return rearrange(change, "b c f (h p) (w q) -> b (f h w) (c p q)", p=PATCH, q=PATCH).sum(2)


def velocities(latents: Iterable[torch.Tensor], start: torch.Tensor, sigmas: torch.Tensor):
    """The guided velocities of an Euler run, from what `denoise` yields and its noise."""
    before = start
    for index, after in enumerate(latents):
        yield (after - before) / float(sigmas[index + 1] - sigmas[index])
        before = after


def measure(
    subject: Subject, items: Sequence[Item], steps: int, guidance: float, shift: float
) -> list[dict[str, str]]:
    """A row for each step but the first: by how much its velocity differs, and where.

    Args:
        items: of one task; each is sampled alone.
    """
    sums: dict[int, torch.Tensor] = {}
    sigmas = sigmas_for(steps, shift)
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
        last = None
        for index, velocity in enumerate(velocities((x.cpu() for x in run), noise, sigmas)):
            if last is not None:
                change = token_change(last, velocity)
                relative = float(change.sum() / velocity.square().sum())
                found = torch.tensor(
                    [relative, *held_by_most(change, SHARES).tolist()], dtype=torch.float64
                )
                sums[index] = sums.get(index, 0) + found
            last = velocity
        log.info("prompt %d of %d: %s", items.index(item) + 1, len(items), item.prompt)
    rows = []
    for index, total in sums.items():
        relative, *tops = (total / len(items)).tolist()
        rows.append(
            {
                "step": str(index),
                "sigma": f"{float(sigmas[index]):.4f}",
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
    shift = args.shift
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
        "prompts": args.prompts,
        "commit": commit(),
    }
    merge_rows(args.results / "concentration.csv", [run | row for row in rows], COLUMNS, KEY)


if __name__ == "__main__":
    main()
