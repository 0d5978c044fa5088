"""A report is of the run whose images it was given, over all its samplers, and never raises."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch

from wantrim.hosts.comfyui.attach import attachment_of
from wantrim.hosts.comfyui.runs import ImagesOf, Ran, Where, before_node, keep_run, runs_before
from wantrim.nodes.compare import WanTrimCompare
from wantrim.nodes.report import WanTrimReport
from wantrim.nodes.wantrim import FINAL
from wantrim.report.picture import overlay, videos_in
from wantrim.tests.comfyui import put, tiny
from wantrim.tests.comfyui.server import running
from wantrim.tests.comfyui.workflow_tools import texts
from wantrim.toy import CHECKPOINT

NOT_THESE = "did not sample these images"
STEPS = 4


@pytest.fixture(scope="module")
def server(comfyui, root, tmp_path_factory):
    with running(comfyui, root, tmp_path_factory.mktemp("server") / "base") as server:
        yield server


def sampler(model="shift", latent="latent", first=0, last=STEPS, steps=STEPS, seed=31) -> dict:
    on = ("disable", "enable")
    return {
        "class_type": "KSamplerAdvanced",
        "inputs": {
            "model": [model, 0], "positive": ["prompt", 0], "negative": ["empty", 0],
            "latent_image": [latent, 0], "add_noise": on[first == 0], "noise_seed": seed,
            "steps": steps, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple",
            "start_at_step": first, "end_at_step": last,
            "return_with_leftover_noise": on[last < steps],
        },
    }  # fmt: skip


def workflow(seed=31, **nodes) -> dict:
    """The tiny Wan with WanTrim, a sampler and a report; `nodes` are added or take the place."""

    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    dial = {"speedup": 1.5, "render": "draft", "dense_first_steps": 1, "dense_last_steps": 0}
    size = {"width": 96, "height": 96, "length": 5, "batch_size": 1}
    return {
        "model": node("WanTrimDemoModel"),
        "prompt": node("WanTrimDemoPrompt", prompt="a red circle moving right slowly on a black background"),
        "empty": node("WanTrimDemoPrompt", prompt=""),
        "latent": node("EmptyHunyuanLatentVideo", **size),
        "dial": node("WanTrim", model=["model", 0], context="auto", **dial),
        "shift": node("ModelSamplingSD3", model=["dial", 0], shift=3.0),
        "bare": node("ModelSamplingSD3", model=["model", 0], shift=3.0),
        "sampler": sampler(seed=seed),
        "images": node("VAEDecode", samples=["sampler", 0], vae=["model", 1]),
        "report": node("WanTrimReport", model=["shift", 0], images=["images", 0]),
        **nodes,
    }  # fmt: skip


def said(server, prompt: dict) -> str:
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    return texts(entry)


def test_a_report_is_never_of_an_earlier_run(server):
    assert f"{STEPS} steps" in said(server, workflow())
    # the sampler that made these images has another model now
    text = said(server, workflow(sampler=sampler("bare", seed=32)))
    assert NOT_THESE in text and "steps," not in text and "as planned" not in text
    # and the images of another sampler are not this model's either
    other = workflow(seed=33)
    other["other"] = sampler("bare", seed=33)
    other["images"]["inputs"]["samples"] = ["other", 0]
    other["keep"] = copy.deepcopy(workflow()["images"])
    other["shown"] = {"class_type": "PreviewImage", "inputs": {"images": ["keep", 0]}}
    assert NOT_THESE in said(server, other)


def test_a_sampler_that_was_not_run_again_still_made_its_images(server):
    first = said(server, workflow(seed=41))
    again = workflow(seed=41)
    again["report"]["inputs"]["measure_dense_step"] = True
    text = said(server, again)
    # the same run, to the hundredth of a second
    line = next(line for line in first.splitlines() if " s in all" in line)
    assert line in text and NOT_THESE not in text


def test_a_run_over_two_samplers_is_one_report(server):
    prompt = workflow(
        seed=51,
        half=sampler(first=0, last=4, steps=8, seed=51),
        sampler=sampler(latent="half", first=4, last=8, steps=8, seed=51),
    )
    text = said(server, prompt)
    rows = [line.split() for line in text.splitlines() if line[:4].strip().isdigit()]
    sigmas = [float(row[1]) for row in rows if len(row) > 4]
    assert len(sigmas) == 8 and sigmas == sorted(sigmas, reverse=True)
    assert "8 steps" in text and "; then 1.50x" in text


@pytest.fixture
def experts(server) -> tuple[str, str]:
    """Names of two files of the tiny Wan, for Load Diffusion Model."""
    folder, names = server.base / "models/diffusion_models", ("high.safetensors", "low.safetensors")
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(CHECKPOINT, folder / name)
    return names


def both_experts(names: tuple[str, str], **low) -> dict:
    """Both experts under one wish, by a sampler of two calls a step, which nobody announces."""
    prompt = workflow(
        low=sampler("low_shift", "sampler", first=5, last=12, steps=12),
        sampler=sampler(first=0, last=5, steps=12),
    )
    for node, name in zip(("expert", "other"), names, strict=True):
        inputs = {"unet_name": name, "weight_dtype": "default"}
        prompt[node] = {"class_type": "UNETLoader", "inputs": inputs}
    dial = prompt["dial"]["inputs"]
    dial |= {"model_high_noise": ["expert", 0], "model_low_noise": ["other", 0], "boundary": 0.0}
    del dial["model"]
    prompt["dial"]["class_type"] = "WanTrimPair"
    prompt["low_shift"] = copy.deepcopy(prompt["shift"])
    prompt["low_shift"]["inputs"]["model"] = ["dial", 1]
    for node in ("sampler", "low"):
        prompt[node]["inputs"]["sampler_name"] = "dpmpp_2s_ancestral"
    prompt["low"]["inputs"] |= low
    prompt["images"]["inputs"]["samples"] = ["low", 0]
    prompt["report"]["inputs"]["model_low_noise"] = ["low_shift", 0]
    return prompt


def test_the_low_noise_expert_knows_a_high_one_that_was_not_run_again(server, experts):
    found = []
    for cfg in (4.0, 4.5):
        # the second time with another guidance of the low noise expert alone
        text = said(server, both_experts(experts, cfg=cfg))
        came = re.match(r"Asked 1\.5x, did (\d\.\d+)x", text)
        assert float(came[1]) == pytest.approx(1.5, rel=0.03) and NOT_THESE not in text
        assert text.count("everything ran as planned") == 2
        rows = [line.split() for line in text.splitlines() if line[:4].strip().isdigit()]
        found.append([row[:3] + row[4:] for row in rows if len(row) > 4])
    assert len(found[0]) > 20 and found[0] == found[1]


def test_what_stands_before_a_sampler_is_known_by_the_graph(monkeypatch):
    def link(*nodes):
        return {"class_type": "S", "inputs": {f"in{i}": [node, 0] for i, node in enumerate(nodes)}}

    graph = {"high": link(), "low": link("high"), "high 2": link(), "low 2": link("high 2")}
    monkeypatch.setattr("wantrim.hosts.comfyui.runs._running_prompt", lambda _: graph)
    runs = [
        Ran(object(), where(node, prompt, graph), expert=node.split()[0])
        for node, prompt in (("high", "p"), ("high 2", "q"), ("low 2", "q"))
    ]

    def before(node: str, prompt="q") -> list[str]:
        return [ran.where.node for ran in runs_before(runs, where(node, prompt, graph))]

    # the first one is of an earlier prompt, and nothing before it has changed since
    assert before("low") == ["high"] and before("low 2") == ["high 2", "low 2"]
    graph["high"]["inputs"]["seed"] = 2
    assert before("low") == []
    # a node that another one put in: what ran in this prompt
    put_in = Where("q", "loop.0.a")
    assert [ran.where.node for ran in runs_before(runs, put_in)] == ["high 2", "low 2"]
    # without a server
    alone = [Ran(object()), Ran(object(), expert="low")]
    assert runs_before(runs + alone, None) == alone


def where(node: str, prompt: str, graph: dict) -> Where:
    return Where(prompt, node, 0, before_node(graph, node))


class Prompt:
    """ComfyUI's prompt with nodes that others put in."""

    def __init__(self, graph: dict, put_in: dict):
        self.graph, self.put_in = graph, put_in

    def has_node(self, node):
        return node in self.graph

    def get_node(self, node):
        return self.graph[node]

    def get_display_node_id(self, node):
        return self.put_in.get(node, node)


