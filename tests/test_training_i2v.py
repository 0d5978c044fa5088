"""Training an image-to-video Wan that looks at the image through CLIP, on encoded shards."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.checkpoints import load_checkpoint
from wantrim.hosts.diffusers.profiling import profile_run
from wantrim.hosts.diffusers.slim import load_slim
from wantrim.hosts.diffusers.weights import to_original_keys
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.slim.router import load_router
from wantrim.training.parallel import world
from wantrim.training.recipe import load_recipe
from wantrim.training.run import train
from wantrim.training.shard_files import Sample, ShardWriter

# diffusers takes what is not one of the last 512 tokens for CLIP's
TEXT, TEXT_DIM, CLIP, CLIP_DIM = 512, 24, 5, 40
SIZE = (3, 4, 6)
RECIPE = """
name = "clip"
model = "{folder}/wan.safetensors"
profile = "{folder}/profile.safetensors"
task = "i2v"
[data]
folder = "{folder}/data"
batch = 2
[run]
dtype = "{dtype}"
teacher = "whole"
sample_every = 2
[[stage]]
kind = "width"
steps = 2
warmup = 1
prune_ratio = 0.5
[[stage]]
kind = "router"
steps = 2
warmup = 1
content = "clip"
[[stage]]
kind = "steps"
steps = 2
warmup = 1
"""


def forward(model, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 36, *SIZE, generator=random)
    # the first latent frame is given
    x[:, 16:20] = 0
    x[:, 16:20, 0] = 1
    text = torch.randn(1, TEXT, TEXT_DIM, generator=random)
    clip = torch.randn(1, CLIP, CLIP_DIM, generator=random)
    with torch.no_grad():
        return model(x, torch.tensor([700.0]), text, clip, return_dict=False)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=36,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=96,
        num_layers=3,
        image_dim=CLIP_DIM,
        added_kv_proj_dim=64,
    ).eval()
    tensors = {k: v.contiguous() for k, v in to_original_keys(model.state_dict()).items()}
    said = {"config": json.dumps({"transformer": {"num_heads": 4}})}
    save_file(tensors, path / "wan.safetensors", said)
    again = load_checkpoint(path / "wan.safetensors", torch.float32)
    assert torch.allclose(forward(again), forward(model), atol=1e-5)
    with profile_run(model) as recorder:
        forward(model)
    recorder.profile().save(path / "profile.safetensors")
    prompts = {name: torch.zeros(1, TEXT_DIM) for name in ("empty", "negative")}
    writer = ShardWriter(path / "data", {"vae": "toy"}, TEXT, prompts, 4)
    for number in range(4):
        condition = torch.randn(20, *SIZE)
        condition[:4] = 0
        condition[:4, 0] = 1
        text, clip = torch.randn(9, TEXT_DIM), torch.randn(CLIP, CLIP_DIM)
        writer.add(f"{number}", Sample(torch.randn(16, *SIZE), text, condition, clip))
    writer.flush()
    return path


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_stages_of_a_model_with_clip(folder, dtype, tmp_path):
    path = folder / f"{dtype}.toml"
    path.write_text(RECIPE.format(folder=folder, dtype=dtype))
    with world("cpu") as processes:
        last = train(load_recipe(path), tmp_path, processes)
    # every cut layer of the image branch is narrower
    student = load_slim(last / "student.safetensors")
    for block in student.blocks:
        assert block.attn2.heads == 2
        shapes = [block.attn2.add_k_proj.weight.shape, block.attn2.norm_added_k.weight.shape]
        assert shapes == [(32, 64), (32,)]
    router = load_router(last / "router.safetensors")
    assert (router.kind, router.mlp.content_dim) == ("clip", CLIP_DIM)
    losses = [
        json.loads(line)["loss"]
        for stage in sorted(tmp_path.glob("*-*"))
        for line in (stage / "log.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)
    assert (last / "videos" / "step-2.safetensors").exists()
    plan = TrimPlan(blocks=BlockPlan(router, BlockBudget(0.67, 0.67)))
    whole = forward(student)
    with attach(student, plan) as attachment:
        assert not torch.equal(forward(student), whole)
        ran = [step.blocks_run for step in attachment.finish().steps]
    assert ran == [2]


def test_bf16_computes_about_what_fp32_does(folder, tmp_path):
    said = {}
    for dtype in ("fp32", "bf16"):
        path = folder / f"{dtype}.toml"
        path.write_text(RECIPE.format(folder=folder, dtype=dtype))
        recipe = load_recipe(path, ["run.log_every=1", "run.sample_every=0"])
        with world("cpu") as processes:
            last = train(recipe, tmp_path / dtype, processes, kinds=["width"])
        said[dtype] = [json.loads(line) for line in (last / "log.jsonl").open()]
    for name in ("loss", "data", "feature"):
        one, other = ([row[name] for row in said[dtype]] for dtype in said)
        assert one == pytest.approx(other, rel=0.03) and one != other, name
