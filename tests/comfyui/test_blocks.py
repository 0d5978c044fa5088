"""Skipped blocks on ComfyUI's Wan models, against the host's own way to replace a block."""

import gc
import os
import weakref
from dataclasses import replace

import pytest
import torch

import comfy.ops
import comfy.sd
import folder_paths
from comfy.ldm.wan.model import WanModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from wantrim.hosts.comfyui.attach import KEY, SESSION_KEY, attach, attachment_of, detach
from wantrim.hosts.comfyui.profiling import model_fingerprint
from wantrim.hosts.comfyui.variants import SKIPPABLE, SUPPORTED
from wantrim.hosts.past import Past
from wantrim.hosts.profiling import ProfileFile
from wantrim.hosts.session import TrimPlan
from wantrim.methods.conditions import Conditions
from wantrim.methods.depth import BlockBudget, BlockPlan, choose_blocks
from wantrim.methods.heads import HeadPlan
from wantrim.methods.profile import Profile
from wantrim.methods.routers import (
    Content,
    FixedRouter,
    OnlineRouter,
    ProfiledRouter,
    RouterMLP,
    TrainedRouter,
    save_router,
)
from wantrim.nodes.blocks import FOLDER, ROUTERS, WanTrimBlocks, parse_blocks
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.matrix import KINDS
from wantrim.tests.comfyui.neighbours import easycache, slg
from wantrim.tests.comfyui.passes import record
from wantrim.tests.comfyui.test_chaining import NEIGHBOURS, ORDERS, compiled  # noqa: F401
from wantrim.tests.comfyui.test_errors import model_of, says
from wantrim.tests.comfyui.variants import SIDE, further_case, load

HALF = BlockBudget(0.5, 0.85)
DEFAULTS = {
    "k_min": 0.5,
    "k_max": 0.85,
    "curve": "falling",
    "skipped_blocks_give": "identity",
    "steps": 4,
    "scheduler": "simple",
    "shift": 0.0,
    "repeat_at_most": 1,
    "memory": 8,
    "start_percent": 0.0,
    "end_percent": 1.0,
}
either = pytest.mark.parametrize("gives", ["identity", "reuse"])

# in which only blocks may be trimmed
FURTHER = [name for name, kind in KINDS.items() if kind.trims == ["blocks"]]


def profile_for(model) -> Profile:
    """Every sigma bin has another order of the blocks."""
    made = Profile.empty(model_fingerprint(model.model.diffusion_model))
    made.tensors["count"] += 1
    made.tensors["hidden"] += 1
    residual = made.tensors["residual"]
    residual += 0.1 + torch.rand(residual.shape, generator=torch.Generator().manual_seed(4))
    return made


def at_node(model, router="profiled", *, blocks="2, 3", router_file=None, **inputs):
    """What WanTrim Blocks gives out: the MODEL and the text."""
    choice = {"router": router}
    if router == "fixed":
        choice["blocks"] = blocks
    if router == "trained":
        choice["router_file"] = router_file
    profile = inputs.pop("profile", None)
    if profile is None and router in ("profiled", "online"):
        profile = ProfileFile(profile_for(model))
    given = DEFAULTS | inputs
    return WanTrimBlocks.execute(model=model, router=choice, profile=profile, **given).result


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


@pytest.fixture
def router_folder(tmp_path, monkeypatch):
    entry = ([str(tmp_path)], folder_paths.supported_pt_extensions)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, entry)
    folder_paths.filename_list_cache.pop(FOLDER, None)
    yield tmp_path
    folder_paths.filename_list_cache.pop(FOLDER, None)


def trained_router(model, kind="latent", content_dim=64) -> TrainedRouter:
    torch.manual_seed(1)
    with torch.inference_mode(False):
        mlp = RouterMLP(tiny.LAYERS, content_dim, 32, 16).requires_grad_(False)
    return TrainedRouter(mlp, kind, model_fingerprint(model.model.diffusion_model))