def test_runs_of_nodes_that_other_nodes_put_in_are_theirs(monkeypatch):
    graph = {
        "loop": {"class_type": "Loop", "inputs": {}},
        "other": {"class_type": "Other", "inputs": {}},
        "report": {"class_type": "R", "inputs": {"images": ["loop", 0], "model": ["other", 0]}},
    }
    context = type("Context", (), {"prompt_id": "p", "node_id": "report", "list_index": 0})
    monkeypatch.setattr("wantrim.hosts.comfyui.runs.get_executing_context", lambda: context)

    def images() -> ImagesOf:
        put_in = {"loop.0.a": "loop", "loop.0.b": "loop"}
        return ImagesOf(Prompt(graph, put_in), "report", "images")

    runs: list[Ran] = []
    for node, prompt in (("loop.0.a", "p"), ("loop.0.b", "p"), ("other", "p"), ("loop.0.c", "o")):
        keep_run(runs, Ran(object(), where(node, prompt, graph)))
    assert [ran.where.node for ran in images().find(runs)] == ["loop.0.a", "loop.0.b"]
    # of a node in an earlier prompt only what is still the same
    monkeypatch.setattr(context, "prompt_id", "next")
    keep_run(runs, Ran(object(), where("loop", "p", graph)))
    assert [ran.where.node for ran in images().find(runs)] == ["loop"]
    graph["loop"]["inputs"]["seed"] = 2
    assert images().find(runs) == []


