"""What a tiny Wan is like inside: `python -m wantrim.demo.anatomy`, `--world 2` for the second.

Writes the head roles (PARE eq. 4), the cost of leaving out one block, the adherence on held-out
prompts and the loss curve as CSV rows and pictures into demo/tiny_wan/ or demo/tiny_wan_2/.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import logging
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import torch

from ..hosts.diffusers.blocks import watch_blocks
from ..hosts.diffusers.lora import merge_lora
from ..hosts.diffusers.sample import sample
from ..hosts.diffusers.weights import load_original
from ..kernels import frame_mass
from ..methods.grid import TokenGrid
from ..methods.heads import SPATIAL, TEMPORAL, role
from ..methods.importance import sample_queries
from ..report.video_metrics import psnr
from ..toy.metrics import adherence
from ..toy.worlds import FIRST, WORLDS, World
from .measure import sample_videos, score_prompts
from .recipe import RECIPES

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
STEPS = 30
# of the intra-slice ratio: so near to that of uniform attention a head has no role
NEAR = 0.05


def measure_heads(model, world: World, scenes, out: Path) -> None:
    """Intra-slice ratio per block and head, mean over prompts and the steps of their sampling."""
    size = frames, height, width = world.latent_size()
    grid = TokenGrid(frames, height // 2, width // 2)
    queries = sample_queries(grid, 1.0)
    heads = model.config.num_attention_heads
    total = torch.zeros(len(model.blocks), heads)
    calls = Counter()

    def seen(index, block, q, k):
        mass = frame_mass(q, k, (frames, grid.height, grid.width), queries)
        total[index] += mass.mean(0)
        calls[index] += 1

    text = torch.stack([world.encode(scene.prompt()) for scene in scenes])
    with watch_blocks(model, seen):
        sample(model, text, size, steps=STEPS, guidance=RECIPES[world.name].guidance)
    ratio = (total / calls[0]).numpy()
    rows = [
        {"block": b, "head": h, "intra_slice_ratio": f"{r:.4f}", "role": label(r, frames)}
        for b, line in enumerate(ratio)
        for h, r in enumerate(line)
    ]
    _write_rows(out / "heads.csv", rows)
    log.info("roles: %s", dict(Counter(r["role"] for r in rows)))
    draw_heads(ratio, frames, world.checkpoint.stem, out)


def label(ratio: float, frames: int) -> str:
    """Name of a head's role, or "uniform" of attention that shows none, though PARE calls it temporal."""
    return "uniform" if abs(ratio - 1 / frames) < NEAR else role(ratio)


