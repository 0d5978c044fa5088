"""What the page is told while a model samples, in process and over a real server's socket."""

import asyncio
import json
import sys
import time
from types import SimpleNamespace

import aiohttp
import pytest
import torch

from comfy.model_management import InterruptProcessingException
from comfy_execution.utils import CurrentNodeContext
from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
from wantrim.engine.plan import TrimPlan
from wantrim.engine.record import join_records
from wantrim.hosts.comfyui import live
from wantrim.hosts.comfyui.attach import attach, attachment_of
from wantrim.hosts.comfyui.live import EVENT, tell_node
from wantrim.nodes.blocks import WanTrimBlocks
from wantrim.nodes.heads import WanTrimHeads
from wantrim.nodes.report import WanTrimReport
from wantrim.nodes.tokens import WanTrimTokens
from wantrim.nodes.tuned import WanTrimCandidates
from wantrim.report.figures import step_work
from wantrim.report.line import outcome
from wantrim.report.words import record_text
from wantrim.tests.comfyui import put, server, tiny
from wantrim.tests.comfyui.test_heads import heads

SOON = 120


class Page:
    """Stands in for PromptServer with a page at its socket."""

    def __init__(self):
        self.client_id = "page"
        self.sent: list[tuple[dict, str]] = []

    def send_sync(self, event, data, sid=None):
        assert event == EVENT
        # as it goes over the socket
        self.sent.append((json.loads(json.dumps(data)), sid))


@pytest.fixture
def page(monkeypatch):
    made = Page()
    fake = SimpleNamespace(PromptServer=SimpleNamespace(instance=made))
    monkeypatch.setitem(sys.modules, "server", fake)
    return made


def at(node: str):
    return CurrentNodeContext("prompt 1", node)


def patched(node: str = "3", **options):
    with at(node):
        return tiny.trimmed(tiny.base_model(), **options)


def test_every_step_is_told_to_the_page_that_queued_the_run(page):
    model = patched()
    with at("9"):
        tiny.sample(model, steps=3)
    events = [data for data, sid in page.sent if sid == "page"]
    assert len(events) == len(page.sent) == 4
    about = {"nodes": ["3"], "prompt": "prompt 1", "steps": 3}
    assert all(about.items() <= event.items() for event in events)
    assert len({event["run"] for event in events}) == 1
    *steps, end = events
    assert [event["step"] for event in steps] == [1, 2, 3]
    report = tiny.report_of(model)
    for event, step in zip(steps, report.steps, strict=True):
        shares = [100 * kept / step.grid.tokens for kept in step.tokens_per_block]
        assert event["kept"] == pytest.approx(shares, abs=0.51)
        assert event["work"] == step_work(report, step) < 1
    # what is done so far, as no dial knows what is to come
    assert steps[1]["outcome"]["steps"] == 2 and steps[1]["line"].startswith("all 2 steps at ")
    came = outcome(report)
    assert end["line"] == came.line() and end["outcome"]["part"] == came.part == 3
    assert end["outcome"]["least"] == list(came.least)
    assert end["done"] and end["finished"] and end["remarks"] == len(report.notes)


def test_a_repeated_step_is_told_as_what_it_is(page):
    with at("3"):
        model = tiny.shared(tiny.base_model(), 1.0, 1.0, 0.0, 0.45)
    tiny.sample(model, steps=4)
    *steps, end = [data for data, _ in page.sent]
    assert [set(event["kept"]) for event in steps] == [{100}, {100}, {0}, {45}]
    assert [event["work"] for event in steps[:3]] == [1, 1, 0] and 0 < steps[3]["work"] < 0.6
    assert steps[3]["line"].startswith("2 of 4 steps whole, 1 at two fifths, 1 repeated: ")
    assert end["remarks"] == 0


def test_what_is_told_while_it_runs_is_what_it_comes_to(page):
    with at("3"):
        model = put.dialled(
            WanTrimHeads.execute(tiny.base_model(), None, 0.25).result[0], speedup=1.5
        )
    tiny.sample(model, steps=8)
    *_, last, end = [data["outcome"] for data, _ in page.sent]
    assert end["patterned"] and end["whole"]
    names = ("steps", "whole", "part", "patterned", "repeated")
    assert [last[name] for name in names] == [end[name] for name in names]


@pytest.mark.parametrize("broken", ["send_sync", "client_id"])
def test_a_page_that_cannot_be_told_costs_no_run(page, monkeypatch, caplog, broken):
    def lost(*_):
        raise ConnectionError("gone")

    told = tiny.sample(patched(), steps=2)
    monkeypatch.setattr(page, broken, lost if broken == "send_sync" else object())
    if broken == "client_id":
        # what is no name cannot be sent
        monkeypatch.setattr(page, "send_sync", lost)
    assert torch.equal(tiny.sample(patched(), steps=2), told)
    assert "the page could not be told of a step" in caplog.text
    assert "the page could not be told of the end" in caplog.text


