"""WanTrim Report: the plan beside the deed, measured speed, and its three outputs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import comfy.samplers
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import attach, attachment_of
from wantrim.hosts.comfyui.dense_step import Unmeasurable, call_sizes
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.heads import PATTERNS
from wantrim.methods.routers import FixedRouter
from wantrim.nodes import report as report_node
from wantrim.nodes.report import WanTrimReport
from wantrim.tests.comfyui import put, tiny
from wantrim.tests.comfyui.neighbours import attention_patched, easycache, enhanced
from wantrim.tests.comfyui.test_heads import heads

VIDEO = torch.rand(9, 64, 80, 3)
BLOCKS = BlockPlan(FixedRouter((2, 3)), BlockBudget(0.5, 0.5, "constant"))
AS_PLANNED = "everything ran as planned"
PLANS = {
    "paper": lambda m: attach(m, TrimPlan(tiny.token_plan())),
    "late": lambda m: attach(m, TrimPlan(tiny.token_plan(start=0.4))),
    "blocks": lambda m: attach(m, TrimPlan(blocks=BLOCKS)),
    "heads": lambda m: attach(m, TrimPlan(heads=heads())),
    "shares": lambda m: tiny.shared(m, 1.0, 1.0, 0.45, 0.0, 0.7),
    "whole and repeated": lambda m: tiny.shared(m, 1.0, 0.0, 1.0, 0.0, 0.0, context=False),
    "shares and heads": lambda m: tiny.shared(m, 1.0, 1.0, 0.45, 0.2, 1.0, heads=heads()),
    # blocks 0 and 3 choose the tokens and have to run
    "all": lambda m: tiny.shared(m, 1.0, 0.0, 1.0, 0.0, 1.0, tokens=tiny.token_plan(),
                                 heads=heads(), blocks=replace(BLOCKS, router=FixedRouter((1, 2)))),
}  # fmt: skip


def report(model, low=None, **options) -> tuple[str, torch.Tensor, dict]:
    text, picture, figures = WanTrimReport.execute(model, VIDEO, low, **options).result
    return text, picture, json.loads(figures)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_what_was_planned_is_what_was_done(plan, kind):
    model = plan(tiny.base_model(kind))
    tiny.sample(model, tiny.case(kind), steps=5)
    text, _, figures = report(model)
    (one,) = figures["reports"]
    assert len(one["steps"]) == 5 and not one["did_not_happen"] and AS_PLANNED in text
    made = attachment_of(model).plan
    for step in one["steps"]:
        planned, done = step["planned"], step["executed"]
        assert done == planned and not step["answered"]
        assert step["repeated"] == (planned["blocks"] == 0) == (step["share"] == 0)
        assert done["tokens_per_block"].count(0) == tiny.LAYERS - planned["blocks"]
        if made.heads is not None:
            assert set(done["heads"]) <= set(PATTERNS)
            assert sum(done["heads"].values()) == planned["blocks"] * tiny.HEADS
    if made.shares is not None:
        assert [step["share"] for step in one["steps"]] == list(made.shares.shares)
        count = made.shares.shares.count(0.0)
        assert (f"{count} repeated" in text) == (count > 0)
        assert text.count("  repeated") == count
    trims = [step["flops_share"] < 1 for step in one["steps"]]
    assert any(trims)
    if one["reference"] is None:
        assert all(trims) and "No seconds are compared" in text
    else:
        whole = [number for number, trim in enumerate(trims, 1) if not trim]
        assert set(one["reference"]["steps"]) <= set(whole)
        partial = [s for s in one["steps"] if 0 < s["flops_share"] < 1]
        assert (one["measured"]["step"] is None) != bool(partial)
        assert one["measured"]["run"] > 0 and one["done"]["run"] > 1


def test_heads_that_another_node_replaced_are_not_counted_as_done():
    model = attach(tiny.base_model(), TrimPlan(heads=heads()))
    model.set_model_patch_replace(
        lambda args, extra: {"img": args["img"]}, "dit", "double_block", 3
    )
    tiny.sample(model, steps=1)
    text, _, figures = report(model)
    (step,) = figures["reports"][0]["steps"]
    assert "some blocks did not run as planned" in text and AS_PLANNED not in text
    # block 3 was all "frame"
    before, after = step["planned"]["heads"]["frame"], step["executed"]["heads"]["frame"]
    assert before - after == tiny.HEADS


def test_a_report_of_heads_alone_is_of_their_work():
    model = attach(tiny.base_model(), TrimPlan(heads=heads()))
    tiny.sample(model, steps=2)
    text, _, figures = report(model)
    share = figures["reports"][0]["flops_share"]
    assert 0.5 < share < 1 and text.startswith(f"{1 / share:.2f}x less work; a step took ")
    assert figures["verdict"] == text.splitlines()[0]
    assert "all 2 steps with heads in patterns" in text


def test_json_of_both_experts_and_of_a_model_without_a_plan():
    high, low = tiny.trimmed(tiny.base_model("i2v")), tiny.trimmed(tiny.base_model("i2v"), 0.5)
    for model in (high, low):
        tiny.sample(model, tiny.case("i2v"), steps=2)
    text, picture, figures = report(high, low)
    assert figures["format"] == 3
    names = [one["model"] for one in figures["reports"]]
    assert names == ["WanModel, high noise expert", "WanModel, low noise expert"]
    assert picture.ndim == 4 and text.count("What did not happen") == 2
    # of both together, and of each
    first, *others = text.split("\n\n")
    assert first == figures["verdict"] and others[0].splitlines()[0] != first
    (bare,) = report(tiny.base_model())[2]["reports"]
    assert bare["steps"] == [] and "no WanTrim plan" in bare["did_not_happen"][0]


def test_the_models_sizes_are_those_of_the_run():
    model = tiny.trimmed(tiny.base_model("i2v_clip"))
    tiny.sample(model, tiny.case("i2v_clip", tokens=(11, 11)), steps=1)
    shape = attachment_of(model).record.shape
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
    [ran] = attachment_of(model).runs
    ran.unmeasurable = "the model was given a ControlNet as 'control'"
    text = report(model, measure_dense_step=True)[0]
    assert "no whole step was timed: the model was given a ControlNet" in text
    ran.unmeasurable = None

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("wantrim.nodes.report.time_dense_step", full)
    assert "not enough memory" in report(model, measure_dense_step=True)[0]
    assert "no whole step was timed" not in report(model)[0]
    # one of its calls did not come to the model
    ran.calls.append(ran.calls[0])
    text = report(model, measure_dense_step=True)[0]
    assert "another node made or answered calls of the first step" in text


def test_only_sizes_are_kept_of_the_calls():
    model = tiny.trimmed(tiny.base_model("vace"))
    tiny.sample(model, tiny.case("vace"), steps=3)
    [ran] = attachment_of(model).runs
    (call,) = ran.calls
    assert {"x", "t", "c_crossattn", "control"} < set(call)
    assert not any(isinstance(value, torch.Tensor) for value in call.values())


def test_a_call_with_something_that_has_no_size_cannot_be_made_again():
    with pytest.raises(Unmeasurable, match="given a object as 'control'"):
        call_sizes({"x": torch.zeros(1), "control": object()})


# what other packs may put in the way of a plan: each has to be said


def bypassed(model):
    """A forward of its own that ComfyUI's wrappers never see."""
    patched, network = model.clone(), model.model.diffusion_model

    def forward(x, timestep, context, clip_fea=None, time_dim_concat=None, **kwargs):
        return network._forward(x, timestep, context, clip_fea, time_dim_concat, **kwargs)

    patched.add_object_patch("diffusion_model.forward", forward)
    return patched


