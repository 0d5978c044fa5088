"""Keeps torch.compile out of a step's decisions.

A traced decision is right only as long as the compiler's guards notice that the step changed; a
model compiled with its guards filtered would repeat the first step's. So our code stays outside of
every graph, and the host's block between our frames is compiled as ever.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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


def paused() -> AbstractContextManager:
    """While it lasts, compiled modules run as they are written.

    Without guards a compiled module repeats what it did in an earlier run, one that was not trimmed.
    """
    return torch.compiler.set_stance("force_eager") if CAN_PAUSE else nullcontext()
