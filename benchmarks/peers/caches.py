"""Step caches on diffusers' Wan, written from their papers, beside EasyCache in hosts/diffusers.

The form is that of `one_video`. All compute or reuse both rows together; TeaCache decides from the
conditional row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import WanTransformer3DModel
from diffusers.hooks import ModelHook

from ...hosts.diffusers.easycache import Budget, mean
from ...hosts.diffusers.one_video import OneVideo, a_fifth, one_video, packed


class _Reused(Exception):
    """The first block was left, because the step is reused."""


class _TeaState:
    """What TeaCache's hooks share."""

    def __init__(self, budget: Budget):
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
            change = mean(modulated - state.modulated) / mean(state.modulated)
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
    state = _TeaState(Budget(threshold, steps, warmup))
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
