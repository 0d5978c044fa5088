"""Which of ComfyUI's Wan classes may do what, and where their tokens and given frames lie."""

from __future__ import annotations

import torch

import comfy.model_sampling

from ...methods.grid import TokenGrid, masked_as_given, timed_as_given
from .given import as_dict

# class name -> None when tokens may be dropped, heads trimmed and profiles recorded, else the reason
SUPPORTED: dict[str, str | None] = {
    "WanModel": None,
    "VaceWanModel": None,
    "CameraWanModel": None,
    "WanModel_S2V": "its audio and motion tokens have a layout of their own, not supported yet",
    "AnimateWanModel": "its face adapter between the blocks is not tested with left out tokens yet",
    "HumoWanModel": "its audio attention inside the block needs every token of a latent frame",
    "WanAnimate2Model": "its blocks attend per latent frame and need every token",
    "SCAILWanModel": "its pose tokens have a layout of their own, not supported yet",
    "SCAIL2WanModel": "its pose tokens have a layout of their own, not supported yet",
    "WanDancerModel": "its music injector between the blocks is not tested with left out tokens yet",
    "CausalWanModel": "it runs with a key/value cache and honours no block hooks",
}
NO_VELOCITY = "what the model predicts is not the way from noise to a video, as with FlowRVS"
SKIP_BLOCKS = "skip blocks of"
# blocks may be skipped in more classes: nothing there looks into one
SKIPPABLE: dict[str, str | None] = SUPPORTED | dict.fromkeys(
    (
        "WanModel_S2V",
        "AnimateWanModel",
        "HumoWanModel",
        "SCAILWanModel",
        "SCAIL2WanModel",
        "WanDancerModel",
    )
)
SKIPPABLE["WanAnimate2Model"] = "each of its blocks also runs the pose, which cannot be skipped"


class UnsupportedModel(ValueError):
    """The model cannot do what the plan asks; the message is for the artist."""


def check_variant(model, node: str, aim: str = "leave out tokens of", given: str = "model") -> None:
    """Refuse a MODEL that cannot do what a node aims at.

    Args:
        given: name of the input that it came by.
        aim: as it reads in front of the model's name; `SKIP_BLOCKS` has answers of its own.
    """
    inner = getattr(getattr(model, "model", None), "diffusion_model", None)
    name = "nothing" if inner is None else type(inner).__name__
    if not is_class(inner, "WanModel"):
        raise UnsupportedModel(
            f"{node}: the input '{given}' expects a Wan video model, but got {name}. Connect a Load "
            "Diffusion Model node with a Wan checkpoint, or remove this node."
        )
    table = SKIPPABLE if aim == SKIP_BLOCKS else SUPPORTED
    reason = table.get(name, "this Wan variant is not known to WanTrim")
    if reason is not None:
        supported = ", ".join(key for key, value in table.items() if value is None)
        raise UnsupportedModel(
            f"{node}: cannot {aim} {name}: {reason}. Bypass this node for this model. "
            f"Supported: {supported}."
        )
    if not gives_velocity(model):
        raise UnsupportedModel(
            f"{node}: cannot {aim} {name}: {NO_VELOCITY}. Bypass this node for this model."
        )


def gives_velocity(model) -> bool:
    """Whether what a MODEL predicts is a velocity, as the repeated ones are taken to be."""
    sampling = model.get_model_object("model_sampling")
    own = getattr(type(sampling), "calculate_denoised", None)
    return own is comfy.model_sampling.CONST.calculate_denoised


def is_class(network, *names: str) -> bool:
    """Whether a network is of a class of the host, or of one that another pack made of it."""
    return any(base.__name__ in names for base in type(network).__mro__)


def why_not_now(transformer_options: dict) -> str | None:
    """A reason why this call must run all tokens, or None."""
    patches = as_dict(transformer_options.get("patches"))
    for kind in ("attn1_patch", "attn2_patch"):
        if patches.get(kind):
            return (
                f"another node patches the attention ({kind}) and expects every token, as "
                "InfiniteTalk and MultiTalk do: all tokens were computed"
            )
    return None


def why_not_patched(model) -> str | None:
    """A reason why a run with this MODEL must not look into a block, or None."""
    if any(".self_attn" in name for name in model.object_patches):
        return (
            "another node put a self-attention of its own into the blocks and may expect every "
            "token, as Enhance-A-Video does: all tokens and heads were computed"
        )
    return None


# of a profile that is being recorded: every block is watched
RUN_KEY = "wantrim_profile_run"
# classes whose forward does something to the hidden state between two blocks
BETWEEN = ("VaceWanModel", "WanModel_S2V", "AnimateWanModel", "WanDancerModel")


def sees_between_blocks(dm, transformer_options: dict) -> bool:
    """Whether anybody but us may look at the hidden state between two blocks."""
    replaced = as_dict(as_dict(transformer_options.get("patches_replace")).get("dit"))
    others = any(key[0] == "double_block" for key in replaced)
    patched = as_dict(transformer_options.get("patches")).get("double_block")
    recorded = RUN_KEY in transformer_options
    return bool(others or patched or recorded or is_class(dm, *BETWEEN))


def token_grid(dm, x: torch.Tensor, time_dim_concat: torch.Tensor | None, extra: dict) -> TokenGrid:
    """The video's tokens in the block's sequence, before the model pads and patchifies x.

    Reference latents that go through `ref_conv` come in front of the grid; latents in
    `time_dim_concat` are further latent frames of it.
    """
    frames, height, width = x.shape[2:]
    if time_dim_concat is not None:
        frames += time_dim_concat.shape[2]
    patch_t, patch_h, patch_w = dm.patch_size
    start = 0
    reference = extra.get("reference_latent")
    if reference is not None and getattr(dm, "ref_conv", None) is not None:
        start = (reference.shape[-2] // patch_h) * (reference.shape[-1] // patch_w)
    return TokenGrid(-(-frames // patch_t), -(-height // patch_h), -(-width // patch_w), start)


def starts_given(dm, frames: tuple[bool, ...]) -> bool:
    """Whether the video's start is among the latent frames that are given; VACE puts references there."""
    return any(frames[:1]) and not is_class(dm, "VaceWanModel")


def anchored_frames(
    dm, x: torch.Tensor, timestep: torch.Tensor, grid: TokenGrid, extra: dict
) -> torch.Tensor:
    """bool [f]: latent frames that are given as a condition."""
    anchored = torch.zeros(grid.frames, dtype=torch.bool, device=x.device)
    frames = x.shape[2]
    # references appended in time
    anchored[frames:] = True
    out_channels = dm.out_dim
    mask = x.shape[1] - out_channels - 4
    if mask in (out_channels, 2 * out_channels):
        # noise, control latents (Fun Control), 4 mask channels (1 where given), image latents
        anchored[:frames] |= masked_as_given(x[:, mask : mask + 4])
    each = isinstance(timestep, torch.Tensor) and timestep.ndim == 2
    if each and timestep.shape[1] == frames:
        anchored[:frames] |= timed_as_given(timestep, frames)
    vace = extra.get("vace_context")
    told = isinstance(vace, torch.Tensor) and vace.ndim == 6
    if told and vace.shape[2] > 2 * out_channels:
        # 2 x 16 control latents, then the mask: 0 where the frame is given
        given = (vace[:, :, 2 * out_channels :].amax((0, 2, 4, 5)) == 0).any(0)
        anchored[: len(given)] |= given[: grid.frames]
    return anchored
