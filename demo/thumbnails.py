"""Draws the pictures of the templates: `python -m wantrim.demo.thumbnails` writes workflows/*.jpg.

All are of the tiny Wan, those of templates for real models too, and say so.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..hosts.diffusers.slim import load_slim
from ..profiles.profile import load_profile
from ..report.video_metrics import psnr
from ..slim.export import slim_checkpoint
from ..solve.dial import Dial
from ..toy import CHECKPOINT, PROFILE
from ..toy.world import parse_prompt
from .run import SPEEDUP, STEPS, THRESHOLDS, race
from .strip import draw_beside, draw_strip
from .ways import Cached, Job, Trimmed, Way

log = logging.getLogger(__name__)
WORKFLOWS = Path(__file__).parents[1] / "workflows"
WHOLE = "whole model"


@dataclass(frozen=True)
class Shown:
    """What a template's picture shows: the whole and the trimmed video of a prompt of its own."""

    task: str
    prompt: str
    steps: int = STEPS
    speedup: float = SPEEDUP
    seed: int = 7

    @property
    def job(self) -> Job:
        # a model of four steps goes without guidance
        how = {"guidance": 1.0, "shift": 5.0} if self.steps == 4 else {"guidance": 4.0}
        return Job(self.task, [parse_prompt(self.prompt)], self.seed, self.steps, **how)

    def draw(self) -> Image.Image:
        job = self.job
        ways = [Way(WHOLE, job.steps), Trimmed("WanTrim", job, dial=Dial(self.speedup))]
        whole, trimmed = race(ways, job, 0, lambda: None)
        return draw_beside(whole.video[0], trimmed.video[0], trimmed.work)


TEMPLATES = {
    "start_here": Shown("t2v", "a red circle moving right slowly on a black background"),
    "wantrim_demo_i2v.app": Shown("i2v", "a yellow triangle moving up slowly on a navy background"),
    "wan2.1_t2v_1.3b": Shown("t2v", "a green square moving left slowly on a gray background"),
    "wan2.2_t2v_14b": Shown(
        "t2v", "a blue circle moving right slowly on a black background", 4, 1.3, seed=1
    ),
    "wan2.2_i2v_14b": Shown(
        "i2v", "a white square moving left slowly on a striped background", 4, 1.3
    ),
    "wan2.2_ti2v_5b": Shown("t2v", "a purple triangle moving right slowly on a gray background"),
}
CANDIDATES = Shown("t2v", "a red circle moving right slowly on a black background")
CANDIDATES_OF_ONE = Shown("t2v", "a purple cross moving right quickly on a striped background")
CANDIDATES_OF_A_PAIR = Shown("i2v", "a blue cross moving up slowly on a gray background")
SLIM = Shown("t2v", "a green circle moving right slowly on a navy background")
SLIM_RATIO = 0.2


def draw_candidates(shown: Shown = CANDIDATES) -> Image.Image:
    """The same seed whole, with WanTrim, with EasyCache and in fewer steps, and which is nearest."""
    job = shown.job
    ours = Trimmed("WanTrim", job, dial=Dial(SPEEDUP))
    fewer = round(job.steps / ours.speedup)
    ways = [
        Way(WHOLE, job.steps),
        ours,
        Cached("EasyCache", THRESHOLDS[job.task], job),
        Way(f"{fewer} steps", fewer),
    ]
    sampled = race(ways, job, 0, lambda: None)
    near = {
        w.name: psnr(s.video, sampled[0].video) for w, s in zip(ways[1:], sampled[1:], strict=True)
    }
    rows = [(WHOLE, sampled[0].video[0])]
    for way, one in zip(ways[1:], sampled[1:], strict=True):
        share = sum(one.work) / job.steps
        rows.append((f"{way.name}: {share:.0%} of the work, {near[way.name]:.1f} dB", one.video[0]))
    return draw_strip(rows, f"nearest here: {max(near, key=near.get)}", frames=7)


def draw_slim() -> Image.Image:
    """The whole model, and a checkpoint with fewer heads and channels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slim.safetensors"
        slim_checkpoint(
            CHECKPOINT, path, load_profile(PROFILE), rule="budget", prune_ratio=SLIM_RATIO
        )
        size = path.stat().st_size / CHECKPOINT.stat().st_size
        job = SLIM.job
        ways = [Way(WHOLE, job.steps), Way("slim", job.steps, load_slim(path))]
        whole, slim = race(ways, job, 0, lambda: None)
    rows = [(WHOLE, whole.video[0]), ("slim checkpoint, not trained again", slim.video[0])]
    return draw_strip(rows, f"{size:.0%} of the weights, in memory and on disk")


DRAWERS: dict[str, Callable[[], Image.Image]] = {
    **{name: shown.draw for name, shown in TEMPLATES.items()},
    "wantrim_demo_tuned": draw_candidates,
    "wan2.1_t2v_1.3b_tuned": lambda: draw_candidates(CANDIDATES_OF_ONE),
    "wan2.2_i2v_14b_tuned": lambda: draw_candidates(CANDIDATES_OF_A_PAIR),
    "wan2.1_t2v_slim": draw_slim,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WORKFLOWS)
    parser.add_argument("--only", help="the name of one template")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if args.only not in (None, *DRAWERS):
        parser.error(f"--only: expected one of {', '.join(DRAWERS)}, got {args.only}")
    for name, draw in DRAWERS.items():
        if args.only in (None, name):
            draw().save(args.out / f"{name}.jpg", quality=88)
            log.info("%s", name)


if __name__ == "__main__":
    main()
