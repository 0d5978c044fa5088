"""Trains a tiny Wan on its toy world: `python -m wantrim.demo.train --world 2`.

One model for both tasks: Wan's image-to-video input (16 noise, 4 mask and 16 image channels) with
the last 20 at zero for text-to-video. Flow matching on the velocity (noise - data). The run can be
stopped and started again; every batch is a function of the seed and its step alone.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from ..toy.batches import draw_sample, encode_samples
from ..toy.worlds import FIRST, WORLDS
from .measure import score_prompts
from .recipe import RECIPES, Recipe
from .trainer import Trainer

log = logging.getLogger(__name__)
# of the held-out scores on the way: few, because they cost as much as training steps
TEST_PROMPTS = 16
TEST_STEPS = 12


class Batches(Dataset):
    """Item k is the training batch of step k: latents, image condition, text."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.world = recipe, WORLDS[recipe.world]
        self.vae = self.world.load_vae()

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int):
        r = self.recipe
        rng = np.random.default_rng([r.seed, step])
        options = r.drop_text, r.object_shares, self.world, r.side(step)
        drawn = [draw_sample(rng, *options) for _ in range(r.batch)]
        videos, texts = zip(*drawn, strict=True)
        latents, condition = encode_samples(self.vae, videos, rng.random(r.batch) < r.image_share)
        return latents, condition, torch.stack(texts)


def train(
    recipe: Recipe,
    out: Path,
    device: torch.device,
    compile_blocks: bool,
    every: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    start: Path | None = None,
    workers: int = 1,
):
    """Train from where `out` stands to `recipe.steps`; writes weights and log into it.

    SIGTERM ends it after the step that it is in, with its state and weights written.

    Args:
        every: steps between saves and tests.
        start: weights to begin with where `out` has no state; None is the recipe's.
        workers: processes that render.
    """
    out.mkdir(parents=True, exist_ok=True)
    world = WORLDS[recipe.world]
    trainer = Trainer(recipe, device, compile_blocks, dtype)
    resume, start = out / "resume.safetensors", start or recipe.start
    if resume.exists():
        trainer.load(resume)
        log.info("going on at step %d", trainer.step)
    elif start is not None:
        trainer.begin_with(start)
        log.info("beginning with %s at step %d", start.name, trainer.step)
    log_path = out / "training_log.csv"
    _cut_log(log_path, trainer.step)
    data = DataLoader(
        Batches(recipe),
        batch_size=None,
        sampler=range(trainer.step, recipe.steps),
        num_workers=workers,
    )
    scenes = world.held_out_scenes(TEST_PROMPTS, seed=1)
    # on a CPU the fused kernel is 2.5 times slower in bf16 at head_dim 16, and no slower in fp32
    slow = device.type == "cpu" and dtype == torch.bfloat16
    backend = SDPBackend.MATH if slow else SDPBackend.FLASH_ATTENTION
    losses, started = [], time.perf_counter()
    columns = (
        *Progress.get_default_columns()[:3],
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns) as progress, asked_to_stop() as asked:
        task = progress.add_task("training", total=recipe.steps, completed=trainer.step, said="")
        for batch in data:
            side = recipe.side(trainer.step)
            with sdpa_kernel(backend):
                losses.append(trainer.train_step(*batch))
            progress.update(task, completed=trainer.step, said=f"loss {np.mean(losses[-50:]):.4f}")
            if stop := asked.is_set():
                log.info("asked to stop at step %d", trainer.step)
            tested = not stop and (trainer.step % every == 0 or trainer.step == recipe.steps)
            if not (tested or stop) and trainer.step % recipe.log_every:
                continue
            speed = len(losses) * recipe.batch / (time.perf_counter() - started)
            row = {
                "step": trainer.step,
                "samples": trainer.step * recipe.batch,
                "side": side,
                "loss": f"{np.mean(losses):.5f}",
                "samples_per_second": f"{speed:.1f}",
                **{name.removesuffix("_ok"): "" for name in world.scores},
            }
            if tested or stop:
                trainer.save(resume)
                trainer.write_checkpoint(out / world.checkpoint.name)
            if tested:
                options = {"world": world, "side": side, "guidance": recipe.guidance}
                scores = score_prompts(trainer.average, scenes, TEST_STEPS, 1, **options)
                row |= {k.removesuffix("_ok"): f"{v:.3f}" for k, v in scores.items()}
            _append_row(log_path, row)
            log.info("%s", row)
            losses, started = [], time.perf_counter()
            if stop:
                break


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """Within the context SIGTERM (kill PID) sets the event instead of ending the process."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _cut_log(path: Path, step: int) -> None:
    """Drop the rows after `step`: they are of steps that will be done again."""
    if path.exists():
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        path.unlink()
        for row in rows:
            _append_row(path, row)


def _append_row(path: Path, row: dict) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=list(WORLDS), default=FIRST.name)
    parser.add_argument("--out", type=Path, help="default: out/train, out/train_2")
    parser.add_argument("--steps", type=int, help="of the whole run; default: the recipe's")
    parser.add_argument(
        "--start",
        type=Path,
        help="weights to begin with if --out has no state; of the same world, at their step",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; 1 is fastest when shared"
    )
    parser.add_argument("--workers", type=int, help="processes that render")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="to compute in; default: float32 on CPUs without bf16 instructions",
    )
    parser.add_argument("--no-compile", action="store_true", help="slower, starts at once")
    parser.add_argument("--every", type=int, default=500, help="steps between saves and tests")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    # reduced-precision attention on the CPU: 2.5 times faster than the fused kernel at head_dim 16
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    recipe = RECIPES[args.world]
    if args.steps:
        recipe = replace(recipe, steps=args.steps)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    fast = on_gpu or torch.cpu.get_capabilities().get("avx512_bf16", False)
    workers = args.workers or (max(1, min(15, (os.cpu_count() or 2) - 1)) if on_gpu else 1)
    train(
        recipe,
        args.out or Path("out/train" if recipe.world == FIRST.name else "out/train_2"),
        device,
        not args.no_compile,
        args.every,
        dtype=getattr(torch, args.dtype or ("bfloat16" if fast else "float32")),
        start=args.start,
        workers=workers,
    )


if __name__ == "__main__":
    main()
