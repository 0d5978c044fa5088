"""Skipped blocks beside other nodes, and beside tokens, heads and shares."""

from dataclasses import replace

import pytest
import torch

from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import attach, attachment_of
from wantrim.methods.depth import BlockPlan
from wantrim.methods.heads import HeadPlan
from wantrim.methods.routers import (
    FixedRouter,
)
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.neighbours import easycache, slg
from wantrim.tests.comfyui.put import at_blocks
from wantrim.tests.comfyui.test_blocks import blocks_run, ran, replaced, skipping
from wantrim.tests.comfyui.test_chaining import NEIGHBOURS, ORDERS, compiled  # noqa: F401


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbours_keep_working(neighbour, order):
    def trim(model):
        return at_blocks(model)[0]

    base = tiny.base_model()
    model = trim(neighbour(base)) if order == "in front" else neighbour(trim(base))
    out = tiny.sample(model, steps=6)
    assert torch.isfinite(out).all()
    assert torch.equal(tiny.sample(model, steps=6), out)
    assert not torch.allclose(out, tiny.sample(neighbour(base), steps=6), atol=1e-3)
    assert not torch.allclose(out, tiny.sample(trim(base), steps=6), atol=1e-3)


@pytest.mark.parametrize("order", ORDERS)
def test_slg_and_easycache_with_a_skip_equal_those_with_the_hosts_replacement(order):
    for neighbour in (lambda m: slg(m, "1"), easycache, lambda m: easycache(slg(m, "1"))):
        base = tiny.base_model()
        if order == "in front":
            model, expected = skipping(neighbour(base)), replaced(neighbour(base))
        else:
            model, expected = neighbour(skipping(base)), neighbour(replaced(base))
        assert torch.equal(tiny.sample(model, steps=6), tiny.sample(expected, steps=6))


def test_the_pass_of_slg_runs_the_blocks_of_its_step():
    model = skipping(slg(tiny.base_model(), "1"))
    calls = ran(model)
    tiny.sample(model)
    # blocks 2 and 3 are ours, and block 1 is left out in the extra pass
    assert [(roles, blocks) for _, roles, blocks in calls] == [
        ([1, 0], [0, 1, 4, 5]),
        ([0], [0, 4, 5]),
    ] * 3
    assert len(tiny.report_of(model).steps) == 3


@pytest.mark.parametrize("order", ORDERS)
def test_a_step_that_a_cache_answers_ran_no_block(order):
    def trim(model):
        return at_blocks(model)[0]

    base = tiny.base_model()
    model = trim(easycache(base)) if order == "in front" else easycache(trim(base))
    tiny.sample(model, steps=8)
    run = blocks_run(model)
    # a cache in front of us answers steps that we never see
    assert (0 in run) == (order == "behind") and (len(run) == 8) == (order == "behind")
    said = any("another node's cache" in note for note in tiny.report_of(model).notes)
    assert said == (order == "behind")


@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v", "vace"])
def test_blocks_are_skipped_in_whole_steps_and_none_runs_in_repeated_ones(kind):
    """With blocks skipped no step computes a part of its tokens, and that is said."""
    model, given = tiny.base_model(kind), tiny.case(kind)
    blocks = BlockPlan(FixedRouter((2, 3)))
    patched = tiny.shared(model, 1, 0, 1, 0.4, blocks=blocks)
    calls = ran(patched)
    out = tiny.sample(patched, given, steps=4)
    assert torch.isfinite(out).all()
    assert [run for *_, run in calls] == [[0, 1, 4, 5]] * 3
    assert blocks_run(patched) == [4, 0, 4, 4]
    assert tiny.shares(patched) == pytest.approx([4 / 6, 0, 4 / 6, 4 / 6])
    [note] = tiny.report_of(patched).notes
    assert "computed all of them" in note
    # whole and repeated steps say nothing, and repeat what the skipping model gave
    silent = tiny.shared(model, 1, 0, 1, 1, blocks=blocks)
    assert torch.equal(tiny.sample(silent, given, steps=4), out)
    assert not tiny.report_of(silent).notes


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v", "vace"])
def test_tokens_heads_and_blocks_in_any_wiring_order_are_one_plan(kind, order):
    model, given = tiny.base_model(kind), tiny.case(kind)
    plan = HeadPlan(
        (("frame",) * tiny.HEADS,) * tiny.LAYERS, (("full",) * tiny.HEADS,) * tiny.LAYERS
    )

    def with_heads(m):
        present = attachment_of(m)
        return attach(m, replace(present.plan if present else TrimPlan(), heads=plan))

    def with_blocks(m):
        return at_blocks(m)[0]

    steps = [lambda m: tiny.at_node(m), with_heads, with_blocks]
    one = with_blocks(with_heads(tiny.at_node(model)))
    other = model
    for step in reversed(steps) if order == "behind" else (steps[1], steps[2], steps[0]):
        other = step(other)
    assert attachment_of(one).plan.describe() == attachment_of(other).plan.describe()
    out = tiny.ksampler(one, given)
    assert torch.equal(out, tiny.ksampler(other, given))
    for alone in steps:
        assert not torch.allclose(out, tiny.ksampler(alone(model), given), atol=1e-3)
    assert min(blocks_run(one)) < tiny.LAYERS


@pytest.mark.parametrize("order", ORDERS)
def test_a_compiled_model_does_not_freeze_a_steps_blocks(compiled, order):  # noqa: F811
    def trim(model):
        return at_blocks(model)[0]

    base = tiny.base_model()
    model = trim(compiled(base)) if order == "in front" else compiled(trim(base))
    expected = trim(base)
    out = tiny.sample(model, steps=5)
    assert torch.equal(out, tiny.sample(expected, steps=5))
    kept = [step.tokens_per_block for step in tiny.report_of(model).steps]
    assert kept == [step.tokens_per_block for step in tiny.report_of(expected).steps]
    assert len({tuple(step) for step in kept}) > 2
    assert not tiny.report_of(model).notes
