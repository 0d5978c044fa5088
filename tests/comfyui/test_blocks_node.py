"""The node WanTrim Blocks: its routers, its inputs and what it refuses."""

import gc
import os

import pytest
import torch

import folder_paths
from comfy.patcher_extension import WrappersMP
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import KEY, attach, attachment_of, detach
from wantrim.hosts.comfyui.profiling import model_fingerprint
from wantrim.methods.depth import BlockPlan, choose_blocks
from wantrim.methods.routers import Content, FixedRouter, RouterMLP
from wantrim.nodes.blocks import FOLDER, ROUTERS, WanTrimBlocks, parse_blocks
from wantrim.slim.router import TrainedRouter
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.put import BLOCKS, at_blocks, routers
from wantrim.tests.comfyui.test_blocks import (
    HALF,
    blocks_run,
    ran,
)
from wantrim.tests.comfyui.test_errors import says
from wantrim.training.router_file import save_router


@pytest.fixture
def router_folder(tmp_path, monkeypatch):
    entry = ([str(tmp_path), str(routers())], folder_paths.supported_pt_extensions)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, entry)
    folder_paths.filename_list_cache.pop(FOLDER, None)
    yield tmp_path
    folder_paths.filename_list_cache.pop(FOLDER, None)


def trained_router(model, kind="latent", content_dim=64) -> TrainedRouter:
    torch.manual_seed(1)
    with torch.inference_mode(False):
        mlp = RouterMLP(tiny.LAYERS, content_dim, 32, 16).requires_grad_(False)
    return TrainedRouter(mlp, kind, model_fingerprint(model.model.diffusion_model))


def test_a_trained_router_chooses_and_is_carried_by_the_host(router_folder):
    base = tiny.base_model()
    router = trained_router(base)
    save_router(router_folder / "mine.safetensors", router)
    model, _ = at_blocks(base, "trained", file="mine.safetensors")
    loaded = attachment_of(model).plan.blocks.router
    carried = model.additional_models[KEY]
    assert [patcher.model for patcher in carried] == [loaded.mlp]
    assert not base.additional_models
    calls, latents = ran(model), []

    def note(executor, x, *args, **kwargs):
        latents.append(x[:1].clone())
        # on the host's list of loaded models while it samples
        on = [m.model for m in tiny.comfy.model_management.current_loaded_models]
        assert any(one is not None and one.model is loaded.mlp for one in on)
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "latents", note)
    tiny.ksampler(model)
    assert [len(blocks) for *_, blocks in calls] == blocks_run(model)
    for (sigma, _, blocks), latent in zip(calls, latents, strict=True):
        logits = router.ask(torch.tensor([sigma]), Content(latent))
        assert list(choose_blocks(logits, len(blocks))) == blocks
    # further nodes keep it, another plan and no plan let go of it
    assert len(tiny.at_node(model).additional_models[KEY]) == 1
    assert KEY not in detach(model).additional_models
    assert KEY not in at_blocks(model, "fixed")[0].additional_models
    # read once
    again, _ = at_blocks(base, "trained", file="mine.safetensors", k_min=0.6)
    assert attachment_of(again).plan.blocks.router is loaded


@pytest.mark.parametrize("further", [lambda model: model, tiny.at_node])
def test_a_router_that_outlives_its_model_is_no_leak_to_the_host(router_folder, caplog, further):
    """The host would say so, and collect all garbage, whenever it loads any model."""
    base = tiny.base_model()
    save_router(router_folder / "mine.safetensors", trained_router(base))
    model = further(at_blocks(base, "trained", file="mine.safetensors")[0])
    router = attachment_of(model).plan.blocks.router
    tiny.ksampler(model, steps=2)
    del model
    gc.collect()
    with caplog.at_level("INFO"):
        tiny.ksampler(base, steps=1)
    assert router.mlp.num_blocks and "leak" not in caplog.text


def test_a_router_of_clip_takes_the_class_embedding_of_the_image():
    model, given = tiny.base_model("i2v_clip"), tiny.case("i2v_clip")
    router = trained_router(model, "clip", 1280)
    seen = []

    class Spy(TrainedRouter):
        def ask(self, sigma, content):
            seen.append(content.clip)
            return super().ask(sigma, content)

    spy = Spy(router.mlp, router.kind, router.model)
    tiny.ksampler(attach(model, TrimPlan(blocks=BlockPlan(spy, HALF))), given)
    clip = tiny.clip_vision().penultimate_hidden_states[:, 0]
    assert len(seen) == 4 and all(torch.equal(one, clip) for one in seen)


