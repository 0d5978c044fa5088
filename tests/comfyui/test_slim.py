"""Slim checkpoints in a real ComfyUI: loaded, sampled, and with LoRAs made for the full model."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import comfy.hooks
import comfy.ldm.wan.model
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import nodes as comfy_nodes
from comfy_extras.nodes_lora_debug import LoraLoaderBypassModelOnly
from wantrim.hosts.comfyui.candidates import ALONE, make_trial
from wantrim.hosts.comfyui.profiling import check_profile
from wantrim.hosts.comfyui.slim import load_slim, operations, slim_header
from wantrim.methods.cost import Width
from wantrim.nodes.profile import DEMO
from wantrim.nodes.slim import FOLDER, WanTrimLoadSlim, WanTrimSlim
from wantrim.profiles.profile import Profile
from wantrim.profiles.recorder import ProfileFile
from wantrim.slim.cut import find_cut
from wantrim.slim.export import export_slim
from wantrim.slim.file import PREFIX, read_header
from wantrim.slim.source import open_source
from wantrim.tests.comfyui import tiny
from wantrim.tests.whole_width import whole_width
from wantrim.toy import CHECKPOINT

D = tiny.DIM // tiny.HEADS
CHANNELS = 128


def width(seed: int = 0) -> Width:
    """A width that differs from block to block; the second block keeps all."""
    random = torch.Generator().manual_seed(seed)

    def some(most: int) -> tuple[tuple[int, ...], ...]:
        blocks = []
        for block in range(tiny.LAYERS):
            count = (
                most if block == 1 else int(torch.randint(most // 4, most, (), generator=random))
            )
            order = torch.randperm(most, generator=random)[:count]
            blocks.append(tuple(sorted(order.tolist())))
        return tuple(blocks)

    return Width(some(tiny.HEADS), some(tiny.HEADS), some(CHANNELS))


def full_file(folder, kind="t2v", change=None, name="full.safetensors"):
    weights, metadata = tiny.state_dict(kind)
    if change is not None:
        change(weights)
    save_file(weights, folder / name, metadata)
    return folder / name


def measured(model) -> Profile:
    """A profile with random energy shares of the heads."""
    profile = Profile.empty(model)
    random = torch.Generator().manual_seed(5)
    for name, value in profile.tensors.items():
        if name.endswith("share"):
            share = torch.rand(200, *value.shape[:-1], generator=random) + 0.05
            share /= share.sum(-1, keepdim=True)
            value.copy_(torch.einsum("slh,slk->lhk", share, share))
        else:
            value.copy_(torch.rand(value.shape, generator=random))
    return profile


def slim_file(folder, kept=None, kind="t2v", change=None, corrected=True, name="slim.safetensors"):
    source = open_source(full_file(folder, kind, change))
    profile = measured(source.model) if corrected else None
    export_slim(source, folder / name, kept or width(), profile=profile)
    return str(folder / name)


def output(model, kind="t2v", **options) -> torch.Tensor:
    return tiny.sample(model, tiny.case(kind), steps=2, **options)


@pytest.mark.parametrize("kind", ["t2v", "i2v", "i2v_clip", "ti2v", "camera", "fun"])
def test_with_everything_kept_it_is_the_stock_model(tmp_path, kind):
    source = open_source(full_file(tmp_path, kind))
    export_slim(source, tmp_path / "slim.safetensors", whole_width(source.model))
    slim = load_slim(str(tmp_path / "slim.safetensors"))
    stock = comfy.sd.load_diffusion_model(str(tmp_path / "full.safetensors"))
    assert type(slim.model) is type(stock.model)
    assert type(slim.model.diffusion_model) is type(stock.model.diffusion_model)
    given = tiny.case(kind)
    assert torch.equal(tiny.sample(slim, given), tiny.sample(stock, given))
    assert slim.model_size() == stock.model_size()
    assert slim.memory_required([2, 16, 3, 8, 10]) == stock.memory_required([2, 16, 3, 8, 10])


@pytest.mark.parametrize("kind", ["t2v", "i2v_clip", "ti2v"])
def test_a_slim_model_is_a_full_one_with_the_rest_switched_off(tmp_path, kind):
    """Without norms over all heads (their weights at zero the softmax is flat), a slice is a mask."""

    def flat(weights):
        for name in weights:
            if ".norm_k" in name:
                weights[name] = torch.zeros_like(weights[name])

    kept = width(3)
    slim = load_slim(slim_file(tmp_path, kept, kind, flat, corrected=False))

    def masked(weights):
        flat(weights)
        for name, value in weights.items():
            cut = find_cut(name)
            if cut is not None and cut.axis == 1:
                mask = torch.zeros(value.shape[1])
                mask[cut.index(kept, D)] = 1
                value.mul_(mask)

    full = comfy.sd.load_diffusion_model(str(full_file(tmp_path, kind, masked, "m.safetensors")))
    torch.testing.assert_close(output(slim, kind), output(full, kind), atol=2e-4, rtol=1e-3)
    sizes = [block.self_attn.num_heads for block in slim.model.diffusion_model.blocks]
    assert sizes == [len(heads) for heads in kept.self_heads] and len(set(sizes)) > 2
    assert slim.model_size() < 0.9 * full.model_size()


def test_output_equals_diffusers(root, tmp_path):
    """The reference is of tests/make_slim_reference.py."""
    data, out = root / "tests" / "data", tmp_path / "slim.safetensors"
    with safe_open(data / "slim_reference.safetensors", "pt") as file:
        said, wanted = json.loads(file.metadata()["width"]), file.get_tensor("output")
    kept = Width(**{name: tuple(map(tuple, blocks)) for name, blocks in said.items()})
    export_slim(open_source(CHECKPOINT), out, kept)
    given = load_file(data / "tiny_wan_reference.safetensors")
    made = load_slim(str(out)).model.diffusion_model(given["x"], given["timestep"], given["text"])
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-4)
    assert float((wanted - given["output"]).norm() / wanted.norm()) > 0.1


def test_a_slim_model_is_that_of_the_header(tmp_path):
    path = slim_file(tmp_path)
    model = load_slim(path)
    header = slim_header(model)
    assert header == read_header(tmp_path / "slim.safetensors")
    assert slim_header(model.clone()) is header
    assert set(header.norm_scale) == {
        "self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k",
    }  # fmt: skip
    # a copy for another GPU, or for torch.compile
    again = model.cached_patcher_init[0](*model.cached_patcher_init[1], disable_dynamic=True)
    assert torch.equal(output(again), output(model))
    assert slim_header(tiny.base_model()) is None


def test_a_slim_models_trial_is_not_its_full_models(tmp_path):
    """Their sizes and their modulation are the same."""
    full, slim = tiny.base_model(), load_slim(slim_file(tmp_path))
    trial, other = (make_trial({ALONE: m}, 1.5, 8, 0, "few") for m in (slim, full))
    assert "cut" in trial.fingerprints[ALONE].differs(other.fingerprints[ALONE])
    kept = Profile.empty(trial.fingerprints[ALONE])
    with pytest.raises(ValueError, match="expected the full model, got a slim one"):
        check_profile(full, kept, "WanTrim")
    check_profile(slim, kept, "WanTrim")


@pytest.mark.parametrize("batch", [1, 2])
def test_sampled_twice_is_the_same(tmp_path, batch):
    model, given = load_slim(slim_file(tmp_path)), tiny.case(batch=batch)
    first = tiny.sample(model, given, steps=2)
    assert torch.isfinite(first).all()
    assert torch.equal(first, tiny.sample(model, given, steps=2))


def test_weights_handed_over_without_a_copy(tmp_path):
    """As DynamicVRAM loads them."""
    path = slim_file(tmp_path)
    model = load_slim(path)
    header, loaded = slim_header(model), comfy.utils.load_torch_file(path)
    kept = set(header.kept())
    weights = {k.removeprefix(PREFIX): v for k, v in loaded.items() if k not in kept}
    other = comfy.ldm.wan.model.WanModel(
        **{"model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": tiny.DIM, "freq_dim": 256},
        **{"ffn_dim": 128, "num_layers": tiny.LAYERS, "num_heads": 8, "text_dim": tiny.TEXT_DIM},
        operations=operations(header),
        dtype=torch.float32,
    )
    missing, unexpected = other.load_state_dict(weights, strict=False, assign=True)
    assert not missing and not unexpected
    mine = model.model.diffusion_model.state_dict()
    for name, value in other.state_dict().items():
        assert value.device.type == "cpu" and torch.equal(value, mine[name]), name
    q = "blocks.0.self_attn.q.weight"
    assert other.state_dict()[q].data_ptr() == weights[q].data_ptr()


def test_fp8_weights(tmp_path):
    path = slim_file(tmp_path)
    half = load_slim(path, "fp8_e4m3fn")
    assert half.model.diffusion_model.blocks[0].ffn[0].weight.dtype == torch.float8_e4m3fn
    assert half.model_size() < 0.3 * load_slim(path).model_size()
    out, wanted = output(half), output(load_slim(path))
    assert float((out - wanted).norm() / wanted.norm()) < 0.3


def test_the_stock_loader_refuses_a_slim_file(tmp_path, monkeypatch):
    slim_file(tmp_path, name="my_slim.safetensors")
    models = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", models)
    with pytest.raises(RuntimeError, match="my_slim.safetensors"):
        comfy_nodes.UNETLoader().load_unet("my_slim.safetensors", "default")


# loras


def lora(seed=1, rank=4, alpha=2.0, scale=0.5) -> dict[str, torch.Tensor]:
    """A LoRA of the full model in LightX2V's words: every linear of the blocks, biases and norms."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, value in tiny.state_dict("t2v")[0].items():
        if not name.startswith("blocks."):
            continue
        stem, _, leaf = name.rpartition(".")
        key = f"diffusion_model.{stem}"
        if leaf == "weight" and value.ndim == 2:
            rows, columns = value.shape
            made[f"{key}.lora_up.weight"] = torch.randn(rows, rank, generator=random) * scale
            down = torch.randn(rank, columns, generator=random)
            made[f"{key}.lora_down.weight"] = down * columns**-0.5
            made[f"{key}.alpha"] = torch.tensor(alpha)
        elif leaf == "bias":
            made[f"{key}.diff_b"] = 0.1 * torch.randn(value.shape, generator=random)
        elif leaf == "weight":
            made[f"{key}.diff"] = 0.2 * torch.randn(value.shape, generator=random)
    return made


