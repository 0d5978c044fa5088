"""The one dial, WanTrim and WanTrim Pair, through ComfyUI's own sampler nodes."""

import copy
import logging
from functools import cache

import pytest
import torch

import comfy.model_management
import comfy.sd
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from wantrim.benchmarks.flops import count_flops
from wantrim.hosts.comfyui.attach import KEY, attachment_of, detach
from wantrim.hosts.comfyui.slim import load_slim
from wantrim.methods.mixes import MIXES
from wantrim.methods.presets import preset_plan
from wantrim.nodes import demo
from wantrim.nodes.heads import WanTrimHeads
from wantrim.nodes.profile import DEMO, WanTrimLoadProfile
from wantrim.nodes.wantrim import DRAFT, FINAL, WanTrim, WanTrimPair
from wantrim.profiles.recorder import ProfileFile
from wantrim.slim.cut import whole_width
from wantrim.slim.export import export_slim
from wantrim.slim.source import open_source
from wantrim.tests.comfyui import test_blocks, tiny
from wantrim.tests.comfyui.neighbours import easycache, lora, shifted, slg
from wantrim.tests.comfyui.test_chaining import ORDERS
from wantrim.tests.comfyui.test_errors import model_of
from wantrim.tests.comfyui.variants import load
from wantrim.toy import CHECKPOINT

DEFAULTS = {
    "speedup": 1.5,
    "priority": "auto",
    "render": DRAFT,
    "dense_first_steps": 1,
    "dense_last_steps": 0,
}


def dialled(model, **inputs):
    """What WanTrim makes of `model`."""
    return WanTrim.execute(model=model, **DEFAULTS | inputs).result[0]


def paired(high, low, **inputs):
    """What WanTrim Pair makes of two experts."""
    given = {"model_high_noise": high, "model_low_noise": low, "boundary": 0.0}
    return WanTrimPair.execute(**given | DEFAULTS | inputs).result


def plan_of(model):
    """What the last run of a MODEL was solved for."""
    return attachment_of(model).solved


@cache
def demo_model():
    return demo.WanTrimDemoModel.execute().result[0]


@cache
def demo_profile() -> ProfileFile:
    return WanTrimLoadProfile.execute(DEMO).result[0]


def demo_sample(model, steps=4, **options) -> torch.Tensor:
    prompts = [demo.WanTrimDemoPrompt.execute(text).result[0] for text in (demo.PROMPT, "")]
    case = tiny.Case(*prompts, tiny.empty_latent(5, 12, 12))
    return tiny.ksampler(model, case, steps=steps, **options)


@cache
def low_expert():
    """Another model of the same sizes."""
    return load("low")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_speedup_one_is_exact(kind):
    model, given = tiny.base_model(kind), tiny.case(kind)
    off = dialled(model, speedup=1.0)
    assert attachment_of(off).plan.neutral
    assert torch.equal(tiny.ksampler(off, given), tiny.ksampler(model, given))
    assert "nothing trimmed" in tiny.report_of(off).text()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_final_is_exact_whatever_else_is_on_the_model(kind):
    model, given = tiny.base_model(kind), tiny.case(kind)
    final = tiny.at_node(dialled(tiny.at_node(model), render=FINAL))
    assert torch.equal(tiny.ksampler(final, given), tiny.ksampler(model, given))
    assert "final render, nothing trimmed" in tiny.report_of(final).text()
    draft = dialled(final)
    assert not torch.equal(tiny.ksampler(draft, given), tiny.ksampler(model, given))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_it_trims_the_same_way_each_time_and_says_what(kind, caplog):
    model, given = tiny.base_model(kind), tiny.case(kind)
    dense = tiny.ksampler(model, given, steps=8)
    patched = dialled(model, speedup=1.3)
    with caplog.at_level(logging.INFO):
        out = tiny.ksampler(patched, given, steps=8)
    assert torch.isfinite(out).all() and not torch.allclose(out, dense, atol=1e-3)
    report, solved = tiny.report_of(patched), plan_of(patched)
    # a quarter of the run is spared at its beginning where nothing is given, else its end
    first = 2 if solved.priority == "motion" else 1
    last = 7 if solved.priority == "detail" else 8
    shares = tiny.shares(patched)
    assert {*shares[:first], *shares[last:]} == {1.0} and max(shares[first:last]) < 0.9
    became = f"auto ({solved.priority})"
    assert report.planned.startswith(f"1.30x, priority {became}, without a profile: ")
    assert report.planned.endswith(f"expected {solved.reached:.2f}x in FLOPs")
    assert f"WanTrim: {report.planned}" in caplog.messages
    met = abs(solved.reached / 1.3 - 1) < 0.03
    assert met or any("1.30x was asked for" in note for note in report.notes)
    assert kind in ("i2v_clip",) or met
    # queued once more, and after the graph was loaded anew
    assert torch.equal(tiny.ksampler(patched, given, steps=8), out)
    assert torch.equal(tiny.ksampler(dialled(model, speedup=1.3), given, steps=8), out)


