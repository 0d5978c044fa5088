"""The shipped checkpoint is what its script made, and good enough to measure on."""

import csv
import json

import numpy as np
from safetensors import safe_open

from wantrim.demo.measure import score_prompts
from wantrim.demo.recipe import Recipe
from wantrim.demo.trainer import TINY_WAN
from wantrim.hosts.diffusers.weights import load_original
from wantrim.toy import CHECKPOINT
from wantrim.toy.held_out import held_out_scenes

WANTED = {"colour_ok": 0.95, "shape_ok": 0.80, "direction_ok": 0.85}


def rows(root, name):
    with (root / "demo" / "tiny_wan" / name).open() as file:
        return list(csv.DictReader(file))


def test_the_checkpoint_is_the_end_of_its_recipe_and_its_log(root):
    with safe_open(CHECKPOINT, "pt") as file:
        made_by = json.loads(file.metadata()["wantrim"])
        config = json.loads(file.metadata()["config"])["transformer"]
    recipe = Recipe()
    assert made_by["step"] == made_by["recipe"]["steps"] == recipe.steps
    assert made_by["recipe"] == json.loads(json.dumps(recipe.__dict__))
    assert {key: config[key] for key in TINY_WAN} == TINY_WAN
    steps = [int(row["step"]) for row in rows(root, "training_log.csv")]
    assert steps == list(range(100, recipe.steps + 1, 100))


def test_measured_adherence_meets_the_bar(root):
    row = rows(root, "adherence.csv")[0]
    assert (row["objects"], row["prompts"], row["steps"]) == ("1", "64", "30")
    for key, least in WANTED.items():
        assert float(row[key]) >= least


def test_sampled_now_it_still_follows_held_out_prompts():
    scores = score_prompts(load_original(CHECKPOINT), held_out_scenes(16, seed=5), steps=15)
    for key, least in WANTED.items():
        assert scores[key] >= least, scores


def test_heads_have_begun_to_specialise(root):
    ratio = np.array([float(row["intra_slice_ratio"]) for row in rows(root, "heads.csv")])
    assert len(ratio) == TINY_WAN["num_layers"] * TINY_WAN["num_heads"]
    # uniform attention over 5 latent frames gives every head 0.2
    assert (np.abs(ratio - 0.2) > 0.05).mean() > 0.25
    assert ratio.max() > 0.7
    assert ratio.min() < 0.1


def test_the_cost_of_leaving_out_each_block_is_there(root):
    left_out = [row["left_out"] for row in rows(root, "skip_one_block.csv")]
    assert left_out[:16] == [f"block {index}" for index in range(16)]
    assert len(left_out) > 16