@either
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_both_ends_at_one_are_exact(kind, gives):
    model, given = tiny.base_model(kind), tiny.case(kind)
    expected = tiny.ksampler(model, given)
    for router in ("profiled", "fixed"):
        patched, text = at_node(model, router, k_min=1, k_max=1, skipped_blocks_give=gives)
        assert torch.equal(tiny.ksampler(patched, given), expected)
        assert text == "Nothing is skipped: all 6 blocks run in every step."
    # the way through the session is exact too
    late, _ = at_node(model, "online", start_percent=0.999, skipped_blocks_give=gives)
    assert not attachment_of(late).plan.neutral
    assert torch.equal(tiny.ksampler(late, given), expected)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_skip_is_the_hosts_own_replacement(kind):
    model, given = tiny.base_model(kind), tiny.case(kind)
    out = tiny.ksampler(at_node(model, "fixed")[0], given)
    assert torch.equal(out, tiny.ksampler(replaced(model), given))
    assert (out - tiny.ksampler(model, given)).abs().max() > 0.05


@pytest.mark.parametrize("kind", FURTHER)
def test_further_classes_skip_blocks_and_keep_what_comes_between_them(kind):
    model, given = load(kind), further_case(kind)
    dense = tiny.sample(model, given)
    bare = tiny.sample(model, tiny.case(height=SIDE, width=SIDE))
    # audio, faces and poses do something
    assert torch.isfinite(dense).all() and not torch.allclose(dense, bare, atol=1e-3)
    patched, _ = at_node(model, "fixed")
    calls = ran(patched)
    out = tiny.sample(patched, given)
    left = [i for i in range(len(model.model.diffusion_model.blocks)) if i not in (2, 3)]
    assert [blocks for *_, blocks in calls] == [left] * 3
    assert torch.equal(out, tiny.sample(replaced(model), given))
    assert not torch.allclose(out, dense, atol=1e-3)
    off, _ = at_node(model, "fixed", blocks="")
    assert torch.equal(tiny.sample(off, given), dense)
    again, _ = at_node(model, "fixed", skipped_blocks_give="reuse")
    assert torch.isfinite(tiny.sample(again, given)).all()
    assert blocks_run(again) == [len(left) + 2, len(left), len(left)]
    assert not tiny.report_of(again).notes


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
            at_node(model_of(name, WanModel), "fixed")
        says(error, "WanTrim Blocks", f"cannot skip blocks of {name}", "Bypass", "HumoWanModel")
    with pytest.raises(ValueError) as error:
        at_node(model_of("Flux"), "fixed")
    says(error, "WanTrim Blocks", "'model'", "got Flux")


@either
@pytest.mark.parametrize("router", ["fixed", "profiled", "online"])
def test_the_blocks_that_run_are_those_of_the_report_and_the_text(router, gives):
    model, text = at_node(tiny.base_model(), router, skipped_blocks_give=gives)
    calls = ran(model)
    tiny.ksampler(model)
    counts = [len(blocks) for _, _, blocks in calls]
    assert counts == blocks_run(model)
    assert text.splitlines()[1] == " ".join(map(str, counts))
    assert min(counts) < tiny.LAYERS and all({0, 5} <= set(b) for _, _, b in calls)


@pytest.mark.parametrize("steps", [4, 11])
@pytest.mark.parametrize("shift", [5.0, 8.0, 0.0])
@either
def test_the_text_says_before_what_the_report_says_afterwards(shift, steps, gives):
    """With ModelSamplingSD3 behind the node, as it is usually wired."""
    model, text = at_node(
        tiny.base_model(), curve="rising", skipped_blocks_give=gives, steps=steps, shift=shift,
        start_percent=0.2,
    )  # fmt: skip
    if shift:
        model = ModelSamplingSD3().patch(model, shift)[0]
    tiny.ksampler(model, steps=steps)
    counts = blocks_run(model)
    lines = text.splitlines()
    # the tiny models come with Wan's own shift
    assert lines[0] == f"Blocks that run, of 6, at {steps} steps (simple, shift {shift or 8:g}):"
    assert lines[1] == " ".join(map(str, counts))
    mean = sum(counts) / steps
    assert lines[2] == f"Mean {mean:.1f}: {mean / 6:.0%} of the blocks."
    assert ("Memory: at most 8 hidden states" in text) == (gives == "reuse")
    assert f"Blocks run: {mean:.1f} of 6" in tiny.report_of(model).text()


