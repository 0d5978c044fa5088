import csv
import json
import os
import signal

import pytest
import torch
from safetensors import safe_open

from wantrim.demo import trainer as training
from wantrim.demo.muon import Muon
from wantrim.demo.recipe import Recipe, SecondRecipe
from wantrim.demo.train import Batches, train
from wantrim.demo.trainer import Trainer
from wantrim.hosts.diffusers.weights import load_original, save_original
from wantrim.toy import batches, world2
from wantrim.toy.world import parse_prompt

CPU = torch.device("cpu")
PARSERS = {"1": parse_prompt, "2": world2.parse_prompt}


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
    straight = trained(recipe, 0, 4, Trainer(recipe, CPU, False, torch.float32))
    trained(recipe, 0, 2, Trainer(recipe, CPU, False, torch.float32)).save(
        tmp_path / "r.safetensors"
    )
    resumed = Trainer(recipe, CPU, False, torch.float32)
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


@pytest.mark.parametrize("recipe", [Recipe(batch=8), SecondRecipe(batch=8)])
def test_batches_repeat_and_hold_out_the_held_out_scenes(recipe, monkeypatch):
    seen = []
    monkeypatch.setattr(
        batches, "encode_prompt", lambda p, parse: seen.append(p) or torch.zeros(24, 64)
    )
    data = Batches(recipe)
    first, again, other = data[0], data[0], data[1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    for step in range(2, 30):
        data[step]
    prompts = [prompt for prompt in seen if prompt]
    assert len(prompts) > 150
    assert not any(PARSERS[recipe.world](prompt).held_out for prompt in prompts)


def test_image_condition_is_there_for_some_and_zero_for_the_others():
    data = Batches(Recipe(batch=8))
    conditions = torch.cat([data[step][1] for step in range(4)])
    used = conditions.flatten(1).abs().sum(1) > 0
    assert 0 < used.sum() < len(used)
    assert torch.equal(conditions[used][:, :4, 0], torch.ones_like(conditions[used][:, :4, 0]))
    assert not conditions[:, :4, 1:].any()


def test_learning_rate_warms_up_and_ends_at_zero():
    recipe = Recipe(steps=1000, warmup=100, cooldown=0.5)
    rates = [recipe.rate(step) for step in (0, 49, 99, 500, 750, 999)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.5, 0.002])
    # new optimizers at step 300 warm up again
    assert [recipe.rate(step, 300) for step in (300, 399, 750)] == pytest.approx([0.01, 1, 0.5])


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


def test_canvases_grow_and_the_last_is_all_in_the_cooldown():
    recipe = SecondRecipe()
    sides = [recipe.side(step) for step in range(recipe.steps)]
    assert sides == sorted(sides)
    assert set(sides) == {96, 128, 192}
    assert sides[-1] == 192
    rates = [recipe.rate(step) for step in range(recipe.warmup, recipe.steps)]
    assert sides[rates.index(next(rate for rate in rates if rate < 1)) + recipe.warmup] == 128
    shorter = SecondRecipe(steps=10)
    assert [shorter.side(step) for step in (1, 4, 5, 8, 9)] == [96, 96, 128, 128, 192]
    assert Recipe().side(0) == Recipe().side(7999) == 96
    for step, cells in ((0, 12), (5, 16), (9, 24)):
        latents, condition, text = Batches(SecondRecipe(steps=10, batch=2))[step]
        assert latents.shape == (2, 16, 5, cells, cells)
        assert condition.shape == (2, 20, 5, cells, cells)
        assert text.shape == (2, 24, 64)


def test_weights_of_the_same_world_go_on_at_their_step_and_others_begin(tmp_path):
    path = tmp_path / "weights.safetensors"
    recipe = SecondRecipe(steps=50, batch=1)
    trainer = trained(recipe, 0, 3, Trainer(recipe, CPU, False, torch.float32))
    trainer.write_checkpoint(path)
    other = Trainer(recipe, CPU, False, torch.float32)
    other.begin_with(path)
    assert (other.step, other.first) == (3, 3)
    kept = load_original(path).state_dict()
    for name in ("master", "average", "worker"):
        got = getattr(other, name).state_dict()
        assert all(torch.equal(kept[key], got[key]) for key in kept)
    # warmed up again, so that a resumed run knows where it began
    other.save(tmp_path / "r.safetensors")
    again = Trainer(recipe, CPU, False, torch.float32)
    again.load(tmp_path / "r.safetensors")
    assert (again.step, again.first) == (3, 3)
    first = Trainer(Recipe(), CPU, False, torch.float32)
    first.begin_with(path)
    assert first.step == 0


