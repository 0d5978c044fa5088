"""Small random Wans: one to run plans on, one with its profile and a recipe that trains it."""

import torch

from wantrim.hosts.diffusers.profiling import profile_run
from wantrim.hosts.diffusers.sample import sample
from wantrim.hosts.diffusers.weights import new_transformer, save_original
from wantrim.toy.text import TEXT_DIM
from wantrim.training.parallel import world
from wantrim.training.recipe import load_recipe
from wantrim.training.run import train

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


# of a latent; 3 latent frames of 4 x 3 tokens
SIZE = (3, 8, 6)


def random_wan(blocks: int, in_dim: int = 16, *, dim: int = 48, heads: int = 4, seed: int = 0):
    """In half a second; its blocks do so much that a broken one shows."""
    torch.manual_seed(seed)
    model = new_transformer(
        dim=dim, num_heads=heads, num_layers=blocks, ffn_dim=64, in_dim=in_dim, out_dim=16,
        text_dim=24,
    )  # fmt: skip
    for block in model.blocks:
        # the stock gates are small
        torch.nn.init.normal_(block.scale_shift_table, std=0.5)
    return model.requires_grad_(False).eval()


def words(batch: int = 1) -> torch.Tensor:
    """Text embeddings for `random_wan`."""
    return torch.randn(batch, 7, 24, generator=torch.Generator().manual_seed(9))


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def condition(given=(0,), batch: int = 1, size=SIZE) -> torch.Tensor:
    """Wan's image condition with these latent frames given."""
    image = noise(batch, 20, *size, seed=8)
    image[:, :4] = 0
    image[:, :4, list(given)] = 1
    return image


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


def train_here(recipe, out, **options):
    """A recipe's run on this CPU; its last folder."""
    with world("cpu") as processes:
        return train(recipe, out, processes, **options)
