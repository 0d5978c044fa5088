"""The engine against the naive one: same programs, same velocities, on real tiny Wans."""

from dataclasses import replace

import pytest
import torch

from wantrim.engine.context import Room
from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.weights import load_original
from wantrim.methods.depth import BlockPlan
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import HeadPlan
from wantrim.methods.routers import FixedRouter
from wantrim.methods.schedule import Schedule
from wantrim.methods.shares import Shares
from wantrim.methods.tokens import TokenPlan
from wantrim.tests.oracle import Oracle
from wantrim.tests.records import BLOCKS, HEADS, small_wan
from wantrim.toy import CHECKPOINT
from wantrim.toy.text import TEXT_DIM

GUIDANCE = 2.5
SIGMAS = (0.97, 0.9, 0.8, 0.64, 0.45, 0.2)
# tiles divide it
SIZE = (3, 8, 12)
GRID = TokenGrid(SIZE[0], SIZE[1] // 2, SIZE[2] // 2)
TAPE = TokenPlan(Schedule(0.5, "rising"), reselect_every=3, alpha=0.4)


def heads(blocks: int, count: int, cycle=("full", "tile2", "frame", "off")) -> HeadPlan:
    own = tuple(
        tuple(cycle[(block + head) % len(cycle)] for head in range(count))
        for block in range(blocks)
    )
    return HeadPlan(own, (("full",) * count,) * blocks)


def shares(*values: float) -> Shares:
    return Shares(SIGMAS, values)


FRAMES = replace(heads(BLOCKS, HEADS, ("full", "frame", "off")), corrected=True)
PLANS = {
    "tape": TrimPlan(TAPE),
    "tape and skipped blocks": TrimPlan(TAPE, blocks=BlockPlan(FixedRouter((1, 3)))),
    "tape in some steps": TrimPlan(TAPE, shares=shares(1, 1, 0, 1, 0, 1)),
    "repeated": TrimPlan(shares=shares(1, 0, 1, 0, 0, 1)),
    "partial": TrimPlan(shares=shares(1, 1, 0.5, 0.2, 1, 0.3)),
    "partial and repeated": TrimPlan(shares=shares(1, 1, 0.4, 0, 0.3, 0.1)),
    "heads": TrimPlan(heads=heads(BLOCKS, HEADS)),
    # tiles of kept tokens are cut by number, which the oracle does not do
    "heads and partial": TrimPlan(
        heads=heads(BLOCKS, HEADS, ("full", "frame", "off")), shares=shares(1, 1, 0.5, 0.2, 1, 0.3)
    ),
    "heads and repeated": TrimPlan(heads=heads(BLOCKS, HEADS), shares=shares(1, 0, 1, 1, 0, 1)),
    "corrected heads": TrimPlan(heads=replace(heads(BLOCKS, HEADS), corrected=True)),
    "corrected heads and partial": TrimPlan(heads=FRAMES, shares=shares(1, 1, 0.5, 0.2, 1, 0.3)),
    "corrected heads and tape": TrimPlan(TAPE, FRAMES),
    "skipped and repeated": TrimPlan(
        blocks=BlockPlan(FixedRouter((2, 4))), shares=shares(1, 0, 1, 1, 0, 1)
    ),
}


@pytest.fixture
def in_full(monkeypatch):
    """Keys and values are remembered in full, so that only the order of sums differs."""
    monkeypatch.setattr("wantrim.kernels.reference.pack_rows", lambda x, bits: (x, x[..., 0]))
    monkeypatch.setattr("wantrim.kernels.reference.unpack_rows", lambda codes, scale, bits: codes)


def both(model, plan, grid, size, text, alone=True, batch=1, sigmas=SIGMAS):
    """Velocities of the engine and of the oracle, step by step, over the same latents."""
    hooks = [] if alone else [b.register_forward_hook(lambda *_: None) for b in model.blocks]
    random = torch.Generator().manual_seed(3)
    x = torch.randn(batch, model.config.in_channels, *size, generator=random)
    oracle, pairs = Oracle(model, plan, grid, GUIDANCE), []
    with attach(model, plan, cond_or_uncond=(COND, UNCOND), shift=3.0) as attachment:
        # what is rounded is another test's
        attachment.engine.memory.room = Room(bits=8)
        for sigma, after in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
            timestep = torch.full((2 * batch,), 1000 * sigma)
            got = model(x.repeat(2, 1, 1, 1, 1), timestep, text, return_dict=False)[0]
            program = attachment.engine.now.step.program
            want = oracle.step(program, x.repeat(2, 1, 1, 1, 1), timestep, text)
            pairs.append((got, want))
            x = x.clone()
            x[:, :16] += (after - sigma) * oracle.guided(want)
        record = attachment.engine.record
    for hook in hooks:
        hook.remove()
    return pairs, record


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_small_wan(name, alone, in_full):
    text = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(9))
    pairs, record = both(
        small_wan(16), PLANS[name], GRID, SIZE, text.repeat_interleave(2, 0), alone, 2
    )
    for got, want in pairs:
        torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)
    assert record.steps[-1].program.grid == GRID
    assert not record.notes


@torch.no_grad()
def test_trained_tiny_wan():
    model = load_original(CHECKPOINT)
    size = (5, 12, 12)
    plan = TrimPlan(shares=shares(1, 1, 0.5, 0.2, 0, 0.3))
    text = torch.randn(2, 24, TEXT_DIM, generator=torch.Generator().manual_seed(9))
    pairs, _ = both(model, plan, TokenGrid(5, 6, 6), size, text)
    for number, (got, want) in enumerate(pairs):
        off = (got - want).norm() / want.norm()
        # keys and values in 8 bits
        assert off < (1e-4 if number < 2 else 2e-2), number
    assert (pairs[2][0] - pairs[2][1]).abs().max() > 0


@pytest.mark.parametrize("values", [(1, 1, 1, 0, 1, 0), (1, 1, 0.5, 0.4, 0.3, 0)])
@torch.no_grad()
def test_changes_go_on_where_the_model_is_trained(values, in_full):
    """What random weights say turns back with every step."""
    sigmas, size = (0.8, 0.7, 0.6, 0.48, 0.35, 0.2), (5, 12, 12)
    plan = TrimPlan(shares=Shares(sigmas, values))
    text = torch.randn(2, 24, TEXT_DIM, generator=torch.Generator().manual_seed(9))
    pairs, _ = both(
        load_original(CHECKPOINT), plan, TokenGrid(5, 6, 6), size, text.repeat_interleave(2, 0),
        batch=2, sigmas=sigmas,
    )  # fmt: skip
    for got, want in pairs:
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    # it does go on
    assert (pairs[5][0] - pairs[4][0]).norm() > 0.05 * pairs[4][0].norm()


@torch.no_grad()
def test_the_oracle_sees_a_difference():
    """It is no echo of the engine: another plan gives other velocities."""
    text = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(9))
    plan, other = PLANS["partial"], replace(PLANS["partial"], shares=shares(1, 1, 0.6, 0.2, 1, 0.3))
    (_, want), (_, changed) = (
        both(small_wan(16), one, GRID, SIZE, text)[0][2] for one in (plan, other)
    )
    assert (want - changed).abs().max() > 1e-3
