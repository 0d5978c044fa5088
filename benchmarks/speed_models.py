"""What the speed bench times: Wan models of random weights, and runs of steps under a plan."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..hosts.diffusers.attach import Attachment, attach
from ..hosts.diffusers.weights import new_transformer
from ..hosts.session import TrimPlan
from ..methods.cost import WanShape
from ..methods.depth import BlockBudget, BlockPlan
from ..methods.floor import run_work
from ..methods.grid import TokenGrid
from ..methods.heads import FRAME, FULL, OFF, HeadPlan
from ..methods.presets import preset_plan
from ..methods.routers import RandomRouter

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


def build(size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """A model of random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = new_transformer(
            dim=size.dim,
            num_heads=size.heads,
            num_layers=size.blocks,
            ffn_dim=size.ffn_dim,
            in_dim=16,
            out_dim=16,
            text_dim=4096,
        )
    return model.to(device, dtype).requires_grad_(False).eval()


def sharing(model):
    """A copy of the model with the same weights in memory, so that each plan can stay attached."""
    same = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in same})


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


class Runner:
    """Forwards of one model, each a new step of one sampling run.

    Args:
        plan: attached to a copy of the model; one that trims nothing attaches nothing.
        compiled: backend of torch.compile for the blocks, or "no".
    """

    def __init__(self, model, size: Size, plan: TrimPlan | None = None, compiled: str = "no"):
        trims = plan is not None and not plan.neutral
        self.model = sharing(model) if trims else model
        self.attachment: Attachment | None = None
        if compiled != "no":
            self.model.compile_repeated_blocks(backend=compiled)
        if plan is not None:
            self.attachment = attach(self.model, plan, sigmas=SIGMAS)
        weight = next(model.parameters())
        options = {"device": weight.device, "dtype": weight.dtype}
        draw = torch.Generator(weight.device).manual_seed(1)
        self._latent = torch.randn(1, 16, *size.latent, generator=draw, **options)
        self._text = torch.randn(1, TEXT_TOKENS, 4096, generator=draw, **options)
        self._step = 0

    def prepare(self) -> None:
        """The next step's latent, outside of what is timed."""
        self._latent = self._latent * 0.999
        sigma = SIGMAS[self._step % len(SIGMAS)]
        self._timestep = torch.tensor([1000 * sigma], device=self._latent.device)
        self._step += 1

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        return self.model(self._latent, self._timestep, self._text, return_dict=False)[0]

    def step(self) -> torch.Tensor:
        self.prepare()
        return self.forward()

    def close(self) -> None:
        if self.attachment is not None:
            self.attachment.session.finish(True)
            self.attachment.detach()
