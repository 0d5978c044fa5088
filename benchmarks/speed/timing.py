"""Times ComfyUI's own sampling of a Wan of random weights; runs in ComfyUI's interpreter alone."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
from comfy.ldm.wan.model import WanModel
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_torch_compile import TorchCompileModel

from ...engine.context import Room
from ...engine.plan import TrimPlan
from ...hosts.comfyui import attach as host
from ...methods.cost import WanShape


def random_model(shape: WanShape, dtype: torch.dtype):
    """A text-to-video MODEL of these sizes, without a flow shift."""
    heads = shape.dim // shape.head_dim
    with torch.device("meta"):
        network = WanModel(
            model_type="t2v",
            in_dim=shape.in_channels,
            out_dim=shape.out_channels,
            dim=shape.dim,
            ffn_dim=shape.ffn_dim,
            num_heads=heads,
            num_layers=shape.num_blocks,
            freq_dim=shape.freq_dim,
            text_dim=shape.text_dim,
            operations=comfy.ops.disable_weight_init,
            dtype=dtype,
        )
    # billions of numbers take a CPU minutes
    device = comfy.model_management.get_torch_device()
    draw = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, value in network.state_dict().items():
        scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
        noise = torch.empty(value.shape, dtype=dtype, device=device)
        noise.normal_(0, scale, generator=draw)
        weights[name] = (noise + float("norm" in name and name.endswith("weight"))).cpu()
    config = {"transformer": {"num_heads": heads, "text_dim": shape.text_dim}}
    loaded = comfy.sd.load_diffusion_model_state_dict(
        weights, model_options={"dtype": dtype}, metadata={"config": json.dumps(config)}
    )
    return ModelSamplingSD3().patch(loaded, shift=1.0)[0]


def compiled_model(model, backend: str):
    """The MODEL as ComfyUI's own compile node hands it out."""
    return TorchCompileModel.execute(model, backend).result[0]


def seconds_per_step(
    model,
    plan: TrimPlan | None,
    latent: Sequence[int],
    sigmas: Sequence[float],
    text_tokens: int,
    room: Room | None = None,
) -> float:
    """Median time of a step of one Euler run without guidance; the first step is not counted.

    On the CPU the time that the process ran.

    Args:
        plan: None samples the model as it is.
        latent: (f, h, w).
        room: where keys and values are kept; None is beside the blocks.
    """
    device = comfy.model_management.get_torch_device()
    marks: list[float] = []

    def done(*_) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter() if device.type == "cuda" else time.process_time())

    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(1, model.model.diffusion_model.in_dim, *latent, generator=draw)
    text_dim = model.model.diffusion_model.text_dim
    text = [[torch.randn(1, text_tokens, text_dim, generator=draw), {}]]
    with _kept_in(room):
        comfy.sample.sample_custom(
            model if plan is None else host.attach(model, plan),
            noise,
            1.0,
            comfy.samplers.sampler_object("euler"),
            torch.tensor([*sigmas, 0.0]),
            text,
            text,
            torch.zeros_like(noise),
            callback=done,
            disable_pbar=True,
            seed=0,
        )
    # a mark at the end of each step
    return statistics.median(b - a for a, b in zip(marks, marks[1:], strict=False))


@contextmanager
def _kept_in(room: Room | None) -> Iterator[None]:
    """Runs keep their keys and values there, which only a dial decides otherwise."""
    made = host.Engine

    def engine(*given):
        one = made(*given)
        one.memory.room = room or one.memory.room
        return one

    host.Engine = engine
    try:
        yield
    finally:
        host.Engine = made
