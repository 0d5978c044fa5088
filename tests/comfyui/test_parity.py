"""The tiny Wan is the same function in ComfyUI as in diffusers."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import comfy.sd
from wantrim.nodes import demo
from wantrim.tests.comfyui import tiny

AGAIN = "run .venv/bin/python tests/make_reference.py from the repository root and commit the file"


@pytest.fixture(scope="module")
def reference(root) -> dict[str, torch.Tensor]:
    file = root / "tests" / "data" / "tiny_wan_reference.safetensors"
    with safe_open(file, "pt") as header:
        wanted = header.metadata()["checkpoint_sha256"]
    found = hashlib.sha256(demo.CHECKPOINT.read_bytes()).hexdigest()
    if found != wanted:
        pytest.fail(
            f"{demo.CHECKPOINT.name} changed after {file.name} was made from it (sha256 of the "
            f"checkpoint {found[:12]}, of the reference's {wanted[:12]}): {AGAIN}"
        )
    return load_file(file)


@pytest.fixture(scope="module")
def network():
    model = comfy.sd.load_diffusion_model(str(demo.CHECKPOINT), {"dtype": torch.float32})
    return model.model.diffusion_model


def test_output_equals_diffusers(reference, network):
    assert type(network).__name__ == "WanModel"
    made = network(reference["x"], reference["timestep"], reference["text"])
    assert made.shape == reference["output"].shape
    assert reference["output"].std() > 0.1
    torch.testing.assert_close(made, reference["output"], rtol=0, atol=1e-4)


def test_output_depends_on_every_input(reference, network):
    made = network(reference["x"], reference["timestep"], reference["text"])
    changes = {"x": 1.1, "timestep": 0.9, "text": 0.5}
    for name, factor in changes.items():
        changed = {**reference, name: reference[name] * factor}
        other = network(changed["x"], changed["timestep"], changed["text"])
        rows = [0, 1] if name == "text" else [0, 1, 2]
        assert ((other - made)[rows].abs().amax((1, 2, 3, 4)) > 1e-3).all(), name


def test_checkpoint_as_the_demo_node_loads_it_computes_in_fp32(reference):
    model = demo.WanTrimDemoModel.execute().result[0]
    assert model.model.get_dtype_inference() == torch.float32
    made = model.model.diffusion_model(reference["x"], reference["timestep"], reference["text"])
    torch.testing.assert_close(made, reference["output"], rtol=0, atol=1e-4)


def test_neutral_and_trimmed_on_the_tiny_wan():
    model = demo.WanTrimDemoModel.execute().result[0]
    prompts = demo.WanTrimDemoPrompt.execute(demo.PROMPT).result[0]
    negative = demo.WanTrimDemoPrompt.execute("").result[0]
    given = tiny.Case(prompts, negative, tiny.empty_latent(5, 12, 12))
    expected = tiny.sample(model, given)
    neutral = tiny.trimmed(model, reselect_every=1)
    assert torch.equal(tiny.sample(neutral, given), expected)
    patched = tiny.trimmed(model, reselect_every=4)
    assert not torch.allclose(tiny.sample(patched, given), expected, atol=1e-3)
    assert tiny.report_of(patched).kept_share < 0.8
