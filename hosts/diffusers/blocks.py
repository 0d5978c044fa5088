"""One Wan block of diffusers, run on all tokens or on some through its own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from torch.overrides import TorchFunctionMode

from ..compiled import gather_tokens, outside_graphs
from ..heads import BlockHeads


@outside_graphs
class Block:
    """A WanTransformerBlock's original forward with its inputs, as the session runs it."""

    def __init__(self, forward, hidden, text, temb, rotary, heads: BlockHeads | None = None):
        self.forward, self.hidden, self.text = forward, hidden, text
        self.temb, self.rotary, self.heads = temb, rotary, heads

    def run(self) -> torch.Tensor:
        return self._on_all(self._tap())

    def run_watched(self, look) -> torch.Tensor:
        tap = self._tap(look=look)
        out = self._on_all(tap)
        tap.require_seen()
        return out

    def run_subset(self, index, others):
        extra = None
        if others is not None:
            probe = AttentionTap(stop=True)
            try:
                self._on(probe, others)
            except _Stopped:
                extra = (probe.k, probe.v)
            probe.require_seen()
        return self._on(self._tap(index, others, extra=extra), index)

    def _tap(self, index=None, others=None, **options) -> AttentionTap | None:
        if self.heads is not None:
            options["heads"] = self.heads
            options["layout"] = self.heads.layout(index, others)
        wanted = any(option is not None for option in options.values())
        return AttentionTap(**options) if wanted else None

    def _on_all(self, tap: AttentionTap | None) -> torch.Tensor:
        if tap is None:
            return self.forward(self.hidden, self.text, self.temb, self.rotary)
        return _tapped(tap, self.forward, self.hidden, self.text, self.temb, self.rotary)

    def _on(self, tap: AttentionTap | None, index: torch.Tensor) -> torch.Tensor:
        # per-token modulation [b, s, 6, c] only for TI2V
        temb = gather_tokens(self.temb, index) if self.temb.ndim == 4 else self.temb
        rotary = tuple(gather_tokens(part, index) for part in self.rotary)
        # what is gathered has no other name, so that the block lets go of it when it may
        if tap is None:
            return self.forward(gather_tokens(self.hidden, index), self.text, temb, rotary)
        return _tapped(
            tap, self.forward, gather_tokens(self.hidden, index), self.text, temb, rotary
        )


@torch.compiler.disable
def _tapped(tap: AttentionTap, forward, hidden, text, temb, rotary) -> torch.Tensor:
    """A block's forward under a tap, uncompiled: a graph would freeze what the tap does."""
    with tap:
        return forward(hidden, text, temb, rotary)


class _Stopped(Exception):
    """The probe has what it wanted."""


class AttentionTap(TorchFunctionMode):
    """Sees a block's attention calls; self-attention is the first, with as many keys as queries.

    q, k, v are [b, n, s, d] there.

    Args:
        look: called with self-attention's q and k [b, s, n, d].
        extra: keys and values to append to the call's own.
        stop: leave the block by `_Stopped` before the attention is computed.
        heads: what each head computes; needs self-attention's layout.
    """

    def __init__(self, look=None, extra=None, stop: bool = False, heads=None, layout=None):
        super().__init__()
        self.look, self.extra, self.stop = look, extra, stop
        self.heads, self.layout = heads, layout
        self.seen = False
        # of the call that `stop` left
        self.k = self.v = None

    def require_seen(self) -> None:
        if not self.seen:
            raise RuntimeError(
                "WanTrim saw no scaled_dot_product_attention in this block's self-attention; set "
                "the transformer's attention backend to 'native'"
            )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = (bound[name] for name in names)
        layout = None
        if not self.seen and q.shape[2] == k.shape[2]:
            self.seen, layout = True, self.layout
            if self.look is not None:
                self.look(q.transpose(1, 2), k.transpose(1, 2))
            if self.stop:
                self.k, self.v = k, v
                raise _Stopped
            if self.extra is not None:
                k = torch.cat([k, self.extra[0]], 2)
                v = torch.cat([v, self.extra[1]], 2)
        rest, options = args[3:], _without(bound, names)
        if self.heads is None:
            return func(q, k, v, *rest, **options)

        def attention(q, k, v):
            parts = (t.transpose(1, 2) for t in (q, k, v))
            return func(*parts, *rest, **options).transpose(1, 2)

        parts = (t.transpose(1, 2) for t in (q, k, v))
        return self.heads.attend(*parts, attention, layout).transpose(1, 2)


def _without(kwargs: dict, names) -> dict:
    return {key: value for key, value in kwargs.items() if key not in names}


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
        out = block.run_watched(lambda q, k: attention.extend((q, k)))
        other = self.seen(self.index, block, *attention)
        return out if other is None else other
