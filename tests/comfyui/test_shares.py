"""Steps that repeat: which velocity, for whom, and that no block runs."""

import pytest
import torch

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.passes import observed
from wantrim.tests.comfyui.variants import load

ALL = dict.fromkeys(range(tiny.LAYERS), tiny.FRAMES * tiny.PER_FRAME)
UNKNOWN = "nothing was remembered"
# rounding of a model that is called on two rows or on one
ROUNDING = 1e-5
# the same where keys and values are remembered in 8 bits: a last bit may fall to either side
PACKED = 3e-4


@pytest.fixture
def no_free_memory(monkeypatch):
    """The host then runs cond and uncond in two calls."""
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)


def watched(given, *values, model=None, **options):
    base, passes = observed(model or tiny.base_model())
    patched = tiny.shared(base, *values)
    out = tiny.sample(patched, given, steps=len(values), **options)
    assert torch.isfinite(out).all()
    return out, passes, tiny.report_of(patched)


def same_video(out, expected, values) -> bool:
    """Up to rounding."""
    partial = any(0 < share < 1 for share in values)
    most = (PACKED if partial else ROUNDING) * expected.abs().max()
    return bool((out - expected).abs().max() <= most)


def by_step(passes) -> list[list]:
    """The calls of each sigma, in order."""
    found: dict[float, list] = {}
    for seen in passes:
        found.setdefault(seen.sigma, []).append(seen)
    return list(found.values())


def answers(step) -> dict:
    """What each prompt got in a step, whatever calls it came in."""
    return {key: velocity for seen in step for key, velocity in seen.each.items()}


def check_repeats(passes, values) -> None:
    """Repeated steps ran nothing and gave every prompt its own last velocity; others ran it all."""
    steps, known = by_step(passes), {}
    assert len(steps) == len(values)
    for step, share in zip(steps, values, strict=True):
        got = answers(step)
        if share == 0:
            assert all(not seen.tokens for seen in step)
            assert all(torch.equal(got[key], known[key]) for key in got)
        else:
            assert all(len(seen.tokens) == tiny.LAYERS for seen in step)
            assert all(not torch.equal(got[key], known[key]) for key in got if key in known)
        # what is repeated is another latent's
        known.update(got)
    latents = [step[0].latent for step in steps]
    assert not any(torch.equal(*pair) for pair in zip(latents, latents[1:], strict=False))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_repeated_step_runs_no_block_and_gives_the_velocity_of_the_one_before(kind, batch):
    values = (1, 0, 0, 1, 0)
    given = tiny.case(kind, batch=batch)
    _, passes, report = watched(given, *values, model=tiny.base_model(kind))
    check_repeats(passes, values)
    assert [seen.roles for seen in passes] == 5 * [[1, 0]]
    # the two prompts do not repeat each other's
    cond, uncond = passes[1].each.values()
    assert not torch.allclose(cond, uncond, atol=1e-3)
    assert [step.kept_share for step in report.steps] == list(values)
    assert [step.program.repeats for step in report.steps] == [not share for share in values]
    assert not report.notes and not any(step.answered for step in report.steps)


@pytest.mark.parametrize("values", [(1, 0, 1, 0, 0), (1, 1, 0.4, 0, 0.3)], ids=str)
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("t2v", {}),
        ("t2v", {"batch": 2}),
        ("i2v", {"height": 9, "width": 7}),
        ("i2v_clip", {}),
        ("ti2v", {"batch": 2}),
        ("vace", {}),
        ("camera", {}),
        ("fun", {}),
    ],
    ids=str,
)
def test_batched_and_split_are_the_same_run(kind, size, values, monkeypatch):
    model, given = tiny.base_model(kind), tiny.case(kind, **size)
    together, passes, _ = watched(given, *values, model=model)
    assert [seen.roles for seen in passes] == 5 * [[1, 0]]
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    apart, split, report = watched(given, *values, model=model)
    assert [seen.roles for seen in split] == 5 * [[0], [1]]
    assert [s.tokens for s in split[::2]] == [s.tokens for s in split[1::2]]
    assert [s.tokens for s in split[::2]] == [s.tokens for s in passes]
    assert len(report.steps) == 5 and not report.notes
    assert same_video(apart, together, values)


