"""Training with dropped tokens, as the pack drops them in sampling (ours; neither paper does it)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..engine.plan import TrimPlan
from ..hosts.diffusers.attach import attach
from ..methods.presets import preset_plan
from .draws import shifted
from .recipe import Stage, Tokens
from .shards import Batch

if TYPE_CHECKING:
    from .objectives import Pair

# numbers of steps of the sampling runs that training takes a step of
RUNS = (4, 20)
# steps before it that matter: the last update, and how much the velocity changes
PAST = 2


@dataclass(frozen=True)
class TokenSteps:
    """One step of a sampling run, with those before it.

    Args:
        keep_ratio: share of the tokens that stays.
        at: place of the step, 1 at pure noise.
        before: places of the steps before it that matter, in order.
    """

    keep_ratio: float
    preset: str
    at: float
    before: tuple[float, ...]


def token_steps(random: np.random.Generator, tokens: Tokens) -> TokenSteps:
    """Draw a step of a run of any length within RUNS."""
    keep_ratio = float(random.uniform(tokens.keep_min, tokens.keep_max))
    steps = int(random.integers(RUNS[0], RUNS[1] + 1))
    at = float(random.uniform())
    places = [at + back / steps for back in range(PAST, 0, -1)]
    return TokenSteps(keep_ratio, tokens.preset, at, tuple(p for p in places if p <= 1))


def past_points(
    pair: Pair, stage: Stage, batch: Batch, x: torch.Tensor, velocity: torch.Tensor, run: TokenSteps
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Latents and sigmas [b] of the steps before the one at x, in order.

    Back along the teacher's path: on the straight one from noise to data the velocity would never
    change, and tokens are chosen by how it does.

    Args:
        velocity: the teacher's at x.
    """
    points, now = [], _sigma(run.at, stage, x)
    for place in reversed(run.before):
        if points:
            velocity = pair.teach(x, now, batch)
        sigma = _sigma(place, stage, x)
        x = x + (sigma - now).view(-1, 1, 1, 1, 1) * velocity
        points.insert(0, (x, sigma))
        now = sigma
    return points


def _sigma(place: float, stage: Stage, like: torch.Tensor) -> torch.Tensor:
    return shifted(torch.full((len(like),), place), stage.shift).to(like)


@contextmanager
def trimmed(
    pair: Pair,
    stage: Stage,
    batch: Batch,
    x: torch.Tensor,
    velocity: torch.Tensor,
    run: TokenSteps | None,
) -> Iterator[None]:
    """Within the context the student runs on some of its tokens, its past already sampled.

    A step that has none before it computes all its tokens, as in sampling. Under the preset
    "paper" dropped tokens are restored from nothing, so the steps before are not taken.
    """
    if run is None:
        yield
        return
    plan = TrimPlan(tokens=preset_plan(run.preset, run.keep_ratio))
    with attach(pair.student, plan, shift=stage.shift):
        if plan.trims_tokens and plan.tokens.remembers:
            with torch.no_grad():
                for latents, sigma in past_points(pair, stage, batch, x, velocity, run):
                    pair.ask(latents, sigma, batch)
        yield
