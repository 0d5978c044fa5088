"""Gradient checkpointing inside of a block's other hooks.

diffusers' own checkpointing computes a block again together with the hooks around it, FSDP's and those
that keep hidden states among them; here only the block's own forward and its gate are.
"""

from __future__ import annotations

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn
from torch.utils.checkpoint import checkpoint

HOOK = "wantrim_recompute"


class _Recompute(ModelHook):
    def new_forward(self, module, *args, **kwargs):
        return checkpoint(self.fn_ref.original_forward, *args, use_reentrant=False, **kwargs)


def recompute_blocks(model: nn.Module) -> None:
    """Keep only the inputs of a model's blocks for the backward pass. Goes before other hooks."""
    for block in model.blocks:
        HookRegistry.check_if_exists_or_initialize(block).register_hook(_Recompute(), HOOK)
