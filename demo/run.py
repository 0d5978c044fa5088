"""Runs the tiny Wan dense and trimmed on the same prompts and seeds, and measures both."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from rich.progress import Progress
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..engine.engine import COND, UNCOND
from ..engine.plan import TrimPlan
from ..hosts.diffusers.attach import attach
from ..hosts.diffusers.sample import denoise, sample
from ..hosts.diffusers.weights import load_original
from ..methods.presets import preset_plan
from ..methods.video_metrics import flicker, motion, psnr
from ..toy import CHECKPOINT
from ..toy.metrics import adherence, still_ground
from ..toy.text import encode_prompt
from ..toy.vae import ToyVAE, image_condition
from ..toy.world import PIXEL_FRAMES, Scene, held_out_scenes, render
from .measure import LATENT_SIZE, to_video

SHIFT = 3.0
GUIDANCE = 4.0
# the tiny Wan has 16 blocks where the paper's models have 30 to 60
RESELECT_EVERY = 4
TASKS = ("t2v", "i2v")


@dataclass
class Run:
    """One row of the table. Times and FLOPs are of a step of the whole batch."""

    task: str
    name: str
    steps: int
    seconds_per_step: float = 0.0
    flops_per_step: float = 0.0
    speedup_measured: float = 1.0
    speedup_flops: float = 1.0
    psnr_db: float | None = None
    motion_ratio: float = 1.0
    flicker: float = 0.0
    colour_ok: float = 0.0
    shape_ok: float = 0.0
    direction_ok: float = 0.0
    videos: np.ndarray = field(default=None, repr=False)
    report: Record | None = field(default=None, repr=False)

    def row(self) -> dict:
        """The figures without the videos, for report.json."""
        names = [f.name for f in fields(self) if f.name not in ("videos", "report")]
        return {name: getattr(self, name) for name in names}


@dataclass
class Result:
    environment: dict
    neutral_exact: bool
    prompts: list[str]
    runs: list[Run]


@dataclass
class Job:
    """What is sampled: the same for every run of a task."""

    task: str
    scenes: list[Scene]
    seed: int
    steps: int

    def __post_init__(self):
        self.text = torch.stack([encode_prompt(scene.prompt()) for scene in self.scenes])
        self.condition = None
        if self.task == "i2v":
            rng = np.random.default_rng([self.seed, 5])
            first = np.stack([render(scene, rng)[0] for scene in self.scenes])
            pixels = torch.from_numpy(first).permute(0, 3, 1, 2)
            self.condition = image_condition(ToyVAE.load(), pixels, PIXEL_FRAMES)

    def options(self, steps: int, rows: int | None = None) -> dict:
        return {
            "text": self.text[:rows],
            "size": LATENT_SIZE,
            "steps": steps,
            "guidance": GUIDANCE,
            "shift": SHIFT,
            "seed": self.seed,
            "condition": None if self.condition is None else self.condition[:rows],
        }


def token_plan(prune: float, preset: str = "paper", **options) -> TrimPlan:
    """A preset as the demo runs it; the paper's chooses as often for this depth as for 40 blocks."""
    if preset == "paper":
        options = {"reselect_every": RESELECT_EVERY} | options
    return TrimPlan(preset_plan(preset, 1.0 - prune, **options))


class Contestant:
    """One way of sampling, on a model of its own so that all can advance step by step together."""

    def __init__(self, name: str, plan: TrimPlan | None):
        self.name, self.plan = name, plan
        self.model = load_original(CHECKPOINT)
        self.attachment = None
        if plan is not None:
            self.attachment = attach(self.model, plan, cond_or_uncond=(COND, UNCOND), shift=SHIFT)

    def flops(self, job: Job, steps: int) -> float:
        """Mean FLOPs of a step, counted by torch on one video and scaled to the batch."""
        # the fused CPU attention is unknown to torch's counter, the plain one is counted
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sample(self.model, **job.options(steps, rows=1))
        if self.attachment is not None:
            self.attachment.finish()
        return counter.get_total_flops() / steps * len(job.scenes)


