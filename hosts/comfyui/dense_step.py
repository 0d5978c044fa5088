"""Times a step of the untouched model, on random input of the sizes of a run's first step.

A run in which every step is trimmed has nothing to compare its seconds with. Only sizes are kept of
its model calls, and the model is called bare: other nodes' patches are not in the figure, but for an
attention override.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

import comfy.model_management

from .blocks import OVERRIDE

# where on the way from 1 to 0 the step lies; its cost does not depend on it
SIGMA = 0.5


class Unmeasurable(Exception):
    """A model call that cannot be made again from its sizes; says why."""


@dataclass(frozen=True)
class _Size:
    shape: tuple[int, ...]
    dtype: torch.dtype

    def fill(self, device: torch.device) -> torch.Tensor:
        if self.dtype.is_floating_point:
            return torch.rand(self.shape, device=device).to(self.dtype)
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def call_sizes(arguments: dict) -> dict:
    """The arguments of BaseModel.apply_model with sizes in place of tensors.

    Raises:
        Unmeasurable: there is something else among them.
    """
    return {name: _without_numbers(name, value) for name, value in arguments.items()}


def _without_numbers(name: str, value):
    if isinstance(value, torch.Tensor):
        return _Size(tuple(value.shape), value.dtype)
    if isinstance(value, list | tuple):
        return [_without_numbers(name, one) for one in value]
    if value is None or isinstance(value, int | float | str):
        return value
    raise Unmeasurable(f"the model was given a {type(value).__name__} as '{name}'")


def _filled(value, device: torch.device):
    if isinstance(value, _Size):
        return value.fill(device)
    return [_filled(one, device) for one in value] if isinstance(value, list) else value


def time_dense_step(model, calls: list[dict]) -> float:
    """Seconds of one step of a MODEL without any patch, after one that warms up.

    Args:
        calls: of the step, as `call_sizes` gives them.
    """
    most = max(model.model.memory_required(list(call["x"].shape)) for call in calls)
    comfy.model_management.load_models_gpu([model], memory_required=most)
    override = model.model_options["transformer_options"].get(OVERRIDE)
    options = {} if override is None else {OVERRIDE: override}
    _step(model, calls, options)
    began = time.perf_counter()
    _step(model, calls, options)
    return time.perf_counter() - began


def _step(model, calls: list[dict], options: dict) -> None:
    device = model.load_device
    for call in calls:
        given = {name: _filled(value, device) for name, value in call.items()}
        given["t"] = torch.full_like(given["t"], SIGMA)
        own = {
            **options,
            "sigmas": given["t"][:1],
            "sample_sigmas": given["t"].new_tensor([SIGMA, 0]),
        }
        out = model.model.apply_model(**given, transformer_options=own)
        # waits for the device
        float(out.flatten()[0])
