"""diffusers' own caches on its Wan. The form is that of `one_video`.

They look at the conditional and the unconditional row together, and treat both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    ModelHook,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
)

from ...hosts.diffusers.one_video import OneVideo, one_video


@contextmanager
def _diffusers_cache(model, video: OneVideo, config, *hooks) -> Iterator[None]:
    model.enable_cache(config)
    try:
        with one_video(model, video, *hooks):
            yield
    finally:
        model.disable_cache()


@contextmanager
def first_block_cache(
    model: WanTransformer3DModel, *, steps: int, shift: float, threshold: float
) -> Iterator[None]:
    """diffusers' FirstBlockCache: the change of the first block's residual decides.

    Args:
        threshold: relative change since the last computed step up to which the other blocks'
            residual is reused; 0 computes all.
    """
    with _diffusers_cache(model, OneVideo(steps), FirstBlockCacheConfig(threshold)):
        yield


@torch.no_grad()
def calibrate_mag_ratios(
    model: WanTransformer3DModel, samples: Iterable[Callable[[], object]], *, steps: int
) -> list[float]:
    """The magnitude ratios [steps] that `mag_cache` needs, as means over dense videos.

    A ratio is the token-wise norm of the residual of all blocks over that of the step before,
    averaged over tokens and rows (MagCache, arXiv 2506.09045); the first is 1.

    Args:
        samples: each samples one video of `steps` steps with the model as it is.

    Raises:
        RuntimeError: a sample had another number of steps.
        ValueError: there are no samples.
    """
    entered, norms, rows = [], [], []

    def leave(module, args, out):
        norms.append(torch.linalg.vector_norm((out - entered.pop()).float(), dim=-1))

    with ExitStack() as stack:
        enter = model.blocks[0].register_forward_pre_hook(lambda m, args: entered.append(args[0]))
        stack.callback(enter.remove)
        stack.callback(model.blocks[-1].register_forward_hook(leave).remove)
        for sample in samples:
            norms.clear()
            with one_video(model, OneVideo(steps)):
                sample()
            # diffusers' guard against a residual of zero
            ratios = [(new / (old + 1e-8)).mean().item() for old, new in pairwise(norms)]
            rows.append([1.0, *ratios])
    if not rows:
        raise ValueError("samples: expected at least one video to calibrate on, got none")
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@contextmanager
def mag_cache(
    model: WanTransformer3DModel,
    *,
    steps: int,
    shift: float,
    threshold: float,
    mag_ratios: Sequence[float],
    max_skips: int = 4,
    retention: float = 0.2,
) -> Iterator[None]:
    """diffusers' MagCache (arXiv 2506.09045): calibrated magnitude ratios decide, not the video.

    Args:
        threshold: accumulated error up to which the residual of all blocks is reused.
        mag_ratios: of `calibrate_mag_ratios` with as many steps.
        max_skips: reused steps in a row, at most; MagCache's own for Wan2.1 1.3B.
        retention: share of the steps, at the start, that is always computed.

    Raises:
        ValueError: there is not one ratio for every step.
    """
    if len(mag_ratios) != steps:
        raise ValueError(
            f"mag_ratios: expected {steps}, one per step, got {len(mag_ratios)}; calibrate with "
            "as many steps as the video has"
        )
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=max_skips,
        retention_ratio=retention,
        num_inference_steps=steps,
        mag_ratios=list(mag_ratios),
    )
    with _diffusers_cache(model, OneVideo(steps), config):
        yield


@contextmanager
def pyramid_attention_broadcast(
    model: WanTransformer3DModel,
    *,
    steps: int,
    shift: float,
    self_every: int,
    timesteps: tuple[float, float] = (100, 800),
) -> Iterator[None]:
    """diffusers' Pyramid Attention Broadcast (arXiv 2408.12588): reuses attention outputs.

    Args:
        self_every: steps from one computed attention to the next, of both kinds; 1 computes all.
        timesteps: attention is reused between these timesteps (sigma * 1000).
    """
    video = OneVideo(steps)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=self_every,
        cross_attention_block_skip_range=self_every,
        spatial_attention_timestep_skip_range=timesteps,
        cross_attention_timestep_skip_range=timesteps,
        current_timestep_callback=lambda: video.timestep,
    )
    with _diffusers_cache(model, video, config):
        yield


class _StepCount(ModelHook):
    """Completes the cache context: without the number of steps SeaCache computes all of them."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def pre_forward(self, module, *args, **kwargs):
        manager = module._diffusers_hook.get_hook("sea_cache_root").state_manager
        manager.set_context(replace(manager.context, num_inference_steps=self.steps))
        return args, kwargs


@contextmanager
def sea_cache(
    model: WanTransformer3DModel,
    *,
    steps: int,
    shift: float,
    threshold: float,
    max_skips: int = 0,
    order: int = 1,
) -> Iterator[None]:
    """diffusers' SeaCache (arXiv 2602.18993): TeaCache on spectrally filtered latents.

    Args:
        threshold: accumulated relative change below which the residual of all blocks is reused.
        max_skips: reused steps in a row, at most; 0 leaves it to the threshold.
        order: 0 reuses the last residual, 1 extrapolates the last two.
    """
    channels = model.config.out_channels
    config = SeaCacheConfig(
        threshold=threshold,
        max_consecutive_cached=max_skips,
        residual_order=order,
        # diffusers' own adapter knows only a Wan without image channels
        raw_vision_callback=lambda module, args, kwargs: [args[0][0, :channels]],
    )
    with _diffusers_cache(model, OneVideo(steps), config, (model, _StepCount(steps))):
        yield
