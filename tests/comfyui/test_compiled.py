"""A compiled model stays compiled: its own graphs for whole steps, two more for all others."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

import comfy.sd
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import attach
from wantrim.methods.heads import FRAME, FULL, OFF, HeadPlan
from wantrim.tests.comfyui import neighbours, tiny
from wantrim.tests.comfyui.put import low_expert

NO_FILTER, FILTER = None, {"guard_filter_fn": skip_torch_compile_dict}
ROW = (OFF, FRAME, *[FULL] * (tiny.HEADS - 2))
HEADS = HeadPlan((ROW,) * tiny.LAYERS, (ROW[:1] + (FULL,) * (tiny.HEADS - 1),) * tiny.LAYERS)
STEPS = (1, 1, 0.4, 1, 0, 0.3)


class Graphs:
    """A backend that compiles nothing, and counts what was traced and what ran."""

    def __init__(self):
        self.traced = self.ran = 0

    def __call__(self, graph, inputs):
        self.traced += 1

        def run(*args):
            self.ran += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def graphs():
    torch._dynamo.reset()
    counters.clear()
    yield Graphs()
    torch._dynamo.reset()


def put(model, backend, keys: str, options=FILTER):
    patched = model.clone()
    names = [f"diffusion_model.blocks.{i}" for i in range(tiny.LAYERS)]
    names = names if keys == "blocks" else ["diffusion_model"]
    options = None if options is None else dict(options)
    set_torch_compile_wrapper(patched, backend=backend, options=options, keys=names)
    return patched


def shares(model):
    return tiny.shared(model, *STEPS)


def shares_and_heads(model):
    return tiny.shared(model, *STEPS, heads=HEADS)


def heads(model):
    return attach(model, TrimPlan(heads=HEADS))


def check(trim, base, graphs, expected, further: int, ran: int, **options) -> None:
    def run():
        model = trim(base)
        return tiny.sample(model, steps=len(STEPS), **options), tiny.report_of(model).notes

    check_run(run, graphs, expected, further, ran)


def check_run(run, graphs, expected, further: int, ran: int) -> None:
    """A video of `run`, with its remarks: how many graphs it traces at most, and runs."""
    before, done = graphs.traced, graphs.ran
    video, notes = run()
    assert torch.equal(video, expected) and not notes
    assert graphs.traced - before <= further and graphs.ran - done == ran
    # one run more, in which nothing is new
    before, done = graphs.traced, graphs.ran
    assert torch.equal(run()[0], expected)
    assert (graphs.traced, graphs.ran - done) == (before, ran)
    assert not counters["graph_break"]


# graphs that run in 6 steps of 6 blocks: a whole step is the model's, or its blocks'; a repeated one
# is none; others are blocks', as are whole steps whose keys and values are kept for the next
RAN = {"whole": 1 + 4 * 6, "blocks": 5 * 6}


@pytest.mark.parametrize(
    ("trim", "keys", "options", "ran"),
    [
        (shares, "whole", FILTER, RAN["whole"]),
        (shares, "blocks", FILTER, RAN["blocks"]),
        (shares_and_heads, "whole", FILTER, 5 * 6),
        (tiny.trimmed, "whole", FILTER, 6 * 6),
        (heads, "whole", FILTER, 6 * 6),
        (shares_and_heads, "whole", NO_FILTER, 5 * 6),
        (shares_and_heads, "blocks", FILTER, 5 * 6),
        (tiny.trimmed, "blocks", FILTER, 6 * 6),
    ],
)
def test_two_further_graphs_at_most_and_no_break(graphs, trim, keys, options, ran):
    base = put(tiny.base_model(), graphs, keys, options)
    dense = tiny.sample(base, steps=6)
    expected = tiny.sample(trim(tiny.base_model()), steps=6)
    assert not torch.equal(dense, expected)
    check(trim, base, graphs, expected, 2, ran)
    # and the untouched model is what it was
    before = graphs.traced
    assert torch.equal(tiny.sample(base, steps=6), dense)
    assert graphs.traced == before


@pytest.mark.parametrize("keys", RAN)
def test_prompts_that_come_apart_use_the_same_graphs(graphs, keys):
    given = tiny.case(tokens=(7, 9))
    base = put(tiny.base_model(), graphs, keys)
    tiny.sample(base, given, steps=6)
    expected = tiny.sample(shares(tiny.base_model()), given, steps=6)
    # a second length of the text makes each of the two once more
    check(shares, base, graphs, expected, 4, 2 * RAN[keys], given=given)


@pytest.mark.parametrize(("keys", "ran"), [("whole", 2 * (1 + 2 * 6)), ("blocks", 6 * 6)])
def test_both_experts_of_a_pair_use_the_same_graphs(graphs, keys, ran):
    sigmas = tiny.simple_sigmas(tiny.base_model(), 6)

    def run(experts):
        video, notes = tiny.empty_latent(), []
        for first, expert in zip((0, 3), experts, strict=True):
            model = tiny.shared(expert, 1, 1, 0.4, sigmas=sigmas[first : first + 3])
            video = tiny.ksampler_advanced(model, video, first, first + 3, steps=6)
            notes += tiny.report_of(model).notes
        return video, notes

    own = tiny.base_model(), low_expert()
    compiled = [put(expert, graphs, keys) for expert in own]
    for expert in compiled:
        tiny.sample(expert, steps=1)
    expected, _ = run(own)
    check_run(lambda: run(compiled), graphs, expected, 2, ran)


def test_whole_steps_run_the_graph_of_the_untouched_model(graphs):
    base = put(tiny.base_model(), graphs, "whole")
    tiny.sample(base, steps=6)
    traced, ran = graphs.traced, graphs.ran
    assert (traced, ran) == (1, 6)
    # nothing is remembered but velocities: 4 whole steps and 2 that repeat them
    model = tiny.shared(base, 1, 1, 0, 1, 0, 1)
    expected = tiny.sample(tiny.shared(tiny.base_model(), 1, 1, 0, 1, 0, 1), steps=6)
    assert torch.equal(tiny.sample(model, steps=6), expected)
    assert (graphs.traced, graphs.ran) == (traced, ran + 4)


def test_behind_another_wrapper_blocks_run_compiled(graphs):
    """What is wrapped around us ran already, and the model's own graph may have it too."""
    told = []

    def other(executor, *args, **kwargs):
        told.append(True)
        return executor(*args, **kwargs)

    base = tiny.base_model().clone()
    base.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", other)
    model = tiny.shared(put(base, graphs, "whole"), 1, 1, 0, 1)
    expected = tiny.sample(tiny.shared(tiny.base_model(), 1, 1, 0, 1), steps=4)
    assert torch.equal(tiny.sample(model, steps=4), expected)
    assert len(told) == 4 and graphs.traced == 1 and graphs.ran == 3 * tiny.LAYERS


