"""WanTrim Report: the plan beside the deed, measured speed, and its three outputs."""

import json
from dataclasses import replace

import pytest
import torch

from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import attach, attachment_of
from wantrim.hosts.comfyui.dense_step import Unmeasurable, call_sizes
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.heads import PATTERNS
from wantrim.methods.routers import FixedRouter
from wantrim.nodes.report import WanTrimReport
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.test_heads import heads

VIDEO = torch.rand(9, 64, 80, 3)
BLOCKS = BlockPlan(FixedRouter((2, 3)), BlockBudget(0.5, 0.5, "constant"), skipped="identity")
REUSE = BlockPlan(FixedRouter((2, 3)), BlockBudget(0.5, 0.5, "constant"), skipped="reuse")
PLANS = {
    "paper": TrimPlan(tiny.token_plan()),
    "keys kept": TrimPlan(tiny.token_plan(dropped_kv="keep")),
    "refresh": TrimPlan(tiny.token_plan(restore="last_update", trim_reselecting=True,
                                        importance="rotation", reselect_every=40)),
    "late": TrimPlan(tiny.token_plan(restore="last_update", trim_reselecting=True,
                                     importance="rotation", start=0.4)),
    "blocks": TrimPlan(blocks=BLOCKS),
    "blocks that repeat": TrimPlan(blocks=REUSE),
    "heads": TrimPlan(heads=heads()),
    # blocks 0 and 3 choose the tokens and have to run
    "all": TrimPlan(tiny.token_plan(), heads(), replace(BLOCKS, router=FixedRouter((1, 2)))),
}  # fmt: skip


def report(model, low=None, **options) -> tuple[str, torch.Tensor, dict]:
    text, picture, figures = WanTrimReport.execute(model, VIDEO, low, **options).result
    return text, picture, json.loads(figures)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_what_was_planned_is_what_was_done(plan, kind):
    model = attach(tiny.base_model(kind), plan)
    tiny.sample(model, tiny.case(kind), steps=5)
    text, _, figures = report(model)
    (one,) = figures["reports"]
    assert len(one["steps"]) == 5 and not one["did_not_happen"]
    for step in one["steps"]:
        planned, done = step["planned"], step["executed"]
        assert done["blocks"] == planned["blocks"]
        for kept, wanted in zip(done["tokens_per_block"], planned["tokens_per_block"], strict=True):
            assert kept in (0, wanted)
        assert done["tokens_per_block"].count(0) == tiny.LAYERS - planned["blocks"]
        if plan.heads is not None:
            assert sum(planned["heads"].values()) == tiny.LAYERS * tiny.HEADS
            assert set(done["heads"]) <= set(PATTERNS)
            # 2 blocks of 6 are skipped in "all"
            assert sum(done["heads"].values()) == planned["blocks"] * tiny.HEADS
    trims = [step["flops_share"] < 1 for step in one["steps"]]
    assert trims[-1]
    if one["reference"] is None:
        assert all(trims) and "Measured speed-up: none" in text
    else:
        whole = [number for number, trim in enumerate(trims, 1) if not trim]
        assert set(one["reference"]["steps"]) <= set(whole)
        assert one["measured"]["step"] > 0 and one["expected"]["step"] > 1


def test_heads_that_another_node_replaced_are_not_counted_as_done():
    model = attach(tiny.base_model(), TrimPlan(heads=heads()))
    model.set_model_patch_replace(
        lambda args, extra: {"img": args["img"]}, "dit", "double_block", 3
    )
    tiny.sample(model, steps=1)
    (step,) = report(model)[2]["reports"][0]["steps"]
    # block 3 was all "frame"
    before, after = step["planned"]["heads"]["frame"], step["executed"]["heads"]["frame"]
    assert before - after == tiny.HEADS


def test_a_report_of_heads_alone_is_of_their_work():
    model = attach(tiny.base_model(), TrimPlan(heads=heads()))
    tiny.sample(model, steps=2)
    text, _, figures = report(model)
    assert "Token work done" not in text
    share = figures["reports"][0]["flops_share"]
    assert 0.5 < share < 1 and f"Work done: {share:.1%}" in text


