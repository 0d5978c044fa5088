"""Leaving out tokens or steps changes this run and nothing else."""

import copy
import gc
import weakref

import pytest
import torch

import comfy.model_management
from comfy.patcher_extension import WrappersMP
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import KEY, SESSION_KEY, attach, attachment_of, detach
from wantrim.methods.shares import Shares
from wantrim.report.words import record_text
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.passes import full_length, look_inside, observed

KINDS = WrappersMP.OUTER_SAMPLE, WrappersMP.DIFFUSION_MODEL


def with_tokens(model):
    return tiny.trimmed(model)


def with_shares(model):
    """Whole steps, one that is repeated and one on a part of the tokens."""
    return tiny.shared(model, 1, 1, 0, 0.4)


either = pytest.mark.parametrize("trim", [with_tokens, with_shares])


def wrapper_counts(model) -> dict[str, int]:
    return {kind: len(model.get_wrappers(kind, KEY)) for kind in KINDS}


def on_each_block(model, see):
    model.set_model_double_block_patch(lambda args: see(args) or args)


@either
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_output_changes_and_work_falls(kind, trim):
    model, given = tiny.base_model(kind), tiny.case(kind)
    patched = trim(model)
    out = tiny.sample(patched, given, steps=4)
    assert torch.isfinite(out).all()
    assert not torch.allclose(out, tiny.sample(model, given, steps=4), atol=1e-3)
    report = tiny.report_of(patched)
    assert report.finished and not report.notes
    assert report.kept_share < 0.9


@either
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_hidden_state_is_full_length_where_somebody_looks(kind, trim):
    patched = trim(tiny.base_model(kind))
    lengths = []
    on_each_block(patched, lambda args: lengths.append(args["img"].shape[1]))
    tiny.sample(patched, tiny.case(kind), steps=4)
    reference = tiny.PER_FRAME if kind == "fun" else 0
    ran = 4 if trim is with_tokens else 3
    assert lengths == [tiny.FRAMES * tiny.PER_FRAME + reference] * (ran * tiny.LAYERS)
    assert tiny.report_of(patched).kept_share < 0.9


@either
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_kept_tokens_alone_from_block_to_block_are_the_same_run(kind, trim, monkeypatch):
    """While nobody looks between the blocks, the tokens are gathered once."""
    look_inside(monkeypatch)
    given, outs, lengths = tiny.case(kind), [], []
    for look in (lambda m: m, full_length):
        base, passes = observed(look(tiny.base_model(kind)))
        patched = trim(base)
        outs.append(tiny.sample(patched, given, steps=4))
        lengths.append({h.shape[1] for seen in passes for h in seen.before.values()})
    reference = tiny.PER_FRAME if kind == "fun" else 0
    assert lengths[1] == {tiny.FRAMES * tiny.PER_FRAME + reference}
    # hints of VACE come in between
    assert (lengths[0] == lengths[1]) == (kind == "vace")
    assert (outs[0] - outs[1]).abs().max() <= 1e-5 * outs[1].abs().max()


