"""The pack as ComfyUI's own loader sees it."""

import asyncio
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import comfyui_version
import pytest

import nodes as comfy_nodes
from comfy_api.latest import io
from wantrim.hosts.comfyui.version import OLDEST
from wantrim.methods.schedule import DIRECTIONS
from wantrim.nodes import (
    blocks,
    compare,
    demo,
    heads,
    profile,
    report,
    slim,
    tokens,
    tuned,
    wantrim,
)

FOLDER = "ComfyUI-WanTrim.v1-x"
NODE_IDS = {
    "WanTrim",
    "WanTrimPair",
    "WanTrimTokens",
    "WanTrimHeads",
    "WanTrimBlocks",
    "WanTrimProfile",
    "WanTrimSaveProfile",
    "WanTrimLoadProfile",
    "WanTrimSlim",
    "WanTrimLoadSlim",
    "WanTrimReport",
    "WanTrimCompare",
    "WanTrimCandidates",
    "WanTrimVerdict",
    "WanTrimDemoModel",
    "WanTrimDemoPrompt",
    "WanTrimDemoImage",
}
STAGES = (wantrim, tokens, heads, blocks, profile, slim, report, compare, tuned)
NODES = [node for stage in (*STAGES, demo) for node in stage.NODES]
LANGUAGES = ("zh", "ja")
ALL = ("auto", "paper", "custom")
# lists of files that may be empty, so that there is no default
FILES = {"slim_model", "router_file"}
by_id = pytest.mark.parametrize("node", NODES, ids=lambda n: n.define_schema().node_id)
by_language = pytest.mark.parametrize("language", LANGUAGES)


def every_input(schema) -> list:
    """The inputs of a node with those that a choice reveals."""
    return [inner for given in schema.inputs for inner in given.get_all()]


def every_choice(schema) -> list[str]:
    """What can be chosen at a node, without the files of the artist's machine."""
    found = []
    for given in every_input(schema):
        if isinstance(given, io.DynamicCombo.Input):
            found += [option.key for option in given.options]
        elif given.io_type == "COMBO":
            found += [name for name in given.options if not name.endswith(".safetensors")]
    return found


def strings_in(language: str, root) -> dict:
    file = root / "locales" / language / "nodeDefs.json"
    return json.loads(file.read_text("utf-8"))


def locale_keys(schema) -> set[str]:
    """The frontend asks for "preset.alpha" as "preset_alpha"."""
    keys = {given.id for given in schema.inputs}
    for given in schema.inputs:
        keys |= {f"{given.id}_{inner.id}" for inner in given.get_all()[1:]}
    return keys


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


def test_an_older_host_says_in_one_line_what_is_needed(root, registered, monkeypatch, caplog):
    monkeypatch.setattr(comfyui_version, "__version__", "0.15.1")
    assert not asyncio.run(registered.load_custom_node(str(root)))
    assert not registered.NODE_CLASS_MAPPINGS
    (record,) = caplog.records
    assert f"WanTrim needs ComfyUI {OLDEST} or newer, and this is ComfyUI 0.15.1" in record.message
    assert record.levelname == "WARNING" and "\n" not in record.message


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
    for given in schema.outputs:
        assert given.tooltip is None or given.tooltip.endswith("."), given.display_name


@by_id
def test_defaults_are_allowed_values(node):
    for given in every_input(node.define_schema()):
        default = getattr(given, "default", None)
        if default is None:
            needs_one = given.io_type in ("INT", "FLOAT", "COMBO", "BOOLEAN", "STRING")
            assert not needs_one or given.id in FILES, given.id
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
    assert revealed["auto"] == revealed["paper"] == []
    assert {i.id: i.default for i in revealed["custom"]} == {
        "schedule": "falling",
        "alpha": 0.5,
        "reselect_every": 10,
        "anchor_given_frames": True,
    }


def test_custom_offers_every_schedule():
    offered = {i.id: i.options for i in tokens.CUSTOM_INPUTS if i.io_type == "COMBO"}
    assert offered == {"schedule": list(DIRECTIONS)}


