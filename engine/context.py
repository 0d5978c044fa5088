"""Keys and values of all tokens, packed, where there is room: beside the blocks, or in RAM.

From RAM each block's come by a slot on the GPU, fetched while the block before computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..kernels import Packed, store_rows

log = logging.getLogger(__name__)

# blocks that are on the GPU at a time: the one that computes, and the next
AHEAD = 2
# pinned memory comes in powers of two; below this the rest is not worth a piece of its own
SMALLEST = 1 << 20


@dataclass(frozen=True)
class Room:
    """Where keys and values are kept.

    Args:
        device: None is where they are computed.
        bits: of a number, 8 or 4; a row of a head has a scale of its own.
        more: whether there is room for those of a further part of the video, as things stand.
    """

    device: torch.device | None = None
    bits: int = 8
    more: Callable[[], bool] = field(default=lambda: True, compare=False)


def context_bytes(blocks: int, tokens: int, heads: int, head_dim: int, bits: int) -> int:
    """Bytes of the context of one prompt row."""
    row = head_dim * bits // 8 + torch.float16.itemsize
    return 2 * blocks * tokens * heads * row


class Context:
    """One prompt's, by block, where they are computed."""

    def __init__(self, bits: int):
        self.bits = bits
        self.blocks: dict[int, Packed] = {}

    def write(self, block: int, k, v, index: torch.Tensor | None) -> None:
        """Take in keys and values [b, s, n, d] of all tokens, or of those at `index` [b, s]."""
        into = () if index is None else (self.blocks[block], index)
        self.blocks[block] = store_rows(k, v, self.bits, *into)

    def read(self, block: int) -> Packed:
        return self.blocks[block]

    @property
    def bytes(self) -> int:
        return sum(piece.nbytes for pieces in self.blocks.values() for piece in pieces)

    def clear(self) -> None:
        self.blocks.clear()


@dataclass(eq=False)
class Slot:
    """Room on the GPU for one block of one prompt.

    Attributes:
        flat: uint8 [bytes].
        holds: the prompt's context and the block.
        done: when the last copy into it or out of it is through; None where copies are waited for.
    """

    flat: torch.Tensor
    holds: tuple[ContextInRam, int] | None = None
    done: torch.cuda.Event | None = None


class Lane:
    """Copies between RAM and the GPU beside the computing, for all prompts of a run.

    Attributes:
        slots: the one that was used last is the last.
    """

    def __init__(self):
        self.slots: list[Slot] = []
        # prompts of a model call
        self._rows = 1
        self._device: torch.device | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def pinned(self) -> bool:
        """Whether there is RAM that a GPU copies from without waiting."""
        return self._stream is not None

    def expect(self, rows: int) -> None:
        """So many prompts come in a model call."""
        self._rows = max(self._rows, rows)

    def find(self, context: ContextInRam, block: int) -> Slot | None:
        """The slot that holds a block, now the one used last."""
        for slot in self.slots:
            if slot.holds == (context, block):
                self.slots.remove(slot)
                self.slots.append(slot)
                return slot
        return None

    def take(self, context: ContextInRam, block: int, size: int, device: torch.device) -> Slot:
        """A slot for a block of `size` bytes, in place of what was used longest ago."""
        if self._stream is None and device.type == "cuda":
            self._device, self._stream = device, torch.cuda.Stream(device)
        if len(self.slots) < AHEAD * self._rows:
            slot = Slot(torch.empty(size, dtype=torch.uint8, device=device))
        else:
            slot = self.slots.pop(0)
            if len(slot.flat) < size:
                self.wait(slot)
                slot.flat = slot.flat.new_empty(size)
        slot.holds = (context, block)
        self.slots.append(slot)
        return slot

    def copy(self, slot: Slot, pieces: list[torch.Tensor], back: bool = False) -> None:
        """Bring pieces of RAM into a slot, or back out, after what the GPU was told so far."""
        parts = slot.flat[: sum(map(len, pieces))].split([len(piece) for piece in pieces])
        pairs = list(zip(pieces, parts, strict=True) if back else zip(parts, pieces, strict=True))
        if self._stream is None:
            for into, source in pairs:
                into.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for into, source in pairs:
                into.copy_(source, non_blocking=True)
            slot.done = self._stream.record_event()

    def wait(self, slot: Slot) -> None:
        """Let the GPU begin with a slot only when its copy is through."""
        if slot.done is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.done)

    def forget(self, context: ContextInRam) -> None:
        """Let go of a prompt's slots."""
        for slot in [slot for slot in self.slots if slot.holds[0] is context]:
            self.wait(slot)
            self.slots.remove(slot)

    def close(self) -> None:
        """End a run: give back what torch would go on keeping of the RAM that was pinned."""
        if self.pinned:
            self._stream.synchronize()
            empty_host_cache()