def test_json_of_both_experts_and_of_a_model_without_a_plan():
    high, low = tiny.trimmed(tiny.base_model("i2v")), tiny.trimmed(tiny.base_model("i2v"), 0.5)
    for model in (high, low):
        tiny.sample(model, tiny.case("i2v"), steps=2)
    text, picture, figures = report(high, low)
    assert figures["format"] == 1
    names = [one["model"] for one in figures["reports"]]
    assert names == ["WanModel, high noise expert", "WanModel, low noise expert"]
    assert picture.ndim == 4 and text.count("What did not happen") == 2
    (bare,) = report(tiny.base_model())[2]["reports"]
    assert bare["steps"] == [] and "no WanTrim plan" in bare["did_not_happen"][0]


def test_the_models_sizes_are_those_of_the_run():
    model = tiny.trimmed(tiny.base_model("i2v_clip"))
    tiny.sample(model, tiny.case("i2v_clip", tokens=(11, 11)), steps=1)
    shape = attachment_of(model).report.shape
    assert (shape.dim, shape.num_blocks, shape.head_dim) == (tiny.DIM, tiny.LAYERS, 12)
    assert (shape.text_tokens, shape.image_tokens) == (11, tiny.CLIP_TOKENS)
    assert (shape.in_channels, shape.text_dim) == (36, tiny.TEXT_DIM)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("tokens", [(7, 7), (7, 11)], ids=["batched", "split"])
def test_a_dense_step_is_timed_of_the_size_of_the_runs(kind, tokens):
    model, given = tiny.trimmed(tiny.base_model(kind)), tiny.case(kind, tokens=tokens)
    video = tiny.sample(model, given, steps=2)
    before = tiny.report_of(model)
    seen = []

    def watch(network, args, kwargs):
        seen.append((tuple(args[0].shape), tuple(kwargs["context"].shape)))

    network = model.model.diffusion_model
    hook = network.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        text, _, figures = report(model, measure_dense_step=True)
        # the run's own report is as it was
        assert tiny.report_of(model) is before and before.dense_seconds is None
        # warmed up, then timed
        timed, seen[:] = list(seen), []
        tiny.sample(model.clone(), given, steps=1)
    finally:
        hook.remove()
    assert timed == 2 * seen and len(seen) == before.steps[0].calls
    (one,) = figures["reports"]
    assert one["reference"]["seconds"] > 0 and one["reference"]["steps"] == []
    assert "timed apart" in one["reference"]["what"] and "timed apart" in text
    assert not one["did_not_happen"]
    assert torch.equal(tiny.sample(model, given, steps=2), video)


def test_a_dense_step_that_cannot_be_timed_is_said(monkeypatch):
    model = tiny.trimmed(tiny.base_model())
    tiny.sample(model, steps=2)
    attachment = attachment_of(model)
    attachment.unmeasurable = "the model was given a ControlNet as 'control'"
    text = report(model, measure_dense_step=True)[0]
    assert "no dense step was timed: the model was given a ControlNet" in text
    attachment.unmeasurable = None

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("wantrim.nodes.report.time_dense_step", full)
    assert "not enough memory" in report(model, measure_dense_step=True)[0]
    assert "no dense step" not in report(model)[0]


def test_only_sizes_are_kept_of_the_calls():
    model = tiny.trimmed(tiny.base_model("vace"))
    tiny.sample(model, tiny.case("vace"), steps=3)
    (call,) = attachment_of(model).calls
    assert {"x", "t", "c_crossattn", "control"} < set(call)
    assert not any(isinstance(value, torch.Tensor) for value in call.values())


def test_a_call_with_something_that_has_no_size_cannot_be_made_again():
    with pytest.raises(Unmeasurable, match="given a object as 'control'"):
        call_sizes({"x": torch.zeros(1), "control": object()})
