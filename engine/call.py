"""One pass through the model's blocks, each by its row of the step's program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..methods.attend import Layout, Pair
from ..methods.grid import TokenGrid, gather_tokens, scatter_tokens
from ..methods.importance import attention_received
from ..methods.role_plan import measure_roles
from ..methods.shares import latent_mask
from ..methods.tokens import Selection, select_tokens
from .block import Attend, HostBlock, Places
from .compiled import outside_graphs
from .memory import Memory, Part, change_between
from .plan import TrimPlan
from .program import ALL, KEPT, READ, SKIP, UPDATE, WRITE, Row
from .record import Record, Step

OUT_OF_MEMORY = (
    "there was not enough memory for the keys and values of left out tokens: steps are whole or "
    "repeated from there on"
)


# never a graph of their own
_gather, _scatter = torch.compiler.disable(gather_tokens), torch.compiler.disable(scatter_tokens)


@dataclass(eq=False)
class Shared:
    """What all model calls of a run share.

    Args:
        layouts: of whole sequences, by grid and length.
    """

    plan: TrimPlan
    record: Record
    memory: Memory = field(default_factory=Memory)
    heads: list[Pair | None] | None = None
    layouts: dict[tuple[TokenGrid, int], Layout] = field(default_factory=dict)


@dataclass
class StepState:
    """One step: made by the first call that sees it, shared by the others."""

    step: Step
    part: Part
    window: Hashable
    anchored: Sequence[bool] | None
    selections: dict[int, Selection] = field(default_factory=dict)
    # calls of each prompt so far: the same one again is another pass (skip layer guidance)
    passes: Counter = field(default_factory=Counter)
    # by block
    rows: dict[int, Row] = field(default_factory=dict)
    choices: list[Selection | None] = field(default_factory=list)
    # whether the first call came to the model, or another node answered it; None is not known
    reached: bool | None = None
    # by block: what its heads do
    shown: dict[int, torch.Tensor] = field(default_factory=dict)


@outside_graphs
class Call:
    """One pass through the model's blocks, in order, by the step's program.

    Attributes:
        rows: the program's, or all whole where this call's prompts need it.
    """

    def __init__(
        self,
        shared: Shared,
        state: StepState,
        grid: TokenGrid,
        chunks,
        keys,
        decider: int,
        alone: bool,
    ):
        self.shared, self.state, self.alone = shared, state, alone
        self.grid, self.chunks, self.keys, self.decider = grid, chunks, keys, decider
        # the other calls of a step do the same work
        self.first = state.step.calls == 1
        self.rows = self._own_rows()
        # tokens of the whole sequence
        self._length = 0
        # the host's, for blocks that are handed none
        self.options: dict = {}
        self._start()

    def _start(self) -> None:
        """Nothing came through the blocks yet."""
        self._places: dict[int, Places] = {}
        self.current: Selection | None = None
        # the full sequence while only kept tokens go from block to block
        self._full: torch.Tensor | None = None
        # what the choosing block gave, where nobody else has it
        self._made: torch.Tensor | None = None
        # whether a block really ran on a part of the tokens
        self._left_out = False

    def _own_rows(self) -> tuple[Row, ...]:
        """The program's rows; all whole where a prompt of this call has nothing to repeat."""
        program, part = self.state.step.program, self.state.part
        held = not program.partial or part.has_context(self.keys)
        if program.share == 1.0 or (held and part.known(self.keys)):
            return program.rows
        if not self.shared.memory.lost:
            self.shared.record.note(
                "a prompt came that had nothing to repeat yet: it was computed in full beside the "
                "others"
            )
        later = any(row.context == UPDATE for row in program.rows)
        row = Row(ALL, self.grid.tokens, context=WRITE if later else "")
        return (row,) * len(program.rows)

    def watched_between(self) -> None:
        """Somebody else looks between the blocks after all; told before the first of them."""
        self.alone = False
        if self.first:
            step = self.state.step
            step.program = replace(step.program, alone=False)

    @property
    def repeats(self) -> bool:
        """Whether the host need not run the model: `repeated` has the answer."""
        return all(row.run == SKIP for row in self.rows)

    @property
    def touches_blocks(self) -> bool:
        """False when this call's blocks run as they are: then the host's model runs untouched."""
        return not all(row.untouched for row in self.rows)

    def run(self, model: Callable):
        """What the model gives; without keys and values once more where they left it no memory."""
        try:
            return model()
        except torch.OutOfMemoryError:
            if not self.shared.memory.holds_context:
                raise
        # behind the handler, which keeps what the failed call had made
        self._lose_context()
        return model()

    def _lose_context(self) -> None:
        """Begin anew, without what was remembered of keys and values."""
        self.shared.memory.lose_context()
        self.shared.record.note(OUT_OF_MEMORY)
        state = self.state
        program = state.step.program.without_context()
        if self.first:
            state.step.program = program
            for seen in (state.rows, state.choices, state.selections, state.shown):
                seen.clear()
        self.rows = program.rows
        self._start()

    def repeated(self) -> torch.Tensor:
        """The velocities of a step that computes nothing [b, c, f, h, w]."""
        part, sigma = self.state.part, self.state.step.sigma
        pairs = zip(self.keys, self.chunks, strict=True)
        return torch.cat([part.repeat(key, sigma, latent) for key, latent in pairs])

    @torch.no_grad()
    def output(self, velocity: torch.Tensor) -> torch.Tensor:
        """What the model gave [b, c, f, h, w], with the velocity of what was left out repeated."""
        if not self.state.step.program.remembers:
            return velocity
        batch = sum(map(len, self.chunks))
        if velocity.shape != (batch, *self.chunks[0].shape[1:]):
            self.shared.record.note(
                "the model gave a video of another size than it was given: nothing is repeated"
            )
            return velocity
        kept = mask = None
        # tokens that TAPE drops have a velocity of their own
        if self.state.step.program.partial and self._left_out:
            kept = self._kept(self.current)
            mask = latent_mask(kept, self.grid, velocity.shape[2:])
        parts = velocity.chunk(len(self.keys))
        if self.first:
            known = self.state.part.prompts.get(self.keys[self.decider])
            change = None
            if known is not None and known.velocity is not None:
                change = change_between(parts[self.decider], known.velocity, self.grid)
            self.state.part.saw(change, kept)
        sigma, latents = self.state.step.sigma, self.chunks
        return torch.cat(
            [
                self.state.part.remember(key, one, sigma, latent, mask)
                for key, one, latent in zip(self.keys, parts, latents, strict=True)
            ]
        )

    def _kept(self, selection: Selection) -> torch.Tensor:
        kept = torch.ones(
            len(selection.index), selection.length, dtype=torch.bool, device=selection.index.device
        )
        return self.grid.cut(kept.scatter_(1, selection.dropped, False))

    def block(self, index: int, host: HostBlock) -> torch.Tensor:
        """Run one block by its row.

        The result is the full sequence [b, s, c], or, while nobody else looks at it, the kept
        tokens alone [b, kept, c] until the next block that needs all.
        """
        row, hidden = self.rows[index], host.hidden
        if self._full is None:
            self._length = hidden.shape[1]
        last = index == len(self.rows) - 1
        if row.run == SKIP:
            self._ran(index, row)
            return self._whole(hidden) if last else hidden
        if row.run == ALL:
            return self._run_all(index, row, host)
        if self.state.step.program.partial and self.current is None:
            self.current = self._choose_by_change()
        whole = self.current is None or not self.current.dropped.numel() or not host.movable
        reads = row.context in (READ, UPDATE)
        if whole or (reads and not self.state.part.has_context(self.keys, index)):
            # nothing to leave out; or a forward of another pack keeps to itself what the tokens need,
            # another node skipped the block when all others were remembered, or there was no room
            context = WRITE if row.context == UPDATE else ""
            row = Row(ALL, self.grid.tokens, heads=row.heads, context=context)
            return self._run_all(index, row, host)
        places = self._at(self.current)
        short = self._full is not None
        kept = hidden if short else _gather(hidden, places.index)
        attend = self._attend(index, row, places, {})
        self._left_out = True
        if self.alone and not short:
            self._full = hidden
        out = host.run(kept, places, attend)
        self._ran(index, row, attend)
        if not self.alone:
            return _scatter(hidden, places.index, out)
        return self._whole(out) if last else out

    def _run_all(self, index: int, row: Row, host: HostBlock) -> torch.Tensor:
        """Run a block on all tokens."""
        seen: dict[str, torch.Tensor] = {}
        attend = self._attend(index, row, None, seen)
        out = host.run(self._whole(host.hidden), None, attend)
        if row.choose:
            self._choose_by_attention(index, seen)
            self._made = out if self.alone else None
        self._ran(index, row, attend)
        return out

    def _whole(self, hidden: torch.Tensor) -> torch.Tensor:
        """The full sequence, when only kept tokens came."""
        full, self._full = self._full, None
        if full is None:
            return hidden
        own = full is self._made and not torch.is_grad_enabled()
        return _scatter(full, self._at(self.current).index, hidden, in_place=own)

    def _at(self, selection: Selection) -> Places:
        known = self._places.get(id(selection))
        if known is None:
            # holds the selection, so that its id stays its own
            known = self._places[id(selection)] = Places(selection, len(self.keys))
        return known

    def _ran(self, index: int, row: Row, attend: Attend | None = None) -> None:
        if not self.first:
            return
        asked = row.heads or row.context or row.measure
        if asked and (attend is None or not attend.seen):
            row = replace(row, heads=False, context="", measure=False)
        self.state.rows[index] = row
        self.state.choices.append(self.current if row.run == KEPT else None)

    def _attend(self, index: int, row: Row, places: Places | None, seen: dict) -> Attend | None:
        """What the block's attention is to do and to show; `seen` takes in what it shows."""
        if not row.looked_into:
            return None
        look, show = self._look(index, row, places, seen), self._show(index, row)
        join = None
        if row.context in (READ, UPDATE) and places is not None:

            def join(k, v):
                return self.state.part.join(self.keys, index, k, v, places.dropped)

        if not row.heads:
            return Attend(look, join, show=show)
        layout = self._layout(places, join is not None)
        return Attend(look, join, self.shared.heads[index], layout, show)

    def _show(self, index: int, row: Row):
        """Takes in what a block's heads do."""
        if not (row.measure and self.first):
            return None

        @torch.no_grad()
        def show(q, k, v, attention) -> None:
            parts = (self._own(t) for t in (q, k, v))
            self.state.shown[index] = measure_roles(*parts, attention, self._layout(None, False))

        return show

    def _look(self, index: int, row: Row, places: Places | None, seen: dict):
        def score(q, k, v) -> None:
            # scored at once: held through the FFN, q and k would add to the peak of memory
            seen["received"] = attention_received(self.grid, self._own(q), self._own(k))

        def keep(q, k, v) -> None:
            try:
                self.state.part.write(
                    self.keys, index, k, v, None if places is None else places.index
                )
            except torch.OutOfMemoryError:
                # a step that reads them goes on with what there is
                self.shared.memory.lose_context(held=self.state.step.program.partial)
                self.shared.record.note(OUT_OF_MEMORY)

        wanted = [score] if row.choose and index not in self.state.selections else []
        if row.context in (WRITE, UPDATE) and not self.shared.memory.lost:
            wanted.append(keep)
        if not wanted:
            return None

        # a choice has no gradient
        @torch.no_grad()
        def look(q, k, v) -> None:
            for one in wanted:
                one(q, k, v)

        return look

    @torch.compiler.disable
    def _layout(self, places: Places | None, behind: bool) -> Layout:
        """Where the tokens of a run of a block lie in the video.

        Args:
            behind: the dropped tokens are keys and values behind the kept ones.
        """
        key = (self.grid, self._length)
        if places is None:
            return self.shared.layouts.setdefault(key, Layout(*key))
        others = places.dropped if behind else None
        per_frame = places.selection.per_frame
        return places.layout(lambda: Layout(*key, places.index, per_frame, others))

    @torch.compiler.disable
    def _choose_by_attention(self, index: int, seen: dict) -> None:
        """TAPE's choice, for the blocks behind this one."""
        known = self.state.selections.get(index)
        if known is None and not seen:
            self.shared.record.note(
                f"block {index} ran no self-attention (another node replaced it), so tokens were "
                "not chosen anew there"
            )
            return
        if known is None:
            plan, program = self.shared.plan.tokens, self.state.step.program
            anchored = self.state.anchored if plan.anchor else None
            known = self.state.selections[index] = select_tokens(
                seen["received"], self.grid, self._length, program.budget,
                alpha=plan.alpha, anchored=anchored,
            )  # fmt: skip
        self.current = self._fitting(known)

    @torch.compiler.disable
    def _choose_by_change(self) -> Selection | None:
        """Where leaving a token out once more would cost most."""
        known = self.state.selections.get(0)
        if known is None:
            worth = self.state.part.worth(self.grid)
            if worth is None:
                return None
            known = self.state.selections[0] = select_tokens(
                worth, self.grid, self._length, self.state.step.program.budget
            )
        return self._fitting(known)

    def _fitting(self, known: Selection) -> Selection:
        """A choice made by another call of this step, in this call's layout."""
        if known.length != self._length:
            # only one of the prompts has a reference
            return known.moved(self.state.step.program.grid, self.grid, self._length)
        return known

    def _own(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.chunk(len(self.keys))[self.decider]
