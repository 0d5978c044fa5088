"""Models of random weights on diffusers, and runs of steps under a plan."""

from __future__ import annotations

import copy

import torch

from ...engine.context import Room
from ...engine.plan import TrimPlan
from ...hosts.diffusers.attach import Attachment, attach
from ...hosts.diffusers.weights import new_transformer
from .plans import SIGMAS, TEXT_TOKENS, Size


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


class Runner:
    """Forwards of one model, each a new step of one sampling run.

    Args:
        plan: attached to a copy of the model; one that trims nothing attaches nothing.
        compiled: backend of torch.compile for the blocks, or "no".
        room: where keys and values are kept.
    """

    def __init__(
        self,
        model,
        size: Size,
        plan: TrimPlan | None = None,
        compiled: str = "no",
        room: Room | None = None,
    ):
        trims = plan is not None and not plan.neutral
        self.model = sharing(model) if trims else model
        self.attachment: Attachment | None = None
        if compiled != "no":
            self.model.compile_repeated_blocks(backend=compiled)
        if plan is not None:
            self.attachment = attach(self.model, plan)
            self.attachment.engine.memory.room = room or Room()
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
            self.attachment.engine.finish(True)
            self.attachment.detach()
