"""Makes `wantrim` mean this folder, whatever its name, without running the root __init__.py."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

PACK = "wantrim"
ROOT = Path(__file__).resolve().parent.parent

if PACK not in sys.modules:
    spec = ModuleSpec(PACK, loader=None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    sys.modules[PACK] = importlib.util.module_from_spec(spec)

# tests/comfyui needs ComfyUI's own interpreter: tests/run_comfyui.sh
HAS_COMFYUI = importlib.util.find_spec("comfy") is not None
collect_ignore = [] if HAS_COMFYUI else ["comfyui"]


def pytest_report_header() -> str | None:
    return None if HAS_COMFYUI else "tests/comfyui is left out: no ComfyUI in this interpreter"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT
