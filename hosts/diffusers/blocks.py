"""One Wan block of diffusers, run on all tokens or on some through its own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from torch.overrides import TorchFunctionMode

from ...engine.apart import attend_later, tapped
from ...engine.block import Attend, Places
from ...engine.compiled import outside_graphs


@outside_graphs
class Block:
    """A WanTransformerBlock's original forward with its inputs, as the engine runs it."""

    movable = True

    def __init__(self, forward, hidden, text, temb, rotary):
        self.forward, self.hidden, self.text = forward, hidden, text
        self.temb, self.rotary = temb, rotary

    def run(self, hidden, places: Places | None = None, attend: Attend | None = None):
        temb, rotary = self.temb, self.rotary
        if places is not None:
            # per-token modulation [b, s, 6, c] only for TI2V
            temb = places.take(temb) if temb.ndim == 4 else temb
            rotary = tuple(places.take(part) for part in rotary)
        if attend is None:
            return self.forward(hidden, self.text, temb, rotary)
        if places is not None:
            for tensor in (hidden, *rotary):
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        with AttentionTap(attend) as tap, tapped(tap):
            # the operation that attention is in a graph has no gradient
            run = _uncompiled if torch.is_grad_enabled() else _run
            out = run(self.forward, hidden, self.text, temb, rotary)
        if not attend.seen:
            raise RuntimeError(
                "WanTrim saw no scaled_dot_product_attention in this block's self-attention; set "
                "the transformer's attention backend to 'native'"
            )
        return out


def _run(forward, *args) -> torch.Tensor:
    """Code of its own to the compiler, so that graphs with a tap are never taken where there is none."""
    return forward(*args)


_uncompiled = torch.compiler.disable(_run)


# of scaled_dot_product_attention
POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class AttentionTap(TorchFunctionMode):
    """Hands a block's attention calls, q, k, v [b, n, s, d] there, over as [b, s, n, d]."""

    def __init__(self, attend: Callable):
        super().__init__()
        # its own calls pass by, also those that a graph makes while it is on
        self.attend, self._busy = attend, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._busy or func is not torch.nn.functional.scaled_dot_product_attention:
            # the compiler cannot follow the method into its class while a mode is on
            return (torch.unflatten if func is torch.Tensor.unflatten else func)(*args, **kwargs)
        given = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
        q, k, v = (given.pop(name) for name in POSITIONAL[:3])
        mask = given.pop("attn_mask", None)
        if torch.compiler.is_compiling():
            return attend_later(func, q, k, v, mask, tuple(given.items()), merged=False)
        return self.now(func, q, k, v, mask, given)

    def now(self, function, q, k, v, mask, constants: dict) -> torch.Tensor:
        """What the call function(q, k, v) gives, in a graph or out of it."""

        def attention(q, k, v):
            parts = (t.transpose(1, 2) for t in (q, k, v))
            return function(*parts, attn_mask=mask, **constants).transpose(1, 2)

        self._busy = True
        try:
            return self.attend(*(t.transpose(1, 2) for t in (q, k, v)), attention).transpose(1, 2)
        finally:
            self._busy = False


@outside_graphs
class BlockHook(ModelHook):
    """Hands a block with its inputs to run(index, block), which gives what comes out of it."""

    def __init__(self, run: Callable[[int, Block], torch.Tensor], index: int):
        super().__init__()
        self.run, self.index = run, index

    def new_forward(self, module, hidden_states, encoder_hidden_states, temb, rotary_emb):
        forward = self.fn_ref.original_forward
        block = Block(forward, hidden_states, encoder_hidden_states, temb, rotary_emb)
        return self.run(self.index, block)


WATCH = "wantrim_watch"


@contextmanager
def watch_blocks(
    model: WanTransformer3DModel, seen: Callable[[int, Block, torch.Tensor, torch.Tensor], object]
) -> Iterator[None]:
    """Within the context, call seen(block_index, block, q, k) at every block; q, k [b, s, n, d].

    What `seen` returns replaces the block's output unless it is None.
    """

    def run(index: int, block: Block) -> torch.Tensor:
        attention = []
        out = block.run(block.hidden, None, Attend(lambda q, k, v: attention.extend((q, k))))
        other = seen(index, block, *attention)
        return out if other is None else other

    for index, block in enumerate(model.blocks):
        registry = HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(BlockHook(run, index), WATCH)
    try:
        yield
    finally:
        for block in model.blocks:
            block._diffusers_hook.remove_hook(WATCH, recurse=False)