def test_a_line_is_shown_on_a_node_of_the_page_that_is_there(page, caplog):
    tell_node("3", "this host shows no lines")
    told = []
    page.send_progress_text = lambda *what: told.append(what)
    tell_node("3", "2 of 4")
    tell_node(None, "no node")
    assert told == [("2 of 4", "3", "page")]
    page.client_id = None
    tell_node("3", "no page")
    assert len(told) == 1 and not caplog.records
    # one of other arguments
    page.client_id, page.send_progress_text = "page", lambda: None
    tell_node("3", "gone")
    assert "the page could not be told" in caplog.text


@pytest.mark.parametrize(
    ("kept", "percent"), [(0, 0), (1, 1), (4, 1), (500, 50), (999, 99), (1000, 100)]
)
def test_only_all_is_all_and_only_none_is_none(kept, percent):
    assert live._percent(kept, 1000) == percent


def test_heads_in_their_patterns_are_told(page):
    with at("3"):
        model = attach(tiny.base_model(), TrimPlan(heads=heads()))
    tiny.sample(model, steps=1)
    told = page.sent[0][0]
    assert told["kept"] == [100] * tiny.LAYERS
    # block 1 lacks cross-attention heads
    assert told["patterned"] == [0, 1, 3]
    assert told["line"].startswith("1 step with heads in patterns")
    assert 0.5 < told["work"] < 1


def test_every_node_of_a_chain_shows_the_plan_that_it_is_part_of(page):
    with at("3"):
        first = tiny.at_node(tiny.base_model())
    with at("7:2"):
        second = attach(first, TrimPlan(tiny.token_plan(), heads()))
    with at("3"):
        again = attach(second, TrimPlan(tiny.token_plan()))
    nodes = [attachment_of(model).nodes for model in (first, second, again)]
    assert nodes == [("3",), ("3", "7:2"), ("7:2", "3")]
    tiny.sample(second, steps=1)
    assert page.sent[0][0]["nodes"] == ["3", "7:2"]


@pytest.mark.parametrize("node", [WanTrimTokens, WanTrimHeads, WanTrimBlocks])
def test_equal_nodes_are_not_one_to_the_hosts_cache(node):
    # the host's word for an id that counts among the inputs
    assert node.NOT_IDEMPOTENT


def test_the_page_changes_nothing_of_the_video(page):
    told = tiny.sample(patched(), steps=2)
    page.client_id = None
    count = len(page.sent)
    assert torch.equal(tiny.sample(patched(), steps=2), told)
    assert len(page.sent) == count
    sys.modules.pop("server")
    assert torch.equal(tiny.sample(patched(), steps=2), told)


def test_a_plan_that_no_node_made_is_told_to_nobody(page):
    tiny.sample(tiny.trimmed(tiny.base_model()), steps=1)
    assert not page.sent


def test_a_cancelled_run_says_so(page):
    def cancel(step, *_):
        if step == 1:
            raise InterruptProcessingException

    with pytest.raises(InterruptProcessingException):
        tiny.sample(patched(), steps=4, callback=cancel)
    assert page.sent[-1][0]["done"] and not page.sent[-1][0]["finished"]


def test_a_pairs_node_ends_with_what_both_experts_did(page):
    with at("3"):
        high, low = put.paired(tiny.base_model(), put.low_expert(), speedup=1.3)
    latent = tiny.empty_latent()
    for node, model, first, last in (("5", high, 0, 2), ("6", low, 2, 4)):
        with at(node):
            latent = tiny.ksampler_advanced(model, latent, first, last)
    ends = [data for data, _ in page.sent if data.get("done")]
    assert [end["outcome"]["steps"] for end in ends] == [2, 4]
    both = join_records([tiny.report_of(model) for model in (high, low)])
    assert ends[-1]["line"] == outcome(both).line() and ends[-1]["remarks"] == len(both.notes)
    # one alone is all that there is
    with CurrentNodeContext("prompt 2", "6"):
        tiny.ksampler_advanced(low, latent, 2, 4)
    assert page.sent[-1][0]["outcome"]["steps"] == 2


def test_candidates_of_a_trial_are_shown_on_no_node(page):
    with at("3"):
        model = tiny.at_node(tiny.base_model())
        model = WanTrimCandidates.execute(model, 1.5, 8, "few").result[0][1]
    with at("5"):
        tiny.ksampler(model, steps=8)
    assert not page.sent and len(tiny.report_of(model).steps) == 8


