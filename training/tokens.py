"""Training with dropped tokens, as TAPE drops them in sampling (ours; neither paper does it)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from torch import nn

from ..engine.plan import TrimPlan
from ..hosts.diffusers.attach import attach
from ..methods.tokens import paper_plan
from .recipe import Stage, Tokens


@dataclass(frozen=True)
class TokenStep:
    """One step of a sampling run.

    Args:
        keep_ratio: mean share of the tokens that stays.
        at: place of the step, 1 at pure noise.
    """

    keep_ratio: float
    at: float


def token_step(random: np.random.Generator, tokens: Tokens) -> TokenStep:
    """Draw a step of a run."""
    keep_ratio = float(random.uniform(tokens.keep_min, tokens.keep_max))
    return TokenStep(keep_ratio, float(random.uniform()))


def trimmed(student: nn.Module, stage: Stage, step: TokenStep | None) -> AbstractContextManager:
    """Within the context the student runs on some of its tokens."""
    if step is None:
        return nullcontext()
    plan = TrimPlan(tokens=paper_plan(step.keep_ratio))
    return attach(student, plan, shift=stage.shift)
