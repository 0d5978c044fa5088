"""The example workflows, checked against and run on a real server."""

import copy
import itertools
import json

import av
import numpy as np
import pytest
from PIL import Image

from wantrim.nodes.tokens import CUSTOM_INPUTS
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.server import FOLDER, running
from wantrim.tests.comfyui.test_pack import NODE_IDS
from wantrim.tests.comfyui.workflow_tools import (
    PIXEL_FRAMES,
    SIDE,
    graphs,
    needed_by,
    only_for,
    problems,
    saved,
    texts,
    to_api,
    with_inputs,
)

APP = "wantrim_demo_i2v.app"
DEMOS = ["start_here", APP]
DIAL = [
    "wan2.1_t2v_1.3b",
    "wan2.2_t2v_14b",
    "wan2.2_i2v_14b",
    "wan2.2_ti2v_5b",
]
TUNED = {
    "wantrim_demo_tuned": [1.5, 12, "all", 0],
    "wan2.1_t2v_1.3b_tuned": [1.5, 30, "few", 0],
    "wan2.2_i2v_14b_tuned": [1.5, 20, "few", 10],
}
SLIM = "wan2.1_t2v_slim"
WORKFLOWS = [*DEMOS, *TUNED, *DIAL, SLIM]
every = pytest.mark.parametrize("name", WORKFLOWS)


@pytest.fixture(scope="module")
def server(comfyui, root, tmp_path_factory):
    with running(comfyui, root, tmp_path_factory.mktemp("server") / "base") as server:
        yield server


@pytest.fixture(scope="module")
def infos(server) -> dict:
    return server.json("/object_info")


@pytest.fixture
def workflow(root, name) -> dict:
    return json.loads((root / "workflows" / f"{name}.json").read_text("utf-8"))


@pytest.fixture
def demo(root) -> dict:
    """The first template with WanTrim Tokens in WanTrim's place."""
    workflow = json.loads((root / "workflows" / "start_here.json").read_text("utf-8"))
    [node] = [node for node in workflow["nodes"] if node["type"] == "WanTrim"]
    model = next(given for given in node["inputs"] if given["name"] == "model")
    widgets = {
        "prune_ratio": ("FLOAT", 0.3),
        "preset": ("COMFY_DYNAMICCOMBO_V3", "auto"),
        "start_percent": ("FLOAT", 0),
        "end_percent": ("FLOAT", 1),
    }
    shown = [
        {"name": name, "type": kind, "widget": {"name": name}, "link": None}
        for name, (kind, _) in widgets.items()
    ]
    node.update(
        type="WanTrimTokens",
        inputs=[model, *shown],
        widgets_values=[value for _, value in widgets.values()],
    )
    return workflow


def frames_of(path) -> np.ndarray:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


@every
def test_workflow_fits_the_nodes(workflow, infos):
    assert problems(workflow, infos) == []


@every
def test_workflow_has_the_node_a_version_and_a_picture(workflow, root, name):
    nodes = [node for found, _ in graphs(workflow) for node in found]
    ours = [node for node in nodes if node["type"].startswith("WanTrim")]
    method = "WanTrimPair" if name.startswith("wan2.2") and "5b" not in name else "WanTrim"
    method = {**dict.fromkeys(TUNED, "WanTrimCandidates"), SLIM: "WanTrimSlim"}.get(name, method)
    assert method in {node["type"] for node in ours}
    assert {node["properties"]["cnr_id"] for node in ours} == {"wantrim"}
    others = {node["properties"]["cnr_id"] for node in nodes if node not in ours}
    assert others <= {"comfy-core"}
    assert (root / "workflows" / f"{name}.jpg").is_file()


def test_no_other_workflow_is_shipped_unchecked(root):
    assert {file.stem for file in (root / "workflows").glob("*.json")} == set(WORKFLOWS)


def open_custom(workflow: dict) -> dict:
    """The node WanTrim Tokens of a workflow, switched to "custom" as the frontend saves it."""
    node = next(node for node in workflow["nodes"] if node["type"] == "WanTrimTokens")
    place = [given["name"] for given in node["inputs"]].index("preset") + 1
    revealed = [
        {"name": f"preset.{given.id}", "type": given.io_type, "link": None}
        for given in CUSTOM_INPUTS
    ]
    for given in revealed:
        given["widget"] = {"name": given["name"]}
    node["inputs"][place:place] = revealed
    node["widgets_values"][1:2] = ["custom", *(given.default for given in CUSTOM_INPUTS)]
    return node