@pytest.mark.parametrize("node", wantrim.NODES, ids=lambda n: n.define_schema().node_id)
def test_the_dial_has_these_inputs_in_this_order(node):
    """The order of a saved workflow's values."""
    given = node.define_schema().inputs
    profiles = [i.id for i in given if i.io_type == "WANTRIM_PROFILE"]
    assert [i.id for i in given[-len(profiles) :]] == profiles
    given = [i for i in given if i.io_type not in ("MODEL", "WANTRIM_PROFILE")]
    values = {i.id: i.default for i in given}
    dial = {"speedup": 1.5, "render": "draft", "dense_first_steps": 1, "dense_last_steps": 0}
    dial["context"] = "auto"
    if node is wantrim.WanTrimPair:
        dial["boundary"] = 0.0
    assert list(values.items()) == list(dial.items())
    options = {i.id: i.options for i in given if i.io_type == "COMBO"}
    assert options == {"render": ["draft", "final"], "context": ["auto", "cpu", "off"]}


@by_id
def test_help_page_names_every_input(node, root):
    schema = node.define_schema()
    page = root / "web" / "docs" / schema.node_id / "en.md"
    assert page.is_file(), f"{page} is missing"
    text = page.read_text("utf-8")
    assert text.startswith("# ")
    missing = [given.id for given in every_input(schema) if f"**{given.id}**" not in text]
    assert not missing, f"{page} does not explain {missing}"
    unexplained = [choice for choice in every_choice(schema) if f"*{choice}*" not in text]
    assert not unexplained, f"{page} does not explain {unexplained}"


@by_language
@by_id
def test_translated_page_calls_every_input_what_the_node_calls_it(node, language, root):
    schema = node.define_schema()
    page = root / "web" / "docs" / schema.node_id / f"{language}.md"
    assert page.is_file(), f"{page} is missing"
    text = page.read_text("utf-8")
    names = strings_in(language, root)[schema.node_id]
    assert text.startswith(f"# {names['display_name']}（{schema.display_name}）\n")
    wanted = [f"**{given['name']}**" for given in names.get("inputs", {}).values()]
    missing = [given for given in wanted if given not in text]
    missing += [given.id for given in every_input(schema) if given.id not in text]
    assert not missing, f"{page} does not explain {missing}"
    unexplained = [choice for choice in every_choice(schema) if f"*{choice}*" not in text]
    assert not unexplained, f"{page} does not explain {unexplained}"


@by_language
def test_translated_strings_name_every_node(language, root):
    assert set(strings_in(language, root)) == NODE_IDS


@by_language
@by_id
def test_translated_strings_name_every_input_and_output(node, language, root):
    schema = node.define_schema()
    strings = strings_in(language, root)[schema.node_id]
    assert strings["display_name"].startswith("WanTrim")
    assert strings["description"].endswith("。")
    found = strings.get("inputs", {})
    assert set(found) == locale_keys(schema)
    for name, words in found.items():
        assert words["name"] and words["tooltip"].endswith("。"), name
    found = strings["outputs"]
    assert list(found) == [str(place) for place in range(len(schema.outputs))]
    for words, given in zip(found.values(), schema.outputs, strict=True):
        assert words["name"], given.display_name
        assert given.tooltip is None or words["tooltip"].endswith("。"), given.display_name


def test_an_install_asks_for_nothing_that_comfyui_does_not(root):
    lines = (Path(comfy_nodes.__file__).parent / "requirements.txt").read_text("utf-8").splitlines()
    hosts = {re.split(r"[^\w-]", line)[0].lower() for line in lines}
    assert set((root / "requirements.txt").read_text("utf-8").split()) <= hosts


def test_the_frontend_of_this_comfyui_is_in_the_range(root):
    project = (root / "pyproject.toml").read_text("utf-8")
    low, high = re.search(r"comfyui-frontend-package>=([\d.]+),<([\d.]+)", project).groups()
    sizes = [
        tuple(map(int, v.split("."))) for v in (low, version("comfyui-frontend-package"), high)
    ]
    assert sizes[0] <= sizes[1] < sizes[2]


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
