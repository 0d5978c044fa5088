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
) -> Iterator[torch.Tensor]:
    """Yield the latents [b, out_channels, f, h, w] (fp32) after every step.

    Conditional and unconditional rows go through the model in one batch, in this order.

    Args:
        text: embeddings [b, tokens, text_dim]; the unconditional text is all zeros.
        size: latent (f, h, w).
        condition: Wan's image condition [b, out_channels + 4, f, h, w], or None for text-to-video.
    """
    batch, channels = len(text), model.config.out_channels
    device = next(model.parameters()).device
    text = text.to(device)
    random = torch.Generator().manual_seed(seed)
    # drawn on the CPU, so that a seed is the same video on every device
    x = torch.randn((batch, channels, *size), generator=random).to(device)
    extra = model.config.in_channels - channels
    if extra:
        condition = x.new_zeros(batch, extra, *size) if condition is None else condition.to(device)
    sigmas = sigmas_for(steps, shift).to(device)
    both = torch.cat([text, torch.zeros_like(text)]) if guidance != 1 else text
    repeat = len(both) // batch
    for index in range(steps):
        model_input = torch.cat([x, condition], 1) if extra else x
        model_input = model_input.repeat(repeat, 1, 1, 1, 1)
        timestep = (sigmas[index] * 1000).expand(len(both))
        velocity = model(model_input, timestep, both, return_dict=False)[0]
        if repeat == 2:
            cond, uncond = velocity.chunk(2)
            velocity = uncond + guidance * (cond - uncond)
        x = x + (sigmas[index + 1] - sigmas[index]) * velocity
        yield x


def sample(model, text: torch.Tensor, size: tuple[int, int, int], **options) -> torch.Tensor:
    """The latents after the last step; options as for `denoise`."""
    *_, latents = denoise(model, text, size, **options)
    return latents