@every
def test_workflow_begins_with_the_defaults(workflow, name):
    defaults = {
        "WanTrim": [1.5, "draft", 1, 0, "auto"],
        # 2 + 2 steps go 1.33 times as fast, or twice
        "WanTrimPair": [1.3, "draft", 1, 0, "auto", 0],
        # as many steps as the sampler
        "WanTrimCandidates": TUNED.get(name),
    }
    found = [node for node in workflow["nodes"] if node["type"] in defaults]
    values = [node["widgets_values"] for node in found]
    assert values == [defaults[node["type"]] for node in found]
    assert found or name == SLIM


@every
def test_workflow_trims_behind_the_lora_and_before_the_shift(workflow, infos):
    """Of every node that trims: its model comes of a loader, a LoRA or another of ours."""
    [(nodes, links)] = graphs(workflow)
    kinds = {node["id"]: node["type"] for node in nodes}
    trims = {"WanTrim", "WanTrimPair", "WanTrimTokens", "WanTrimHeads", "WanTrimCandidates"}
    before = {"UNETLoader", "LoraLoaderModelOnly", "ComfySwitchNode", "WanTrimDemoModel"}
    for link in links:
        origin, target = kinds[link["origin_id"]], kinds[link["target_id"]]
        if target in trims and link["type"] == "MODEL":
            assert origin in before | trims
        if origin in trims and link["type"] == "MODEL":
            assert target in trims | {"ModelSamplingSD3"}


def test_opened_preset_fits_the_node(demo, infos):
    open_custom(demo)
    assert problems(demo, infos) == []
    inputs = next(
        n["inputs"] for n in to_api(demo, infos).values() if n["class_type"] == "WanTrimTokens"
    )
    assert {name for name in inputs if name.startswith("preset.")} == {
        f"preset.{given.id}" for given in CUSTOM_INPUTS
    }


# each of these must be found, or the test above could not fail
BREAK = {
    "unknown node": lambda n, links: n.update(type="WanTrimOfTomorrow"),
    "a value too many": lambda n, links: n["widgets_values"].append(1),
    "a value too few": lambda n, links: n["widgets_values"].pop(),
    "a value out of range": lambda n, links: n["widgets_values"].__setitem__(0, 0.95),
    "an unknown choice": lambda n, links: n["widgets_values"].__setitem__(1, "sideways"),
    "no version": lambda n, links: n["properties"].pop("ver"),
    "a link of another type": lambda n, links: links[0].__setitem__(5, "LATENT"),
    "a link from the wrong output": lambda n, links: links[0].__setitem__(2, 1),
    "a link to no node": lambda n, links: links[0].__setitem__(3, 999),
    "an input without its link": lambda n, links: n["inputs"][0].update(link=None),
}


# the same for what "custom" reveals
BREAK_CUSTOM = {
    "an unknown preset": lambda n: n["widgets_values"].__setitem__(1, "paper"),
    "a value out of range": lambda n: n["widgets_values"].__setitem__(3, 2.0),
    "an unknown choice": lambda n: n["widgets_values"].__setitem__(2, "sideways"),
    "a word for a switch": lambda n: n["widgets_values"].__setitem__(5, "on"),
    "an input too few": lambda n: (n["inputs"].pop(4), n["widgets_values"].pop(3)),
    "inputs in another order": lambda n: n["inputs"].insert(4, n["inputs"].pop(3)),
}


@pytest.mark.parametrize("harm", BREAK_CUSTOM.values(), ids=BREAK_CUSTOM)
def test_check_finds_a_broken_custom_preset(harm, demo, infos):
    harm(open_custom(demo))
    assert problems(demo, infos)


@pytest.mark.parametrize("harm", BREAK.values(), ids=BREAK)
def test_check_finds_a_broken_workflow(harm, demo, infos):
    node = next(node for node in demo["nodes"] if node["type"] == "WanTrimTokens")
    into = [link for link in demo["links"] if link[3] == node["id"]]
    harm(node, into)
    assert problems(demo, infos)