def own_forward(model, answers=()):
    """The inner forward of another pack: knows no block replacement, and may answer calls itself."""
    patched, network, seen = model.clone(), model.model.diffusion_model, []
    original = type(network).forward_orig

    def forward_orig(x, *args, transformer_options, **kwargs):
        seen.append(x)
        if len(seen) in answers:
            return 0.5 * x[:, : network.out_dim]
        bare = {k: v for k, v in transformer_options.items() if k != "patches_replace"}
        given = transformer_options if answers else bare
        return original(network, x, *args, transformer_options=given, **kwargs)

    patched.add_object_patch("diffusion_model.forward_orig", forward_orig)
    return patched


def some_blocks(model):
    """A wrapper inside of ours that takes two blocks over."""
    patched = model.clone()

    def wrapper(executor, *args, **kwargs):
        *args, options = args
        replaced = dict(options["patches_replace"]["dit"])
        for block in (2, 4):
            replaced.pop(("double_block", block), None)
        options = {**options, "patches_replace": {**options["patches_replace"], "dit": replaced}}
        return executor(*args, options, **kwargs)

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "takes two", wrapper)
    return patched


def own_attention(model):
    """A block that computes its attention without ComfyUI's function."""
    patched, block = model.clone(), model.model.diffusion_model.blocks[3]

    def forward(x, e, freqs, context, **kwargs):
        return 0.9 * x + 0.1 * block.self_attn.norm_q(x)

    patched.add_object_patch("diffusion_model.blocks.3.forward", forward)
    return patched