@pytest.mark.parametrize("keys", RAN)
def test_a_lora_that_changes_between_runs_is_seen(graphs, keys):
    base = put(tiny.base_model(), graphs, keys)
    tiny.sample(base, steps=1)
    expected = tiny.sample(shares(tiny.base_model()), steps=6)
    check(shares, base, graphs, expected, 2, RAN[keys])
    strong = comfy.sd.load_lora_for_models(base, None, neighbours.lora_weights(base), 2.0, 0)[0]
    eager = comfy.sd.load_lora_for_models(
        tiny.base_model(), None, neighbours.lora_weights(base), 2.0, 0
    )[0]
    check(shares, strong, graphs, tiny.sample(shares(eager), steps=6), 0, RAN[keys])


class _Breaks(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.inner(x)


def test_a_block_that_is_no_single_graph_runs_uncompiled_and_is_reported(graphs):
    """Behind the break the host's own graph would be entered, whose guards see no plan."""
    base = tiny.base_model().clone()
    key = "diffusion_model.blocks.1.ffn"
    base.add_object_patch(key, _Breaks(base.get_model_object(key)))
    base = put(base, graphs, "blocks")
    model = shares_and_heads(base)
    expected = tiny.sample(shares_and_heads(tiny.base_model()), steps=6)
    assert torch.equal(tiny.sample(model, steps=6), expected)
    (note,) = tiny.report_of(model).notes
    assert "could not make one graph" in note


def test_cuda_graphs_are_left_out_where_something_is_decided():
    ran = SimpleNamespace(count=0)

    def recording(graph, inputs):
        ran.count += 1
        return graph.forward

    base = put(tiny.base_model(), recording, "whole")
    base.model_options["torch_compile_kwargs"]["backend"] = "cudagraphs"
    model = shares(base)
    expected = tiny.sample(shares(tiny.base_model()), steps=6)
    assert torch.equal(tiny.sample(model, steps=6), expected)
    (note,) = tiny.report_of(model).notes
    assert "'cudagraphs' would replay" in note and ran.count == 1


def test_with_inductor_the_video_is_the_same_within_rounding():
    model = shares_and_heads(put(tiny.base_model(), "inductor", "blocks"))
    expected = tiny.sample(shares_and_heads(tiny.base_model()), steps=6)
    assert torch.allclose(tiny.sample(model, steps=6), expected, atol=1e-3, rtol=1e-3)
    assert tiny.shares(model) == pytest.approx(STEPS)
    assert not counters["graph_break"] and not tiny.report_of(model).notes
