"""The templates for real models and the blueprint, run on a real server with the tiny Wan in their place."""

import copy
import json
import re
import shutil
import urllib.parse

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from wantrim.nodes.demo import PROMPT
from wantrim.tests.comfyui.server import FOLDER, running
from wantrim.tests.comfyui.workflow_tools import (
    LOADERS,
    PIXEL_FRAMES,
    SIDE,
    inside,
    on_tiny_wan,
    only_for,
    only_group,
    problems,
    saved,
    texts,
    to_api,
    with_inputs,
)

CHECKPOINT = "toy/tiny_wan.safetensors"
SINGLE = ["wan2.1_t2v_1.3b", "wan2.2_ti2v_5b"]
PAIRS = ["wan2.2_t2v_14b", "wan2.2_i2v_14b"]
BLUEPRINT = "Wan 2.2 pair (trimmed)"
HIGH, LOW = (f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors" for noise in ("high", "low"))
AS_PLANNED = "nothing: everything ran as planned"


def tiny_lora(rank: int = 2) -> dict[str, torch.Tensor]:
    """Of the first block's queries: a little is enough to make another video."""
    generator = torch.Generator().manual_seed(5)
    stem = "diffusion_model.blocks.0.self_attn.q"
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, 128, generator=generator) * 0.2,
        f"{stem}.lora_B.weight": torch.randn(128, rank, generator=generator) * 0.2,
    }


@pytest.fixture(scope="module")
def workflows(root) -> dict[str, dict]:
    files = (root / "workflows").glob("*.json")
    return {file.stem: json.loads(file.read_text("utf-8")) for file in files}


@pytest.fixture(scope="module")
def server(comfyui, root, workflows, tmp_path_factory):
    with running(comfyui, root, tmp_path_factory.mktemp("templates") / "base") as server:
        nodes = [node for workflow in workflows.values() for node in workflow["nodes"]]
        for model in (m for node in nodes for m in node["properties"].get("models", [])):
            file = server.base / "models" / model["directory"] / model["name"]
            file.parent.mkdir(exist_ok=True)
            if model["directory"] == "diffusion_models":
                shutil.copyfile(root / CHECKPOINT, file)
            elif model["directory"] == LOADERS["LoraLoaderModelOnly"]:
                save_file(tiny_lora(), file)
        Image.new("RGB", (SIDE, SIDE), "navy").save(server.base / "input" / "example.png")
        yield server


@pytest.fixture(scope="module")
def infos(server) -> dict:
    return server.json("/object_info")


def done(server, prompt: dict):
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    return entry


@pytest.mark.parametrize("name", SINGLE)
def test_template_of_one_model_runs(name, workflows, server, infos):
    entry = done(server, on_tiny_wan(to_api(workflows[name], infos)))
    assert len(saved(server, entry)) == 1
    said = texts(entry)
    assert "\nWanModel: " in said and "a step took" in said and AS_PLANNED in said
    # a whole step, one on a part of the tokens
    assert re.search(r"of 4 steps [1-3] whole, [1-3] on a part of the tokens", said)


@pytest.mark.parametrize("name", PAIRS)
def test_lora_switch_changes_steps_cfg_and_models(name, workflows, server, infos):
    videos = {}
    for switch, steps in ((True, {"high": 2, "low": 2}), (False, {"high": 3, "low": 3})):
        prompt = on_tiny_wan(to_api(workflows[name], infos))
        numbers = kinds(prompt, "PrimitiveInt")
        assert sorted(node["inputs"]["value"] for node in numbers) == [2, 4, 10, 20]
        for node in numbers:
            # 20 steps take long
            node["inputs"]["value"] = {20: 6, 10: 3}.get(*2 * (node["inputs"]["value"],))
        entry = done(server, with_inputs(prompt, "PrimitiveBoolean", value=switch))
        [videos[switch]] = saved(server, entry)
        assert steps_told(prompt, entry) == steps
    assert videos[True].read_bytes() != videos[False].read_bytes()


@pytest.mark.parametrize(
    ("name", "change_at"), [("wan2.1_t2v_1.3b_tuned", 0), ("wan2.2_i2v_14b_tuned", 4)]
)
def test_trial_of_a_real_model_chooses_and_keeps(name, change_at, workflows, server, infos):
    prompt = on_tiny_wan(to_api(workflows[name], infos))
    prompt = with_inputs(prompt, "WanTrimCandidates", steps=8, change_at=change_at)
    entry = done(server, prompt)
    said = texts(entry)
    [verdict] = kinds(prompt, "WanTrimVerdict")
    assert f"Kept in {verdict['inputs']['filename']}" in said and "Best at 1.5x: " in said
    # whole, WanTrim, EasyCache, fewer steps
    assert "WanTrim Candidates: 4 of 4" in server.log
    assert len(saved(server, entry)) == 1


def steps_told(prompt: dict, entry) -> dict[str, int]:
    """Expert -> number of steps in the report's table of it."""
    [key] = [key for key, node in prompt.items() if node["class_type"] == "PreviewAny"]
    said = "\n".join(entry["outputs"][key]["text"])
    parts = re.split(r"WanModel, (high|low) noise expert", said)[1:]
    rows = re.compile(r"^ +\d+ +\d\.\d{3} ", re.MULTILINE)
    return {
        noise: len(rows.findall(part)) for noise, part in zip(parts[::2], parts[1::2], strict=True)
    }


