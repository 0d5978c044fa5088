"""The half of the speed bench that samples in ComfyUI, started as the bench starts it."""

import pytest

from wantrim.benchmarks.speed.comfyui import interpreter, rows_in_comfyui, time_in_comfyui
from wantrim.benchmarks.speed.plans import COMPILED_PLANS, PINNED, PLANS, REPEATED
from wantrim.benchmarks.speed.rows import COLUMNS, row
from wantrim.benchmarks.speed.scale import DRY


@pytest.fixture(autouse=True)
def started(comfyui):
    try:
        interpreter(comfyui)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("compiled", "names"), [("no", PLANS), (DRY.compiled, COMPILED_PLANS)])
def test_the_gpus_part_in_comfyui_at_a_tiny_size(comfyui, compiled, names):
    """Through the same code, on the CPU."""
    size = DRY.size("14B", "480p")
    rows = [made for (made,) in rows_in_comfyui(row, size, DRY, comfyui, compiled)]
    assert [made["plan"] for made in rows] == [*names]
    for made in rows:
        assert set(made) == set(COLUMNS)
        assert (made["host"], made["device"], made["dtype"]) == ("comfyui", "cpu", "float32")
        assert made["compiled"] == compiled and made["case"] == size.name
        assert made["dense_ms"] > 0 and made["trimmed_ms"] > 0 and made["peak_mb"] > 0
        assert (made["predicted"] == "") == (made["plan"] == REPEATED)
    peaks = {made["plan"]: made["peak_mb"] for made in rows}
    # the profiler sees RAM, where all of it is
    assert compiled != "no" or peaks[PINNED] > peaks[REPEATED]


def test_its_time_is_a_limit(comfyui):
    """ComfyUI alone takes longer to import."""
    with pytest.raises(Exception, match="timed out"):
        list(time_in_comfyui(comfyui, DRY.size("14B", "480p"), 1, cpu=True, seconds=0.5))
