"""A run's state on disk: torch's distributed checkpoints, whole or not at all."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from .average import Average
from .parallel import World

log = logging.getLogger(__name__)


class State:
    """Weights, optimizer and average of a stage, saved as step-N in a folder.

    Args:
        model: everything that is trained.
        average: its moving average, or None.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Average | None,
    ):
        self.folder, self.world = folder, world
        self.model, self.optimizer, self.average = model, optimizer, average

    def save(self, step: int) -> None:
        """Write step-N; earlier ones go when it is there."""
        partial, path = self.folder / "partial", self.folder / f"step-{step}"
        if self.world.first:
            shutil.rmtree(partial, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        self.world.wait()
        dcp.save(self._tensors(), checkpoint_id=partial)
        self.world.wait()
        if self.world.first:
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
            for old in self._saved():
                if old != step:
                    shutil.rmtree(self.folder / f"step-{old}")
        self.world.wait()

    def load(self) -> int:
        """Go on from the newest whole checkpoint; returns its step, 0 when there is none.

        The number of processes may be another than it was.
        """
        steps = self._saved()
        if not steps:
            return 0
        tensors = self._tensors()
        path = self.folder / f"step-{steps[-1]}"
        try:
            dcp.load(tensors, checkpoint_id=path)
        except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
            raise ValueError(
                f"{path}: the saved step cannot be read ({str(error):.300}). Remove the folder to "
                "begin the stage anew."
            ) from error
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )
        log.info("going on at step %d", steps[-1])
        return steps[-1]

    def remove(self) -> None:
        """Let go of what was saved: gigabytes that nobody needs behind the last step."""
        self.world.wait()
        if self.world.first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _saved(self) -> list[int]:
        names = (re.fullmatch(r"step-(\d+)", p.name) for p in self.folder.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    def _tensors(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        tensors = {"model": model, "optimizer": optimizer}
        if self.average is not None:
            # loaded in place
            tensors["average"] = self.average.tensors
        return tensors


def whole_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's weights, gathered on the CPU of the first process (empty elsewhere)."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)
