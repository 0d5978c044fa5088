"""A velocity that is not computed goes on as it changed last, by less with every step (ours).

Repeating a velocity is a forecast of no change. Along a path without noise its changes go on: each is
about the one before it times a factor, the persistence, which the run measures on itself where it
computes three steps: an autoregressive process of first order. What a sampler's way from one step to
the next is made of says in which mix of the prompts they are seen.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def explain(
    path: torch.Tensor, ways: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """How many times each way there is in a path (least squares), and the rest of it, all [...].

    Ways that are none, or lead nowhere new, have no part. Nothing is read from the device.
    """
    upright, shares, found = [], [], []
    for way in ways:
        before = []
        for past in upright:
            before.append(_share_along(way, past))
            way = way - past * before[-1]
        found.append(_share_along(path, way))
        path = path - way * found[-1]
        upright.append(way)
        shares.append(before)
    # what a later way has of an earlier one is taken from that
    for late in range(len(found) - 1, 0, -1):
        for early in range(late):
            found[early] = found[early] - found[late] * shares[late][early]
    return found, path


def _share_along(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many times b [...] there is of it in a [...]."""
    return (a * b).sum() / b.square().sum().clamp(min=1e-12)
