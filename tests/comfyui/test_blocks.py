"""Skipped blocks on ComfyUI's Wan models, against the host's own way to replace a block."""

import weakref

import pytest
import torch

import comfy.ops
import comfy.sd
from comfy.ldm.wan.model import WanModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import SESSION_KEY, attach, attachment_of, detach
from wantrim.hosts.comfyui.variants import SKIPPABLE, SUPPORTED
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.routers import (
    FixedRouter,
)
from wantrim.report.words import record_text
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.matrix import KINDS
from wantrim.tests.comfyui.put import at_blocks
from wantrim.tests.comfyui.test_errors import model_of, says
from wantrim.tests.comfyui.variants import SIDE, further_case, load

HALF = BlockBudget(0.5, 0.85)
# in which only blocks may be trimmed
FURTHER = [name for name, kind in KINDS.items() if kind.trims == ["blocks"]]


def skipping(model, blocks=(2, 3), **options):
    """A clone of `model` that never runs these blocks."""
    return attach(model, TrimPlan(blocks=BlockPlan(FixedRouter(blocks), **options)))


def replaced(model, blocks=(2, 3)):
    """The same by the host's own means."""
    clone = model.clone()
    for index in blocks:
        clone.set_model_patch_replace(
            lambda args, extra: {"img": args["img"]}, "dit", "double_block", index
        )
    return clone


def ran(model) -> list[tuple[float, list[int], list[int]]]:
    """Sigma, prompts and the blocks that really run, for every model call from now on."""
    calls = []
    network = model.model.diffusion_model
    handles = [
        block.ffn.register_forward_pre_hook(lambda m, args, i=index: calls[-1][2].append(i))
        for index, block in enumerate(network.blocks)
    ]

    def note(executor, *args, **kwargs):
        options = args[-1]
        calls.append((float(options["sigmas"].max()), list(options["cond_or_uncond"]), []))
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "ran", note)
    weakref.finalize(model, lambda: [handle.remove() for handle in handles])
    return calls


def blocks_run(model) -> list[int]:
    return [step.blocks_run for step in tiny.report_of(model).steps]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_both_ends_at_one_are_exact(kind):
    model, given = tiny.base_model(kind), tiny.case(kind)
    expected = tiny.ksampler(model, given)
    for router in ("trained", "fixed"):
        patched, text = at_blocks(model, router, k_min=1, k_max=1)
        assert torch.equal(tiny.ksampler(patched, given), expected)
        assert text == "Nothing is skipped: all 6 blocks run in every step."
    # the way through the engine is exact too
    late, _ = at_blocks(model, "trained", start_percent=0.999)
    assert not attachment_of(late).plan.neutral
    assert torch.equal(tiny.ksampler(late, given), expected)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_skip_is_the_hosts_own_replacement(kind):
    model, given = tiny.base_model(kind), tiny.case(kind)
    out = tiny.ksampler(at_blocks(model, "fixed")[0], given)
    assert torch.equal(out, tiny.ksampler(replaced(model), given))
    assert (out - tiny.ksampler(model, given)).abs().max() > 0.05


@pytest.mark.parametrize("kind", FURTHER)
def test_further_classes_skip_blocks_and_keep_what_comes_between_them(kind):
    model, given = load(kind), further_case(kind)
    dense = tiny.sample(model, given)
    bare = tiny.sample(model, tiny.case(height=SIDE, width=SIDE))
    # audio, faces and poses do something
    assert torch.isfinite(dense).all() and not torch.allclose(dense, bare, atol=1e-3)
    patched, _ = at_blocks(model, "fixed")
    calls = ran(patched)
    out = tiny.sample(patched, given)
    left = [i for i in range(len(model.model.diffusion_model.blocks)) if i not in (2, 3)]
    assert [blocks for *_, blocks in calls] == [left] * 3
    assert torch.equal(out, tiny.sample(replaced(model), given))
    assert not torch.allclose(out, dense, atol=1e-3)
    off, _ = at_blocks(model, "fixed", blocks="")
    assert torch.equal(tiny.sample(off, given), dense)
    assert blocks_run(patched) == [len(left)] * 3
    assert not tiny.report_of(patched).notes