def test_schedulers_have_their_own_sigmas():
    base = tiny.base_model()
    texts = {s: at_node(base, steps=9, scheduler=s)[1] for s in ("simple", "karras", "beta")}
    assert len({text.splitlines()[1] for text in texts.values()}) > 1
    for scheduler, text in texts.items():
        model, _ = at_node(base)
        tiny.sample(model, steps=9, scheduler=scheduler)
        assert text.splitlines()[1] == " ".join(map(str, blocks_run(model)))


@either
@pytest.mark.parametrize("router", ["profiled", "online"])
def test_split_and_batched_prompts_run_the_same_blocks(router, gives, monkeypatch):
    outs, sets = [], []
    for free in (None, 0):
        if free is not None:
            monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
        model, _ = at_node(tiny.base_model(), router, skipped_blocks_give=gives)
        calls = ran(model)
        outs.append(tiny.ksampler(model))
        sets.append(calls)
    batched, split = sets
    assert [c[1] for c in batched] == [[1, 0]] * 4
    assert [blocks for *_, blocks in batched] == blocks_of_steps(split)
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-3)
    monkeypatch.undo()
    # prompts of two lengths never come in one call
    model, _ = at_node(tiny.base_model(), router, skipped_blocks_give=gives)
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


@either
@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "uni_pc", "lcm", "res_multistep"])
def test_samplers_have_one_set_of_blocks_per_sigma(sampler, gives):
    model, _ = at_node(tiny.base_model(), "online", skipped_blocks_give=gives)
    calls = ran(model)
    out = tiny.ksampler(model, sampler=sampler)
    assert torch.isfinite(out).all()
    sets = blocks_of_steps(calls)
    assert len({tuple(s) for s in sets}) > 1
    # what a second call at a sigma wants is still there
    if sampler != "dpm_2":
        assert not any("no update" in note for note in tiny.report_of(model).notes)
    assert torch.equal(tiny.ksampler(model, sampler=sampler), out)


@either
def test_context_windows_share_the_blocks_of_their_step(gives):
    model, _ = at_node(tiny.base_model(), "online", skipped_blocks_give=gives)
    model = ContextWindowsManualNode.execute(
        model, 3, 1, "standard_static", 1, False, "pyramid", 2, False
    ).result[0]
    calls = ran(model)
    out = tiny.sample(model, tiny.case(frames=6), steps=4)
    assert torch.isfinite(out).all()
    assert len(calls) > 8 and len(blocks_of_steps(calls)) == 4
    assert not tiny.report_of(model).notes


