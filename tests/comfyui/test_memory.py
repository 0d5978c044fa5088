"""What a run remembers belongs to the right prompt and the right part of the video, and not for long."""

import pytest
import torch

import comfy.sample
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from wantrim.hosts.comfyui.attach import SESSION_KEY
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.passes import look_inside, lost_places, observed

STATIC, UNIFORM = "standard_static", "standard_uniform"
UNKNOWN = "nothing was remembered"


@pytest.fixture
def no_free_memory(monkeypatch):
    """The host then runs cond and uncond in two calls."""
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)


def windows(model, schedule: str = STATIC, length=3):
    made = ContextWindowsManualNode.execute(
        model, length, 1, schedule, 1, False, "pyramid", 2, False
    )
    return made.result[0]


def watched(given, *values, model=None, **options):
    base, passes = observed(model or tiny.base_model())
    patched = tiny.shared(base, *values)
    out = tiny.sample(patched, given, steps=len(values), **options)
    assert torch.isfinite(out).all()
    return out, passes, tiny.report_of(patched)


def check_own(passes, per_step: int) -> None:
    """What a call left out is what the same call of the step before got, and nobody else's."""
    assert len(passes) % per_step == 0
    left_out = 0
    for number, seen in enumerate(passes[per_step:], per_step):
        before = passes[number - per_step]
        assert (seen.roles, seen.prompts) == (before.roles, before.prompts)
        if not seen.tokens:
            lost = torch.ones_like(seen.velocity[:, :1], dtype=torch.bool)
        elif min(seen.tokens.values()) == max(before.tokens.values(), default=0):
            continue
        elif seen.dropped is not None:
            lost = lost_places(seen)
        else:
            continue
        left_out += 1
        noisy = not torch.equal(
            seen.velocity[lost.expand_as(seen.velocity)],
            before.velocity[lost.expand_as(seen.velocity)],
        )
        if noisy:
            # windows and areas that overlap look like noise: then the video is repeated
            videos = [one.latent - one.sigma * one.velocity for one in (before, seen)]
            apart = (videos[0] - videos[1]).abs()[lost.expand_as(videos[0])]
            assert apart.max() <= 1e-3 * videos[0].abs().max()
    assert left_out >= per_step


@pytest.mark.parametrize("values", [(1, 0, 1, 0), (1, 1, 0, 0.4)], ids=str)
@pytest.mark.parametrize("free", [1e12, 0], ids=["batched", "split"])
def test_context_windows_remember_apart(values, free, monkeypatch):
    tiny.needs("0.21.0", "a latent frame in front of a context window")
    look_inside(monkeypatch)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: free)
    # windows 0-2, 2-4 and 4-6; all but the first get a latent frame more in front
    given = tiny.case(frames=7)
    out, passes, report = watched(given, *values, model=windows(tiny.base_model()))
    calls = 1 if free else 2
    assert [seen.latent.shape[2] for seen in passes[::calls]] == 4 * [3, 4, 4]
    check_own(passes, per_step=3 * calls)
    assert [step.kept_share for step in report.steps] == pytest.approx(
        [share for share in values for _ in range(3)]
    )
    assert not report.notes
    again, _, _ = watched(given, *values, model=windows(tiny.base_model()))
    assert torch.equal(again, out)


@pytest.mark.parametrize("last", [0, 0.4], ids=["repeated", "partial"])
def test_context_windows_that_move_compute_all_in_their_new_place_and_say_so(last):
    values = (1, 1, *6 * (last,))
    _, passes, report = watched(
        tiny.case(frames=9), *values, model=windows(tiny.base_model(), UNIFORM)
    )
    later = [step.kept_share for step in report.steps if step.sigma < passes[0].sigma]
    assert 1.0 in later and min(later) == pytest.approx(last)
    assert any(UNKNOWN in note and "windows that move" in note for note in report.notes)


def test_windows_that_move_on_are_forgotten():
    base = windows(tiny.base_model(), UNIFORM, 8)
    parts, engines = [], []

    def note(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        engines[:] = [args[-1][SESSION_KEY].engine]
        return out

    def count(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        parts.append(len(engines[0].memory.parts))
        return out

    base.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "note", note)
    base.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "count", count)
    patched = tiny.shared(base, 1, 1, *10 * (0.4,))
    tiny.sample(patched, tiny.case(frames=20), steps=12)
    sigmas = [step.sigma for step in tiny.report_of(patched).steps]
    now = [sigmas.count(sigma) for sigma in dict.fromkeys(sigmas)]
    assert len(parts) == 12 and min(parts) > 1
    # those of this step, and of the one before for what comes back
    pairs = zip([0, *now], now, strict=False)
    assert all(kept <= sum(pair) for kept, pair in zip(parts, pairs, strict=True))


