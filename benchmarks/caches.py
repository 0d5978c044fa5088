"""Step caches on diffusers' Wan, written from their papers. The form is that of `baselines`.

All compute or reuse both rows together; EasyCache and TeaCache decide from the conditional row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import ModelHook

from .baselines import OneVideo, a_fifth, one_video, packed


class _Budget:
    """Reuses steps while the accumulated change stays under a threshold.

    The first `warmup` steps and the last are computed, and a computed step empties the account.
    """

    def __init__(self, threshold: float, steps: int, warmup: int):
        self.threshold, self.steps, self.warmup = threshold, steps, warmup
        self.step, self.spent = 0, 0.0

    def reuse(self, change: float | None) -> bool:
        """Whether to reuse the next step, of a relative change; None if that is not known yet."""
        inside = self.warmup <= self.step < self.steps - 1
        self.step += 1
        if inside and change is not None:
            self.spent += change
            if self.spent < self.threshold:
                return True
        self.spent = 0.0
        return False


def _mean(tensor: torch.Tensor) -> float:
    return tensor.abs().mean().item()


class _EasyHook(ModelHook):
    def __init__(self, budget: _Budget):
        super().__init__()
        self.budget = budget
        self.last_input = self.rate = None
        # input and output of the last computed step, and what it added to its input
        self.input = self.output = self.added = None

    def new_forward(self, module, hidden_states, *args, **kwargs):
        noise = hidden_states[:, : module.config.out_channels]
        change = None
        if self.rate is not None:
            moved = _mean(noise[0] - self.last_input[0])
            change = self.rate * moved / _mean(self.output[0])
        self.last_input = noise
        if self.budget.reuse(change):
            out = noise + self.added
        else:
            forward = self.fn_ref.original_forward
            out = forward(hidden_states, *args, **{**kwargs, "return_dict": False})[0]
            if self.output is not None:
                self.rate = _mean(out[0] - self.output[0]) / _mean(noise[0] - self.input[0])
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
) -> Iterator[None]:
    """EasyCache (arXiv 2507.02860): reuses what the model added to its input.

    The change of the output is estimated as k * |x_t - x_(t-1)| / |v|, with v the last computed
    output and k the ratio of the output's change to the input's over the last two computed steps.

    Args:
        threshold: tau, accumulated estimate below which steps are reused; 0 computes all.
        warmup: first steps that are computed; None is a fifth of them (paper: 10 of 50).
    """
    budget = _Budget(threshold, steps, a_fifth(steps) if warmup is None else warmup)
    with one_video(model, OneVideo(steps), (model, _EasyHook(budget))):
        yield


class _Reused(Exception):
    """The first block was left, because the step is reused."""


class _TeaState:
    """What TeaCache's hooks share."""

    def __init__(self, budget: _Budget):
        self.budget = budget
        self.reusing = False
        # modulated input of the step before, input and residual of the stack at the last computed
        self.modulated = self.input = self.residual = None


class _TeaModulated(ModelHook):
    """On the first block's self-attention, whose input is the modulated one."""

    def __init__(self, state: _TeaState):
        super().__init__()
        self.state = state

    def pre_forward(self, module, hidden_states, *args, **kwargs):
        state, modulated = self.state, hidden_states[0]
        change = None
        if state.residual is not None:
            change = _mean(modulated - state.modulated) / _mean(state.modulated)
        state.modulated = modulated
        if state.budget.reuse(change):
            raise _Reused
        return (hidden_states, *args), kwargs


class _TeaBlock(ModelHook):
    def __init__(self, state: _TeaState, first: bool, last: bool):
        super().__init__()
        self.state, self.first, self.last = state, first, last

    def new_forward(self, module, hidden_states, *args):
        state = self.state
        if self.first:
            state.input, state.reusing = hidden_states, False
        elif state.reusing:
            return hidden_states
        try:
            out = self.fn_ref.original_forward(hidden_states, *args)
        except _Reused:
            state.reusing = True
            return hidden_states + state.residual
        if self.last:
            state.residual = out - state.input
        return out


@contextmanager
def teacache(
    model: WanTransformer3DModel,
    *,
    steps: int,
    shift: float,
    threshold: float,
    warmup: int = 1,
) -> Iterator[None]:
    """TeaCache (arXiv 2411.19108) without a fitted polynomial: reuses the residual of all blocks.

    The change is the relative L1 change of the first block's modulated input, as it is; the paper
    fits a polynomial to each model to turn it into a change of the output.

    Args:
        threshold: accumulated change below which steps are reused; 0 computes all.
        warmup: first steps that are computed.
    """
    state = _TeaState(_Budget(threshold, steps, warmup))
    final = len(model.blocks) - 1
    hooks = [
        (block, _TeaBlock(state, index == 0, index == final))
        for index, block in enumerate(model.blocks)
    ]
    with one_video(model, OneVideo(steps), (model.blocks[0].attn1, _TeaModulated(state)), *hooks):
        yield


class _ZeusHook(ModelHook):
    def __init__(self, computed: list[bool]):
        super().__init__()
        self.computed = computed
        self.step = self.skipped = 0
        # outputs of the last two steps
        self.before = self.last = None

    def new_forward(self, module, *args, **kwargs):
        if self.computed[self.step]:
            forward = self.fn_ref.original_forward
            out, self.skipped = forward(*args, **{**kwargs, "return_dict": False})[0], 0
        else:
            extrapolates = self.skipped % 2 == 0 and self.before is not None
            out = 2 * self.last - self.before if extrapolates else self.last
            self.skipped += 1
        self.step += 1
        self.before, self.last = self.last, out
        return packed(out, kwargs)


@contextmanager
def zeus_like(
    model: WanTransformer3DModel, *, steps: int, shift: float, computed: float
) -> Iterator[None]:
    """After ZEUS (arXiv 2604.01552): skipped steps extrapolate the output, then repeat it, in turn.

    Which steps are computed is set before the run: the first fifth, and of the others as many as
    are still asked for, evenly spread and two or more in a row, since what is extrapolated is the
    difference of two outputs. Extrapolating both rows extrapolates the guided output.

    Args:
        computed: share of the steps that are computed; 1 computes all.
    """
    warmup = a_fifth(steps)
    further = max(0, round(computed * steps) - warmup)
    skipped = steps - warmup - further
    runs = max(1, min(-(-skipped // 2), further // 2))
    pattern = [True] * warmup
    for run in range(runs):
        for does, count in ((False, skipped), (True, further)):
            pattern += [does] * (count * (run + 1) // runs - count * run // runs)
    hook = _ZeusHook(pattern)
    with one_video(model, OneVideo(steps), (model, hook)):
        yield