# pictures that other nodes make of a video
PICTURES = {
    "with alpha": torch.rand(9, 64, 80, 4),
    "grey": torch.rand(9, 64, 80, 1),
    "grey with a mask": torch.rand(9, 64, 80, 2),
    "one picture": torch.rand(64, 80, 3),
    "a batch of videos": torch.rand(2, 9, 64, 80, 3),
    "half precision": torch.rand(9, 64, 80, 3).half(),
    "not a number": torch.full((9, 64, 80, 3), torch.nan),
    "a pixel": torch.rand(9, 1, 1, 3),
    "a strip": torch.rand(9, 2000, 1, 3),
    "none": torch.rand(0, 64, 80, 3),
    "a latent": {"samples": torch.rand(1, 16, 3, 8, 10)},
    "nothing": None,
}


@pytest.mark.parametrize("images", PICTURES.values(), ids=PICTURES)
def test_a_report_draws_whatever_came_as_images(images):
    model = put.dialled(tiny.base_model())
    tiny.sample(model, steps=4)
    text, picture, figures = WanTrimReport.execute(model, images, measure_dense_step=True).result
    assert "4 steps" in text and "could not be drawn" not in text
    assert picture.shape[-1] == 3 and torch.isfinite(picture).all() and picture.std() > 0.01
    assert len(json.loads(figures)["reports"][0]["steps"]) == 4


def test_a_page_that_cannot_be_drawn_and_a_step_that_cannot_be_timed_end_nothing(monkeypatch):
    model = tiny.at_node(tiny.base_model())
    tiny.sample(model, steps=4)

    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr("wantrim.report.picture._work_bars", broken)
    monkeypatch.setattr("wantrim.nodes.report.time_dense_step", broken)
    text, picture, _ = WanTrimReport.execute(
        model, torch.rand(9, 64, 80, 3), measure_dense_step=True
    ).result
    assert "4 steps" in text and picture.ndim == 4
    assert "no whole step was timed: the model could not be run apart (ZeroDivisionError)" in text


