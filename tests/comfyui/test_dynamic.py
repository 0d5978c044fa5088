"""Dynamic VRAM: every plan gives the bytes that it gives where all weights are at hand."""

import comfy_aimdo.model_vbar
import pytest
import torch

import comfy.ops
import comfy.sd
from comfy import model_management as management
from comfy.model_patcher import ModelPatcherDynamic
from comfy.patcher_extension import WrappersMP
from wantrim.hosts.comfyui.dial import free_memory
from wantrim.hosts.comfyui.profiling import attach_profile, profile_of
from wantrim.hosts.comfyui.slim import load_slim
from wantrim.tests.comfyui import neighbours, tiny
from wantrim.tests.comfyui.dynamic import GPU, dynamic_vram, keep_apart, pages_of
from wantrim.tests.comfyui.matrix import DEFAULT
from wantrim.tests.comfyui.put import dialled, paired, routed
from wantrim.tests.comfyui.test_matrix import PUT_ON, WITHOUT_EFFECT
from wantrim.tests.comfyui.test_slim import lora, slim_file
from wantrim.tests.comfyui.variants import load

WAYS = {
    "untouched": lambda model: model,
    **{f"{name}, neutral": way for name, way in WITHOUT_EFFECT.items()},
    **PUT_ON,
    "router": lambda model: routed(model, "trained"),
    "lora": lambda model: dialled(neighbours.lora(model), speedup=1.3),
    "sage": lambda model: neighbours.sage(PUT_ON["all"](model)),
}


@pytest.fixture(autouse=True)
def new_enough():
    tiny.needs("0.33.0", "dynamic VRAM as it is stood in for")


def moved(kind: str = "t2v"):
    """A fresh MODEL under dynamic VRAM."""
    model = keep_apart(load(kind))
    assert type(model) is ModelPatcherDynamic
    return model


def met(model) -> dict[str, int]:
    """Of all that can become of a weight, everything did."""
    pages = pages_of(model)
    assert min(pages.met.values()) > 9 and not pages.pins
    return pages.met


@pytest.mark.parametrize("way", WAYS)
def test_every_plan(way):
    put, plain = WAYS[way], load("t2v")
    plain = put(plain)
    expected = tiny.sample(plain, steps=4)
    with dynamic_vram():
        model = put(moved())
        for _ in range(2):
            assert torch.equal(tiny.sample(model, steps=4), expected)
        met(model)
    if way != "untouched":
        assert tiny.report_of(model).notes == tiny.report_of(plain).notes


@pytest.mark.parametrize("kind", ["i2v_clip", "ti2v", "vace", "fun"])
def test_the_default_on_other_kinds(kind):
    given = tiny.case(kind)
    expected = tiny.sample(dialled(load(kind), speedup=1.3), given, steps=4)
    with dynamic_vram():
        model = dialled(moved(kind), speedup=1.3)
        assert torch.equal(tiny.sample(model, given, steps=4), expected)
        met(model)


@pytest.mark.parametrize("way", [DEFAULT, "all", "router"])
def test_memory_that_others_take_between_the_calls(way):
    """Another model's load in mid-run: all of this one's weights go back to RAM."""

    def taken(executor, *args, **kwargs):
        held = [one.model for one in management.current_loaded_models]
        assert sum(one.partially_unload(None, 1e32) for one in held) > 0
        return executor(*args, **kwargs)

    expected = tiny.sample(WAYS[way](load("t2v")), steps=4)
    with dynamic_vram():
        model = WAYS[way](moved())
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "taken", taken)
        assert torch.equal(tiny.sample(model, steps=4), expected)


def run_pair(high, low) -> torch.Tensor:
    half = tiny.ksampler_advanced(high, tiny.empty_latent(), 0, 4, steps=8)
    return tiny.ksampler_advanced(low, half, 4, 8, steps=8)


def test_a_pair():
    kinds = ("t2v", "low")
    expected = run_pair(*paired(*map(load, kinds), speedup=1.4))
    with dynamic_vram():
        models = paired(*map(moved, kinds), speedup=1.4)
        assert torch.equal(run_pair(*models), expected)
        assert all(map(met, models))


def test_a_router_moves_no_other_model_out(monkeypatch):
    """As no model of the host's does: what is on the GPU goes when its room is needed."""
    with dynamic_vram():
        high, low = moved(), moved("low")
        tiny.sample(high, steps=1)
        monkeypatch.setattr(management, "get_free_memory", little)
        tiny.sample(routed(low, "trained"), steps=1)
        assert pages_of(high).loaded_size() > 0


def little(device=None, torch_free_too=False):
    return (1, 1) if torch_free_too else 1


@pytest.mark.parametrize("patched", [lambda model: model, neighbours.lora])
def test_a_profile(patched):
    def recorded(model):
        model = attach_profile(patched(model), "all")
        tiny.sample(model, steps=2)
        return profile_of(model).recorder

    expected = recorded(load("t2v"))
    with dynamic_vram():
        found = recorded(moved())
    assert found.notes == expected.notes
    assert found.profile().model == expected.profile().model
    for name, value in expected.profile().tensors.items():
        assert torch.equal(found.profile().tensors[name], value), name
    for name, value in expected.calibration.sums.items():
        assert torch.equal(found.calibration.sums[name], value), name


def test_a_slim_model(tmp_path):
    """With a LoRA of the full model, which is cut before the weights are loaded."""
    path, patch = slim_file(tmp_path), lora()

    def made(model):
        return dialled(comfy.sd.load_lora_for_models(model, None, patch, 0.8, 0)[0], speedup=1.3)

    expected = tiny.sample(made(load_slim(path)), steps=4)
    with dynamic_vram():
        model = made(keep_apart(load_slim(path)))
        assert type(model) is ModelPatcherDynamic
        assert torch.equal(tiny.sample(model, steps=4), expected)
        met(model)
        # as core's compile node takes it
        still = model.clone(disable_dynamic=True)
        assert torch.equal(tiny.sample(still, steps=4), expected)


def test_room_is_counted_with_what_weights_give_back(monkeypatch):
    with dynamic_vram():
        model = moved()
        tiny.sample(model, steps=1)
        held = pages_of(model).loaded_size()
        monkeypatch.setattr(comfy_aimdo.model_vbar, "vbars_analyze", lambda device=None: held)
        monkeypatch.setattr(management, "get_free_memory", little)
        assert free_memory(model, GPU) == 1 + held > 1


def test_what_the_stand_in_gives_to_who_holds_a_weight():
    """Outside of a layer's own forward a weight is out of reach, or somebody else's bytes."""
    with dynamic_vram():
        model, held = moved(), []
        network = model.model.diffusion_model
        cast = comfy.ops.cast_bias_weight

        def noted(*args, **kwargs):
            found = cast(*args, **kwargs)
            held.append(found[0])
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comfy.ops, "cast_bias_weight", noted)
            tiny.sample(model, steps=1)
        assert any(weight.isnan().all() for weight in held)
        with pytest.raises(RuntimeError, match="on one device"):
            torch.nn.functional.linear(torch.ones(1, tiny.DIM), network.blocks[0].ffn[0].weight)
