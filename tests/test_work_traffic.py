"""What the cost model says that we move, beside what an operation counter sees on real small Wans."""

import pytest
import torch

from wantrim.benchmarks.speed.traffic import Traffic, count_traffic, watch_blocks
from wantrim.engine.context import Room
from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.engine.program import SKIP
from wantrim.engine.work import program_work
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.shape import wan_shape
from wantrim.methods.cost import block_work
from wantrim.methods.depth import BlockPlan
from wantrim.methods.heads import HeadPlan
from wantrim.methods.routers import FixedRouter
from wantrim.methods.shares import Shares
from wantrim.methods.tokens import paper_plan
from wantrim.tests.small_wan import noise, random_wan, words

BLOCKS, HEADS, DIM = 6, 5, 240
# of a latent; 2 latent frames of 6 x 6 tokens, which tiles divide
SIZE = (2, 12, 12)
SIGMAS = (0.9, 0.8, 0.7)
PART = Shares(SIGMAS, (1.0, 1.0, 0.4))
PATTERNS = ("full", "frame", "tile2", "off", "full")


def heads() -> HeadPlan:
    rows = tuple(PATTERNS[i % HEADS :] + PATTERNS[: i % HEADS] for i in range(BLOCKS))
    whole = ("full",) * HEADS
    # one block's cross-attention has heads that are off, and one block is left alone
    cross = (("off", *whole[1:]), *[whole] * (BLOCKS - 1))
    return HeadPlan((*rows[:-1], whole), cross, corrected=True)


TAPE = paper_plan(0.7, reselect_every=3)
PLANS = {
    "a part with context": TrimPlan(shares=PART),
    "tape": TrimPlan(TAPE),
    "tape around a skipped block": TrimPlan(TAPE, blocks=BlockPlan(FixedRouter((2,)))),
    "heads": TrimPlan(heads=heads()),
    "heads, a part with context": TrimPlan(heads=heads(), shares=PART),
    "heads and tape": TrimPlan(TAPE, heads()),
}


@pytest.fixture(scope="module")
def wan():
    # numbers of 16 bits are what the rates count; positions stay in fp32, as in a model that is loaded
    model = random_wan(BLOCKS, dim=DIM, heads=HEADS).to(torch.bfloat16)
    model.rope.float()
    return model


def steps(model, plan: TrimPlan, bits: int, alone: bool):
    """Yield the attachment before each step of a run with both prompts, then run the step."""
    latent = noise(1, 16, *SIZE).bfloat16().repeat(2, 1, 1, 1, 1)
    text = words(2).bfloat16()
    others = [] if alone else [b.register_forward_hook(lambda *_: None) for b in model.blocks]
    with attach(model, plan, cond_or_uncond=(COND, UNCOND)) as attachment, torch.no_grad():
        attachment.engine.memory.room = Room(bits=bits)
        for sigma in SIGMAS:

            def run(sigma=sigma):
                model(latent * sigma, torch.full((2,), 1000 * sigma), text)

            yield attachment.engine, run
    for hook in others:
        hook.remove()


@pytest.mark.parametrize("alone", [True, False], ids=["short", "around each block"])
@pytest.mark.parametrize(
    ("name", "bits"), [*((name, 8) for name in PLANS), ("a part with context", 4)]
)
def test_we_move_what_the_cost_model_says(wan, name, bits, alone):
    """Bytes beside the blocks' own, of a step whose choices and memory are there."""
    plan, shape = PLANS[name], wan_shape(wan, 7)
    for engine, run in steps(wan, plan, bits, alone):
        with watch_blocks(engine) as found:
            run()
        program = engine.now.step.program
    assert (program.alone, program.bits) == (alone, bits)
    assert tuple(row for row, _ in found) == program.rows
    skipped = [cost for row, cost in found if row.run == SKIP]
    assert skipped == [Traffic()] * name.count("skipped")
    own = 2 * sum(block_work(shape, row.tokens).moved for row in program.rows if row.run != SKIP)
    ours = program_work(shape, program, plan, 2).moved - own
    assert sum(cost.moved for _, cost in found) == pytest.approx(2 * ours, rel=0.1)


def test_a_repeated_step_moves_what_the_cost_model_says(wan):
    plan, found = TrimPlan(shares=Shares(SIGMAS, (1.0, 1.0, 0.0))), []
    for engine, run in steps(wan, plan, 8, True):
        found.append(count_traffic(run).moved)
        program = engine.now.step.program
    assert found[-1] == pytest.approx(
        2 * program_work(wan_shape(wan, 7), program, plan, 2).moved, rel=0.1
    )