def replaced_block(model):
    patched = model.clone()
    patched.set_model_patch_replace(lambda args, _: {"img": args["img"]}, "dit", "double_block", 3)
    return patched


WATCHED = ("paper", "heads", "shares", "shares and heads", "all")
# name -> what is put behind the plan, what is said, and the plans that it is in the way of
IN_THE_WAY = {
    "forward": (bypassed, "never called through ComfyUI's hooks", PLANS),
    "inner forward": (own_forward, "without asking what its blocks should do", WATCHED),
    "some blocks": (some_blocks, "without asking what its blocks should do", ("heads", "paper")),
    # in a step whose blocks need not be looked at it cannot be told
    "cache": (lambda m: own_forward(m, (3,)), "another node's cache", (*WATCHED, "blocks")),
    "attention": (own_attention, "some blocks did not run as planned", WATCHED[1:4]),
    "block": (replaced_block, "some blocks did not run as planned", WATCHED[1:4]),
    "self-attention": (enhanced, "self-attention of its own", WATCHED),
    "patch": (attention_patched, "attn1_patch", WATCHED),
}
# of these only a part is lost
STILL = ("cache", "attention", "block", "some blocks")


@pytest.mark.parametrize(("way", "name"), [(w, n) for w, v in IN_THE_WAY.items() for n in v[2]])
def test_what_is_in_the_way_is_said(way, name):
    other, said, _ = IN_THE_WAY[way]
    model = other(PLANS[name](tiny.base_model()))
    out = tiny.sample(model, steps=5)
    text, picture, figures = report(model)
    (one,) = figures["reports"]
    notes = one["did_not_happen"]
    assert any(said in note for note in notes), notes
    assert AS_PLANNED not in text and torch.isfinite(picture).all()
    if way == "forward":
        assert not one["steps"] and "ran untouched" in text
    if name in ("paper", "heads") and way not in STILL:
        # and it is true
        assert torch.equal(out, tiny.sample(other(tiny.base_model()), steps=5))
        assert all(step["flops_share"] == 1 for step in one["steps"])


def test_answers_of_another_nodes_cache_are_no_work_of_ours():
    """Also in steps whose blocks need not be looked at."""
    for put_on in (
        lambda m: tiny.shared(m, *[1.0] * 5, 0.0, context=False),
        lambda m: put.dialled(m, speedup=1.2, context="off"),
        PLANS["paper"],
    ):
        model = easycache(put_on(tiny.base_model()))
        tiny.sample(model, steps=6)
        text, _, figures = report(model)
        (one,) = figures["reports"]
        answered = [step["answered"] for step in one["steps"]]
        assert any(answered) and not answered[0] and AS_PLANNED not in text
        assert "did not run in some steps: another node's cache" in text
        assert text.count("  answered by another node") == sum(answered)
        own = [s["flops_share"] for s, by in zip(one["steps"], answered, strict=True) if not by]
        assert f"{len(own) / sum(own):.2f}x" in text.splitlines()[0] or min(own) == 1
        for step in one["steps"]:
            if step["answered"]:
                assert step["flops_share"] == step["token_work"] == 0 and not step["repeated"]


