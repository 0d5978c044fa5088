"""Tiny random Wan checkpoints of every kind, and one way to sample them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from comfyui_version import __version__ as comfyui_version

import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import nodes as comfy_nodes
from comfy.ldm.wan.model import CameraWanModel, VaceWanModel, WanModel
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_wan
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import SESSION_KEY, attach, attachment_of
from wantrim.methods.schedule import Schedule
from wantrim.methods.shares import Shares
from wantrim.methods.tokens import TokenPlan
from wantrim.nodes.tokens import CUSTOM, CUSTOM_INPUTS, WanTrimTokens

HEADS, DIM, LAYERS, TEXT_DIM = 8, 96, 6, 64
FRAMES, HEIGHT, WIDTH = 3, 8, 10
# tokens in a latent frame of HEIGHT x WIDTH
PER_FRAME = 20
CLIP_TOKENS = 257

KINDS = {
    "t2v": (WanModel, {"model_type": "t2v", "in_dim": 16}),
    # Wan2.2 A14B image-to-video: image channels, no CLIP
    "i2v": (WanModel, {"model_type": "t2v", "in_dim": 36}),
    "i2v_clip": (WanModel, {"model_type": "i2v", "in_dim": 36}),
    "ti2v": (WanModel, {"model_type": "t2v", "in_dim": 48, "out_dim": 48}),
    "vace": (VaceWanModel, {"in_dim": 16, "vace_layers": 2, "vace_in_dim": 96}),
    "camera": (CameraWanModel, {"model_type": "camera_2.2", "in_dim": 36}),
    # Wan2.2 Fun Control: control and image channels, a reference in front of the grid
    "fun": (WanModel, {"model_type": "t2v", "in_dim": 52, "in_dim_ref_conv": 16}),
}


def needs(version: str, what: str) -> None:
    """Leaves a test out where this ComfyUI is older than what it looks at."""
    came, wanted = (tuple(map(int, v.split("."))) for v in (comfyui_version, version))
    if came < wanted:
        pytest.skip(f"{what}: ComfyUI {version} and newer, this is {comfyui_version}")


def random_weights(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights that pass signals of about unit scale through gates that are open."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in sorted(module.state_dict().items()):
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("modulation"):
            weights[name] = 0.5 * noise
        elif value.ndim > 1:
            weights[name] = noise * value[0].numel() ** -0.5
        else:
            weights[name] = 0.1 * noise + float("norm" in name and name.endswith("weight"))
    return weights


@cache
def _weights(kind: str) -> dict[str, torch.Tensor]:
    cls, options = KINDS[kind]
    sizes = {"dim": DIM, "ffn_dim": 128, "num_layers": LAYERS, "freq_dim": 256}
    with torch.device("cpu"):
        module = cls(
            num_heads=HEADS,
            text_dim=TEXT_DIM,
            operations=comfy.ops.disable_weight_init,
            dtype=torch.float32,
            **{"out_dim": 16, **sizes, **options},
        )
    return random_weights(module, seed=11)


def state_dict(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A fresh copy of the checkpoint of a kind, and its metadata."""
    config = {"transformer": {"num_heads": HEADS, "text_dim": TEXT_DIM}}
    weights = {name: value.clone() for name, value in _weights(kind).items()}
    return weights, {"config": json.dumps(config)}


@cache
def base_model(kind: str = "t2v"):
    """The untouched MODEL of a kind, the same object for the whole session."""
    weights, metadata = state_dict(kind)
    model = comfy.sd.load_diffusion_model_state_dict(weights, metadata=metadata)
    assert type(model.model.diffusion_model) is KINDS[kind][0]
    return model


def token_plan(keep: float = 0.7, reselect_every: int = 3, **options) -> TokenPlan:
    schedule = Schedule(keep, options.pop("direction", "falling"))
    return TokenPlan(schedule, reselect_every=reselect_every, **options)


def trimmed(model, keep: float = 0.7, **options):
    """A clone of `model` that drops tokens: by default blocks 0 and 3 of 6 choose anew."""
    return attach(model, TrimPlan(token_plan(keep, **options)))