@pytest.mark.parametrize("values", [(1, 0, 0, 1), (1, 1, 0, 0.4), (1, 1, 0.4, 0)], ids=str)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_host_that_goes_from_batched_to_split_changes_nothing(values, at, monkeypatch):
    """As it does when memory gets short in mid-run, and back."""
    given = tiny.case()
    expected, _, whole = watched(given, *values)
    steps = []

    def free(self, device):
        return 0 if len(steps) >= at else 1e12

    monkeypatch.setattr(ModelPatcher, "get_free_memory", free)
    out, passes, report = watched(given, *values, callback=lambda *args: steps.append(1))
    roles = [seen.roles for seen in passes]
    assert roles == at * [[1, 0]] + (4 - at) * [[0], [1]]
    assert [s.kept_share for s in report.steps] == [s.kept_share for s in whole.steps]
    assert not report.notes
    assert same_video(out, expected, values)


@pytest.mark.parametrize("values", [(1, 0, 0, 1), (1, 1, 0, 0.4), (1, 1, 0.4, 0.3)], ids=str)
def test_guidance_that_ends_in_mid_run_costs_no_whole_step(values):
    """A sampler that drops the negative prompt: the positive one goes on with what it knows."""
    given, calls = tiny.case(), []
    base, passes = observed(tiny.base_model())

    def dropped(executor, model, conds, *args):
        calls.append(1)
        return executor(model, [conds[0], None] if len(calls) > 2 else conds, *args)

    base.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "guidance", dropped)
    patched = tiny.shared(base, *values)
    out = tiny.sample(patched, given, steps=4)
    assert torch.isfinite(out).all()
    assert [seen.roles for seen in passes] == 2 * [[1, 0]] + 2 * [[0]]
    assert tiny.shares(patched) == pytest.approx(values)
    assert not tiny.report_of(patched).notes
    if values[2] == 0:
        assert torch.equal(passes[2].velocity, passes[1].each[0, passes[2].prompts[0]])


@pytest.mark.parametrize("free", [1e12, 0], ids=["batched", "split"])
@pytest.mark.parametrize("last", [0, 0.4], ids=["repeated", "partial"])
def test_a_step_that_a_prompt_begins_in_is_whole_whatever_calls_it_comes_in(
    last, free, monkeypatch
):
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: free)
    given = tiny.case()
    late = tiny.text(9)[0]
    # from the fourth step of six on
    late[1].update(start_percent=0.45, end_percent=1.0)
    given.positive = [late, *given.positive]
    values = (1, 1, last, last, last, last)
    _, passes, report = watched(given, *values)
    steps = by_step(passes)
    counts = [sum(len(seen.roles) for seen in step) for step in steps]
    first = counts.index(3)
    assert counts == first * [2] + (6 - first) * [3] and 2 <= first <= 4
    few = {} if last == 0 else dict.fromkeys(range(tiny.LAYERS), 24)
    for number, step in enumerate(steps[2:], 2):
        ran = [seen.tokens for seen in step]
        assert all(tokens == (ALL if number == first else few) for tokens in ran)
    assert [round(step.kept_share, 1) for step in report.steps] == [
        1 if number in (0, 1, first) else last for number in range(6)
    ]
    assert any(UNKNOWN in note for note in report.notes)


