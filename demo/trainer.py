"""What one step of training a tiny Wan does, and the state that outlives a run."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..hosts.diffusers.weights import load_original, new_transformer, save_original
from ..toy.text import TEXT_DIM
from ..toy.vae import LATENT_CHANNELS
from .muon import Muon
from .recipe import Recipe

TINY_WAN = {
    "dim": 128,
    "num_heads": 8,
    "num_layers": 16,
    "ffn_dim": 384,
    "in_dim": 36,
    "out_dim": LATENT_CHANNELS,
    "text_dim": TEXT_DIM,
}


class Trainer:
    """Full-precision weights, their copy that computes in `dtype`, optimizers and average.

    Args:
        first: step at which the optimizers were new; the learning rate warms up from there.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        compile_blocks: bool,
        dtype: torch.dtype = torch.bfloat16,
    ):
        self.recipe, self.device, self.dtype = recipe, device, dtype
        self.step = self.first = 0
        torch.manual_seed(recipe.seed)
        self.master = new_transformer(**TINY_WAN).to(device)
        torch.nn.init.zeros_(self.master.proj_out.weight)
        self.average = copy.deepcopy(self.master).requires_grad_(False)
        self.worker = copy.deepcopy(self.master)
        for name, module in self.worker.named_children():
            if name != "condition_embedder":
                module.to(dtype)
        self.worker.condition_embedder.text_embedder.to(dtype)
        self.worker.condition_embedder.time_proj.to(dtype)
        if compile_blocks:
            for block in self.worker.blocks:
                # one graph for all blocks and a canvas, not one that is slower for all canvases
                block.compile(dynamic=False)
        matrices = [p for n, p in self.master.named_parameters() if "blocks" in n and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.master.parameters() if id(p) not in chosen]
        muon = Muon(matrices, recipe.lr_matrix, weight_decay=0.01)
        adam = torch.optim.AdamW(others, recipe.lr_other, betas=(0.9, 0.95), weight_decay=0.0)
        self.optimizers = (muon, adam)
        self.base_rates = (recipe.lr_matrix, recipe.lr_other)

    def train_step(self, latents, condition, text) -> float:
        """One optimizer step; returns the mean squared error of the velocity."""
        r = self.recipe
        random = torch.Generator().manual_seed(r.seed * 1_000_003 + self.step)
        noise = torch.randn(latents.shape, generator=random).to(self.device)
        u = torch.rand(len(latents), generator=random).to(self.device)
        sigma = r.shift * u / (1 + (r.shift - 1) * u)
        latents, condition = latents.to(self.device), condition.to(self.device)
        s = sigma.view(-1, 1, 1, 1, 1)
        x = torch.cat([(1 - s) * latents + s * noise, condition], 1).to(self.dtype)
        text = text.to(self.device, self.dtype)
        velocity = self.worker(x, sigma * 1000, text, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(velocity.float(), noise - latents)
        loss.backward()
        scale = r.rate(self.step, self.first)
        full, low = list(self.master.parameters()), list(self.worker.parameters())
        for target, source in zip(full, low, strict=True):
            target.grad, source.grad = source.grad.to(target.dtype), None
        torch.nn.utils.clip_grad_norm_(full, 1.0)
        for optimizer, rate in zip(self.optimizers, self.base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
        decay = min(r.ema_decay, (1 + self.step - self.first) / (10 + self.step - self.first))
        with torch.no_grad():
            torch._foreach_copy_(low, full)
            torch._foreach_lerp_(list(self.average.parameters()), full, 1 - decay)
        self.step += 1
        return loss.item()

    def begin_with(self, path: Path) -> None:
        """Take a checkpoint's weights; the optimizers are new and warm up again.

        Weights of the same world go on at the step in their header, others begin at step 0.

        Raises:
            ValueError: not a checkpoint of a tiny Wan.
        """
        weights = load_original(path).state_dict()
        try:
            self.master.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{path} is not of a tiny Wan's size: {str(error):.300}") from error
        self._spread(self.average)
        with safe_open(path, "pt") as file:
            made_by = json.loads((file.metadata() or {}).get("wantrim", "{}"))
        same = made_by.get("recipe", {}).get("world", Recipe.world) == self.recipe.world
        self.step = self.first = int(made_by.get("step", 0)) if same else 0

    def _spread(self, *others) -> None:
        for model in (self.worker, *others):
            model.load_state_dict(self.master.state_dict())

    def save(self, path: Path) -> None:
        """Everything that resuming needs, whole or not at all."""
        tensors = {f"master.{k}": v for k, v in self.master.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, optimizer in enumerate(self.optimizers):
            for number, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"optimizer.{index}.{number}.{key}"] = torch.as_tensor(value)
        partial = path.with_suffix(".partial")
        header = {"step": str(self.step), "first": str(self.first)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, header)
        partial.replace(path)

    def load(self, path: Path) -> None:
        with safe_open(path, "pt", device=str(self.device)) as file:
            self.step = int(file.metadata()["step"])
            self.first = int(file.metadata().get("first", 0))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        for name in ("master", "average"):
            own = {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name)}
            getattr(self, name).load_state_dict(own)
        self._spread()
        for index, optimizer in enumerate(self.optimizers):
            state: dict[int, dict] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{index}."):
                    _, _, number, name = key.split(".", 3)
                    state.setdefault(int(number), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def write_checkpoint(self, path: Path) -> None:
        """The averaged weights in Wan's key names, with what made them and whether it is done."""
        made_by = {
            "step": self.step,
            "finished": self.step >= self.recipe.steps,
            "recipe": asdict(self.recipe),
        }
        metadata = {"format": "pt", "wantrim": json.dumps(made_by)}
        save_original(path, self.average, torch.bfloat16, metadata)
