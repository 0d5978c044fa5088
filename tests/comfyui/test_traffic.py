"""What a trimmed block of ComfyUI's own WanModel costs beside its own work, counted."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from wantrim.benchmarks.speed.plans import PAPER, PARTIAL, SIGMAS, WHOLE, Size, plans
from wantrim.benchmarks.speed.timing import random_model, seconds_per_step
from wantrim.benchmarks.speed.traffic import Traffic, in_states, watch_blocks
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui import attach as module
from wantrim.methods.tokens import paper_plan

# as wide beside its heads' rotary tables as a small Wan is, and as many blocks
WIDE = Size("", 480, 10, 64, 30, (2, 8, 8))
# of which a few queries are few
LARGE = replace(WIDE, latent=(2, 48, 48))


@pytest.fixture(scope="module")
def wide():
    return random_model(WIDE.shape, torch.float32)


@pytest.fixture
def trimmed_blocks(wide, monkeypatch):
    """trimmed_blocks(plan): of a steady step, bytes in hidden states of all tokens."""
    made = module.Engine
    with ExitStack() as stack:

        def run(plan: TrimPlan, size: Size = WIDE) -> list[Traffic]:
            watched = []

            def engine(*args):
                one = made(*args)
                watched.append(stack.enter_context(watch_blocks(one)))
                return one

            monkeypatch.setattr(module, "Engine", engine)
            seconds_per_step(wide, plan, size.latent, SIGMAS[: WHOLE + 1], 7)
            state = size.grid.tokens * size.dim * 4
            return in_states(watched[0][-size.blocks :], state)

        yield run


def mean(found: list[Traffic]) -> Traffic:
    return sum(found, Traffic()) * (1 / len(found))


def test_kept_tokens_go_short_from_block_to_block(trimmed_blocks):
    """Law of the house: 2 launches, 1.6 hidden states and 0.1 allocated a trimmed block at most."""
    found = trimmed_blocks(TrimPlan(paper_plan(0.7, reselect_every=40)))
    assert len(found) == 29
    whole = mean(found)
    assert whole.launches <= 2 and whole.moved <= 1.6 and whole.allocated <= 0.1
    # all of it where a stretch begins and ends
    assert found[0].moved > 0 and found[-1].moved > 0
    assert all(cost == Traffic() for cost in found[1:-1])
    every_ten = mean(trimmed_blocks(plans(WIDE)[PAPER]))
    assert every_ten.launches <= 2 and every_ten.moved <= 1.6 and every_ten.allocated <= 0.1


@pytest.mark.parametrize("others", ["off", "demoted"])
def test_heads_move_eight_hidden_states_at_most(trimmed_blocks, others):
    plan = plans(WIDE)[f"heads 0.7, others {others}"]
    bare = replace(plan, heads=replace(plan.heads, corrected=False))
    found = trimmed_blocks(bare, WIDE)
    assert len(found) == WIDE.blocks
    # and a token's positions, 8 bytes beside its 1,920, made and read
    assert 0 < mean(found).moved <= 8 + 8 * 8 / 1920


def test_what_heads_lack_is_given_back_in_two_more(trimmed_blocks):
    """Beside ten times over what a few queries give, 16 of 1,152 tokens."""
    plan = plans(LARGE)["heads 0.7, others demoted"]
    bare = replace(plan, heads=replace(plan.heads, corrected=False))
    with_it, without = (
        sum(cost.moved for cost in trimmed_blocks(one, LARGE)) for one in (plan, bare)
    )
    assert plan.heads.corrected and 2 < (with_it - without) / LARGE.blocks <= 2 + 10 * 16 / 1152


def test_a_part_of_the_tokens_moves_little_beside_keys_and_values(trimmed_blocks):
    """The default's partial step: two kernels a block, and what the law of the house allows."""
    found = trimmed_blocks(plans(WIDE)[PARTIAL])
    assert len(found) == WIDE.blocks
    # keys and values of 10 tokens are written down, in 480 bytes and 10 scales; they and those of 22
    # others are joined, which the host's attention wants in one piece; 8 bytes are a position
    stored = 2 * 10 * (4 * 480 + 500) + 8 * 10
    joined = 2 * (10 * 4 * 480 + 22 * 500 + 32 * 4 * 480) + 8 * 22
    kernels = Traffic(2, (stored + joined) / (32 * 480 * 4), 2)
    assert all(cost == kernels for cost in found[1:-1])
    beside = mean(found) - kernels
    assert 0 < beside.moved <= 1.6 and beside.launches <= 2 and beside.allocated <= 0.1


def test_a_watched_stretch_is_known_to_the_program(wide):
    """What the cost model is told where another node looks between the blocks."""
    seen, made = [], module.Engine

    def engine(*given):
        one = made(*given)
        seen.append(one)
        return one

    patched = wide.clone()
    patched.set_model_double_block_patch(lambda args: args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Engine", engine)
        for model in (wide, patched):
            seconds_per_step(model, plans(WIDE)[PARTIAL], WIDE.latent, SIGMAS[: WHOLE + 1], 7)
    assert [{step.program.alone for step in one.record.steps} for one in seen] == [{True}, {False}]
