"""A catalogue of hostile hosts beside every plan: nothing ends a run, and the report is true."""

from functools import partial

import pytest
import torch

from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import attach, attach_part, attachment_of
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.routers import FixedRouter
from wantrim.nodes.profile import WanTrimProfile
from wantrim.nodes.report import WanTrimReport
from wantrim.report.figures import attention_left, mean_work, step_work
from wantrim.tests.comfyui import hostile, put, tiny
from wantrim.tests.comfyui.hostile import forward_of_its_own, in_front, options_with
from wantrim.tests.comfyui.test_heads import heads

AS_PLANNED = "everything ran as planned"
BLOCKS = BlockPlan(FixedRouter((2, 3)), BlockBudget(0.5, 0.5, "constant"))
PLANS = {
    "dial": put.dialled,
    "dial without context": partial(put.dialled, context="off"),
    "auto": lambda m: tiny.at_node(m, "auto"),
    "paper": lambda m: attach(m, TrimPlan(tiny.token_plan())),
    "heads": lambda m: attach(m, TrimPlan(heads=heads())),
    "blocks": lambda m: attach(m, TrimPlan(blocks=BLOCKS)),
    "shares and heads": lambda m: tiny.shared(
        m, 1.0, 1.0, 0.45, 0.0, 1.0, 0.45, heads=heads()
    ),
}  # fmt: skip
# forwards that hand over less or more than ComfyUI's own
FORWARDS = {
    "img txt vec pe": forward_of_its_own(),
    "img alone": forward_of_its_own(("img",)),
    "no pe": forward_of_its_own(("img", "txt", "vec")),
    "no vec": forward_of_its_own(("img", "txt", "pe")),
    "more keys": forward_of_its_own(("img", "txt", "vec", "pe", "block"), ("extra", "other")),
    "class swapped": hostile.class_swapped,
    "replaced": hostile.replaced_forward,
}
# options of another kind that change nothing of what a run is
HARMLESS = {
    "by keyword": in_front(hostile.by_keyword),
    "no patches": options_with(patches=...),
    "window of another kind": options_with(context_window=object()),
    "more channels": in_front(hostile.more_channels),
}
# those that leave us less to go by
OPTIONS = {
    "nothing announced": options_with(sample_sigmas=...),
    "announced None": options_with(sample_sigmas=None),
    "announced in words": options_with(sample_sigmas="karras"),
    "announced as a list": options_with(sample_sigmas=[1.0, 0.8, 0.5, 0.0]),
    "no sigmas": options_with(sigmas=...),
    "sigmas None": options_with(sigmas=None),
    "no prompts": options_with(uuids=None),
    "no roles": options_with(cond_or_uncond=None, uuids=...),
    "roles that do not fit": options_with(cond_or_uncond=[0, 1, 0, 1, 1]),
}
GUIDERS = {
    "list CFG": hostile.ListCFG,
    "no CFG": hostile.NoCFG,
    "guidance half of the way": hostile.HalfGuided,
    "prompt by prompt": hostile.PromptByPrompt,
}
SAMPLERS = {
    "early stop": hostile.early,
    "late start": hostile.late,
    "restarts": hostile.restarts,
    "repeated sigmas": hostile.repeats,
    "two calls": hostile.halves,
    "three calls": hostile.thirds,
    "jumps": hostile.jumps,
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def checked(model, out: torch.Tensor, dense: torch.Tensor) -> str:
    """The text of a run's report, after what holds for every one of them."""
    assert torch.isfinite(out).all()
    text, picture, _ = WanTrimReport.execute(model, torch.rand(9, 64, 80, 3)).result
    record = attachment_of(model).record
    assert record.finished and torch.isfinite(picture).all()
    planned = AS_PLANNED in text
    # all ran as planned only where something did
    assert not planned or not torch.equal(out, dense)
    solved = put.solved(model)
    if planned and solved is not None:
        assert 1 / mean_work(record) == pytest.approx(solved.reached, rel=0.05)
    if planned:
        assert all(step.as_planned for step in record.steps)
    return text


@plans
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_forwards_of_other_packs(forward, plan):
    dense = tiny.sample(forward(tiny.base_model()), steps=4)
    model = forward(plan(tiny.base_model()))
    out = tiny.sample(model, steps=4)
    text = checked(model, out, dense)
    if forward is hostile.replaced_forward:
        assert torch.equal(out, dense) and "never called through ComfyUI's hooks" in text
    if forward is hostile.class_swapped:
        assert torch.equal(out, tiny.sample(plan(tiny.base_model()), steps=4))
    if plan is PLANS["blocks"] and forward is not hostile.replaced_forward:
        # leaving a block out needs nothing but the hidden state
        assert AS_PLANNED in text


@plans
@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_options_that_are_missing_and_change_nothing(change, plan):
    plain, model = plan(tiny.base_model()), change(plan(tiny.base_model()))
    expected, out = tiny.sample(plain, steps=4), tiny.sample(model, steps=4)
    checked(model, out, tiny.sample(tiny.base_model(), steps=4))
    assert torch.equal(out, expected) and put.notes(model) == put.notes(plain)


@plans
@pytest.mark.parametrize("change", OPTIONS.values(), ids=OPTIONS)
def test_options_of_another_kind(change, plan):
    model = change(plan(tiny.base_model()))
    out = tiny.sample(model, steps=4)
    checked(model, out, tiny.sample(tiny.base_model(), steps=4))


@plans
@pytest.mark.parametrize("guider", GUIDERS.values(), ids=GUIDERS)
def test_guiders_of_other_packs(guider, plan):
    model = plan(tiny.base_model())
    out = hostile.run(model, guider)
    checked(model, out, hostile.run(tiny.base_model(), guider))
    assert tiny.report_of(model).kept_share < 0.95 or attention_left(tiny.report_of(model))


@plans
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_samplers_of_other_packs(sampler, plan):
    model = plan(tiny.base_model())
    out = hostile.run(model, sampler=sampler)
    checked(model, out, hostile.run(tiny.base_model(), sampler=sampler))
    assert torch.equal(hostile.run(model, sampler=sampler), out)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "early stop"])