@pytest.mark.parametrize("kind", [*tiny.KINDS, "ti2v without an image"])
def test_auto_looks_at_how_the_video_begins(kind):
    kind, _, without = kind.partition(" ")
    # large enough for CLIP's tokens to leave something to save
    case = tiny.case(kind, height=24, width=24)
    if without:
        case = tiny.Case(case.positive, case.negative, torch.zeros_like(case.latent))
    begins_with_a_picture = kind not in ("t2v", "fun", "vace") and not without
    name = "detail" if begins_with_a_picture else "motion"
    auto, by_hand = (
        dialled(tiny.base_model(kind), speedup=1.08, priority=p) for p in ("auto", name)
    )
    for patched in (auto, by_hand):
        tiny.ksampler(patched, case, steps=8)
    assert plan_of(auto).priority == name
    assert f"priority auto ({name})" in tiny.report_of(auto).planned
    assert plan_of(auto).parts == plan_of(by_hand).parts


def test_the_plan_is_made_for_each_run():
    patched = dialled(tiny.base_model(), priority="balanced")
    keeps = []
    for steps in (4, 12):
        tiny.ksampler(patched, steps=steps)
        keeps.append(plan_of(patched).parts.tokens.schedule.keep_ratio)
        assert plan_of(patched).reached == pytest.approx(1.5, rel=0.03)
    assert keeps[0] < keeps[1] - 0.03
    # the input is the wish; nothing of a run stays on it
    assert attachment_of(patched).plan.tokens is None


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("speedup", [1.25, 2.0])
def test_it_costs_what_it_says(speedup, cfg):
    """Tokens, then blocks too, counted by torch in ComfyUI's own model."""
    dense = count_flops(lambda: demo_sample(demo_model(), cfg=cfg))
    for profile in (None, demo_profile()):
        patched = dialled(demo_model(), speedup=speedup, profile=profile, priority="detail")
        total = count_flops(lambda patched=patched: demo_sample(patched, cfg=cfg))
        assert dense / total == pytest.approx(plan_of(patched).reached, rel=0.03)
        assert (plan_of(patched).parts.blocks is None) == (profile is None)
        assert plan_of(patched).why or dense / total == pytest.approx(speedup, rel=0.05)


@pytest.mark.parametrize("priority", MIXES)
def test_a_profile_brings_blocks_and_heads(priority):
    patched = dialled(demo_model(), speedup=2.3, priority=priority, profile=demo_profile())
    out = demo_sample(patched, steps=10)
    parts, report = plan_of(patched).parts, tiny.report_of(patched)
    assert parts.tokens is not None and parts.blocks is not None
    assert f"priority {priority}, by its profile: " in report.planned
    assert report.steps[0].blocks_run == 16 and min(s.blocks_run for s in report.steps) < 12
    assert torch.isfinite(out).all()
    assert torch.equal(demo_sample(patched, steps=10), out)
    far = dialled(demo_model(), speedup=4.0, priority=priority, profile=demo_profile())
    demo_sample(far, steps=10)
    assert plan_of(far).parts.heads is not None
    assert tiny.report_of(far).attention_share == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 0), (3, 0), (1, 2), (2, 3)])
