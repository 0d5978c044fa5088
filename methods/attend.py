"""Attention in which each head has its own pattern, through the host's own attention function.

A cheap pattern is a reshape: the tokens that may see each other become a batch of short sequences.
No kernel and no mask is needed, so every attention backend can run it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from .grid import TokenGrid
from .heads import FRAME, FULL, OFF, TILES, HeadPlan
from .importance import spread

# q, k, v [b, s, n, d] -> [b, s, n, d], for any number of heads
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# queries of each latent frame at most that tell what patterns leave out there
SAMPLED = 8


@dataclass
class Groups:
    """Grid tokens in groups that attend within themselves.

    Args:
        order: int64 [b or 1, tokens], positions in the sequence, group after group; None where
            that is the sequence itself.
        sizes: tokens in each group.
    """

    order: torch.Tensor | None
    sizes: list[int]


@dataclass
class Layout:
    """Where the tokens of a sequence lie in the video, for one run of a block.

    Args:
        grid: the whole video.
        length: tokens of the whole sequence, those outside the grid included.
        kept: int64 [b, s], ascending positions of the tokens that run; None for all.
        per_frame: how many of them each latent frame has; None for all.
        others: int64 [b, m], ascending positions of tokens that are keys and values only, behind
            the kept ones.
    """

    grid: TokenGrid
    length: int
    kept: torch.Tensor | None = None
    per_frame: Sequence[int] | None = None
    others: torch.Tensor | None = None
    # by pattern and device
    _groups: dict[tuple, tuple[Groups, Groups | None]] = field(default_factory=dict)
    _sampled: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    _few: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    @property
    def outside(self) -> int:
        """Tokens in front of the grid and behind it: references; they are never dropped."""
        return self.length - self.grid.tokens

    def counts(self) -> list[int]:
        """Tokens of each latent frame that run."""
        whole = [self.grid.per_frame] * self.grid.frames
        return whole if self.per_frame is None else list(self.per_frame)

    def groups(self, pattern: str, device: torch.device) -> tuple[Groups, Groups | None]:
        """Groups of the queries, and of the keys that follow behind them."""
        if (pattern, device) not in self._groups:
            counts = self.counts()
            own = self._group(pattern, counts, self.kept, self.grid.start, device)
            rest = None
            if self.others is not None:
                left = [self.grid.per_frame - count for count in counts]
                behind = sum(counts) + self.outside
                rest = self._group(pattern, left, self.others, 0, device, behind)
            self._groups[pattern, device] = own, rest
        return self._groups[pattern, device]

    def sampled(self, device: torch.device) -> torch.Tensor:
        """int64 [frames * m], places of a few tokens of each latent frame among those that run."""
        if device not in self._sampled:
            counts = self.counts()
            places = spread(counts, sampled_queries(counts) // len(counts)) + self.grid.start
            self._sampled[device] = places.to(device, non_blocking=True)
        return self._sampled[device]

    def few_groups(
        self, pattern: str, device: torch.device
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Places in the sample, and positions of the keys that these see, group by group."""
        if (pattern, device) not in self._few:
            # how many of the sample lie in a group is read, so on the CPU
            cpu, first, tokens = torch.device("cpu"), self.grid.start, self.grid.tokens
            groups = self._group(pattern, self.counts(), None, 0, cpu)
            order = torch.arange(tokens) if groups.order is None else groups.order[0]
            apart = torch.arange(self.outside)
            apart = torch.where(apart < first, apart, apart + tokens)
            found = self._few[pattern, device] = []
            for own in (order + first).split(groups.sizes):
                mine = torch.isin(self.sampled(cpu), own).nonzero()[:, 0]
                pair = mine, torch.cat([own, apart])
                found.append(tuple(places.to(device, non_blocking=True) for places in pair))
        return self._few[pattern, device]

    def _group(self, pattern, counts, positions, first, device, offset: int = 0) -> Groups:
        """`first` skips what lies before the grid in `positions`."""
        start = offset + first
        if pattern == FRAME:
            if start == 0:
                return Groups(None, counts)
            return Groups(torch.arange(sum(counts), device=device)[None] + start, counts)
        tiles = TILES[pattern] ** 2
        if positions is None:
            at = torch.arange(self.grid.tokens, device=device)[None]
        else:
            at = positions[:, first : first + sum(counts)] - self.grid.start
        # the tokens of a latent frame in the order of their tile, cut into equal parts: exact tiles
        # where the picture divides, and as many tokens for each where it does not or some are left out
        grid, side = self.grid, TILES[pattern]
        frame, place = at // grid.per_frame, at % grid.per_frame
        row, column = place // grid.width, place % grid.width
        tile = row * side // grid.height * side + column * side // grid.width
        by_tile = (frame * tiles + tile).argsort(stable=True, dim=1)
        parts = [_split(count, tiles) for count in counts]
        group = torch.repeat_interleave(
            torch.arange(tiles).repeat(len(counts)), torch.tensor(parts).flatten()
        )
        # counted on the CPU, so that nothing waits for the device
        group = group.to(device, non_blocking=True)
        order = by_tile.gather(1, group.argsort(stable=True).expand(len(by_tile), -1))
        return Groups(order + start, [sum(sizes) for sizes in zip(*parts, strict=True)])