def area(seed: int, left: int, width: int = 6) -> dict:
    prompt = tiny.text(seed)[0]
    prompt[1].update(area=(tiny.FRAMES, tiny.HEIGHT, width, 0, 0, left), strength=1.0)
    return prompt


@pytest.mark.parametrize("second", [(4, 6), (4, 4)], ids=["equal areas", "areas of two sizes"])
def test_prompts_with_areas_remember_apart(second, no_free_memory, monkeypatch):
    look_inside(monkeypatch)
    given = tiny.case()
    given.positive = [area(3, 0), area(4, *second)]
    out, passes, report = watched(given, 1, 1, 0.4, 0)
    # the host makes a negative prompt for each area, and one for the rest
    assert len(passes) == 4 * 5
    check_own(passes, per_step=5)
    assert not any(UNKNOWN in note for note in report.notes)
    again, _, _ = watched(given, 1, 1, 0.4, 0)
    assert torch.equal(again, out)


def test_areas_in_one_call_compute_all_and_say_so():
    given = tiny.case()
    given.positive = [area(3, 0), area(4, 4)]
    _, passes, report = watched(given, 1, 1, 0.4, 1)
    # a part of the tokens only for the negative prompt of the rest of the picture
    few = [seen for seen in passes if 24 in seen.tokens.values()]
    assert [seen.latent.shape for seen in few] == [torch.Size((1, 16, 3, 8, 10))]
    assert any("different areas" in note for note in report.notes)


def test_prompt_that_ends_leaves_the_others_their_own_memory(no_free_memory):
    given = tiny.case()
    short = tiny.text(9)[0]
    short[1].update(start_percent=0.0, end_percent=0.3)
    given.positive = [*tiny.text(8), short, *given.positive]
    values = (1, 1, 0, 0, 1, 0)
    _, passes, report = watched(given, *values)
    counts = [
        sum(seen.sigma == sigma for seen in passes)
        for sigma in dict.fromkeys(seen.sigma for seen in passes)
    ]
    assert counts[0] == 4 and counts[-1] == 3 and sorted(counts, reverse=True) == counts
    last = {}
    for seen in passes:
        [key] = seen.each
        if not seen.tokens:
            assert torch.equal(seen.velocity, last[key])
        last[key] = seen.velocity
    assert [step.kept_share for step in report.steps] == list(values)
    assert not report.notes


@pytest.mark.parametrize("free", [1e12, 0], ids=["batched", "split"])
def test_when_the_deciding_prompt_ends_the_next_one_begins_whole_and_that_is_said(
    free, monkeypatch
):
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: free)
    given = tiny.case()
    short = tiny.text(9)[0]
    short[1].update(start_percent=0.0, end_percent=0.3)
    # the host takes its list from the end
    given.positive = [*given.positive, short]
    _, passes, report = watched(given, 1, 0, 0, 0, 0, 0)
    rows = [0] * 6
    sigmas = list(dict.fromkeys(seen.sigma for seen in passes))
    for seen in passes:
        rows[sigmas.index(seen.sigma)] += len(seen.roles)
    ends = rows.index(2)
    assert rows == ends * [3] + (6 - ends) * [2] and 1 < ends < 5
    expected = [1, *(ends - 1) * [0], 1, *(5 - ends) * [0]]
    assert [step.kept_share for step in report.steps] == expected
    ran = {sigmas.index(seen.sigma) for seen in passes if seen.tokens}
    assert ran == {0, ends}
    assert any(UNKNOWN in note for note in report.notes)


def test_steps_without_the_positive_prompt_do_not_split_those_behind_them(monkeypatch):
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 1e12)
    given = tiny.case()
    given.positive[0][1].update(start_percent=0.5, end_percent=1.0)
    _, passes, _ = watched(given, 1, 1, 1, 1, 1, 0)
    roles = [sorted(seen.roles) for seen in passes]
    assert len(roles) == 6 and roles[0] == [1] and roles[-1] == [0, 1]
    assert roles == sorted(roles, key=len)


