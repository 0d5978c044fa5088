"""What dropped tokens get from an earlier step: the right thing, for the right prompt and part."""

import gc
import weakref

import pytest
import torch

import comfy.model_management
import comfy.sample
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from wantrim.hosts.comfyui.attach import SESSION_KEY
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.passes import check_updates, record

REMEMBERING = ["last_update", "last_output"]
STATIC, UNIFORM = "standard_static", "standard_uniform"
UNKNOWN = "nothing was remembered"


@pytest.fixture
def passes(monkeypatch):
    return record(monkeypatch)


@pytest.fixture
def no_free_memory(monkeypatch):
    """The host then runs cond and uncond in two calls."""
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)


def windows(model, schedule: str = STATIC, length=3):
    made = ContextWindowsManualNode.execute(
        model, length, 1, schedule, 1, False, "pyramid", 2, False
    )
    return made.result[0]


def sessions(model) -> list:
    """The session of every model call from now on, held on to."""
    seen = []

    def note(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        seen.append(args[-1][SESSION_KEY].session)
        return out

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "note", note)
    return seen


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_dropped_tokens_get_their_last_update(kind, passes):
    tiny.ksampler(tiny.at_node(tiny.base_model(kind)), tiny.case(kind, batch=2))
    check_updates(passes, per_step=1)
    assert len(passes) == 4


def test_dropped_tokens_get_their_last_output(passes):
    patched = tiny.at_node(tiny.base_model(), "custom", dropped_tokens_get="last_output")
    tiny.ksampler(patched)
    last = tiny.LAYERS - 1
    for before, seen in zip(passes, passes[1:], strict=False):
        assert torch.equal(seen.after[last][seen.dropped], before.after[last][seen.dropped])
        assert seen.dropped.float().mean() > 0.15


def test_updates_are_remembered_per_choice(passes):
    """With two choices a step, each stretch of blocks gives its own last update."""
    patched = tiny.at_node(tiny.base_model(), "custom", reselect_every=3, importance="rotation")
    tiny.ksampler(patched)
    for before, seen in zip(passes, passes[1:], strict=False):
        for first in (0, 3):
            now, last = (p.after[first + 2] - p.before[first] for p in (seen, before))
            alike = torch.isclose(now, last, atol=1e-4).all(-1)
            # 6 of 20 tokens of every latent frame
            assert alike.sum() == 2 * 18


def test_control_hints_are_added_once_and_are_no_part_of_the_memory(passes):
    tiny.ksampler(tiny.at_node(tiny.base_model("vace")), tiny.case("vace"))
    check_updates(passes, per_step=1)
    last = tiny.LAYERS - 1
    for before, seen in zip(passes, passes[1:], strict=False):
        hints, lost = seen.between, seen.dropped
        # large enough that taking them twice would be seen
        assert hints[lost].abs().mean() > 0.1
        by_hand = seen.before[0] + before.own + hints
        assert torch.allclose(seen.after[last][lost], by_hand[lost], atol=1e-4)


@pytest.mark.parametrize("restore", REMEMBERING)
def test_what_other_nodes_add_behind_a_block_is_not_remembered_in_place(restore, passes):
    patched = tiny.at_node(tiny.base_model(), "custom", dropped_tokens_get=restore)

    def add(args):
        # in place, as VACE adds its hints
        args["img"] += 1.0
        return args

    patched.set_model_double_block_patch(add)
    tiny.ksampler(patched)
    last = tiny.LAYERS - 1
    for before, seen in zip(passes, passes[1:], strict=False):
        now, then = seen.after[last], before.after[last]
        if restore == "last_update":
            now, then = seen.own, before.own
        assert torch.allclose(now[seen.dropped], then[seen.dropped], atol=1e-4)


@pytest.mark.parametrize("restore", REMEMBERING)
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("t2v", {}),
        ("t2v", {"batch": 2}),
        ("i2v", {"height": 9, "width": 7}),
        ("ti2v", {"batch": 2}),
        ("vace", {}),
        ("fun", {}),
    ],
    ids=str,
)
def test_batched_and_split_are_the_same_run(kind, size, restore, monkeypatch):
    model, given = tiny.base_model(kind), tiny.case(kind, **size)
    patched = tiny.preset(model, restore=restore)
    together = tiny.sample(patched, given, steps=4)
    shares = tiny.shares(patched)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    passes = record(monkeypatch)
    apart = tiny.sample(patched, given, steps=4)
    assert len(passes) == 8
    if restore == "last_update":
        # the negative prompt has updates of its own
        check_updates(passes, per_step=2)
    assert tiny.shares(patched) == shares and shares[0] == 1 and max(shares[1:]) < 0.85
    assert not tiny.report_of(patched).notes
    assert (apart - together).abs().max() <= 1e-5 * together.abs().max()


def test_host_that_runs_short_of_memory_begins_anew_and_says_so(monkeypatch):
    patched = tiny.preset(tiny.base_model())
    steps = []

    def free(self, device):
        return 0 if len(steps) >= 2 else 1e12

    monkeypatch.setattr(ModelPatcher, "get_free_memory", free)
    out = tiny.sample(patched, steps=5, callback=lambda *args: steps.append(1))
    assert torch.isfinite(out).all()
    assert tiny.shares(patched) == pytest.approx([1, 0.7, 1, 0.7, 0.7])
    assert [step.calls for step in tiny.report_of(patched).steps] == [1, 1, 2, 2, 2]
    assert any(UNKNOWN in note for note in tiny.report_of(patched).notes)


@pytest.mark.parametrize("has_it", ["positive", "negative"])
def test_only_one_prompt_with_a_reference(has_it, passes):
    given = tiny.case("fun")
    if has_it == "positive":
        given.negative = tiny.text(2)
    else:
        given.positive = tiny.text(1)
    tiny.ksampler(tiny.preset(tiny.base_model("fun")), given)
    assert {seen.before[0].shape[1] for seen in passes} == {60, 80}
    check_updates(passes, per_step=2)


def test_each_sample_of_a_batch_remembers_for_itself():
    noise = comfy.sample.prepare_noise(tiny.case(batch=2).latent, 3)
    patched = tiny.preset(tiny.base_model())
    both = tiny.sample(patched, tiny.case(batch=2), steps=4, noise=noise)
    for row in (0, 1):
        alone = tiny.sample(patched, steps=4, noise=noise[row : row + 1])
        assert torch.allclose(both[row : row + 1], alone, atol=1e-3)


def test_context_windows_remember_apart(passes):
    tiny.needs("0.21.0", "a latent frame in front of a context window")
    # windows 0-2, 2-4 and 4-6; all but the first get a latent frame more in front
    patched = tiny.preset(windows(tiny.base_model()))
    given = tiny.case(frames=7)
    out = tiny.ksampler(patched, given)
    assert [seen.before[0].shape[1] for seen in passes] == 4 * [60, 80, 80]
    check_updates(passes, per_step=3)
    assert tiny.shares(patched) == pytest.approx(3 * [1.0] + 9 * [0.7])
    assert not tiny.report_of(patched).notes
    assert torch.equal(tiny.ksampler(patched, given), out)


def test_context_windows_remember_apart_in_two_calls_each(passes, no_free_memory):
    tiny.ksampler(tiny.preset(windows(tiny.base_model())), tiny.case(frames=7))
    check_updates(passes, per_step=6)


def test_context_windows_that_move_compute_all_in_their_new_place_and_say_so():
    patched = tiny.preset(windows(tiny.base_model(), UNIFORM))
    out = tiny.ksampler(patched, tiny.case(frames=9), steps=8)
    assert torch.isfinite(out).all()
    report = tiny.report_of(patched)
    first = report.steps[0].sigma
    later = [step.kept_share for step in report.steps if step.sigma != first]
    assert 1.0 in later and min(later) == pytest.approx(0.7)
    assert any(UNKNOWN in note and "windows that move" in note for note in report.notes)


def area(seed: int, left: int, width: int = 6) -> dict:
    prompt = tiny.text(seed)[0]
    prompt[1].update(area=(tiny.FRAMES, tiny.HEIGHT, width, 0, 0, left), strength=1.0)
    return prompt


