"""The speed bench inside of ComfyUI: its own Wan network with random weights, sampled by it.

Runs in ComfyUI's interpreter, which the speed bench starts; results come back as a JSON file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..engine.plan import TrimPlan
from .speed_plans import SIGMAS, TEXT_TOKENS, Size, plans

ROOT = Path(__file__).resolve().parent.parent
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
from wantrim.benchmarks.speed_comfyui import main
main()
"""
# of a run; the first may compute all, and warms up
STEPS = 5


def time_in_comfyui(
    comfyui: Path,
    size: Size,
    rounds: int,
    folder: Path,
    *,
    cpu: bool = False,
    compiled: str = "no",
    names: Sequence[str] = (),
) -> dict[str, object]:
    """Milliseconds (dense, trimmed) of every plan by its name, measured by ComfyUI's interpreter.

    Args:
        comfyui: a checkout with its interpreter in .venv or venv.
        folder: for the results.
        cpu: in fp32.
        compiled: backend of ComfyUI's own compile node, or "no".
        names: of plans; none are all.

    Returns:
        "device", "dtype", and "taken": by plan.

    Raises:
        ValueError: no interpreter there.
        subprocess.CalledProcessError: it failed.
    """
    found = [comfyui / name / "bin" / "python" for name in (".venv", "venv")]
    python = next((path for path in found if path.exists()), None)
    if python is None:
        raise ValueError(f"--comfyui: {comfyui} has neither .venv nor venv with an interpreter")
    result = folder / "comfyui.json"
    sizes = [size.dim, size.heads, size.ffn_dim, size.blocks, *size.latent]
    command = [python, "-c", LAUNCH, ROOT, comfyui, "--size", *sizes, "--rounds", rounds]
    command += ["--compiled", compiled, "--names", *(names or plans(size))]
    command += ["--out", result, *(["--cpu"] if cpu else [])]
    subprocess.run([str(part) for part in command], check=True, cwd=folder)
    return json.loads(result.read_text("utf-8"))


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
    from .comfyui_timing import compiled_model, random_model, seconds_per_step

    dim, heads, ffn_dim, blocks, *latent = args.size
    size = Size("", dim, heads, ffn_dim, blocks, tuple(latent))
    dtype = torch.float32 if args.cpu else torch.bfloat16
    taken: dict[str, list[tuple[float, float]]] = {}
    with torch.inference_mode():
        model = random_model(size.shape, dtype)
        if args.compiled != "no":
            model = compiled_model(model, args.compiled)

        def step(plan: TrimPlan | None) -> float:
            return 1000 * seconds_per_step(model, plan, size.latent, SIGMAS[:STEPS], TEXT_TOKENS)

        # to warm up
        step(None)
        for name in args.names:
            plan = plans(size)[name]
            if args.compiled != "no":
                # what is trimmed is compiled, too
                step(plan)
            taken[name] = [(step(None), step(plan)) for _ in range(args.rounds)]
    name = "cpu" if args.cpu else torch.cuda.get_device_name()
    words = str(dtype).removeprefix("torch.")
    args.out.write_text(json.dumps({"device": name, "dtype": words, "taken": taken}), "utf-8")


if __name__ == "__main__":
    main()