@pytest.mark.parametrize("last", [0, 0.4], ids=["repeated", "partial"])
def test_a_prompt_that_nobody_told_of_is_computed_in_full_beside_the_others(
    last, no_free_memory, monkeypatch
):
    """As with hooks, by which prompts have other names."""
    monkeypatch.setattr("wantrim.hosts.comfyui.attach.prompts_due", lambda *_: [])
    given, late = tiny.case(), tiny.text(9)[0]
    late[1].update(start_percent=0.45, end_percent=1.0)
    given.positive = [late, *given.positive]
    _, passes, report = watched(given, 1, 1, *[last] * 4)
    few = {} if last == 0 else dict.fromkeys(range(tiny.LAYERS), 24)
    ran = [[seen.tokens for seen in step] for step in by_step(passes)]
    first = next(number for number, step in enumerate(ran) if len(step) == 3)
    assert sorted(map(len, ran[first])) == sorted([tiny.LAYERS, len(few), len(few)])
    assert sum(tokens == ALL for tokens in ran[first]) == 1
    assert any("had nothing to repeat yet" in note for note in report.notes)


def test_areas_with_parts_of_the_run_of_their_own_repeat_all_the_same(no_free_memory):
    """They are parts of the video: what is due in another one holds up none."""
    given, values = tiny.case(), (1, 0, 1, 0)
    given.positive = [area(3, 0, 4), area(4, 4)]
    given.negative[0][1].update(start_percent=0.0, end_percent=1.0)
    _, passes, _ = watched(given, *values)
    for share, step in zip(values, by_step(passes), strict=True):
        assert all(bool(seen.tokens) is bool(share) for seen in step)


