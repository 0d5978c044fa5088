"""What the pack's own nodes make of a MODEL, and what came of it in its last run.

Inputs that are not given have their defaults.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch

import folder_paths
from wantrim.hosts.comfyui.attach import attachment_of
from wantrim.hosts.comfyui.profiling import model_fingerprint
from wantrim.methods.routers import RouterMLP
from wantrim.nodes import demo
from wantrim.nodes.blocks import FOLDER, WanTrimBlocks
from wantrim.nodes.wantrim import DRAFT, WanTrim, WanTrimPair
from wantrim.report.figures import mean_work
from wantrim.slim.router import TrainedRouter
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.variants import load
from wantrim.training.router_file import save_router

DIAL = {
    "speedup": 1.5,
    "render": DRAFT,
    "dense_first_steps": 1,
    "dense_last_steps": 0,
    "context": "auto",
}
BLOCKS = {
    "k_min": 0.5,
    "k_max": 0.85,
    "curve": "falling",
    "start_percent": 0.0,
    "end_percent": 1.0,
}


def dialled(model, **inputs):
    """What WanTrim makes of `model`."""
    return WanTrim.execute(model=model, **DIAL | inputs).result[0]


def paired(high, low, **inputs):
    """What WanTrim Pair makes of two experts."""
    given = {"model_high_noise": high, "model_low_noise": low, "boundary": 0.0}
    return WanTrimPair.execute(**given | DIAL | inputs).result


# gone when the tests are
_HELD = tempfile.TemporaryDirectory()


@cache
def routers() -> Path:
    """A folder of ComfyUI's for the routers of tests."""
    folder_paths.add_model_folder_path(FOLDER, _HELD.name)
    return Path(_HELD.name)


def router_file(model) -> str:
    """The file of a router that has another order of the blocks at every sigma."""
    network = model.model.diffusion_model
    fingerprint = model_fingerprint(network)
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(4)
        mlp = RouterMLP(len(network.blocks), 0, 32, 16).requires_grad_(False)
    path = routers() / f"{abs(hash(fingerprint))}.safetensors"
    if not path.exists():
        # one that is written again is read again
        save_router(path, TrainedRouter(mlp, "none", fingerprint))
    return path.name


# a router made for the model
OWN = object()


def at_blocks(model, router="trained", *, blocks="2, 3", file=OWN, **inputs) -> tuple:
    """What WanTrim Blocks gives out: the MODEL and the text."""
    choice = {"router": router}
    if router == "fixed":
        choice["blocks"] = blocks
    if router == "trained":
        choice["router_file"] = router_file(model) if file is OWN else file
    return WanTrimBlocks.execute(model=model, router=choice, **BLOCKS | inputs).result


def routed(model, router="fixed", **options):
    """What WanTrim Blocks makes of `model`."""
    return at_blocks(model, router, **options)[0]


def solved(model):
    """What the last run of a MODEL was solved for."""
    return attachment_of(model).solved


def asked(model) -> tuple[float, ...]:
    """The share that each step of the last run was to compute."""
    return tuple(step.program.share for step in tiny.report_of(model).steps)


def done(model) -> float:
    """The speed-up of the last run, by its record."""
    return 1 / mean_work(tiny.report_of(model))


def notes(model) -> list[str]:
    return tiny.report_of(model).notes


def unmet(model) -> list[str]:
    return [note for note in notes(model) if "was asked for" in note]


@cache
def demo_model():
    return demo.WanTrimDemoModel.execute().result[0]


def demo_sample(model, steps=4, **options) -> torch.Tensor:
    prompts = [demo.WanTrimDemoPrompt.execute(text).result[0] for text in (demo.PROMPT, "")]
    case = tiny.Case(*prompts, tiny.empty_latent(5, 12, 12))
    return tiny.ksampler(model, case, steps=steps, **options)


@cache
def low_expert():
    """Another model of the same sizes."""
    return load("low")