@pytest.mark.parametrize("steps", [8, 20])
def test_the_wish_is_met_by_samplers_that_do_other_steps_than_they_announced(name, steps):
    model = put.dialled(tiny.base_model(), speedup=1.5)
    hostile.run(model, sampler=SAMPLERS[name], steps=steps)
    met = put.done(model) == pytest.approx(1.5, rel=0.03)
    assert put.solved(model).reached == pytest.approx(put.done(model), rel=0.03)
    # few steps, and calls at the last one that came at no other
    assert met or (steps == 8 and put.unmet(model) and name in ("restarts", "repeated sigmas"))


def test_a_sampler_that_begins_later_is_solved_for_what_remains():
    """Both experts' samplers announce the whole schedule; the second one begins where it is its turn."""
    model = put.dialled(tiny.base_model(), speedup=1.5)
    hostile.run(model, sampler=hostile.late, steps=8)
    record = tiny.report_of(model)
    assert len(record.steps) == 6 and not record.notes
    assert put.done(model) == pytest.approx(1.5, rel=0.03)
    assert put.asked(model)[0] == 1.0


def some_steps(first: int, last: int):
    """A sampler that does these of the steps that it announces."""

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(first, last):
            x = hostile.euler(x, model, sigmas, extra_args or {}, sigmas[i : i + 2])
        return x

    return sampler


# without a start image Wan changes experts at 0.875: behind the fifth of these steps
@pytest.mark.parametrize("boundary", [0.0, 0.9])
@pytest.mark.parametrize("stops", [3, 4, 5, 6])
@pytest.mark.parametrize("steps", [8, 20])
def test_a_pair_whose_samplers_announce_everything_shares_what_really_runs(boundary, stops, steps):
    """Two experts by steps to run: nobody says where the first one stops."""
    stops = stops * steps // 8
    models = put.paired(tiny.base_model(), put.low_expert(), boundary=boundary)
    for model, sampler in zip(
        models, (some_steps(0, stops), some_steps(stops, steps)), strict=True
    ):
        hostile.run(model, sampler=sampler, steps=steps)
    high, low = map(tiny.report_of, models)
    assert (len(high.steps), len(low.steps)) == (stops, steps - stops)
    # and it is said
    missing = f"{steps - stops} of {steps} steps that the sampler announced never came"
    assert any(missing in note for note in high.notes) and low.notes == put.unmet(models[1])
    met(models)
    # whoever does all of them with one expert gets what was asked for as well
    hostile.run(models[0], steps=steps)
    assert put.done(models[0]) == pytest.approx(1.5, rel=0.03) and not put.notes(models[0])


def met(models) -> None:
    """Both experts did what was asked for, or the second one says what came of it."""
    records = [tiny.report_of(model) for model in models]
    works = [step_work(record, step) for record in records for step in record.steps]
    found = len(works) / sum(works)
    # behind an expert's first step there is nothing between a step and none
    low = put.solved(models[1])
    assert low.together == pytest.approx(found, rel=0.01)
    if found != pytest.approx(low.wanted, rel=0.03):
        [note] = put.unmet(models[1])
        assert f"{low.wanted:.2f}x was asked for and {found:.2f}x is expected of both" in note


@pytest.mark.parametrize("first", [3, 5, 6])
def test_a_high_noise_expert_that_is_made_to_end_at_zero_shares_all_the_same(first):
    """As samplers of both experts in one do it: the last sigma of each is 0."""
    high, low = put.paired(tiny.base_model(), put.low_expert())
    # with a node behind the pair, which makes a plan anew
    low = attach_part(low, heads=None)
    tiny.sample(high, steps=8, last_step=first, force_full_denoise=True)
    tiny.sample(low, steps=8, start_step=first)
    records = [tiny.report_of(model) for model in (high, low)]
    assert [len(record.steps) for record in records] == [first, 8 - first]
    assert "of this expert's own steps" in records[1].planned
    met((high, low))


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_a_profile_is_recorded_or_says_why_not(forward):
    dense = tiny.sample(forward(tiny.base_model()), steps=2)
    model = forward(WanTrimProfile.execute(tiny.base_model(), "none").result[0])
    assert torch.equal(tiny.sample(model, steps=2), dense)


def test_no_model_over_the_wire_names_the_input():
    """ComfyUI hands on None where a node in front gave none."""
    nodes = {
        "WanTrim:": lambda: put.dialled(None),
        "WanTrim Pair: the input 'model_low_noise'": lambda: put.paired(tiny.base_model(), None),
        "WanTrim Tokens:": lambda: tiny.at_node(None),
        "WanTrim Blocks:": lambda: put.routed(None, "fixed"),
        "WanTrim Profile:": lambda: WanTrimProfile.execute(None, "none"),
    }
    for name, execute in nodes.items():
        with pytest.raises(ValueError, match=f"{name}.*expects a Wan video model, but got nothing"):
            execute()
    text, _, _ = WanTrimReport.execute(None, None).result
    assert "'model' has no WanTrim plan" in text
