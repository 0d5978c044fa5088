"""The moving average of a student's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


class Average:
    """Exponential moving average of a module's parameters; shards stay where they are.

    Args:
        decay: of one step, smaller in the first ones, which start from nothing.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = module, decay
        self.tensors = {n: p.detach().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        self._reshard()
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self.module.named_parameters():
            self.tensors[name].lerp_(value.detach(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context the module has the averaged weights."""
        self._reshard()
        own = {name: value.detach().clone() for name, value in self.module.named_parameters()}
        self._put(self.tensors)
        try:
            yield
        finally:
            self._put(own)

    def _reshard(self) -> None:
        # after a call without gradients FSDP2 leaves the weights of its root whole
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        self._reshard()
        for name, value in self.module.named_parameters():
            value.copy_(tensors[name])
