"""What the speed bench times, whatever the host: sizes of Wan, plans, and the work that they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...engine.plan import TrimPlan
from ...engine.program import expected_programs
from ...engine.work import program_work
from ...methods.cost import WanShape, Work
from ...methods.depth import BlockBudget, BlockPlan
from ...methods.grid import TokenGrid
from ...methods.heads import FRAME, FULL, OFF, HeadPlan
from ...methods.shares import Shares
from ...methods.tokens import paper_plan
from ..peers.random_router import RandomRouter

TEXT_TOKENS = 512
# share of the tokens, the heads and the blocks that the plans keep
KEEP, HEADS_KEPT, BLOCKS_RUN = 0.7, 0.7, 0.75
# share of a partial step of the default
SHARE = 0.3
# inside the middle stage of a falling schedule, where it keeps its mean
SIGMAS = tuple(0.595 - 0.001 * step for step in range(180))
# steps that compute everything before all that follow are alike
WHOLE = 2


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
    """Three heads of ten in these patterns by turns, the others whole, spread over the blocks.

    What a pattern leaves out is corrected; a head that is off is PARE's.
    """
    rows, taken = [], 0
    for block in range(size.blocks):
        count = round((block + 1) * (1 - HEADS_KEPT) * size.heads) - taken
        less = [patterns[(taken + at) % len(patterns)] for at in range(count)]
        rows.append((*less, *[FULL] * (size.heads - count)))
        taken += count
    whole = ((FULL,) * size.heads,) * size.blocks
    return HeadPlan(tuple(rows), whole, corrected=OFF not in patterns)


def shares(later: float) -> Shares:
    """Two whole steps, then this share in all others."""
    whole = (1.0,) * WHOLE
    return Shares(SIGMAS, (*whole, *[later] * (len(SIGMAS) - WHOLE)))


PARTIAL, REPEATED, PAPER = f"share {SHARE}, context", "share 0, repeated", f"tokens {KEEP}, paper"
PINNED = f"{PARTIAL} in pinned memory"
DEMOTED, TOGETHER = "heads 0.7, others demoted", f"{PARTIAL}, heads 0.7 demoted"
# of the GPU's bench, in order of worth
PLANS = (PARTIAL, PINNED, TOGETHER, DEMOTED, REPEATED, PAPER)
COMPILED_PLANS = (PARTIAL, TOGETHER)


def plans(size: Size) -> dict[str, TrimPlan]:
    """What is timed, by its words in the column `plan`."""
    demoted = head_plan(size, (FRAME, "tile2"))
    made = {
        PARTIAL: TrimPlan(shares=shares(SHARE)),
        REPEATED: TrimPlan(shares=shares(0.0)),
        PAPER: TrimPlan(paper_plan(KEEP)),
        "heads 0.7, others off": TrimPlan(heads=head_plan(size, (OFF,))),
        DEMOTED: TrimPlan(heads=demoted),
        TOGETHER: TrimPlan(heads=demoted, shares=shares(SHARE)),
    }
    if size.blocks < 4:
        # the first block and the last always run
        return made
    blocks = BlockPlan(RandomRouter(), BlockBudget(BLOCKS_RUN, BLOCKS_RUN, "constant"))
    return made | {
        "blocks 0.75, identity": TrimPlan(blocks=blocks),
        f"{PAPER}, heads and blocks": TrimPlan(paper_plan(KEEP), demoted, blocks),
    }


# attached, and its steps compute everything; these remember keys and values, too
ATTACHED = TrimPlan(paper_plan(KEEP, start=0.9))
WRITING = TrimPlan(shares=Shares(SIGMAS, (*(1.0,) * (len(SIGMAS) - 1), SHARE)))
NEUTRAL, ATTACHED_NAME = "neutral", "attached, outside its percents"
WRITING_NAME = "whole steps that remember keys and values"


def steady_work(size: Size, plan: TrimPlan) -> Work:
    """Work of a forward once what it repeats is known: a step after those that compute all."""
    steps = expected_programs(plan, SIGMAS[: WHOLE + 1], 1.0, size.grid, size.blocks)
    return program_work(size.shape, steps[-1], plan)


def ratio(cost: Callable[[Work], float], whole: Work, left: Work) -> float | str:
    """Expected speed-up; empty for a forward that repeats all: what is left of it is no work."""
    return cost(whole) / cost(left) if left.flops else ""
