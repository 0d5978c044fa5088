"""A model call waits for the device once, and holds little more memory than it has to."""

from contextlib import nullcontext

import pytest
import torch

from wantrim.benchmarks.peers.random_router import RandomRouter
from wantrim.engine import context, memory
from wantrim.engine.context import Lane, Room, context_bytes
from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.profiling import model_fingerprint
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.heads import FRAME, FULL, OFF, HeadPlan
from wantrim.methods.role_plan import RolePlan
from wantrim.methods.routers import RouterMLP
from wantrim.methods.shares import Shares
from wantrim.methods.tokens import paper_plan
from wantrim.slim.router import TrainedRouter
from wantrim.tests.small_wan import random_wan
from wantrim.tests.waits import Stream, Waits, put

BLOCKS, HEADS, LATENT = 6, 4, (3, 8, 8)
SIGMAS = tuple(0.59 - 0.01 * step for step in range(6))


def test_the_counter_sees_every_kind_of_wait():
    marked, host = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 2.0])
    put(marked)
    ram = host.clone()
    ram.in_ram = True
    waits = [
        lambda: float(marked.max()),
        lambda: bool((marked * 2).any()),
        lambda: (marked + host).tolist(),
        lambda: marked.sum().item(),
        lambda: torch.equal(marked, host),
        lambda: marked.nonzero(),
        lambda: marked[marked > 0],
        lambda: (marked + 1).cpu(),
        lambda: marked.repeat_interleave(marked.long()),
        lambda: host.to(marked.device),
        lambda: torch.tensor([1.0], device=marked.device),
        lambda: marked.clone().copy_(ram),
        lambda: ram.copy_(marked),
    ]
    for number, work in enumerate(waits):
        with Waits() as waited:
            work()
        assert len(waited.seen) == 1, (number, waited.seen)
    none = [
        lambda: float(host.max()),
        lambda: (host + 1).tolist(),
        lambda: marked.cumsum(0) + host,
        lambda: host.to(marked.device, non_blocking=True),
        lambda: marked.sort(stable=True).indices[:2],
        lambda: torch.arange(3, device=marked.device),
        lambda: ram.copy_(marked, non_blocking=True),
    ]
    for number, work in enumerate(none):
        with Waits() as waited:
            work()
        assert not waited.seen, (number, waited.seen)


def trained_router() -> TrainedRouter:
    mlp = RouterMLP(BLOCKS, 4 * 16, hidden=8, time_dim=16)
    put(*mlp.parameters(), *mlp.buffers())
    return TrainedRouter(mlp, "latent", model_fingerprint(new_model(False)))


def new_model(given: bool):
    return random_wan(BLOCKS, 36 if given else 16, heads=HEADS)


DEMOTED = HeadPlan(((FRAME, "tile2", OFF, FULL),) * BLOCKS, ((FULL,) * HEADS,) * BLOCKS)
SHARES = Shares(SIGMAS, (1, 1, 0.4, 0, 0.3, 1))
PLANS = {
    "shares": TrimPlan(shares=SHARES),
    "repeats": TrimPlan(shares=Shares(SIGMAS, (1, 0, 1, 0, 0, 1))),
    "tape": TrimPlan(paper_plan(0.6, reselect_every=2)),
    "blocks": TrimPlan(blocks=BlockPlan(RandomRouter(), BlockBudget(0.75, 0.75))),
    "a trained router": TrimPlan(blocks=BlockPlan(trained_router(), BlockBudget(0.75, 0.75))),
    "a trained router, shares": TrimPlan(
        blocks=BlockPlan(trained_router(), BlockBudget(0.75, 0.75)), shares=SHARES
    ),
    "heads": TrimPlan(heads=DEMOTED),
    "heads and shares": TrimPlan(heads=DEMOTED, shares=SHARES),
    "heads and tape": TrimPlan(paper_plan(0.6, reselect_every=2), DEMOTED),
    "online roles": TrimPlan(heads=RolePlan(0.6, HEADS)),
    "online roles and shares": TrimPlan(heads=RolePlan(0.6, HEADS), shares=SHARES),
    "all": TrimPlan(
        paper_plan(0.6, reselect_every=2),
        RolePlan(0.6, HEADS),
        BlockPlan(trained_router(), BlockBudget(0.75, 0.75)),
        SHARES,
    ),
    "computes all": TrimPlan(paper_plan(0.7, start=0.9)),
}