def test_a_header_says_whether_the_training_is_finished(tmp_path):
    path, recipe = tmp_path / "weights.safetensors", SecondRecipe(steps=1, batch=1)
    trainer = Trainer(recipe, CPU, False, torch.float32)
    for finished in (False, True):
        trainer.write_checkpoint(path)
        with safe_open(path, "pt") as file:
            made_by = json.loads(file.metadata()["wantrim"])
        assert made_by["finished"] is finished
        assert made_by["recipe"]["world"] == "2"
        trained(recipe, 0, 1, trainer)


def test_weights_of_another_size_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    other = training.new_transformer(**training.TINY_WAN | {"num_layers": 1})
    save_original(path, other, torch.bfloat16, {})
    with pytest.raises(ValueError, match="other.safetensors is not of a tiny Wan's size"):
        Trainer(Recipe(), CPU, False, torch.float32).begin_with(path)


def test_the_second_world_is_trained_tested_and_resumed(tmp_path):
    start = tmp_path / "first.safetensors"
    Trainer(Recipe(), CPU, False).write_checkpoint(start)
    for steps in (1, 2):
        recipe = SecondRecipe(steps=steps, batch=1, canvases=((1.0, 96),))
        train(recipe, tmp_path, CPU, False, 1, dtype=torch.float32, start=start)
    rows = list(csv.DictReader((tmp_path / "training_log.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert {row["side"] for row in rows} == {"96"}
    assert all(0 <= float(row[key]) <= 1 for row in rows for key in ("shape", "camera"))
    # from the weights alone, in another folder
    recipe = SecondRecipe(steps=3, batch=1, canvases=((1.0, 96),))
    start = tmp_path / "tiny_wan_2.safetensors"
    train(recipe, tmp_path / "on", CPU, False, 9, dtype=torch.float32, start=start)
    rows = list(csv.DictReader((tmp_path / "on" / "training_log.csv").open()))
    assert [row["step"] for row in rows] == ["3"]


def test_a_run_that_is_told_to_stop_writes_its_state_and_goes_on(tmp_path, monkeypatch):
    recipe, real = Recipe(steps=4, batch=1, warmup=1), Trainer.train_step

    def told(self, *batch):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", told)
    before = signal.getsignal(signal.SIGTERM)
    train(recipe, tmp_path, CPU, False, 100)
    assert signal.getsignal(signal.SIGTERM) is before
    with safe_open(tmp_path / "resume.safetensors", "pt") as file:
        assert file.metadata()["step"] == "2"
    monkeypatch.setattr(Trainer, "train_step", real)
    train(recipe, tmp_path, CPU, False, 100)
    rows = list(csv.DictReader((tmp_path / "training_log.csv").open()))
    # no held-out scores when there is no time for them
    assert [(row["step"], bool(row["colour"])) for row in rows] == [("2", False), ("4", True)]


def test_muon_is_torchs():
    random = torch.Generator().manual_seed(0)
    shapes = ((8, 8), (8, 24), (24, 8), (8, 8))
    ours = [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in shapes]
    theirs = [torch.nn.Parameter(one.detach().clone()) for one in ours]
    mine = Muon(ours, 0.05, weight_decay=0.01)
    reference = torch.optim.Muon(theirs, 0.05, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    before = [one.detach().clone() for one in ours]
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=random)
            other.grad = one.grad.clone()
        mine.step()
        reference.step()
    for one, other, old in zip(ours, theirs, before, strict=True):
        moved = (other - old).norm()
        # torch's iterates in bf16
        assert (one - other).norm() < 0.02 * moved
