"""How the tiny Wans were trained: a recipe each, written into the header of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..toy import CHECKPOINT
from ..toy.batches import OBJECT_SHARES
from ..toy.worlds import FIRST, SECOND


@dataclass(frozen=True)
class Recipe:
    """The first tiny Wan's.

    Args:
        canvases: (share of the steps until which, side of the videos in pixels), ascending.
        start: weights that training begins with, or None for random ones.
        log_every: steps between rows of the log.
    """

    world: ClassVar[str] = FIRST.name
    canvases: ClassVar[tuple[tuple[float, int], ...]] = ((1.0, FIRST.side),)
    start: ClassVar[Path | None] = None
    guidance: ClassVar[float] = 4.0
    log_every: ClassVar[int] = 100

    steps: int = 8000
    batch: int = 16
    seed: int = 0
    lr_matrix: float = 6e-3
    lr_other: float = 2e-3
    warmup: int = 200
    # share of the steps, at the end, in which the learning rate falls to zero
    cooldown: float = 0.6875
    shift: float = 3.0
    image_share: float = 0.3
    drop_text: float = 0.1
    object_shares: tuple[float, ...] = OBJECT_SHARES
    ema_decay: float = 0.998

    def side(self, step: int) -> int:
        """Side of the videos of a step, in pixels."""
        return next(
            (s for until, s in self.canvases if step < until * self.steps), self.canvases[-1][1]
        )

    def rate(self, step: int, first: int = 0) -> float:
        """The learning rate of a step, 0..1: warm-up, constant, linear cooldown.

        Args:
            first: step at which the optimizers were new.
        """
        left = (self.steps - step) / max(self.cooldown * self.steps, 1)
        return min(1.0, (step - first + 1) / self.warmup, left)


@dataclass(frozen=True)
class SecondRecipe(Recipe):
    """The second tiny Wan's: on from the first one, on canvases that grow, as Wan was trained.

    The smaller canvases are cuts at the same scale, with objects and paths that fit into them.
    """

    start: ClassVar[Path | None] = CHECKPOINT
    log_every: ClassVar[int] = 50

    world: str = SECOND.name
    canvases: tuple[tuple[float, int], ...] = ((0.491, 96), (0.87, 128), (1.0, SECOND.side))
    guidance: float = 5.0
    steps: int = 3340
    lr_matrix: float = 4e-3
    lr_other: float = 1.5e-3
    cooldown: float = 0.3


RECIPES = {recipe.world: recipe for recipe in (Recipe(), SecondRecipe())}
