"""Repeated steps of samplers that add noise: what is repeated is the video, not the way to it."""

import pytest
import torch

import comfy.samplers
from wantrim.engine import engine
from wantrim.hosts.comfyui.attach import SESSION_KEY
from wantrim.nodes import demo
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.passes import observed

NOISY = ["euler_ancestral", "lcm", "dpmpp_2m_sde", "er_sde"]
STRAIGHT = ["euler", "heun", "dpmpp_2m", "res_multistep", "ddim"]
VALUES = (1, 1, 0, 1, 0, 0, 1, 0)


# one asks a model of its own kind, one knows its own steps by another rule than the sigmas
ALL = [name for name in comfy.samplers.SAMPLER_NAMES if name not in ("ar_video", "ipndm_v")]


@pytest.mark.parametrize("sampler", ALL)
@pytest.mark.parametrize("values", [(1, 1, 0, 1, 0, 0, 1, 0), (1, 0, 1, 0)], ids=len)
def test_where_the_video_is_known_repeating_it_is_exact(values, sampler, monkeypatch):
    """A model that points at one video from everywhere; the last step hides nothing."""
    model, count = tiny.base_model(), len(values)
    aim = torch.randn(tiny.empty_latent().shape, generator=torch.Generator().manual_seed(3))

    def forward(x, t, context, **kwargs):
        return (x - aim) / (t.view(-1, 1, 1, 1, 1) / 1000)

    monkeypatch.setattr(model.model.diffusion_model, "forward_orig", forward)
    options = {"cfg": 1.0, "last_step": count - 1, "force_full_denoise": False}
    patched = tiny.shared(model, *values)
    whole, out = (tiny.sample(m, steps=count, sampler=sampler, **options) for m in (model, patched))
    assert 0.0 in tiny.shares(patched)
    assert (out - whole).abs().max() < 2e-3 * whole.abs().max()


def watched(sampler, values=VALUES, given=None, model=None):
    """The video, its model calls, and whether each part of it was found to be noisy."""
    base, passes = observed(model or tiny.base_model())
    noisy = []

    def note(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        parts = args[-1][SESSION_KEY].engine.memory.parts.values()
        noisy.append([part.noisy for part in parts])
        return out

    base.add_wrapper_with_key("diffusion_model", "noisy", note)
    patched = tiny.shared(base, *values)
    out = tiny.sample(patched, given, steps=len(values), sampler=sampler)
    assert torch.isfinite(out).all()
    assert tiny.report_of(patched).kept_share < 0.9
    return out, passes, noisy


def clean(seen) -> torch.Tensor:
    """The video that a velocity points at."""
    return (seen.latent - seen.sigma * seen.velocity).chunk(2)[0]


@pytest.mark.parametrize("sampler", NOISY)
def test_where_noise_is_added_the_clean_video_is_repeated(sampler):
    _, passes, noisy = watched(sampler)
    assert not noisy[0][0] and all(found == [True] for found in noisy[1:])
    for before, seen in zip(passes, passes[1:], strict=False):
        if not seen.tokens:
            # both prompts, each its own
            videos = [one.latent - one.sigma * one.velocity for one in (before, seen)]
            assert torch.allclose(*videos, atol=1e-3 * float(videos[0].abs().max()))
            assert not torch.allclose(seen.velocity, before.velocity, atol=1e-2)


@pytest.mark.parametrize("sampler", STRAIGHT)
def test_without_noise_the_velocity_is_repeated(sampler):
    _, passes, noisy = watched(sampler)
    assert all(found == [False] for found in noisy)
    for before, seen in zip(passes, passes[1:], strict=False):
        if not seen.tokens:
            assert torch.equal(seen.velocity, before.velocity)


def test_a_partial_step_repeats_the_video_of_what_is_left_out():
    _, passes, _ = watched("euler_ancestral", (1, 1, 0.4, 1))
    before, seen = passes[1], passes[2]
    assert set(seen.tokens.values()) == {24}
    same = torch.isclose(clean(before), clean(seen), atol=1e-3 * float(clean(before).abs().max()))
    # 12 of 20 tokens of every latent frame, of 2 x 2 each
    assert same.all(1).flatten(2).sum(-1).tolist() == [[48] * tiny.FRAMES]


@pytest.mark.parametrize("sampler", ["euler_ancestral", "lcm"])
def test_repeating_the_video_is_nearer_to_the_dense_run_than_repeating_the_velocity(
    sampler, monkeypatch
):
    """On a model that was really trained: a random one's velocity does not know the noise.

    It counts where the run ends; in the middle the steps behind make up for either.
    """
    model = demo.WanTrimDemoModel.execute().result[0]
    prompts = [demo.WanTrimDemoPrompt.execute(text).result[0] for text in (demo.PROMPT, "")]
    given = tiny.Case(*prompts, tiny.empty_latent(5, 12, 12))
    values = (1, 1, 1, 0, 1, 0, 1, 0)
    dense = tiny.sample(model, given, steps=8, sampler=sampler)
    video, _, noisy = watched(sampler, values, given, model)
    assert all(found == [True] for found in noisy[1:])
    monkeypatch.setattr(engine, "STRAYED", 2.0)
    velocity, _, noisy = watched(sampler, values, given, model)
    assert not any(found[0] for found in noisy)
    errors = [(out - dense).square().mean() for out in (video, velocity)]
    assert errors[0] < 0.5 * errors[1]


def test_guidance_and_several_prompts_are_no_noise():
    given = tiny.case()
    given.positive = [*given.positive, *tiny.text(8), *tiny.text(9)]
    _, passes, noisy = watched("euler", given=given)
    assert [len(seen.roles) for seen in passes] == [4] * len(VALUES)
    assert all(found == [False] for found in noisy)


def test_a_step_that_the_sampler_holds_still_is_no_noise():
    """As CFG-Zero* does with its first one."""
    model = tiny.base_model().clone()
    first = []

    def still(given):
        first.append(1)
        return given["cond"] * (len(first) > 1)

    model.set_model_sampler_cfg_function(still)
    _, _, noisy = watched("euler", model=model)
    assert all(found == [False] for found in noisy)
