"""A small random Wan with its profile, and a recipe that trains it in seconds."""

import torch

from wantrim.hosts.diffusers.profiling import profile_run
from wantrim.hosts.diffusers.sample import sample
from wantrim.hosts.diffusers.weights import new_transformer, save_original
from wantrim.toy.text import TEXT_DIM
from wantrim.training.recipe import load_recipe

RECIPE = """
name = "small"
model = "{folder}/wan.safetensors"
profile = "{folder}/profile.safetensors"
task = "both"
[data]
folder = "toy"
batch = 2
image_share = 0.3
[run]
dtype = "fp32"
checkpointing = {checkpointing}
teacher = "{teacher}"
save_every = 2
sample_every = 0
log_every = 1
[[stage]]
kind = "width"
steps = 4
warmup = 1
lr = 1e-3
shift = 3.0
ema_decay = 0.9
[[stage]]
kind = "router"
steps = 4
warmup = 1
lr = 1e-3
shift = 3.0
[[stage]]
kind = "steps"
steps = 2
warmup = 1
lr = 1e-3
shift = 3.0
guidance = 4.0
"""


def make_origin(folder):
    """4 blocks and 4 heads: wan.safetensors and profile.safetensors."""
    torch.manual_seed(0)
    sizes = {"dim": 64, "num_heads": 4, "num_layers": 4, "ffn_dim": 64, "in_dim": 36}
    model = new_transformer(**sizes, out_dim=16, text_dim=TEXT_DIM).eval()
    save_original(folder / "wan.safetensors", model, torch.float32, {})
    with profile_run(model) as recorder:
        sample(model, torch.randn(1, 24, TEXT_DIM), (2, 4, 4), steps=2, guidance=1)
    recorder.profile().save(folder / "profile.safetensors")
    return folder


def write_recipe(folder, *changes, checkpointing="false", teacher="whole"):
    """small.toml beside the model, and the recipe in it with `changes`."""
    path = folder / "small.toml"
    path.write_text(RECIPE.format(folder=folder, checkpointing=checkpointing, teacher=teacher))
    return load_recipe(path, changes)
