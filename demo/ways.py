"""The ways of sampling that the demo compares: whole, fewer steps, WanTrim, a step cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from ..engine.engine import COND, UNCOND
from ..engine.plan import TrimPlan
from ..engine.record import Record
from ..hosts.diffusers.attach import attach
from ..hosts.diffusers.easycache import easycache
from ..hosts.diffusers.sample import denoise, sigmas_for
from ..hosts.diffusers.shape import wan_shape
from ..hosts.diffusers.weights import load_original
from ..methods.grid import TokenGrid
from ..report.figures import step_work
from ..solve.course import Course
from ..solve.dial import Dial, flops
from ..solve.dial import Run as Sampling
from ..toy import CHECKPOINT
from ..toy.batches import image_condition
from ..toy.text import encode_prompt
from ..toy.vae import ToyVAE
from ..toy.world import PIXEL_FRAMES, Scene, render
from .measure import LATENT_SIZE


@dataclass
class Job:
    """What is sampled, one video at a time: the same for every way."""

    task: str
    scenes: list[Scene]
    seed: int
    steps: int
    guidance: float = 8.0
    shift: float = 3.0

    def __post_init__(self):
        self.text = torch.stack([encode_prompt(scene.prompt()) for scene in self.scenes])
        self.condition = None
        if self.task == "i2v":
            rng = np.random.default_rng([self.seed, 5])
            first = np.stack([render(scene, rng)[0] for scene in self.scenes])
            pixels = torch.from_numpy(first).permute(0, 3, 1, 2)
            self.condition = image_condition(ToyVAE.load(), pixels, PIXEL_FRAMES)

    @property
    def prompts(self) -> int:
        """Of a step: with the empty one where there is guidance."""
        return 2 if self.guidance != 1 else 1

    def sampling(self, model) -> Sampling:
        """What the dial has to know of a video."""
        frames, height, width = LATENT_SIZE
        given = (True, *[False] * (frames - 1)) if self.condition is not None else None
        return Sampling(
            wan_shape(model, self.text.shape[1]),
            TokenGrid(frames, height // 2, width // 2),
            tuple(sigmas_for(self.steps, self.shift).tolist()),
            self.shift,
            self.prompts,
            given,
            starts_given=given is not None,
        )

    def denoise(self, model, video: int, steps: int) -> Iterator[torch.Tensor]:
        """The latents [1, 16, f, h, w] of one video after every step."""
        one = slice(video, video + 1)
        return denoise(
            model,
            text=self.text[one],
            size=LATENT_SIZE,
            steps=steps,
            guidance=self.guidance,
            shift=self.shift,
            seed=self.seed + video,
            condition=None if self.condition is None else self.condition[one],
        )


class Way:
    """The whole model, in fewer steps where that is asked; the ground of the other ways.

    Every way has a model of its own, so that all can advance step by step together.
    """

    record: Record | None = None

    def __init__(self, name: str, steps: int, model=None):
        self.name, self.steps = name, steps
        self.model = model or load_original(CHECKPOINT)

    def begin(self, job: Job, video: int) -> Iterator[torch.Tensor]:
        """Start a video; yields the latents after every step."""
        return job.denoise(self.model, video, self.steps)

    def end(self) -> list[float]:
        """Close the video; what each of its steps cost, over a step of the whole model."""
        return [1.0] * self.steps


class Trimmed(Way):
    """With a plan, or with what a dial makes of a job beside the plan."""

    def __init__(self, name: str, job: Job, plan: TrimPlan | None = None, dial: Dial | None = None):
        super().__init__(name, job.steps)
        self.sampling, self.dial, self.others = job.sampling(self.model), dial, plan or TrimPlan()
        self.plan = plan if dial is None else dial.solve(self.sampling, plan).plan
        self.speedup = self.sampling.speedup(self.plan)
        rows = (COND, UNCOND)[: job.prompts]
        self.attachment = attach(self.model, self.plan, cond_or_uncond=rows, shift=job.shift)

    def begin(self, job: Job, video: int) -> Iterator[torch.Tensor]:
        if self.dial is not None:
            Course(self.dial, self.sampling, self.others, flops, self.attachment.engine)
        return super().begin(job, video)

    def end(self) -> list[float]:
        self.record = self.attachment.finish()
        return [step_work(self.record, step) for step in self.record.steps]


class Cached(Way):
    """With EasyCache."""

    def __init__(self, name: str, threshold: float, job: Job):
        super().__init__(name, job.steps)
        self.options = {"steps": job.steps, "shift": job.shift, "threshold": threshold}
        self.stack = ExitStack()

    def begin(self, job: Job, video: int) -> Iterator[torch.Tensor]:
        self.budget = self.stack.enter_context(easycache(self.model, **self.options))
        return super().begin(job, video)

    def end(self) -> list[float]:
        self.stack.close()
        return [float(computed) for computed in self.budget.computed]