def test_dense_steps_are_whole(first, last):
    inputs = {"dense_first_steps": first, "dense_last_steps": last, "profile": demo_profile()}
    patched = dialled(demo_model(), speedup=4.0, **inputs)
    demo_sample(patched, steps=8)
    whole = [step.kept_share == 1.0 for step in tiny.report_of(patched).steps]
    assert whole == [i < max(1, first) or i >= 8 - last for i in range(8)]


def test_what_cannot_be_reached_is_said():
    patched = dialled(tiny.base_model(), speedup=3.0, dense_last_steps=1)
    tiny.ksampler(patched)
    [note] = [n for n in tiny.report_of(patched).notes if "was asked for" in n]
    assert note.startswith("3.00x was asked for and 1.")
    assert "2 of 4 steps compute everything" in note and "without a profile" in note
    # one step
    alone = dialled(tiny.base_model())
    assert torch.equal(tiny.ksampler(alone, steps=1), tiny.ksampler(tiny.base_model(), steps=1))
    assert any("1.50x was asked for and 1.00x" in n for n in tiny.report_of(alone).notes)


def test_attaching_twice_is_attaching_once():
    once = dialled(tiny.base_model(), speedup=1.3)
    twice = dialled(dialled(tiny.base_model(), speedup=3.0, priority="motion"), speedup=1.3)
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
    "paper tokens": lambda m: tiny.at_node(m, "paper", prune_ratio=0.2),
    "no tokens": lambda m: tiny.at_node(m, prune_ratio=0.0),
    "blocks": lambda m: test_blocks.at_node(m, "fixed", blocks="3, 5")[0],
    "heads": lambda m: WanTrimHeads.execute(m, demo_profile(), 0.3, "drop").result[0],
}


@pytest.mark.parametrize("name", EXPERTS)
def test_what_an_expert_node_decides_wins_in_any_order(name):
    """The dial solves the rest, so that all of it together is what was asked for."""
    expert, kind = EXPERTS[name], name.split()[-1]

    def dial(model):
        return dialled(model, speedup=1.28, profile=demo_profile())

    behind, before = expert(dial(demo_model())), dial(expert(demo_model()))
    out = demo_sample(behind)
    assert torch.equal(demo_sample(before), out)
    alone = expert(demo_model())
    assert not torch.equal(demo_sample(alone), out)
    wanted = getattr(attachment_of(alone).plan, kind)
    for model in (behind, before):
        parts = plan_of(model).parts
        mine = getattr(parts, kind)
        assert mine is getattr(attachment_of(model).plan, kind)
        assert type(mine) is type(wanted)
        if kind == "tokens":
            assert mine == wanted and parts.blocks is not None
        assert plan_of(model).reached == pytest.approx(1.28, rel=0.03)


def test_all_three_expert_nodes_leave_the_dial_nothing():
    def experts(model):
        for name in ("tokens", "blocks", "heads"):
            model = EXPERTS[name](model)
        return model

    both = experts(dialled(demo_model(), speedup=3.0, profile=demo_profile()))
    assert torch.equal(demo_sample(both), demo_sample(experts(demo_model())))
    [note] = [n for n in tiny.report_of(both).notes if "was asked for" in n]
    assert "what WanTrim Tokens and WanTrim Heads and WanTrim Blocks decide is taken" in note
    off = dialled(experts(demo_model()), speedup=1.0)
    assert torch.equal(demo_sample(off), demo_sample(both))


