"""Recording in ComfyUI: changes nothing, sees what the blocks compute, and leaves nothing behind."""

import copy
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import comfy.sd
import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import CurrentNodeContext
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import attach, attachment_of
from wantrim.hosts.comfyui.profiling import (
    KEY,
    NOT_WHOLE,
    RUN_KEY,
    attach_profile,
    check_profile,
    detach_profile,
    profile_of,
)
from wantrim.kernels import frame_mass
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import FRAME, OFF, HeadPlan
from wantrim.nodes import demo
from wantrim.nodes.profile import (
    DEMO,
    DEMO_FILE,
    FOLDER,
    WanTrimLoadProfile,
    WanTrimProfile,
    WanTrimSaveProfile,
    saved_profiles,
)
from wantrim.profiles.calibration import load_calibration
from wantrim.profiles.profile import Profile, load_profile
from wantrim.profiles.recorder import ProfileFile, calibration_path
from wantrim.tests.comfyui import neighbours, put, tiny
from wantrim.toy.held_out import held_out_scenes

STEPS = 2
IMAGES = torch.zeros(1, 8, 8, 3)


def profiled(model=None, calibrate="none"):
    return WanTrimProfile.execute(model or tiny.base_model(), calibrate).result[0]


def recorder_of(model):
    return profile_of(model).recorder


def recorded(model=None, given=None, **options) -> Profile:
    patched = profiled(model)
    tiny.sample(patched, given, **({"steps": STEPS} | options))
    return recorder_of(patched).profile()


def same(a: Profile, b: Profile, rtol=1e-3, atol=1e-5) -> None:
    assert a.model.differs(b.model) is None
    for name, value in a.tensors.items():
        torch.testing.assert_close(value, b.tensors[name], rtol=rtol, atol=atol)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The artist's profile folder."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(tmp_path)], set()))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.mark.parametrize("calibrate", ["none", "all"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_recording_changes_nothing(kind, batch, calibrate):
    model, given = tiny.base_model(kind), tiny.case(kind, batch=batch)
    patched = profiled(model, calibrate)
    expected = tiny.sample(model, given, steps=STEPS)
    assert torch.equal(tiny.sample(patched, given, steps=STEPS), expected)
    recorder = recorder_of(patched)
    assert not recorder.notes
    profile = recorder.profile()
    assert profile.calls == STEPS * batch
    assert profile.runs[0]["grid"][0] == tiny.FRAMES
    for name, value in profile.tensors.items():
        assert value.any() == (name != "k_img_share" or kind == "i2v_clip"), name
    assert len(recorder.calibration.sums) == (3 * tiny.LAYERS if calibrate == "all" else 0)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_figures_are_those_of_the_modules(kind):
    """One step of two videos, against what plain module hooks see of the conditional rows."""
    model, given, batch = tiny.base_model(kind), tiny.case(kind, batch=2), 2
    network, seen, handles = model.model.diffusion_model, {}, []

    def watch(name, index, module):
        def note(module, args):
            # the host puts the positive prompt last
            seen[name, index] = args[0][-batch:].double()

        handles.append(module.register_forward_pre_hook(note))

    for index, block in enumerate(network.blocks):
        watch("self_mean", index, block.self_attn.o)
        watch("cross_mean", index, block.cross_attn.o)
        watch("q_share", index, block.self_attn.norm_q)
        watch("k_share", index, block.self_attn.norm_k)
        watch("cross_q_share", index, block.cross_attn.norm_q)
        watch("cross_k_share", index, block.cross_attn.norm_k)
        if kind == "i2v_clip":
            watch("k_img_share", index, block.cross_attn.norm_k_img)
        watch("channel_energy", index, block.ffn[2])
    tiny.sample(model, given, steps=1)
    for handle in handles:
        handle.remove()
    profile = recorded(given=given, model=model, steps=1)
    grid = math.prod(profile.runs[0]["grid"])
    for (name, index), x in seen.items():
        if name not in ("cross_k_share", "k_img_share"):
            # reference tokens in front of the grid are no part of it
            x = x[:, x.shape[1] - grid :]
        heads = None if name == "channel_energy" else x.unflatten(-1, (tiny.HEADS, -1))
        if name.endswith("mean"):
            want = heads.mean(1).sum(0)
        elif name.endswith("share"):
            energy = heads.square().sum(-1)
            energy = energy / energy.sum(-1, keepdim=True)
            want = (energy.mT @ energy).sum(0) / x.shape[1]
        else:
            want = x.square().mean(1).sum(0)
        got = profile.tensors[name][index].double()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    for index in range(tiny.LAYERS):
        # sigma is 1: w(t) is log 2
        heads = seen["self_mean", index][:, -grid:].unflatten(-1, (tiny.HEADS, -1))
        want = math.log(2) * heads.square().mean((1, 3)).sqrt().sum(0)
        got = profile.tensors["self_output"][-1, index].double()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["t2v", "fun"])