def waits_per_call(model, plan: TrimPlan | None, given: bool, how: str) -> list[list[str]]:
    """What each model call waited for."""
    roles = (COND, UNCOND) if how == "batch" else (COND,)
    draw = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 36 if given else 16, *LATENT, generator=draw)
    latent[:, 16:20] = 0
    latent[:, 16:20, :1] = 1
    text = torch.randn(2, 7, 24, generator=draw)
    put(*model.parameters(), *model.buffers())
    found = []
    attachment = attach(model, plan or TrimPlan(), cond_or_uncond=roles)
    with attachment, torch.no_grad():
        for index, sigma in enumerate(SIGMAS):
            moved = latent * (1 - 0.01 * index)
            calls = [text[:1], text[1:]] if how == "split" else [text[: len(roles)]]
            for words in calls:
                inputs = moved.repeat(len(words), 1, 1, 1, 1)
                timestep = torch.tensor([1000 * sigma]).repeat(len(words))
                words = words.clone()
                put(inputs, timestep, words)
                with Waits() as waited:
                    model(inputs, timestep, words, return_dict=False)
                found.append(waited.seen)
    return found


@pytest.mark.parametrize(("how", "given"), [("cond", False), ("split", True), ("batch", True)])
def test_a_model_call_waits_for_the_device_once(how, given):
    model = new_model(given)
    alone = waits_per_call(model, None, given, how)
    for name, plan in PLANS.items():
        trimmed = waits_per_call(model, plan, given, how)
        for before, after in zip(alone, trimmed, strict=True):
            assert len(after) <= len(before) + 1, (name, after)


@pytest.mark.parametrize("how", ["split", "batch"])
def test_keys_and_values_in_ram_are_not_waited_for(monkeypatch, how):
    """As on a GPU, whose stream they come by beside the computing."""
    seen, piece = [], context.ram

    class Card(Lane):
        def __init__(self):
            super().__init__()
            self._stream = Stream(seen)

    def pieces(size, pinned):
        assert pinned
        made = piece(size, pinned=False)
        for one in made:
            one.in_ram = True
        return made

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(seen))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(context, "ram", pieces)
    monkeypatch.setattr(context, "empty_host_cache", lambda: None)
    monkeypatch.setattr(memory, "Lane", Card)
    monkeypatch.setattr(memory, "Room", lambda: Room(torch.device("cpu")))
    model = new_model(False)
    alone = waits_per_call(model, None, False, how)
    for name in ("shares", "heads and shares", "online roles and shares"):
        seen.clear()
        trimmed = waits_per_call(model, PLANS[name], False, how)
        for before, after in zip(alone, trimmed, strict=True):
            assert len(after) <= len(before) + 1, (name, after)
        # a run waits for it when it ends
        assert seen == ["synchronize"]


def test_the_wait_is_for_all_that_decides():
    """A call that did not wait at all could not have looked at the noise level."""
    model = new_model(False)
    alone = waits_per_call(model, None, False, "cond")
    some = waits_per_call(model, PLANS["shares"], False, "cond")
    # a repeated step is looked at too
    assert [len(after) - len(before) for before, after in zip(alone, some, strict=True)] == [1] * 6


def held_bytes(plan, prompts: int) -> list[int]:
    """What a run holds of its earlier steps, by step."""
    model, found = new_model(False), []
    latent, text = torch.randn(1, 16, *LATENT), torch.randn(prompts, 7, 24)
    roles = (COND, UNCOND)[:prompts]
    with attach(model, plan, cond_or_uncond=roles) as attachment, torch.no_grad():
        for sigma in SIGMAS:
            timestep = torch.full((prompts,), 1000 * sigma)
            model(latent.repeat(prompts, 1, 1, 1, 1) * sigma, timestep, text)
            (part,) = attachment.engine.memory.parts.values()
            known = [
                t
                for p in part.prompts.values()
                for t in (p.velocity, p.clean, p.turn, p.foretold, p.since, p.gap)
            ]
            known += [t for p in part.prompts.values() for c in p.blocks.values() for t in c]
            found.append(sum(t.untyped_storage().nbytes() for t in known if t is not None))
    return found


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_run_holds_four_latents_a_prompt_at_most_and_the_context_it_reads(prompts):
    latents = prompts * 4 * 16 * 3 * 8 * 8
    context = prompts * context_bytes(BLOCKS, 48, HEADS, 12, 8)

    def in_latents(name: str, with_context: range) -> list[float]:
        held = held_bytes(PLANS[name], prompts)
        own = (some - context * (step in with_context) for step, some in enumerate(held))
        return [round(some / latents, 2) for some in own]

    # velocity and video, then how it changed, then how it was to change
    assert in_latents("repeats", range(0)) == [2, 2, 3, 3, 3, 4]
    # a token of a partial step has a sigma of its own: two more channels of 16
    assert in_latents("shares", range(1, 5)) == [2, 3, 4.12, 3.12, 4.12, 4.06]
    # of every number of keys and values a byte, and two of every head's row
    assert context == prompts * 2 * BLOCKS * 48 * (48 + 2 * HEADS)
    assert held_bytes(PLANS["tape"], prompts) == [0] * 6
