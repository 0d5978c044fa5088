"""Muon (Jordan et al., 2024) for many small matrices: those of one shape are one batch.

As torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but in fp32: torch's works in bf16, for
which many CPUs have no instructions, and a matrix at a time.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

# quintic Newton-Schulz iteration, as in torch
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """About the nearest matrices [n, a, b] whose singular values are all one."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised, for two-dimensional parameters."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, members in shapes.items():
                self._step_shape(group, shape, members)

    def _step_shape(self, group: dict, shape: torch.Size, members: list) -> None:
        grads = [parameter.grad for parameter in members]
        for parameter in members:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in members]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
        rate = group["lr"] * 0.2 * max(shape) ** 0.5
        updates = orthogonalise(torch.stack(ahead)).unbind()
        torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(members, updates, alpha=-rate)
