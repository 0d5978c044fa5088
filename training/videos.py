"""Test videos during training: the teacher's beside the student's, from the same noise."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..engine.engine import COND, UNCOND
from ..engine.plan import TrimPlan
from ..hosts.diffusers.attach import attach
from ..hosts.diffusers.sample import sample
from ..methods.depth import BlockPlan
from ..profiles.artifact import replacing
from ..profiles.fingerprint import Fingerprint
from ..slim.router import TrainedRouter
from ..toy.vae import ToyVAE
from .objectives import Pair
from .recipe import Recipe, Stage
from .shards import Batch

STEPS, FPS = 20, 8


def draw_videos(
    pair: Pair, recipe: Recipe, stage: Stage, batch: Batch, model: Fingerprint, step: int
) -> dict[str, torch.Tensor]:
    """Latents [c, f, h, w] of the first sample's prompt, by teacher and student."""
    taken = {"condition": batch.condition, "clip": batch.clip}
    one = {name: None if value is None else value[:1] for name, value in taken.items()}

    def draw(model, steps: int, guidance: float) -> torch.Tensor:
        clip = None if one["clip"] is None else one["clip"].to(pair.dtype)
        return sample(
            model,
            batch.text[:1].to(pair.dtype),
            tuple(batch.latents.shape[2:]),
            steps=steps,
            guidance=guidance,
            shift=stage.shift,
            seed=step,
            condition=one["condition"],
            negative=pair.negative,
            device=batch.latents.device,
            model_kwargs={} if clip is None else {"encoder_hidden_states_image": clip},
        )

    teacher = draw(pair.teacher, STEPS, stage.guidance)
    steps, guidance = (stage.sampler_steps, 1.0) if stage.few else (STEPS, stage.guidance)
    # training's gate would cost every block; in sampling those left out are not computed
    pair.taps.gate, plan = None, TrimPlan()
    if pair.routing is not None:
        router = TrainedRouter(pair.routing.mlp, pair.routing.kind, model)
        plan = TrimPlan(blocks=BlockPlan(router, pair.routing.budget))
    roles = (COND,) if guidance == 1 else (COND, UNCOND)
    with attach(pair.student, plan, cond_or_uncond=roles, shift=stage.shift):
        student = draw(pair.student, steps, guidance)
    return {"teacher": teacher[0].cpu(), "student": student[0].cpu()}


def write_videos(folder: Path, latents: dict[str, torch.Tensor], recipe: Recipe, step: int) -> Path:
    """Write step-N.mp4 of the toy world, else step-N.safetensors with the latents."""
    folder.mkdir(parents=True, exist_ok=True)
    if not recipe.data.toy:
        path = folder / f"step-{step}.safetensors"
        with replacing(path) as (partial,):
            save_file({name: value.contiguous() for name, value in latents.items()}, partial)
        return path
    path = folder / f"step-{step}.mp4"
    videos = ToyVAE.load().decode(torch.stack([latents["teacher"], latents["student"]]))
    write_mp4(path, torch.cat([*videos], 3), FPS)
    return path


def write_mp4(path: Path, video: torch.Tensor, frame_rate: float) -> None:
    """Write pixels [3, frames, h, w] in 0..1, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    import av

    pixels = (video.permute(1, 2, 3, 0) * 255).round().to(torch.uint8).numpy()
    rate = Fraction(frame_rate).limit_denominator(1000)
    with replacing(path) as (partial,), av.open(str(partial), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=rate)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
