"""What the speed bench times, whatever the host: sizes of Wan, plans, and the work that they leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.plan import TrimPlan
from ..methods.cost import WanShape
from ..methods.depth import BlockBudget, BlockPlan
from ..methods.grid import TokenGrid
from ..methods.heads import FRAME, FULL, OFF, HeadPlan
from ..methods.presets import preset_plan
from ..methods.routers import RandomRouter
from ..solve.floor import run_work

TEXT_TOKENS = 512
# share of the tokens, the heads and the blocks that the plans keep
KEEP, HEADS_KEPT, BLOCKS_RUN = 0.7, 0.7, 0.75
# inside the middle stage of a falling schedule, where it keeps its mean
SIGMAS = tuple(0.595 - 0.001 * step for step in range(180))


@dataclass(frozen=True)
class Size:
    """A Wan, as wide as a real one, and a video.

    Args:
        latent: (f, h, w).
    """

    name: str
    dim: int
    heads: int
    ffn_dim: int
    blocks: int
    latent: tuple[int, int, int]

    @property
    def grid(self) -> TokenGrid:
        frames, height, width = self.latent
        return TokenGrid(frames, height // 2, width // 2)

    @property
    def shape(self) -> WanShape:
        return WanShape(
            self.dim,
            self.ffn_dim,
            self.blocks,
            text_tokens=TEXT_TOKENS,
            head_dim=self.dim // self.heads,
        )


def head_plan(size: Size, patterns: Sequence[str]) -> HeadPlan:
    """Three heads of ten in these patterns by turns, the others whole, spread over the blocks."""
    rows, taken = [], 0
    for block in range(size.blocks):
        count = round((block + 1) * (1 - HEADS_KEPT) * size.heads) - taken
        less = [patterns[(taken + at) % len(patterns)] for at in range(count)]
        rows.append((*less, *[FULL] * (size.heads - count)))
        taken += count
    return HeadPlan(tuple(rows), ((FULL,) * size.heads,) * size.blocks)


def plans(size: Size) -> dict[str, TrimPlan]:
    """What is timed, by its words in the column `plan`."""
    budget = BlockBudget(BLOCKS_RUN, BLOCKS_RUN, "constant")
    reuse = BlockPlan(RandomRouter(), budget, "reuse")
    demoted = head_plan(size, (FRAME, "tile2"))
    made = {
        "tokens 0.7, refresh": TrimPlan(preset_plan("refresh", KEEP)),
        "tokens 0.7, paper": TrimPlan(preset_plan("paper", KEEP)),
        "heads 0.7, others off": TrimPlan(heads=head_plan(size, (OFF,))),
        "heads 0.7, others demoted": TrimPlan(heads=demoted),
    }
    if size.blocks < 4:
        # the first block and the last always run
        return made
    return made | {
        "blocks 0.75, identity": TrimPlan(blocks=BlockPlan(RandomRouter(), budget)),
        "blocks 0.75, reuse": TrimPlan(blocks=reuse),
        "all together": TrimPlan(preset_plan("refresh", KEEP), demoted, reuse),
    }


# attached, and its steps compute everything
ATTACHED = TrimPlan(preset_plan("refresh", KEEP, start=0.9))


def steady_work(size: Size, plan: TrimPlan):
    """Work of a forward once what it repeats is known: a step after the one that computes all."""
    parts = {"tokens": plan.tokens, "heads": plan.heads, "blocks": plan.blocks, "prompts": 1}
    first, both = (run_work(size.shape, size.grid, SIGMAS[:n], **parts) for n in (1, 2))
    return both + first * -1
