"""Runs inside a real ComfyUI, in process, on the CPU."""

import inspect
import sys
from pathlib import Path

import comfy.cli_args

# before anything else of comfy is imported: it looks for a device at import
comfy.cli_args.args.cpu = True
comfy.cli_args.args.use_pytorch_cross_attention = True

import pytest  # noqa: E402
import torch  # noqa: E402

from comfy.ldm.wan.model import WanModel  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

COMFYUI = Path(comfy.cli_args.__file__).resolve().parents[1]
if str(COMFYUI) not in sys.path:
    sys.path.append(str(COMFYUI))


# ComfyUI 0.29.0 and newer; many tests look at the blocks through them
HAS_BLOCK_PATCHES = '"double_block" in patches' in inspect.getsource(WanModel.forward_orig)


@pytest.fixture(autouse=True)
def block_patches(monkeypatch):
    """Tests that patch the blocks of a Wan are left out where this ComfyUI never asks the patch."""
    if not HAS_BLOCK_PATCHES:
        said = "this ComfyUI has no block patches for Wan: 0.29.0 and newer have"
        monkeypatch.setattr(
            ModelPatcher, "set_model_double_block_patch", lambda *_: pytest.skip(said)
        )


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the ComfyUI that runs the suite."""
    return COMFYUI


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the matrix when its cells were run."""
    found = {
        outcome: sum("test_matrix.py" in r.nodeid for r in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed")
    }
    if any(found.values()):
        from wantrim.tests.comfyui import matrix

        said = ", ".join(f"{count} {outcome}" for outcome, count in found.items())
        terminalreporter.section(f"what works with what: {said}")
        terminalreporter.write_line(matrix.embedded())


@pytest.fixture(autouse=True)
def as_a_node_runs():
    """ComfyUI executes nodes under inference mode."""
    with torch.inference_mode():
        yield
