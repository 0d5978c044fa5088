"""What a piece of work launches, moves and allocates, operation by operation. Knows no host.

Bytes are those that an ideal kernel of each operation reads and writes: of an expanded tensor what is
stored, of a gathered one what is taken. Attention itself is not counted, and neither are the scores
that tokens are chosen by: what they read depends on the kernel. Our kernels are one operation each,
as on a GPU.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ...engine import call as calls
from ...engine import context, memory
from ...engine.program import KEPT, Row


@dataclass(frozen=True)
class Traffic:
    """Operations that are no views, bytes read and written, and bytes of new tensors."""

    launches: float = 0
    moved: float = 0
    allocated: float = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.launches + other.launches,
            self.moved + other.moved,
            self.allocated + other.allocated,
        )

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.launches * times, self.moved * times, self.allocated * times)

    def __sub__(self, other: Traffic) -> Traffic:
        return self + other * -1


# take some rows of their first input
TAKING = {"gather", "index_select", "index", "embedding"}
# put some rows into their first input, in place
PUTTING = {"scatter_", "index_copy_", "index_put_", "scatter"}
# allocate and write nothing
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def stored(tensor: torch.Tensor) -> int:
    """Bytes that a tensor's numbers take in memory, those that it repeats once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in sizes if stride or not size)


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.total = Traffic()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if "attention" in name:
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        new = [t for t in outputs if t.untyped_storage().data_ptr() not in known]
        if not new and not func._schema.is_mutable:
            # a view
            return out
        allocated = sum(map(stored, new))
        if name in EMPTY:
            self.total += Traffic(0, 0, allocated)
            return out
        dim = args[1] if name == "index_fill_" else 0
        self.total += Traffic(1, _moved(name, inputs, outputs, dim), allocated)
        return out


def _moved(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor], dim: int = 0) -> int:
    written = sum(map(stored, outputs))
    if name in TAKING:
        return 2 * written + sum(map(stored, inputs[1:]))
    if name in PUTTING:
        # what is put is read, then written
        moved = sum(map(stored, inputs[1:])) + stored(inputs[-1])
        # into a copy
        return moved if name.endswith("_") else moved + 2 * written
    if name == "index_fill_":
        # what is filled
        return stored(inputs[1]) + written // outputs[0].shape[dim] * len(inputs[1])
    read = inputs[1:] if name in ("copy_", "fill_", "zero_") else inputs
    return sum(map(stored, read)) + written


@torch.no_grad()
def count_traffic(work: Callable[[], object]) -> Traffic:
    """What `work()` launches, moves and allocates."""
    with _Counter() as counter:
        work()
    return counter.total


def _kernel(function: Callable, moved: Callable[..., int] | None) -> Callable:
    """A kernel of ours as one operation that moves moved(its result, *arguments) bytes.

    None counts nothing of it. What it hands out as new is allocated by it.
    """

    def run(*args):
        with _disable_current_modes() as modes:
            out = function(*args)
        for counter in modes:
            if isinstance(counter, _Counter) and moved is not None:
                known = {leaf.data_ptr() for leaf in tree_leaves(args) if hasattr(leaf, "data_ptr")}
                new = [one for one in tree_leaves(out) if one is not None]
                allocated = sum(stored(one) for one in new if one.data_ptr() not in known)
                counter.total += Traffic(1, moved(out, *args), allocated)
        return out

    return run


def _stored_rows(held, k, v, bits, into=None, index=None) -> int:
    taken = 0 if index is None else stored(index)
    return taken + stored(k) + stored(v) + _rows(held, k.shape[1])


def _joined_rows(_, k, v, held, index, bits, out) -> int:
    return sum(map(stored, (k, v, index, *out))) + _rows(held, index.shape[1])


def _rows(held, tokens: int) -> int:
    return sum(stored(part) // part.shape[1] * tokens for part in held)


# where they are called, and what they move
KERNELS = (
    (context, "store_rows", _stored_rows),
    (memory, "join_rows", _joined_rows),
    (calls, "attention_received", None),
)


@contextmanager
def _kernels_counted() -> Iterator[None]:
    known = [getattr(module, name) for module, name, _ in KERNELS]
    for (module, name, moved), function in zip(KERNELS, known, strict=True):
        setattr(module, name, _kernel(function, moved))
    try:
        yield
    finally:
        for (module, name, _), function in zip(KERNELS, known, strict=True):
            setattr(module, name, function)


@contextmanager
def watch_blocks(engine) -> Iterator[list[tuple[Row, Traffic]]]:
    """What each block costs beside its own work within the context, with its row.

    Its own work is that of the host's block alone, on the tokens that it was given; of a skipped one
    there is none.

    Args:
        engine: of any host.
    """
    found: list[tuple[Row, Traffic]] = []
    begin = engine.begin

    def watched(**facts):
        call = begin(**facts)
        block = call.block

        def run(index: int, host):
            given = _Given(host)
            results = []
            total = count_traffic(lambda: results.append(block(index, given)))
            own = Traffic()
            if given.ran is not None:
                own = count_traffic(lambda: host.run(*given.ran, None))
            found.append((call.rows[index], total - own))
            return results[0]

        call.block = run
        return call

    engine.begin = watched
    try:
        with _kernels_counted():
            yield found
    finally:
        del engine.begin


def in_states(found: list[tuple[Row, Traffic]], state: int) -> list[Traffic]:
    """What `watch_blocks` saw of the trimmed blocks, bytes in hidden states.

    Args:
        state: bytes of the hidden state of all tokens.
    """
    return [
        Traffic(cost.launches, cost.moved / state, cost.allocated / state)
        for row, cost in found
        if row.run == KEPT or row.heads
    ]


class _Given:
    """A host's block that keeps what it is given."""

    def __init__(self, host):
        self._host, self.hidden, self.ran = host, host.hidden, None
        self.movable = host.movable

    def run(self, hidden, places, attend):
        self.ran = hidden, places
        return self._host.run(hidden, places, attend)


@contextmanager
def no_collection():
    """A garbage collection is nobody's forward."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that `work` held at once beyond what there was before, in bytes.

    On a GPU what the allocator saw; on the CPU what torch's profiler saw of its allocator.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    # what a collection frees meanwhile is not this work's
    with (
        no_collection(),
        torch.profiler.profile(activities=activities, profile_memory=True) as seen,
    ):
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
