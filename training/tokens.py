"""Training with dropped tokens, as the pack drops them in sampling (ours; neither paper does it)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..hosts.diffusers.attach import attach
from ..hosts.plan import TrimPlan
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


@contextmanager
def trimmed(
    pair: Pair, stage: Stage, batch: Batch, noise: torch.Tensor, run: TokenSteps | None
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
                for place in run.before:
                    sigma = shifted(torch.full((len(noise),), place), stage.shift).to(noise)
                    s = sigma.view(-1, 1, 1, 1, 1)
                    pair.ask((1 - s) * batch.latents + s * noise, sigma, batch)
        yield
