"""Keys and values in RAM: what a GPU's stream does late or at once may not be seen.

No GPU here: a stand-in of the lane puts its copies off until somebody waits for them.
"""

import pytest
import torch

from wantrim.engine import context, memory
from wantrim.engine.context import AHEAD, SMALLEST, Context, ContextInRam, Lane, ram
from wantrim.engine.plan import TrimPlan
from wantrim.methods.shares import Shares
from wantrim.tests.small_wan import random_wan
from wantrim.tests.test_engine import BLOCKS, HEADS, SIGMAS, run, same

RAM = torch.device("cpu")
PLAN = TrimPlan(shares=Shares(SIGMAS, (1, 1, 0.4, 0.25, 0, 0.4)))


class LateLane(Lane):
    """Copies happen when somebody waits for one of them, in their order; until then there is rubbish."""

    def __init__(self):
        super().__init__()
        self.asked, self.done = [], []

    def copy(self, slot, pieces, back=False):
        late = super().copy
        self.done.append(("asked", slot.holds[1], back))
        if not back:
            # what is on its way out of it comes first, whenever that is
            self._through(slot)
            slot.flat.fill_(255)
        self.asked.append((slot, lambda: late(slot, pieces, back)))

    def wait(self, slot):
        self.done.append(("waited", slot.holds[1]))
        self._through(slot)

    def _through(self, slot):
        mine = [number for number, (one, _) in enumerate(self.asked) if one is slot]
        for _ in range(mine[-1] + 1 if mine else 0):
            self.asked.pop(0)[1]()


@pytest.fixture(scope="module")
def wan():
    return random_wan(BLOCKS)


def in_ram(monkeypatch, lane, bits=8) -> list[Lane]:
    lanes, room = [], memory.Room
    monkeypatch.setattr(memory, "Lane", lambda: lanes.append(lane()) or lanes[-1])
    monkeypatch.setattr(memory, "Room", lambda: room(RAM, bits))
    return lanes


@pytest.mark.parametrize("lane", [Lane, LateLane])
@pytest.mark.parametrize("split", [(), (2, 3), tuple(range(6))], ids=["", "some", "all"])
@pytest.mark.parametrize(
    "plan", [PLAN, TrimPlan(heads=HEADS, shares=PLAN.shares)], ids=["", "heads"]
)
def test_a_context_in_ram_is_the_one_beside_the_blocks(wan, monkeypatch, lane, split, plan):
    expected = run(wan, plan, split=split)
    lanes = in_ram(monkeypatch, lane)
    assert same(run(wan, plan, split=split), expected)
    assert lanes and not any(one.slots for one in lanes)


def test_a_block_is_fetched_while_the_one_before_computes(monkeypatch):
    wan = random_wan(BLOCKS)
    lanes = in_ram(monkeypatch, LateLane)
    for index, block in enumerate(wan.blocks):

        def note(*_, index=index):
            for lane in lanes:
                lane.done.append(("ran", index))

        block.ffn.register_forward_pre_hook(note)
    # the last step only reads
    run(wan, TrimPlan(shares=Shares(SIGMAS, (1, 1, 1, 1, 1, 0.4))), split=tuple(range(6)))
    (done,) = [lane.done for lane in lanes if lane.done]
    steps = [one for one in done if one[0] != "waited"]
    # both prompts' calls of the last step: each block is asked for once, and runs once
    for call in (steps[-4 * BLOCKS : -2 * BLOCKS], steps[-2 * BLOCKS :]):
        asked = [one[1:] for one in call if one[0] == "asked"]
        assert asked == [(block, False) for block in range(BLOCKS)]
        for block in range(1, BLOCKS):
            assert call.index(("asked", block, False)) < call.index(("ran", block - 1))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("prompts", [1, 3])
