import csv
import json

import pytest
import torch
from safetensors import safe_open

from wantrim.demo import train as training
from wantrim.demo.train import Batches, Recipe, Trainer, learning_rate, train
from wantrim.hosts.diffusers.weights import load_original
from wantrim.toy import batches
from wantrim.toy.world import parse_prompt

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    smaller = training.TINY_WAN | {"dim": 48, "num_heads": 4, "num_layers": 2, "ffn_dim": 64}
    monkeypatch.setattr(training, "TINY_WAN", smaller)


def trained(recipe: Recipe, first: int, last: int, trainer: Trainer) -> Trainer:
    data = Batches(recipe)
    for step in range(first, last):
        trainer.train_step(*data[step])
    return trainer


def test_resuming_goes_on_bit_for_bit(tmp_path):
    recipe = Recipe(steps=6, batch=2, warmup=2)
    straight = trained(recipe, 0, 4, Trainer(recipe, CPU, False))
    trained(recipe, 0, 2, Trainer(recipe, CPU, False)).save(tmp_path / "r.safetensors")
    resumed = Trainer(recipe, CPU, False)
    resumed.load(tmp_path / "r.safetensors")
    assert resumed.step == 2
    trained(recipe, 2, 4, resumed)
    for name in ("master", "average"):
        want, got = (getattr(t, name).state_dict() for t in (straight, resumed))
        assert all(torch.equal(want[key], got[key]) for key in want)


def test_training_writes_log_and_a_checkpoint_that_loads(tmp_path):
    recipe = Recipe(steps=100, batch=1, warmup=5)
    train(recipe, tmp_path, CPU, compile_blocks=False, every=100)
    rows = list(csv.DictReader((tmp_path / "training_log.csv").open()))
    assert [row["step"] for row in rows] == ["100"]
    # an untrained model scores 1 + the latents' variance, about 1.6
    assert float(rows[0]["loss"]) < 1.7
    assert 0.0 <= float(rows[0]["colour"]) <= 1.0
    with safe_open(tmp_path / "tiny_wan.safetensors", "pt") as file:
        made_by = json.loads(file.metadata()["wantrim"])
    assert made_by["step"] == 100
    assert made_by["recipe"]["batch"] == 1
    model = load_original(tmp_path / "tiny_wan.safetensors")
    assert model.config.num_layers == 2
    assert not list(tmp_path.glob("*.partial"))


def test_batches_repeat_and_hold_out_the_held_out_scenes(monkeypatch):
    recipe = Recipe(batch=8)
    seen = []
    monkeypatch.setattr(batches, "encode_prompt", lambda p: seen.append(p) or torch.zeros(24, 64))
    data = Batches(recipe)
    first, again, other = data[0], data[0], data[1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    for step in range(2, 30):
        data[step]
    prompts = [prompt for prompt in seen if prompt]
    assert len(prompts) > 150
    assert not any(parse_prompt(prompt).held_out for prompt in prompts)


def test_image_condition_is_there_for_some_and_zero_for_the_others():
    data = Batches(Recipe(batch=8))
    conditions = torch.cat([data[step][1] for step in range(4)])
    used = conditions.flatten(1).abs().sum(1) > 0
    assert 0 < used.sum() < len(used)
    assert torch.equal(conditions[used][:, :4, 0], torch.ones_like(conditions[used][:, :4, 0]))
    assert not conditions[:, :4, 1:].any()


def test_learning_rate_warms_up_and_ends_at_zero():
    recipe = Recipe(steps=1000, warmup=100, cooldown=0.5)
    rates = [learning_rate(recipe, step) for step in (0, 49, 99, 500, 750, 999)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.5, 0.002])


def test_a_short_run_ends_with_its_checkpoint_and_a_resumed_log_has_each_step_once(tmp_path):
    recipe = Recipe(steps=3, batch=1, warmup=1)
    log = tmp_path / "training_log.csv"
    log.write_text("step,loss\n100,0.5\n")
    train(recipe, tmp_path, CPU, compile_blocks=False, every=100)
    assert [row["step"] for row in csv.DictReader(log.open())] == ["3"]
    assert (tmp_path / "tiny_wan.safetensors").exists()
    with log.open("a") as file:
        file.write("7,7,0.1,1,,,\n")
    train(recipe, tmp_path, CPU, compile_blocks=False, every=100)
    assert [row["step"] for row in csv.DictReader(log.open())] == ["3"]
