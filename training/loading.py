"""Weights straight to where they are used: a process reads no more of a file than its own part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch.distributed.tensor import DTensor

from ..hosts.diffusers.checkpoints import make_rope
from ..slim.file import Entry, read_tensor


@dataclass(frozen=True)
class Waiting:
    """A model without weights, and the file that has them.

    Args:
        model: on the meta device; it can be sharded before it is filled.
        entries: by the model's own names.
    """

    model: WanTransformer3DModel
    path: Path
    entries: Mapping[str, Entry]

    @torch.no_grad()
    def fill(
        self, device: torch.device | str, tables: torch.device | str | None = None
    ) -> WanTransformer3DModel:
        """Read the weights, each as it is asked for, in the model's number format.

        Args:
            device: for the weights.
            tables: for the rotary tables, which are in no file; None is `device`.

        Raises:
            ValueError: the file was changed meanwhile.
        """
        model = self.model.to_empty(device=device)
        make_rope(model)
        model.rope.to(tables or device)
        for name, parameter in model.named_parameters():
            entry = self.entries[name]
            if isinstance(parameter, DTensor):
                own = parameter.to_local()
                own.copy_(read_tensor(self.path, entry, own_part(parameter)))
            else:
                parameter.copy_(read_tensor(self.path, entry))
        return model


def own_part(parameter: DTensor) -> range:
    """The rows that FSDP2 gives this process: torch.chunk's of the first axis."""
    mesh = parameter.device_mesh
    parts = torch.arange(parameter.shape[0]).chunk(mesh.size())
    rank = mesh.get_local_rank()
    if rank >= len(parts):
        return range(0)
    return range(int(parts[rank][0]), int(parts[rank][-1]) + 1)
