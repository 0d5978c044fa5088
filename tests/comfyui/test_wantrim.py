"""The one dial through ComfyUI's own sampler nodes: what it promises, and what other nodes decide."""

import copy
import logging
from dataclasses import replace

import pytest
import torch

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.sample
import comfy.samplers
from comfy.patcher_extension import WrappersMP
from wantrim.benchmarks.flops import count_flops
from wantrim.hosts.comfyui import dial
from wantrim.hosts.comfyui.attach import KEY, SESSION_KEY, attachment_of, detach
from wantrim.nodes.heads import WanTrimHeads
from wantrim.nodes.profile import DEMO, WanTrimLoadProfile
from wantrim.nodes.wantrim import FINAL, WanTrim, WanTrimPair
from wantrim.report.figures import step_work
from wantrim.report.words import record_text
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.neighbours import shifted
from wantrim.tests.comfyui.put import (
    DIAL,
    asked,
    demo_model,
    demo_sample,
    dialled,
    done,
    low_expert,
    notes,
    paired,
    routed,
    solved,
    unmet,
)
from wantrim.tests.comfyui.test_errors import model_of


def demo_heads(model):
    return WanTrimHeads.execute(model, WanTrimLoadProfile.execute(DEMO).result[0], 0.3, "paper")[0]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_speedup_one_is_exact(kind):
    model, given = tiny.base_model(kind), tiny.case(kind)
    off = dialled(model, speedup=1.0)
    assert attachment_of(off).neutral
    assert torch.equal(tiny.ksampler(off, given), tiny.ksampler(model, given))
    assert "nothing trimmed" in record_text(tiny.report_of(off))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_final_is_exact_whatever_else_is_on_the_model(kind):
    model, given = tiny.base_model(kind), tiny.case(kind)
    dense = tiny.ksampler(model, given)
    others = routed(tiny.shared(model, 1.0, 0.0, 1.0, 0.0, tokens=tiny.token_plan()), "fixed")
    final = dialled(model, render=FINAL)
    behind = tiny.at_node(final), tiny.at_node(final, "auto", prune_ratio=0.4)
    for final in (dialled(others, render=FINAL), *behind):
        assert torch.equal(tiny.ksampler(final, given), dense)
        assert "final render, nothing trimmed" in record_text(tiny.report_of(final))
        assert not torch.equal(tiny.ksampler(dialled(final), given), dense)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_it_trims_the_same_way_each_time_and_says_what(kind, caplog):
    model, given = tiny.base_model(kind), tiny.case(kind)
    dense = tiny.ksampler(model, given, steps=8)
    patched = dialled(model, speedup=1.3)
    with caplog.at_level(logging.INFO):
        out = tiny.ksampler(patched, given, steps=8)
    assert torch.isfinite(out).all() and not torch.allclose(out, dense, atol=1e-3)
    record, found = tiny.report_of(patched), solved(patched)
    # what was solved is what ran
    assert asked(patched) == found.plan.shares.shares and all(s.as_planned for s in record.steps)
    assert done(patched) == pytest.approx(found.reached, rel=1e-6)
    expected = f"1.30x: {found.plan.describe()}; expected {found.reached:.2f}x in FLOPs"
    # a random model changes everywhere
    assert record.planned == f"{expected}; solved anew by what came"
    # what is remembered is said where a step computed a part, and not where one was planned to
    parts = any(step.program.partial for step in record.steps)
    assert (record.context is not None) == parts
    # the log says the plan that the run began with
    fresh = {"calls": None, "done": (), "costs": (), "concentration": None, "waits": None}
    begun = replace(found.run, held=True, **fresh)
    first = attachment_of(patched).dial.solve(begun)
    said = f"1.30x: {first.plan.describe()}; expected {first.reached:.2f}x in FLOPs"
    assert f"WanTrim: {said}" in caplog.messages
    assert abs(found.reached / 1.3 - 1) < 0.03 or unmet(patched)
    # CLIP's tokens cost as much as the video, in whatever share of it
    assert kind in ("i2v_clip", "fun") or not unmet(patched)
    # queued once more, and after the graph was loaded anew
    assert torch.equal(tiny.ksampler(patched, given, steps=8), out)
    assert torch.equal(tiny.ksampler(dialled(model, speedup=1.3), given, steps=8), out)


def test_what_vaces_expectation_leaves_out_is_said():
    patched = dialled(tiny.base_model("vace"), speedup=1.3)
    tiny.ksampler(patched, tiny.case("vace"), steps=8)
    assert notes(patched) == [
        "VACE's control branch runs in full, and what is expected leaves it out"
    ]
    other = dialled(tiny.base_model(), speedup=1.3)
    tiny.ksampler(other, steps=8)
    assert not notes(other)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize(
    ("steps", "speedup"), [(4, 1.25), (4, 1.5), (4, 2.0), (20, 1.5), (20, 2.5)]
)
def test_the_wish_is_met_by_the_record(steps, speedup, cfg):
    patched = dialled(tiny.base_model(), speedup=speedup)
    tiny.ksampler(patched, steps=steps, cfg=cfg)
    assert done(patched) == pytest.approx(speedup, rel=0.03)
    assert not notes(patched)
    shares = asked(patched)
    # how tokens change is known from two velocities
    assert shares[0] == 1.0 and shares[1] in (0.0, 1.0)
    for step, share in zip(tiny.report_of(patched).steps, shares, strict=True):
        work = step_work(tiny.report_of(patched), step)
        assert (work == 0, work == 1) == (share == 0, share == 1)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("speedup", [1.25, 2.0])
def test_it_costs_what_it_says(speedup, cfg):
    """Counted by torch in ComfyUI's own model."""
    dense = count_flops(lambda: demo_sample(demo_model(), steps=6, cfg=cfg))
    for context in ("auto", "off"):
        patched = dialled(demo_model(), speedup=speedup, context=context)
        total = count_flops(lambda patched=patched: demo_sample(patched, steps=6, cfg=cfg))
        assert dense / total == pytest.approx(solved(patched).reached, rel=0.03)
        assert unmet(patched) or dense / total == pytest.approx(speedup, rel=0.05)


def test_the_plan_is_made_for_each_run():
    patched = dialled(tiny.base_model())
    for steps in (4, 12):
        tiny.ksampler(patched, steps=steps)
        assert len(asked(patched)) == len(solved(patched).plan.shares.sigmas) == steps
        assert solved(patched).reached == pytest.approx(1.5, rel=0.03)
    # the input is the wish; nothing of a run stays on it
    assert attachment_of(patched).plan.shares is None


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 0), (3, 0), (1, 2), (2, 3)])
def test_dense_steps_are_whole(first, last):
    patched = dialled(
        tiny.base_model(), speedup=4.0, dense_first_steps=first, dense_last_steps=last
    )
    tiny.ksampler(patched, steps=8)
    whole = [step.kept_share == 1.0 for step in tiny.report_of(patched).steps]
    wanted = [i < max(1, first) or i >= 8 - last for i in range(8)]
    assert all(one for one, dense in zip(whole, wanted, strict=True) if dense)
    count = sum(wanted)
    # so much is asked for that no other step computes all
    assert whole == wanted or count < 2
    [note] = unmet(patched) or [""]
    assert bool(note) == (8 / count < 4 * 0.97)
    assert not note or f"{count} of 8 steps compute everything" in note


def test_what_cannot_be_reached_is_said():
    # one step
    alone = dialled(tiny.base_model())
    assert torch.equal(tiny.ksampler(alone, steps=1), tiny.ksampler(tiny.base_model(), steps=1))
    assert any("1.50x was asked for and 1.00x" in n for n in unmet(alone))
    # whole and repeated steps alone come in few numbers
    coarse = dialled(tiny.base_model(), speedup=1.5, context="off")
    tiny.ksampler(coarse, steps=4)
    [note] = unmet(coarse)
    assert "compute everything" not in note
    assert "steps are whole or repeated" in note


