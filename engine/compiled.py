"""Keeps torch.compile out of a step's decisions.

A traced decision is right only as long as the compiler's guards notice that the step changed; a
model compiled with its guards filtered would repeat the first step's. So our code stays outside of
every graph. Whole steps run the host's graphs as they are; blocks that leave something out or are
looked into run in graphs of their own (`apart.py`), with all guards, made the way the host's were.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import TypeVar

import torch

Class = TypeVar("Class", bound=type)


def outside_graphs(cls: Class) -> Class:
    """Class decorator: its methods are never traced; what of the host they call still is.

    Methods that are disabled with all that they call stay so.
    """
    for name, value in list(vars(cls).items()):
        if isinstance(value, FunctionType) and not hasattr(value, "__wrapped__"):
            setattr(cls, name, torch.compiler.disable(value, recursive=False))
    return cls


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether torch.compile stands in front of a module."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


# torch 2.6 and later can
CAN_PAUSE = hasattr(torch.compiler, "set_stance")


_paused = threading.local()


@contextmanager
def paused() -> Iterator[None]:
    """While it lasts, compiled modules run as they are written.

    Without guards a compiled module repeats what it did in an earlier run, one that was not trimmed.
    """
    depth = _depth()
    _paused.depth = depth + 1
    try:
        with torch.compiler.set_stance("force_eager") if CAN_PAUSE else nullcontext():
            yield
    finally:
        _paused.depth = depth


def resumed() -> AbstractContextManager:
    """Within one `paused`: what is called from here on runs compiled again."""
    if CAN_PAUSE and _depth() == 1:
        return torch.compiler.set_stance("default")
    return nullcontext()


def _depth() -> int:
    return getattr(_paused, "depth", 0)
