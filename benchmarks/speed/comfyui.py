"""The speed bench inside of ComfyUI: its own Wan network with random weights, sampled by it.

The bench starts ComfyUI's interpreter, which measures one plan after the other and hands each over as
a line of JSON when it is done.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ...engine.context import Room
from ...engine.plan import TrimPlan
from ...solve.dial import flops
from ...solve.floor import Rates
from .plans import (
    COMPILED_PLANS,
    PARTIAL,
    PINNED,
    PLANS,
    SIGMAS,
    TEXT_TOKENS,
    Size,
    plans,
    ratio,
    steady_work,
)
from .scale import Scale, measured_rates
from .traffic import peak_bytes

Row = dict[str, object]
ROOT = Path(__file__).resolve().parents[2]
# makes `wantrim` mean this folder, whatever its name, without running the root __init__.py
LAUNCH = """
import importlib.util, sys
from importlib.machinery import ModuleSpec
root, comfyui, *rest = sys.argv[1:]
sys.argv[1:], sys.path[:0] = rest, [comfyui]
spec = ModuleSpec("wantrim", loader=None, is_package=True)
spec.submodule_search_locations = [root]
sys.modules["wantrim"] = importlib.util.module_from_spec(spec)
import comfy.options
comfy.options.enable_args_parsing()
from wantrim.benchmarks.speed.comfyui import main
main()
"""
# of a run; the first may compute all, and warms up
STEPS = 5
# turns of a plan, each of which is all steps of a run
TURNS = 2
# seconds between looks for what was measured
PAUSE = 0.1


def find_comfyui(given: Path | None = None) -> Path | None:
    """ComfyUI's folder, looked for as the tests do (tests/run_comfyui.sh); None where there is none.

    Raises:
        ValueError: there is none in the folder that was named.
    """

    def there(folder: Path) -> bool:
        return (folder / "main.py").is_file() and (folder / "comfy").is_dir()

    named = given or os.environ.get("COMFYUI_PATH")
    if named:
        if not there(Path(named)):
            raise ValueError(
                f"expected ComfyUI's folder, with main.py and comfy/ in it, got {named}"
            )
        return Path(named).resolve()
    around = [ROOT.parents[1]] if ROOT.parent.name == "custom_nodes" else []
    return next(filter(there, [*around, Path.home() / "comfy" / "ComfyUI"]), None)


def interpreter(comfyui: Path) -> str:
    """What runs a ComfyUI.

    Raises:
        ValueError: it is not known.
    """
    found = [comfyui / name / "bin" / "python" for name in (".venv", "venv")]
    named = [os.environ.get("COMFYUI_PYTHON"), *(str(path) for path in found if path.exists())]
    python = next(filter(None, named), None)
    if python is None:
        raise ValueError(
            f"--comfyui: {comfyui} has neither .venv nor venv with an interpreter; set COMFYUI_PYTHON"
        )
    return python


def rows_in_comfyui(
    row: Callable[..., Row],
    size: Size,
    scale: Scale,
    comfyui: Path,
    compiled: str = "no",
    seconds: float | None = None,
) -> Iterator[list[Row]]:
    """A size of the GPU's bench in ComfyUI, with its compile node or without.

    Args:
        row: makes one from a size, a plan's name and milliseconds.
        seconds: as in `time_in_comfyui`.
    """
    began = time.monotonic()
    options = {"names": PLANS if compiled == "no" else COMPILED_PLANS, "compiled": compiled}
    rates = measured_rates(size, scale)
    left = None if seconds is None else seconds - (time.monotonic() - began)
    turns, cpu = min(TURNS, scale.rounds), scale.device == "cpu"
    for made in comfyui_rows(row, size, comfyui, rates, turns, cpu=cpu, seconds=left, **options):
        yield [made]


def comfyui_rows(
    row: Callable[..., Row], size: Size, comfyui: Path, rates: Rates | None, rounds: int, **options
) -> Iterator[Row]:
    """Whole steps of ComfyUI's own sampling, dense and trimmed in turns; a row as each is known.

    Args:
        rates: of the device; None counts every FLOP as any other.
        options: of `time_in_comfyui`.
    """
    whole = steady_work(size, TrimPlan())
    cost = flops if rates is None else rates.seconds
    for found in time_in_comfyui(comfyui, size, rounds, **options):
        predicted = ratio(cost, whole, steady_work(size, _plan(size, found["plan"])))
        state = size.grid.tokens * size.dim * getattr(torch, found["dtype"]).itemsize
        yield row(
            size, found["plan"], found["taken"], predicted=predicted, host="comfyui",
            device=found["device"], dtype=found["dtype"], compiled=options.get("compiled", "no"),
            peak_mb=found["peak"] / 2**20,
            extra_states=(found["peak"] - found["dense_peak"]) / state,
        )  # fmt: skip


def time_in_comfyui(
    comfyui: Path,
    size: Size,
    rounds: int,
    *,
    cpu: bool = False,
    compiled: str = "no",
    names: Sequence[str] = (),
    seconds: float | None = None,
) -> Iterator[dict[str, object]]:
    """Yield what ComfyUI's interpreter measures of one plan after the other.

    Args:
        comfyui: a checkout.
        cpu: in fp32.
        compiled: backend of ComfyUI's own compile node, or "no".
        names: of plans; none are all.
        seconds: that it may take; None is as long as it takes.

    Yields:
        "plan", "device", "dtype", "taken": milliseconds (dense, trimmed); "peak" and "dense_peak":
        most bytes that a run held beyond the weights.

    Raises:
        ValueError: no interpreter there.
        subprocess.CalledProcessError: it failed.
        subprocess.TimeoutExpired: it was stopped when its time was used up.
    """
    ends = None if seconds is None else time.monotonic() + seconds
    sizes = [size.dim, size.heads, size.ffn_dim, size.blocks, *size.latent]
    with TemporaryDirectory() as folder:
        result = Path(folder) / "rows.jsonl"
        result.touch()
        command = [interpreter(comfyui), "-c", LAUNCH, ROOT, comfyui, "--size", *sizes]
        command += ["--rounds", rounds, "--compiled", compiled, "--out", result]
        command += ["--names", *(names or plans(size)), *(["--cpu"] if cpu else [])]
        command = [str(part) for part in command]
        # a group of its own, with what compiles for it
        child = subprocess.Popen(command, cwd=folder, start_new_session=True)
        try:
            with result.open(encoding="utf-8") as lines:
                running, rest = True, ""
                while running:
                    # what was written before its end is read behind it
                    running = child.poll() is None
                    *whole, rest = (rest + lines.read()).split("\n")
                    yield from map(json.loads, whole)
                    if running and ends is not None and time.monotonic() >= ends:
                        raise subprocess.TimeoutExpired(command[:1], seconds)
                    time.sleep(PAUSE if running else 0)
            if child.returncode:
                raise subprocess.CalledProcessError(child.returncode, command[:1])
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _plan(size: Size, name: str) -> TrimPlan:
    return plans(size)[PARTIAL if name == PINNED else name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs=7, type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compiled", default="no")
    parser.add_argument("--names", nargs="+", required=True)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    # ComfyUI reads the command line, and looks for a device, when it is imported
    sys.argv[1:] = ["--cpu"] if args.cpu else []
    from .timing import compiled_model, random_model, seconds_per_step

    dim, heads, ffn_dim, blocks, *latent = args.size
    size = Size("", dim, heads, ffn_dim, blocks, tuple(latent))
    dtype = torch.float32 if args.cpu else torch.bfloat16
    name = "cpu" if args.cpu else torch.cuda.get_device_name()
    known = {"device": name, "dtype": str(dtype).removeprefix("torch.")}
    with torch.inference_mode(), args.out.open("a", encoding="utf-8") as out:
        model = random_model(size.shape, dtype)
        if args.compiled != "no":
            model = compiled_model(model, args.compiled)

        def step(plan: TrimPlan | None = None, room: Room | None = None) -> float:
            given = (size.latent, SIGMAS[:STEPS], TEXT_TOKENS)
            return 1000 * seconds_per_step(model, plan, *given, room=room)

        # to warm up, and to have the weights where they stay
        step()
        dense_peak = peak_bytes(step)
        for plan_name in args.names:
            room = Room(torch.device("cpu")) if plan_name == PINNED else None
            given = (_plan(size, plan_name), room)
            # what is trimmed is warm, or compiled, then
            peak = peak_bytes(lambda given=given: step(*given))
            taken = [(step(), step(*given)) for _ in range(args.rounds)]
            found = {"plan": plan_name, "taken": taken, "peak": peak, "dense_peak": dense_peak}
            out.write(json.dumps({**known, **found}) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