@pytest.mark.parametrize(
    ("free", "rows"), [(1e12, [2, 1]), (0, [1, 1, 1])], ids=["batched", "split"]
)
@pytest.mark.parametrize("values", [(1, 0, 1, 0), (1, 1, 0.4, 0)], ids=str)
def test_skip_layer_guidance_remembers_its_own_pass(values, free, rows, monkeypatch):
    look_inside(monkeypatch)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: free)
    model = SkipLayerGuidanceDiT.execute(tiny.base_model(), 3.0, 0.0, 1.0, double_layers="2")
    out, passes, report = watched(tiny.case(), *values, model=model.result[0])
    # the pass without block 2 has a velocity of its own
    assert [len(seen.latent) for seen in passes] == 4 * rows
    for number, seen in enumerate(passes[len(rows) :], len(rows)):
        before = passes[number - len(rows)]
        if not seen.tokens:
            assert torch.equal(seen.velocity, before.velocity)
    extra = passes[len(rows) - 1]
    assert 2 not in extra.tokens and len(extra.tokens) == tiny.LAYERS - 1
    assert not any(torch.equal(extra.velocity, one) for one in passes[0].each.values())
    assert len(report.steps) == 4 and [s.kept_share for s in report.steps] == pytest.approx(values)
    again, _, _ = watched(tiny.case(), *values, model=model.result[0])
    assert torch.equal(again, out)


@pytest.mark.parametrize("order", ["in front", "behind"])
@pytest.mark.parametrize(
    "values", [(1, 1, 0, 1, 0, 1, 1, 0), (1, 1, 0.4, 1, 0, 0.4, 1, 0.4)], ids=str
)
def test_easycache_and_shares_both_act(order, values):
    """A step that the cache answers and that never came to us repeats nothing of ours."""

    def cached(model):
        return EasyCacheNode.execute(model, 3.0, 0.15, 0.95, False).result[0]

    base = tiny.base_model()
    trim = lambda m: tiny.shared(m, *values)  # noqa: E731
    patched = trim(cached(base)) if order == "in front" else cached(trim(base))
    out = tiny.sample(patched, steps=8)
    assert torch.isfinite(out).all()
    report = tiny.report_of(patched)
    answered = [step for step in report.steps if step.answered]
    assert bool(answered) == (order == "behind")
    assert all(step.kept_share == 0 and not step.program.repeats for step in answered)
    assert report.kept_share < 0.9 and report.notes
    # both begin anew with the run
    assert torch.equal(tiny.sample(patched, steps=8), out)


@pytest.mark.parametrize("has_it", ["positive", "negative"])
def test_only_one_prompt_with_a_reference(has_it, monkeypatch):
    look_inside(monkeypatch)
    given = tiny.case("fun")
    if has_it == "positive":
        given.negative = tiny.text(2)
    else:
        given.positive = tiny.text(1)
    _, passes, report = watched(given, 1, 0, 1, 0.4, model=tiny.base_model("fun"))
    assert {max(seen.tokens.values()) for seen in passes if len(seen.tokens)} == {24, 44, 60, 80}
    for number in (2, 3):
        assert torch.equal(passes[number].velocity, passes[number - 2].velocity)
    assert not report.notes


def test_each_sample_of_a_batch_remembers_for_itself():
    noise = comfy.sample.prepare_noise(tiny.case(batch=2).latent, 3)
    both, passes, _ = watched(tiny.case(batch=2), 1, 0, 1, 0, noise=noise)
    for row in (0, 1):
        alone, _, _ = watched(tiny.case(), 1, 0, 1, 0, noise=noise[row : row + 1])
        assert torch.allclose(both[row : row + 1], alone, atol=1e-3)


def test_every_run_of_a_split_begins_afresh():
    """As Wan 2.2's experts run, or one model in two KSampler (Advanced)."""
    values = (1, 0, 0, 1)
    one = tiny.shared(tiny.base_model(), *values)
    half = tiny.ksampler_advanced(one, tiny.empty_latent(), 0, 2)
    assert tiny.shares(one) == [1, 0]
    out = tiny.ksampler_advanced(one, half, 2, 4)
    assert tiny.shares(one) == [1, 1]
    # a second model gives the same: nothing came over from the first half
    low = tiny.shared(tiny.base_model(), *values)
    assert torch.equal(tiny.ksampler_advanced(low, half, 2, 4), out)


def test_a_run_of_one_step_trims_nothing_and_says_so():
    patched = tiny.shared(tiny.base_model(), 0.4, 0.4, sigmas=(1.0, 0.5))
    out = tiny.sample(patched, steps=1)
    assert torch.equal(out, tiny.sample(tiny.base_model(), steps=1))
    assert tiny.shares(patched) == [1.0] and tiny.report_of(patched).notes
