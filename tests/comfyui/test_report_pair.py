"""WanTrim Report on both experts of Wan 2.2: what is said of the two runs together."""

import json
import time

import pytest
import torch

from comfy.patcher_extension import WrappersMP
from wantrim.nodes.report import WanTrimReport
from wantrim.tests.comfyui import put, tiny

VIDEO = torch.rand(9, 64, 80, 3)


def sampled(high, low, steps=8, ends=None) -> None:
    half = tiny.ksampler_advanced(high, tiny.empty_latent(), 0, steps // 2, steps=steps)
    tiny.ksampler_advanced(low, half, steps // 2, ends or steps, steps=steps)


def report(high, low=None) -> tuple[str, dict]:
    text, _, figures = WanTrimReport.execute(high, VIDEO, low).result
    return text, json.loads(figures)


def pair(**inputs):
    return put.paired(tiny.base_model(), put.low_expert(), **inputs)


@pytest.mark.parametrize("on", ["high", "low"])
def test_steps_are_priced_by_their_own_plan(on):
    high, low = pair()
    if on == "high":
        high = tiny.at_node(high, "paper")
    else:
        low = tiny.at_node(low, "paper")
    sampled(high, low)
    _, figures = report(high, low)
    works = [step["flops_share"] for one in figures["reports"] for step in one["steps"]]
    assert f"did {len(works) / sum(works):.2f}x" in figures["verdict"]


def slow_at_first(model):
    """As weights that come over the bus with the first call."""
    calls = []

    def wait(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            time.sleep(0.5)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "slow", wait)
    return model


def test_first_steps_of_both_are_no_measure():
    high, low = map(slow_at_first, pair(speedup=2.0))
    sampled(high, low, steps=4)
    text, figures = report(high, low)
    claimed = [one["reference"] is not None and not one["reference"]["warming_up"]
               for one in figures["reports"]]  # fmt: skip
    assert not any(claimed) and "instead of" not in figures["verdict"]


def test_a_wish_is_said_of_what_it_was_a_wish_for():
    high, low = pair(speedup=2.0)
    tiny.ksampler_advanced(high, tiny.empty_latent(), 0, 2)
    assert report(high, low)[1]["verdict"].startswith(
        "Asked 2x of both experts, this one did 2.00x"
    )
    high, low = put.dialled(tiny.base_model()), put.dialled(put.low_expert(), speedup=3.0)
    sampled(high, low, steps=12)
    text, figures = report(high, low)
    assert "Asked 1.5x" in text and "Asked 3x" in text
    assert "sked" not in figures["verdict"] and "x less work" in figures["verdict"]
    sampled(high, low := put.dialled(put.low_expert()), steps=12)
    assert report(high, low)[1]["verdict"].startswith("Asked 1.5x, did 1.")


def test_a_remark_on_one_report_is_not_the_runs():
    model = put.dialled(tiny.base_model())
    tiny.ksampler(model, steps=8)
    assert "are the same model" in report(model, model)[0]
    assert "are the same model" not in report(model)[0] and not put.notes(model)