def test_faces_are_added_behind_skipped_blocks():
    """The face encoder is as large as it is in the real model: one step, one prompt."""
    model, given = load("animate"), further_case("animate")
    face = torch.randn(1, 3, 1, 512, 512, generator=torch.Generator().manual_seed(6))
    given.positive[0][1]["face_video_pixels"] = face
    network, entered = model.model.diffusion_model, []
    fuser = network.face_adapter.fuser_blocks[0]
    fuser.register_forward_pre_hook(lambda *_: entered.append("face"))
    out = tiny.sample(skipping(model, (1, 2, 3)), given, steps=1, cfg=1.0)
    assert entered == ["face"]
    del given.positive[0][1]["face_video_pixels"]
    bare = tiny.sample(skipping(model, (1, 2, 3)), given, steps=1, cfg=1.0)
    assert torch.isfinite(out).all() and not torch.allclose(out, bare, atol=1e-3)


def test_each_aim_has_its_answer_for_every_class():
    assert set(SKIPPABLE) == set(SUPPORTED)
    tested = {kind.cls for kind in KINDS.values() if kind.takes("blocks")}
    assert {name for name, reason in SKIPPABLE.items() if reason is None} == tested
    for name in ("WanAnimate2Model", "CausalWanModel"):
        with pytest.raises(ValueError) as error:
            at_blocks(model_of(name, WanModel), "fixed")
        says(error, "WanTrim Blocks", f"cannot skip blocks of {name}", "Bypass", "HumoWanModel")
    with pytest.raises(ValueError) as error:
        at_blocks(model_of("Flux"), "fixed")
    says(error, "WanTrim Blocks", "'model'", "got Flux")


@pytest.mark.parametrize("router", ["fixed", "trained"])
def test_the_blocks_that_run_are_those_of_the_report(router):
    model, _ = at_blocks(tiny.base_model(), router)
    calls = ran(model)
    tiny.ksampler(model)
    counts = [len(blocks) for _, _, blocks in calls]
    assert counts == blocks_run(model)
    assert min(counts) < tiny.LAYERS and all({0, 5} <= set(b) for _, _, b in calls)
    mean = sum(counts) / len(counts)
    assert f"Blocks run: {mean:.1f} of 6" in record_text(tiny.report_of(model))


def test_the_text_says_which_noise_runs_how_many_blocks():
    model, text = at_blocks(tiny.base_model(), curve="rising", k_min=0.4, k_max=0.9)
    assert text == (
        "Blocks that run, of 6, by the noise that is left: 2 at 100%, 3 at 75%, 4 at 50%, 5 at 25%, "
        "5 at 0%."
    )
    tiny.sample(model, steps=9, scheduler="karras")
    said = {level / 100: count for level, count in ((100, 2), (75, 3), (50, 4), (25, 5), (0, 5))}
    for step in tiny.report_of(model).steps:
        near = [count for level, count in said.items() if abs(level - step.sigma) < 0.25]
        assert min(near) <= step.blocks_run <= max(near)
    _, text = at_blocks(tiny.base_model(), "fixed", start_percent=0.2, end_percent=0.7)
    assert text == "4 of 6 blocks run; all of them before 20% and after 70% of the run."


def test_split_and_batched_prompts_run_the_same_blocks(monkeypatch):
    outs, sets = [], []
    for free in (None, 0):
        if free is not None:
            monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
        model, _ = at_blocks(tiny.base_model())
        calls = ran(model)
        outs.append(tiny.ksampler(model))
        sets.append(calls)
    batched, split = sets
    assert [c[1] for c in batched] == [[1, 0]] * 4
    assert [blocks for *_, blocks in batched] == blocks_of_steps(split)
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-3)
    monkeypatch.undo()
    # prompts of two lengths never come in one call
    model, _ = at_blocks(tiny.base_model())
    calls = ran(model)
    tiny.ksampler(model, tiny.case(tokens=(7, 9)))
    assert len(calls) == 8 and len(blocks_of_steps(calls)) == 4


def blocks_of_steps(calls) -> list[list[int]]:
    """Blocks of each sigma, which must be the same in all its calls."""
    found: dict[float, list[int]] = {}
    for sigma, _, blocks in calls:
        if blocks:
            assert found.setdefault(sigma, blocks) == blocks
    return list(found.values())


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "uni_pc", "lcm", "res_multistep"])
def test_samplers_have_one_set_of_blocks_per_sigma(sampler):
    model, _ = at_blocks(tiny.base_model(), "trained")
    calls = ran(model)
    out = tiny.ksampler(model, sampler=sampler)
    assert torch.isfinite(out).all()
    sets = blocks_of_steps(calls)
    assert len({tuple(s) for s in sets}) > 1
    assert not tiny.report_of(model).notes
    assert torch.equal(tiny.ksampler(model, sampler=sampler), out)


