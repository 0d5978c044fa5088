"""Low-rank changes of a Wan's weights (LoRA), as ComfyUI's stock LoRA loader takes them.

In training a weight W is W + up @ down, with up at zero in the beginning; in the file are the two
factors under Wan's original names, as most Wan LoRAs have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize

from .weights import to_diffusers_keys, to_original_keys

PREFIX = "diffusion_model."
DOWN, UP = ".lora_down.weight", ".lora_up.weight"


class LowRank(nn.Module):
    """A change of rank r of a weight [out, in], as a parametrization of it."""

    def __init__(self, weight: torch.Tensor, rank: int, random: torch.Generator):
        super().__init__()
        out_dim, in_dim = weight.shape
        down = torch.randn(rank, in_dim, generator=random) / in_dim**0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(out_dim, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def add_low_rank(model: nn.Module, rank: int, seed: int = 0) -> list[nn.Parameter]:
    """Freeze a model but for low-rank changes of its blocks' matrices; returns their factors.

    The model computes what it did, exactly, until the factors change.

    Raises:
        ValueError: a rank below 1, or as large as a matrix is anyway.
    """
    found = [
        module
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    ]
    largest = min(min(module.weight.shape) for module in found)
    if not 1 <= rank < largest:
        raise ValueError(f"rank: expected 1 to {largest - 1} for this model, got {rank}")
    model.requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    factors = []
    for module in found:
        change = LowRank(module.weight, rank, random)
        parametrize.register_parametrization(module, "weight", change)
        factors += [change.down, change.up]
    return factors


def low_rank_changes(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """(name of the weight, its change) of all that `add_low_rank` added."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            yield f"{name}.weight", module.parametrizations["weight"][0]


def save_lora(path: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    """Write the changes of a model that `add_low_rank` prepared, whole or not at all, in bf16."""
    tensors = {}
    for name, change in low_rank_changes(model):
        (original,) = to_original_keys({name: change.up})
        stem = PREFIX + original.removesuffix(".weight")
        for ending, factor in ((DOWN, change.down), (UP, change.up)):
            tensors[stem + ending] = factor.detach().to("cpu", torch.bfloat16).contiguous()
    partial = Path(path).with_suffix(".partial")
    save_file(tensors, partial, {"format": "pt", **metadata})
    partial.replace(path)


@torch.no_grad()
def merge_lora(model: nn.Module, path: Path, strength: float = 1.0) -> None:
    """Add a LoRA that `save_lora` wrote to a model's weights, in place.

    Raises:
        ValueError: not a readable file, or one of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors LoRA: {error}") from error
    weights = dict(model.named_parameters())
    stems = {key.removesuffix(DOWN).removesuffix(UP) for key in tensors}
    for stem in sorted(stems):
        try:
            (name,) = to_diffusers_keys({stem.removeprefix(PREFIX) + ".weight": None})
            change = tensors[stem + UP].float() @ tensors[stem + DOWN].float()
            weights[name].add_(strength * change.to(weights[name]))
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} does not fit this model: {stem}: {str(error):.200}"
            ) from error
