"""EasyCache on diffusers' Wan, written from its paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import ModelHook

from .one_video import OneVideo, a_fifth, one_video, packed


class Budget:
    """Reuses steps while the accumulated change stays under a threshold.

    The first `warmup` steps and the last are computed, and a computed step empties the account.
    """

    def __init__(self, threshold: float, steps: int, warmup: int):
        self.threshold, self.steps, self.warmup = threshold, steps, warmup
        self.spent = 0.0
        # of every step so far
        self.computed: list[bool] = []

    def reuse(self, change: float | None) -> bool:
        """Whether to reuse the next step, of a relative change; None if that is not known yet."""
        inside = self.warmup <= len(self.computed) < self.steps - 1
        if inside and change is not None:
            self.spent += change
        reuses = inside and change is not None and self.spent < self.threshold
        if not reuses:
            self.spent = 0.0
        self.computed.append(not reuses)
        return reuses


def mean(tensor: torch.Tensor) -> float:
    """Mean of the magnitudes."""
    return tensor.abs().mean().item()


class EasyHook(ModelHook):
    """Reuses what the model added to its input, as its budget allows."""

    def __init__(self, budget: Budget):
        super().__init__()
        self.budget = budget
        self.last_input = self.rate = None
        # input and output of the last computed step, and what it added to its input
        self.input = self.output = self.added = None

    def new_forward(self, module, hidden_states, *args, **kwargs):
        noise = hidden_states[:, : module.config.out_channels]
        change = None
        if self.rate is not None:
            moved = mean(noise[0] - self.last_input[0])
            change = self.rate * moved / mean(self.output[0])
        self.last_input = noise
        if self.budget.reuse(change):
            out = noise + self.added
        else:
            forward = self.fn_ref.original_forward
            out = forward(hidden_states, *args, **{**kwargs, "return_dict": False})[0]
            if self.output is not None:
                self.rate = mean(out[0] - self.output[0]) / mean(noise[0] - self.input[0])
            self.input, self.output, self.added = noise, out, out - noise
        return packed(out, kwargs)


@contextmanager
def easycache(
    model: WanTransformer3DModel,
    *,
    steps: int,
    shift: float,
    threshold: float,
    warmup: int | None = None,
) -> Iterator[Budget]:
    """EasyCache (arXiv 2507.02860): reuses what the model added to its input.

    The change of the output is estimated as k * |x_t - x_(t-1)| / |v|, with v the last computed
    output and k the ratio of the output's change to the input's over the last two computed steps.

    Args:
        threshold: tau, accumulated estimate below which steps are reused; 0 computes all.
        warmup: first steps that are computed; None is a fifth of them (paper: 10 of 50).

    Yields:
        The budget, whose `computed` says of every step whether it was.
    """
    budget = Budget(threshold, steps, a_fifth(steps) if warmup is None else warmup)
    with one_video(model, OneVideo(steps), (model, EasyHook(budget))):
        yield budget
