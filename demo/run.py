"""Samples the tiny Wan in every way on the same prompts and seeds, and measures them."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field, fields
from multiprocessing import Manager, get_context
from queue import Empty

import numpy as np
import torch
from rich.progress import Progress

from ..engine.engine import COND, UNCOND
from ..engine.plan import TrimPlan
from ..engine.record import Record
from ..hosts.diffusers.attach import attach
from ..hosts.diffusers.sample import sigmas_for
from ..methods.shares import Shares
from ..methods.tokens import paper_plan
from ..report.video_metrics import motion, psnr
from ..solve.dial import Dial
from ..toy import CHECKPOINT
from ..toy.held_out import held_out_scenes
from ..toy.metrics import adherence
from ..toy.vae import ToyVAE
from .measure import to_video
from .ways import Cached, Job, Trimmed, Way

STEPS = 20
SPEEDUP = 1.5
# of the paper's prune ratios the middle one
KEEP = 0.7
# the tiny Wan has 16 blocks where the paper's models have 30 to 60
RESELECT_EVERY = 4
TASKS = {"t2v": "text to video", "i2v": "image to video"}
# of EasyCache: the bench found that 20 steps then take about what SPEEDUP leaves
THRESHOLDS = {"t2v": 0.049, "i2v": 0.031}
WHOLE, WANTRIM, FEWER, CACHE, PAPER = "whole", "wantrim", "fewer_steps", "step_cache", "paper"


@dataclass
class Run:
    """One way of sampling a task's videos; figures are means over them.

    Args:
        work: share of the whole model's FLOPs.
        seconds: of a video.
        steps_work: of each step of the first video, over a step of the whole model.
        psnr_db: to the whole model's video; None where that is infinite or the run is the whole one.
        record: of the first video.
    """

    task: str
    name: str
    steps: int
    work: float = 1.0
    seconds: float = 0.0
    faster: float = 1.0
    psnr_db: float | None = None
    motion_ratio: float = 1.0
    colour_ok: float = 0.0
    shape_ok: float = 0.0
    direction_ok: float = 0.0
    steps_work: list[float] = field(default_factory=list)
    videos: np.ndarray = field(default=None, repr=False)
    record: Record | None = field(default=None, repr=False)

    def row(self) -> dict:
        """The figures without the videos, for report.json."""
        names = [f.name for f in fields(self) if f.name not in ("videos", "record")]
        return {name: getattr(self, name) for name in names}


@dataclass
class Result:
    environment: dict
    neutral_exact: bool
    prompts: list[str]
    runs: list[Run]

    def of(self, task: str) -> dict[str, Run]:
        return {run.name: run for run in self.runs if run.task == task}


def paper(keep_ratio: float = KEEP, **options) -> TrimPlan:
    """TAPE, which chooses as often for this depth as the paper's does for 40 blocks."""
    return TrimPlan(paper_plan(keep_ratio, **{"reselect_every": RESELECT_EVERY, **options}))


def ways_of(job: Job) -> list[Way]:
    """The whole model first; then WanTrim, and as much work on what is free; the paper's plan last."""
    trimmed = Trimmed(WANTRIM, job, dial=Dial(SPEEDUP))
    return [
        Way(WHOLE, job.steps),
        trimmed,
        Way(FEWER, max(2, round(job.steps / trimmed.speedup))),
        Cached(CACHE, THRESHOLDS[job.task], job),
        Trimmed(PAPER, job, paper()),
    ]


def run_demo(steps: int, prompts: int, seed: int) -> Result:
    """Text- and image-to-video, each in a process of its own."""
    with (
        ProcessPoolExecutor(len(TASKS), get_context("spawn")) as pool,
        Manager() as manager,
        Progress() as progress,
    ):
        told = manager.Queue()
        bars = {task: progress.add_task(title, total=None) for task, title in TASKS.items()}
        asked = [pool.submit(run_task, task, steps, prompts, seed, told.put) for task in TASKS]
        pending = set(asked)
        while pending:
            pending = wait(pending, timeout=0.2).not_done
            try:
                while True:
                    task, total, done = told.get_nowait()
                    progress.update(bars[task], total=total, completed=done)
            except Empty:
                continue
        answers = [answer.result() for answer in asked]
    scenes = held_out_scenes(prompts, seed=3)
    return Result(
        _environment(),
        all(neutral for neutral, _ in answers),
        [scene.prompt() for scene in scenes],
        [run for _, runs in answers for run in runs],
    )


