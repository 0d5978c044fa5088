"""The router in training: hard top-K blocks, with gradients straight through (eq. 10 to 12)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from ..methods.depth import BlockBudget, choose_blocks
from ..methods.routers import RouterMLP, latent_statistics

HOOK = "wantrim_gate"


@dataclass
class Gate:
    """Which blocks count, per sample.

    Args:
        hard: bool [b, l].
        soft: sigmoid of the logits [b, l]; carries the router's gradient.
    """

    hard: torch.Tensor
    soft: torch.Tensor

    def apply(self, block: int, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """before + m * (after - before) with m = hard + soft - stopgrad(soft).

        Written so that a block that runs gives exactly its output, and one that does not exactly
        its input, in any number format. Every block is computed, so that the router learns what the
        ones left out would have added, and all processes of a sharded model gather the same
        weights; a block that does not count gets no gradient.
        """
        rows = (-1, *[1] * (before.ndim - 1))
        out = torch.where(self.hard[:, block].view(rows), after, before)
        soft = self.soft[:, block].view(rows)
        through = (soft - soft.detach()) * (after - before).detach().float()
        return out + through.to(out.dtype)

    @property
    def active(self) -> torch.Tensor:
        """Share of the blocks that run, mean over the batch."""
        return self.hard.float().mean()


class Routing:
    """A router and its budget.

    Args:
        kind: of content, as in methods/routers.py.
    """

    def __init__(self, mlp: nn.Module, kind: str, budget: BlockBudget):
        self.mlp, self.kind, self.budget = mlp, kind, budget

    def gate(
        self, sigma: torch.Tensor, latent: torch.Tensor, clip: torch.Tensor | None = None
    ) -> Gate:
        """Decide for a batch.

        Args:
            sigma: [b].
            latent: noisy latents [b, c, f, h, w].
            clip: CLIP's tokens of the given image [b, tokens, c]; the first is its class.
        """
        content = None
        if self.kind == "latent":
            content = latent_statistics(latent)
        elif self.kind == "clip":
            if clip is None:
                raise ValueError(
                    "content: 'clip' needs CLIP embeddings of the first images, and the data has "
                    "none; encode it with an image-to-video model, or choose 'latent' or 'none'"
                )
            content = clip[:, 0].float()
        # in fp32, as in sampling
        with torch.autocast(sigma.device.type, enabled=False):
            logits = self.mlp(sigma, content)
        num_blocks = logits.shape[1]
        hard = torch.zeros(logits.shape, dtype=torch.bool)
        for row, (at, scores) in enumerate(zip(sigma.tolist(), logits.detach().cpu(), strict=True)):
            hard[row, list(choose_blocks(scores, self.budget.blocks(at, num_blocks)))] = True
        return Gate(hard.to(logits.device), logits.sigmoid())


def new_router(num_blocks: int, kind: str, channels: int, clip_dim: int = 0) -> RouterMLP:
    """An untrained router; `channels` are the latent's."""
    sizes = {"none": 0, "latent": 4 * channels, "clip": clip_dim}
    return RouterMLP(num_blocks, sizes[kind])


class _GateHook(ModelHook):
    """Applies the gate where the block's own forward is called."""

    def __init__(self, taps: Taps, index: int):
        super().__init__()
        self.taps, self.index = taps, index

    def new_forward(self, module, hidden_states, *args, **kwargs):
        out = self.fn_ref.original_forward(hidden_states, *args, **kwargs)
        gate = self.taps.gate
        return out if gate is None else gate.apply(self.index, hidden_states, out)


class Taps:
    """Hooks on a model's blocks: they apply the gate and keep hidden states.

    They go on before any other hook of diffusers, so that what is computed again in the backward pass
    has the gate in it.

    Attributes:
        gate: of the call to come, or None; it must stay until the backward pass is done, which
            computes checkpointed blocks again.
    """

    def __init__(self, model: nn.Module):
        self.gate: Gate | None = None
        self._wanted: frozenset[int] = frozenset()
        self._kept: dict[int, torch.Tensor] = {}
        self._blocks, self._hooks = list(model.blocks), []
        for index, block in enumerate(self._blocks):
            registry = HookRegistry.check_if_exists_or_initialize(block)
            registry.register_hook(_GateHook(self, index), HOOK)
            self._hooks.append(block.register_forward_hook(self._behind(index)))

    def _behind(self, index: int) -> Callable:
        def hook(module, args, output):
            if index in self._wanted:
                self._kept[index] = output

        return hook

    @contextmanager
    def keeping(self, blocks: Collection[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Within the context, hidden states behind these blocks, by block."""
        self._wanted, self._kept = frozenset(blocks), {}
        try:
            yield self._kept
        finally:
            self._wanted, self._kept = frozenset(), {}

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for block in self._blocks:
            block._diffusers_hook.remove_hook(HOOK, recurse=False)
        self.gate = None
