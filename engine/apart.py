"""Runs a host's blocks compiled, in graphs of their own, around attention that is decided anew.

An attention call that the engine has a say in is one opaque operation of the graph: what it does is
looked up when it runs, never traced. So a block stays one graph, whatever a step decides.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Protocol

import torch

from .compiled import CAN_PAUSE, paused

# it records what runs, and would replay what an attention call did once
RECORDING = "cudagraphs"
SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? mask, int number, bool merged) -> Tensor"
# one graph cannot be made, or too many were
CANNOT = tuple(
    getattr(torch._dynamo.exc, name)
    for name in ("Unsupported", "FailOnRecompileLimitHit")
    if hasattr(torch._dynamo.exc, name)
)


class Tap(Protocol):
    """Takes over a block's attention calls."""

    def now(self, function: Callable, q, k, v, mask, constants: dict) -> torch.Tensor:
        """What a call to the host's `function` is to give; runs outside of every graph."""


_NOW = threading.local()
# the host's function and constant arguments of every call that was traced
_CALLS: list[tuple[Callable, tuple]] = []


@torch.compiler.assume_constant_result
def _number(function: Callable, constants: tuple) -> int:
    if (function, constants) not in _CALLS:
        _CALLS.append((function, constants))
    return _CALLS.index((function, constants))


def _attend(q, k, v, mask, number, merged):
    function, constants = _CALLS[number]
    # the graph was made for an output of its own, with its numbers in order
    return _NOW.tap.now(function, q, k, v, mask, dict(constants)).contiguous()


def _shape(q, k, v, mask, number, merged):
    return torch.empty_like(q.transpose(1, 2).flatten(2) if merged else q).contiguous()


if CAN_PAUSE:
    # the folder's name is the user's, and another copy of it may be loaded too
    _attend = torch.library.custom_op(
        "wantrim::" + re.sub(r"\W", "_", f"attend_{__name__}"),
        _attend,
        mutates_args=(),
        schema=SCHEMA,
        # CUDA graphs would replay it as it was recorded
        tags=[tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) else [],
    )
    _attend.register_fake(_shape)


def attend_later(
    function: Callable, q, k, v, mask: torch.Tensor | None, constants: tuple, merged: bool
) -> torch.Tensor:
    """In a graph: the attention call that the tap of the moment makes of function(q, k, v).

    Args:
        constants: names and values of what else `function` is given.
        merged: q is [b, n, s, d] and the result [b, s, n * d]; else the result is like q.
    """
    return _attend(q, k, v, mask, _number(function, constants), merged)


@contextmanager
def tapped(tap: Tap | None) -> Iterator[None]:
    """Within the context graphs ask this tap what their attention calls give."""
    _NOW.tap = tap
    try:
        yield
    finally:
        _NOW.tap = None


class Apart:
    """Runs a host's blocks compiled, in graphs that no other compiled code can meet.

    Args:
        backend: as for torch.compile.
        mode, options: of torch.compile too. A filter of guards is left out, and so are CUDA graphs,
            which would replay an attention call as it was recorded.
        dynamic: True for one graph of all lengths; else whole sequences have a graph of their own.
    """

    def __init__(
        self,
        backend: str | Callable = "inductor",
        mode: str | None = None,
        options: dict | None = None,
        dynamic: bool | None = None,
    ):
        own, dynamic = _Own(backend, mode, options or {}), dynamic or None
        self._open = torch.compile(_copy(_run), backend=own, dynamic=dynamic)
        self._closed = torch.compile(_copy(_run), backend=own, dynamic=dynamic, fullgraph=True)
        # why blocks under a tap cannot be one graph
        self.broken: str | None = None

    def __call__(
        self,
        function: Callable,
        *args,
        lengths: Iterable[torch.Tensor] = (),
        tap: Tap | None = None,
        closed: bool = False,
    ):
        """function(*args), compiled.

        Args:
            lengths: tensors whose second dimension is another one in another step.
            tap: of the attention calls in it.
            closed: in one graph or not at all, because behind a break it may enter the host's.
        """
        for tensor in lengths:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        with tapped(tap):
            if not closed:
                return self._open(function, *args)
            if self.broken is None:
                try:
                    return self._closed(function, *args)
                except CANNOT as error:
                    self.broken = str(error).partition("\n")[0]
            with paused():
                return function(*args)


def _run(function, *args):
    return function(*args)


def _copy(function: Callable) -> Callable:
    """The same with code of its own, because torch gives up on code after a few graphs."""
    return FunctionType(function.__code__.replace(), globals())


class _Own:
    """A backend that equals no other, so that graphs made by another are never taken for its own."""

    def __init__(self, backend: str | Callable, mode: str | None, options: dict):
        self._backend = backend
        self._more: dict = {}
        if backend == "inductor":
            options = {name: value for name, value in options.items() if name != "guard_filter_fn"}
            modes = torch._inductor.list_mode_options(mode) if mode else {}
            self._more = {"config_patches": {**modes, **options, "triton.cudagraphs": False}}

    def __call__(self, graph, inputs):
        backend = self._backend
        if isinstance(backend, str):
            backend = torch._dynamo.lookup_backend(backend)
        return backend(graph, inputs, **self._more)