def run_task(
    task: str, steps: int, prompts: int, seed: int, tell: Callable[[tuple[str, int, int]], None]
) -> tuple[bool, list[Run]]:
    """Whether a plan that trims nothing changes nothing, and the runs of one task.

    Args:
        tell: gets the task, how many steps there are and how many are done.
    """
    torch.set_num_threads(1)
    job = Job(task, held_out_scenes(prompts, seed=3), seed, steps)
    ways = ways_of(job)
    neutral = neutral_is_exact(ways[0].model, job)
    total, done = prompts * sum(way.steps for way in ways), 0

    def advance() -> None:
        nonlocal done
        done += 1
        tell((task, total, done))

    runs = [Run(task, way.name, way.steps) for way in ways]
    races = [race(ways, job, video, advance) for video in range(prompts)]
    for run, *sampled in zip(runs, *races, strict=True):
        run.videos = np.concatenate([one.video for one in sampled])
        run.seconds = float(np.mean([one.seconds for one in sampled]))
        run.work = float(np.mean([sum(one.work) for one in sampled])) / steps
        run.steps_work, run.record = sampled[0].work, sampled[0].record
    _compare(runs, job)
    return neutral, runs


@dataclass
class Sampled:
    """One video [1, frames, h, w, 3], and what it cost."""

    video: np.ndarray
    seconds: float
    work: list[float]
    record: Record | None


def race(ways: list[Way], job: Job, video: int, advance: Callable[[], None]) -> list[Sampled]:
    """Sample a video in all ways, a step of each in turn: the machine's moods hit all alike."""
    samplers = [way.begin(job, video) for way in ways]
    times: list[list[float]] = [[] for _ in ways]
    latents = [None] * len(ways)
    for index in range(job.steps):
        for number, way in enumerate(ways):
            if index < way.steps:
                began = time.perf_counter()
                latents[number] = next(samplers[number])
                times[number].append(time.perf_counter() - began)
                advance()
    vae, found = ToyVAE.load(), []
    for way, took, latent in zip(ways, times, latents, strict=True):
        work = way.end()
        if way.record is not None:
            # the engine's clock also counts the others' turns
            for step, seconds in zip(way.record.steps, took, strict=True):
                step.seconds = seconds
            way.record.seconds = sum(took)
        found.append(Sampled(to_video(latent, vae), sum(took), work, way.record))
    return found


def _compare(runs: list[Run], job: Job) -> None:
    whole = runs[0]
    whole_motion = np.mean([motion(video) for video in whole.videos])
    for run in runs:
        run.faster = whole.seconds / run.seconds
        if run is not whole:
            pairs = zip(run.videos, whole.videos, strict=True)
            quality = float(np.mean([psnr(a, b) for a, b in pairs]))
            # equal videos have no PSNR, and JSON has no infinity
            run.psnr_db = quality if np.isfinite(quality) else None
        run.motion_ratio = float(np.mean([motion(v) for v in run.videos]) / whole_motion)
        for key, value in adherence(run.videos, job.scenes).items():
            setattr(run, key, value)


def neutral_is_exact(model, job: Job) -> bool:
    """With hooks on but nothing to drop, and with the hooks gone again: the same bytes."""

    def sample() -> torch.Tensor:
        *_, latents = job.denoise(model, 0, 2)
        return latents

    whole = sample()
    sigmas = tuple(sigmas_for(2, job.shift)[:-1].tolist())
    # attached, and every step computes everything: trimming starts behind the last one
    later = Shares((*sigmas, 0.1), (1.0, 1.0, 0.5))
    for plan in (TrimPlan(), paper(start=1.0), TrimPlan(shares=later)):
        with attach(model, plan, cond_or_uncond=(COND, UNCOND), shift=job.shift):
            if not torch.equal(sample(), whole):
                return False
    return torch.equal(sample(), whole)


def _environment() -> dict:
    return {
        "device": "cpu",
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "model": CHECKPOINT.name,
        "dtype": "float32",
        "guidance": Job.guidance,
        "shift": Job.shift,
        "speedup": SPEEDUP,
        "keep_ratio": KEEP,
        "reselect_every": RESELECT_EVERY,
        "thresholds": THRESHOLDS,
    }
