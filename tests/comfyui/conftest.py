"""Runs inside a real ComfyUI, in process, on the CPU."""

import sys
from pathlib import Path

import comfy.cli_args

# before anything else of comfy is imported: it looks for a device at import
comfy.cli_args.args.cpu = True
comfy.cli_args.args.use_pytorch_cross_attention = True

import pytest  # noqa: E402
import torch  # noqa: E402

COMFYUI = Path(comfy.cli_args.__file__).resolve().parents[1]
if str(COMFYUI) not in sys.path:
    sys.path.append(str(COMFYUI))


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the ComfyUI that runs the suite."""
    return COMFYUI


@pytest.fixture(autouse=True)
def as_a_node_runs():
    """ComfyUI executes nodes under inference mode."""
    with torch.inference_mode():
        yield
