"""A velocity that is not computed goes on as it changed last, by less with every step (ours).

Repeating a velocity is a forecast of no change. Along a path without noise its changes go on: each is
about the one before it times a factor, the persistence, which the run measures on itself where it
computes three steps: an autoregressive process of first order.
"""

from __future__ import annotations

import torch

# as long as it shrinks at all, there is an end to it
MOST = 0.98


def persistence(foretold: torch.Tensor, came: torch.Tensor) -> torch.Tensor:
    """Of a change like the one before, how much came: the least squares fit, 0 to MOST.

    Args:
        foretold, came: changes of the velocity [b, ...] over the same part of the way.

    Returns:
        [b, 1, ...], one for each sample; 0 where nothing was foretold.
    """
    axes = tuple(range(1, came.ndim))
    along = (foretold.float() * came.float()).sum(axes, keepdim=True)
    size = foretold.float().square().sum(axes, keepdim=True)
    found = along / size.clamp(min=torch.finfo(torch.float32).tiny)
    return found.nan_to_num(0.0).clamp(0.0, MOST)


def carried(persistence: torch.Tensor, ahead: torch.Tensor) -> torch.Tensor:
    """How many of its last changes a velocity is ahead: the sum of the powers of the persistence.

    Args:
        ahead: how far, in lengths of the last change, 0 or more; need not be whole.
    """
    return persistence * (1.0 - persistence ** ahead.clamp(min=0.0)) / (1.0 - persistence)
