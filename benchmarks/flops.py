"""Floating-point operations: counted of a piece of work, and computed of whole forwards and runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from ..engine.plan import TrimPlan
from ..engine.program import Program
from ..engine.work import program_work
from ..methods.cost import WanShape, Work, block_work, outside_flops


def attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """FLOPs of one attention from the shapes [b, n, s, d]: scores and weighted sum, no softmax."""
    b, n, s_query, d = query
    return 2 * b * n * s_query * key[2] * (d + value[3])


# torch counts only the kernels of accelerators; a CPU's attention would be free
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FORMULAS = {**flop_registry, _CPU_ATTENTION: shape_wrapper(attention_flops)}


class _Counter(TorchDispatchMode):
    """torch's formulas, as FlopCounterMode applies them, without its counts by module.

    Those double the time of a model as small as the bench's.
    """

    def __init__(self):
        super().__init__()
        self.total = 0
        self._whole: set[object] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and func not in self._whole:
            # in inference mode a composite operation arrives before its parts
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            self._whole.add(func)
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs that `work()` computes, 2 for each multiply-add of a matrix product.

    Matrix products, convolutions and attention count; element-wise work does not.
    """
    with _Counter() as counter:
        work()
    return counter.total


def forward_flops(shape: WanShape, tokens: int, **options) -> int:
    """FLOPs of one forward of one sample, all blocks alike, with the options of `block_work`."""
    each = block_work(shape, tokens, **options).flops
    return outside_flops(shape, tokens) + shape.num_blocks * each


def plan_work(
    shape: WanShape, programs: Sequence[Program], plan: TrimPlan, prompts: int = 2, **options
) -> Work:
    """A whole sampling run of one video, with the options of `program_work`."""
    known: dict[Program, Work] = {}
    for program in programs:
        if program not in known:
            known[program] = program_work(shape, program, plan, prompts, **options)
    return sum((known[program] for program in programs), Work())