def empty_host_cache() -> None:
    """Hand unused pinned RAM back to the system, where this torch can."""
    known = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
    known = known or getattr(torch._C, "_host_emptyCache", None)
    if known is not None:
        known()


class ContextInRam:
    """As `Context`, in pinned RAM."""

    def __init__(self, bits: int, lane: Lane):
        self.bits, self.lane = bits, lane
        self.blocks: dict[int, list[torch.Tensor]] = {}
        self._size: tuple[int, ...] = ()
        self._device: torch.device | None = None

    def write(self, block: int, k, v, index: torch.Tensor | None) -> None:
        if index is None:
            if tuple(k.shape) != self._size:
                self.clear()
            self._size, self._device = tuple(k.shape), k.device
            slot = self.lane.find(self, block) or self._slot(block)
            self.lane.wait(slot)
        else:
            slot = self._fetched(block)
        store_rows(k, v, self.bits, self._view(slot), index)
        if block not in self.blocks:
            self.blocks[block] = ram(self._bytes, self.lane.pinned)
        self.lane.copy(slot, self.blocks[block], back=True)

    def read(self, block: int) -> Packed:
        slot = self._fetched(block)
        if block + 1 in self.blocks:
            self._fetch(block + 1)
        return self._view(slot)

    def clear(self) -> None:
        self.blocks.clear()
        self.lane.forget(self)

    @property
    def bytes(self) -> int:
        return len(self.blocks) * self._bytes

    @property
    def _bytes(self) -> int:
        batch, *sizes = self._size
        return batch * context_bytes(1, *sizes, self.bits)

    def _slot(self, block: int) -> Slot:
        return self.lane.take(self, block, self._bytes, self._device)

    def _fetch(self, block: int) -> Slot:
        slot = self.lane.find(self, block)
        if slot is None:
            slot = self._slot(block)
            self.lane.copy(slot, self.blocks[block])
        return slot

    def _fetched(self, block: int) -> Slot:
        slot = self._fetch(block)
        self.lane.wait(slot)
        return slot

    def _view(self, slot: Slot) -> Packed:
        batch, tokens, heads, dim = self._size
        rows, width = batch * tokens * heads, dim * self.bits // 8
        codes = slot.flat[: 2 * rows * width].view(2, batch, tokens, heads, width)
        scales = slot.flat[2 * rows * width : self._bytes].view(torch.float16)
        scales = scales.view(2, batch, tokens, heads)
        return codes[0], scales[0], codes[1], scales[1]


def ram(size: int, pinned: bool) -> list[torch.Tensor]:
    """Pieces of RAM, uint8, that are `size` bytes together.

    Raises:
        OutOfMemoryError: there is not so much.
    """
    pieces = []
    while size:
        part = 1 << (size.bit_length() - 1) if size >= SMALLEST else size
        try:
            piece = torch.empty(part, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            if not pinned:
                raise torch.OutOfMemoryError(str(error)) from error
            log.warning(
                "no pinned memory (%s): the context is copied at the speed of other RAM", error
            )
            pinned = False
            continue
        pieces.append(piece)
        size -= part
    return pieces