def sampled_queries(counts: Sequence[int]) -> int:
    """Queries that tell what patterns leave out, as many of each latent frame's `counts` tokens."""
    return len(counts) * min(SAMPLED, *counts)


def _split(count: int, parts: int) -> list[int]:
    """Sizes of equal parts of `count`, the first ones larger by one where it does not divide."""
    size, more = divmod(count, parts)
    return [size + (part < more) for part in range(parts)]


def pattern_pairs(pattern: str, grid: TokenGrid, per_frame: Sequence[int] | None = None) -> int:
    """Query-key pairs that a head of this pattern computes on the grid's tokens."""
    counts = per_frame or [grid.per_frame] * grid.frames
    if pattern == OFF:
        return 0
    if pattern == FULL:
        return sum(counts) ** 2
    if pattern == FRAME:
        return sum(count**2 for count in counts)
    parts = [_split(count, TILES[pattern] ** 2) for count in counts]
    return sum(sum(sizes) ** 2 for sizes in zip(*parts, strict=True))


class HeadGroups:
    """The heads of one attention by pattern.

    Args:
        patterns: name in `PATTERNS` of every head.
        corrected: as in `HeadPlan`.
    """

    def __init__(self, patterns: Sequence[str], corrected: bool = False):
        self.patterns, self.corrected = tuple(patterns), corrected
        self.whole = all(name == FULL for name in self.patterns)
        self._index: dict[torch.device, dict[str, torch.Tensor]] = {}

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Heads of every pattern."""
        if device not in self._index:
            self._index[device] = {
                # made on the CPU: nothing waits for the device
                name: torch.tensor(
                    [h for h, pattern in enumerate(self.patterns) if pattern == name]
                ).to(device, non_blocking=True)
                for name in sorted(set(self.patterns))
            }
        return self._index[device]

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention: Attention,
        layout: Layout | None = None,
    ) -> torch.Tensor:
        """The attention's output [b, s, n, d]; without a correction heads that are off give zeros.

        Args:
            q, k, v: [b, s, n, d]; keys and values may be more than queries.
            layout: of self-attention; cross-attention has none and only FULL and OFF.
        """
        if self.whole:
            return attention(q, k, v)
        out = torch.empty_like(q)
        for name, heads in self.on(q.device).items():
            if name == OFF:
                out.index_fill_(2, heads, 0.0)
            elif name == FULL:
                _put(out, attention(*(t.index_select(2, heads) for t in (q, k, v))), heads)
            else:
                _within(out, q, k, v, heads, layout, name, attention)
        if self.corrected and layout is not None:
            self._correct(out, q, k, v, attention, layout)
        return out

    def _correct(self, out, q, k, v, attention: Attention, layout: Layout) -> None:
        """Add to each latent frame what a few of its tokens lack, their mean."""
        some, heads = layout.sampled(q.device), self.on(q.device)
        exact = attention(q.index_select(1, some), k, v).to(out.dtype)
        lacks = (exact - out.index_select(1, some)).unflatten(1, (layout.grid.frames, -1))
        lacks = lacks.mean(2)
        if FULL in heads:
            lacks.index_fill_(2, heads[FULL], 0.0)
        counts, start = layout.counts(), layout.grid.start
        video = out[:, start : start + sum(counts)]
        if len(set(counts)) == 1:
            video.unflatten(1, (len(counts), -1)).add_(lacks[:, :, None])
        else:
            # of parts made at once none may change in place where gradients are asked for
            ends = list(accumulate(counts))
            for frame, (end, count) in enumerate(zip(ends, counts, strict=True)):
                video[:, end - count : end].add_(lacks[:, frame : frame + 1])
        if layout.outside and OFF in heads:
            # what lies outside the video sees everything but in heads that are off
            off, mean = heads[OFF], lacks.mean(1, keepdim=True).index_select(2, heads[OFF])
            for part in (out[:, :start], out[:, start + sum(counts) :]):
                part.index_copy_(2, off, mean.expand(-1, part.shape[1], -1, -1))


def attend_few(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention: Attention,
    layout: Layout,
    pattern: str,
) -> torch.Tensor:
    """What all heads would give the sampled tokens alone if they ran in a cheap pattern.

    Args:
        q: of `layout.sampled` [b, m, n, d]; k, v of the whole sequence.
    """
    if pattern == FRAME and not layout.outside:
        frames = [t.unflatten(1, (layout.grid.frames, -1)).flatten(0, 1) for t in (q, k, v)]
        return attention(*frames).unflatten(0, (len(q), -1)).flatten(1, 2)
    out = torch.empty_like(q)
    # one after the other: the keys and values of all groups at once would add to the peak of memory
    for own, seen in layout.few_groups(pattern, q.device):
        if len(own):
            some = q.index_select(1, own), k.index_select(1, seen), v.index_select(1, seen)
            out.index_copy_(1, own, attention(*some).to(out.dtype))
    return out


# self- and cross-attention heads of a block
Pair = tuple[HeadGroups, HeadGroups]


def head_groups(plan: HeadPlan) -> list[Pair | None]:
    """Self- and cross-attention heads per block; None where a block is left alone."""
    pairs = zip(plan.self_attention, plan.cross_attention, strict=True)
    return [
        (HeadGroups(own, plan.corrected), HeadGroups(cross)) if plan.changes(index) else None
        for index, (own, cross) in enumerate(pairs)
    ]


def _within(out, q, k, v, heads, layout: Layout, pattern: str, attention: Attention) -> None:
    """Every grid token sees its group and what lies outside the grid; that sees everything."""
    own, rest = layout.groups(pattern, q.device)
    outside, kept = layout.outside, sum(own.sizes)
    simple = own.order is None and rest is None and not outside
    if simple and len(set(own.sizes)) == 1:
        some = (t.index_select(2, heads) for t in (q, k, v))
        groups = (t.unflatten(1, (len(own.sizes), -1)).flatten(0, 1) for t in some)
        _put(out, attention(*groups).unflatten(0, (len(q), -1)).flatten(1, 2), heads)
        return
    if own.order is None:
        own = Groups(torch.arange(kept, device=q.device)[None], own.sizes)
    if outside:
        apart = torch.arange(outside, device=q.device)
        # before the grid's tokens, and behind those that are kept
        apart = torch.where(apart < layout.grid.start, apart, apart + kept)[None, None]
        some = _take(q, heads, apart), k.index_select(2, heads), v.index_select(2, heads)
        _put(out, attention(*some), heads, apart)
        extra = [_take(t, heads, apart) for t in (k, v)]
    for index, behind, count in _classes(own, rest):
        keys = index if behind is None else torch.cat([index, behind], -1)
        parts = [_take(q, heads, index), _take(k, heads, keys), _take(v, heads, keys)]
        if outside:
            for at, t in enumerate(extra, 1):
                shared = t[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)
                parts[at] = torch.cat([parts[at], shared], 1)
        _put(out, attention(*parts), heads, index)


def _classes(own: Groups, rest: Groups | None):
    """Yield groups of one size: query and further key positions [b, groups, size], their number."""
    more = rest.sizes if rest is not None else [0] * len(own.sizes)
    for sizes in sorted(set(zip(own.sizes, more, strict=True)), reverse=True):
        members = [i for i, both in enumerate(zip(own.sizes, more, strict=True)) if both == sizes]
        if not sizes[0]:
            continue
        index = _members(own, members)
        yield index, _members(rest, members) if sizes[1] else None, len(members)


def _members(groups: Groups, members: list[int]) -> torch.Tensor:
    starts = [0, *accumulate(groups.sizes)]
    parts = [groups.order[:, starts[i] : starts[i + 1]] for i in members]
    return torch.stack(parts, 1)


def _take(tensor: torch.Tensor, heads: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Heads of [b, s, n, d] at positions [b or 1, groups, size] -> [b * groups, size, heads, d].

    Both at once, so that they are read and written once.
    """
    return tensor[_samples(tensor, index), index[..., None], heads].flatten(0, 1)


def _put(out: torch.Tensor, result, heads: torch.Tensor, index=None) -> None:
    """The inverse of `_take`, into `out` [b, s, n, d]; without an index all positions."""
    result = result.to(out.dtype)
    if index is None:
        out.index_copy_(2, heads, result)
        return
    groups = result.unflatten(0, (len(out), -1))
    out[_samples(out, index), index[..., None], heads] = groups


def _samples(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Number of each sample, beside positions [b or 1, groups, size] and heads."""
    return torch.arange(len(tensor), device=index.device)[:, None, None, None]


def attention_share(plan: HeadPlan, grid: TokenGrid, text_tokens: int) -> float:
    """Share of the attention's FLOPs that a plan computes, self- and cross-attention together."""
    own = [name for heads in plan.self_attention for name in heads]
    cross = [name for heads in plan.cross_attention for name in heads]
    pairs = {name: pattern_pairs(name, grid) for name in {FULL, *own}}
    cross_pairs = grid.tokens * text_tokens
    left = sum(pairs[name] for name in own) + cross.count(FULL) * cross_pairs
    return left / (len(own) * pairs[FULL] + len(cross) * cross_pairs)
