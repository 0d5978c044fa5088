"""What each stage asks of the student (PARE, arXiv 2605.27336, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..hosts.diffusers.sample import sigmas_for
from ..methods.schedule import progress_at
from .draws import Draws, noisy, shifted
from .forcing import self_forcing
from .losses import feature_loss, temporal_loss, timestep_weights, velocity_loss
from .pair import Pair
from .recipe import Stage
from .shards import Batch

# the teacher's steps between two of the student's in the stage "steps"
SUBSTEPS = 5


Objective = Callable[[Pair, Stage, Batch, Draws], dict[str, torch.Tensor]]


def distil(pair: Pair, stage: Stage, batch: Batch, draws: Draws) -> dict[str, torch.Tensor]:
    """Stages I and II: the four losses (eq. 13 to 15), as one number each; "loss" is minimised.

    Every sample counts alike, as in the paper, or by w(t) where the stage's `weighting` says so.
    """
    noise = draws.noise(batch.latents.shape).to(batch.latents)
    low, high = (1 - progress_at(s, stage.shift) for s in (stage.sigma_min, stage.sigma_max))
    u = low + (high - low) * draws.uniform(len(noise))
    sigma = shifted(u, stage.shift).to(noise)
    x = noisy(batch.latents, noise, sigma)
    blocks = draws.blocks(len(pair.student.blocks), stage.feature_blocks)
    with pair.teacher_taps.keeping(blocks) as wanted:
        teacher = pair.teach(x, sigma, batch)
    with pair.taps.keeping(blocks) as got:
        student = pair.ask(x, sigma, batch)
    weight = timestep_weights(sigma) if stage.weighting == "log" else 1.0
    terms = {
        "feature": _features(pair, got, wanted),
        "teacher": velocity_loss(student, teacher),
        "data": velocity_loss(student, noise - batch.latents),
        "temporal": temporal_loss(student, teacher),
    }
    return _total(pair, {name: (weight * term).mean() for name, term in terms.items()}, stage)


def _features(
    pair: Pair, got: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """Mean feature loss over the blocks; of a routed student over those that ran, per sample."""
    losses = torch.stack([feature_loss(got[block], wanted[block]) for block in sorted(got)])
    if pair.routing is None:
        return losses.mean(0)
    ran = pair.taps.gate.hard[:, sorted(got)].T.to(losses)
    return (losses * ran).sum(0) / ran.sum(0).clamp(min=1)


def _total(pair: Pair, terms: dict[str, torch.Tensor], stage: Stage) -> dict[str, torch.Tensor]:
    weights = stage.weights
    loss = sum(getattr(weights, name) * term for name, term in terms.items())
    if pair.routing is not None:
        terms = terms | {"active": pair.taps.gate.active}
    return {"loss": loss, **terms}


def few_steps(pair: Pair, stage: Stage, batch: Batch, draws: Draws) -> dict[str, torch.Tensor]:
    """Ours: one step of the student for several guided ones of the teacher.

    Progressive distillation (Salimans and Ho, arXiv 2202.00512) with guidance folded in as Meng et
    al. do (arXiv 2210.03142), its halvings taken at once: a student's step has to end where the
    teacher's SUBSTEPS guided steps over the same stretch end. PARE's own stage III is
    `forcing.self_forcing`; this one needs no critic, and no more memory than stages I and II.
    """
    count, shift = stage.sampler_steps, stage.shift
    ends = sigmas_for(count, shift)
    at = draws.choice(len(batch.latents), count)
    noise = draws.noise(batch.latents.shape).to(batch.latents)
    start, end = ends[at].to(noise), ends[at + 1].to(noise)
    x = noisy(batch.latents, noise, start)
    # equal parts of the sampler's own clock
    fine = sigmas_for(count * SUBSTEPS, shift)
    y, now = x, start
    for step in range(SUBSTEPS):
        after = fine[SUBSTEPS * at + step + 1].to(noise)
        y = y + (after - now).view(-1, 1, 1, 1, 1) * pair.teach(y, now, batch, stage.guidance)
        now = after
    wanted = (y - x) / (end - start).view(-1, 1, 1, 1, 1)
    student = pair.ask(x, start, batch)
    terms = {
        "teacher": velocity_loss(student, wanted).mean(),
        "temporal": temporal_loss(student, wanted).mean(),
    }
    return _total(pair, terms, stage)


OBJECTIVES: dict[str, Objective] = {
    "width": distil,
    "router": distil,
    "self_forcing": self_forcing,
    "steps": few_steps,
}