def test_an_expert_without_a_step_is_said_beside_the_other():
    high, low = put.paired(tiny.base_model(), put.low_expert())
    nothing = tiny.ksampler_advanced(high, tiny.empty_latent(), 0, 0)
    tiny.ksampler_advanced(low, nothing, 0, 4)
    text, _, figures = WanTrimReport.execute(high, torch.rand(9, 64, 80, 3), low).result
    counts = [len(one["steps"]) for one in json.loads(figures)["reports"]]
    assert counts == [0, 4] and "the model at 'model' was not sampled" in text


def test_every_video_of_a_batch_has_its_own_tint():
    """Blue where its own tokens were left out."""
    model = tiny.trimmed(tiny.base_model(), 0.5)
    tiny.sample(model, tiny.case(batch=2), steps=2)
    coverage = tiny.report_of(model).coverage().numpy()
    assert len(coverage) == 2 and not np.array_equal(*coverage)
    frames = 4 * (tiny.FRAMES - 1) + 1
    assert [videos_in(n, coverage) for n in (frames, 2 * frames, 2 * frames - 1)] == [None, 2, None]
    video = np.ones((2 * frames, 64, 80, 3), np.float32)
    shown = overlay(video, coverage, range(2 * frames))
    for sample in range(2):
        for latent in range(tiny.FRAMES):
            tint = 1 - shown[sample * frames + 4 * latent, ::16, ::16, 0]
            light = coverage[sample, latent]
            assert np.corrcoef(tint.ravel(), light.ravel())[0, 1] < -0.99


def test_two_nodes_that_want_the_same_are_said():
    model = put.dialled(put.dialled(tiny.base_model(), speedup=2.5), speedup=1.5)
    tiny.sample(model, steps=4)
    assert any("the last one counts (1.50x), and not 2.50x" in note for note in put.notes(model))
    off = put.dialled(model, speedup=1.0)
    tiny.sample(off, steps=2)
    assert any("the last one counts (1.00x), and not 1.50x" in note for note in put.notes(off))
    final = put.dialled(model, render=FINAL)
    tiny.sample(final, steps=2)
    assert not put.notes(final)
    tokens = tiny.trimmed(tiny.trimmed(tiny.base_model(), 0.5), 0.7)
    tiny.sample(tokens, steps=2)
    assert any("two WanTrim Tokens nodes" in note for note in put.notes(tokens))
    twice = tiny.at_node(tiny.at_node(tiny.base_model(), "paper"), "paper", prune_ratio=0.5)
    tiny.sample(twice, steps=2)
    assert any("two WanTrim Tokens nodes" in note for note in put.notes(twice))
    # a final render is not trimmed by either
    final = put.dialled(put.dialled(tiny.base_model(), speedup=2.5), render="final")
    tiny.sample(final, steps=2)
    assert not put.notes(final)
    # and other parts stay
    both = put.dialled(tiny.at_node(tiny.base_model(), "paper"))
    tiny.sample(both, steps=4)
    assert not any("two" in note for note in put.notes(both))


def test_only_the_last_runs_are_kept():
    model = put.dialled(tiny.base_model())
    for _ in range(3):
        tiny.sample(model, steps=2)
    assert len(attachment_of(model).runs) == 1


def test_what_is_compared_may_be_grey_or_have_a_mask():
    one, other = torch.rand(5, 32, 32, 4), torch.rand(5, 32, 32, 4)
    colour = WanTrimCompare.execute(one, other).result[0]
    assert WanTrimCompare.execute(one[..., :3], other).result[0] == colour
    assert "PSNR" in WanTrimCompare.execute(one[..., :1], other[..., :1]).result[0]
    with pytest.raises(ValueError, match="'trimmed' got no pictures"):
        WanTrimCompare.execute(one, None)
