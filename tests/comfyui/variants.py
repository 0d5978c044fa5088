"""Every kind of Wan that ComfyUI samples: its tiny model and what its own nodes condition it on."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from comfyui_version import __version__ as comfyui_version

import comfy.ops
import comfy.sd
from comfy_extras import nodes_wan
from wantrim.tests.comfyui import tiny

SIDE = 8
# of a CLIP picture; real ones are 257 and would take most of the time
CLIP = 17
POSES = (1, 16, tiny.FRAMES, SIDE // 2, SIDE // 2)
# class, its sizes, and what its own nodes condition on beside text
FURTHER = {
    "s2v": (
        "model.WanModel_S2V",
        {"in_dim": 16, "audio_dim": 32, "audio_inject_layers": [0, 2, 3]},
        {"audio_embed": (1, 25, 32, 12)},
    ),
    "humo": ("model.HumoWanModel", {"in_dim": 36}, {"audio_embed": (1, tiny.FRAMES, 8, 5, 1280)}),
    # a face adapter behind every fifth block
    "animate": (
        "model_animate.AnimateWanModel",
        {"in_dim": 36, "num_layers": 5},
        {"pose_video_latent": (1, 16, 2, SIDE, SIDE)},
    ),
    "scail": ("model.SCAILWanModel", {"in_dim": 20}, {"pose_video_latent": POSES}),
    "scail2": ("model.SCAIL2WanModel", {"in_dim": 20}, {"pose_video_latent": POSES}),
    "wandancer": ("model_wandancer.WanDancerModel", {"in_dim": 36}, {"audio_embed": (1, 9, 35)}),
    "animate2": (
        "model_animate2.WanAnimate2Model",
        {"model_type": "animate2", "in_dim": 36},
        {"pose_video_latent": (1, 16, 2, SIDE, SIDE)},
    ),
    "causal": ("ar_model.CausalWanModel", {"in_dim": 16}, {}),
    # kinds whose classes tiny.py has, with other inputs
    "flf2v": (
        "model.WanModel",
        {"model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": 2 * CLIP},
        {},
    ),
    "fun_control": ("model.WanModel", {"model_type": "i2v", "in_dim": 48}, {}),
    "fun_camera": ("model.CameraWanModel", {"model_type": "camera", "in_dim": 32}, {}),
}
# what the loader is told beside what it reads from the weights
TOLD = {"causal": {"causal_ar": True}}


def class_of(kind: str) -> type:
    """The host's class of a kind; a test of one that an older ComfyUI lacks is left out."""
    if kind in tiny.KINDS:
        return tiny.KINDS[kind][0]
    # the low noise expert is one of `t2v`
    file, name = FURTHER.get(kind, ("model.WanModel",))[0].split(".")
    try:
        return getattr(importlib.import_module(f"comfy.ldm.wan.{file}"), name)
    except (ImportError, AttributeError):
        pytest.skip(f"this ComfyUI, {comfyui_version}, has no {name}")


@cache
def _weights(kind: str) -> dict[str, torch.Tensor]:
    options = FURTHER[kind][1]
    sizes = {"dim": tiny.DIM, "ffn_dim": 128, "num_layers": tiny.LAYERS, "freq_dim": 256}
    with torch.device("cpu"):
        module = class_of(kind)(
            out_dim=16,
            operations=comfy.ops.disable_weight_init,
            dtype=torch.float32,
            **{**sizes, **_heads(), **options},
        )
    return tiny.random_weights(module, seed=11)


def _heads() -> dict[str, int]:
    return {"num_heads": tiny.HEADS, "text_dim": tiny.TEXT_DIM}


