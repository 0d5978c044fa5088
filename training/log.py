"""What a stage tells as it runs: JSON lines, TensorBoard and test videos."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ..profiles.artifact import replacing

log = logging.getLogger(__name__)


class StageLog:
    """`log.jsonl` and TensorBoard's files in a stage's folder.

    Args:
        step: from which the run goes on; lines of later steps are of work that is done again.
    """

    def __init__(self, folder: Path, step: int):
        self.path = folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._cut(step)
        self._board = _board(folder / "tensorboard", step)

    def _cut(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text("utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        with replacing(self.path) as (partial,):
            partial.write_text("".join(f"{line}\n" for line in kept), "utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            said = {name: float(f"{value:.6g}") for name, value in values.items()}
            file.write(json.dumps({"step": step, **said}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    # a line that a crash cut short
    except (ValueError, KeyError, TypeError):
        return 1 << 62


def _board(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("tensorboard is not installed: log.jsonl is the only log")
        return None
    return SummaryWriter(str(folder), purge_step=step)
