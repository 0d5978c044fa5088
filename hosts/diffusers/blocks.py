"""One Wan block of diffusers, run on all tokens or on some through its own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from torch.overrides import TorchFunctionMode

from ...engine.attention import Attend
from ...engine.compiled import outside_graphs
from ...engine.places import Places


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
        tap = AttentionTap(attend)
        out = _tapped(tap, self.forward, hidden, self.text, temb, rotary)
        if not attend.seen:
            raise RuntimeError(
                "WanTrim saw no scaled_dot_product_attention in this block's self-attention; set "
                "the transformer's attention backend to 'native'"
            )
        return out


@torch.compiler.disable
def _tapped(tap: AttentionTap, forward, hidden, text, temb, rotary) -> torch.Tensor:
    """A block's forward under a tap, uncompiled: a graph would freeze what the tap does."""
    with tap:
        return forward(hidden, text, temb, rotary)


class AttentionTap(TorchFunctionMode):
    """Hands a block's attention calls, q, k, v [b, n, s, d] there, to the engine."""

    def __init__(self, attend: Attend):
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        rest, options = args[3:], {name: bound[name] for name in bound if name not in names}

        def attention(q, k, v):
            return func(*(t.transpose(1, 2) for t in (q, k, v)), *rest, **options).transpose(1, 2)

        parts = (bound[name].transpose(1, 2) for name in names)
        return self.attend(*parts, attention).transpose(1, 2)


WATCH = "wantrim_watch"


@contextmanager
def watch_blocks(
    model: WanTransformer3DModel, seen: Callable[[int, Block, torch.Tensor, torch.Tensor], object]
) -> Iterator[None]:
    """Within the context, call seen(block_index, block, q, k) at every block; q, k [b, s, n, d].

    What `seen` returns replaces the block's output unless it is None.
    """
    for index, block in enumerate(model.blocks):
        registry = HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(_WatchHook(index, seen), WATCH)
    try:
        yield
    finally:
        for block in model.blocks:
            block._diffusers_hook.remove_hook(WATCH, recurse=False)


class _WatchHook(ModelHook):
    def __init__(self, index: int, seen):
        super().__init__()
        self.index, self.seen = index, seen

    def new_forward(self, module, hidden_states, encoder_hidden_states, temb, rotary_emb):
        forward = self.fn_ref.original_forward
        block = Block(forward, hidden_states, encoder_hidden_states, temb, rotary_emb)
        attention = []
        out = block.run(hidden_states, None, Attend(lambda q, k, v: attention.extend((q, k))))
        other = self.seen(self.index, block, *attention)
        return out if other is None else other
