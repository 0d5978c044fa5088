"""What a trial says of candidates where samplers, caches or other nodes go ways of their own."""

import pytest

from comfy.patcher_extension import WrappersMP
from wantrim.tests.comfyui.test_trial import (
    by_name,
    candidates,
    decoded,
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
