"""PARE's stage III: few steps by Self-Forcing's idea (arXiv 2506.08009).

The student is rolled out on its own samples, as it will sample, and what it makes is compared with
what the teacher would make by distribution matching (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867):
a trained critic knows the student's distribution, the guided teacher the wanted one, and their
difference at a noisy version of the sample says where the sample has to go. Videos are not needed:
a batch gives texts, conditions and sizes.

Ours, where Wan is not the autoregressive model of the paper: the whole video is one rollout, and
the sampler is Euler's, as ComfyUI's and the bench's, which gives the next step the student's own
noise and not a new one.
"""

from __future__ import annotations

import torch

from ..hosts.diffusers.sample import sigmas_for
from .draws import Draws, noisy, shifted
from .losses import velocity_loss
from .pair import Pair
from .recipe import Stage
from .shards import Batch

# noise levels at which samples are compared: the ends say nothing (DMD)
LEVELS = (0.02, 0.98)


def self_forcing(pair: Pair, stage: Stage, batch: Batch, draws: Draws) -> dict[str, torch.Tensor]:
    """The critic's loss and, in every `critic_updates`-th step, the student's; "loss" is their sum.

    One backward pass does for both: neither's gradient reaches the other. The student's turn comes
    first, so that every saved step has the whole optimizer's state.
    """
    turn = draws.step % stage.critic_updates == 0
    made = rollout(pair, stage, batch, draws, turn)
    terms = {}
    if turn:
        terms["match"] = distribution_loss(pair, stage, batch, draws, made).mean()
    made = made.detach()
    noise = draws.noise(made.shape, 2).to(made)
    sigma = _level(stage, draws, len(made), 2).to(made)
    told = pair.criticise(noisy(made, noise, sigma), sigma, batch)
    terms["critic"] = velocity_loss(told, noise - made).mean()
    if pair.routing is not None:
        terms["active"] = pair.taps.gate.active
    return {"loss": terms["critic"] + terms.get("match", 0.0), **terms}


def rollout(pair: Pair, stage: Stage, batch: Batch, draws: Draws, learns: bool) -> torch.Tensor:
    """What the student makes of pure noise: its clean latents [b, c, f, h, w] at a random step.

    The steps before run on its own samples and without gradients (Self-Forcing's stochastic
    truncation); the same step for the whole batch.

    Args:
        learns: the last of them keeps its gradient.
    """
    ends = sigmas_for(stage.sampler_steps, stage.shift)
    last = int(draws.shared.integers(stage.sampler_steps))
    x = draws.noise(batch.latents.shape).to(batch.latents)
    for step in range(last + 1):
        sigma = ends[step].expand(len(x)).to(x)
        with torch.set_grad_enabled(learns and step == last):
            velocity = pair.ask(x, sigma, batch)
        if step < last:
            x = x + (ends[step + 1] - ends[step]).to(x) * velocity
    return x - ends[last].to(x) * velocity


def distribution_loss(
    pair: Pair, stage: Stage, batch: Batch, draws: Draws, made: torch.Tensor
) -> torch.Tensor:
    """A loss whose gradient moves samples from the critic's towards the teacher's: [b].

    Its gradient to a sample is what critic and guided teacher disagree about when they see a noisy
    version of it, over how far the teacher's answer is from the sample (DMD2).
    """
    own = made.detach()
    noise = draws.noise(own.shape, 1).to(own)
    sigma = _level(stage, draws, len(own), 1).to(own)
    x = noisy(own, noise, sigma)
    s = sigma.view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        fake = x - s * pair.criticise(x, sigma, batch)
        real = x - s * pair.teach(x, sigma, batch, stage.guidance)
        away = (own - real).abs().mean((1, 2, 3, 4), keepdim=True)
        wanted = own - (fake - real) / away.clamp(min=1e-6)
    return 0.5 * velocity_loss(made, wanted)


def _level(stage: Stage, draws: Draws, count: int, use: int) -> torch.Tensor:
    low, high = LEVELS
    return shifted(low + (high - low) * draws.uniform(count, use), stage.shift)