@pytest.mark.parametrize("options", [{"render": "final"}, {"speedup": 1.0}])
def test_a_run_that_nothing_was_left_out_of_says_so(page, options):
    with at("3"):
        model = put.dialled(tiny.base_model(), **options)
    tiny.sample(model)
    ((end, _),) = page.sent
    assert end["done"] and end["finished"] and end["untouched"] and "line" not in end
    tiny.sample(patched())
    assert page.sent[-1][0]["untouched"] is False


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_step_that_was_cancelled_is_no_other_nodes_answer(page, blocks):
    model, calls = patched(), []

    def cancel(func, *args, **kwargs):
        calls.append(1)
        # a self- and a cross-attention in each block, both prompts in one call
        if len(calls) == 1 + 2 * tiny.LAYERS * 2 + 2 * blocks:
            raise InterruptProcessingException
        return func(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = cancel
    with pytest.raises(InterruptProcessingException):
        tiny.sample(model, steps=8)
    end = page.sent[-1][0]
    assert end["line"].startswith("all 2 steps at ") and not end["finished"]
    text = record_text(tiny.report_of(model))
    assert "another node" not in text and "not finished" in text.splitlines()[-1]
    # in the first step there is nothing to say of
    calls[:] = [0] * 2 * tiny.LAYERS * 2
    with pytest.raises(InterruptProcessingException):
        tiny.sample(model, steps=8)
    assert "line" not in page.sent[-1][0]
    text = record_text(tiny.report_of(model))
    assert text.startswith(
        "The run did not finish (cancelled or failed). It did not come to the end"
    )
    WanTrimReport.execute(model, torch.rand(9, 64, 80, 3))


def test_a_sampler_of_two_calls_a_step_counts_by_the_schedule(page):
    tiny.sample(patched(), steps=3, sampler="heun")
    told = [data["step"] for data, _ in page.sent if "step" in data]
    assert told == sorted(told) and told[0] == 1 and told[-1] == 3 and len(told) == 5


@pytest.mark.parametrize("way", ["heun", "windows"])
def test_model_calls_are_not_called_steps(page, way):
    with at("3"):
        model = put.dialled(tiny.base_model())
    given = tiny.case(frames=9 if way == "windows" else 3)
    if way == "windows":
        windows = {
            "context_length": 17,
            "context_overlap": 4,
            "context_schedule": "standard_static",
        }
        windows |= {"context_stride": 1, "closed_loop": False, "fuse_method": "pyramid"}
        model = WanContextWindowsManualNode.execute(model, **windows, freenoise=False).result[0]
    tiny.ksampler(model, given, steps=12, sampler="heun" if way == "heun" else "euler")
    *_, last, end = [data for data, _ in page.sent]
    assert " of 12 steps " in last["line"]
    count = {"heun": 23, "windows": 24}[way]
    assert f" of {count} model calls " in end["line"] and end["outcome"]["calls"]
    said = record_text(tiny.report_of(model))
    assert "a model call took" in said and "a step took" not in said and "call  sigma" in said


def test_a_real_server_tells_it_over_its_socket(comfyui, root, tmp_path):
    """Two chains with equal settings: each node gets the map of its own run."""
    prompt = {
        "1": {"class_type": "WanTrimDemoModel", "inputs": {}},
        "2": {
            "class_type": "WanTrimTokens",
            "inputs": {
                "model": ["1", 0],
                "prune_ratio": 0.3,
                "preset": "auto",
                "start_percent": 0.0,
                "end_percent": 1.0,
            },
        },
        "3": {"class_type": "WanTrimDemoPrompt", "inputs": {"prompt": ""}},
        "4": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 96, "height": 96, "length": 17, "batch_size": 1},
        },
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["2", 0], "positive": ["3", 0], "negative": ["3", 0],
                "latent_image": ["4", 0], "seed": 1, "steps": 4, "cfg": 1.0,
                "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 1]}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
    }  # fmt: skip

    again = {name: f"1{name}" for name in "2567"}
    prompt |= {
        again[name]: {
            **prompt[name],
            "inputs": {
                key: [again.get(value[0], value[0]), value[1]] if isinstance(value, list) else value
                for key, value in prompt[name]["inputs"].items()
            },
        }
        for name in again
    }

    async def listen(running) -> list[dict]:
        told = []
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{running.port}") as session,
            session.ws_connect("/ws?clientId=me") as socket,
        ):
            page = {"extra_pnginfo": {"workflow": {"id": "of the page"}}}
            queued = {"prompt": prompt, "client_id": "me", "extra_data": page}
            answer = await session.post("/prompt", json=queued)
            assert answer.status == 200, await answer.text()
            until = time.monotonic() + SOON
            while time.monotonic() < until:
                message = await socket.receive(timeout=SOON)
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                data = json.loads(message.data)
                if data["type"] == EVENT:
                    told.append(data["data"])
                assert data["type"] != "execution_error", data
                if data["type"] == "execution_success":
                    return told
        raise AssertionError(running.log[-3000:])

    with server.running(comfyui, root, tmp_path / "base") as running:
        told = asyncio.run(listen(running))
    assert len(told) == 10 and {event["workflow"] for event in told} == {"of the page"}
    for node in ("2", "12"):
        mine = [event for event in told if event["nodes"] == [node]]
        assert [event.get("step") for event in mine] == [1, 2, 3, 4, None]
        assert mine[0]["work"] == 1 and set(mine[0]["kept"]) == {100}
        # the dial's plan from the first step on, and then what came of it
        planned, done = mine[0]["outcome"], mine[-1]["outcome"]
        # the first steps may have shown that another plan is better
        counted, last = ("steps", "whole", "part", "repeated"), mine[-2]["outcome"]
        assert [last[name] for name in counted] == [done[name] for name in counted]
        assert planned["steps"] == 4 and planned["whole"] < 4 and planned["faster"] is None
        assert done["less"] == pytest.approx(planned["less"], rel=0.02)
        assert mine[-1]["finished"]