def test_a_trained_router_stays_home_in_a_final_render(tmp_path, monkeypatch):
    model = tiny.base_model()
    trained = test_blocks.skipping(model)
    final = dialled(trained, render=FINAL)
    assert not final.additional_models.get(KEY)
    assert torch.equal(tiny.ksampler(final), tiny.ksampler(model))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("neighbour", [slg, easycache, shifted, lora])
def test_neighbours_keep_working(neighbour, order):
    base = tiny.base_model()
    model = dialled(neighbour(base)) if order == "in front" else neighbour(dialled(base))
    out = tiny.ksampler(model, steps=6)
    assert torch.isfinite(out).all()
    assert torch.equal(tiny.ksampler(model, steps=6), out)
    assert not torch.allclose(out, tiny.ksampler(neighbour(base), steps=6), atol=1e-3)


@pytest.mark.parametrize("sampler", ["heun", "uni_pc", "dpmpp_2m"])
def test_other_samplers(sampler):
    patched = dialled(tiny.base_model())
    out = tiny.ksampler(patched, steps=6, sampler=sampler)
    assert torch.isfinite(out).all() and plan_of(patched).reached == pytest.approx(1.5, rel=0.03)
    assert torch.equal(tiny.ksampler(patched, steps=6, sampler=sampler), out)


def test_context_windows():
    model = ContextWindowsManualNode.execute(
        dialled(tiny.base_model()), 3, 1, "standard_static", 1, False, "pyramid", 2, False
    ).result[0]
    out = tiny.ksampler(model, tiny.case(frames=7), steps=5)
    assert torch.isfinite(out).all()
    assert attachment_of(model).solved.reached == pytest.approx(1.5, rel=0.04)


def test_attention_patches_of_others_make_it_dense():
    model, bare = dialled(tiny.base_model()), tiny.base_model().clone()
    for patched in (model, bare):
        patched.set_model_patch(lambda given: 1.1 * given["x"], "attn1_patch")
    assert torch.equal(tiny.ksampler(model), tiny.ksampler(bare))
    assert any("attn1_patch" in note for note in tiny.report_of(model).notes)


def test_a_slim_model_keeps_its_heads(tmp_path):
    source = open_source(CHECKPOINT)
    export_slim(source, tmp_path / "slim.safetensors", whole_width(source.model))
    patched = dialled(
        load_slim(str(tmp_path / "slim.safetensors")), speedup=4.0, profile=demo_profile()
    )
    assert torch.isfinite(demo_sample(patched, steps=6)).all()
    parts = plan_of(patched).parts
    assert parts.heads is None and parts.blocks is not None and parts.tokens is not None


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


@pytest.mark.parametrize("priority", MIXES)
@pytest.mark.parametrize(("steps", "first"), [(8, 4), (12, 4), (12, 9)])
def test_a_pair_meets_one_speedup(steps, first, priority):
    high, low = paired(tiny.base_model(), low_expert(), speedup=1.4, priority=priority)
    out = run_pair(high, low, first, steps)
    assert torch.isfinite(out).all()
    parts = plan_of(high), plan_of(low)
    cost = first / parts[0].reached + (steps - first) / parts[1].reached
    assert steps / cost == pytest.approx(1.4, rel=0.03)
    if priority == "balanced":
        assert parts[0].reached == pytest.approx(parts[1].reached, rel=0.06)
    # each was solved for its own steps
    for model, count, name in ((high, first, "high"), (low, steps - first, "low")):
        report = tiny.report_of(model)
        assert len(report.steps) == count and report.steps[0].kept_share == 1.0
        assert f"here the {name} noise one" in report.planned
        assert "of this expert's own steps" in report.planned
    assert torch.equal(run_pair(high, low, first, steps), out)


def test_two_and_two_steps_say_what_is_reachable():
    high, low = paired(tiny.base_model(), low_expert(), speedup=2.5)
    run_pair(high, low, 2, 4)
    for model in (high, low):
        assert tiny.shares(model)[0] == 1.0 > tiny.shares(model)[1]
        [note] = [n for n in tiny.report_of(model).notes if "was asked for" in n]
        assert "both experts together reach 1." in note and "of the 2.50x" in note
        assert "about 2 + 2 steps" in note


