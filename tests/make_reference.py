"""Writes what diffusers makes of the tiny Wan, for tests/comfyui/test_parity.py.

Run from the repository root after the checkpoint changed, with the interpreter that has diffusers:
    .venv/bin/python tests/make_reference.py
"""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from wantrim.hosts.diffusers.weights import load_original
from wantrim.toy.text import encode_prompt

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "toy" / "tiny_wan.safetensors"
REFERENCE = ROOT / "tests" / "data" / "tiny_wan_reference.safetensors"
PROMPTS = (
    "a red circle moving right slowly on a black background",
    "a blue cross moving up quickly on a striped background",
    "",
)
TIMESTEPS = (1000.0, 640.0, 35.0)
# latent frames, height, width: no two alike
SIZE = (3, 8, 6)


def main() -> None:
    model = load_original(CHECKPOINT).float()
    generator = torch.Generator().manual_seed(2605)
    tensors = {
        "x": torch.randn(len(PROMPTS), model.config.in_channels, *SIZE, generator=generator),
        "timestep": torch.tensor(TIMESTEPS),
        "text": torch.stack([encode_prompt(prompt) for prompt in PROMPTS]),
    }
    # the middle one is text-to-video: no image channels
    tensors["x"][1, model.config.out_channels :] = 0
    with torch.inference_mode():
        made = model(tensors["x"], tensors["timestep"], tensors["text"], return_dict=False)[0]
    tensors["output"] = made.float().contiguous()
    digest = hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()
    REFERENCE.parent.mkdir(exist_ok=True)
    save_file(tensors, REFERENCE, {"checkpoint_sha256": digest})


if __name__ == "__main__":
    main()