def test_the_ratio_is_that_of_the_attentions_own_queries_and_keys(kind):
    model, given = tiny.base_model(kind), tiny.case(kind)
    profile = recorded(model, given, steps=1)
    grid = TokenGrid(*profile.runs[0]["grid"])
    pairs = []

    def note(func, q, k, v, *args, **kwargs):
        if q.shape[1] == k.shape[1]:
            pairs.append([t[-1:].unflatten(-1, (tiny.HEADS, -1)) for t in (q, k)])
        return func(q, k, v, *args, **kwargs)

    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = note
    tiny.sample(patched, given, steps=1)
    assert len(pairs) == tiny.LAYERS
    start = pairs[0][0].shape[1] - grid.tokens
    assert start == (tiny.PER_FRAME if kind == "fun" else 0)
    # 60 tokens: all of them are queries
    size = (grid.frames, grid.height, grid.width)
    for index, (q, k) in enumerate(pairs):
        ratio = frame_mass(q, k, size, torch.arange(grid.tokens), start=start)
        torch.testing.assert_close(profile.ratio()[index], ratio[0], rtol=1e-3, atol=1e-5)


def test_options_that_another_node_replaced_record_nothing(caplog):
    model = attach_profile(tiny.base_model())
    model.model_options["transformer_options"] = {}
    assert torch.equal(tiny.ksampler(model), tiny.ksampler(tiny.base_model()))
    assert "in the place of ours: nothing is recorded" in caplog.text


def test_prompts_in_two_calls_give_the_same_profile(monkeypatch):
    given = tiny.case(batch=2)
    together = recorded(given=given)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    same(recorded(given=given), together)


def test_prompts_of_other_lengths_give_a_profile():
    """The host then runs them in two calls, the negative one first."""
    profile = recorded(given=tiny.case(tokens=(7, 9)))
    assert profile.calls == STEPS
    alone = recorded(given=tiny.case(tokens=(7, 7)), steps=1)
    torch.testing.assert_close(profile.tensors["ratio"][-1], alone.tensors["ratio"][-1])


def test_no_guidance_and_samplers_with_two_calls_a_step():
    assert recorded(cfg=1.0).calls == STEPS
    assert recorded(sampler="heun").calls == 2 * STEPS - 1


