"""Floating-point operations of a piece of work, attention included on every device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """FLOPs of one attention from the shapes [b, n, s, d]: scores and weighted sum, no softmax."""
    b, n, s_query, d = query
    return 2 * b * n * s_query * key[2] * (d + value[3])


# torch counts only the kernels of accelerators; a CPU's attention would be free
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs that `work()` computes, 2 for each multiply-add of a matrix product.

    Matrix products, convolutions and attention count; element-wise work does not.
    """
    formulas = {_CPU_ATTENTION: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return counter.get_total_flops()