def test_two_blocks_of_each_prompt_are_beside_the_blocks(bits, prompts):
    lane = LateLane()
    lane.expect(prompts)
    near, far = Context(bits), [ContextInRam(bits, lane) for _ in range(prompts)]
    blocks, size = 6, (2, 7, 3, 10)
    for block in range(blocks):
        k, v = torch.randn(size), torch.randn(size)
        near.write(block, k, v, None)
        for one in far:
            one.write(block, k, v, None)
    index = torch.tensor([[1, 5], [0, 6]])
    for block in range(blocks):
        k, v = torch.randn(2, 2, 3, 10), torch.randn(2, 2, 3, 10)
        near.write(block, k, v, index)
        for one in far:
            one.write(block, k, v, index)
        for one in far:
            assert all(map(torch.equal, one.read(block), near.read(block)))
    assert len(lane.slots) == AHEAD * prompts
    # keys and values of 42 heads of tokens: ten codes, and a scale of 16 bits
    held = blocks * 2 * 42 * (10 * bits // 8 + 2)
    assert near.bytes == held and [one.bytes for one in far] == [held] * prompts
    # a smaller video after it, and a larger one
    for tokens in (3, 11):
        k, v = torch.randn(2, tokens, 3, 10), torch.randn(2, tokens, 3, 10)
        near.write(0, k, v, None)
        far[0].write(0, k, v, None)
        assert all(map(torch.equal, far[0].read(0), near.read(0)))
    far[0].clear()
    assert len(lane.slots) == AHEAD * (prompts - 1) and not far[0].blocks


def test_a_slot_of_a_short_prompt_grows_for_a_longer_one():
    """Of more blocks than there are slots, so that each is used by both."""
    lane, both = LateLane(), []
    for tokens in (3, 11):
        near, far = Context(8), ContextInRam(8, lane)
        both.append((near, far))
        for block in range(AHEAD + 1):
            k, v = torch.randn(1, tokens, 3, 10), torch.randn(1, tokens, 3, 10)
            near.write(block, k, v, None)
            far.write(block, k, v, None)
    for near, far in both:
        for block in range(AHEAD + 1):
            assert all(map(torch.equal, far.read(block), near.read(block)))
    assert len(lane.slots) == AHEAD


@pytest.mark.parametrize("size", [1, 63, SMALLEST - 1, SMALLEST, 5 * SMALLEST + 77])
def test_pieces_of_ram_are_powers_of_two_and_what_is_left(size):
    pieces = [len(piece) for piece in ram(size, pinned=False)]
    assert sum(pieces) == size and pieces == sorted(pieces, reverse=True)
    assert all(part & (part - 1) == 0 for part in pieces[:-1]) and pieces[-1] <= max(SMALLEST, size)


@pytest.mark.parametrize("pinned", [False, True])
def test_at_the_end_pinned_ram_goes_back_to_the_system(wan, monkeypatch, pinned):
    """torch keeps it for the next one that asks, which may be tens of GB that the host needs."""
    found = []
    monkeypatch.setattr(context, "empty_host_cache", lambda: found.append("emptied"))

    class Stream:
        def synchronize(self):
            found.append("waited")

    class Pinned(Lane):
        def close(self):
            assert not self.slots
            self._stream = Stream() if pinned else None
            super().close()

    in_ram(monkeypatch, Pinned)
    run(wan, PLAN)
    assert found[:2] == (["waited", "emptied"] if pinned else [])


@pytest.mark.parametrize("where", ["accelerator", "old", "nowhere"])
def test_the_host_cache_is_emptied_by_what_this_torch_has(monkeypatch, where):
    found = []
    monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    if where == "accelerator":
        monkeypatch.setattr(
            torch.accelerator, "empty_host_cache", lambda: found.append(where), raising=False
        )
    if where == "old":
        monkeypatch.setattr(
            torch._C, "_host_emptyCache", lambda: found.append(where), raising=False
        )
    context.empty_host_cache()
    assert found == ([] if where == "nowhere" else [where])


def test_where_ram_cannot_be_pinned_it_is_plain_and_said(monkeypatch, caplog):
    empty = torch.empty

    def refuse(*size, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("planted")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    assert [len(piece) for piece in ram(3 * SMALLEST, pinned=True)] == [2 * SMALLEST, SMALLEST]
    assert "no pinned memory (planted)" in caplog.text and len(caplog.records) == 1


def test_without_ram_it_is_out_of_memory_as_on_the_gpu(monkeypatch):
    """The engine goes on without context then; pinned or not, it does not try for ever."""

    def refuse(*size, **options):
        raise RuntimeError("planted")

    monkeypatch.setattr(torch, "empty", refuse)
    for pinned in (True, False):
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            ram(5, pinned)