def merge(patch, strength):
    """Puts a LoRA into the full model's weights."""

    def change(weights):
        for name, value in weights.items():
            stem, _, leaf = name.rpartition(".")
            key = f"diffusion_model.{stem}"
            if leaf == "weight" and f"{key}.lora_up.weight" in patch:
                up, down = (patch[f"{key}.lora_{part}.weight"] for part in ("up", "down"))
                value += strength * patch[f"{key}.alpha"] / len(down) * (up @ down)
            elif leaf == "weight" and f"{key}.diff" in patch:
                value += strength * patch[f"{key}.diff"]
            elif leaf == "bias" and f"{key}.diff_b" in patch:
                value += strength * patch[f"{key}.diff_b"]

    return change


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """with_lora(model, patch, strength): what the stock node makes of a MODEL."""
    folder = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", folder)
    count = iter(range(100))

    def with_lora(model, patch, strength=1.0, node=comfy_nodes.LoraLoaderModelOnly):
        name = f"lora{next(count)}.safetensors"
        save_file(patch, tmp_path / name)
        return node().load_lora_model_only(model, name, strength)[0]

    return with_lora


def merged(tmp_path, *changes) -> torch.Tensor:
    """What the full model with LoRAs in its weights becomes, sliced and corrected."""

    def change(weights):
        for one in changes:
            one(weights)

    folder = tmp_path / "merged"
    folder.mkdir(exist_ok=True)
    return output(load_slim(slim_file(folder, change=change)))