def run_demo(steps: int, prompts: int, seed: int) -> Result:
    """Text- and image-to-video: dense, TAPE at 20, 30 and 40 %, refresh, random, fewer steps."""
    scenes = held_out_scenes(prompts, seed=3)
    jobs = [Job(task, scenes, seed, steps) for task in TASKS]
    contestants = [Contestant("dense", None)]
    contestants += [Contestant(f"tape_{p}", token_plan(p / 100)) for p in (20, 30, 40)]
    contestants.append(Contestant("refresh_30", token_plan(0.3, "refresh")))
    # the control: what is choosing worth?
    contestants.append(Contestant("random_30", token_plan(0.3, importance="random")))
    contestants.append(Contestant("fewer_steps", None))
    runs: list[Run] = []
    with Progress() as progress:
        total = len(jobs) * len(contestants) * steps
        bar = progress.add_task("is neutral exact?", total=total)
        neutral = all(neutral_is_exact(contestants[0].model, job) for job in jobs)
        for job in jobs:
            progress.update(bar, description=f"{job.task}: counting FLOPs")
            entries = [Run(job.task, c.name, steps) for c in contestants]
            for entry, contestant in zip(entries, contestants, strict=True):
                dense = contestant.plan is None
                entry.flops_per_step = contestant.flops(job, 1 if dense else steps)
            # the same compute as TAPE at 30 %, spent on fewer dense steps
            by_name = {entry.name: entry for entry in entries}
            share = by_name["tape_30"].flops_per_step / by_name["dense"].flops_per_step
            by_name["fewer_steps"].steps = max(2, round(steps * share))
            progress.update(bar, description=f"{job.task}: sampling side by side")
            _race(entries, contestants, job, lambda: progress.advance(bar))
            progress.advance(bar, steps - by_name["fewer_steps"].steps)
            _compare(entries, job)
            runs += entries
    return Result(_environment(), neutral, [scene.prompt() for scene in scenes], runs)


def _race(entries: list[Run], contestants: list[Contestant], job: Job, advance) -> None:
    """Sample all, one step of each in turn, so that the machine's moods hit all alike."""
    samplers = []
    for entry, contestant in zip(entries, contestants, strict=True):
        samplers.append(denoise(contestant.model, **job.options(entry.steps)))
    times: list[list[float]] = [[] for _ in entries]
    latents = [None] * len(entries)
    for index in range(job.steps):
        for number, entry in enumerate(entries):
            if index >= entry.steps:
                continue
            began = time.perf_counter()
            latents[number] = next(samplers[number])
            times[number].append(time.perf_counter() - began)
            advance()
    vae = ToyVAE.load()
    for number, (entry, contestant) in enumerate(zip(entries, contestants, strict=True)):
        if contestant.attachment is not None:
            entry.report = contestant.attachment.finish()
            # the session's clock also counts the others' turns
            for step, seconds in zip(entry.report.steps, times[number], strict=True):
                step.seconds = seconds
            entry.report.seconds = sum(times[number])
        entry.videos = to_video(latents[number], vae)
        entry.seconds_per_step = statistics.median(times[number])
        pairs = zip(times[0], times[number], strict=False)
        share = entry.steps / job.steps
        entry.speedup_measured = statistics.median(a / b for a, b in pairs) / share


def _compare(runs: list[Run], job: Job) -> None:
    dense = runs[0]
    dense_motion = np.mean([motion(video) for video in dense.videos])
    for run in runs:
        share = run.steps / dense.steps
        run.speedup_flops = dense.flops_per_step / (run.flops_per_step * share)
        if run is not dense:
            pairs = zip(run.videos, dense.videos, strict=True)
            quality = float(np.mean([psnr(a, b) for a, b in pairs]))
            # equal videos have no PSNR, and JSON has no infinity
            run.psnr_db = quality if np.isfinite(quality) else None
        run.motion_ratio = float(np.mean([motion(v) for v in run.videos]) / dense_motion)
        run.flicker = float(np.mean([flicker(v, still_ground(v)) for v in run.videos]))
        for key, value in adherence(run.videos, job.scenes).items():
            setattr(run, key, value)


def neutral_is_exact(model, job: Job) -> bool:
    """With hooks on but nothing to drop, and with the hooks gone again: the same bytes."""
    options = job.options(2, rows=1)
    dense = sample(model, **options)
    # dropping starts at the very end, so that every step keeps everything
    for plan in (token_plan(0.0), token_plan(0.3, start=1.0), token_plan(0.0, "refresh")):
        with attach(model, plan, cond_or_uncond=(COND, UNCOND), shift=SHIFT):
            if not torch.equal(sample(model, **options), dense):
                return False
    return torch.equal(sample(model, **options), dense)


def _environment() -> dict:
    return {
        "device": "cpu",
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "model": CHECKPOINT.name,
        "dtype": "float32",
        "guidance": GUIDANCE,
        "shift": SHIFT,
        "reselect_every": RESELECT_EVERY,
    }