def test_weights_are_measured_with_the_lora_on_them():
    model = tiny.base_model().clone()
    name = "blocks.1.self_attn.o.weight"
    weight = dict(model.model.diffusion_model.named_parameters())[name]
    added = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    model.add_patches({f"diffusion_model.{name}": ("diff", (added,))}, 0.5)
    plain, patched = recorded().tensors, recorded(model).tensors
    want = (weight + 0.5 * added).unflatten(1, (tiny.HEADS, -1)).norm(dim=(0, 2))
    torch.testing.assert_close(patched["self_o_norm"][1], want, rtol=1e-4, atol=1e-5)
    assert torch.equal(patched["self_o_norm"][0], plain["self_o_norm"][0])
    block = tiny.base_model().model.diffusion_model.blocks[2]
    down = block.ffn[2].weight.norm(dim=0)
    torch.testing.assert_close(plain["down_norm"][2], down, rtol=1e-4, atol=1e-5)
    score = block.ffn[0].weight.norm(dim=1) * down
    torch.testing.assert_close(plain["channel_norm"][2], score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_other_formats_are_the_same_model(dtype):
    weights, metadata = tiny.state_dict("t2v")
    low = comfy.sd.load_diffusion_model_state_dict(
        weights, metadata=metadata, model_options={"dtype": dtype}
    )
    full, got = recorded(), recorded(low)
    assert full.model.differs(got.model) is None
    for name in ("self_o_norm", "channel_norm"):
        error = (got.tensors[name] - full.tensors[name]).norm() / full.tensors[name].norm()
        assert error < 0.04, name
    assert (got.ratio() - full.ratio()).abs().max() < 0.1


def test_another_model_is_told_apart():
    weights, metadata = tiny.state_dict("t2v")
    weights = {name: value.flip(-1) for name, value in weights.items()}
    other = comfy.sd.load_diffusion_model_state_dict(weights, metadata=metadata)
    profile = recorded()
    check_profile(tiny.base_model(), profile, "Some Node")
    with pytest.raises(ValueError, match="Some Node: profile: .* weights are not"):
        check_profile(other, profile, "Some Node")
    with pytest.raises(ValueError, match="expected 6 blocks"):
        check_profile(tiny.base_model("ti2v"), profile, "Some Node")


TRIMS = {
    "paper": tiny.at_node,
    "shares": lambda m: tiny.shared(m, 1.0, 1.0, 0.5, 0.0),
    "dial": lambda m: put.dialled(m, speedup=1.25),
}


@pytest.mark.parametrize("order", ["in front", "behind"])
@pytest.mark.parametrize("trim", TRIMS.values(), ids=TRIMS)
def test_a_token_plan_on_the_model_runs_as_without(order, trim):
    model = tiny.base_model()
    alone = trim(model)
    expected = tiny.sample(alone, steps=4)
    patched = trim(profiled(model)) if order == "in front" else profiled(trim(model))
    assert torch.equal(tiny.sample(patched, steps=4), expected)
    recorder = recorder_of(patched)
    # the paper's plan computes everything in no step; a repeated step is no call
    assert recorder.calls == tiny.shares(alone).count(1.0)
    # where nothing was recorded there is nothing to say of it
    assert "tokens were left out" in recorder.notes[0]
    assert recorder.notes[1:] == [NOT_WHOLE] * (recorder.calls > 0)
    assert recorder.about["plan"] == attachment_of(alone).describe()
    if trim is not tiny.at_node:
        assert recorder.calls > 1
        (sigmas,) = (run["sigmas"] for run in recorder.profile().runs)
        assert sigmas[:2] == pytest.approx(tiny.simple_sigmas(model, 4)[:2], abs=1e-4)


@pytest.mark.parametrize("order", ["in front", "behind"])
def test_a_head_plan_on_the_model_is_recorded_as_it_runs(order):
    model = tiny.base_model()
    heads = [["full"] * tiny.HEADS for _ in range(tiny.LAYERS)]
    heads[2][3], heads[2][4] = OFF, FRAME
    whole = (("full",) * tiny.HEADS,) * tiny.LAYERS
    plan = TrimPlan(heads=HeadPlan(tuple(map(tuple, heads)), whole))
    expected = tiny.sample(attach(model, plan), steps=STEPS)
    assert not torch.equal(expected, tiny.sample(model, steps=STEPS))
    front = order == "in front"
    patched = attach(profiled(model), plan) if front else profiled(attach(model, plan))
    assert torch.equal(tiny.sample(patched, steps=STEPS), expected)
    recorder = recorder_of(patched)
    assert recorder.notes == [NOT_WHOLE] and recorder.calls == STEPS
    importance = recorder.profile().importance()
    assert importance[2, 3] == 0 and (importance[2, 4:] > 0).all()


def test_blocks_that_another_node_skips_are_not_guessed():
    model = tiny.base_model()

    def guided(m):
        return SkipLayerGuidanceDiT.execute(m, 3.0, 0.0, 1.0, double_layers="2").result[0]

    patched = guided(profiled(model))
    assert torch.equal(tiny.sample(patched), tiny.sample(guided(model)))
    recorder = recorder_of(patched)
    assert recorder.calls == 3
    assert "skipped blocks" in recorder.notes[0]


def test_context_windows_are_recorded():
    windows = ContextWindowsManualNode.execute(
        profiled(), 3, 1, "standard_static", 1, False, "pyramid", 2, False
    ).result[0]
    tiny.sample(windows, tiny.case(frames=5), steps=1)
    recorder = recorder_of(windows)
    assert recorder.calls > 1
    assert recorder.profile().runs[0]["grid"][0] == 3


@pytest.mark.parametrize("put", [neighbours.compiled, neighbours.compiled_blocks])
def test_a_model_that_was_compiled_before_is_recorded(put):
    """It would repeat the run of before, in which nobody watched."""
    torch._dynamo.reset()
    base = put(tiny.base_model())
    tiny.sample(base, steps=1)
    same(recorded(base), recorded(tiny.base_model()))
    torch._dynamo.reset()


def test_an_exception_leaves_nothing_behind():
    model = tiny.base_model()
    patched = profiled(model)
    tiny.sample(patched, steps=1)
    assert recorder_of(patched).calls == 1
    options = copy.copy(patched.model_options["transformer_options"])
    handle = model.model.diffusion_model.blocks[3].register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.sample(patched, steps=1)
    handle.remove()
    assert recorder_of(patched) is None
    assert patched.model_options["transformer_options"].keys() == options.keys()
    assert RUN_KEY not in patched.model_options["transformer_options"]
    with pytest.raises(ValueError, match="nothing was recorded: the last run was cancelled"):
        WanTrimSaveProfile.execute(patched, IMAGES, "x", True)
    expected = tiny.sample(model, steps=1)
    assert torch.equal(tiny.sample(patched, steps=1), expected)
    assert recorder_of(patched).calls == 1


def test_a_run_without_numbers_is_not_saved_over_a_good_one(folder):
    model = profiled()
    tiny.sample(model, steps=1)
    WanTrimSaveProfile.execute(model, IMAGES, "mine", True)
    (before,) = (file.read_bytes() for file in folder.iterdir())
    noise = torch.full(tiny.case().latent.shape, torch.nan)
    tiny.sample(model, steps=2, noise=noise)
    for merge in (True, False):
        with pytest.raises(ValueError, match="^WanTrim Save Profile: what was recorded .* black"):
            WanTrimSaveProfile.execute(model, IMAGES, "mine", merge)
    assert [file.read_bytes() for file in folder.iterdir()] == [before]


def test_the_untouched_model_stays_untouched():
    model = tiny.base_model()
    patched = profiled(model)
    tiny.sample(patched, steps=1)
    for clean in (model, detach_profile(patched)):
        assert profile_of(clean) is None
        wrappers = clean.model_options["transformer_options"].get("wrappers", {})
        assert not any(kinds.get(KEY) for kinds in wrappers.values())
    assert not patched.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY)


