"""One forward pass through the model's blocks, on the tokens that a step keeps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from ..methods.attend import Layout
from ..methods.grid import TokenGrid
from ..methods.importance import Evidence, attention_received, key_size, parts
from ..methods.restore import FROM_KEPT, frame_of, frame_weights, nearest_kept
from ..methods.schedule import millionths
from ..methods.tokens import Selection, TokenPlan, select_tokens
from .compiled import gather_tokens, outside_graphs, scatter_tokens
from .heads import BlockHeads
from .report import SKIPPED
from .skipping import BlockCalls

if TYPE_CHECKING:
    from .past import Key
    from .session import Decision, Session


class BlockCall(Protocol):
    """The host's own block with its inputs, ready to run."""

    hidden: torch.Tensor

    def run(self) -> torch.Tensor:
        """All tokens."""

    def run_watched(self, look: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
        """All tokens; calls look(q, k) with self-attention's q and k [b, s, n, d] as it runs."""

    def run_subset(self, index: torch.Tensor, others: torch.Tensor | None) -> torch.Tensor:
        """Tokens `index` [b, kept] only, as hidden state [b, kept, c].

        With `others` [b, dropped] those tokens still serve as keys and values.
        """


@outside_graphs
class ModelCall:
    """One forward pass through the model's blocks, in order."""

    def __init__(
        self,
        session: Session,
        grid: TokenGrid,
        anchored: Sequence[bool] | None,
        cond_or_uncond: Sequence[int],
        decider: int,
        num_blocks: int,
        mixed: bool = False,
        prompts: Hashable = None,
    ):
        self.mixed = mixed
        self.plan: TokenPlan | None = session.plan.tokens
        self.report = session.report
        self.decision: Decision = session.decision
        self.past = self.decision.past
        self.grid = grid
        self.anchored = anchored
        self.first_trimmed = session.first_trimmed == self.decision.sigma
        self.chunks = len(cond_or_uncond)
        self.decider = decider
        self.num_blocks = num_blocks
        self.current: Selection | None = None
        self.number = self.decision.step.calls
        # the same prompts again are another pass: skip layer guidance
        again = (prompts, tuple(cond_or_uncond))
        self.decision.passes[again] += 1
        self.identity = (*again, self.decision.passes[again])
        self._stretch: _Stretch | None = None
        self._skipping = False
        self._groups = session.heads_at(self.decision.step.progress)
        self._blocks: BlockCalls | None = None
        if self.decision.blocks is not None and not self.decision.blocks.idle:
            self._blocks = BlockCalls(
                self.decision.blocks,
                self.past,
                self.identity,
                self._decider,
                observes=self.number == 1,
                note=self.report.note,
            )
        self._whole_layouts = session.layouts
        self._layouts: dict[int, tuple[Selection, Layout]] = {}

    @property
    def trims(self) -> bool:
        """False when this step does everything: then the host's model runs untouched."""
        parts = self._groups is not None or self._blocks is not None
        return parts or self.trims_tokens or self.spares_tokens

    @property
    def trims_tokens(self) -> bool:
        return not self.mixed and self.decision.budget < self.grid.per_frame

    @property
    def spares_tokens(self) -> bool:
        """Whether all tokens are computed and remembered."""
        return not self.mixed and self.decision.spared

    def heads(self, block_index: int, length: int) -> BlockHeads | None:
        """The block's heads, or None when all of them run as the model has them.

        Args:
            length: tokens of the whole sequence.
        """
        groups = self._groups[block_index] if self._groups is not None else None
        if groups is None:
            return None
        patterned = self.decision.step.patterned
        return BlockHeads(
            *groups,
            lambda kept, others: self._layout(length, kept, others),
            ran=lambda: patterned.add(block_index),
        )

    @torch.compiler.disable
    def _layout(
        self, length: int, kept: torch.Tensor | None, others: torch.Tensor | None
    ) -> Layout:
        if kept is None:
            return self._whole_layouts.setdefault((self.grid, length), Layout(self.grid, length))
        # the selection is held, so that its id stays its own
        known = self._layouts.get(id(self.current))
        if known is None:
            layout = Layout(self.grid, length, kept, self.current.per_frame, others)
            known = self._layouts[id(self.current)] = (self.current, layout)
        return known[1]

    def block(self, block_index: int, call: BlockCall) -> torch.Tensor:
        """Run one block; the result is always the full-length hidden state [b, s, c]."""
        self._skipping = self._blocks is not None and self._blocks.skips(block_index)
        if self._blocks is not None:
            call = self._blocks.wrap(block_index, call)
        if not self.trims_tokens:
            # the choosing block is no part of a stretch where it computes everything anyway
            if self.spares_tokens and (
                self.plan.trim_reselecting or not self.plan.reselects(block_index)
            ):
                return self._remembering(block_index, call)
            self._record(None)
            return call.run()
        if self.plan.trim_reselecting:
            if self.plan.reselects(block_index):
                self._choose(block_index, Evidence(self.grid, self._decider(call.hidden)))
        elif self.plan.reselects(block_index) or self.current is None:
            self._record(None)
            if self._skipping:
                # nothing to choose by; the next block that runs does
                self.current = None
                return call.run()
            return self._reselect(block_index, call)
        if not self.current.dropped.numel():
            self.report.note("every latent frame is given and anchored: all tokens were computed")
            self._record(self.current)
            return call.run()
        if self.plan.remembers:
            return self._remembering(block_index, call)
        self._record(self.current)
        kept, out = self._run_kept(call)
        if self.plan.restore in FROM_KEPT:
            dropped = self.current.dropped_rows(self.chunks)
            update = self._from_kept(out - gather_tokens(call.hidden, kept), kept, dropped)
            update += gather_tokens(call.hidden, dropped)
            full = scatter_tokens(call.hidden, kept, out)
            # in place: a second full-length copy would add to the peak of memory
            return full.scatter_(1, dropped[..., None].expand_as(update), update)
        return scatter_tokens(call.hidden, kept, out)

    def _run_kept(self, call: BlockCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept positions [b, kept] and the block's result there [b, kept, c]."""
        kept, others = self.current.rows(self.chunks), None
        if self.plan.dropped_kv == "keep":
            others = self.current.dropped_rows(self.chunks)
        return kept, call.run_subset(kept, others)

    @torch.compiler.disable
    def _from_kept(self, update, kept, dropped) -> torch.Tensor:
        """Stand-in updates [b, dropped, c] from those of the kept tokens."""
        extra = self.current.extra
        if self.plan.restore == "frame_mean":
            if "weights" not in extra:
                extra["weights"] = frame_weights(self.current.index, self.grid, update.dtype)
            mean = extra["weights"].repeat(self.chunks, 1, 1) @ update
            return gather_tokens(mean, frame_of(dropped, self.grid))
        if "nearest" not in extra:
            extra["nearest"] = nearest_kept(self.current.index, self.current.dropped, self.grid)
        return gather_tokens(update, extra["nearest"].repeat(self.chunks, 1))

    def _remembering(self, block_index: int, call: BlockCall) -> torch.Tensor:
        """A block whose dropped tokens get what they got when they were last computed.

        A stretch is the blocks from one choice to the next. The blocks' own updates are added up
        over it, so that what other nodes add between blocks is not counted twice.
        """
        if self._stretch is None:
            key = (self.identity, block_index)
            if self.decision.spared:
                # the last spared step is the one to repeat; two at once would add to the peak
                self.past.forget(key)
            self._stretch = _Stretch(key, self.past.recall(key, call.hidden))
        stretch, absolute = self._stretch, self.plan.restore == "last_output"
        last = block_index == self.num_blocks - 1 or self.plan.reselects(block_index + 1)
        if stretch.known is None:
            # nothing to fall back on yet
            self._record(None)
            if not (self.first_trimmed or self.decision.spared):
                self.report.note(
                    "after the first steps nothing was remembered for a part of the video (context "
                    "windows that move, or prompts in other batches): all its tokens were computed"
                )
            self.past.ages.pop(self._stretch.start, None)
            out = call.run()
            if not absolute:
                stretch.add(out - call.hidden)
            if last:
                # a copy, because the host may go on in place
                self.past.remember(stretch.key, out.clone() if absolute else stretch.total)
                self._stretch = None
            return out
        self._record(self.current)
        kept, part = self._run_kept(call)
        if not absolute:
            stretch.add_at(kept, part - gather_tokens(call.hidden, kept))
        out = scatter_tokens(call.hidden, kept, part)
        if last:
            dropped = self.current.dropped_rows(self.chunks)
            known = gather_tokens(stretch.known, dropped)
            if not absolute:
                known = known + gather_tokens(call.hidden, dropped)
            # in place: second full-length copies would add to the peak of memory
            out.scatter_(1, dropped[..., None].expand_as(known), known)
            if absolute:
                stretch.add_at(kept, gather_tokens(out, kept))
            self.past.remember(stretch.key, stretch.known)
            self._stretch = None
        return out

    def _reselect(self, block_index: int, call: BlockCall) -> torch.Tensor:
        known = self.decision.selections.get(block_index)
        unused = block_index == self.num_blocks - 1 or self.plan.reselects(block_index + 1)
        if known is not None or unused:
            self.current = self._fitting(known, call.hidden)
            return call.run()
        before = self._decider(call.hidden)
        seen = {}

        # a choice has no gradient
        @torch.no_grad()
        def look(q: torch.Tensor, k: torch.Tensor) -> None:
            # scored at once: held through the block's FFN, q and k would add to its peak of memory
            q, k = self._decider(q), self._decider(k)
            p, names = self.plan, parts(self.plan.importance)
            if "attention" in names:
                seen["received"] = attention_received(
                    self.grid, q, k, p.query_ratio, p.exclude_radius, p.min_queries
                )
            if "key_norm" in names:
                seen["keys"] = key_size(self.grid, k)

        by_attention = self.plan.needs_attention
        after = call.run_watched(look) if by_attention else call.run()
        if by_attention and not seen:
            self.report.note(
                f"block {block_index} ran no self-attention (another node replaced it), so tokens "
                "were not chosen anew there"
            )
            return after
        self._choose(block_index, Evidence(self.grid, before, self._decider(after), **seen))
        return after

    @torch.compiler.disable
    @torch.no_grad()
    def _choose(self, block_index: int, evidence: Evidence) -> None:
        known = self._fitting(self.decision.selections.get(block_index), evidence.before)
        if known is None:
            evidence.age = self.past.ages.get(block_index)
            evidence.change = self.decision.change
            evidence.seed = millionths(self.decision.sigma) * 1000 + block_index
            known = select_tokens(self.plan, evidence, self.decision.budget, self.anchored)
            self.decision.selections[block_index] = known
            self.past.chose(block_index, known, self.grid)
        self.current = known

    def _fitting(self, known: Selection | None, hidden: torch.Tensor) -> Selection | None:
        """A choice made by another call of this step, in this call's layout."""
        length = hidden.shape[1]
        if known is not None and known.length != length:
            # only one of the prompts has a reference
            return known.moved(self.decision.step.grid, self.grid, length)
        return known

    def _decider(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.chunk(self.chunks)[self.decider]

    def _record(self, selection: Selection | None) -> None:
        # the other calls of a step do the same work
        if self.number == 1:
            self.decision.ran.append(SKIPPED if self._skipping else selection)


@outside_graphs
class _Stretch:
    """The blocks from one choice of tokens to the next, in one model call.

    Args:
        key: where `Past` keeps what this stretch gave each token.
        known: that of the step before [b, s, c], or None.
    """

    def __init__(self, key: Key, known: torch.Tensor | None):
        self.key, self.known = key, known
        self.start = key[-1]
        self.total: torch.Tensor | None = None
        self._begun = False

    def add(self, update: torch.Tensor) -> None:
        self.total = update if self.total is None else self.total.add_(update)

    def add_at(self, kept: torch.Tensor, update: torch.Tensor) -> None:
        """Sum up, in place of what was known there, what the tokens `kept` [b, kept] get now."""
        if self._begun:
            # not scatter_add_: its order is not fixed on a GPU
            update = gather_tokens(self.known, kept).add_(update)
        self._begun = True
        places = kept[..., None].expand_as(update)
        if torch.is_grad_enabled():
            # training: autograd holds what was read of it
            self.known = self.known.scatter(1, places, update)
        else:
            self.known.scatter_(1, places, update)
