"""A plain Euler flow sampler with guidance, for the demo, the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def sigmas_for(steps: int, shift: float) -> torch.Tensor:
    """Descending sigmas [steps + 1] from 1 to 0 with the flow shift that Wan's samplers use."""
    u = torch.linspace(1, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


@torch.no_grad()
def denoise(
    model,
    text: torch.Tensor,
    size: tuple[int, int, int],
    *,
    steps: int = 30,
    guidance: float = 4.0,
    shift: float = 3.0,
    seed: int = 0,
    condition: torch.Tensor | None = None,
    negative: torch.Tensor | None = None,
    model_kwargs: dict[str, torch.Tensor] | None = None,
    device: torch.device | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the latents [b, out_channels, f, h, w] (fp32) after every step.

    Conditional and unconditional rows go through the model in one batch, in this order.

    Args:
        text: embeddings [b, tokens, text_dim].
        size: latent (f, h, w).
        condition: Wan's image condition [b, out_channels + 4, f, h, w], or None for text-to-video.
        negative: the unconditional text [tokens, text_dim] or [b, tokens, text_dim]; None is all
            zeros, as the tiny Wan was trained.
        model_kwargs: further tensors [b, ...] of the model's forward, the same for both prompts.
        device: that the model computes on; None is where its weights are.
    """
    batch, channels = len(text), model.config.out_channels
    device = device or next(model.parameters()).device
    text = text.to(device)
    random = torch.Generator().manual_seed(seed)
    # drawn on the CPU, so that a seed is the same video on every device
    x = torch.randn((batch, channels, *size), generator=random).to(device)
    extra = model.config.in_channels - channels
    if extra:
        condition = x.new_zeros(batch, extra, *size) if condition is None else condition.to(device)
    sigmas = sigmas_for(steps, shift).to(device)
    negative = torch.zeros_like(text) if negative is None else negative.to(text)
    both = torch.cat([text, negative.expand_as(text)]) if guidance != 1 else text
    repeat = len(both) // batch
    extras = {
        name: value.to(device).repeat(repeat, *[1] * (value.ndim - 1))
        for name, value in (model_kwargs or {}).items()
    }
    for index in range(steps):
        model_input = torch.cat([x, condition], 1) if extra else x
        model_input = model_input.repeat(repeat, 1, 1, 1, 1)
        timestep = (sigmas[index] * 1000).expand(len(both))
        # step caches of diffusers keep their state by context
        with model.cache_context("both", step_index=index, sigma=float(sigmas[index])):
            velocity = model(model_input.to(both), timestep, both, return_dict=False, **extras)[0]
        velocity = velocity.float()
        if repeat == 2:
            cond, uncond = velocity.chunk(2)
            velocity = uncond + guidance * (cond - uncond)
        x = x + (sigmas[index + 1] - sigmas[index]) * velocity
        yield x


def sample(model, text: torch.Tensor, size: tuple[int, int, int], **options) -> torch.Tensor:
    """The latents after the last step; options as for `denoise`."""
    *_, latents = denoise(model, text, size, **options)
    return latents
