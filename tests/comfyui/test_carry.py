"""Repeated velocities go on as they changed last, under ComfyUI's own samplers."""

import pytest
import torch

from comfy.model_patcher import ModelPatcher
from wantrim.engine import memory
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.put import asked, demo_model, demo_sample, dialled

STEPS = 16
# every second step once the video is decided
VALUES = (*(1,) * 7, *(0, 1) * 4, 1)


def sampled(*values, **options) -> torch.Tensor:
    return demo_sample(tiny.shared(demo_model(), *values), STEPS, **options)


def stay(monkeypatch) -> None:
    """Repeated velocities are as they were."""
    monkeypatch.setattr(memory, "carried", lambda persistence, ahead: 0.0 * ahead)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize(
    "sampler", ["euler", "uni_pc", "dpmpp_2m", "res_multistep", "heun", "exp_heun_2_x0"]
)
def test_the_video_is_nearer_to_the_whole_one(sampler, cfg, monkeypatch):
    options = {"sampler": sampler, "cfg": cfg}
    whole, going = demo_sample(demo_model(), STEPS, **options), sampled(*VALUES, **options)
    stay(monkeypatch)
    repeated = sampled(*VALUES, **options)
    off, before = ((out - whole).norm() for out in (going, repeated))
    # guidance makes more of what goes on less
    limit = 0.65 if cfg == 1.0 else 0.85
    assert off < (0.95 if sampler == "uni_pc" and cfg > 1.0 else limit) * before


def test_where_noise_is_added_nothing_goes_on(monkeypatch):
    going = sampled(*VALUES, sampler="euler_ancestral")
    stay(monkeypatch)
    repeated = sampled(*VALUES, sampler="euler_ancestral")
    assert torch.equal(going, repeated)


def test_batched_and_split_go_on_alike(monkeypatch):
    together = sampled(*VALUES)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    apart = sampled(*VALUES)
    assert (apart - together).abs().max() < 1e-4 * together.abs().max()


def test_a_second_run_is_the_same_to_the_bit():
    assert torch.equal(sampled(*VALUES), sampled(*VALUES))


@pytest.mark.parametrize(("sampler", "waits"), [("euler", True), ("euler_ancestral", False)])
def test_the_dial_waits_for_a_video_that_is_not_decided(sampler, waits, monkeypatch):
    """Random weights never show that changes go on; where noise is added nothing could."""

    def shares() -> tuple[float, ...]:
        model = dialled(tiny.base_model())
        tiny.ksampler(model, steps=12, sampler=sampler)
        return asked(model)

    found = shares()
    monkeypatch.setattr("wantrim.solve.course.DECIDED", 0.0)
    planned = shares()
    assert (found != planned) == waits and min(planned) < 1.0
    assert sum(found) == pytest.approx(sum(planned), rel=0.06)
    if waits:
        assert found.index(min(found)) > planned.index(min(planned))
