"""One dial for both experts of Wan2.2, and the inputs of both nodes."""

import pytest
import torch

from wantrim.hosts.comfyui.attach import attachment_of
from wantrim.nodes.wantrim import FINAL
from wantrim.report.figures import step_work
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.put import (
    asked,
    done,
    low_expert,
    paired,
    solved,
    unmet,
)


def run_pair(high, low, first=4, steps=8) -> torch.Tensor:
    half = tiny.ksampler_advanced(high, tiny.empty_latent(), 0, first, steps=steps)
    return tiny.ksampler_advanced(low, half, first, steps, steps=steps)


def test_a_pair_off_and_a_final_pair_are_exact():
    models = tiny.base_model(), low_expert()
    dense = run_pair(*models)
    assert torch.equal(run_pair(*paired(*models, speedup=1.0)), dense)
    trimmed = [tiny.at_node(model) for model in models]
    assert torch.equal(run_pair(*paired(*trimmed, render=FINAL)), dense)
    assert not torch.allclose(run_pair(*paired(*models)), dense, atol=1e-3)


def together(*models) -> float:
    """The speed-up of both experts' runs, by their records."""
    work = [
        step_work(record, step) for record in map(tiny.report_of, models) for step in record.steps
    ]
    return len(work) / sum(work)


@pytest.mark.parametrize(
    ("steps", "first", "speedup"), [(4, 2, 1.3), (8, 4, 1.4), (12, 4, 1.4), (12, 9, 1.6)]
)
def test_a_pair_meets_one_speedup(steps, first, speedup):
    high, low = paired(tiny.base_model(), low_expert(), speedup=speedup)
    out = run_pair(high, low, first, steps)
    assert torch.isfinite(out).all()
    met = together(high, low) == pytest.approx(speedup, rel=0.03)
    assert met or (unmet(high) and unmet(low))
    assert met or steps == 4
    # each was solved for its own steps, and begins anew
    for model, count, name in ((high, first, "high"), (low, steps - first, "low")):
        record = tiny.report_of(model)
        assert len(record.steps) == count and record.steps[0].whole
        assert asked(model)[1] in (0.0, 1.0)
        assert f"here the {name} noise one" in record.planned
        assert "of this expert's own steps" in record.planned
        assert done(model) == pytest.approx(solved(model).reached, rel=1e-6)
    assert torch.equal(run_pair(high, low, first, steps), out)


def test_two_and_two_steps_say_what_is_reachable():
    high, low = paired(tiny.base_model(), low_expert(), speedup=2.5)
    run_pair(high, low, 2, 4)
    # the first step of each computes everything, the other nothing
    assert asked(high) == asked(low) == (1.0, 0.0)
    for model in (high, low):
        [note] = unmet(model)
        assert "2.50x was asked for and 2.00x" in note
        assert "2 of 4 steps compute everything (the first of each expert, and" in note


def test_dense_steps_of_a_pair_are_those_of_the_whole_run():
    high, low = paired(
        tiny.base_model(), low_expert(), dense_first_steps=3, dense_last_steps=2, speedup=4.0
    )
    run_pair(high, low, 5, 10)
    whole = [[share == 1.0 for share in tiny.shares(model)] for model in (high, low)]
    assert whole == [[True] * 3 + [False] * 2, [True] + [False] * 2 + [True] * 2]


def test_a_boundary_by_hand_moves_the_budget():
    found = []
    for boundary in (0.0, 0.5):
        high, low = paired(tiny.base_model(), low_expert(), boundary=boundary, speedup=1.6)
        run_pair(high, low, 6, 12)
        found.append((asked(high), asked(low)))
        # the low expert knows what the high one did
        assert together(high, low) == pytest.approx(1.6, rel=0.03)
    assert found[1] != found[0]


@pytest.mark.parametrize("on", ["high", "low"])
def test_tokens_of_one_expert_are_not_taken_to_be_the_others(on):
    high, low = paired(tiny.base_model(), low_expert(), speedup=1.5)
    if on == "high":
        high = tiny.at_node(high)
    else:
        low = tiny.at_node(low)
    run_pair(high, low)
    came = together(high, low)
    # what the second one says of both is what they did; a first one's tokens leave room for it
    said = solved(low).together
    assert came == pytest.approx(said, rel=0.02)
    assert came == pytest.approx(1.5, rel=0.03) or (on == "low" and unmet(low))


def test_expert_nodes_are_taken_on_a_pair_too():
    high, low = paired(tiny.base_model(), low_expert())
    refined = tiny.at_node(low, prune_ratio=0.1)
    first = run_pair(high, refined)
    before = paired(tiny.base_model(), tiny.at_node(low_expert(), prune_ratio=0.1))
    assert torch.equal(run_pair(*before), first)
    alone = attachment_of(tiny.at_node(low_expert(), prune_ratio=0.1)).plan.tokens
    assert solved(refined).plan.tokens == alone