def test_final_is_the_untouched_model(workflows, server, infos):
    prompt = on_tiny_wan(to_api(workflows["wan2.1_t2v_1.3b"], infos))
    assert {node["inputs"]["render"] for node in kinds(prompt, "WanTrim")} == {"draft"}
    [(key, dial)] = [(k, n) for k, n in prompt.items() if n["class_type"] == "WanTrim"]
    # without any node of ours between the loader and the sampler
    without = copy.deepcopy(prompt)
    for node in without.values():
        for given, value in node["inputs"].items():
            if value == [key, 0]:
                node["inputs"][given] = dial["inputs"]["model"]
    final = with_inputs(prompt, "WanTrim", render="final")
    draft, final, whole = (frames(server, one) for one in (prompt, final, without))
    assert np.array_equal(final, whole) and not np.array_equal(draft, whole)


def kinds(prompt: dict, kind: str) -> list[dict]:
    return [node for node in prompt.values() if node["class_type"] == kind]


def frames(server, prompt: dict) -> np.ndarray:
    """Of the video that is decoded."""
    [decoded] = [key for key, node in prompt.items() if node["class_type"] == "VAEDecode"]
    save = {"images": [decoded, 0], "filename_prefix": "frames"}
    prompt = only_for(prompt | {"save": {"class_type": "SaveImage", "inputs": save}}, "SaveImage")
    files = saved(server, done(server, prompt))
    assert len(files) == PIXEL_FRAMES
    return np.stack([np.asarray(Image.open(file)) for file in files])


def test_slim_template_writes_a_checkpoint_and_then_uses_it(workflows, server, infos):
    """Group 1 as the template comes, then group 2 in its place."""
    workflow = workflows["wan2.1_t2v_slim"]
    first = to_api(workflow, infos)
    assert first == to_api(only_group(workflow, 1), infos)
    types = {node["class_type"] for node in first.values()}
    assert {"WanTrimProfile", "WanTrimSlim"} <= types and "WanTrimLoadSlim" not in types
    assert len(saved(server, done(server, on_tiny_wan(first)))) == 1

    second = to_api(only_group(workflow, 2), infos)
    types = {node["class_type"] for node in second.values()}
    assert "WanTrimLoadSlim" in types and "WanTrimProfile" not in types
    assert len(saved(server, done(server, on_tiny_wan(second)))) == 1


@pytest.fixture
def blueprint(root) -> dict:
    return json.loads((root / "subgraphs" / f"{BLUEPRINT}.json").read_text("utf-8"))


def test_server_offers_the_blueprint(blueprint, server):
    found = {
        key: entry
        for key, entry in server.json("/global_subgraphs").items()
        if entry["info"]["node_pack"] == f"custom_nodes.{FOLDER}"
    }
    [(key, entry)] = found.items()
    assert entry["name"] == BLUEPRINT
    served = server.json(f"/global_subgraphs/{urllib.parse.quote(key)}")
    assert json.loads(served["data"]) == blueprint


def test_blueprint_fits_the_nodes(blueprint, infos):
    assert problems(blueprint, infos) == []
    [subgraph] = blueprint["definitions"]["subgraphs"]
    [node] = blueprint["nodes"]
    assert node["type"] == subgraph["id"]
    rim = [(given["name"], given["type"]) for given in subgraph["inputs"]]
    assert [(given["name"], given["type"]) for given in node["inputs"]] == rim
    links = {link["id"]: link for link in subgraph["links"]}
    for slot, given in enumerate(subgraph["inputs"]):
        into = [link["id"] for link in links.values() if link["origin_id"] == -10]
        mine = [number for number in into if links[number]["origin_slot"] == slot]
        assert given["linkIds"] == mine and mine
    shown = [given["name"] for given in node["inputs"] if "widget" in given]
    assert len(node["properties"]["proxyWidgets"]) == len(shown)


def test_blueprint_samples_with_both_experts(blueprint, server, infos):
    [subgraph] = blueprint["definitions"]["subgraphs"]
    prompt = {
        "tiny": {"class_type": "WanTrimDemoModel", "inputs": {}},
        "text": {"class_type": "WanTrimDemoPrompt", "inputs": {"prompt": PROMPT}},
        "latent": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": SIDE, "height": SIDE, "length": PIXEL_FRAMES, "batch_size": 1},
        },
    }
    for name, file in (("high", HIGH), ("low", LOW)):
        inputs = {"unet_name": file, "weight_dtype": "default"}
        prompt[name] = {"class_type": "UNETLoader", "inputs": inputs}
    given = {
        "model_high_noise": ["high", 0],
        "model_low_noise": ["low", 0],
        "positive": ["text", 0],
        "negative": ["text", 0],
        "latent_image": ["latent", 0],
        "value": 6,
        "value_1": 3,
    }
    nodes, outputs = inside(subgraph, infos, given)
    prompt |= nodes
    prompt["decode"] = {
        "class_type": "VAEDecode",
        "inputs": {"samples": outputs["LATENT"], "vae": ["tiny", 1]},
    }
    report = {"model": outputs["model_high_noise"], "model_low_noise": outputs["model_low_noise"]}
    report |= {"images": ["decode", 0], "measure_dense_step": False}
    prompt["report"] = {"class_type": "WanTrimReport", "inputs": report}
    prompt["words"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 0]}}
    entry = done(server, prompt)
    assert steps_told(prompt, entry) == {"high": 3, "low": 3}
    assert AS_PLANNED in texts(entry)


def test_server_log_is_clean_at_the_end(server):
    assert "Traceback" not in server.log