def test_clones_share_what_was_recorded_and_a_new_run_starts_anew():
    patched = profiled()
    clone = ModelSamplingSD3().patch(patched, 3.0)[0]
    copied = copy.deepcopy(clone.model_options)
    assert copied["transformer_options"][KEY] is profile_of(patched)
    tiny.sample(clone, steps=3)
    assert recorder_of(patched).calls == 3
    assert recorder_of(patched).profile().runs[0]["shift"] == 3.0
    tiny.sample(clone, steps=1)
    assert recorder_of(patched).calls == 1
    twice = attach_profile(patched)
    assert profile_of(twice) is not profile_of(patched)
    tiny.sample(twice, steps=2)
    assert recorder_of(twice).calls == 2
    assert recorder_of(patched).calls == 1


def test_two_samplers_of_one_run_of_the_workflow_are_told():
    patched, told = profiled(), "another sampler used this model before"
    for prompt, several in (("first", False), ("first", True), ("second", False), (None, False)):
        with nullcontext() if prompt is None else CurrentNodeContext(prompt, "1", 0):
            tiny.sample(patched, steps=2)
        notes = recorder_of(patched).notes
        assert any(told in note for note in notes) is several, prompt


def test_profiles_lie_in_the_models_folder():
    wanted = Path(folder_paths.models_dir) / "wantrim" / "profiles"
    assert str(wanted) in folder_paths.get_folder_paths(FOLDER)