def test_context_windows_share_the_blocks_of_their_step():
    model, _ = at_blocks(tiny.base_model(), "trained")
    model = ContextWindowsManualNode.execute(
        model, 3, 1, "standard_static", 1, False, "pyramid", 2, False
    ).result[0]
    calls = ran(model)
    out = tiny.sample(model, tiny.case(frames=6), steps=4)
    assert torch.isfinite(out).all()
    assert len(calls) > 8 and len(blocks_of_steps(calls)) == 4
    assert not tiny.report_of(model).notes


def test_a_pair_of_experts_has_the_blocks_of_one_run():
    """Each KSampler (Advanced) sees its own sigmas only; the budget is a function of sigma."""
    counts, latent = [], tiny.empty_latent()
    whole, _ = at_blocks(tiny.base_model())
    single = tiny.ksampler(whole, steps=6)
    for first, last in ((0, 3), (3, 6)):
        model, _ = at_blocks(tiny.base_model())
        latent = tiny.ksampler_advanced(model, latent, first, last, steps=6)
        counts.append(blocks_run(model))
    assert counts[0] + counts[1] == blocks_run(whole)
    torch.testing.assert_close(latent, single, rtol=1e-3, atol=1e-3)


def test_the_weights_of_a_skipped_block_are_never_cast_or_moved(monkeypatch):
    """fp8 weights are cast in every forward, as offloaded ones are moved."""
    weights, metadata = tiny.state_dict("t2v")
    model = comfy.sd.load_diffusion_model_state_dict(
        weights, model_options={"dtype": torch.float8_e4m3fn}, metadata=metadata
    )
    owners = {
        id(module): index
        for index, block in enumerate(model.model.diffusion_model.blocks)
        for module in block.modules()
    }
    touched = set()
    cast = comfy.ops.cast_bias_weight

    def noted(module, *args, **kwargs):
        touched.add(owners.get(id(module)))
        return cast(module, *args, **kwargs)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", noted)
    entered = []
    for index, block in enumerate(model.model.diffusion_model.blocks):
        block.register_forward_pre_hook(lambda m, args, i=index: entered.append(i))
    out = tiny.sample(skipping(model, (1, 3, 4)))
    assert torch.isfinite(out).all()
    assert touched - {None} == set(entered) == {0, 2, 5}


def test_patches_behind_a_block_run_behind_a_skipped_one_too():
    seen = []
    base = tiny.base_model().clone()

    def add(args):
        seen.append(args["block_index"])
        # in place, as VACE adds its hints
        args["img"] += 0.5
        return args

    base.set_model_double_block_patch(add)
    out = tiny.sample(skipping(base))
    assert seen == list(range(tiny.LAYERS)) * 3
    assert torch.equal(out, tiny.sample(replaced(base)))


@pytest.mark.parametrize("patch", ["attn1_patch", "attn2_patch"])
def test_patches_that_need_every_token_do_not_mind_skipped_blocks(patch):
    base = tiny.base_model().clone()
    seen = []

    def look(args):
        seen.append(args["x"].shape[1])
        return args["x"]

    base.set_model_patch(look, patch)
    model = skipping(base)
    out = tiny.sample(model)
    assert torch.equal(out, tiny.sample(replaced(tiny.base_model())))
    assert seen == [tiny.FRAMES * tiny.PER_FRAME] * 3 * 4
    assert not tiny.report_of(model).notes


def test_an_exception_leaves_nothing():
    base = tiny.base_model()
    before = tiny.sample(base)
    model, _ = at_blocks(base)
    expected = tiny.sample(model)
    stopped = model.clone()
    count = []

    def stop(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("stop")
        return out

    stopped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "stop", stop)
    with pytest.raises(RuntimeError, match="stop"):
        tiny.sample(stopped)
    assert not tiny.report_of(stopped).finished
    assert torch.equal(tiny.sample(base), before)
    assert torch.equal(tiny.sample(model), expected)
    assert torch.equal(tiny.sample(detach(model)), before)
    assert SESSION_KEY not in model.model_options["transformer_options"]


def test_attaching_twice_is_attaching_once():
    base = tiny.base_model()
    twice, _ = at_blocks(at_blocks(base, "fixed", blocks="1")[0], "fixed", blocks="2-3")
    assert torch.equal(tiny.sample(twice), tiny.sample(replaced(base)))


def test_a_batch_of_two_videos_shares_its_blocks():
    model, given = tiny.base_model(), tiny.case(batch=2)
    patched, _ = at_blocks(model)
    out = tiny.ksampler(patched, given)
    noise = tiny.comfy.sample.prepare_noise(given.latent, 7)
    for index in range(2):
        one = tiny.sample(patched, tiny.case(), steps=4, noise=noise[index : index + 1].clone())
        torch.testing.assert_close(out[index : index + 1], one, rtol=1e-3, atol=1e-3)