def test_attaching_twice_is_attaching_once():
    once = dialled(tiny.base_model(), speedup=1.3)
    twice = dialled(dialled(tiny.base_model(), speedup=3.0, context="off"), speedup=1.3)
    assert torch.equal(tiny.ksampler(once), tiny.ksampler(twice))
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.DIFFUSION_MODEL):
        assert len(twice.get_wrappers(kind, KEY)) == 1
    assert torch.equal(tiny.ksampler(detach(twice)), tiny.ksampler(tiny.base_model()))


def test_other_branches_of_the_graph_are_left_alone():
    model = tiny.base_model()
    dense = tiny.ksampler(model)
    options = copy.copy(model.model_options["transformer_options"])
    patched = dialled(model)
    clone = shifted(patched)
    out = tiny.ksampler(patched)
    assert torch.equal(tiny.ksampler(model), dense)
    assert model.model_options["transformer_options"] == options
    assert not model.get_all_wrappers(WrappersMP.OUTER_SAMPLE)
    # a clone behind it is sampled with another shift, and changes nothing here
    assert not torch.equal(tiny.ksampler(clone), out)
    assert torch.equal(tiny.ksampler(patched), out)


def cancel(args):
    raise comfy.model_management.InterruptProcessingException


def test_a_cancelled_run_leaves_nothing():
    patched = dialled(tiny.base_model())
    out = tiny.ksampler(patched)
    broken = patched.clone()
    broken.set_model_double_block_patch(cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny.ksampler(broken)
    assert not tiny.report_of(patched).finished
    assert torch.equal(tiny.ksampler(patched), out)
    assert torch.equal(tiny.ksampler(detach(patched)), tiny.ksampler(tiny.base_model()))


EXPERTS = {
    "tokens": lambda m: tiny.at_node(m, prune_ratio=0.2),
    "blocks": lambda m: routed(m, "fixed", blocks="3"),
    "heads": demo_heads,
}


@pytest.mark.parametrize("name", EXPERTS)
def test_what_an_expert_node_decides_is_taken_in_any_order(name):
    """The dial solves the rest, so that all of it together is what was asked for."""
    expert = EXPERTS[name]
    behind = expert(dialled(demo_model(), speedup=1.6))
    before = dialled(expert(demo_model()), speedup=1.6)
    out = demo_sample(behind, steps=12)
    assert torch.equal(demo_sample(before, steps=12), out)
    alone = expert(demo_model())
    assert not torch.equal(demo_sample(alone, steps=12), out)
    wanted = getattr(attachment_of(alone).plan, name)
    for model in (behind, before):
        plan = solved(model).plan
        assert getattr(plan, name) is getattr(attachment_of(model).plan, name)
        assert type(getattr(plan, name)) is type(wanted) and plan.shares is not None
        if name == "tokens":
            assert plan.tokens == wanted
        # partial steps need what every block makes of every token
        partial = set(asked(model)) - {0.0, 1.0}
        assert bool(partial) == (name == "heads")
        assert done(model) == pytest.approx(solved(model).reached, rel=0.02)
        assert solved(model).reached == pytest.approx(1.6, rel=0.03) or unmet(model)
        assert (
            not unmet(model)
            or f"WanTrim {name.title()} decides is taken as it is" in notes(model)[0]
        )


def test_a_wish_that_other_nodes_grant_leaves_the_dial_nothing():
    def experts(model):
        for name in ("tokens", "blocks", "heads"):
            model = EXPERTS[name](model)
        return model

    both = experts(dialled(demo_model(), speedup=1.05))
    assert torch.equal(demo_sample(both), demo_sample(experts(demo_model())))
    assert set(asked(both)) == {1.0}
    [note] = unmet(both)
    assert "what WanTrim Tokens and WanTrim Heads and WanTrim Blocks decide is taken" in note
    off = dialled(experts(demo_model()), speedup=1.0)
    assert torch.equal(demo_sample(off), demo_sample(both))


def test_the_preset_auto_of_the_tokens_is_a_dial():
    one, other = (
        tiny.at_node(tiny.base_model(), "auto", prune_ratio=0.25),
        dialled(tiny.base_model(), speedup=4 / 3, dense_first_steps=0),
    )
    assert torch.equal(tiny.ksampler(one, steps=6), tiny.ksampler(other, steps=6))
    assert done(one) == pytest.approx(4 / 3, rel=0.03)
    # only while the window lasts
    late = tiny.at_node(tiny.base_model(), "auto", prune_ratio=0.25, start=0.5, end=0.8)
    tiny.ksampler(late, steps=10)
    places = [step.progress for step in tiny.report_of(late).steps]
    trimmed = [at for at, share in zip(places, asked(late), strict=True) if share < 1]
    assert trimmed and all(0.5 <= at <= 0.8 for at in trimmed)
    off = tiny.at_node(tiny.base_model(), "auto", prune_ratio=0.0)
    assert torch.equal(tiny.ksampler(off), tiny.ksampler(tiny.base_model()))


def test_the_preset_auto_behind_a_dial_takes_its_speedup_and_nothing_else():
    model = dialled(tiny.base_model(), speedup=2.0, context="off")
    taken = tiny.at_node(model, "auto", prune_ratio=0.25)
    assert attachment_of(taken).place == "off"
    tiny.ksampler(taken, steps=8)
    assert any("the last one counts (1.33x), and not 2.00x" in note for note in notes(taken))
    # 0 leaves out nothing, and takes nothing away
    none = tiny.at_node(model, "auto", prune_ratio=0.0)
    assert torch.equal(tiny.ksampler(none), tiny.ksampler(model)) and not notes(none)


def test_defaults_of_the_nodes():
    inputs = {i.id: i for i in WanTrim.define_schema().inputs}
    assert list(inputs) == ["model", *DIAL, "profile"] and inputs["profile"].optional
    assert {name: inputs[name].default for name in DIAL} == DIAL
    assert (inputs["speedup"].min, inputs["speedup"].max) == (1.0, 4.0)
    assert inputs["context"].options == list(dial.PLACES) and not inputs["model"].optional
    pair = {i.id: i for i in WanTrimPair.define_schema().inputs}
    profiles = {f"profile_{part}_noise" for part in ("high", "low")}
    assert set(pair) == {"model_high_noise", "model_low_noise", *DIAL, "boundary", *profiles}
    assert {name: pair[name].default for name in DIAL} == DIAL and pair["boundary"].default == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"speedup": 0.5}, "WanTrim: speedup: expected 1 to 4, got 0.5"),
        ({"speedup": 5.0}, "WanTrim: speedup: expected 1 to 4, got 5.0"),
        ({"speedup": float("nan")}, "WanTrim: speedup"),
        ({"context": "disk"}, "WanTrim: context: expected one of auto, cpu, off, got 'disk'"),
        ({"render": "both"}, "WanTrim: render: expected one of draft, final"),
        ({"dense_first_steps": -1}, "WanTrim: dense_first_steps: expected 0 to 100"),
        ({"dense_last_steps": 1000}, "WanTrim: dense_last_steps: expected 0 to 100"),
    ],
)
def test_linked_nonsense_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        dialled(tiny.base_model(), **inputs)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="WanTrim: the input 'model' expects a Wan video model"):
        dialled(model_of("Flux"))
    with pytest.raises(ValueError, match="WanTrim Pair: 'model_high_noise' and .* same model"):
        paired(tiny.base_model(), tiny.base_model().clone())
    with pytest.raises(ValueError, match="WanTrim Pair: boundary"):
        paired(tiny.base_model(), low_expert(), boundary=1.5)


def test_nothing_of_a_run_stays_in_the_options():
    patched = dialled(tiny.base_model())
    tiny.ksampler(patched)
    assert SESSION_KEY not in patched.model_options["transformer_options"]
