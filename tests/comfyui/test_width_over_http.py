"""Profile, heads, slim checkpoint and blocks on a real server: tiny Wan2.1 and a Wan2.2-like pair."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from wantrim.nodes.demo import PROMPT
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.server import running
from wantrim.tests.comfyui.test_slim import lora as random_lora
from wantrim.tests.comfyui.workflow_tools import needed_by, saved, schema_inputs, texts, with_inputs

STEPS, SHIFT = 4, 3.0
T2V, HIGH, LOW = "wan21_tiny.safetensors", "wan22_high.safetensors", "wan22_low.safetensors"
EXPERTS = {"high": HIGH, "low": LOW}
SIZE = {"width": 8 * tiny.WIDTH, "height": 8 * tiny.HEIGHT, "length": 4 * tiny.FRAMES - 3}
AS_PLANNED = "nothing: everything ran as planned"
SETTINGS = {"steps": STEPS, "cfg": 5.0, "sampler_name": "euler", "scheduler": "simple"}
PROMPTS = {"positive": ["positive", 0], "negative": ["negative", 0]}


@pytest.fixture(scope="module")
def server(comfyui, root, tmp_path_factory):
    with running(comfyui, root, tmp_path_factory.mktemp("width") / "base") as server:
        models = server.base / "models"
        for folder in ("diffusion_models", "loras"):
            (models / folder).mkdir(exist_ok=True)
        save_file(random_lora(scale=0.2), models / "loras" / "tiny.safetensors")
        for file, kind in ((T2V, "t2v"), (HIGH, "i2v"), (LOW, "i2v")):
            weights, metadata = tiny.state_dict(kind)
            if file == LOW:
                weights = tiny.random_weights(tiny.base_model(kind).model.diffusion_model, seed=23)
            save_file(weights, models / "diffusion_models" / file, metadata)
        yield server


def node(kind: str, /, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def chain(model: str, nodes: dict) -> dict:
    """These nodes one behind the other, the first behind `model`."""
    for name, made in nodes.items():
        made["inputs"]["model"], model = [model, 0], name
    return nodes


def lora(model: str, name: str = "lora", strength: float = 1.0) -> dict:
    given = {"lora_name": "tiny.safetensors", "strength_model": strength}
    return chain(model, {name: node("LoraLoaderModelOnly", **given)})


def with_lora(file: str, prefix: str = "", strength: float = 1.0) -> dict:
    """Nodes up to "lora": the stock loader and a LoRA behind it."""
    loader = node("UNETLoader", unet_name=file, weight_dtype="default")
    return {f"{prefix}unet": loader} | lora(f"{prefix}unet", f"{prefix}lora", strength)


def around(latent: str) -> dict:
    """Prompts and VAE of the tiny Wan, and what becomes of the latent that a sampler gives."""
    return {
        "demo": node("WanTrimDemoModel"),
        "positive": node("WanTrimDemoPrompt", prompt=PROMPT),
        "negative": node("WanTrimDemoPrompt", prompt=""),
        "images": node("VAEDecode", samples=[latent, 0], vae=["demo", 1]),
        "save images": node("SaveImage", images=["images", 0], filename_prefix="video"),
        "save latent": node("SaveLatent", samples=[latent, 0], filename_prefix="latent"),
    }


def sampled(model: str) -> dict:
    """Nodes behind `model`, text-to-video; "shift" is the MODEL of the sampler."""
    empty = node("EmptyHunyuanLatentVideo", batch_size=1, **SIZE)
    given = SETTINGS | {"latent_image": ["empty", 0], "seed": 7, "denoise": 1.0}
    nodes = {"shift": node("ModelSamplingSD3", shift=SHIFT)}
    nodes["sampler"] = node("KSampler", **PROMPTS, **given)
    return around("sampler") | {"empty": empty} | chain(model, nodes)


def sampled_pair(high: str, low: str) -> dict:
    """Nodes behind two experts, image-to-video, half of the steps each."""
    made, half = around("low sampler"), STEPS // 2
    made["start"] = node("WanTrimDemoImage", prompt=PROMPT, seed=0)
    given = {"vae": ["demo", 1], "start_image": ["start", 0], "batch_size": 1}
    made["i2v"] = node("WanImageToVideo", **PROMPTS, **given, **SIZE)
    prompts = {"positive": ["i2v", 0], "negative": ["i2v", 1]}
    halves = [
        ("high", high, ["i2v", 2], 0, half, "enable", "enable"),
        ("low", low, ["high sampler", 0], half, STEPS, "disable", "disable"),
    ]
    for name, model, latent, first, last, noise, leftover in halves:
        given = {"latent_image": latent, "start_at_step": first, "end_at_step": last}
        given |= {"add_noise": noise, "return_with_leftover_noise": leftover, "noise_seed": 7}
        shift = node("ModelSamplingSD3", shift=SHIFT)
        sampler = node("KSamplerAdvanced", **prompts, **SETTINGS, **given)
        made |= chain(model, {f"{name} shift": shift, f"{name} sampler": sampler})
    return made


def save_profile(model: str, filename: str) -> dict:
    given = {"images": ["images", 0], "filename": filename, "merge": False}
    return node("WanTrimSaveProfile", model=[model, 0], **given)


def load_profile(name: str) -> dict:
    return node("WanTrimLoadProfile", filename=f"{name}.safetensors")


def heads(profile: str) -> dict:
    return node("WanTrimHeads", profile=[profile, 0], prune_ratio=0.4, method="paper")


def report(model: str, **more) -> dict:
    return node("WanTrimReport", model=[model, 0], images=["images", 0], **more)


def done(server, prompt: dict) -> dict:
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    return entry


def latent_of(server, entry) -> torch.Tensor:
    """What the sampler gave; the pictures beside it are there and have the size asked for."""
    file = entry["outputs"]["save latent"]["latents"][0]
    made = load_file(server.base / "output" / file["subfolder"] / file["filename"])
    assert torch.isfinite(made["latent_tensor"]).all()
    frames = np.stack([np.asarray(Image.open(picture)) for picture in saved(server, entry)])
    assert frames.shape == (SIZE["length"], SIZE["height"], SIZE["width"], 3)
    return made["latent_tensor"]


def left(text: str) -> list[float]:
    return [float(share) for share in re.findall(r"heads' patterns: ([\d.]+)%", text)]


@pytest.fixture(scope="module")
def full(server) -> torch.Tensor:
    """The latent of the t2v model with its LoRA and nothing of WanTrim."""
    return latent_of(server, done(server, with_lora(T2V) | sampled("lora")))


@pytest.fixture(scope="module")
def recorded(server) -> dict:
    """The run that wrote the profile "t2v"."""
    recording = chain("lora", {"record": node("WanTrimProfile", calibrate="all")})
    saving = {"saved": save_profile("shift", "t2v")}
    return done(server, with_lora(T2V) | recording | sampled("record") | saving)


@pytest.fixture(scope="module")
def pair(server) -> dict:
    """The run that wrote the profiles "high" and "low" of the two experts."""
    prompt = sampled_pair("high record", "low record")
    for name, file in EXPERTS.items():
        recording = {f"{name} record": node("WanTrimProfile", calibrate="none")}
        prompt |= with_lora(file, f"{name} ") | chain(f"{name} lora", recording)
        prompt[f"{name} saved"] = save_profile(f"{name} shift", name)
    return done(server, prompt)


def test_recording_changes_nothing_and_saves_a_profile(server, recorded, full):
    assert torch.equal(latent_of(server, recorded), full)
    said = texts(recorded)
    assert "Saved as t2v.safetensors" in said and f"{STEPS} model calls in 1 recorded runs" in said
    assert "Calibration for WanTrim Slim: t2v.calibration.safetensors" in said
    without = done(server, with_lora(T2V, strength=0.0) | sampled("lora"))
    assert not torch.equal(latent_of(server, without), full)


def test_heads_of_a_loaded_profile_in_place(server, recorded, full):
    prompt = with_lora(T2V) | {"profile": load_profile("t2v")}
    prompt |= chain("lora", {"heads": heads("profile")}) | sampled("heads")
    prompt["say"] = node("PreviewAny", source=["heads", 1])
    prompt["report"] = report("shift")
    entry = done(server, prompt)
    said = texts(entry)
    share = re.search(r"Attention left at 3 latent frames of 4 x 5 tokens: ([\d.]+)%", said)
    # PARE keeps 5 of 8 heads
    assert float(share[1]) == 62.5
    assert len(left(said)) == 1 and 20 < left(said)[0] < 80
    assert AS_PLANNED in said
    assert not torch.equal(latent_of(server, entry), full)
    off = done(server, with_inputs(prompt, "WanTrimHeads", prune_ratio=0.0))
    assert torch.equal(latent_of(server, off), full)


def test_slim_checkpoint_is_written_and_takes_the_lora(server, recorded, full):
    given = {"prune_ratio": 0.3, "rule": "pare", "refit": True, "filename": "tiny"}
    given |= {"diffusion_model": T2V, "profile": ["profile", 0], "overwrite": False}
    entry = done(server, {"profile": load_profile("t2v"), "slim": node("WanTrimSlim", **given)})
    said = texts(entry)
    assert "Wrote tiny.safetensors" in said
    assert re.search(r"self-attention heads kept: [67]\d% ", said)
    assert re.search(r"corrections: .*refit", said)
    file = server.base / "models" / "wantrim" / "slim" / "tiny.safetensors"
    stock = server.base / "models" / "diffusion_models" / T2V
    assert file.stat().st_size < 0.85 * stock.stat().st_size

    made = {}
    for strength in (0.0, 1.0):
        loader = node("WanTrimLoadSlim", slim_model="tiny.safetensors", weight_dtype="default")
        prompt = {"slim": loader} | lora("slim", strength=strength) | sampled("lora")
        made[strength] = latent_of(server, done(server, prompt))
    assert not torch.equal(made[1.0], full) and not torch.equal(made[1.0], made[0.0])


def test_heads_of_both_experts_and_their_report(server, pair):
    assert all(f"Saved as {name}.safetensors" in texts(pair) for name in EXPERTS)
    assert texts(pair).count(f"{STEPS // 2} model calls in 1 recorded runs") == 2
    prompt = sampled_pair("high heads", "low heads")
    for name, file in EXPERTS.items():
        prompt[f"{name} profile"] = load_profile(name)
        prompt |= with_lora(file, f"{name} ")
        prompt |= chain(f"{name} lora", {f"{name} heads": heads(f"{name} profile")})
    prompt["report"] = report("high shift", model_low_noise=["low shift", 0])
    entry = done(server, prompt)
    said = texts(entry)
    assert "high noise expert" in said and "low noise expert" in said
    assert len(left(said)) == 2 and all(20 < share < 80 for share in left(said))
    assert said.count(AS_PLANNED) == 2
    assert not torch.equal(latent_of(server, entry), latent_of(server, pair))

    # without profiles: each expert's first step shows it, and the second runs by it
    for name in EXPERTS:
        found = {"model": prompt[f"{name} heads"]["inputs"]["model"], "method": "demote"}
        prompt[f"{name} heads"] = node("WanTrimHeads", prune_ratio=0.4, **found)
        del prompt[f"{name} profile"]
    entry = done(server, prompt)
    assert left(texts(entry)) == pytest.approx([60.0, 60.0], abs=10.0)
    assert texts(entry).count(AS_PLANNED) == 2
    assert not torch.equal(latent_of(server, entry), latent_of(server, pair))


def test_a_profile_of_the_other_expert_is_refused(server, pair):
    prompt = sampled_pair("high heads", "low heads")
    for name, file in EXPERTS.items():
        prompt |= with_lora(file, f"{name} ")
        prompt |= chain(f"{name} lora", {f"{name} heads": heads(f"{name} profile")})
    for name, other in (("high", "low"), ("low", "high")):
        swapped = needed_by(prompt | {f"{name} profile": load_profile(other)}, f"{name} heads")
        swapped["say"] = node("PreviewAny", source=[f"{name} heads", 1])
        entry = server.run(swapped)
        assert entry["status"]["status_str"] == "error"
        error = dict(entry["status"]["messages"])["execution_error"]["exception_message"]
        assert "WanTrim Heads: profile: " in error and "was the other one meant?" in error


def test_blocks_run_as_the_text_says(server, recorded, full):
    inputs = schema_inputs(server.json("/object_info/WanTrimBlocks")["WanTrimBlocks"])
    given = {name: spec["default"] for name, (_, spec) in inputs.items() if "default" in spec}
    given |= {"router": "fixed", "router.blocks": "1, 3"}
    prompt = with_lora(T2V)
    prompt |= chain("lora", {"blocks": node("WanTrimBlocks", **given)}) | sampled("blocks")
    prompt["report"] = report("shift")
    entry = done(server, prompt)
    text, said = (entry["outputs"][key]["text"][0] for key in ("blocks", "report"))
    assert text == f"{tiny.LAYERS - 2} of {tiny.LAYERS} blocks run."
    assert f"(per step: {' '.join([str(tiny.LAYERS - 2)] * STEPS)})" in said and AS_PLANNED in said
    assert not torch.equal(latent_of(server, entry), full)