def test_a_router_file_that_was_written_again_is_read_again(router_folder):
    base, path = tiny.base_model(), router_folder / "mine.safetensors"
    save_router(path, trained_router(base))
    choice = {"router": "trained", "router_file": path.name}
    first = at_blocks(base, "trained", file=path.name)[0]
    before = WanTrimBlocks.fingerprint_inputs(router=choice, **BLOCKS)
    other = trained_router(base)
    other.mlp.layers[0].weight *= 2
    save_router(path, other)
    os.utime(path, ns=(1, 10**18))
    assert WanTrimBlocks.fingerprint_inputs(router=choice, **BLOCKS) != before
    second = at_blocks(base, "trained", file=path.name)[0]
    one, two = (attachment_of(m).plan.blocks.router.mlp.layers[0].weight for m in (first, second))
    assert torch.equal(2 * one, two)
    assert WanTrimBlocks.fingerprint_inputs(router={"router": "fixed"}, **BLOCKS) == ""
    assert WanTrimBlocks.fingerprint_inputs(router=None, **BLOCKS) == ""


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("", ()),
        ("  ", ()),
        ("3", (3,)),
        ("12, 15-18", (12, 15, 16, 17, 18)),
        ("15 - 18; 12 12,", (12, 15, 16, 17, 18)),
        ("1-38", tuple(range(1, 39))),
    ],
)
def test_lists_of_blocks(given, found):
    assert parse_blocks(given, 40) == found


@pytest.mark.parametrize("given", ["0", "39", "40", "5-3", "a", "3-", "-3", "1.5", "3--5", "9" * 9])
def test_lists_of_blocks_that_cannot_be_are_refused(given):
    with pytest.raises(
        ValueError, match="blocks: expected blocks from 1 to 38 such as '12, 15-18'"
    ):
        parse_blocks(given, 40)


@pytest.mark.parametrize(
    ("router", "inputs", "parts"),
    [
        ("trained", {"k_min": 0.9, "k_max": 0.5}, ["k_min", "k_max", "0.9", "0.5"]),
        ("trained", {"k_min": 0.0}, ["k_min", "0.0"]),
        ("trained", {"k_min": float("nan")}, ["k_min", "nan"]),
        ("trained", {"k_max": 1.5}, ["k_max", "1.5"]),
        ("trained", {"curve": "wavy"}, ["curve", "falling, constant, rising", "wavy"]),
        ("trained", {"start_percent": 0.7, "end_percent": 0.3}, ["start_percent", "0.7", "0.3"]),
        ("fixed", {"blocks": "7"}, ["blocks", "1 to 4", "0 to 5"]),
        (
            "trained",
            {"file": "gone.safetensors"},
            ["router_file", "gone", "wantrim/routers"],
        ),
        ("magic", {}, ["router", "trained, fixed", "magic"]),
    ],
)
def test_inputs_that_cannot_be_are_refused_by_name(router, inputs, parts, router_folder):
    with pytest.raises(ValueError) as error:
        at_blocks(tiny.base_model(), router, **inputs)
    says(error, "WanTrim Blocks: ", *parts)
    assert str(error.value).count("WanTrim Blocks") == 1


@pytest.mark.parametrize("router", ["fixed", "trained"])
def test_a_linked_choice_without_its_input_says_what_to_do(router):
    with pytest.raises(ValueError) as error:
        WanTrimBlocks.execute(model=tiny.base_model(), router=router, **BLOCKS)
    says(error, f"'{router}' needs the input", "cannot be linked")
    with pytest.raises(ValueError) as error:
        WanTrimBlocks.execute(model=tiny.base_model(), router=None, **BLOCKS)
    says(error, "got none of them")


def test_a_router_of_another_model_or_another_kind_is_refused(router_folder):
    base = tiny.base_model()
    save_router(router_folder / "i2v.safetensors", trained_router(tiny.base_model("i2v")))
    save_router(router_folder / "clip.safetensors", trained_router(base, "clip", 1280))
    (router_folder / "bad.safetensors").write_bytes(b"nothing")
    for name, parts in {
        "i2v": ["trained for another model", "36 input and 16 output channels"],
        "clip": ["CLIP", "takes none"],
        "bad": ["bad.safetensors", "cannot be read"],
    }.items():
        with pytest.raises(ValueError) as error:
            at_blocks(base, "trained", file=f"{name}.safetensors")
        says(error, "WanTrim Blocks", *parts)


def test_the_nodes_inputs_are_the_plans_fields():
    schema = WanTrimBlocks.define_schema()
    inputs = {given.id: given for given in schema.inputs}
    assert tuple(option.key for option in inputs["router"].options) == ROUTERS
    plan = BlockPlan(FixedRouter(()))
    assert (inputs["k_min"].default, inputs["k_max"].default) == (0.5, 0.875)
    assert (plan.budget.k_min, plan.budget.k_max) == (0.5, 0.875)
