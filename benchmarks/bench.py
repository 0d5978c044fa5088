"""One task of a subject at one way of sampling: dense videos, and what a case makes of them."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..engine.engine import COND, UNCOND
from ..engine.plan import TrimPlan
from ..hosts.diffusers.attach import attach
from ..hosts.diffusers.profiling import profile_run
from ..hosts.diffusers.sample import sample, sigmas_for
from ..hosts.diffusers.shape import wan_shape
from ..methods.grid import TokenGrid, masked_as_given
from ..profiles.profile import Profile
from ..solve.course import Course
from ..solve.dial import Dial, Run, flops
from .cases import DIALLED, Case, Point, case_run, solve_plan
from .flops import count_flops
from .head_cases import HEADS, head_plan
from .metrics import MAX_DB, measure, summarise
from .peers.registry import CALIBRATED, PEERS, Method, Tuner
from .subjects import Item, Subject
from .table import partial_of

log = logging.getLogger(__name__)
# of this many videos one has its FLOPs counted
EVERY = 8
# step caches decide for each video alone: every second one is counted
EVERY_ADAPTIVE = 2
# so many videos set a peer's knob, in benches of so many prompts
TUNE_ON, FULL_LOOK = 4, 8


def sampling_of(subject: Subject, point: Point, item: Item) -> Run:
    """How such a video is sampled, as the dial knows it."""
    patch = subject.model.config.patch_size
    image = subject.model_kwargs(item).get("encoder_hidden_states_image")
    anchored = None
    if item.condition is not None:
        anchored = tuple(masked_as_given(item.condition[None, :4]).tolist())
    return Run(
        wan_shape(subject.model, len(item.text), 0 if image is None else image.shape[1]),
        TokenGrid(*(n // p for n, p in zip(subject.size, patch, strict=True))),
        tuple(sigmas_for(point.steps, point.shift).tolist()),
        point.shift,
        point.prompts,
        anchored,
        starts_given=bool(anchored and anchored[0]),
    )


def dense_path(
    folder: Path,
    subject: Subject,
    task: str,
    point: Point,
    prompts: int,
    seeds: int,
    made_of: str,
) -> Path:
    """Where the dense videos of a bench are kept."""
    sampling = f"{point.steps}_{point.guidance:g}_{point.shift:g}"
    name = f"dense_{subject.name}_{task}_{sampling}_{prompts}x{seeds}_{made_of}"
    return folder / f"{name}.safetensors"


class Bench:
    """Dense videos are sampled once and kept in `folder`.

    Args:
        folder: where.
        made_of: stands for the model, the prompts and the size in the names of what is kept.
    """

    def __init__(
        self,
        subject: Subject,
        task: str,
        point: Point,
        prompts: int,
        seeds: int,
        folder: Path,
        made_of: str = "",
    ):
        self.subject, self.task, self.point = subject, task, point
        # a case may put others here while it samples
        self.model, self.guidance = subject.model, point.guidance
        # further columns of the case that runs
        self.facts: dict[str, float] = {}
        self.items = subject.items(task, prompts, seeds)
        self.prompts, self.seeds = prompts, seeds
        self.dense_path = dense_path(folder, subject, task, point, prompts, seeds, made_of)
        self.sampling = sampling_of(subject, point, self.items[0])
        self.grid, self.shape = self.sampling.grid, self.sampling.shape
        self._dense: torch.Tensor | None = None
        self._tuner: Tuner | None = None
        self._profile: Profile | None = None
        self.dense_flops = 0

    def sample(self, item: Item, steps: int | None = None) -> torch.Tensor:
        """One video's latents [1, c, f, h, w], with the model as it is."""
        condition = None if item.condition is None else item.condition[None]
        return sample(
            self.model,
            item.text[None],
            self.subject.size,
            steps=steps or self.point.steps,
            guidance=self.guidance,
            shift=self.point.shift,
            # a prompt's two seeds and two prompts' first seeds must all be different noise
            seed=1000 * item.seed + item.prompt_index,
            condition=condition,
            negative=self.subject.negative,
            model_kwargs=self.subject.model_kwargs(item),
        )

    def dense(self) -> torch.Tensor:
        """Latents [videos, c, f, h, w] of the untouched model."""
        path = self.dense_path
        if self._dense is None and path.exists():
            self._dense = load_file(path)["latents"]
        if self._dense is None:
            self._dense = torch.cat([self.sample(item).cpu() for item in self.items])
            partial = partial_of(path)
            save_file({"latents": self._dense}, partial)
            partial.replace(path)
        if not self.dense_flops:
            self.dense_flops = count_flops(lambda: self.sample(self.items[0]))
        return self._dense

    def run(self, case: Case) -> dict[str, object]:
        """The case's row, and the PSNR of every video under "psnr"; without "row" if it cannot be.

        `unreachable` then says why.
        """
        dense = self.dense()
        self.facts = {}
        try:
            knob, method, steps, predicted = self._prepare(case)
        except ValueError as error:
            return {"case": case.key, "unreachable": str(error)}
        every = EVERY_ADAPTIVE if case.method in PEERS else EVERY
        rows, flops = [], []
        for index, item in enumerate(self.items):
            with method():
                if index % every == 0:
                    flops.append(
                        count_flops(lambda item=item: rows.append(self.sample(item, steps)))
                    )
                else:
                    rows.append(self.sample(item, steps))
        figures = [
            measure(
                self.subject.to_video(got)[0],
                self.subject.to_video(want[None])[0],
                self.subject.reader(item),
                item.first_image,
            )
            for got, want, item in zip(rows, dense, self.items, strict=True)
        ]
        clusters = [item.prompt_index for item in self.items]
        row = {
            "method": case.method,
            "setting": case.setting,
            "knob": knob,
            "model": self.subject.name,
            "task": self.task,
            "steps": self.point.steps,
            "guidance": self.point.guidance,
            "shift": self.point.shift,
            "prompts": self.prompts,
            "seeds": self.seeds,
            "target": case.target,
            "flops_ratio": float(np.mean(flops)) / self.dense_flops,
            "predicted_ratio": predicted,
            **summarise(figures, clusters),
            "exact": sum(one["psnr_db"] >= MAX_DB for one in figures),
            **self.facts,
        }
        return {
            "case": case.key,
            "row": row,
            "psnr": [one["psnr_db"] for one in figures],
            "clusters": clusters,
        }

    def _prepare(self, case: Case) -> tuple[str, Method, int, float | str]:
        """Knob in words, context for one video, steps, and the cost model's ratio."""
        steps = self.point.steps
        if case.method == "dense":
            return "", nullcontext, steps, 1.0
        if case.method == "fewer_steps":
            steps = max(1, round(case.target * steps))
            return f"{steps} steps", nullcontext, steps, steps / self.point.steps
        if case.method in PEERS | CALIBRATED:
            knob, method = self._tune(case)
            return knob, method, steps, ""
        if case.method in HEADS:
            plan = head_plan(case, self.sampling, self._record_profile)
        else:
            plan = solve_plan(case, self.sampling)
        if plan is None:
            raise ValueError("no keep ratio comes near the target")
        knob = plan.describe()
        if plan.tokens is not None:
            knob = f"keep {plan.tokens.schedule.keep_ratio:.3f}"
        method = self.trimmed(plan)
        if case.method in DIALLED and not plan.neutral:
            method = partial(self.steered, case.dial, case_run(case, self.sampling))
        return knob, method, steps, 1 / self.sampling.speedup(plan)

    @property
    def _roles(self) -> tuple[int, ...]:
        """Of a model call's rows."""
        return (COND, UNCOND) if self.point.prompts == 2 else (COND,)

    def trimmed(self, plan: TrimPlan) -> Method:
        """A plan on the model, for one video."""
        roles, shift = self._roles, self.point.shift
        return lambda: attach(self.model, plan, cond_or_uncond=roles, shift=shift)

    @contextmanager
    def steered(self, dial: Dial, run: Run, others: TrimPlan | None = None):
        """What a dial solves for one video, beside the plan of others, and solves anew as the run
        shows what it is like. Gives the engine and its course.
        """
        others = others or TrimPlan()
        with self.trimmed(dial.solve(run, others).plan)() as attached:
            yield attached.engine, Course(dial, run, others, flops, attached.engine)

    def _record_profile(self) -> Profile:
        """Of videos of further prompts."""
        if self._profile is None:
            options = {"cond_or_uncond": self._roles, "shift": self.point.shift}
            with profile_run(self.model, **options) as recorder:
                for item in self._items_to_tune_on():
                    self.sample(item)
            self._profile = recorder.profile()
        return self._profile

    def _tune(self, case: Case) -> tuple[str, Method]:
        if self._tuner is None:
            some = self._items_to_tune_on()
            samples = [lambda item=item: self.sample(item) for item in some]

            def ratio(method: Method) -> float:
                total = 0
                for one in samples:
                    with method():
                        total += count_flops(one)
                return total / (len(samples) * self.dense_flops)

            point = self.point
            self._tuner = Tuner(self.subject.model, point.steps, point.shift, samples, ratio)
        return self._tuner.tune(case.method, case.target)

    def _items_to_tune_on(self) -> list[Item]:
        """Videos of further prompts; of the same ones where there are no others."""
        # a quick look may tune roughly, or tuning would be most of its time
        count = TUNE_ON if self.prompts >= FULL_LOOK else 1
        try:
            return self.subject.items(self.task, self.prompts + count, 1)[-count:]
        except ValueError:
            return self.items[:count]


def read_result(path: Path) -> dict | None:
    """A result written by `write_result`, or None."""
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def write_result(path: Path, result: dict) -> None:
    """All or nothing."""
    partial = partial_of(path)
    partial.write_text(json.dumps(result), "utf-8")
    partial.replace(path)
