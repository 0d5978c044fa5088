"""What a trial says of candidates where samplers, caches or other nodes go ways of their own."""

import pytest
import torch

from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import CurrentNodeContext
from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.test_trial import (
    by_name,
    candidates,
    decoded,
    picture_of,
    sampled,
    verdict,
)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2s_ancestral"])
def test_work_of_easycache_is_of_model_calls(sampler):
    models, steps, trial = candidates("few", steps=12, speedup=1.5)
    calls = []

    def count(executor, *args, **kwargs):
        calls.append(1)
        return executor(*args, **kwargs)

    # the innermost one: what EasyCache answers does not come by
    models[2].add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "count", count)
    videos = decoded(models, steps, sampler=sampler)
    each = 12 if sampler == "euler" else 23
    row = by_name(verdict(trial, videos)[1])["easycache"]
    assert row["work"] == pytest.approx(len(calls) / each)
    assert row["work"] == pytest.approx(1 / 1.5, abs=0.12)
    said = f"({each - len(calls)} of {each}{'' if each == 12 else ' model calls'} left out)"
    assert said in row["label"]


def windowed(model):
    """With context windows of several sizes."""
    return WanContextWindowsManualNode.execute(
        model, context_length=17, context_overlap=4, context_schedule="standard_static",
        context_stride=1, closed_loop=False, fuse_method="pyramid", freenoise=False,
    ).result[0]  # fmt: skip


def test_an_easycache_that_cannot_run_is_a_row_and_the_others_go_on():
    models, steps, trial = candidates("few", steps=12, speedup=1.5)
    given = tiny.case(frames=9)
    videos = [
        picture_of(tiny.ksampler(windowed(model), given, steps=count))
        for model, count in zip(models, steps, strict=True)
    ]
    text, row, _ = verdict(trial, videos)
    failed = {name: one["failed"] for name, one in by_name(row).items()}
    assert failed.pop("easycache") == "EasyCache cannot run here (RuntimeError)"
    assert "EasyCache: The size of tensor a" in text
    assert set(failed.values()) == {None} and row["best"] in ("plan", "steps")
    # what another candidate stumbles over is not kept quiet
    with pytest.raises(RuntimeError, match="broken"):
        broken = models[1].clone()
        broken.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "broken", fails)
        tiny.ksampler(broken, given, steps=12, seed=9)


def fails(executor, *args, **kwargs):
    raise RuntimeError("broken")


@pytest.mark.parametrize("cache", [EasyCacheNode, LazyCacheNode])
def test_a_step_cache_on_the_model_is_taken_off_for_the_trial(cache):
    cached = cache.execute(tiny.base_model(), 0.3, 0.15, 0.95, False).result[0]
    models, steps, trial = candidates("few", cached, steps=12, speedup=1.5)
    videos = decoded(models, steps)
    assert torch.equal(videos[0], sampled(tiny.base_model(), 12))
    plain, same, _ = candidates("few", steps=12, speedup=1.5)
    assert torch.equal(videos[1], sampled(plain[1], same[1]))
    assert "was taken off for the trial" in verdict(trial, videos)[0]
    # and stays where it was put
    assert "easycache" in cached.model_options["transformer_options"]


def test_two_samplers_behind_one_trial_are_said():
    models, steps, trial = candidates("few", steps=12, speedup=1.5)
    for prompt, nodes in (("first", "3"), ("second", "34")):
        for node in nodes:
            with CurrentNodeContext(prompt, node, 0):
                videos = decoded(models, steps, seed=ord(node))
        said = verdict(trial, videos)[0].count("two samplers; the figures are of the last")
        assert said == (prompt == "second")
