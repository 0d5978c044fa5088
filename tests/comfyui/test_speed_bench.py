"""The half of the speed bench that samples in ComfyUI, started as the bench starts it."""

import pytest

from wantrim.benchmarks.speed_comfyui import time_in_comfyui
from wantrim.benchmarks.speed_plans import Size, plans

SMALL = Size("small", 48, 4, 64, 4, (3, 8, 8))


def test_every_plan_is_timed_in_turns_with_dense(comfyui, tmp_path):
    if not any((comfyui / name / "bin" / "python").exists() for name in (".venv", "venv")):
        pytest.skip(f"{comfyui.name} has no interpreter in .venv or venv for the bench to start")
    found = time_in_comfyui(comfyui, SMALL, 2, tmp_path, cpu=True)
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert found["taken"].keys() == plans(SMALL).keys()
    for turns in found["taken"].values():
        assert len(turns) == 2 and all(took > 0 for turn in turns for took in turn)


def test_a_folder_without_an_interpreter_is_named(tmp_path):
    with pytest.raises(ValueError, match="--comfyui: .* has neither .venv nor venv"):
        time_in_comfyui(tmp_path, SMALL, 1, tmp_path)