def state_dict(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A fresh copy of the checkpoint of a kind, and its metadata."""
    if kind in tiny.KINDS:
        return tiny.state_dict(kind)
    if kind == "low":
        return _low_expert()
    options = FURTHER[kind][1]
    extra = {name: value for name, value in options.items() if name != "in_dim"}
    told = {"transformer": _heads() | extra | TOLD.get(kind, {})}
    weights = {name: value.clone() for name, value in _weights(kind).items()}
    return weights, {"config": json.dumps(told)}


def _low_expert() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Another checkpoint of the sizes of `t2v`."""
    weights, metadata = tiny.state_dict("t2v")
    generator = torch.Generator().manual_seed(5)
    for name, value in weights.items():
        if name.endswith("modulation"):
            value += 0.5 * torch.randn(value.shape, generator=generator)
    return weights, metadata


def load(kind: str, **options):
    """A fresh MODEL of a kind; options as the host's loader nodes give them."""
    weights, metadata = state_dict(kind)
    model = comfy.sd.load_diffusion_model_state_dict(weights, options, metadata)
    assert type(model.model.diffusion_model) is class_of(kind)
    return model


def further_case(kind: str) -> tiny.Case:
    """Text and what the kind's own nodes put into its prompts, as random numbers."""
    given = tiny.case(height=SIDE, width=SIDE)
    generator = torch.Generator().manual_seed(6)
    made = {
        name: torch.randn(shape, generator=generator) for name, shape in FURTHER[kind][2].items()
    }
    for prompt in (given.positive, given.negative):
        prompt[0][1].update(made)
    return given


def made(node, *args, last: int = 2, **options) -> tiny.Case:
    """The conditioning of one of the host's nodes."""
    size = (tiny.WIDTH * 8, tiny.HEIGHT * 8, 4 * (tiny.FRAMES - 1) + 1, 1)
    result = node.execute(tiny.text(1), tiny.text(2), tiny.StubVAE(), *size, *args, **options)
    result = result.result
    return tiny.Case(result[0], result[1], result[last]["samples"])


def picture(seed: int = 3, frames: int = 1) -> torch.Tensor:
    return tiny.picture(seed, tiny.HEIGHT * 8, tiny.WIDTH * 8, frames)


def first_and_last(**options) -> tiny.Case:
    node = nodes_wan.WanFirstLastFrameToVideo
    return made(node, start_image=picture(3), end_image=picture(4), **options)


def phantom() -> tiny.Case:
    return made(nodes_wan.WanPhantomSubjectToVideo, picture(5, 2), last=3)


def bernini() -> tiny.Case:
    """Latents as context behind the grid."""
    given = tiny.case()
    latents = [torch.randn(1, 16, 1, tiny.HEIGHT, tiny.WIDTH)]
    for prompt in (given.positive, given.negative):
        prompt[0][1]["context_latents"] = latents
    return given


def _i2v_clip() -> tiny.Case:
    picture_of = tiny.clip_vision(5, CLIP)
    return made(nodes_wan.WanImageToVideo, start_image=picture(3), clip_vision_output=picture_of)


def _flf2v() -> tiny.Case:
    start, end = (tiny.clip_vision(seed, CLIP) for seed in (5, 6))
    return first_and_last(clip_vision_start_image=start, clip_vision_end_image=end)


def _fun_control() -> tiny.Case:
    frames = 4 * (tiny.FRAMES - 1) + 1
    return made(
        nodes_wan.WanFunControlToVideo,
        start_image=picture(3),
        clip_vision_output=tiny.clip_vision(5, CLIP),
        control_video=picture(4, frames),
    )


def _fun_inpaint() -> tiny.Case:
    return made(
        nodes_wan.WanFunInpaintToVideo,
        start_image=picture(3),
        end_image=picture(4),
        clip_vision_output=tiny.clip_vision(5, CLIP),
    )


def _fun_camera() -> tiny.Case:
    poses = torch.randn(1, 24, tiny.FRAMES, tiny.HEIGHT * 8, tiny.WIDTH * 8)
    return made(
        nodes_wan.WanCameraImageToVideo,
        start_image=picture(3),
        clip_vision_output=tiny.clip_vision(5, CLIP),
        camera_conditions=poses,
    )


@dataclass(frozen=True)
class Variant:
    """One row: models in the order in which they sample, and what they are given."""

    kinds: tuple[str, ...]
    given: Callable[[], tiny.Case]
    options: dict = field(default_factory=dict)


VARIANTS = {
    "t2v": Variant(("t2v",), tiny.case),
    "i2v_clip": Variant(("i2v_clip",), _i2v_clip),
    "i2v": Variant(("i2v",), lambda: tiny.case("i2v")),
    "flf2v": Variant(("flf2v",), _flf2v),
    "fun_control": Variant(("fun_control",), _fun_control),
    "fun_inpaint": Variant(("i2v_clip",), _fun_inpaint),
    "fun_camera": Variant(("fun_camera",), _fun_camera),
    "vace": Variant(("vace",), lambda: tiny.case("vace")),
    "phantom": Variant(("t2v",), phantom),
    "context": Variant(("t2v",), bernini),
    "pair": Variant(("t2v", "low"), tiny.case),
    "ti2v": Variant(("ti2v",), lambda: tiny.case("ti2v")),
    "fun22_control": Variant(("fun",), lambda: tiny.case("fun")),
    "fun22_camera": Variant(("camera",), lambda: tiny.case("camera")),
    **{
        kind: Variant((kind,), lambda kind=kind: further_case(kind))
        for kind in ("s2v", "humo", "animate", "scail", "scail2", "wandancer", "animate2")
    },
    "causal": Variant(("causal",), tiny.case, {"sampler": "ar_video", "cfg": 1.0}),
}