def test_steps_that_never_come_are_said():
    cached = EasyCacheNode.execute(tiny.base_model(), 3.0, 0.15, 0.95, False).result[0]
    model = put.dialled(cached, speedup=1.2, context="off")
    tiny.sample(model, steps=8)
    text, _, figures = report(model)
    came = len(figures["reports"][0]["steps"])
    assert came < 8 and AS_PLANNED not in text
    assert f"{8 - came} of 8 steps that the sampler announced never came to the model" in text


def test_a_sampler_that_does_other_steps_than_it_announces_says_what_is_reached():
    """Three model calls a step: it is found out after the first one."""

    def thrice(model, x, sigmas, extra_args=None, callback=None, disable=None, **kwargs):
        for begin, end in zip(sigmas, sigmas[1:], strict=False):
            for part in range(3):
                sigma = begin + (end - begin) * part / 3
                clean = model(x, sigma * x.new_ones(len(x)), **extra_args)
                x = x + (x - clean) / sigma * (end - begin) / 3
        return x

    # whole or repeated: nine of twelve calls, eight or six
    for wanted, done in ((1.3, 12 / 9), (1.5, 12 / 8), (2.0, 12 / 6), (1.4, None)):
        model = put.dialled(tiny.base_model(), speedup=wanted, context="off")
        given = tiny.case()
        sigmas = torch.tensor([*tiny.simple_sigmas(model, 4), 0.0])
        noise = comfy.sample.prepare_noise(given.latent, 7)
        comfy.sample.sample_custom(
            model, noise, 5.0, comfy.samplers.KSAMPLER(thrice), sigmas, given.positive,
            given.negative, given.latent, disable_pbar=True, seed=7,
        )  # fmt: skip
        text, _, figures = report(model)
        (one,) = figures["reports"]
        reached = attachment_of(model).solved.reached
        assert len(one["steps"]) == 12 and 1 / one["flops_share"] == pytest.approx(reached)
        assert (AS_PLANNED in text) is (done is not None)
        assert done is None or reached == pytest.approx(done)
    said = f"1.40x was asked for and {reached:.2f}x is expected: the steps that are left cannot"
    assert said in text


def test_a_cancelled_step_is_no_deviation():
    model = PLANS["shares"](tiny.base_model())
    calls = []

    def override(func, *args, **kwargs):
        calls.append(1)
        if len(calls) > 2 * tiny.LAYERS + 5:
            raise KeyboardInterrupt
        return func(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    with pytest.raises(KeyboardInterrupt):
        tiny.sample(model, steps=5)
    text, _, figures = report(model)
    (one,) = figures["reports"]
    assert not one["finished"] and not one["did_not_happen"] and "did not finish" in text
    assert [step["executed"]["blocks"] for step in one["steps"]] == [tiny.LAYERS, 2]


@pytest.mark.parametrize("options", [{}, {"speedup": 1.0}])
def test_a_run_that_failed_before_its_first_step_says_so(options):
    def fails(executor, *args, **kwargs):
        raise RuntimeError("broken")

    model = put.dialled(tiny.base_model(), **options)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "fails", fails)
    with pytest.raises(RuntimeError, match="broken"):
        tiny.sample(model)
    said = report(model)[0].splitlines()[0]
    assert said == "The run did not finish (cancelled or failed)."


def test_a_long_video_is_not_copied_to_show_six_frames(monkeypatch):
    seen = []
    draw = report_node.draw_report
    monkeypatch.setattr(
        report_node, "draw_report", lambda *given: seen.append(given[1]) or draw(*given)
    )
    model = PLANS["shares"](tiny.base_model())
    tiny.sample(model, steps=5)
    video = torch.full((9, 64, 80, 3), float("nan"))
    video[1:] = 3.0
    picture = WanTrimReport.execute(model, video).result[1]
    assert np.shares_memory(seen[0], video.numpy()) and picture.isfinite().all()
    clean = WanTrimReport.execute(model, video.nan_to_num().clamp(0, 1)).result[1]
    assert torch.equal(picture, clean)