def test_a_lora_of_the_full_model_applies_fully(tmp_path, loras):
    base = load_slim(slim_file(tmp_path))
    plain, patch = output(base), lora()
    model = loras(base, patch, 0.8)
    wanted = merged(tmp_path, merge(patch, 0.8))
    torch.testing.assert_close(output(model), wanted, atol=2e-3, rtol=1e-3)
    assert float((wanted - plain).norm() / plain.norm()) > 0.1
    # the same again, and the MODEL before the LoRA as if nothing had been
    torch.testing.assert_close(output(model), wanted, atol=2e-3, rtol=1e-3)
    assert torch.equal(output(base), plain)
    # a clone of what was sampled already
    torch.testing.assert_close(output(model.clone()), wanted, atol=2e-3, rtol=1e-3)


def test_every_part_of_the_lora_counts(tmp_path, loras):
    base = load_slim(slim_file(tmp_path))
    plain = output(base)
    for parts in (("lora_up", "lora_down", "alpha"), ("diff_b",), ("diff",)):
        patch = {k: v for k, v in lora().items() if any(f".{p}" in k for p in parts)}
        if parts == ("diff",):
            patch = {k: v for k, v in patch.items() if "norm_" in k and k.endswith(".diff")}
        wanted = merged(tmp_path, merge(patch, 1.0))
        assert float((wanted - plain).norm() / plain.norm()) > 0.02
        torch.testing.assert_close(output(loras(base, patch)), wanted, atol=2e-3, rtol=1e-3)


