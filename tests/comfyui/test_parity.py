"""The tiny Wans are the same functions in ComfyUI as in diffusers, the four-step LoRA's too."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import comfy.sd
import comfy.utils
from wantrim.nodes import demo
from wantrim.tests.comfyui import tiny
from wantrim.toy.worlds import FIRST, SECOND

CHECKPOINT, CHECKPOINT_2, LORA = FIRST.checkpoint, SECOND.checkpoint, SECOND.four_step_lora
WEIGHTS = {CHECKPOINT: [CHECKPOINT], CHECKPOINT_2: [CHECKPOINT_2, LORA]}
AGAIN = "run .venv/bin/python tests/make_reference.py from the repository root and commit the file"


@pytest.fixture(scope="module", params=WEIGHTS, ids=lambda path: path.stem)
def checkpoint(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def reference(root, checkpoint) -> dict[str, torch.Tensor]:
    file = root / "tests" / "data" / f"{checkpoint.stem}_reference.safetensors"
    with safe_open(file, "pt") as header:
        wanted = header.metadata()["weights_sha256"]
    weights = b"".join(path.read_bytes() for path in WEIGHTS[checkpoint])
    found = hashlib.sha256(weights).hexdigest()
    if found != wanted:
        pytest.fail(
            f"{checkpoint.name} or its LoRA changed after {file.name} was made from it (sha256 of "
            f"the weights {found[:12]}, of the reference's {wanted[:12]}): {AGAIN}"
        )
    return load_file(file)


def load(checkpoint: Path):
    return comfy.sd.load_diffusion_model(str(checkpoint), {"dtype": torch.float32})


@pytest.fixture(scope="module")
def network(checkpoint):
    return load(checkpoint).model.diffusion_model


def test_output_equals_diffusers(reference, network):
    assert type(network).__name__ == "WanModel"
    made = network(reference["x"], reference["timestep"], reference["text"])
    assert made.shape == reference["output"].shape
    assert reference["output"].std() > 0.1
    torch.testing.assert_close(made, reference["output"], rtol=0, atol=1e-4)


def test_output_with_the_lora_equals_diffusers(root):
    """Through the host's own LoRA loader, as people run Wan in four steps."""
    reference = load_file(root / "tests" / "data" / f"{CHECKPOINT_2.stem}_reference.safetensors")
    weights = comfy.utils.load_torch_file(str(LORA), safe_load=True)
    model, _ = comfy.sd.load_lora_for_models(load(CHECKPOINT_2), None, weights, 1.0, 0.0)
    model.patch_model()
    made = model.model.diffusion_model(reference["x"], reference["timestep"], reference["text"])
    torch.testing.assert_close(made, reference["with_lora"], rtol=0, atol=1e-4)
    assert not torch.allclose(made, reference["output"], atol=1e-2)


def test_output_depends_on_every_input(reference, network):
    made = network(reference["x"], reference["timestep"], reference["text"])
    changes = {"x": 1.1, "timestep": 0.9, "text": 0.5}
    for name, factor in changes.items():
        changed = {**reference, name: reference[name] * factor}
        other = network(changed["x"], changed["timestep"], changed["text"])
        # the last prompt is empty
        rows = [0, 1] if name == "text" else [0, 1, 2]
        assert ((other - made)[rows].abs().amax((1, 2, 3, 4)) > 1e-3).all(), name


def test_checkpoint_as_the_demo_node_loads_it_computes_in_fp32(root):
    reference = load_file(root / "tests" / "data" / f"{CHECKPOINT.stem}_reference.safetensors")
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