def test_saved_loaded_and_drawn(folder):
    patched = profiled(calibrate="attention")
    tiny.sample(patched, steps=STEPS)
    said = recorder_of(patched).profile()
    saved = WanTrimSaveProfile.execute(patched, IMAGES, " my wan.safetensors ", True)
    opened, picture, text = saved.result
    assert isinstance(opened, ProfileFile)
    path = folder / "my wan.safetensors"
    assert opened.calibration == calibration_path(path)
    assert load_calibration(opened.calibration).gram("self", 0).shape == (tiny.DIM, tiny.DIM)
    assert picture.ndim == 4 and picture.shape[-1] == 3 and picture.std() > 0.01
    assert "2 model calls" in text and "Saved as my wan.safetensors" in text
    assert saved.ui["text"] == (text,)
    same(load_profile(path), said, rtol=0, atol=0)
    assert saved_profiles() == ["my wan.safetensors"]
    schema = WanTrimLoadProfile.define_schema()
    assert schema.inputs[0].options == [DEMO, "my wan.safetensors"]
    again, drawn, words = WanTrimLoadProfile.execute("my wan.safetensors").result
    same(again.profile, said, rtol=0, atol=0)
    assert again.calibration == opened.calibration
    assert torch.equal(drawn, picture)
    assert "Loaded from" in words and opened.calibration.name in words


def test_the_same_run_is_saved_once_and_the_next_is_added(folder):
    patched = profiled()
    for calls in (2, 4):
        tiny.sample(patched, steps=2, seed=calls)
        before = WanTrimLoadProfile.fingerprint_inputs("a.safetensors")
        for _ in range(2):
            opened = WanTrimSaveProfile.execute(patched, IMAGES, "a", True).result[0]
            assert opened.profile.calls == calls
        assert WanTrimLoadProfile.fingerprint_inputs("a.safetensors") != before
    opened = WanTrimSaveProfile.execute(patched, IMAGES, "a", False).result[0]
    assert opened.profile.calls == 2


def test_a_file_of_another_model_is_refused_and_kept(folder):
    patched = profiled()
    tiny.sample(patched, steps=1)
    WanTrimSaveProfile.execute(patched, IMAGES, "a", True)
    content = (folder / "a.safetensors").read_bytes()
    other = profiled(tiny.base_model("i2v"))
    tiny.sample(other, tiny.case("i2v"), steps=1)
    with pytest.raises(ValueError, match="cannot be added to a.safetensors.*turn merge off"):
        WanTrimSaveProfile.execute(other, IMAGES, "a", True)
    assert (folder / "a.safetensors").read_bytes() == content
    opened = WanTrimSaveProfile.execute(other, IMAGES, "a", False).result[0]
    assert opened.profile.model.in_channels == 36


