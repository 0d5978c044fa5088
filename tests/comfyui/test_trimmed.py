"""Dropping tokens changes this run and nothing else."""

import copy
import gc
import weakref

import pytest
import torch

import comfy.model_management
from comfy.patcher_extension import WrappersMP
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import KEY, SESSION_KEY, attach, attachment_of, detach
from wantrim.tests.comfyui import tiny

KINDS = WrappersMP.OUTER_SAMPLE, WrappersMP.DIFFUSION_MODEL


def wrapper_counts(model) -> dict[str, int]:
    return {kind: len(model.get_wrappers(kind, KEY)) for kind in KINDS}


def on_each_block(model, see):
    model.set_model_double_block_patch(lambda args: see(args) or args)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_output_changes_and_work_falls(kind):
    model, given = tiny.base_model(kind), tiny.case(kind)
    patched = tiny.trimmed(model, 0.7)
    out = tiny.sample(patched, given)
    assert torch.isfinite(out).all()
    assert not torch.allclose(out, tiny.sample(model, given), atol=1e-3)
    report = tiny.report_of(patched)
    assert report.finished and not report.notes
    assert report.kept_share < 0.9


@pytest.mark.parametrize("dropped_kv", ["leave", "keep"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_hidden_state_stays_full_length_between_blocks(kind, dropped_kv):
    patched = tiny.trimmed(tiny.base_model(kind), dropped_kv=dropped_kv)
    lengths = []
    on_each_block(patched, lambda args: lengths.append(args["img"].shape[1]))
    tiny.sample(patched, tiny.case(kind))
    reference = tiny.PER_FRAME if kind == "fun" else 0
    assert lengths == [tiny.FRAMES * tiny.PER_FRAME + reference] * (3 * tiny.LAYERS)


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


def test_base_model_and_other_branch_are_untouched():
    model = tiny.base_model()
    expected = tiny.sample(model)
    before = repr(sorted(model.model_options["transformer_options"]))
    branch = model.clone()
    patched = tiny.trimmed(model)
    tiny.sample(patched)
    assert torch.equal(tiny.sample(model), expected)
    assert torch.equal(tiny.sample(branch), expected)
    assert attachment_of(model) is None and attachment_of(branch) is None
    assert repr(sorted(model.model_options["transformer_options"])) == before


def test_requeue_gives_the_same_bytes():
    patched = tiny.trimmed(tiny.base_model())
    first = tiny.sample(patched)
    assert torch.equal(tiny.sample(patched), first)
    assert torch.equal(tiny.sample(tiny.trimmed(tiny.base_model())), first)


def test_attach_twice_is_attach_once():
    plan = TrimPlan(tiny.token_plan())
    once = attach(tiny.base_model(), plan)
    twice = attach(once, plan)
    assert wrapper_counts(once) == wrapper_counts(twice) == dict.fromkeys(KINDS, 1)
    assert torch.equal(tiny.sample(twice), tiny.sample(once))
    assert len(tiny.report_of(twice).steps) == 3


def test_second_plan_replaces_the_first():
    patched = tiny.trimmed(tiny.trimmed(tiny.base_model(), 0.5), 0.8)
    alone = tiny.trimmed(tiny.base_model(), 0.8)
    assert torch.equal(tiny.sample(patched), tiny.sample(alone))


def test_neutral_plan_replaces_a_trimming_one():
    patched = tiny.trimmed(tiny.trimmed(tiny.base_model()), keep=1.0)
    assert wrapper_counts(patched)[WrappersMP.DIFFUSION_MODEL] == 0
    assert torch.equal(tiny.sample(patched), tiny.sample(tiny.base_model()))


def test_detach_leaves_nothing():
    model = tiny.base_model()
    clean = detach(tiny.trimmed(model))
    assert clean.model_options == model.model_options
    assert wrapper_counts(clean) == dict.fromkeys(KINDS, 0)
    assert not any(found for kind in clean.wrappers.values() for found in kind.values())
    assert clean.object_patches == model.object_patches
    assert torch.equal(tiny.sample(clean), tiny.sample(model))


def test_plan_survives_a_further_clone():
    patched = tiny.trimmed(tiny.base_model())
    assert torch.equal(tiny.sample(patched.clone()), tiny.sample(patched))


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


@pytest.mark.parametrize("dropped_kv", ["leave", "keep"])
@pytest.mark.parametrize("stop", [interrupt, fail])
def test_run_that_is_stopped_leaves_the_next_one_clean(stop, dropped_kv):
    model = tiny.base_model()
    expected = tiny.sample(model)
    patched = tiny.trimmed(model, dropped_kv=dropped_kv)
    whole = tiny.sample(patched)
    options = repr(patched.model_options)
    stopping = patched.clone()
    ran = []
    # in the second step, in a block on fewer tokens
    on_each_block(stopping, lambda args: ran.append(1) or (len(ran) == 8 and stop()))
    with pytest.raises((comfy.model_management.InterruptProcessingException, Broken)):
        tiny.sample(stopping)
    report = tiny.report_of(patched)
    assert not report.finished and len(report.steps) == 2
    assert "did not finish" in report.text()
    assert repr(patched.model_options) == options
    assert torch.equal(tiny.sample(patched), whole)
    assert torch.equal(tiny.sample(model), expected)


@pytest.mark.parametrize("stops", [False, True])
def test_guider_has_its_own_options_again_after_the_run(stops):
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
    patched = tiny.trimmed(model)
    if stops:
        on_each_block(patched, lambda args: fail())
        with pytest.raises(Broken):
            tiny.sample(patched)
    else:
        tiny.sample(patched)
    assert seen == [True, True]


def test_cancel_between_steps_leaves_the_next_run_clean():
    patched = tiny.trimmed(tiny.base_model())
    whole = tiny.sample(patched)

    def cancel(step, x0, x, total):
        if step == 1:
            interrupt()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny.sample(patched, callback=cancel)
    assert not tiny.report_of(patched).finished
    assert torch.equal(tiny.sample(patched), whole)


def test_session_dies_with_its_run():
    patched = tiny.trimmed(tiny.base_model())
    seen = []

    def note(executor, *args, **kwargs):
        run = args[-1][SESSION_KEY]
        out = executor(*args, **kwargs)
        seen.extend(weakref.ref(o) for o in (run, run.session, run.session.decision))
        return out

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "note", note)
    tiny.sample(patched)
    gc.collect()
    assert len(seen) == 9 and not any(ref() for ref in seen)
    assert SESSION_KEY not in patched.model_options["transformer_options"]


@pytest.mark.parametrize("importance", ["attention", "update_norm", "hidden_norm", "random"])
def test_every_importance_runs_and_draws_no_number_of_the_sampler(importance):
    patched = tiny.trimmed(tiny.base_model(), importance=importance)
    calls = tiny.watch(patched)
    tiny.sample(tiny.base_model(), sampler="euler_ancestral")
    state = torch.get_rng_state()
    out = tiny.sample(patched, sampler="euler_ancestral")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.isfinite(out).all()
    assert {call.kept[0].shape[1] for call in calls} == {3 * call.budget for call in calls}


def test_importances_differ():
    kept = []
    for importance in ("attention", "update_norm", "hidden_norm", "random"):
        patched = tiny.trimmed(tiny.base_model(), importance=importance)
        calls = tiny.watch(patched)
        tiny.sample(patched, steps=1)
        kept.append(tuple(calls[0].kept[0][0].tolist()))
    assert len(set(kept)) == 4
