"""The student and the router that training made of the tiny Wan, by the nodes, in a real ComfyUI."""

import pytest
import torch
from safetensors.torch import load_file

from wantrim.hosts.comfyui.attach import attachment_of
from wantrim.nodes.blocks import WanTrimBlocks
from wantrim.nodes.demo import WanTrimDemoModel, WanTrimDemoPrompt
from wantrim.nodes.files import DEMO_FILES, DEMO_STUDENT, find_file, list_files
from wantrim.nodes.slim import WanTrimLoadSlim
from wantrim.slim.file import read_header
from wantrim.slim.router import load_router
from wantrim.tests.comfyui import put, tiny

BUDGET = {"k_min": 0.4, "k_max": 0.7}
SIZE = (5, 12, 12)


@pytest.fixture(scope="module")
def given(root):
    data = root / "tests" / "data"
    made = load_file(data / "slim_reference.safetensors")
    return load_file(data / "tiny_wan_reference.safetensors") | {"student": made["student"]}


@pytest.fixture
def student():
    return WanTrimLoadSlim.execute(DEMO_STUDENT).result[0]


def routed(model, **changes):
    choice = {"router": "trained", "router_file": DEMO_STUDENT}
    inputs = put.BLOCKS | BUDGET | changes
    return WanTrimBlocks.execute(model=model, router=choice, **inputs).result


def sampled(model, steps=4):
    text = WanTrimDemoPrompt.execute("a red circle moving right slowly on a black background")
    nothing = WanTrimDemoPrompt.execute("")
    given = tiny.Case(text.result[0], nothing.result[0], torch.zeros(1, 16, *SIZE))
    return tiny.ksampler(model, given, steps=steps)


def test_it_is_in_the_lists_and_its_files_say_what_they_are():
    for folder, file in DEMO_FILES.items():
        assert list_files(folder)[-1] == DEMO_STUDENT and find_file(folder, DEMO_STUDENT) == file
    assert DEMO_STUDENT not in list_files("diffusion_models")
    stages = read_header(DEMO_FILES["wantrim_slim"]).made["trained"]
    assert [stage["stage"] for stage in stages] == ["width", "router", "router"]
    assert (stages[-1]["k_min"], stages[-1]["k_max"]) == (BUDGET["k_min"], BUDGET["k_max"])
    assert load_router(DEMO_FILES["wantrim_routers"]).kind == "latent"


def test_output_equals_diffusers(student, given):
    network = student.model.diffusion_model
    made = network(given["x"], given["timestep"], given["text"])
    torch.testing.assert_close(made.float(), given["student"], rtol=0, atol=1e-3)
    assert float((given["student"] - given["output"]).norm()) > 0


def test_the_router_leaves_out_what_the_budget_asks_for(student):
    model, text = routed(student)
    # the router's own numbers
    assert "11 at 100%" in text and "6 at 0%" in text
    out = sampled(model)
    ran = [step.blocks_run for step in tiny.report_of(model).steps]
    assert len(ran) == 4 and all(2 <= count < 16 for count in ran) and ran[0] > ran[-1]
    assert attachment_of(model).plan.blocks.router.name == "trained"
    whole = sampled(student)
    assert out.isfinite().all() and not torch.equal(out, whole)


def test_a_budget_of_all_blocks_is_exact(student):
    model, _ = routed(student, k_min=1.0, k_max=1.0)
    assert torch.equal(sampled(model, 2), sampled(student, 2))


def test_the_full_model_is_not_the_routers(student):
    """Training moved the tables that tell models apart, so the router goes with its student."""
    assert attachment_of(routed(student)[0]) is not None
    with pytest.raises(ValueError, match="trained for another model"):
        routed(WanTrimDemoModel.execute().result[0])