def test_two_loras_one_after_the_other(tmp_path, loras):
    model = loras(load_slim(slim_file(tmp_path)), lora(1), 0.7)
    first = output(model)
    both = loras(model, lora(2), -0.4)
    wanted = merged(tmp_path, merge(lora(1), 0.7), merge(lora(2), -0.4))
    torch.testing.assert_close(output(both), wanted, atol=2e-3, rtol=1e-3)
    assert torch.equal(output(model), first)


def test_a_model_that_was_loaded_before_is_loaded_again(tmp_path, loras):
    """Something else loaded it, with the LoRA as it was: that gave nothing but log lines."""
    patch = lora()
    model = loras(load_slim(slim_file(tmp_path)), patch)
    comfy.model_management.load_models_gpu([model])
    wanted = merged(tmp_path, merge(patch, 1.0))
    torch.testing.assert_close(output(model), wanted, atol=2e-3, rtol=1e-3)


def test_a_lora_on_weights_that_stay_in_system_memory(tmp_path, loras, monkeypatch):
    patch = lora()
    model = loras(load_slim(slim_file(tmp_path)), patch)
    wanted = merged(tmp_path, merge(patch, 1.0))
    whole = comfy.model_management.load_models_gpu

    def little(models, **options):
        whole(models, **options)
        for one in models:
            one.detach()
            one.load(one.load_device, lowvram_model_memory=1)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", little)
    out = output(model)
    assert model.lowvram_patch_counter() > 50
    torch.testing.assert_close(out, wanted, atol=2e-3, rtol=1e-3)


def test_a_lora_made_for_the_slim_model_is_left_alone(tmp_path, loras):
    base = load_slim(slim_file(tmp_path))
    kept, patch = slim_header(base).width, lora()
    for name, value in list(patch.items()):
        stem = name.removeprefix("diffusion_model.").partition(".lora_")[0]
        cut = find_cut(f"{stem}.weight")
        if ".lora_" not in name:
            patch.pop(name)
        elif cut.axis == 0 and "lora_up" in name:
            patch[name] = value[cut.index(kept, D)]
        elif cut.axis == 1 and "lora_down" in name:
            patch[name] = value[:, cut.index(kept, D)]
    whole = {k: v for k, v in lora().items() if ".lora_" in k}
    assert torch.equal(output(loras(base, patch)), output(loras(base, whole)))