@pytest.mark.parametrize("second", [(4, 6), (4, 4)], ids=["equal areas", "areas of two sizes"])
def test_prompts_with_areas_remember_apart(second, passes, no_free_memory):
    given = tiny.case()
    given.positive = [area(3, 0), area(4, *second)]
    patched = tiny.preset(tiny.base_model())
    out = tiny.ksampler(patched, given)
    assert torch.isfinite(out).all()
    # the host makes a negative prompt for each area, and one for the rest
    assert len(passes) == 4 * 5
    check_updates(passes, per_step=5)
    # each area follows its own path through the noise
    assert all(seen.call.decision.change is not None for seen in passes[2 * 5 :])
    assert not any(UNKNOWN in note for note in tiny.report_of(patched).notes)
    assert torch.equal(tiny.ksampler(patched, given), out)


def test_areas_in_one_call_compute_all_and_say_so(passes):
    given = tiny.case()
    given.positive = [area(3, 0), area(4, 4)]
    patched = tiny.preset(tiny.base_model())
    out = tiny.ksampler(patched, given)
    # only the negative prompt for the rest of the picture is trimmed
    assert [len(seen.before[0]) for seen in passes] == 4 * [1]
    check_updates(passes, per_step=1)
    assert any("different areas" in note for note in tiny.report_of(patched).notes)
    assert torch.equal(tiny.ksampler(patched, given), out)


def test_prompt_that_ends_leaves_the_others_their_own_memory(passes, no_free_memory):
    given = tiny.case()
    short = tiny.text(9)[0]
    short[1].update(start_percent=0.0, end_percent=0.3)
    given.positive = [*tiny.text(8), short, *given.positive]
    tiny.ksampler(tiny.preset(tiny.base_model()), given, steps=6)
    assert len(passes) == 2 * 4 + 4 * 3
    for number, seen in enumerate(passes[4:], 4):
        before = next(p for p in reversed(passes[:number]) if torch.equal(p.text, seen.text))
        own, known = seen.own[seen.dropped], before.own[seen.dropped]
        computed = torch.allclose(seen.before[2][seen.dropped], seen.after[2][seen.dropped])
        # a call that begins anew is right too
        assert not computed or torch.allclose(own, known, atol=1e-4)


def test_windows_that_move_on_are_forgotten():
    patched = tiny.preset(windows(tiny.base_model(), UNIFORM, 8))
    held = sessions(patched)
    remembered = []

    def count(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        remembered.append(len(held[0].pasts) if held else 0)
        return out

    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "count", count)
    tiny.ksampler(patched, tiny.case(frames=20), steps=12)
    sigmas = [step.sigma for step in tiny.report_of(patched).steps]
    now = [sigmas.count(sigma) for sigma in dict.fromkeys(sigmas)]
    # those of this step, and of the one before for what comes back
    pairs = zip([0, *now], now, strict=False)
    assert all(kept <= sum(pair) for kept, pair in zip(remembered, pairs, strict=True))


@pytest.mark.parametrize("order", ["in front", "behind"])
def test_easycache_and_refresh_both_act(order, passes):
    def cached(model):
        return EasyCacheNode.execute(model, 3.0, 0.15, 0.95, False).result[0]

    model = tiny.base_model()
    patched = tiny.at_node(cached(model)) if order == "in front" else cached(tiny.at_node(model))
    out = tiny.ksampler(patched, steps=8)
    computed = len(passes)
    assert 3 <= computed < 8
    check_updates(passes, per_step=1)
    done = [share for share in tiny.shares(patched) if share]
    assert done == pytest.approx([1.0] + (computed - 1) * [0.7])
    # both begin anew with the run
    assert torch.equal(tiny.ksampler(patched, steps=8), out)


