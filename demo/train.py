"""Trains the tiny Wan on the toy world: `python -m wantrim.demo.train`.

One model for both tasks: Wan's image-to-video input (16 noise, 4 mask and 16 image channels) with
the last 20 at zero for text-to-video. Flow matching on the velocity (noise - data). The run can be
stopped and started again; every batch is a function of the seed and its step alone.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from ..hosts.diffusers.weights import new_transformer, save_original
from ..toy.batches import OBJECT_SHARES, draw_sample, encode_samples
from ..toy.text import TEXT_DIM
from ..toy.vae import LATENT_CHANNELS, ToyVAE
from ..toy.world import held_out_scenes
from .measure import score_prompts

log = logging.getLogger(__name__)

TINY_WAN = {
    "dim": 128,
    "num_heads": 8,
    "num_layers": 16,
    "ffn_dim": 384,
    "in_dim": 36,
    "out_dim": LATENT_CHANNELS,
    "text_dim": TEXT_DIM,
}


@dataclass(frozen=True)
class Recipe:
    """What was trained; written into the header of the weights."""

    steps: int = 8000
    batch: int = 16
    seed: int = 0
    lr_matrix: float = 6e-3
    lr_other: float = 2e-3
    warmup: int = 200
    # share of the steps, at the end, in which the learning rate falls to zero
    cooldown: float = 0.6875
    shift: float = 3.0
    image_share: float = 0.3
    drop_text: float = 0.1
    object_shares: tuple[float, ...] = OBJECT_SHARES
    ema_decay: float = 0.998


class Batches(Dataset):
    """Item k is the training batch of step k: latents, image condition, text."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.vae = ToyVAE.load()

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int):
        r = self.recipe
        rng = np.random.default_rng([r.seed, step])
        drawn = [draw_sample(rng, r.drop_text, r.object_shares) for _ in range(r.batch)]
        videos, texts = zip(*drawn, strict=True)
        latents, condition = encode_samples(self.vae, videos, rng.random(r.batch) < r.image_share)
        return latents, condition, torch.stack(texts)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Warm-up, constant, linear cooldown; 0..1."""
    left = (recipe.steps - step) / max(recipe.cooldown * recipe.steps, 1)
    return min(1.0, (step + 1) / recipe.warmup, left)


class Trainer:
    """Full-precision weights, their low-precision copy that computes, optimizers and average."""

    def __init__(self, recipe: Recipe, device: torch.device, compile_blocks: bool):
        self.recipe, self.device, self.step = recipe, device, 0
        torch.manual_seed(recipe.seed)
        self.master = new_transformer(**TINY_WAN).to(device)
        torch.nn.init.zeros_(self.master.proj_out.weight)
        self.average = copy.deepcopy(self.master).requires_grad_(False)
        self.worker = copy.deepcopy(self.master)
        for name, module in self.worker.named_children():
            if name != "condition_embedder":
                module.to(torch.bfloat16)
        self.worker.condition_embedder.text_embedder.to(torch.bfloat16)
        self.worker.condition_embedder.time_proj.to(torch.bfloat16)
        if compile_blocks:
            for block in self.worker.blocks:
                block.compile()
        matrices = [p for n, p in self.master.named_parameters() if "blocks" in n and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.master.parameters() if id(p) not in chosen]
        muon = torch.optim.Muon(
            matrices, recipe.lr_matrix, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
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
        x = torch.cat([(1 - s) * latents + s * noise, condition], 1).bfloat16()
        text = text.to(self.device, torch.bfloat16)
        velocity = self.worker(x, sigma * 1000, text, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(velocity.float(), noise - latents)
        loss.backward()
        scale = learning_rate(r, self.step)
        for full, low in zip(self.master.parameters(), self.worker.parameters(), strict=True):
            full.grad, low.grad = low.grad.to(full.dtype), None
        torch.nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        for optimizer, rate in zip(self.optimizers, self.base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
        decay = min(r.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            trio = (self.master.parameters(), self.worker.parameters(), self.average.parameters())
            for full, low, mean in zip(*trio, strict=True):
                low.copy_(full)
                mean.lerp_(full, 1 - decay)
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        """Everything that resuming needs, whole or not at all."""
        tensors = {f"master.{k}": v for k, v in self.master.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, optimizer in enumerate(self.optimizers):
            for number, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"optimizer.{index}.{number}.{key}"] = torch.as_tensor(value)
        partial = path.with_suffix(".partial")
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, partial, {"step": str(self.step)}
        )
        partial.replace(path)

    def load(self, path: Path) -> None:
        with safe_open(path, "pt", device=str(self.device)) as file:
            self.step = int(file.metadata()["step"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        for name in ("master", "average"):
            own = {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name)}
            getattr(self, name).load_state_dict(own)
        self.worker.load_state_dict(self.master.state_dict())
        for index, optimizer in enumerate(self.optimizers):
            state: dict[int, dict] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{index}."):
                    _, _, number, name = key.split(".", 3)
                    state.setdefault(int(number), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def train(recipe: Recipe, out: Path, device: torch.device, compile_blocks: bool, every: int):
    """Train from where `out` stands to `recipe.steps`; writes weights and log into it."""
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe, device, compile_blocks)
    resume = out / "resume.safetensors"
    if resume.exists():
        trainer.load(resume)
        log.info("going on at step %d", trainer.step)
    log_path = out / "training_log.csv"
    _cut_log(log_path, trainer.step)
    data = DataLoader(
        Batches(recipe), batch_size=None, sampler=range(trainer.step, recipe.steps), num_workers=1
    )
    scenes = held_out_scenes(16, seed=1)
    backend = SDPBackend.MATH if device.type == "cpu" else SDPBackend.FLASH_ATTENTION
    losses, started = [], time.perf_counter()
    columns = (
        *Progress.get_default_columns()[:3],
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=recipe.steps, completed=trainer.step, said="")
        for batch in data:
            with sdpa_kernel(backend):
                losses.append(trainer.train_step(*batch))
            progress.update(task, completed=trainer.step, said=f"loss {np.mean(losses[-50:]):.4f}")
            last = trainer.step == recipe.steps
            if trainer.step % 100 == 0 or trainer.step % every == 0 or last:
                speed = len(losses) * recipe.batch / (time.perf_counter() - started)
                row = {
                    "step": trainer.step,
                    "samples": trainer.step * recipe.batch,
                    "loss": f"{np.mean(losses):.5f}",
                    "samples_per_second": f"{speed:.1f}",
                    "colour": "",
                    "shape": "",
                    "direction": "",
                }
                if trainer.step % every == 0 or last:
                    trainer.save(resume)
                    write_checkpoint(trainer, out)
                    scores = score_prompts(trainer.average, scenes, steps=20, seed=1)
                    row |= {k.removesuffix("_ok"): f"{v:.3f}" for k, v in scores.items()}
                _append_row(log_path, row)
                log.info("%s", row)
                losses, started = [], time.perf_counter()


def write_checkpoint(trainer: Trainer, out: Path) -> None:
    """The averaged weights in Wan's key names, with what made them."""
    made_by = {"step": trainer.step, "recipe": asdict(trainer.recipe)}
    metadata = {"format": "pt", "wantrim": json.dumps(made_by)}
    save_original(out / "tiny_wan.safetensors", trainer.average, torch.bfloat16, metadata)


def _cut_log(path: Path, step: int) -> None:
    """Drop the rows after `step`: they are of steps that will be done again."""
    if path.exists():
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        path.unlink()
        for row in rows:
            _append_row(path, row)


def _append_row(path: Path, row: dict) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/train"))
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; 1 is fastest when shared"
    )
    parser.add_argument("--no-compile", action="store_true", help="slower, starts at once")
    parser.add_argument("--every", type=int, default=500, help="steps between saves and tests")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    # reduced-precision attention on the CPU: 2.5 times faster than the fused kernel at head_dim 16
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    recipe = Recipe(steps=args.steps)
    train(recipe, args.out, torch.device(args.device), not args.no_compile, args.every)


if __name__ == "__main__":
    main()
