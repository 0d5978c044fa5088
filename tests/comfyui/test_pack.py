"""The pack as ComfyUI's own loader sees it."""

import asyncio
import json
import shutil

import pytest

import nodes as comfy_nodes
from comfy_api.latest import io
from wantrim.methods.importance import IMPORTANCE
from wantrim.methods.restore import RESTORE
from wantrim.methods.schedule import DIRECTIONS
from wantrim.nodes import demo, report, tokens

FOLDER = "ComfyUI-WanTrim.v1-x"
NODE_IDS = {
    "WanTrimTokens",
    "WanTrimReport",
    "WanTrimDemoModel",
    "WanTrimDemoPrompt",
    "WanTrimDemoImage",
}
NODES = [*tokens.NODES, *report.NODES, *demo.NODES]
ALL = ("refresh", "paper", "custom")
by_id = pytest.mark.parametrize("node", NODES, ids=lambda n: n.define_schema().node_id)


def every_input(schema) -> list:
    """The inputs of a node with those that a choice reveals."""
    return [inner for given in schema.inputs for inner in given.get_all()]


@pytest.fixture
def registered(monkeypatch):
    """The host's tables, as they were again afterwards."""
    for table in ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "EXTENSION_WEB_DIRS"):
        monkeypatch.setattr(comfy_nodes, table, {})
    return comfy_nodes


@pytest.mark.parametrize("how", ["link", "copy"])
def test_host_loads_the_pack_from_a_folder_of_any_name(root, registered, tmp_path, how):
    folder = tmp_path / FOLDER
    if how == "link":
        folder.symlink_to(root, target_is_directory=True)
    else:
        # what an artist's install has
        leave = shutil.ignore_patterns(
            ".*", "out", "tests", "training", "demo", "benchmarks", "diffusers", "__pycache__"
        )
        shutil.copytree(root, folder, ignore=leave)
    assert asyncio.run(registered.load_custom_node(str(folder)))
    assert set(registered.NODE_CLASS_MAPPINGS) == NODE_IDS
    assert set(registered.NODE_DISPLAY_NAME_MAPPINGS) == NODE_IDS
    assert list(registered.EXTENSION_WEB_DIRS) == [FOLDER]
    for node in registered.NODE_CLASS_MAPPINGS.values():
        node.GET_SCHEMA()
        module = node.RELATIVE_PYTHON_MODULE
        assert module == f"custom_nodes.{FOLDER}"


def test_node_ids_are_the_released_ones():
    assert {node.define_schema().node_id for node in NODES} == NODE_IDS


@by_id
def test_schema_explains_itself(node):
    schema = node.define_schema()
    assert schema.display_name.startswith("WanTrim")
    assert schema.category.startswith("model/patch/wan")
    assert len(schema.description) > 40
    for given in every_input(schema):
        assert given.tooltip and given.tooltip.endswith("."), given.id


@by_id
def test_defaults_are_allowed_values(node):
    for given in every_input(node.define_schema()):
        default = getattr(given, "default", None)
        if default is None:
            assert given.io_type not in ("INT", "FLOAT", "COMBO", "BOOLEAN", "STRING"), given.id
            continue
        if given.io_type in ("INT", "FLOAT"):
            assert given.min <= default <= given.max, given.id
        elif given.io_type == "COMBO":
            assert default in given.options, given.id


def test_defaults_of_the_node():
    inputs = {i.id: i for i in tokens.WanTrimTokens.define_schema().inputs}
    assert list(inputs) == ["model", "prune_ratio", "preset", "start_percent", "end_percent"]
    defaults = {name: getattr(i, "default", None) for name, i in inputs.items()}
    assert defaults == {
        "model": None,
        "prune_ratio": 0.3,
        "preset": None,
        "start_percent": 0.0,
        "end_percent": 1.0,
    }
    # the frontend starts with the first
    assert tuple(option.key for option in inputs["preset"].options) == ALL
    revealed = {option.key: option.inputs for option in inputs["preset"].options}
    assert revealed["refresh"] == revealed["paper"] == []
    assert {i.id: i.default for i in revealed["custom"]} == {
        "schedule": "constant",
        "importance": "velocity_change+rotation",
        "alpha": 0.5,
        "dropped_tokens_get": "last_update",
        "reselect_every": 40,
        "trim_choosing_block": True,
        "dropped_keys_values": "leave out",
        "anchor_given_frames": True,
    }


def test_custom_offers_every_importance_and_every_treatment_of_dropped_tokens():
    offered = {i.id: i.options for i in tokens.CUSTOM_INPUTS if i.io_type == "COMBO"}
    singles = [name for name in offered["importance"] if "+" not in name]
    assert singles == list(IMPORTANCE)
    assert offered["dropped_tokens_get"] == list(RESTORE)
    assert offered["schedule"] == list(DIRECTIONS)


@by_id
def test_help_page_names_every_input(node, root):
    schema = node.define_schema()
    page = root / "web" / "docs" / schema.node_id / "en.md"
    assert page.is_file(), f"{page} is missing"
    text = page.read_text("utf-8")
    assert text.startswith("# ")
    missing = [given.id for given in every_input(schema) if f"**{given.id}**" not in text]
    assert not missing, f"{page} does not explain {missing}"
    choices = []
    for given in every_input(schema):
        if given.io_type == "COMBO":
            choices += given.options
        elif isinstance(given, io.DynamicCombo.Input):
            choices += [option.key for option in given.options]
    unexplained = [choice for choice in choices if f"*{choice}*" not in text]
    assert not unexplained, f"{page} does not explain {unexplained}"


def test_chinese_strings_name_every_input(root):
    """The frontend asks for "preset.alpha" as "preset_alpha"."""
    file = root / "locales" / "zh" / "nodeDefs.json"
    strings = json.loads(file.read_text("utf-8"))
    assert set(strings) == NODE_IDS
    for node in NODES:
        schema = node.define_schema()
        wanted = set()
        for given in schema.inputs:
            wanted.add(given.id)
            wanted |= {f"{given.id}_{inner.id}" for inner in given.get_all()[1:]}
        found = strings[schema.node_id].get("inputs", {})
        assert set(found) == wanted, schema.node_id
        for name, words in found.items():
            assert words["name"] and words["tooltip"].endswith("。"), name


def test_toy_video_goes_through_the_demo_nodes():
    model, vae = demo.WanTrimDemoModel.execute().result
    assert type(model.model.diffusion_model).__name__ == "WanModel"
    image = demo.WanTrimDemoImage.execute(demo.PROMPT, 3).result[0]
    assert image.shape == (1, 96, 96, 3)
    latent = comfy_nodes.VAEEncode().encode(vae, image)[0]["samples"]
    assert latent.shape == (1, 16, 1, 12, 12)
    back = comfy_nodes.VAEDecode().decode(vae, {"samples": latent})[0]
    assert back.shape == image.shape
    assert (back - image).abs().mean() < 0.05
    cond = demo.WanTrimDemoPrompt.execute(demo.PROMPT).result[0]
    assert cond[0][0].shape == (1, 24, 64) and cond[0][0].abs().max() > 0
