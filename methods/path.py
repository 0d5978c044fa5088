"""What a sampler's way from one step to the next is made of (ours)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