def test_a_hook_lora_applies_too(tmp_path):
    patch, base = lora(), load_slim(slim_file(tmp_path))
    hooks = comfy.hooks.create_hook_lora(lora=patch, strength_model=1.0, strength_clip=1.0)
    given = tiny.case()
    for cond in (given.positive, given.negative):
        cond[0][1]["hooks"] = hooks
    plain = output(base)
    out = tiny.sample(base, given, steps=2)
    wanted = merged(tmp_path, merge(patch, 1.0))
    torch.testing.assert_close(out, wanted, atol=2e-3, rtol=1e-3)
    assert torch.equal(output(base), plain)


def changed(weights) -> dict[str, torch.Tensor]:
    """Full-size weights in the place of a projection, a norm and a bias that are cut."""
    random = torch.Generator().manual_seed(5)
    for leaf in ("self_attn.q.weight", "self_attn.norm_q.weight", "ffn.0.bias"):
        value = weights[f"blocks.0.{leaf}"]
        value += 0.3 * torch.randn(value.shape, generator=random)
    return weights


def test_weights_that_are_set_are_cut(tmp_path):
    base, full = load_slim(slim_file(tmp_path)), changed(tiny.state_dict("t2v")[0])
    patches = {
        f"diffusion_model.{name}": ("set", (value,))
        for name, value in full.items()
        if not torch.equal(value, tiny.state_dict("t2v")[0][name])
    }
    model = base.clone()
    assert len(model.add_patches(patches)) == 3
    wanted = merged(tmp_path, changed)
    torch.testing.assert_close(output(model), wanted, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(wanted, output(base), atol=0.01)


def test_another_model_as_a_lora_is_cut(tmp_path):
    base = load_slim(slim_file(tmp_path))
    full = {f"diffusion_model.{k}": v for k, v in changed(tiny.state_dict("t2v")[0]).items()}
    given = tiny.case()
    for cond in (given.positive, given.negative):
        cond[0][1]["hooks"] = comfy.hooks.create_hook_model_as_lora(full, None, 1.0, 1.0)
    out = tiny.sample(base, given, steps=2)
    torch.testing.assert_close(out, merged(tmp_path, changed), atol=2e-3, rtol=1e-3)


def lokr(key: str) -> dict[str, torch.Tensor]:
    return {f"{key}.lokr_w1": torch.ones(8, 8), f"{key}.lokr_w2": torch.ones(12, 12)}


def test_what_cannot_be_cut_is_refused_by_name(tmp_path, loras):
    base = load_slim(slim_file(tmp_path))
    key = "diffusion_model.blocks.0.self_attn.q"
    up, down = torch.ones(tiny.DIM, 2), torch.ones(2, tiny.DIM)
    plain = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    for patch, said in (
        (lokr(key), r"lokr"),
        ({**plain, f"{key}.dora_scale": torch.ones(tiny.DIM, 1)}, "DoRA"),
        ({**plain, f"{key}.lora_up.weight": torch.ones(40, 2)}, r"expected 96 of its axis 0, got"),
    ):
        with pytest.raises(ValueError, match=rf"blocks.0.self_attn.q.weight \({said}"):
            output(loras(base, patch))
    for patch, said in (
        (("diff", (up, {"pad_weight": True})), "a LoRA that changes sizes"),
        (("other", (up,)), "other"),
    ):
        model = base.clone()
        model.add_patches({f"{key}.weight": patch})
        with pytest.raises(ValueError, match=rf"blocks.0.self_attn.q.weight \({said}"):
            output(model)
    # where nothing is cut it can stay what it is
    whole = "diffusion_model.blocks.1.self_attn.q"
    out = output(loras(base, lokr(whole)))
    assert not torch.equal(out, output(base))
    with pytest.raises(ValueError, match=r"Load LoRA \(Bypass\).*Use Load LoRA instead"):
        output(loras(base, plain, 1.0, LoraLoaderBypassModelOnly))
    # and none of it stays behind
    assert torch.equal(output(base), output(load_slim(slim_file(tmp_path))))


# the nodes


@pytest.fixture
def folders(tmp_path, monkeypatch):
    table = folder_paths.folder_names_and_paths
    monkeypatch.setitem(table, "diffusion_models", ([str(CHECKPOINT.parent)], {".safetensors"}))
    monkeypatch.setitem(table, FOLDER, ([str(tmp_path / "slim")], {".safetensors"}))
    return tmp_path / "slim"


def write(profile, **inputs):
    given = {"prune_ratio": 0.3, "rule": "pare", "refit": True, "filename": "mine"} | inputs
    model = given.pop("diffusion_model", CHECKPOINT.name)
    return WanTrimSlim.execute(diffusion_model=model, profile=profile, **given)


def test_written_by_the_node_loaded_by_the_node(folders, monkeypatch):
    profile = ProfileFile(measured(open_source(CHECKPOINT).model))
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *args, **kw: seen.append(args[:2]))
    made = write(profile)
    text = made.result[0]
    assert made.ui["text"] == (text,)
    assert text.startswith("Wrote mine.safetensors") and "(76%)" in text
    assert "recorded without calibration" in text
    assert seen[-1] == (1000, 1000)
    model = WanTrimLoadSlim.execute(slim_model="mine.safetensors").result[0]
    assert slim_header(model).made["rule"] == "pare"
    with pytest.raises(
        ValueError, match="WanTrim Slim: filename: mine.safetensors is there already"
    ):
        write(profile)
    before = (folders / "mine.safetensors").read_bytes()
    known = WanTrimLoadSlim.fingerprint_inputs(slim_model="mine.safetensors")
    write(profile, overwrite=True, rule="budget")
    assert (folders / "mine.safetensors").read_bytes() != before
    assert WanTrimLoadSlim.fingerprint_inputs(slim_model="mine.safetensors") != known
    # the model that comes with the pack needs no folder
    write(profile, diffusion_model=DEMO, filename="demo")
    assert (folders / "demo.safetensors").read_bytes() == before


