"""Hooks on diffusers' Wan for one video, as step caches and other peers need them.

Every peer is a context manager `name(model, *, steps, shift, **knobs)`. One video of `steps` model
calls is sampled within; leaving it, by an exception too, takes every hook off. The model gets one
row, or the conditional and then the unconditional row. `shift` is the flow shift of the run, as for
our own plans; none of the peers looks at it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.modeling_outputs import Transformer2DModelOutput


class OneVideo(ModelHook):
    """The outermost hook of every peer: counts the model calls, and knows the timestep."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps, self.calls = steps, 0
        self.timestep: float | None = None

    def pre_forward(self, module, hidden_states, timestep, *args, **kwargs):
        if len(hidden_states) > 2:
            raise ValueError(
                "expected one row or two (conditional, unconditional), got a batch of "
                f"{len(hidden_states)}: sample one video at a time"
            )
        if self.calls == self.steps:
            raise RuntimeError(
                f"expected one video of {self.steps} steps, got a further model call: enter the "
                "method anew for every video, with its number of steps"
            )
        self.calls += 1
        self.timestep = float(timestep.max())
        return (hidden_states, timestep, *args), kwargs


@contextmanager
def one_video(
    model: WanTransformer3DModel, video: OneVideo, *hooks: tuple[torch.nn.Module, ModelHook]
) -> Iterator[None]:
    """Put hooks on modules, in this order from the inside out, for one video.

    Raises:
        RuntimeError: the video had fewer steps than were announced, or more.
    """
    with ExitStack() as stack:
        for module, hook in (*hooks, (model, video)):
            registry = HookRegistry.check_if_exists_or_initialize(module)
            # peers may be entered within one another
            name = f"wantrim_peer_{len(registry.hooks)}"
            registry.register_hook(hook, name)
            stack.callback(registry.remove_hook, name, recurse=False)
        yield
    if video.calls != video.steps:
        raise RuntimeError(
            f"expected one video of {video.steps} steps, got {video.calls} model calls"
        )


def a_fifth(steps: int) -> int:
    """The first steps that a cache computes in any case: a fifth, as most papers have it."""
    return max(1, round(steps / 5))


def packed(out: torch.Tensor, kwargs: dict):
    """The model's output in the shape that the keywords of its call ask for."""
    as_tuple = kwargs.get("return_dict") is False
    return (out,) if as_tuple else Transformer2DModelOutput(sample=out)
