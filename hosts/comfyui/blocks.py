"""One Wan block of ComfyUI as the session sees it, run through the host's own closure."""

from __future__ import annotations

import torch

from ...methods.grid import gather_tokens
from ..heads import BlockHeads
from ..session import ModelCall

OVERRIDE = "optimized_attention_override"


class BlockReplacement:
    """The ("double_block", i) replacement of one model call; chains an earlier replacement."""

    def __init__(self, call: ModelCall, index: int, previous):
        self.call, self.index, self.previous = call, index, previous

    def __call__(self, args: dict, extra: dict) -> dict:
        heads = self.call.heads(self.index, args["img"].shape[1])
        block = _Block(args, extra, self.previous, heads)
        return {"img": self.call.block(self.index, block)}


def replace_blocks(transformer_options: dict, call: ModelCall) -> dict:
    """A copy of `transformer_options` in which `call` runs every block.

    torch.compile must not freeze a step's decision into the graph, so the replacements stay
    outside of it.
    """
    replaced = dict(transformer_options.get("patches_replace", {}))
    blocks = dict(replaced.get("dit", {}))
    for index in range(call.num_blocks):
        key = ("double_block", index)
        replacement = BlockReplacement(call, index, blocks.get(key))
        blocks[key] = torch.compiler.disable(replacement.__call__)
    replaced["dit"] = blocks
    return {**transformer_options, "patches_replace": replaced}


class _Block:
    def __init__(self, args: dict, extra: dict, previous, heads: BlockHeads | None = None):
        self.args, self.extra, self.previous, self.heads = args, extra, previous, heads
        self.hidden: torch.Tensor = args["img"]

    def run(self) -> torch.Tensor:
        return self._call(self._with(self._tap()))

    def run_watched(self, look) -> torch.Tensor:
        return self._call(self._with(self._tap(look=look)))

    def run_subset(self, index, others):
        taken = None
        if others is not None:
            probe = AttentionTap(stop=True)
            try:
                self._call(self._with(probe, others))
            except AttentionTap.Stopped:
                taken = (probe.k, probe.v)
        return self._call(self._with(self._tap(index, others, extra=taken), index))

    def _tap(self, index=None, others=None, **options) -> AttentionTap | None:
        if self.heads is not None:
            options["heads"] = self.heads
            options["layout"] = self.heads.layout(index, others)
        return AttentionTap(**options) if any(o is not None for o in options.values()) else None

    def _call(self, args: dict) -> torch.Tensor:
        original = self.extra["original_block"]
        if self.previous is None:
            return original(args)["img"]
        return self.previous(args, {**self.extra, "original_block": original})["img"]

    def _with(self, tap: AttentionTap | None, index: torch.Tensor | None = None) -> dict:
        args = dict(self.args)
        options = dict(args["transformer_options"])
        if tap is not None:
            tap.previous = options.get(OVERRIDE)
            options[OVERRIDE] = tap
        args["transformer_options"] = options
        if index is not None:
            tokens = self.hidden.shape[1]
            args["img"] = gather_tokens(self.hidden, index)
            args["pe"] = gather_tokens(args["pe"], index)
            args["vec"] = _gather_modulation(args["vec"], index, tokens)
        return args


def _gather_modulation(vec: torch.Tensor, index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Modulation for the kept tokens: [b, 6, c] and [b, 1, 6, c] fit all tokens as they are.

    [b, f, 6, c] (one per latent frame, TI2V) is spread over the tokens as the host spreads it, so
    that each kept token takes its own along.
    """
    if vec.ndim == 3 or vec.shape[1] == 1:
        return vec
    # the host repeats each latent frame's modulation this often
    repeats = -(-tokens // vec.shape[1])
    return gather_tokens(vec, index // repeats)


class AttentionTap:
    """A chained attention override for one run of one block: sees its attention calls.

    Args:
        look: called with self-attention's q and k [b, s, n, d].
        extra: keys and values, as the host lays them out, to append to the call's own.
        stop: leave the block by `Stopped` before the attention is computed.
        heads: what each head computes; needs self-attention's layout.
    """

    class Stopped(Exception):
        """The probe has what it wanted."""

    def __init__(self, look=None, extra=None, stop: bool = False, heads=None, layout=None):
        self.look, self.extra, self.stop = look, extra, stop
        self.heads, self.layout = heads, layout
        self.previous = None
        self.seen = False
        # of the call that `stop` left
        self.k = self.v = None

    def __call__(self, func, q, k, v, *args, **kwargs):
        layout = None
        # self-attention is a block's first attention, and has as many keys as queries
        if not self.seen and q.shape[-2] == k.shape[-2]:
            self.seen, layout = True, self.layout
            heads = kwargs["heads"] if "heads" in kwargs else args[0]
            flat = q.ndim == 3
            if self.look is not None:
                heads_apart = [
                    t.unflatten(-1, (heads, -1)) if flat else t.transpose(1, 2) for t in (q, k)
                ]
                self.look(*heads_apart)
            if self.stop:
                self.k, self.v = k, v
                raise AttentionTap.Stopped
            if self.extra is not None:
                sequence = 1 if flat else 2
                k = torch.cat([k, self.extra[0]], sequence)
                v = torch.cat([v, self.extra[1]], sequence)
        if self.heads is None:
            return self._host(func, q, k, v, args, kwargs)
        return self._by_head(func, q, k, v, layout, args, kwargs)

    def _host(self, func, q, k, v, args, kwargs) -> torch.Tensor:
        if self.previous is not None:
            return self.previous(func, q, k, v, *args, **kwargs)
        return func(q, k, v, *args, **kwargs)

    def _by_head(self, func, q, k, v, layout, args, kwargs) -> torch.Tensor:
        """q, k, v are [b, s, n * d], or [b, n, s, d] with skip_reshape."""
        apart = q.ndim == 4
        rest = args
        if "heads" not in kwargs:
            kwargs, rest = {**kwargs, "heads": args[0]}, args[1:]

        def attention(q, k, v):
            heads = q.shape[2]
            parts = [t.transpose(1, 2) if apart else t.flatten(2) for t in (q, k, v)]
            out = self._host(func, *parts, rest, {**kwargs, "heads": heads})
            return out.transpose(1, 2) if out.ndim == 4 else out.unflatten(-1, (heads, -1))

        heads = kwargs["heads"]
        parts = (t.transpose(1, 2) if apart else t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        out = self.heads.attend(*parts, attention, layout)
        return out.transpose(1, 2) if kwargs.get("skip_output_reshape") else out.flatten(2)
