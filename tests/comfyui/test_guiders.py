"""Guiders that order their prompts otherwise, or ask another model for one of them."""

import json

import pytest
import torch

import comfy.hooks
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
from comfy.ldm.wan.model import WanModel
from comfy.model_base import BaseModel
from comfy_extras import nodes_custom_sampler
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import attach, attachment_of
from wantrim.hosts.comfyui.variants import SKIP_BLOCKS, UnsupportedModel, check_variant
from wantrim.solve import priors
from wantrim.solve.course import Course
from wantrim.solve.dial import Dial, curves_of
from wantrim.tests.comfyui import neighbours, tiny
from wantrim.tests.comfyui.put import demo_model, dialled, notes

STEPS = 6
VALUES = (1, 1, 0.5, 0.5, 0, 0.5)
TRIMS = pytest.mark.parametrize("trim", [tiny.trimmed, lambda m: tiny.shared(m, *VALUES)])


def guided(guider, *conds, cfg) -> torch.Tensor:
    given = tiny.case()
    guider.set_conds(given.positive, *conds, given.negative)
    guider.set_cfg(*cfg)
    noise = comfy.sample.prepare_noise(given.latent, 7)
    sigmas = torch.tensor([*tiny.simple_sigmas(guider.model_patcher, STEPS), 0.0])
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, given.latent, euler, sigmas, disable_pbar=True, seed=7)


def with_blocks(count: int):
    """A MODEL like the tiny one, of another depth."""
    sizes = {"dim": tiny.DIM, "num_heads": tiny.HEADS, "text_dim": tiny.TEXT_DIM}
    own = {"ffn_dim": 128, "num_layers": count, "freq_dim": 256, "in_dim": 16, "out_dim": 16}
    network = WanModel(
        model_type="t2v",
        operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
        **sizes,
        **own,
    )
    said = {"num_heads": tiny.HEADS, "text_dim": tiny.TEXT_DIM}
    metadata = {"config": json.dumps({"transformer": said})}
    weights = tiny.random_weights(network, 5)
    return comfy.sd.load_diffusion_model_state_dict(weights, metadata=metadata)


@TRIMS
@pytest.mark.parametrize("count", [4, tiny.LAYERS, 8])
def test_a_prompt_that_another_model_answers_is_computed_whole(count, trim):
    tiny.needs("0.33.0", "Dual Model CFG Guider")
    other, model = with_blocks(count), trim(tiny.base_model())
    out = guided(nodes_custom_sampler.Guider_DualModel(model, other), cfg=(5.0,))
    assert torch.isfinite(out).all()
    assert any("another model" in note for note in notes(model))
    assert tiny.report_of(model).kept_share < 1.0


@TRIMS
def test_without_a_positive_prompt_batched_and_split_are_alike(trim, monkeypatch):
    """At a guidance of 1 between the two others there is none in a call."""

    def video() -> torch.Tensor:
        guider = nodes_custom_sampler.Guider_DualCFG(trim(tiny.base_model()))
        return guided(guider, tiny.text(9), cfg=(4.0, 1.0))

    together = video()
    monkeypatch.setattr(
        BaseModel, "memory_required", lambda self, shape, **_: 1e30 if shape[0] > 1 else 0.0
    )
    apart = video()
    assert (together - apart).abs().max() < 1e-2


def test_three_prompts_are_guided_whatever_the_numbers_are_called():
    """Core's DualCFG leaves `cfg` at 1 and keeps its own two."""
    model = dialled(tiny.base_model())
    guided(nodes_custom_sampler.Guider_DualCFG(model), tiny.text(9), cfg=(3.0, 5.0))
    run = attachment_of(model).solved.run
    assert run.prompts == 3 and curves_of(run) is priors.TEXT_TO_VIDEO


def test_weights_that_change_while_sampling_are_not_repeated_over():
    """A hook's keyframes put a LoRA on in the fifth of eight steps."""
    model = tiny.base_model()
    hooks = comfy.hooks.create_hook_lora(neighbours.lora_weights(model), 8.0, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(keyframes)
    given = tiny.case()
    positive = [[given.positive[0][0], {**given.positive[0][1], "hooks": hooks}]]
    hooked = tiny.Case(positive, given.negative, given.latent)
    videos = [
        tiny.sample(tiny.shared(model, 1, 1, 1, 1, 0, 0, 0, 0), one, steps=8)
        for one in (given, hooked)
    ]
    assert (videos[0] - videos[1]).square().mean().sqrt() > 1.0


def test_a_model_whose_output_is_no_velocity_is_refused_and_never_repeated():
    tiny.needs("0.33.0", "FlowRVS")
    weights, metadata = tiny.state_dict("t2v")
    said = json.loads(metadata["config"])
    said["transformer"]["model_type"] = "flow_rvs"
    model = comfy.sd.load_diffusion_model_state_dict(weights, metadata={"config": json.dumps(said)})
    for aim in ("leave out tokens of", SKIP_BLOCKS):
        with pytest.raises(UnsupportedModel, match=f"cannot {aim} WanModel: what the model"):
            check_variant(model, "WanTrim", aim)
    # its sampling can be put on later
    patched = attach(model, TrimPlan(), Dial(2.0))
    assert torch.equal(tiny.sample(patched, steps=4), tiny.sample(model, steps=4))
    assert any("not the way from noise to a video" in note for note in notes(patched))


def test_a_report_that_cannot_be_made_loses_no_video(monkeypatch, caplog):
    model = dialled(demo_model())

    def broken(self):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(Course, "ended", property(broken))
    assert torch.isfinite(tiny.sample(model, steps=4)).all()
    assert "what this run did could not be told" in caplog.text and "on purpose" in caplog.text
