"""One process or several: torch's own process groups and FSDP2, nothing of ours."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

# by their names in recipes and commands
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Args:
        mesh: all of them.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size

    def gather(self, value: object) -> list:
        """What every process has here, in their order."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, or be alone.

    Args:
        device: "cpu" or "cuda".
    """
    given = "RANK" in os.environ
    rank, size = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    store = None if given else dist.HashStore()
    # the first process may look through hundreds of gigabytes while the others wait
    limit = timedelta(hours=6)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        yield World(rank, size, place, init_device_mesh(place.type, (size,)))
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, offload: bool = False) -> None:
    """Spread a transformer's weights over the processes, block by block (FSDP2).

    Args:
        dtype: that it computes in; gradients are added up in fp32.
        offload: keep the weights in the CPU's memory between uses.
    """
    # the velocity is a view; nothing here writes into it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # inputs are cast where they are made: a timestep in bf16 would be another one
    mixed = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    policy = MixedPrecisionPolicy() if dtype == torch.float32 else mixed
    # without a GPU there is nothing to pin memory for
    pinned = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    place = pinned if offload else OffloadPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=place)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=place)
