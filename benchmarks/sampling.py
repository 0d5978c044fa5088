"""How well few queries tell the attention that tokens receive: `python -m wantrim.benchmarks.sampling`.

`token_mass` from sampled queries against all of them, on q and k of the tiny Wan while it samples:
rank agreement (Spearman) over the tokens of a video, and how many of the tokens that would be
dropped are. Rows of benchmarks/results/token_mass.csv.
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from ..hosts.diffusers.blocks import watch_blocks
from ..hosts.diffusers.sample import sample
from ..hosts.diffusers.weights import load_original
from ..kernels import smooth_select, token_mass
from ..methods.grid import TokenGrid
from ..methods.importance import sample_queries
from ..toy import CHECKPOINT
from ..toy.text import encode_prompt
from ..toy.world import held_out_scenes
from .table import RESULTS, commit, merge_rows

log = logging.getLogger(__name__)
# the video that the tiny Wan was trained on, and one with four times as many tokens
SIZES = ((5, 12, 12), (5, 24, 24))
RATES = (1, 1 / 4, 1 / 16, 1 / 36)
RADII = (0, 1, 2)
STEPS, BLOCKS = 4, (1, 5, 9, 13)
DROPPED, ALPHA = 0.3, 0.5
COLUMNS = (
    "model", "grid", "queries", "exclude_radius", "spearman", "spearman_worst", "dropped_alike",
    "maps", "commit", "torch",
)  # fmt: skip
KEY = ("model", "grid", "queries", "exclude_radius")


def attention_of(model, size: tuple[int, int, int], prompts: int) -> Iterator[tuple]:
    """q and k [1, s, n, d] of some blocks, at every step of sampling each prompt."""
    for seed, scene in enumerate(held_out_scenes(prompts)):
        found = []

        def seen(index, block, q, k, found=found):
            if index in BLOCKS:
                found.append((q.clone(), k.clone()))

        with watch_blocks(model, seen):
            text = encode_prompt(scene.prompt())[None]
            sample(model, text, size, steps=STEPS, guidance=1.0, shift=5.0, seed=seed)
        yield from found


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    """Rank correlation of two maps without ties."""
    ranks = torch.stack([one.flatten().argsort().argsort(), other.flatten().argsort().argsort()])
    return float(torch.corrcoef(ranks.double())[0, 1])


def dropped_alike(one: torch.Tensor, other: torch.Tensor, grid: TokenGrid) -> float:
    """Of the tokens that `other` [1, tokens] would drop, the share that `one` drops too."""
    keep = round((1 - DROPPED) * grid.per_frame)
    drops = []
    for scores in (one, other):
        frames = scores.view(1, grid.frames, grid.per_frame)
        drops.append(smooth_select(frames, keep, ALPHA)[1] < 0)
    return float((drops[0] & drops[1]).sum() / drops[1].sum())


def measure(model, size: tuple[int, int, int], prompts: int) -> list[dict[str, object]]:
    """One row for each rate and radius."""
    frames, height, width = size
    grid = TokenGrid(frames, height // 2, width // 2)
    shape = (grid.frames, grid.height, grid.width)
    queries = {rate: sample_queries(grid, rate, 1) for rate in RATES}
    agree, alike = defaultdict(list), defaultdict(list)
    for q, k in attention_of(model, size, prompts):
        exact = token_mass(q, k, shape, queries[1])
        for rate, index in queries.items():
            for radius in RADII:
                if 2 * radius + 1 >= min(grid.height, grid.width):
                    continue
                got = token_mass(q, k, shape, index, exclude_radius=radius)
                agree[rate, radius].append(spearman(got, exact))
                alike[rate, radius].append(dropped_alike(got, exact, grid))
    return [
        {
            "model": CHECKPOINT.stem,
            "grid": "x".join(map(str, shape)),
            "queries": f"1/{1 / rate:.0f}",
            "exclude_radius": radius,
            "spearman": sum(found) / len(found),
            "spearman_worst": min(found),
            "dropped_alike": sum(alike[rate, radius]) / len(found),
            "maps": len(found),
            "commit": commit(),
            "torch": torch.__version__,
        }
        for (rate, radius), found in agree.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    model = load_original(CHECKPOINT)
    for size in SIZES:
        rows = measure(model, size, args.prompts)
        for row in rows:
            log.info(
                "%s, queries %s, radius %s: %.3f (worst %.3f), %.0f %% dropped alike",
                row["grid"], row["queries"], row["exclude_radius"], row["spearman"],
                row["spearman_worst"], 100 * row["dropped_alike"],
            )  # fmt: skip
        merge_rows(args.results / "token_mass.csv", rows, COLUMNS, KEY)


if __name__ == "__main__":
    main()
