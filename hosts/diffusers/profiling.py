"""Records a profile of diffusers' WanTransformer3DModel, through diffusers' own hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook

from ...engine.engine import COND
from ...profiles.fingerprint import Fingerprint, sample_modulation
from ...profiles.recorder import Projections, Recorder
from ...profiles.recording import BlockWatch, CallRecord
from .blocks import AttentionTap, Block, BlockHook
from .shape import token_grid

HOOK = "wantrim_profile"


def model_fingerprint(model: WanTransformer3DModel) -> Fingerprint:
    """Sizes of a transformer, and the sample of its modulation tables."""
    c = model.config
    tables = [block.scale_shift_table for block in model.blocks]
    return Fingerprint(
        dim=c.num_attention_heads * c.attention_head_dim,
        ffn_dim=c.ffn_dim,
        num_blocks=len(model.blocks),
        num_heads=c.num_attention_heads,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        sample=sample_modulation([*tables, model.scale_shift_table]),
    )


@contextmanager
def profile_run(
    model: WanTransformer3DModel,
    *,
    cond_or_uncond: Sequence[int] = (COND,),
    shift: float | None = None,
    calibrate: str = "none",
) -> Iterator[Recorder]:
    """Record everything that is sampled within the context.

    Args:
        cond_or_uncond: COND or UNCOND for each chunk of a batch, in order; one chunk when the two
            come in separate calls, as in WanPipeline. Then the first call of a step is recorded.
        shift: the scheduler's flow shift, to be named in the profile.
        calibrate: name in `profiles.calibration.CALIBRATE`.

    Raises:
        ValueError: the model is not a WanTransformer3DModel, or unknown `calibrate`.
    """
    if type(model) is not WanTransformer3DModel:
        raise ValueError(
            f"model: expected diffusers' WanTransformer3DModel, got {type(model).__name__}: "
            "WanTrim cannot record it"
        )
    recorder = Recorder(
        model_fingerprint(model),
        image=model.config.added_kv_proj_dim is not None,
        calibrate=calibrate,
        about={} if shift is None else {"shift": shift},
    )
    run = _Run(recorder, tuple(cond_or_uncond))
    hooks = [(model, _ModelHook(run))]
    hooks += [(block, BlockHook(run.block, index)) for index, block in enumerate(model.blocks)]
    registries = []
    try:
        for module, hook in hooks:
            registry = HookRegistry.check_if_exists_or_initialize(module)
            registry.register_hook(hook, HOOK)
            registries.append(registry)
        yield recorder
    finally:
        for registry in registries:
            registry.remove_hook(HOOK, recurse=False)


class _Run:
    def __init__(self, recorder: Recorder, cond_or_uncond: tuple[int, ...]):
        self.recorder, self.cond_or_uncond = recorder, cond_or_uncond
        self.call: CallRecord | None = None
        # sigma and input of the last call: the same again is another prompt of that step
        self._last: tuple[float, torch.Tensor] | None = None

    def begin(self, module, hidden_states: torch.Tensor, timestep: torch.Tensor) -> None:
        # per-token timesteps (TI2V) are 0 where the latent is given
        sigma = float(timestep.max()) / 1000
        last = self._last
        if (
            len(self.cond_or_uncond) == 1
            and last is not None
            and last[0] == sigma
            and last[1].shape == hidden_states.shape
            and torch.equal(last[1], hidden_states)
        ):
            return
        self._last = sigma, hidden_states.detach().clone()
        self.call = self.recorder.begin(
            sigma=sigma,
            grid=token_grid(module, hidden_states),
            cond_or_uncond=self.cond_or_uncond,
            batch=len(hidden_states),
        )

    @torch.compiler.disable
    def block(self, index: int, block: Block) -> torch.Tensor:
        if self.call is None:
            return block.run(block.hidden)
        record = self.call.block(index, block.hidden, block.hidden.shape[1])
        with BlockWatch(record), AttentionTap(record.attention):
            out = block.run(block.hidden)
        record.done()
        return out

    def finish(self, module) -> None:
        if self.call is None:
            return
        self.call.finish()
        if self.recorder.calls and self.call.like is not None:
            layers = [
                Projections(
                    block.attn1.to_out[0],
                    block.attn2.to_out[0],
                    block.ffn.net[0].proj,
                    block.ffn.net[2],
                )
                for block in module.blocks
            ]
            self.recorder.measure_weights(layers, self.call.like)


class _ModelHook(ModelHook):
    def __init__(self, run: _Run):
        super().__init__()
        self.run = run

    def new_forward(self, module, hidden_states, timestep, *args, **kwargs):
        self.run.begin(module, hidden_states, timestep)
        try:
            out = self.fn_ref.original_forward(hidden_states, timestep, *args, **kwargs)
            self.run.finish(module)
            return out
        finally:
            self.run.call = None