def test_dropped_tokens_wait_until_the_next_choice():
    patched = tiny.trimmed(tiny.base_model())
    calls, hidden = tiny.watch(patched), []
    on_each_block(patched, lambda args: hidden.append(args["img"].clone()))
    tiny.sample(patched, steps=1)
    kept = {block: index[0].tolist() for block, index in calls[0].kept.items()}
    for block in (1, 2, 4, 5):
        same = (hidden[block] == hidden[block - 1]).all(-1)
        dropped = sorted(set(range(60)) - set(kept[block // 3 * 3]))
        # both rows, cond and uncond
        assert [row.nonzero().flatten().tolist() for row in same] == [dropped, dropped]
    assert not (hidden[3] == hidden[2]).all(-1).any()


@either
def test_base_model_and_other_branch_are_untouched(trim):
    model = tiny.base_model()
    expected = tiny.sample(model)
    before = repr(sorted(model.model_options["transformer_options"]))
    branch = model.clone()
    patched = trim(model)
    tiny.sample(patched)
    assert torch.equal(tiny.sample(model), expected)
    assert torch.equal(tiny.sample(branch), expected)
    assert attachment_of(model) is None and attachment_of(branch) is None
    assert repr(sorted(model.model_options["transformer_options"])) == before


@either
def test_requeue_gives_the_same_bytes(trim):
    patched = trim(tiny.base_model())
    first = tiny.sample(patched, steps=4)
    assert torch.equal(tiny.sample(patched, steps=4), first)
    assert torch.equal(tiny.sample(trim(tiny.base_model()), steps=4), first)


PLANS = {
    "tokens": TrimPlan(tiny.token_plan()),
    "shares": TrimPlan(shares=Shares((1.0, 0.94, 0.8), (1.0, 1.0, 0.4))),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_attach_twice_is_attach_once(plan):
    once = attach(tiny.base_model(), plan)
    twice = attach(once, plan)
    assert wrapper_counts(once) == wrapper_counts(twice) == dict.fromkeys(KINDS, 1)
    assert torch.equal(tiny.sample(twice), tiny.sample(once))
    assert len(tiny.report_of(twice).steps) == 3


@pytest.mark.parametrize("first", [lambda m: tiny.trimmed(m, 0.5), with_shares])
def test_second_plan_replaces_the_first(first):
    patched = tiny.trimmed(first(tiny.base_model()), 0.8)
    alone = tiny.trimmed(tiny.base_model(), 0.8)
    assert torch.equal(tiny.sample(patched), tiny.sample(alone))


@either
def test_neutral_plan_replaces_a_trimming_one(trim):
    patched = tiny.trimmed(trim(tiny.base_model()), keep=1.0)
    assert wrapper_counts(patched)[WrappersMP.DIFFUSION_MODEL] == 0
    assert torch.equal(tiny.sample(patched), tiny.sample(tiny.base_model()))


@either
def test_detach_leaves_nothing(trim):
    model = tiny.base_model()
    clean = detach(trim(model))
    assert clean.model_options == model.model_options
    assert wrapper_counts(clean) == dict.fromkeys(KINDS, 0)
    assert not any(found for kind in clean.wrappers.values() for found in kind.values())
    assert clean.object_patches == model.object_patches
    assert torch.equal(tiny.sample(clean), tiny.sample(model))


@either
def test_plan_survives_a_further_clone(trim):
    patched = trim(tiny.base_model())
    out = tiny.sample(patched, steps=4)
    assert torch.equal(tiny.sample(patched.clone(), steps=4), out)


def test_plan_and_report_survive_a_deep_copy_of_the_options():
    # older hosts deep-copy model_options with every clone
    patched = tiny.trimmed(tiny.base_model())
    copied = copy.deepcopy(patched.model_options)
    assert copied["transformer_options"][KEY] is attachment_of(patched)


class Broken(Exception):
    pass


def interrupt():
    raise comfy.model_management.InterruptProcessingException


def fail():
    raise Broken("in the middle of a block")


# blocks that ran before: in the second step of tokens, in the partial one of shares
MIDDLE = {with_tokens: tiny.LAYERS + 2, with_shares: 2 * tiny.LAYERS + 2}


@either
@pytest.mark.parametrize("stop", [interrupt, fail])
def test_run_that_is_stopped_leaves_the_next_one_clean(stop, trim):
    model = tiny.base_model()
    expected = tiny.sample(model, steps=4)
    patched = trim(model)
    whole = tiny.sample(patched, steps=4)
    options = repr(patched.model_options)
    stopping = patched.clone()
    ran = []
    on_each_block(stopping, lambda args: ran.append(1) or (len(ran) == MIDDLE[trim] and stop()))
    with pytest.raises((comfy.model_management.InterruptProcessingException, Broken)):
        tiny.sample(stopping, steps=4)
    report = tiny.report_of(patched)
    assert not report.finished and len(report.steps) == (2 if trim is with_tokens else 4)
    assert report.steps[-1].program.budget < tiny.PER_FRAME
    assert "did not finish" in record_text(report)
    assert repr(patched.model_options) == options
    assert torch.equal(tiny.sample(patched, steps=4), whole)
    assert torch.equal(tiny.sample(model, steps=4), expected)


@either
@pytest.mark.parametrize("stops", [False, True])
def test_guider_has_its_own_options_again_after_the_run(stops, trim):
    seen = []

    def around(executor, *args, **kwargs):
        guider = executor.class_obj
        before = guider.model_options
        try:
            return executor(*args, **kwargs)
        finally:
            seen.append(guider.model_options is before)
            seen.append(SESSION_KEY not in before["transformer_options"])

    model = tiny.base_model().clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "around", around)
    patched = trim(model)
    if stops:
        on_each_block(patched, lambda args: fail())
        with pytest.raises(Broken):
            tiny.sample(patched)
    else:
        tiny.sample(patched)
    assert seen == [True, True]


@either
@pytest.mark.parametrize("at", [1, 2])
def test_cancel_between_steps_leaves_the_next_run_clean(at, trim):
    patched = trim(tiny.base_model())
    whole = tiny.sample(patched, steps=4)

    def cancel(step, x0, x, total):
        if step == at:
            interrupt()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny.sample(patched, steps=4, callback=cancel)
    assert not tiny.report_of(patched).finished
    assert torch.equal(tiny.sample(patched, steps=4), whole)


@either
def test_engine_dies_with_its_run(trim):
    seen = []

    def note(executor, *args, **kwargs):
        run = args[-1][SESSION_KEY]
        out = executor(*args, **kwargs)
        now, memory = run.engine.now, run.engine.memory
        seen.extend(weakref.ref(o) for o in (run, run.engine, memory, now, now.part))
        return out

    base = tiny.base_model().clone()
    base.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "note", note)
    patched = trim(base)
    tiny.sample(patched, steps=4)
    gc.collect()
    assert len(seen) == 4 * 5 and not any(ref() for ref in seen)
    assert SESSION_KEY not in patched.model_options["transformer_options"]


@either
def test_no_number_of_the_sampler_is_drawn(trim):
    patched = trim(tiny.base_model())
    tiny.sample(tiny.base_model(), sampler="euler_ancestral", steps=4)
    state = torch.get_rng_state()
    out = tiny.sample(patched, sampler="euler_ancestral", steps=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.isfinite(out).all() and tiny.report_of(patched).kept_share < 0.9
