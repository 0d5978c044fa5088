"""Put a plan on diffusers' WanTransformer3DModel, through diffusers' own hooks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.distributed.fsdp import FSDPModule

from ...engine.call import Call
from ...engine.compiled import outside_graphs
from ...engine.engine import COND, Engine, check_latent
from ...engine.plan import TrimPlan
from ...engine.record import Record
from ...methods.grid import TokenGrid, masked_as_given, timed_as_given
from ...methods.heads import HeadPlan
from .blocks import Block, BlockHook
from .shape import token_grid, wan_shape

HOOK = "wantrim"


class Attachment:
    """A plan on a model. Use as a context manager, or call `detach` when done."""

    def __init__(self, model: WanTransformer3DModel, plan: TrimPlan, cond_or_uncond, shift: float):
        self.model, self.plan, self.shift = model, plan, shift
        self.cond_or_uncond = tuple(cond_or_uncond)
        self.call: Call | None = None
        self.new_run()

    def new_run(self) -> Record:
        """Start a sampling run; returns the record that the run will fill."""
        record = Record(type(self.model).__name__)
        self.engine = Engine(self.plan, record)
        return record

    def finish(self) -> Record:
        """Close the run and return its record; a call that follows belongs to a new run."""
        record = self.engine.finish(True)
        self.new_run()
        return record

    @torch.compiler.disable(recursive=False)
    def block(self, index: int, block: Block) -> torch.Tensor:
        """Run a block, by the call's program where there is one."""
        return block.run(block.hidden) if self.call is None else self.call.block(index, block)

    def detach(self) -> None:
        for module in (self.model, *self.model.blocks):
            if hasattr(module, "_diffusers_hook"):
                module._diffusers_hook.remove_hook(HOOK, recurse=False)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind, *exception) -> None:
        self.engine.finish(kind is None)
        self.detach()


def attach(
    model: WanTransformer3DModel,
    plan: TrimPlan,
    *,
    cond_or_uncond: Sequence[int] = (COND,),
    shift: float = 1.0,
) -> Attachment:
    """Put `plan` on a transformer, alone or inside a pipeline. An earlier plan is taken off first.

    Args:
        cond_or_uncond: COND or UNCOND for each chunk of a batch, in order; one chunk when the two
            come in separate calls, as in WanPipeline.
        shift: the scheduler's flow shift, to place a sigma in the run.

    Raises:
        ValueError: the model is not a WanTransformer3DModel, or has other heads than the plan.
    """
    if not _is_plain(model):
        raise ValueError(
            f"model: expected diffusers' WanTransformer3DModel, got {type(model).__name__}: "
            "WanTrim cannot drop tokens there"
        )
    if plan.trims_heads and not plan.finds_roles:
        _check_heads(plan.heads, len(model.blocks), model.config.num_attention_heads)
    attachment = Attachment(model, plan, cond_or_uncond, shift)
    attachment.detach()
    if not plan.neutral:
        HookRegistry.check_if_exists_or_initialize(model).register_hook(
            _ModelHook(attachment), HOOK
        )
        for index, block in enumerate(model.blocks):
            registry = HookRegistry.check_if_exists_or_initialize(block)
            registry.register_hook(BlockHook(attachment.block, index), HOOK)
    return attachment


def _check_heads(plan: HeadPlan, num_blocks: int, num_heads: int) -> None:
    came = (plan.num_blocks, len(plan.self_attention[0]) if plan.num_blocks else 0)
    if came != (num_blocks, num_heads):
        raise ValueError(
            f"heads: expected a plan for {num_blocks} blocks of {num_heads} heads, got one for "
            f"{came[0]} blocks of {came[1]} heads: the profile is of another model"
        )


def _is_plain(model: object) -> bool:
    """Whether this is diffusers' own class; FSDP2 puts one of its own in front of it."""
    kind = type(model)
    return kind is WanTransformer3DModel or (
        isinstance(model, FSDPModule) and WanTransformer3DModel in kind.__bases__
    )


@outside_graphs
class _ModelHook(ModelHook):
    def __init__(self, attachment: Attachment):
        super().__init__()
        self.attachment = attachment

    def new_forward(self, module, hidden_states, timestep, *args, **kwargs):
        a = self.attachment
        check_latent(hidden_states)
        images = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states_image")
        if a.engine.record.shape is None:
            text = args[0] if args else kwargs["encoder_hidden_states"]
            a.engine.record.shape = wan_shape(
                module, text.shape[1], 0 if images is None else images.shape[1]
            )
        grid = token_grid(module, hidden_states)
        # without the image channels: a router looks at the noisy latent alone
        latent = hidden_states[:, : module.config.out_channels]
        anchored = _anchored(module, hidden_states, timestep, grid)
        call = a.engine.begin(
            levels=timestep,
            unit=1000,
            latent=latent,
            cond_or_uncond=a.cond_or_uncond,
            grid=grid,
            num_blocks=len(module.blocks),
            shift=a.shift,
            anchored=anchored,
            # of CLIP's tokens the first is the class
            clip=None if images is None else images[:, 0],
            alone=not any(map(_shared, module.blocks)),
        )
        if call.repeats:
            return _in_their_form(call.repeated(), args, kwargs)
        a.call = call if call.touches_blocks else None
        try:
            forward = self.fn_ref.original_forward
            out = call.run(partial(forward, hidden_states, timestep, *args, **kwargs))
        finally:
            a.call = None
        if isinstance(out, tuple):
            return (call.output(out[0]), *out[1:])
        out.sample = call.output(out.sample)
        return out


def _shared(block: torch.nn.Module) -> bool:
    """Whether somebody else sees what comes out of a block."""
    hooks = getattr(block, "_diffusers_hook", None)
    others = hooks is not None and set(hooks.hooks) - {HOOK}
    return bool(others or block._forward_hooks)


def _in_their_form(velocity: torch.Tensor, args: tuple, kwargs: dict):
    """A model's output as the caller asked for it."""
    names = ("encoder_hidden_states", "encoder_hidden_states_image", "return_dict")
    asked = {**dict(zip(names, args, strict=False)), **kwargs}
    if asked.get("return_dict", True):
        return Transformer2DModelOutput(sample=velocity)
    return (velocity,)


def _anchored(module, hidden_states, timestep, grid: TokenGrid) -> torch.Tensor | None:
    config = module.config
    # Wan's image-to-video input: noise, 4 mask channels, image latents
    if config.in_channels == 2 * config.out_channels + 4:
        return masked_as_given(hidden_states[:, config.out_channels : config.out_channels + 4])
    if timestep.ndim == 2:
        return timed_as_given(timestep, grid.frames)
    return None
