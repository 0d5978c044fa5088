"""What patterns that the pack has not would keep of attention: `python -m wantrim.benchmarks.patterns`.

Windows in space (through all latent frames, or the neighbouring ones) and Radial Attention's decay
with the distance in time (arXiv 2506.19852), beside the pack's own patterns, at as many keys for each
query, and beside the best keys that there are. Rows go into benchmarks/results/patterns.csv.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from ..hosts.diffusers.blocks import watch_blocks
from ..hosts.diffusers.sample import sample
from ..hosts.diffusers.weights import load_original
from ..methods.grid import TokenGrid
from ..methods.heads import FRAME, TILES
from ..toy.worlds import WORLDS
from .quality import refuse_rows
from .table import RESULTS, commit, merge_rows

log = logging.getLogger(__name__)
WORLD = "2"
STEPS, GUIDANCE = 20, 5.0
# of the sampling's model calls, every so many is measured, without the first ones
EVERY, FIRST_SEEN = 8, 2
# shares of the keys that a query may have
BUDGETS = (0.2, 0.25, 0.35)
NAMES = ("shipped", "with_windows_and_decay", "best_keys")
KEY = ("model", "keys")
COLUMNS = (*KEY, *NAMES, "heads", "commit")


def masks_of(grid: TokenGrid) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The pack's patterns, and those that it has not: bool [s, s], which key a query sees."""
    sizes = (grid.frames, grid.height, grid.width)
    at = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
    frame, row, column = (axis.flatten() for axis in at)
    shipped = {FRAME: frame[:, None] == frame}
    for name, side in TILES.items():
        tile = row * side // grid.height * side + column * side // grid.width
        shipped[name] = tile[:, None] == tile
    apart = (frame[:, None] - frame).abs()
    away = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    others = {f"window {far}": away <= far for far in (1, 2, 3)}
    others |= {f"window {far}, next frames": (apart <= 1) & (away <= far) for far in (2, 3, 4)}
    for far in (4, 5, 6, 7, 8):
        # half as far for every latent frame in between
        others[f"decay from {far}"] = away <= far // 2**apart
    return shipped, others


def kept_by(
    q: torch.Tensor, k: torch.Tensor, masks: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass by head of each mask [n, masks], and of the best keys by budget [n, budgets].

    Args:
        q, k: [b, s, n, d] after RoPE.
    """
    scores = torch.einsum("bsnd,btnd->bnst", q.float(), k.float()) * q.shape[-1] ** -0.5
    mass = scores.softmax(-1)
    within = torch.stack([mass.mul(mask).sum(-1).mean((0, 2)) for mask in masks], -1)
    rising = mass.sort(-1, descending=True).values.cumsum(-1)
    most = [max(1, int(share * mass.shape[-1])) - 1 for share in BUDGETS]
    return within, rising[..., most].mean((0, 2))


def rows_of(
    within: torch.Tensor, best: torch.Tensor, keys: Sequence[float], shipped: int
) -> list[dict[str, str]]:
    """A row for each budget: the mean over heads of what its best pattern within it keeps.

    Args:
        within: [heads, masks]; the first `shipped` are the pack's.
        best: [heads, budgets].
        keys: share of the keys that each mask lets through.
    """

    def most(budget: float, count: int) -> str:
        fits = [at for at, share in enumerate(keys[:count]) if share <= budget + 1e-6]
        return f"{within[:, fits].amax(1).mean():.4f}" if fits else ""

    return [
        {
            "keys": f"{budget:.4f}",
            **dict(zip(NAMES, (most(budget, shipped), most(budget, len(keys))), strict=False)),
            "best_keys": f"{best[:, at].mean():.4f}",
            "heads": str(len(best)),
        }
        for at, budget in enumerate(BUDGETS)
    ]


def measure(model, text: torch.Tensor, size: tuple[int, int, int]) -> list[dict[str, str]]:
    """Rows of one guided text to video sampling, by its conditional calls.

    Args:
        text: embeddings [b, t, c].
        size: of the latent (f, h, w).
    """
    patch = model.config.patch_size
    grid = TokenGrid(*(n // p for n, p in zip(size, patch, strict=True)))
    shipped, others = masks_of(grid)
    masks = [*shipped.values(), *others.values()]
    found: dict[int, list[torch.Tensor]] = {}
    call = -1

    def seen(index, block, q, k):
        nonlocal call
        call += index == 0
        if call % EVERY == FIRST_SEEN:
            # the prompts' own rows come first
            kept = kept_by(q[: len(text)], k[: len(text)], masks)
            found.setdefault(index, []).append(torch.cat(kept, -1))

    with watch_blocks(model, seen):
        sample(model, text, size, steps=STEPS, guidance=GUIDANCE)
    means = torch.cat([torch.stack(one).mean(0) for one in found.values()])
    within, best = means.split([len(masks), len(BUDGETS)], -1)
    keys = [float(mask.float().mean()) for mask in masks]
    return rows_of(within, best, keys, len(shipped))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    refuse_rows(args.results, WORLD)
    world = WORLDS[WORLD]
    scenes = world.held_out_scenes(args.prompts, seed=5)
    text = torch.stack([world.encode(scene.prompt()) for scene in scenes])
    run = {"model": world.checkpoint.stem, "commit": commit()}
    rows = [
        run | row for row in measure(load_original(world.checkpoint), text, world.latent_size())
    ]
    for row in rows:
        log.info("%s", row)
    merge_rows(args.results / "patterns.csv", rows, COLUMNS, KEY)


if __name__ == "__main__":
    main()
