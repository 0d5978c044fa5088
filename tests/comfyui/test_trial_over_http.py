"""The template of WanTrim Candidates and WanTrim Verdict on a real server with the tiny Wan."""

import json
import re
import time
import urllib.request

import pytest

from wantrim.benchmarks.rows import check_row
from wantrim.tests.comfyui.server import running
from wantrim.tests.comfyui.workflow_tools import saved, texts, to_api, with_inputs

NAME = "wantrim_demo_tuned"


@pytest.fixture(scope="module")
def server(comfyui, root, tmp_path_factory):
    with running(comfyui, root, tmp_path_factory.mktemp("trial") / "base") as server:
        yield server


@pytest.fixture(scope="module")
def prompt(server, root) -> dict:
    workflow = json.loads((root / "workflows" / f"{NAME}.json").read_text("utf-8"))
    api = to_api(workflow, server.json("/object_info"))
    return with_inputs(api, "WanTrimCandidates", steps=8)


def done(server, prompt: dict) -> tuple[dict, str]:
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    return entry, texts(entry)


def row_in(prompt: dict, entry: dict) -> dict:
    """The row to share, as the page shows it."""
    [verdict] = [key for key, node in prompt.items() if node["class_type"] == "WanTrimVerdict"]
    [key] = [k for k, node in prompt.items() if node["inputs"].get("source") == [verdict, 3]]
    return check_row(json.loads("".join(entry["outputs"][key]["text"])))


def test_template_samples_every_candidate_and_keeps_the_best(prompt, server):
    entry, said = done(server, prompt)
    row = row_in(prompt, entry)
    assert len(row["rows"]) == 9 and row["best"] is not None
    [heads] = [one for one in row["rows"] if one["name"] == "heads"]
    assert heads["failed"].startswith("not tried: attention is ")
    others = [one for one in row["rows"] if one is not heads]
    assert all(one["failed"] is None and one["seconds"] > 0 for one in others)
    assert not any(one["cached"] for one in others)
    assert "Best at 1.5x: " in said and "Kept in tiny_wan.safetensors" in said
    assert (server.base / "models/wantrim/profiles/tiny_wan.safetensors").is_file()
    [video] = saved(server, entry)
    assert video.stat().st_size > 1000
    numbers = [int(n) for n in re.findall(r"WanTrim Candidates: (\d) of 9", server.log)]
    assert numbers == [number for number in range(1, 10) if number != 7]

    # only the name is another: nothing is sampled, and nothing is timed as 0 s
    again, said = done(server, with_inputs(prompt, "WanTrimVerdict", filename="other"))
    other = row_in(prompt, again)
    assert all(one["cached"] for one in other["rows"] if one["name"] != "heads")
    seconds = [[one["seconds"] for one in r["rows"]] for r in (row, other)]
    assert seconds[0] == seconds[1] and "cached: sampled in an earlier run" in said


def test_kept_profile_is_gone_by(prompt, server):
    loaded = {"class_type": "WanTrimLoadProfile", "inputs": {"filename": "tiny_wan.safetensors"}}
    [candidates] = [k for k, n in prompt.items() if n["class_type"] == "WanTrimCandidates"]
    inputs = {"model": prompt[candidates]["inputs"]["model"], "speedup": 1.5, "render": "draft"}
    inputs |= {"dense_first_steps": 1, "dense_last_steps": 0, "context": "auto"}
    tuned = {"class_type": "WanTrim", "inputs": {**inputs, "profile": ["loaded", 0]}}
    shorter = {**prompt, "loaded": loaded, "tuned": tuned}
    [verdict] = [k for k, n in prompt.items() if n["class_type"] == "WanTrimVerdict"]
    shorter = {
        key: node
        for key, node in shorter.items()
        if key != verdict and [verdict, 0] not in node["inputs"].values()
    }
    for key, node in shorter.items():
        node = shorter[key] = {**node, "inputs": dict(node["inputs"])}
        for name, value in node["inputs"].items():
            if value == [candidates, 0]:
                node["inputs"][name] = ["tuned", 0]
            elif value == [candidates, 2]:
                node["inputs"][name] = 8
    shorter = {
        k: n for k, n in shorter.items() if verdict not in str(n["inputs"]) and k != candidates
    }
    [decoder] = [k for k, n in shorter.items() if n["class_type"] == "VAEDecode"]
    [shift] = [k for k, n in shorter.items() if n["class_type"] == "ModelSamplingSD3"]
    report = {"model": [shift, 0], "images": [decoder, 0], "measure_dense_step": False}
    shorter = {k: n for k, n in shorter.items() if not n["class_type"].startswith("Create")}
    shorter = {k: n for k, n in shorter.items() if not n["class_type"].startswith("Save")}
    shorter["report"] = {"class_type": "WanTrimReport", "inputs": report}
    _, said = done(server, shorter)
    assert "your trial chose" in said or "solved by the whole run of your trial" in said


def test_cancelled_trial_goes_on_where_it_was(prompt, server):
    long = with_inputs(with_inputs(prompt, "WanTrimCandidates", steps=40), "PrimitiveInt", value=3)
    before = server.log.count("WanTrim Candidates: 2 of 9")
    status, answer = server.post("/prompt", {"prompt": long})
    assert status == 200, answer
    until = time.monotonic() + 120
    while server.log.count("WanTrim Candidates: 2 of 9") == before:
        assert time.monotonic() < until, server.log[-2000:]
        time.sleep(0.05)
    # it answers with nothing
    urllib.request.urlopen(f"http://127.0.0.1:{server.port}/interrupt", b"", timeout=30).close()
    while answer["prompt_id"] not in (history := server.json("/history")):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert history[answer["prompt_id"]]["status"]["status_str"] == "error"
    entry, _ = done(server, long)
    assert "WanTrim Candidates: whole was finished before and is taken" in server.log
    cached = {one["name"]: one["cached"] for one in row_in(long, entry)["rows"]}
    assert cached == {name: name == "whole" for name in cached}


def test_server_log_has_no_error_but_the_cancel(server):
    assert server.log.count("Traceback") == 0