@pytest.mark.parametrize(
    ("free", "rows"), [(1e12, [2, 1]), (0, [1, 1, 1])], ids=["batched", "split"]
)
def test_skip_layer_guidance_remembers_its_own_call(free, rows, passes, monkeypatch):
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: free)
    model = SkipLayerGuidanceDiT.execute(tiny.base_model(), 3.0, 0.0, 1.0, double_layers="2")
    patched = tiny.preset(model.result[0])
    out = tiny.ksampler(patched)
    # the call without block 2 has updates of its own
    assert [len(seen.before[0]) for seen in passes] == 4 * rows
    check_updates(passes, per_step=len(rows))
    assert len(tiny.report_of(patched).steps) == 4
    assert torch.equal(tiny.ksampler(patched), out)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc", "euler_ancestral", "lcm"])
def test_samplers(sampler, passes):
    patched = tiny.preset(tiny.base_model())
    out = tiny.ksampler(patched, sampler=sampler)
    assert torch.isfinite(out).all()
    evaluations = 7 if sampler == "heun" else 4
    assert len(passes) == evaluations
    check_updates(passes, per_step=1)
    assert tiny.shares(patched) == pytest.approx([1.0] + (evaluations - 1) * [0.7])
    assert torch.equal(tiny.ksampler(patched, sampler=sampler), out)


def test_every_run_of_a_split_begins_afresh(passes):
    """As Wan 2.2's experts run, or one model in two KSampler (Advanced)."""
    one = tiny.preset(tiny.base_model())
    half = tiny.ksampler_advanced(one, tiny.empty_latent(), 0, 2)
    assert tiny.shares(one) == pytest.approx([1.0, 0.7])
    out = tiny.ksampler_advanced(one, half, 2, 4)
    assert tiny.shares(one) == pytest.approx([1.0, 0.7])
    assert len(passes) == 4 and not torch.equal(out, half)
    # a second model gives the same: nothing came over from the first half
    high, low = tiny.preset(tiny.base_model()), tiny.preset(tiny.base_model())
    first = tiny.ksampler_advanced(high, tiny.empty_latent(), 0, 2)
    assert torch.equal(first, half)
    assert torch.equal(tiny.ksampler_advanced(low, first, 2, 4), out)
    for model in (high, low):
        assert tiny.shares(model) == pytest.approx([1.0, 0.7])
        [note] = tiny.report_of(model).notes
        assert "third step" in note and "how long they had been left out" in note
        assert "85.0%" in tiny.report_of(model).text()


def test_a_run_of_one_step_trims_nothing_and_says_so():
    patched = tiny.preset(tiny.base_model())
    out = tiny.ksampler(patched, steps=1)
    assert torch.equal(out, tiny.ksampler(tiny.base_model(), steps=1))
    report = tiny.report_of(patched)
    assert tiny.shares(patched) == [1.0]
    assert any("no token was left out" in n and "a run of one step" in n for n in report.notes)


class Broken(Exception):
    pass


def cancel():
    raise comfy.model_management.InterruptProcessingException


def fail():
    raise Broken("in the middle of a block")


@pytest.mark.parametrize("restore", REMEMBERING)
@pytest.mark.parametrize("stop", [None, cancel, fail], ids=["whole", "cancelled", "failed"])
def test_nothing_is_remembered_after_the_run(stop, restore, passes):
    patched = tiny.preset(tiny.base_model(), restore=restore)
    whole = tiny.ksampler(patched)
    del passes[:]
    held, blocks, states = sessions(patched), [], []

    def look(args):
        blocks.append(1)
        if held:
            states.extend(
                weakref.ref(kept) for past in held[0].pasts.values() for kept in past._kept.values()
            )
        # in the third step, in a block on fewer tokens
        if stop is not None and len(blocks) == 2 * tiny.LAYERS + 3:
            stop()
        return args

    patched.set_model_double_block_patch(look)
    if stop is None:
        assert torch.equal(tiny.ksampler(patched), whole)
    else:
        with pytest.raises((comfy.model_management.InterruptProcessingException, Broken)):
            tiny.ksampler(patched)
    assert states
    session = held[0]
    assert session.pasts == {} and session.decision is None
    del passes[:]
    gc.collect()
    assert not any(state() is not None for state in states)
    # and the run after it is the run before it
    assert torch.equal(tiny.ksampler(tiny.preset(tiny.base_model(), restore=restore)), whole)