@either
def test_a_pair_of_experts_has_the_blocks_of_one_run(gives):
    """Each KSampler (Advanced) sees its own sigmas only; the budget is a function of sigma."""
    counts, latent = [], tiny.empty_latent()
    whole, text = at_node(tiny.base_model(), skipped_blocks_give=gives, steps=6)
    single = tiny.ksampler(whole, steps=6)
    for first, last in ((0, 3), (3, 6)):
        model, _ = at_node(tiny.base_model(), skipped_blocks_give=gives)
        latent = tiny.ksampler_advanced(model, latent, first, last, steps=6)
        counts.append(blocks_run(model))
    if gives == "identity":
        assert counts[0] + counts[1] == blocks_run(whole)
        torch.testing.assert_close(latent, single, rtol=1e-3, atol=1e-3)
    else:
        # each expert begins with nothing to repeat
        assert counts[0][0] == counts[1][0] == tiny.LAYERS
        assert counts[0][1:] + counts[1][1:] == [blocks_run(whole)[i] for i in (1, 2, 4, 5)]
    assert text.splitlines()[1] == " ".join(map(str, blocks_run(whole)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbours_keep_working(neighbour, order):
    """Where skipped blocks repeat themselves; the matrix has the others."""

    def trim(model):
        return at_node(model, skipped_blocks_give="reuse")[0]

    base = tiny.base_model()
    model = trim(neighbour(base)) if order == "in front" else neighbour(trim(base))
    out = tiny.sample(model, steps=6)
    assert torch.isfinite(out).all()
    assert torch.equal(tiny.sample(model, steps=6), out)
    assert not torch.allclose(out, tiny.sample(neighbour(base), steps=6), atol=1e-3)
    assert not torch.allclose(out, tiny.sample(trim(base), steps=6), atol=1e-3)


@pytest.mark.parametrize("order", ORDERS)
def test_slg_and_easycache_with_a_skip_equal_those_with_the_hosts_replacement(order):
    for neighbour in (lambda m: slg(m, "1"), easycache, lambda m: easycache(slg(m, "1"))):
        base = tiny.base_model()
        if order == "in front":
            model, expected = skipping(neighbour(base)), replaced(neighbour(base))
        else:
            model, expected = neighbour(skipping(base)), neighbour(replaced(base))
        assert torch.equal(tiny.sample(model, steps=6), tiny.sample(expected, steps=6))


def test_the_pass_of_slg_runs_the_blocks_of_its_step():
    model = skipping(slg(tiny.base_model(), "1"))
    calls = ran(model)
    tiny.sample(model)
    # blocks 2 and 3 are ours, and block 1 is left out in the extra pass
    assert [(roles, blocks) for _, roles, blocks in calls] == [
        ([1, 0], [0, 1, 4, 5]),
        ([0], [0, 4, 5]),
    ] * 3
    assert len(tiny.report_of(model).steps) == 3


@pytest.mark.parametrize("order", ORDERS)
def test_a_step_that_a_cache_answers_leaves_nothing_to_repeat_and_that_is_said(order):
    def trim(model):
        return at_node(model, skipped_blocks_give="reuse")[0]

    base = tiny.base_model()
    model = trim(easycache(base)) if order == "in front" else easycache(trim(base))
    tiny.sample(model, steps=8)
    run = blocks_run(model)
    # a cache in front of us answers steps that we never see
    assert (0 in run) == (order == "behind") and len(run) == (8 if order == "behind" else 5)
    assert any("added nothing" in note for note in tiny.report_of(model).notes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", ["refresh", "paper"])
@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v", "vace"])
def test_tokens_heads_and_blocks_in_any_wiring_order_are_one_plan(kind, tokens, order):
    model, given = tiny.base_model(kind), tiny.case(kind)
    plan = HeadPlan(
        (("frame",) * tiny.HEADS,) * tiny.LAYERS, (("full",) * tiny.HEADS,) * tiny.LAYERS
    )

    def with_heads(m):
        present = attachment_of(m)
        return attach(m, replace(present.plan if present else TrimPlan(), heads=plan))

    def with_blocks(m):
        return at_node(m, "online", skipped_blocks_give="reuse")[0]

    steps = [lambda m: tiny.at_node(m, tokens), with_heads, with_blocks]
    one = with_blocks(with_heads(tiny.at_node(model, tokens)))
    other = model
    for step in reversed(steps) if order == "behind" else (steps[1], steps[2], steps[0]):
        other = step(other)
    assert attachment_of(one).plan.describe() == attachment_of(other).plan.describe()
    out = tiny.ksampler(one, given)
    assert torch.equal(out, tiny.ksampler(other, given))
    for alone in steps:
        assert not torch.allclose(out, tiny.ksampler(alone(model), given), atol=1e-3)
    assert min(blocks_run(one)) < tiny.LAYERS


@either
@pytest.mark.parametrize("order", ORDERS)
def test_a_compiled_model_does_not_freeze_a_steps_blocks(compiled, order, gives):  # noqa: F811
    def trim(model):
        return at_node(model, "online", skipped_blocks_give=gives)[0]

    base = tiny.base_model()
    model = trim(compiled(base)) if order == "in front" else compiled(trim(base))
    expected = trim(base)
    out = tiny.sample(model, steps=5)
    assert torch.equal(out, tiny.sample(expected, steps=5))
    kept = [step.kept_per_block for step in tiny.report_of(model).steps]
    assert kept == [step.kept_per_block for step in tiny.report_of(expected).steps]
    assert len({tuple(step) for step in kept}) > 2
    assert any("not compiled" in note for note in tiny.report_of(model).notes)


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
    seen.clear()
    tiny.sample(skipping(base, skipped="reuse"))
    assert seen == list(range(tiny.LAYERS)) * 3


def test_what_comes_between_blocks_is_no_part_of_what_is_repeated(monkeypatch):
    """Hints of VACE are added once in every step, whether a block ran or not."""
    passes = record(monkeypatch)
    tiny.sample(skipping(tiny.base_model("vace"), skipped="reuse"), tiny.case("vace"), steps=3)
    first, *later = passes
    own = sum(first.after[i] - first.before[i] for i in (2, 3))
    assert len(later) == 2 and own.abs().mean() > 0.1
    for seen in later:
        assert torch.equal(seen.after[2], seen.before[2])
        torch.testing.assert_close(seen.after[3] - seen.before[3], own, atol=1e-4, rtol=1e-4)
        # VACE's own blocks add theirs behind blocks 0 and 3
        hint = seen.before[4] - seen.after[3]
        assert hint.abs().mean() > 0.1


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


@either
def test_an_exception_leaves_nothing(gives, monkeypatch):
    held = []
    remember = Past.remember

    def noted(self, key, value):
        held.append(weakref.ref(value))
        remember(self, key, value)

    monkeypatch.setattr(Past, "remember", noted)
    base = tiny.base_model()
    before = tiny.sample(base)
    model, _ = at_node(base, skipped_blocks_give=gives)
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
    gc.collect()
    assert bool(held) == (gives == "reuse") and all(ref() is None for ref in held)
    assert torch.equal(tiny.sample(base), before)
    assert torch.equal(tiny.sample(model), expected)
    assert torch.equal(tiny.sample(detach(model)), before)
    assert SESSION_KEY not in model.model_options["transformer_options"]


def test_attaching_twice_is_attaching_once():
    base = tiny.base_model()
    twice, _ = at_node(at_node(base, "fixed", blocks="1")[0], "fixed", blocks="2-3")
    assert torch.equal(tiny.sample(twice), tiny.sample(replaced(base)))


def test_a_batch_of_two_videos_shares_its_blocks():
    model, given = tiny.base_model(), tiny.case(batch=2)
    patched, _ = at_node(model, skipped_blocks_give="reuse")
    out = tiny.ksampler(patched, given)
    noise = tiny.comfy.sample.prepare_noise(given.latent, 7)
    for index in range(2):
        one = tiny.sample(patched, tiny.case(), steps=4, noise=noise[index : index + 1].clone())
        torch.testing.assert_close(out[index : index + 1], one, rtol=1e-3, atol=1e-3)


def test_a_trained_router_chooses_and_is_carried_by_the_host(router_folder):
    base = tiny.base_model()
    router = trained_router(base)
    save_router(router_folder / "mine.safetensors", router)
    model, text = at_node(base, "trained", router_file="mine.safetensors")
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
    assert text.splitlines()[1] == " ".join(map(str, blocks_run(model)))
    for (sigma, _, blocks), latent in zip(calls, latents, strict=True):
        logits = router.run(tiny.LAYERS).logits(sigma, Content(latent))
        assert list(choose_blocks(logits, len(blocks))) == blocks
    # further nodes keep it, another plan and no plan let go of it
    assert len(tiny.at_node(model).additional_models[KEY]) == 1
    assert KEY not in detach(model).additional_models
    assert KEY not in at_node(model, "fixed")[0].additional_models
    # read once
    again, _ = at_node(base, "trained", router_file="mine.safetensors", k_min=0.6)
    assert attachment_of(again).plan.blocks.router is loaded


def test_a_router_is_run_as_it_was_trained_unless_somebody_says_otherwise(router_folder):
    base, path = tiny.base_model(), router_folder / "mine.safetensors"
    router = trained_router(base)
    router.conditions = Conditions(0.4, 0.6, "constant", "identity", 3.0)
    save_router(path, router)
    # as the node is when it is put down
    usual = {"k_max": 0.875, "skipped_blocks_give": "reuse"}
    model, text = at_node(base, "trained", router_file=path.name, **usual)
    plan = attachment_of(model).plan.blocks
    assert (plan.budget, plan.skipped) == (BlockBudget(0.4, 0.6, "constant"), "identity")
    assert text.endswith(router.conditions.describe())
    model, text = at_node(
        base, "trained", router_file=path.name, **usual | {"k_max": 0.7, "curve": "rising"}
    )
    plan = attachment_of(model).plan.blocks
    assert (plan.budget, plan.skipped) == (BlockBudget(0.4, 0.7, "rising"), "identity")
    assert text.splitlines()[-2:] == [
        "k_max: 0.7 is set here; the router was trained with 0.6",
        "curve: rising is set here; the router was trained with constant",
    ]
    # a student's router on its teacher, whose weights it shares
    router.model = replace(router.model, width="another cut")
    save_router(path, router)
    with pytest.raises(ValueError, match="expected the full model, got a slim one"):
        at_node(base, "trained", router_file=path.name)


def test_a_router_of_clip_takes_the_class_embedding_of_the_image():
    model, given = tiny.base_model("i2v_clip"), tiny.case("i2v_clip")
    router = trained_router(model, "clip", 1280)
    seen = []
    run = router.run(tiny.LAYERS)

    class Spy(TrainedRouter):
        def run(self, num_blocks):
            return self

        watches = False

        def logits(self, sigma, content):
            seen.append(content.clip)
            return run.logits(sigma, content)

        def unread(self):
            return run.unread()

        def read(self, values):
            run.read(values)

    spy = Spy(router.mlp, router.kind, router.model)
    tiny.ksampler(attach(model, TrimPlan(blocks=BlockPlan(spy, HALF))), given)
    clip = tiny.clip_vision().penultimate_hidden_states[:, 0]
    assert len(seen) == 4 and all(torch.equal(one, clip) for one in seen)


def test_a_router_file_that_was_written_again_is_read_again(router_folder):
    base, path = tiny.base_model(), router_folder / "mine.safetensors"
    save_router(path, trained_router(base))
    choice = {"router": "trained", "router_file": path.name}
    first = at_node(base, "trained", router_file=path.name)[0]
    before = WanTrimBlocks.fingerprint_inputs(router=choice, **DEFAULTS)
    other = trained_router(base)
    other.mlp.layers[0].weight *= 2
    save_router(path, other)
    os.utime(path, ns=(1, 10**18))
    assert WanTrimBlocks.fingerprint_inputs(router=choice, **DEFAULTS) != before
    second = at_node(base, "trained", router_file=path.name)[0]
    one, two = (attachment_of(m).plan.blocks.router.mlp.layers[0].weight for m in (first, second))
    assert torch.equal(2 * one, two)
    assert WanTrimBlocks.fingerprint_inputs(router={"router": "profiled"}, **DEFAULTS) == ""
    assert WanTrimBlocks.fingerprint_inputs(router=None, **DEFAULTS) == ""


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


def _other_profile():
    return ProfileFile(profile_for(tiny.base_model("i2v")))


@pytest.mark.parametrize(
    ("router", "inputs", "parts"),
    [
        ("profiled", {"k_min": 0.9, "k_max": 0.5}, ["k_min", "k_max", "0.9", "0.5"]),
        ("profiled", {"k_min": 0.0}, ["k_min", "0.0"]),
        ("profiled", {"k_min": float("nan")}, ["k_min", "nan"]),
        ("profiled", {"k_max": 1.5}, ["k_max", "1.5"]),
        ("profiled", {"curve": "wavy"}, ["curve", "falling, constant, rising", "wavy"]),
        ("profiled", {"skipped_blocks_give": "gifts"}, ["skipped_blocks_give", "reuse", "gifts"]),
        ("profiled", {"start_percent": 0.7, "end_percent": 0.3}, ["start_percent", "0.7", "0.3"]),
        ("profiled", {"memory": 0}, ["memory", "at least 1", "0"]),
        ("profiled", {"repeat_at_most": -1}, ["repeat_at_most", "-1"]),
        ("profiled", {"scheduler": "lunar"}, ["scheduler", "lunar"]),
        ("profiled", {"steps": 0}, ["steps", "at least 1"]),
        ("profiled", {"profile": _other_profile}, ["profile", "another model", "Load the profile"]),
        ("fixed", {"blocks": "7"}, ["blocks", "1 to 4", "0 to 5"]),
        (
            "trained",
            {"router_file": "gone.safetensors"},
            ["router_file", "gone", "wantrim/routers"],
        ),
        ("magic", {}, ["router", "profiled, online, fixed, trained", "magic"]),
    ],
)
def test_inputs_that_cannot_be_are_refused_by_name(router, inputs, parts, router_folder):
    made = {k: v() if callable(v) else v for k, v in inputs.items()}
    with pytest.raises(ValueError) as error:
        at_node(tiny.base_model(), router, **made)
    says(error, "WanTrim Blocks: ", *parts)
    assert str(error.value).count("WanTrim Blocks") == 1


@pytest.mark.parametrize("router", ["profiled", "online"])
def test_a_missing_profile_is_asked_for(router):
    for choice in (router, {"router": router}):
        with pytest.raises(ValueError) as error:
            WanTrimBlocks.execute(model=tiny.base_model(), router=choice, **DEFAULTS)
        says(error, "WanTrim Blocks", f"'{router}' needs a profile", "WanTrim Load Profile")


@pytest.mark.parametrize("router", ["fixed", "trained"])
def test_a_linked_choice_without_its_input_says_what_to_do(router):
    with pytest.raises(ValueError) as error:
        WanTrimBlocks.execute(model=tiny.base_model(), router=router, **DEFAULTS)
    says(error, f"'{router}' needs the input", "cannot be linked")
    with pytest.raises(ValueError) as error:
        WanTrimBlocks.execute(model=tiny.base_model(), router=None, **DEFAULTS)
    says(error, "got none of them")


def test_a_router_of_another_model_or_another_kind_is_refused(router_folder):
    base = tiny.base_model()
    save_router(router_folder / "i2v.safetensors", trained_router(tiny.base_model("i2v")))
    save_router(router_folder / "clip.safetensors", trained_router(base, "clip", 1280))
    (router_folder / "bad.safetensors").write_bytes(b"nothing")
    for name, parts in {
        "i2v": ["trained for another model", "36 input channels"],
        "clip": ["CLIP", "takes none"],
        "bad": ["bad.safetensors", "cannot be read"],
    }.items():
        with pytest.raises(ValueError) as error:
            at_node(base, "trained", router_file=f"{name}.safetensors")
        says(error, "WanTrim Blocks", *parts)


def test_the_nodes_inputs_are_the_plans_fields():
    schema = WanTrimBlocks.define_schema()
    inputs = {given.id: given for given in schema.inputs}
    assert tuple(option.key for option in inputs["router"].options) == ROUTERS
    plan = BlockPlan(ProfiledRouter(profile_for(tiny.base_model())))
    assert inputs["memory"].default == plan.memory
    assert inputs["repeat_at_most"].default == plan.max_age
    assert (inputs["k_min"].default, inputs["k_max"].default) == (0.5, 0.875)
    assert OnlineRouter.name == "online"
