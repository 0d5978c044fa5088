"""One Wan block of ComfyUI as the engine sees it, run through the host's own closure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd

import torch

from ...engine.apart import attend_later
from ...engine.block import Attend, Places
from ...engine.call import Call
from .compiled import Compiled
from .given import as_dict

OVERRIDE = "optimized_attention_override"
# how the host names what an attention call gets behind q, k and v
POSITIONAL = ("heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")


class BlockReplacement:
    """The ("double_block", i) replacement of one model call; chains an earlier replacement."""

    def __init__(self, call: Call, index: int, previous, compiled: Compiled | None):
        self.call, self.index, self.previous, self.compiled = call, index, previous, compiled

    def __call__(self, args: dict, extra: dict) -> dict:
        block = _Block(args, extra, self.previous, self.call.options, self.compiled)
        out = self.call.block(self.index, block)
        # what else a forward of another pack hands out stays in there
        return {**block.given, "img": out}


def with_replacements(transformer_options: dict, num_blocks: int, make: Callable) -> dict:
    """A copy of `transformer_options` in which make(index, earlier replacement) runs every block.

    torch.compile must not freeze what one of them decides into the graph, so they stay outside.
    """
    replaced = dict(as_dict(transformer_options.get("patches_replace")))
    blocks = dict(as_dict(replaced.get("dit")))
    for index in range(num_blocks):
        key = ("double_block", index)
        blocks[key] = torch.compiler.disable(make(index, blocks.get(key)).__call__)
    replaced["dit"] = blocks
    return {**transformer_options, "patches_replace": replaced}


def replace_blocks(
    transformer_options: dict, call: Call, num_blocks: int, compiled: Compiled | None = None
) -> dict:
    """A copy of `transformer_options` in which `call` runs every block."""
    call.options = transformer_options
    return with_replacements(
        transformer_options,
        num_blocks,
        lambda index, previous: BlockReplacement(call, index, previous, compiled),
    )


class _Block:
    """A block's arguments; packs with a forward of their own may leave some of them out."""

    def __init__(
        self, args: dict, extra: dict, previous, options: dict, compiled: Compiled | None = None
    ):
        self.args, self.extra, self.previous, self._options = args, extra, previous, options
        self._compiled = compiled
        self.hidden: torch.Tensor = args["img"]
        # what the block gave, beside the hidden state
        self.given: dict = {}

    @property
    def movable(self) -> bool:
        """Whether positions and modulation come along, so that it can run on a part of the tokens."""
        return all(isinstance(self.args.get(name), torch.Tensor) for name in ("pe", "vec"))

    def run(self, hidden, places: Places | None, attend: Attend | None) -> torch.Tensor:
        args, tap = {**self.args, "img": hidden}, None
        if attend is not None:
            options = dict(as_dict(args.get("transformer_options")) or self._options)
            tap = AttentionTap(attend, options.get(OVERRIDE), options)
            options[OVERRIDE] = tap
            args["transformer_options"] = options
        if places is not None:
            args["pe"] = places.take(args["pe"])
            args["vec"] = _modulation(args["vec"], places)
        original = self.extra["original_block"]
        if self._compiled is not None:
            original = self._compiled.block(original, places is not None, tap)
        if self.previous is None:
            self.given = original(args)
        else:
            self.given = self.previous(args, {**self.extra, "original_block": original})
        return self.given["img"]


def _modulation(vec: torch.Tensor, places: Places) -> torch.Tensor:
    """Modulation for the kept tokens: [b, 6, c] and [b, 1, 6, c] fit all tokens as they are.

    [b, f, 6, c] (one per latent frame, TI2V) the host spreads over the tokens evenly. It may go on
    doing so: as many rows for each latent frame as groups of equal size make up its kept tokens.
    """
    if vec.ndim == 3 or vec.shape[1] == 1:
        return vec
    counts, length = places.selection.per_frame, places.selection.length
    if len(counts) == vec.shape[1] and sum(counts) == places.index.shape[1]:
        group = gcd(*counts)
        frames = [frame for frame, count in enumerate(counts) for _ in range(count // group)]
        if len(frames) == len(counts):
            return vec
        # made on the CPU: nothing waits for the device
        return places.once(
            vec, lambda t: t[:, torch.tensor(frames).to(t.device, non_blocking=True)]
        )
    # references beside the video: each kept token takes its own along
    rows = (places.index // -(-length // vec.shape[1]))[..., None, None]
    return places.once(vec, lambda t: t.gather(1, rows.expand(-1, -1, *t.shape[2:])))


class AttentionTap:
    """A chained attention override for one run of one block: hands its attention over.

    Args:
        attend: gets q, k, v and the host's attention, all [b, s, n, d]; gives what it comes to.
        options: the block's.
    """

    def __init__(self, attend: Callable, previous, options: dict):
        self.attend, self.previous = attend, previous
        # a copy: these will hold the tap, and a circle keeps a call's tensors until Python looks
        self.options = {**options}

    def __call__(self, func, q, k, v, *args, **kwargs):
        """q, k, v are [b, s, n * d], or [b, n, s, d] with skip_reshape."""
        if not torch.compiler.is_compiling():
            return self._hand_over(func, q, k, v, *args, **kwargs)
        given = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
        # what it is told of the step is this block's own, when it runs
        given.pop("transformer_options", None)
        mask = given.pop("mask", None)
        merged = q.ndim == 4 and not given.get("skip_output_reshape", False)
        return attend_later(func, q, k, v, mask, tuple(given.items()), merged)

    def now(self, function, q, k, v, mask, constants: dict) -> torch.Tensor:
        """As above, for a call in a graph."""
        given = {**constants, "mask": mask, "transformer_options": self.options}
        return self._hand_over(function, q, k, v, **given)

    def _hand_over(self, func, q, k, v, *args, **kwargs):
        apart = q.ndim == 4
        host = func if self.previous is None else partial(self.previous, func)
        if "heads" not in kwargs and not args:
            # nothing of the host's; what it is cannot be told
            return host(q, k, v, **kwargs)
        if "heads" not in kwargs:
            kwargs, args = {**kwargs, "heads": args[0]}, args[1:]
        heads = kwargs["heads"]

        def attention(q, k, v):
            parts = [t.transpose(1, 2) if apart else t.flatten(2) for t in (q, k, v)]
            out = host(*parts, *args, **{**kwargs, "heads": q.shape[2]})
            return out.transpose(1, 2) if out.ndim == 4 else out.unflatten(-1, (q.shape[2], -1))

        parts = (t.transpose(1, 2) if apart else t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        out = self.attend(*parts, attention)
        return out.transpose(1, 2) if kwargs.get("skip_output_reshape") else out.flatten(2)
