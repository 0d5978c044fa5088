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
from ..engine.record import Record
from ..hosts.diffusers.attach import attach
from ..hosts.diffusers.sample import denoise, sample, sigmas_for
from ..hosts.diffusers.shape import wan_shape
from ..hosts.diffusers.weights import load_original
from ..methods.grid import TokenGrid
from ..methods.shares import Shares
from ..methods.tokens import paper_plan
from ..report.video_metrics import flicker, motion, psnr
from ..solve.dial import Dial
from ..solve.dial import Run as Sampling
from ..toy import CHECKPOINT
from ..toy.metrics import adherence, still_ground
from ..toy.text import encode_prompt
from ..toy.vae import ToyVAE, image_condition
from ..toy.world import PIXEL_FRAMES, Scene, held_out_scenes, render
from .measure import LATENT_SIZE, to_video

SHIFT = 3.0
GUIDANCE = 4.0
SPEEDUP = 1.5
# of the paper's prune ratios the middle one
KEEP = 0.7
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

    def sampling(self, model) -> Sampling:
        """What the dial has to know of a video."""
        frames, height, width = LATENT_SIZE
        grid = TokenGrid(frames, height // 2, width // 2)
        given = None
        if self.condition is not None:
            given = (True, *[False] * (frames - 1))
        sigmas = tuple(sigmas_for(self.steps, SHIFT).tolist())
        shape = wan_shape(model, self.text.shape[1])
        return Sampling(shape, grid, sigmas, SHIFT, 2, given, starts_given=given is not None)

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


def paper(keep_ratio: float = KEEP, **options) -> TrimPlan:
    """TAPE, which chooses as often for this depth as the paper's does for 40 blocks."""
    return TrimPlan(paper_plan(keep_ratio, **{"reselect_every": RESELECT_EVERY, **options}))


class Contestant:
    """One way of sampling, on a model of its own so that all can advance step by step together.

    Args:
        wish: a plan, or a dial that is solved for each job; None is the untouched model.
    """

    def __init__(self, name: str, wish: TrimPlan | Dial | None = None):
        self.name, self.wish = name, wish
        self.model = load_original(CHECKPOINT)
        self.attachment = None

    def prepare(self, job: Job) -> None:
        """Put the plan for a job on the model."""
        plan = self.wish
        if plan is None:
            return
        if isinstance(plan, Dial):
            plan = plan.solve(job.sampling(self.model)).plan
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
    """Text- and image-to-video: dense, the default, as many FLOPs on fewer steps, and the paper."""
    scenes = held_out_scenes(prompts, seed=3)
    jobs = [Job(task, scenes, seed, steps) for task in TASKS]
    contestants = [
        Contestant("dense"),
        Contestant("default", Dial(SPEEDUP)),
        Contestant("fewer_steps"),
        Contestant("paper", paper()),
    ]
    runs: list[Run] = []
    with Progress() as progress:
        total = len(jobs) * len(contestants) * steps
        bar = progress.add_task("is neutral exact?", total=total)
        neutral = all(neutral_is_exact(contestants[0].model, job) for job in jobs)
        for job in jobs:
            progress.update(bar, description=f"{job.task}: counting FLOPs")
            entries = [Run(job.task, c.name, steps) for c in contestants]
            for entry, contestant in zip(entries, contestants, strict=True):
                contestant.prepare(job)
                dense = contestant.wish is None
                entry.flops_per_step = contestant.flops(job, 1 if dense else steps)
            # the same compute as the default, spent on fewer dense steps
            by_name = {entry.name: entry for entry in entries}
            share = by_name["default"].flops_per_step / by_name["dense"].flops_per_step
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
            entry.record = contestant.attachment.finish()
            # the engine's clock also counts the others' turns
            for step, seconds in zip(entry.record.steps, times[number], strict=True):
                step.seconds = seconds
            entry.record.seconds = sum(times[number])
        entry.videos = to_video(latents[number], vae)
        # the steps of a plan are not alike
        entry.seconds_per_step = statistics.fmean(times[number])
        entry.speedup_measured = sum(times[0]) / sum(times[number])


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
    sigmas = tuple(sigmas_for(2, SHIFT)[:-1].tolist())
    # attached, and every step computes everything: trimming starts behind the last one
    later = Shares((*sigmas, 0.1), (1.0, 1.0, 0.5))
    for plan in (TrimPlan(), paper(start=1.0), TrimPlan(shares=later)):
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
        "speedup": SPEEDUP,
        "reselect_every": RESELECT_EVERY,
    }