def shared(model, *values: float, sigmas=None, context: bool = True, **parts):
    """A clone of `model` whose steps compute these shares of their tokens.

    Args:
        sigmas: of the steps; None are those of `simple` at the model's own shift.
        parts: further parts of the plan.
    """
    if sigmas is None:
        sigmas = simple_sigmas(model, len(values))
    return attach(model, TrimPlan(shares=Shares(tuple(sigmas), values, context), **parts))


def simple_sigmas(model, steps: int) -> tuple[float, ...]:
    """Sigmas of the scheduler 'simple', without the last, 0."""
    sampling = model.get_model_object("model_sampling")
    return tuple(comfy.samplers.calculate_sigmas(sampling, "simple", steps).tolist()[:-1])


def choice(name: str = "paper", **inputs) -> dict:
    """The node's input 'preset' as ComfyUI hands it over; inputs not given have their default."""
    if name != CUSTOM:
        return {"preset": name}
    return {"preset": name, **{given.id: given.default for given in CUSTOM_INPUTS}, **inputs}


def at_node(model, name: str = "paper", *, prune_ratio=0.3, start=0.0, end=1.0, **inputs):
    """What WanTrim Tokens makes of `model` with a preset (inputs: those under "custom")."""
    return WanTrimTokens.execute(
        model=model,
        prune_ratio=prune_ratio,
        preset=choice(name, **inputs),
        start_percent=start,
        end_percent=end,
    ).result[0]


def report_of(model):
    return attachment_of(model).record


def shares(model) -> list[float]:
    """Share of the token work that each step of the last run did."""
    return [step.kept_share for step in report_of(model).steps]


class StubVAE:
    """Makes latents of the right shape, different for every picture."""

    def __init__(self, channels: int = 16, stride: int = 8):
        self.latent_channels, self.stride = channels, stride

    def spacial_compression_encode(self) -> int:
        return self.stride

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        frames, height, width, _ = pixels.shape
        size = ((frames - 1) // 4 + 1, height // self.stride, width // self.stride)
        generator = torch.Generator().manual_seed(round(float(pixels.sum()) * 100) % 2**31)
        return torch.randn(1, self.latent_channels, *size, generator=generator)


def text(seed: int, tokens: int = 7, batch: int = 1) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(batch, tokens, TEXT_DIM, generator=generator), {}]]


def clip_vision(seed: int = 5, tokens: int = CLIP_TOKENS):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, tokens, 1280, generator=generator)
    return SimpleNamespace(penultimate_hidden_states=states)


def picture(seed: int, height: int, width: int, frames: int = 1) -> torch.Tensor:
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """What the host's own conditioning node of a kind hands to the sampler."""

    positive: list
    negative: list
    latent: torch.Tensor
    noise_mask: torch.Tensor | None = None


def empty_latent(frames=FRAMES, height=HEIGHT, width=WIDTH, batch=1, channels=16) -> torch.Tensor:
    return torch.zeros(batch, channels, frames, height, width)


