"""Writes what diffusers makes of a slim tiny Wan and of the trained student, for tests/comfyui.

Run from the repository root after the checkpoint changed, with the interpreter that has diffusers:
    .venv/bin/python tests/make_reference.py && .venv/bin/python tests/make_slim_reference.py
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from wantrim.hosts.diffusers.slim import load_slim
from wantrim.methods.cost import Width
from wantrim.slim.export import export_slim
from wantrim.slim.source import open_source
from wantrim.toy import CHECKPOINT, STUDENT

DATA = Path(__file__).resolve().parent / "data"
REFERENCE = DATA / "slim_reference.safetensors"


def some(most: int, blocks: int, generator: torch.Generator) -> tuple[tuple[int, ...], ...]:
    """Half to all of `most`, other ones in every block."""
    counts = torch.randint(most // 2, most + 1, (blocks,), generator=generator).tolist()
    orders = [torch.randperm(most, generator=generator)[:count].tolist() for count in counts]
    return tuple(tuple(sorted(order)) for order in orders)


def forward(model, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(given["x"], given["timestep"], given["text"], return_dict=False)[0].contiguous()


def main() -> None:
    source = open_source(CHECKPOINT)
    model, generator = source.model, torch.Generator().manual_seed(27336)
    units = (model.num_heads, model.num_heads, model.ffn_dim)
    width = Width(*(some(most, model.num_blocks, generator) for most in units))
    given = load_file(DATA / "tiny_wan_reference.safetensors")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "slim.safetensors"
        export_slim(source, path, width)
        slim = load_slim(path)
        student = load_slim(STUDENT)
        outputs = {"output": forward(slim, given), "student": forward(student, given)}
    save_file(outputs, REFERENCE, {"width": json.dumps(width.__dict__)})


if __name__ == "__main__":
    main()