def draw_heads(ratio: np.ndarray, frames: int, name: str, out: Path) -> None:
    """Histogram and map of the heads' intra-slice ratios [blocks, heads]."""
    near = (abs(ratio - 1 / frames) < NEAR).mean()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
    left.hist(ratio.flatten(), bins=np.linspace(0, 1, 26), color="tab:green")
    left.axvline(1 / frames, color="black", label=f"uniform attention, 1/{frames}")
    for edge in (TEMPORAL, SPATIAL):
        left.axvline(edge, color="grey", linestyle=":")
    left.set(
        xlabel="intra-slice ratio (eq. 4)",
        ylabel="heads",
        title=f"{name}: {near:.0%} within {NEAR} of uniform",
    )
    left.legend(fontsize=8)
    heat = right.imshow(ratio.T, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    right.set(xlabel="block", ylabel="head", title="temporal (dark) to spatial (bright)")
    figure.colorbar(heat, ax=right)
    figure.savefig(out / "head_roles.png", dpi=110)
    plt.close(figure)


def measure_blocks(model, world: World, scenes, out: Path) -> None:
    """Leave out one block at every step: PSNR to the dense video, beside fewer dense steps."""
    guidance = RECIPES[world.name].guidance

    def video(steps: int):
        return sample_videos(model, scenes, steps, world=world, guidance=guidance)

    dense = video(STEPS)
    rows = []

    def record(what: str, videos) -> None:
        quality = float(np.mean([psnr(a, b) for a, b in zip(videos, dense, strict=True)]))
        scores = adherence(videos, scenes, world.read_scene)
        scores = {k: f"{v:.3f}" for k, v in scores.items()}
        rows.append({"left_out": what, "psnr_db": f"{quality:.2f}", **scores})
        log.info("%s", rows[-1])

    for number in range(len(model.blocks)):

        def skip(index, block, q, k, number=number):
            return block.hidden if index == number else None

        with watch_blocks(model, skip):
            record(f"block {number}", video(STEPS))
    for share in (1 / 16, 1 / 4, 1 / 2):
        kept = round(STEPS * (1 - share))
        record(f"{STEPS - kept} of {STEPS} steps", video(kept))
    _write_rows(out / "skip_one_block.csv", rows)
    blocks = [row for row in rows if row["left_out"].startswith("block")]
    figure, axis = plt.subplots(figsize=(7, 3.4), constrained_layout=True)
    axis.plot([float(row["psnr_db"]) for row in blocks], "o-", label="one block left out")
    for row, style in zip(rows[len(blocks) :], ("--", "-.", ":"), strict=True):
        label = f"{row['left_out']} left out"
        axis.axhline(float(row["psnr_db"]), linestyle=style, color="grey", label=label)
    axis.set(xlabel="block", ylabel="PSNR to dense (dB)", title="leaving out one block (16 blocks)")
    axis.legend(fontsize=8)
    figure.savefig(out / "skip_one_block.png", dpi=110)
    plt.close(figure)


def measure_adherence(
    model, world: World, prompts: int, out: Path, steps: int = STEPS, guidance: float | None = None
) -> None:
    """What videos of held-out prompts of one, two and three objects have right.

    Rows take the place of those of as many objects, steps and the same guidance.

    Args:
        guidance: None is the recipe's.
    """
    rows, guidance = [], RECIPES[world.name].guidance if guidance is None else guidance
    for objects in (1, 2, 3):
        count = prompts if objects == 1 else prompts // 2
        scenes = world.held_out_scenes(count, num_objects=objects)
        scores = score_prompts(model, scenes, steps, world=world, guidance=guidance)
        row = {"task": "t2v", "objects": str(objects), "prompts": str(len(scenes))}
        row |= {"steps": str(steps), "guidance": f"{guidance:g}"}
        rows.append(row | {key: f"{value:.3f}" for key, value in scores.items()})
        log.info("%s", rows[-1])
    path, key = out / "adherence.csv", ("objects", "steps", "guidance")
    new = {tuple(row[name] for name in key) for row in rows}
    kept = _read_rows(path) if path.exists() else []
    kept = [row for row in kept if tuple(row.get(name) for name in key) not in new]
    _write_rows(path, kept + rows)


def plot_loss(world: World, out: Path) -> None:
    """The loss curve from the training log that the shipped weights came with."""
    rows = _read_rows(out / "training_log.csv")
    figure, axis = plt.subplots(figsize=(7, 3.4), constrained_layout=True)
    axis.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows])
    title = f"{world.checkpoint.stem}: training"
    batch = RECIPES[world.name].batch
    axis.set(xlabel=f"step (batch {batch})", ylabel="velocity MSE", title=title, yscale="log")
    for last, row in itertools.pairwise(rows):
        if last.get("side") != row.get("side"):
            axis.axvline(int(last["step"]), color="grey", linestyle=":", lw=0.8)
    scores = axis.twinx()
    scores.set(ylabel="held-out adherence", ylim=(0, 1.02))
    for key in (name.removesuffix("_ok") for name in world.scores):
        tested = [r for r in rows if r[key]]
        points = [float(r[key]) for r in tested]
        scores.plot([int(r["step"]) for r in tested], points, "o--", ms=3, lw=0.8, label=key)
    scores.legend(fontsize=8, loc="center right")
    figure.savefig(out / "loss_curve.png", dpi=110)
    plt.close(figure)


def _read_rows(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def _write_rows(path: Path, rows: list[dict]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=list(WORLDS), default=FIRST.name)
    parser.add_argument("--weights", type=Path, help="default: the world's tiny Wan")
    parser.add_argument("--out", type=Path, help="default: demo/tiny_wan, demo/tiny_wan_2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--lora", type=Path, help="of training.four_steps, at full strength")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the adherence")
    parser.add_argument("--guidance", type=float, help="of the adherence; 1 with a four-step LoRA")
    parser.add_argument("--only", choices=("heads", "blocks", "adherence", "loss"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    world = WORLDS[args.world]
    out = args.out or HERE / world.checkpoint.stem
    out.mkdir(parents=True, exist_ok=True)
    few = world.held_out_scenes(8, seed=2)

    def model():
        model = load_original(args.weights or world.checkpoint)
        if args.lora:
            merge_lora(model, args.lora)
        return model

    parts = {
        "loss": lambda: plot_loss(world, out),
        "heads": lambda: measure_heads(model(), world, few, out),
        "adherence": lambda: measure_adherence(
            model(), world, args.prompts, out, args.steps, args.guidance
        ),
        "blocks": lambda: measure_blocks(model(), world, few, out),
    }
    for name, part in parts.items():
        if args.only in (None, name):
            part()


if __name__ == "__main__":
    main()