def test_cancelled_by_the_artist(folders, monkeypatch):
    profile = ProfileFile(measured(open_source(CHECKPOINT).model))

    def cancel(*args, **kwargs):
        comfy.model_management.interrupt_current_processing()

    # the first one only: the host leaves out the others of a bar that moves fast
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        write(profile)
    assert not folders.exists()


def test_wrong_inputs_are_refused_by_node_and_name(folders, tmp_path):
    profile = ProfileFile(measured(open_source(CHECKPOINT).model))
    for name in ("", "../x", "a/b", "a\\b", ".hidden", "x:y"):
        with pytest.raises(ValueError, match="WanTrim Slim: filename: expected a plain name"):
            write(profile, filename=name)
    with pytest.raises(ValueError, match="WanTrim Slim: prune_ratio: expected 0 to 0.8, got 0.9"):
        write(profile, prune_ratio=0.9)
    other = open_source(full_file(tmp_path)).model
    with pytest.raises(ValueError, match="WanTrim Slim: .*: the profile is of another model"):
        write(ProfileFile(measured(other)))
    folders.mkdir(exist_ok=True)
    full_file(folders, name="full.safetensors")
    with pytest.raises(
        ValueError, match="WanTrim Load Slim: slim_model: full.safetensors: expected"
    ):
        WanTrimLoadSlim.execute(slim_model="full.safetensors")
    with pytest.raises(
        ValueError, match="WanTrim Load Slim: weight_dtype: expected one of default"
    ):
        WanTrimLoadSlim.execute(slim_model="full.safetensors", weight_dtype="int8")
