"""Tensors between poisoned margins: the interpreter reads and writes out of bounds without a word."""

from __future__ import annotations

import torch

MARGIN = 4096


class Guard:
    """Copies with margins of NaN, or of huge integers; `check` looks whether they still are."""

    def __init__(self):
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` with its strides, in the middle of poisoned memory."""
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        whole = torch.empty(span + 2 * MARGIN, dtype=tensor.dtype)
        whole.fill_(self._poison(tensor.dtype))
        inside = whole[MARGIN : MARGIN + span].as_strided(tensor.shape, tensor.stride())
        inside.copy_(tensor)
        used = torch.zeros(len(whole), dtype=torch.bool)
        used[MARGIN : MARGIN + span].as_strided(tensor.shape, tensor.stride()).fill_(True)
        self._held.append((whole, used))
        return inside

    def check(self) -> None:
        """Fail when anything but the tensors themselves was written."""
        for whole, used in self._held:
            margin = whole[~used]
            poison = self._poison(whole.dtype)
            clean = margin.isnan() if margin.is_floating_point() else margin == poison
            assert clean.all(), "written outside of a tensor"

    @staticmethod
    def _poison(dtype: torch.dtype) -> float | int:
        return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max // 3