def case(
    kind: str = "t2v", frames=FRAMES, height=HEIGHT, width=WIDTH, batch=1, tokens=(7, 7)
) -> Case:
    """Prompts and latent of a kind with its start image, made by the host's own nodes.

    Args:
        tokens: length of the positive and of the negative prompt; the host batches equal lengths.
    """
    positive, negative = text(1, tokens[0]), text(2, tokens[1])
    size = (width * 8, height * 8, 4 * (frames - 1) + 1, batch)
    start = picture(3, height * 8, width * 8)
    if kind in ("i2v", "i2v_clip"):
        clip = clip_vision() if kind == "i2v_clip" else None
        node, extra = nodes_wan.WanImageToVideo, {"start_image": start, "clip_vision_output": clip}
    elif kind == "vace":
        masks = torch.ones(size[2], height * 8, width * 8)
        # the host makes latent masks from every fourth pixel mask or so
        masks[:3] = 0
        video = picture(4, height * 8, width * 8, size[2])
        node = nodes_wan.WanVaceToVideo
        extra = {"strength": 0.8, "control_video": video, "control_masks": masks}
    elif kind == "camera":
        poses = torch.randn(1, 24, frames, height * 8, width * 8)
        node, extra = nodes_wan.WanCameraImageToVideo, {"start_image": start}
        extra["camera_conditions"] = poses
    elif kind == "fun":
        node = nodes_wan.Wan22FunControlToVideo
        extra = {"ref_image": picture(6, height * 8, width * 8)}
    elif kind == "ti2v":
        stub = StubVAE(48, 16)
        size = (width * 16, height * 16, *size[2:])
        start = picture(3, height * 16, width * 16)
        made = nodes_wan.Wan22ImageToVideoLatent.execute(stub, *size, start_image=start).result[0]
        return Case(positive, negative, made["samples"], made["noise_mask"])
    else:
        return Case(positive, negative, empty_latent(frames, height, width, batch))
    result = node.execute(positive, negative, StubVAE(), *size, **extra).result
    return Case(result[0], result[1], result[2]["samples"])


def sample(
    model, given: Case | None = None, *, steps=3, cfg=5.0, sampler="euler", seed=7, **options
) -> torch.Tensor:
    """What a KSampler hands out (options: those of comfy.sample.sample)."""
    given = given or case()
    noise = options.pop("noise", None)
    if noise is None:
        noise = comfy.sample.prepare_noise(given.latent, seed)
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        options.pop("scheduler", "simple"),
        given.positive,
        given.negative,
        given.latent,
        noise_mask=given.noise_mask,
        disable_pbar=True,
        seed=seed,
        **options,
    )


def ksampler(
    model,
    given: Case | None = None,
    *,
    steps=4,
    cfg=5.0,
    sampler="euler",
    scheduler="simple",
    seed=7,
):
    """The samples of the node KSampler."""
    given = given or case()
    latent = {"samples": given.latent}
    if given.noise_mask is not None:
        latent["noise_mask"] = given.noise_mask
    prompts = (given.positive, given.negative)
    made = comfy_nodes.KSampler().sample(
        model, seed, steps, cfg, sampler, scheduler, *prompts, latent, denoise=1.0
    )
    return made[0]["samples"]


def ksampler_advanced(
    model, latent, first: int, last: int, *, steps=4, cfg=5.0, sampler="euler", seed=7
):
    """The samples of the node KSampler (Advanced) that does the steps first to last."""
    given, begins, ends = case(), first == 0, last >= steps
    made = comfy_nodes.KSamplerAdvanced().sample(
        model,
        "enable" if begins else "disable",
        seed,
        steps,
        cfg,
        sampler,
        "simple",
        given.positive,
        given.negative,
        {"samples": latent},
        first,
        last,
        "disable" if ends else "enable",
    )
    return made[0]["samples"]


@dataclass
class Call:
    """One model call as the engine saw it."""

    sigma: float
    cond_or_uncond: list[int]
    frames: int
    decision: int
    budget: int
    # reselecting block -> kept positions [b, kept]
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    length: int = 0


def watch(model) -> list[Call]:
    """Notes every model call of a trimmed MODEL from now on, with what the step decided."""
    calls: list[Call] = []
    decisions: list = []

    def note(executor, x, *args, **kwargs):
        out = executor(x, *args, **kwargs)
        options = args[-1]
        run = options[SESSION_KEY]
        decision = run.engine.now
        if not any(decision is known for known in decisions):
            decisions.append(decision)
        number = next(i for i, known in enumerate(decisions) if known is decision)
        kept = {block: s.index.clone() for block, s in decision.selections.items()}
        length = max((s.length for s in decision.selections.values()), default=0)
        calls.append(
            Call(
                float(options["sigmas"].max()),
                list(options["cond_or_uncond"]),
                x.shape[2],
                number,
                decision.step.program.budget,
                kept,
                length,
            )
        )
        return out

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", note)
    return calls