def test_repeating_is_by_prompt_where_several_have_areas(no_free_memory):
    given = tiny.case()
    given.positive = [area(3, 0, 4), area(4, 4)]
    values = (1, 0, 1, 0)
    _, passes, report = watched(given, *values)
    # the host makes a negative prompt for each area, and one for the rest
    assert [len(step) for step in by_step(passes)] == 4 * [5]
    for before, seen in ((passes[:5], passes[5:10]), (passes[10:15], passes[15:])):
        for old, new in zip(before, seen, strict=True):
            assert old.roles == new.roles and old.prompts == new.prompts
            assert len(old.tokens) == tiny.LAYERS and not new.tokens
            if new.latent.shape[-1] < tiny.WIDTH:
                assert torch.equal(new.velocity, old.velocity)
            else:
                # no positive prompt for all of the picture: its path looks as if noise were added
                clean = [seen.latent - seen.sigma * seen.velocity for seen in (old, new)]
                assert torch.allclose(*clean, atol=1e-4)
    assert sorted(seen.velocity.shape[-1] for seen in passes[:5]) == [4, 4, 6, 6, 10]
    assert len({seen.velocity.sum().item() for seen in passes[:5]}) == 5
    assert not report.notes
    # a step for each call that another one's latent lies between
    shares = [step.kept_share for step in report.steps]
    assert shares == [share for share in values for _ in range(len(shares) // 4)]


def area(seed: int, left: int, width: int = 6):
    prompt = tiny.text(seed)[0]
    prompt[1].update(area=(tiny.FRAMES, tiny.HEIGHT, width, 0, 0, left), strength=1.0)
    return prompt


@pytest.mark.parametrize("values", [(1, 0, 1, 0), (1, 1, 0.4, 0)], ids=str)
def test_areas_in_one_call_are_reported_as_what_ran(values):
    """Not as work that nobody did, and no cache is blamed."""
    given = tiny.case()
    given.positive = [area(3, 0), area(4, 4)]
    _, passes, report = watched(given, *values)
    done = [
        sum(seen.tokens.values()) / (tiny.LAYERS * seen.latent[0, 0].numel() / 4)
        for seen in passes
        if seen.roles[-1] == 0 or len(seen.roles) == 1
    ]
    assert [step.kept_share for step in report.steps] == pytest.approx(done)
    assert not any("cache" in note for note in report.notes)
    repeated = [seen for seen in passes if not seen.tokens]
    assert len(repeated) == 2 * values.count(0)
    assert any("different areas" in note for note in report.notes) == (0.4 in values)


@pytest.mark.parametrize("values", [(1, 0, 1, 0), (1, 1, 0.4, 0)], ids=str)
def test_a_noise_mask_goes_on_working(values):
    given = tiny.case()
    given.latent = torch.randn(given.latent.shape, generator=torch.Generator().manual_seed(1))
    given.noise_mask = torch.ones(1, 1, tiny.FRAMES, tiny.HEIGHT, tiny.WIDTH)
    given.noise_mask[..., :4, :] = 0
    out, passes, report = watched(given, *values)
    # what is outside of the mask stays
    assert torch.allclose(out[..., :4, :], given.latent[..., :4, :], atol=1e-3)
    assert [step.kept_share for step in report.steps] == pytest.approx(values)
    assert not report.notes
    dense = tiny.sample(tiny.base_model(), given, steps=4)
    assert (out - dense)[..., 4:, :].abs().max() > 1e-3


@pytest.mark.parametrize("values", [(1, 0, 1, 0), (1, 1, 0.4, 0)], ids=str)
def test_each_sample_of_a_batch_repeats_its_own(values):
    noise = tiny.comfy.sample.prepare_noise(tiny.case(batch=2).latent, 3)
    both, _, _ = watched(tiny.case(batch=2), *values, noise=noise)
    for row in (0, 1):
        alone, _, _ = watched(tiny.case(), *values, noise=noise[row : row + 1])
        assert same_video(both[row : row + 1], alone, (0.4, *values))


def test_a_pair_of_experts_begins_anew():
    """Each one's first step is whole, though its plan repeats: the other's velocity is not its own."""
    high, seen_high = observed(tiny.base_model())
    low, seen_low = observed(load("low"))
    sigmas = tiny.simple_sigmas(high, 6)
    values = (1, 0, 0, 0, 1, 0)
    high, low = (tiny.shared(m, *values, sigmas=sigmas) for m in (high, low))
    half = tiny.ksampler_advanced(high, tiny.empty_latent(), 0, 3, steps=6)
    out = tiny.ksampler_advanced(low, half, 3, 6, steps=6)
    assert torch.isfinite(out).all()
    assert tiny.shares(high) == [1, 0, 0] and tiny.shares(low) == [1, 1, 0]
    assert [bool(p.tokens) for p in (*seen_high, *seen_low)] == [
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    assert torch.equal(tiny.ksampler_advanced(low, half, 3, 6, steps=6), out)


def test_heun_asks_twice_a_step_and_both_follow_their_sigma():
    values = (1, 0, 1, 0)
    _, passes, report = watched(tiny.case(), *values, sampler="heun")
    # the second call of a step is at the sigma of the next one, which asks once more
    sigmas = [seen.sigma for seen in passes]
    assert len(passes) == 7 and sigmas[1] == sigmas[2] and sigmas[3] == sigmas[4]
    assert [len(seen.tokens) for seen in passes] == [6, 0, 0, 6, 6, 0, 0]
    for before, seen in ((0, 1), (0, 2), (4, 5), (4, 6)):
        assert torch.equal(passes[seen].velocity, passes[before].velocity)
    assert [step.kept_share for step in report.steps] == [1, 0, 0, 1, 1, 0, 0]
    assert not report.notes


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc", "res_multistep", "dpm_2", "lcm"])
def test_samplers_are_the_same_each_time(sampler):
    patched = tiny.shared(tiny.base_model(), 1, 1, 0, 0.4, 0)
    out = tiny.ksampler(patched, sampler=sampler, steps=5)
    assert torch.isfinite(out).all()
    shares = tiny.shares(patched)
    assert min(shares) == 0 and any(0 < share < 1 for share in shares)
    assert torch.equal(tiny.ksampler(patched, sampler=sampler, steps=5), out)


def test_a_run_that_begins_later_begins_whole():
    _, passes, report = watched(tiny.case(), 1, 0, 0, 0, 0, 1, start_step=2)
    assert [len(seen.tokens) for seen in passes] == [6, 0, 0, 6]
    assert [step.kept_share for step in report.steps] == [1, 0, 0, 1]