def test_dense_steps_of_a_pair_are_those_of_the_whole_run():
    high, low = paired(
        tiny.base_model(), low_expert(), dense_first_steps=3, dense_last_steps=2, speedup=1.2
    )
    run_pair(high, low, 5, 10)
    whole = [[share == 1.0 for share in tiny.shares(model)] for model in (high, low)]
    assert whole == [[True] * 3 + [False] * 2, [True] + [False] * 2 + [True] * 2]


def test_a_boundary_by_hand_moves_the_budget():
    solved = []
    for boundary in (0.0, 0.99):
        inputs = {"boundary": boundary, "priority": "motion", "speedup": 1.3}
        high, low = paired(tiny.base_model(), low_expert(), **inputs)
        run_pair(high, low, 4, 8)
        solved.append(plan_of(high).reached)
    # as if the low expert had most of the steps
    assert abs(solved[1] - solved[0]) > 0.01


def test_expert_nodes_win_on_a_pair_too():
    high, low = paired(tiny.base_model(), low_expert())
    refined = tiny.at_node(low, prune_ratio=0.1)
    first = run_pair(high, refined)
    before = paired(tiny.base_model(), tiny.at_node(low_expert(), prune_ratio=0.1))
    assert torch.equal(run_pair(*before), first)
    assert plan_of(refined).parts.tokens == preset_plan("refresh", 0.9)


def test_defaults_of_the_nodes():
    names = ["speedup", "priority", "render", "dense_first_steps", "dense_last_steps"]
    inputs = {i.id: i for i in WanTrim.define_schema().inputs}
    assert list(inputs) == ["model", "profile", *names]
    assert {name: inputs[name].default for name in names} == DEFAULTS
    assert (inputs["speedup"].min, inputs["speedup"].max) == (1.0, 4.0)
    assert inputs["profile"].optional and not inputs["model"].optional
    pair = {i.id: i for i in WanTrimPair.define_schema().inputs}
    experts = ["model_high_noise", "model_low_noise", "profile_high_noise", "profile_low_noise"]
    assert list(pair) == [*experts, *names, "boundary"]
    assert {name: pair[name].default for name in names} == DEFAULTS and pair[
        "boundary"
    ].default == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"speedup": 0.5}, r"WanTrim: speedup: expected 1 \(off\) to 4, got 0.5"),
        ({"speedup": 5.0}, "WanTrim: speedup"),
        (
            {"priority": "speed"},
            "WanTrim: priority: expected one of auto, motion, balanced, detail",
        ),
        ({"render": "both"}, "WanTrim: render: expected draft or final"),
        ({"dense_first_steps": -1}, "WanTrim: dense_first_steps: expected 0 to 100"),
        ({"dense_last_steps": 1000}, "WanTrim: dense_last_steps: expected 0 to 100"),
    ],
)
def test_linked_nonsense_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        dialled(tiny.base_model(), **inputs)


def test_other_models_and_profiles_are_refused():
    with pytest.raises(ValueError, match="WanTrim: the input 'model' expects a Wan video model"):
        dialled(model_of("Flux"))
    with pytest.raises(ValueError, match="WanTrim: profile: .*another model"):
        dialled(tiny.base_model(), profile=demo_profile())
    with pytest.raises(ValueError, match="WanTrim Pair: profile: .*another model"):
        paired(tiny.base_model(), low_expert(), profile_low_noise=demo_profile())
    with pytest.raises(ValueError, match="WanTrim Pair: 'model_high_noise' and .* same model"):
        paired(tiny.base_model(), tiny.base_model().clone())
    with pytest.raises(ValueError, match="WanTrim Pair: boundary"):
        paired(tiny.base_model(), low_expert(), boundary=1.5)
