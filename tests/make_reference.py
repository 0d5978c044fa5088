"""Writes what diffusers makes of the tiny Wans, for tests/comfyui/test_parity.py.

Run from the repository root after a checkpoint changed, with the interpreter that has diffusers:
    .venv/bin/python tests/make_reference.py
"""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from wantrim.hosts.diffusers.lora import merge_lora
from wantrim.hosts.diffusers.weights import load_original
from wantrim.toy.worlds import FIRST, SECOND, World

FOLDER = Path(__file__).resolve().parent / "data"
PROMPTS = {
    FIRST.name: (
        "a red circle moving right slowly on a black background",
        "a blue cross moving up quickly on a striped background",
        "",
    ),
    SECOND.name: (
        "a red circle moving right, the camera holds",
        "a blue cross moving up, the camera pans left",
        "",
    ),
}
TIMESTEPS = (1000.0, 640.0, 35.0)
# latent frames, height, width: no two alike
SIZE = (3, 8, 6)


def reference_file(world: World) -> Path:
    return FOLDER / f"{world.checkpoint.stem}_reference.safetensors"


def made_of(world: World) -> str:
    """Checksum of the weights that a reference is of."""
    files = [world.checkpoint, *([world.four_step_lora] if world.four_step_lora.exists() else [])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def reference(world: World) -> dict[str, torch.Tensor]:
    """Inputs of a call and what comes of it, the four-step LoRA's where there is one."""
    model = load_original(world.checkpoint).float()
    prompts = PROMPTS[world.name]
    generator = torch.Generator().manual_seed(2605)
    tensors = {
        "x": torch.randn(len(prompts), model.config.in_channels, *SIZE, generator=generator),
        "timestep": torch.tensor(TIMESTEPS),
        "text": torch.stack([world.encode(prompt) for prompt in prompts]),
    }
    # the middle one is text-to-video: no image channels
    tensors["x"][1, model.config.out_channels :] = 0
    given = tensors["x"], tensors["timestep"], tensors["text"]
    with torch.inference_mode():
        tensors["output"] = model(*given, return_dict=False)[0].float().contiguous()
        if world.four_step_lora.exists():
            merge_lora(model, world.four_step_lora)
            tensors["with_lora"] = model(*given, return_dict=False)[0].float().contiguous()
    return tensors


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for world in (FIRST, SECOND):
        save_file(reference(world), reference_file(world), {"weights_sha256": made_of(world)})


if __name__ == "__main__":
    main()