BAD = ["", "  ", ".", "..", "../x", "a/b", "a\\b", "/tmp/x", "C:x", ".hidden", "a\0b", "a\nb",
       "con", "NUL.x", "x" * 101, "a.calibration", ".safetensors", "x.", "a*b", "../../x.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_filenames_are_refused(folder, name):
    patched = profiled()
    tiny.sample(patched, steps=1)
    with pytest.raises(ValueError, match="WanTrim Save Profile: filename: expected a plain name"):
        WanTrimSaveProfile.execute(patched, IMAGES, name, True)
    assert not list(folder.iterdir())


def test_what_cannot_be_saved_says_why(folder):
    with pytest.raises(ValueError, match="has no WanTrim Profile on it"):
        WanTrimSaveProfile.execute(tiny.base_model(), IMAGES, "a", True)
    with pytest.raises(ValueError, match="the model was not sampled yet"):
        WanTrimSaveProfile.execute(profiled(), IMAGES, "a", True)
    with pytest.raises(ValueError, match="calibrate: expected one of none, attention, all"):
        WanTrimProfile.execute(tiny.base_model(), "some")
    trimmed = profiled(tiny.at_node(tiny.base_model()))
    tiny.sample(trimmed, steps=1)
    with pytest.raises(ValueError, match="tokens were left out"):
        WanTrimSaveProfile.execute(trimmed, IMAGES, "a", True)
    patched = profiled()
    tiny.sample(patched, steps=1)
    (folder / "a.safetensors").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        WanTrimSaveProfile.execute(patched, IMAGES, "a", False)


def test_what_cannot_be_loaded_says_why(folder):
    (folder / "bad.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="WanTrim Load Profile: bad.safetensors: expected"):
        WanTrimLoadProfile.execute("bad.safetensors")
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(DEMO_FILE.read_bytes())
    for name in ("none.safetensors", "../outside.safetensors", str(outside), "a\0b", ""):
        with pytest.raises(ValueError, match="there is no profile"):
            WanTrimLoadProfile.execute(name)
        assert WanTrimLoadProfile.fingerprint_inputs(name) == ""


def test_the_tiny_wans_profile_comes_with_the_pack():
    opened, picture, text = WanTrimLoadProfile.execute(DEMO).result
    model = demo.WanTrimDemoModel.execute().result[0]
    check_profile(model, opened.profile, "Some Node")
    assert opened.calibration is None
    assert "tiny_wan_profile" in text and picture.std() > 0.05


def test_what_comfyui_records_is_what_diffusers_records(root):
    """The same prompts, noise and sigmas of the tiny Wan in both; the file is diffusers'."""
    theirs = load_profile(root / "tests" / "data" / "tiny_wan_short_profile.safetensors")
    model = demo.WanTrimDemoModel.execute().result[0]
    words = [
        demo.WanTrimDemoPrompt.execute(scene.prompt()).result[0][0][0]
        for scene in held_out_scenes(100)[-2:]
    ]
    negative = demo.WanTrimDemoPrompt.execute("").result[0]
    patched = profiled(ModelSamplingSD3().patch(model, 3.0)[0])
    profile = None
    noise = torch.randn(2, 16, 5, 12, 12, generator=torch.Generator().manual_seed(4))
    # the host gives one prompt to all videos of a batch
    for prompt, own in zip(words, noise, strict=True):
        given = tiny.Case([[prompt, {}]], negative, tiny.empty_latent(5, 12, 12))
        sigmas = torch.tensor(theirs.runs[0]["sigmas"] + [0.0])
        tiny.sample(patched, given, cfg=8.0, noise=own[None], sigmas=sigmas)
        found = recorder_of(patched).profile()
        profile = found if profile is None else profile.merged(found)
    assert profile.calls == theirs.calls == 6
    for name, value in theirs.tensors.items():
        error = float((profile.tensors[name] - value).norm())
        assert error <= 1e-3 * float(value.norm()), name
