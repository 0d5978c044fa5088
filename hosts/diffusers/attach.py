"""Put a plan on diffusers' WanTransformer3DModel, through diffusers' own hooks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from torch.overrides import TorchFunctionMode

from ...methods.schedule import progress_at
from ...methods.tokens import TokenGrid, gather_tokens
from ..report import Report
from ..session import COND, ModelCall, Session, TrimPlan

HOOK = "wantrim"


class Attachment:
    """A plan on a model. Use as a context manager, or call `detach` when done."""

    def __init__(self, model: WanTransformer3DModel, plan: TrimPlan, roles, shift: float):
        self.model, self.plan, self.roles, self.shift = model, plan, tuple(roles), shift
        self.call: ModelCall | None = None
        self.new_run()

    def new_run(self) -> Report:
        """Start a sampling run; returns the report that the run will fill."""
        report = Report(type(self.model).__name__, planned=self.plan.describe())
        self.session = Session(self.plan, report)
        return report

    def finish(self) -> Report:
        """Close the run and return its report; a call that follows belongs to a new run."""
        report = self.session.finish(True)
        self.new_run()
        return report

    def detach(self) -> None:
        for module in (self.model, *self.model.blocks):
            if hasattr(module, "_diffusers_hook"):
                module._diffusers_hook.remove_hook(HOOK, recurse=False)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception) -> None:
        self.detach()


def attach(
    model: WanTransformer3DModel,
    plan: TrimPlan,
    *,
    roles: Sequence[int] = (COND,),
    shift: float = 1.0,
) -> Attachment:
    """Put `plan` on a transformer, alone or inside a pipeline. An earlier plan is taken off first.

    Args:
        roles: COND or UNCOND for each chunk of a batch, in order; one chunk when the two come in
            separate calls, as in WanPipeline.
        shift: the scheduler's flow shift, to place a sigma in the run.

    Raises:
        ValueError: the model is not a WanTransformer3DModel.
    """
    if type(model) is not WanTransformer3DModel:
        raise ValueError(
            f"expected diffusers' WanTransformer3DModel, got {type(model).__name__}: "
            "WanTrim cannot drop tokens there"
        )
    attachment = Attachment(model, plan, roles, shift)
    attachment.detach()
    if not plan.neutral:
        HookRegistry.check_if_exists_or_initialize(model).register_hook(
            _ModelHook(attachment), HOOK
        )
        for index, block in enumerate(model.blocks):
            registry = HookRegistry.check_if_exists_or_initialize(block)
            registry.register_hook(_BlockHook(attachment, index), HOOK)
    return attachment


class _ModelHook(ModelHook):
    def __init__(self, attachment: Attachment):
        super().__init__()
        self.attachment = attachment

    def new_forward(self, module, hidden_states, timestep, *args, **kwargs):
        a = self.attachment
        grid = _grid(module, hidden_states)
        # per-token timesteps (TI2V) are 0 where the latent is given
        sigma = float(timestep.max()) / 1000
        call = a.session.begin(
            latent=hidden_states,
            sigma=sigma,
            progress=progress_at(sigma, a.shift),
            roles=a.roles,
            grid=grid,
            anchored=_anchored(module, hidden_states, timestep, grid),
            num_blocks=len(module.blocks),
        )
        a.call = call if call.trims else None
        try:
            return self.fn_ref.original_forward(hidden_states, timestep, *args, **kwargs)
        finally:
            a.call = None


class _BlockHook(ModelHook):
    def __init__(self, attachment: Attachment, index: int):
        super().__init__()
        self.attachment, self.index = attachment, index

    def new_forward(self, module, hidden_states, encoder_hidden_states, temb, rotary_emb):
        forward = self.fn_ref.original_forward
        call = self.attachment.call
        if call is None:
            return forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        block = _Block(forward, hidden_states, encoder_hidden_states, temb, rotary_emb)
        return call.block(self.index, block)


class _Block:
    def __init__(self, forward, hidden, text, temb, rotary):
        self.forward, self.hidden, self.text = forward, hidden, text
        self.temb, self.rotary = temb, rotary

    def run(self) -> torch.Tensor:
        return self.forward(self.hidden, self.text, self.temb, self.rotary)

    def run_capturing(self):
        with _FirstAttention() as seen:
            out = self.run()
        if seen.q is None:
            raise RuntimeError(
                "WanTrim saw no scaled_dot_product_attention in this block; set the transformer's "
                "attention backend to 'native'"
            )
        return out, seen.q.transpose(1, 2), seen.k.transpose(1, 2)

    def run_subset(self, index, others):
        extra = None
        if others is not None:
            probe = _FirstAttention(stop=True)
            try:
                with probe:
                    self._on(others)
            except _Stopped:
                extra = (probe.k, probe.v)
        with _FirstAttention(extra=extra):
            return self._on(index)

    def _on(self, index):
        # per-token modulation [b, s, 6, c] only for TI2V
        temb = gather_tokens(self.temb, index) if self.temb.ndim == 4 else self.temb
        rotary = tuple(gather_tokens(part, index) for part in self.rotary)
        return self.forward(gather_tokens(self.hidden, index), self.text, temb, rotary)


class _Stopped(Exception):
    """The probe has what it wanted."""


class _FirstAttention(TorchFunctionMode):
    """Sees the block's first attention call, which is its self-attention; q, k, v [b, n, s, d].

    Args:
        extra: keys and values to append to the call's own.
        stop: leave the block by `_Stopped` before the attention is computed.
    """

    def __init__(self, extra=None, stop: bool = False):
        super().__init__()
        self.extra, self.stop = extra, stop
        self.q = self.k = self.v = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self.q is None:
            names = ("query", "key", "value")
            bound = {**dict(zip(names, args, strict=False)), **kwargs}
            self.q, self.k, self.v = (bound[name] for name in names)
            if self.stop:
                raise _Stopped
            if self.extra is not None:
                bound["key"] = torch.cat([self.k, self.extra[0]], 2)
                bound["value"] = torch.cat([self.v, self.extra[1]], 2)
                return func(
                    *(bound.pop(name) for name in names), *args[3:], **_without(bound, names)
                )
        return func(*args, **kwargs)


def _without(kwargs: dict, names) -> dict:
    return {key: value for key, value in kwargs.items() if key not in names}


def _grid(module, hidden_states) -> TokenGrid:
    _, _, frames, height, width = hidden_states.shape
    patch_t, patch_h, patch_w = module.config.patch_size
    return TokenGrid(frames // patch_t, height // patch_h, width // patch_w)


def _anchored(module, hidden_states, timestep, grid: TokenGrid) -> torch.Tensor | None:
    config = module.config
    # Wan's image-to-video input: noise, 4 mask channels, image latents
    if config.in_channels == 2 * config.out_channels + 4:
        mask = hidden_states[:, config.out_channels : config.out_channels + 4]
        return mask.amax((0, 1, 3, 4)) > 0
    if timestep.ndim == 2:
        return (timestep.view(len(timestep), grid.frames, -1) == 0).all(-1).all(0)
    return None
