"""The example workflows, checked against and run on a real server."""

import copy
import json

import av
import numpy as np
import pytest
from PIL import Image

from wantrim.tests.comfyui.server import FOLDER, running
from wantrim.tests.comfyui.workflow_tools import graphs, problems, to_api

DEMOS = ["wantrim_demo_t2v", "wantrim_demo_i2v"]
WORKFLOWS = [*DEMOS, "wan2.1_t2v_tokens", "wan2.2_i2v_14b_tokens"]
PIXEL_FRAMES, SIDE = 17, 96
NODE_IDS = [
    "WanTrimTokens",
    "WanTrimReport",
    "WanTrimDemoModel",
    "WanTrimDemoPrompt",
    "WanTrimDemoImage",
]
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
def demo(root):
    return json.loads((root / "workflows" / "wantrim_demo_t2v.json").read_text("utf-8"))


def frames_of(path) -> np.ndarray:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def saved(server, entry) -> list:
    """Files that a run wrote to the output folder."""
    found = []
    for output in entry["outputs"].values():
        for group in ("images", "gifs", "video"):
            for file in output.get(group, []):
                if file["type"] == "output":
                    found.append(server.base / "output" / file["subfolder"] / file["filename"])
    return sorted(found)


def texts(entry) -> str:
    return "\n".join(
        "\n".join(map(str, o["text"])) for o in entry["outputs"].values() if "text" in o
    )


def with_inputs(prompt: dict, kind: str, /, **inputs) -> dict:
    """A copy of a prompt in which all nodes of a kind have these inputs."""
    changed = copy.deepcopy(prompt)
    hit = [node for node in changed.values() if node["class_type"] == kind]
    assert hit, kind
    for node in hit:
        assert set(inputs) <= set(node["inputs"])
        node["inputs"].update(inputs)
    return changed


def only_for(prompt: dict, kind: str) -> dict:
    """What the nodes of a kind need of a prompt: the host runs other outputs despite an error."""
    pending = [key for key, node in prompt.items() if node["class_type"] == kind]
    needed = set()
    while pending:
        key = pending.pop()
        needed.add(key)
        links = [value for value in prompt[key]["inputs"].values() if isinstance(value, list)]
        pending += [link[0] for link in links if link[0] not in needed]
    return {key: node for key, node in prompt.items() if key in needed}


@every
def test_workflow_fits_the_nodes(workflow, infos):
    assert problems(workflow, infos) == []


@every
def test_workflow_has_the_node_a_version_and_a_picture(workflow, root, name):
    nodes = [node for found, _ in graphs(workflow) for node in found]
    ours = [node for node in nodes if node["type"].startswith("WanTrim")]
    assert "WanTrimTokens" in {node["type"] for node in ours}
    assert {node["properties"]["cnr_id"] for node in ours} == {"wantrim"}
    others = {node["properties"]["cnr_id"] for node in nodes if node not in ours}
    assert others <= {"comfy-core"}
    assert (root / "workflows" / f"{name}.jpg").is_file()


def test_no_other_workflow_is_shipped_unchecked(root):
    assert {file.stem for file in (root / "workflows").glob("*.json")} == set(WORKFLOWS)


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
        assert frames_of(video).shape == (PIXEL_FRAMES, SIDE, SIDE, 3)
    report = texts(entry)
    assert "WanTrim on WanModel" in report
    assert "did not finish" not in report and "no sampling run" not in report
    assert "nothing: everything ran as planned" in report
    assert "Traceback" not in server.log


def test_prune_ratio_zero_makes_the_same_pictures_as_without(demo, server, infos):
    prompt = with_inputs(to_api(demo, infos), "KSampler", steps=3)
    # the video encoder runs in threads and is not exact
    decoders = [key for key, node in prompt.items() if node["class_type"] == "VAEDecode"]
    for key in decoders:
        inputs = {"images": [key, 0], "filename_prefix": f"from_{key}"}
        prompt[f"save {key}"] = {"class_type": "SaveImage", "inputs": inputs}
    prompt = only_for(prompt, "SaveImage")
    same = {}
    for ratio in (0.0, 0.4):
        entry = server.run(with_inputs(prompt, "WanTrimTokens", prune_ratio=ratio))
        assert entry["status"]["status_str"] == "success"
        pictures = np.stack([np.asarray(Image.open(file)) for file in saved(server, entry)])
        assert pictures.shape == (2 * PIXEL_FRAMES, SIDE, SIDE, 3)
        same[ratio] = np.array_equal(*pictures.reshape(2, PIXEL_FRAMES, SIDE, SIDE, 3))
    assert same == {0.0: True, 0.4: False}


@pytest.mark.parametrize(
    ("kind", "inputs", "says"),
    [
        ("WanTrimDemoPrompt", {"prompt": "a cat"}, "does not know the prompt 'a cat'"),
        ("WanTrimTokens", {"prune_ratio": 0.9}, "0.8"),
        ("WanTrimTokens", {"importance": "taste"}, "taste"),
    ],
)
def test_wrong_input_is_refused_before_the_run(kind, inputs, says, demo, server, infos):
    prompt = only_for(to_api(demo, infos), "WanTrimReport")
    prompt = with_inputs(prompt, kind, **inputs)
    status, answer = server.post("/prompt", {"prompt": prompt})
    assert status == 400
    assert says in json.dumps(answer["node_errors"])


def test_server_serves_the_pack(server, infos):
    assert "IMPORT FAILED" not in server.log
    assert set(NODE_IDS) <= set(infos)
    assert {infos[node]["python_module"] for node in NODE_IDS} == {f"custom_nodes.{FOLDER}"}


@pytest.mark.parametrize("node", NODE_IDS)
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


def test_server_log_is_clean_at_the_end(server):
    assert "Traceback" not in server.log