@pytest.mark.parametrize("name", DEMOS)
def test_demo_runs_as_it_is_and_writes_its_videos(workflow, server, infos):
    prompt = to_api(workflow, infos)
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    videos = saved(server, entry)
    assert len(videos) == sum(node["class_type"].startswith("Save") for node in prompt.values())
    for video in videos:
        frames, height, width, _ = frames_of(video).shape
        beside = video.name.startswith("start_here")
        assert (frames, height) == (PIXEL_FRAMES, SIDE)
        assert width >= 2 * SIDE if beside else width == SIDE
    report = texts(entry)
    assert "; a step took " in report and "WanModel: " in report
    assert "did not finish" not in report
    assert "nothing: everything ran as planned" in report
    assert "Traceback" not in server.log


def pictures(prompt: dict) -> dict:
    """The prompt with its videos saved as pictures and nothing else; video encoders are not exact."""
    decoders = [key for key, node in prompt.items() if node["class_type"] == "VAEDecode"]
    for key in decoders:
        kinds = {node["class_type"] for node in needed_by(prompt, key).values()}
        inputs = {"images": [key, 0]}
        inputs["filename_prefix"] = "with" if "WanTrimTokens" in kinds else "without"
        prompt[f"save {key}"] = {"class_type": "SaveImage", "inputs": inputs}
    return only_for(prompt, "SaveImage")


def both_videos(server, prompt: dict) -> np.ndarray:
    """Frames [2, f, h, w, c] of the video with WanTrim and of the one without."""
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    found = np.stack([np.asarray(Image.open(file)) for file in saved(server, entry)])
    assert found.shape == (2 * PIXEL_FRAMES, SIDE, SIDE, 3)
    return found.reshape(2, PIXEL_FRAMES, SIDE, SIDE, 3)


def test_prune_ratio_zero_makes_the_same_pictures_as_without(demo, server, infos):
    prompt = pictures(with_inputs(to_api(demo, infos), "KSampler", steps=3))
    same = {}
    for ratio in (0.0, 0.4):
        videos = both_videos(server, with_inputs(prompt, "WanTrimTokens", prune_ratio=ratio))
        same[ratio] = np.array_equal(*videos)
    assert same == {0.0: True, 0.4: False}


def with_preset(prompt: dict, name: str, **inputs) -> dict:
    """A prompt in API form with another preset and its inputs."""
    changed = copy.deepcopy(prompt)
    for node in changed.values():
        if node["class_type"] == "WanTrimTokens":
            nested = tiny.choice(name, **inputs)
            for key, value in nested.items():
                node["inputs"][key if key == "preset" else f"preset.{key}"] = value
    return changed


def test_preset_and_its_inputs_arrive_over_http(demo, server, infos):
    prompt = pictures(with_inputs(to_api(demo, infos), "KSampler", steps=3))
    made = {
        "auto": with_preset(prompt, "auto"),
        "paper": with_preset(prompt, "paper"),
        # begins with the paper's values
        "custom": with_preset(prompt, "custom"),
        "other": with_preset(prompt, "custom", reselect_every=3),
    }
    videos = {name: both_videos(server, wanted)[0] for name, wanted in made.items()}
    assert np.array_equal(videos["custom"], videos["paper"])
    for name, other in itertools.combinations(["auto", "paper", "other"], 2):
        assert not np.array_equal(videos[name], videos[other]), (name, other)


def refused(server, prompt: dict) -> str:
    status, answer = server.post("/prompt", {"prompt": prompt})
    assert status == 400
    return json.dumps(answer["node_errors"])


@pytest.mark.parametrize(
    ("kind", "inputs", "says"),
    [
        ("WanTrimDemoPrompt", {"prompt": "a cat"}, "does not know the prompt 'a cat'"),
        ("WanTrimTokens", {"prune_ratio": 0.8}, "0.75"),
        ("WanTrimTokens", {"start_percent": 4}, "start_percent"),
    ],
)
def test_wrong_input_is_refused_before_the_run(kind, inputs, says, demo, server, infos):
    prompt = only_for(to_api(demo, infos), "WanTrimReport")
    assert says in refused(server, with_inputs(prompt, kind, **inputs))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"schedule": "sideways"}, ["preset.schedule: 'sideways' not in ['falling', ", "rising"]),
        ({"alpha": 2}, ["preset.alpha", "2.0 bigger than max of 1.0"]),
        ({"reselect_every": 0}, ["preset.reselect_every", "0 smaller than min of 1"]),
        ({"alpha": "much"}, ["preset.alpha", "much", "FLOAT"]),
    ],
    ids=str,
)
def test_wrong_input_of_a_preset_is_refused_before_the_run(inputs, says, demo, server, infos):
    prompt = only_for(to_api(demo, infos), "WanTrimReport")
    errors = refused(server, with_preset(prompt, "custom", **inputs))
    for part in says:
        assert part in errors


def test_missing_input_of_a_preset_is_refused_before_the_run(demo, server, infos):
    prompt = with_preset(only_for(to_api(demo, infos), "WanTrimReport"), "custom")
    for node in prompt.values():
        node["inputs"].pop("preset.alpha", None)
    errors = refused(server, prompt)
    assert "Required input is missing" in errors and "preset.alpha" in errors


def test_server_serves_the_pack(server, infos):
    assert "IMPORT FAILED" not in server.log
    assert set(infos) >= NODE_IDS
    assert {infos[node]["python_module"] for node in NODE_IDS} == {f"custom_nodes.{FOLDER}"}


@pytest.mark.parametrize("node", sorted(NODE_IDS))
def test_server_serves_the_help_pages(node, server, root):
    page = root / "web" / "docs" / node / "en.md"
    assert page.is_file(), f"{page} is missing"
    assert server.get(f"/extensions/{FOLDER}/docs/{node}/en.md") == page.read_bytes()


@every
def test_server_offers_the_workflows(name, server, root):
    assert name in server.json("/api/workflow_templates")[FOLDER]
    for ending in ("json", "jpg"):
        file = root / "workflows" / f"{name}.{ending}"
        assert file.is_file(), f"{file} is missing"
        assert server.get(f"/api/workflow_templates/{FOLDER}/{file.name}") == file.read_bytes()


@every
def test_only_the_app_opens_as_one_and_shows_what_is_there(workflow, name):
    """ComfyUI's page lists a template as an app by its name, and opens it as one by linearMode."""
    extra = workflow["extra"]
    assert name.endswith(".app") == bool(extra.get("linearMode")) == ("linearData" in extra)
    if name != APP:
        return
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, widget, *_ in extra["linearData"]["inputs"]:
        [given] = [given for given in nodes[number]["inputs"] if given["name"] == widget]
        assert given["widget"] == {"name": widget} and given["link"] is None
    outputs = {nodes[number]["type"] for number in extra["linearData"]["outputs"]}
    assert outputs == {"SaveVideo", "WanTrimReport"}


def test_server_log_is_clean_at_the_end(server):
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("change", "says"),
    [
        # ComfyUI does not check a choice that reveals inputs
        (
            # of an earlier version
            lambda i: i.update({"preset": "refresh"}),
            "preset: expected one of auto, paper, custom, got none of them. Choose one at the node: "
            "the workflow may be from another version of WanTrim",
        ),
        (lambda i: i.pop("preset"), "preset: expected one of auto, paper, custom"),
        (
            lambda i: i.update({"start_percent": 0.6, "end_percent": 0.4}),
            "start_percent (0.6) is after end_percent (0.4); swap them",
        ),
    ],
    ids=["an unknown preset", "no preset", "inputs that exclude each other"],
)
def test_node_says_what_comfyui_let_pass(change, says, demo, server, infos):
    """Behind the test of the log: ComfyUI prints a traceback for every error of a node."""
    prompt = with_preset(only_for(to_api(demo, infos), "WanTrimReport"), "custom")
    for node in prompt.values():
        if node["class_type"] == "WanTrimTokens":
            change(node["inputs"])
    entry = server.run(prompt)
    [error] = [told for kind, told in entry["status"]["messages"] if kind == "execution_error"]
    assert error["node_type"] == "WanTrimTokens"
    assert error["exception_message"].startswith("WanTrim Tokens: ")
    assert says in error["exception_message"]
