"""What the tiny Wan is like inside: `python -m wantrim.demo.anatomy`.

Writes the head roles (PARE eq. 4), the cost of leaving out one block, the adherence on held-out
prompts and the loss curve as CSV rows and pictures into demo/tiny_wan/.
"""

from __future__ import annotations

import argparse
import csv
import logging
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import torch

from ..hosts.diffusers.blocks import watch_blocks
from ..hosts.diffusers.sample import sample
from ..hosts.diffusers.weights import load_original
from ..methods.grid import TokenGrid
from ..methods.importance import sample_queries
from ..methods.roles import SPATIAL, TEMPORAL, intra_slice_ratio, role
from ..methods.video_metrics import psnr
from ..toy import CHECKPOINT
from ..toy.metrics import adherence
from ..toy.text import encode_prompt
from ..toy.vae import ToyVAE
from ..toy.world import held_out_scenes
from .measure import LATENT_SIZE, score_prompts, to_video

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

log = logging.getLogger(__name__)
OUT = Path(__file__).parent / "tiny_wan"
STEPS = 30


def measure_heads(model, scenes, out: Path) -> None:
    """Intra-slice ratio per block and head, mean over prompts and the steps of their sampling."""
    frames, height, width = LATENT_SIZE
    grid = TokenGrid(frames, height // 2, width // 2)
    queries = sample_queries(grid, 1.0)
    heads = model.config.num_attention_heads
    total = torch.zeros(len(model.blocks), heads)
    calls = Counter()

    def seen(index, block, q, k):
        total[index] += intra_slice_ratio(q, k, grid, queries).mean(0)
        calls[index] += 1

    text = torch.stack([encode_prompt(scene.prompt()) for scene in scenes])
    with watch_blocks(model, seen):
        sample(model, text, LATENT_SIZE, steps=STEPS)
    ratio = (total / calls[0]).numpy()
    rows = [
        {"block": b, "head": h, "intra_slice_ratio": f"{r:.4f}", "role": role(r)}
        for b, line in enumerate(ratio)
        for h, r in enumerate(line)
    ]
    _write_rows(out / "heads.csv", rows)
    log.info("roles: %s; uniform would be %.2f", dict(Counter(r["role"] for r in rows)), 1 / frames)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
    left.hist(ratio.flatten(), bins=np.linspace(0, 1, 26), color="tab:green")
    left.axvline(1 / frames, color="black", label=f"uniform attention, 1/{frames}")
    for edge in (TEMPORAL, SPATIAL):
        left.axvline(edge, color="grey", linestyle=":")
    left.set(xlabel="intra-slice ratio (eq. 4)", ylabel="heads", title="head roles of the tiny Wan")
    left.legend(fontsize=8)
    heat = right.imshow(ratio.T, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    right.set(xlabel="block", ylabel="head", title="temporal (dark) to spatial (bright)")
    figure.colorbar(heat, ax=right)
    figure.savefig(out / "head_roles.png", dpi=110)
    plt.close(figure)


def measure_blocks(model, scenes, out: Path) -> None:
    """Leave out one block at every step: PSNR to the dense video, beside fewer dense steps."""
    text = torch.stack([encode_prompt(scene.prompt()) for scene in scenes])
    vae = ToyVAE.load()

    def video(steps: int):
        return to_video(sample(model, text, LATENT_SIZE, steps=steps), vae)

    dense = video(STEPS)
    rows = []

    def record(what: str, videos) -> None:
        quality = float(np.mean([psnr(a, b) for a, b in zip(videos, dense, strict=True)]))
        scores = {k: f"{v:.3f}" for k, v in adherence(videos, scenes).items()}
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


def measure_adherence(model, prompts: int, out: Path) -> None:
    """Colour, shape and direction on held-out prompts of one, two and three objects."""
    rows = []
    for objects in (1, 2, 3):
        scenes = held_out_scenes(prompts if objects == 1 else prompts // 2, num_objects=objects)
        scores = score_prompts(model, scenes, STEPS)
        row = {"task": "t2v", "objects": objects, "prompts": len(scenes), "steps": STEPS}
        rows.append(row | {key: f"{value:.3f}" for key, value in scores.items()})
        log.info("%s", rows[-1])
    _write_rows(out / "adherence.csv", rows)


def plot_loss(out: Path) -> None:
    """The loss curve from the training log that the shipped weights came with."""
    with (out / "training_log.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure, axis = plt.subplots(figsize=(7, 3.4), constrained_layout=True)
    axis.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows])
    axis.set(
        xlabel="step (batch 16)", ylabel="velocity MSE", title="tiny Wan: training", yscale="log"
    )
    scores = axis.twinx()
    scores.set(ylabel="held-out adherence", ylim=(0, 1.02))
    for key in ("colour", "shape", "direction"):
        tested = [r for r in rows if r[key]]
        points = [float(r[key]) for r in tested]
        scores.plot([int(r["step"]) for r in tested], points, "o--", ms=3, lw=0.8, label=key)
    scores.legend(fontsize=8, loc="center right")
    figure.savefig(out / "loss_curve.png", dpi=110)
    plt.close(figure)


def _write_rows(path: Path, rows: list[dict]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--only", choices=("heads", "blocks", "adherence", "loss"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_original(args.weights)
    few = held_out_scenes(8, seed=2)
    parts = {
        "loss": lambda: plot_loss(args.out),
        "heads": lambda: measure_heads(model, few, args.out),
        "adherence": lambda: measure_adherence(model, args.prompts, args.out),
        "blocks": lambda: measure_blocks(model, few, args.out),
    }
    for name, part in parts.items():
        if args.only in (None, name):
            part()


if __name__ == "__main__":
    main()
