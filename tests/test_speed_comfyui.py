"""What the speed bench does around ComfyUI: rows, time, and where it is; without one."""

import time

import pytest

from wantrim.benchmarks.speed import __main__ as speed
from wantrim.benchmarks.speed import comfyui as speed_comfyui
from wantrim.benchmarks.speed import gpu as speed_gpu
from wantrim.benchmarks.speed.gpu import gpu_rows
from wantrim.benchmarks.speed.plans import PARTIAL, PINNED, Size, plans, steady_work
from wantrim.benchmarks.speed.scale import DRY
from wantrim.engine.plan import TrimPlan

SMALL = Size("small", 48, 4, 64, 8, (3, 8, 8))


def test_rows_of_comfyui_have_the_prediction_of_their_plan(monkeypatch, tmp_path):
    taken, found = [(30.0, 20.0), (33.0, 22.0)], {"device": "some GPU", "dtype": "bfloat16"}
    names = [*plans(SMALL), PINNED]
    # two hidden states more than dense, of 48 tokens of 48 numbers
    peaks = {"peak": 2**20, "dense_peak": 2**20 - 2 * 48 * 48 * 2}
    found = [{**found, **peaks, "plan": name, "taken": taken} for name in names]
    monkeypatch.setattr(speed_comfyui, "time_in_comfyui", lambda *given, **options: iter(found))
    rows = list(speed_comfyui.comfyui_rows(speed.row, SMALL, tmp_path, None, 2))
    assert [made["plan"] for made in rows] == names
    for made in rows:
        named = plans(SMALL)[PARTIAL if made["plan"] == PINNED else made["plan"]]
        work = steady_work(SMALL, named).flops
        expected = steady_work(SMALL, TrimPlan()).flops / work if work else ""
        assert made["predicted"] == expected
        assert (made["host"], made["device"], made["speedup"]) == ("comfyui", "some GPU", 1.5)
        assert (made["peak_mb"], made["extra_states"]) == (1.0, 2.0)


def stand_in(folder, lines: str):
    """An interpreter that writes a line of JSON for each plan, as ComfyUI's would."""
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nwhile [ "$1" != --out ]; do shift; done\nout=$2\n{lines}\n')
    python.chmod(0o755)
    return folder


def test_what_comfyui_measured_is_kept_when_the_time_is_used_up(tmp_path, monkeypatch, caplog):
    row = '{"plan": "%s", "device": "cpu", "dtype": "float32", "taken": [[2, 1]], "peak": 8, '
    row = (row + '"dense_peak": 8}') % PARTIAL
    folder = stand_in(tmp_path, f"echo '{row}' >> $out\nsleep 60 & wait")
    monkeypatch.setattr(speed_gpu, "SIZES", (("14B", "480p"),))
    monkeypatch.setattr(speed_comfyui, "measured_rates", lambda *given: None)
    others = ("kernel_rows", "_time_size", "_overhead_rows", "attention_rows")
    for name in others:
        monkeypatch.setattr(speed_gpu, name, lambda *given: iter(()))
    began = time.monotonic()
    rows = [made for (made,) in gpu_rows(speed.row, folder, DRY, 2.0)]
    assert time.monotonic() - began < 20
    assert [(made["plan"], made["host"]) for made in rows] == [(PARTIAL, "comfyui")]
    assert f"{DRY.size('14B', '480p').name}, ComfyUI: not to its end" in caplog.text
    assert "ComfyUI, compiled: not measured, the time is used up" in caplog.text


def test_comfyui_is_found_as_the_tests_find_it(tmp_path, monkeypatch):
    def make(folder):
        (folder / "comfy").mkdir(parents=True)
        (folder / "main.py").touch()
        return folder

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(speed_comfyui, "ROOT", tmp_path / "alone" / "wantrim")
    assert speed_comfyui.find_comfyui() is None
    home = make(tmp_path / "comfy" / "ComfyUI")
    assert speed_comfyui.find_comfyui() == home
    around = make(tmp_path / "around")
    monkeypatch.setattr(speed_comfyui, "ROOT", around / "custom_nodes" / "wantrim")
    assert speed_comfyui.find_comfyui() == around
    named, given = make(tmp_path / "named"), make(tmp_path / "given")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert speed_comfyui.find_comfyui() == named
    assert speed_comfyui.find_comfyui(given) == given
    with pytest.raises(ValueError, match="expected ComfyUI's folder"):
        speed_comfyui.find_comfyui(tmp_path)


def test_what_runs_comfyui(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    with pytest.raises(ValueError, match="--comfyui: .* has neither .venv nor venv"):
        speed_comfyui.interpreter(tmp_path)
    stand_in(tmp_path, "")
    assert speed_comfyui.interpreter(tmp_path) == str(tmp_path / ".venv" / "bin" / "python")
    monkeypatch.setenv("COMFYUI_PYTHON", "mine")
    assert speed_comfyui.interpreter(tmp_path) == "mine"
