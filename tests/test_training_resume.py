"""What a run goes on with, and what it refuses before the models are loaded."""

import json
import logging
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wantrim.slim.file import read_header
from wantrim.slim.router import Conditions, load_router
from wantrim.tests.small_wan import make_origin, train_here, write_recipe
from wantrim.training import __main__ as command
from wantrim.training import run as running
from wantrim.training.models import open_origin
from wantrim.training.parallel import World, world
from wantrim.training.run import shared_out, train
from wantrim.training.shard_files import Sample, ShardWriter
from wantrim.training.toy_data import ToyDataset


class Stopped(Exception):
    pass


def stop(*_, **__):
    raise Stopped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_origin(tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """Stages I and II, done."""
    recipe = write_recipe(folder, "width.steps=2", "router.steps=2")
    return train_here(recipe, tmp_path_factory.mktemp("run"), kinds=["width", "router"]).parent


@pytest.fixture
def unloaded(monkeypatch):
    """No model may be loaded."""
    monkeypatch.setattr(running, "load_teacher", stop)


def begin(stage):
    """What tells that a stage has begun."""
    (stage / "state" / "step-1").mkdir(parents=True, exist_ok=True)


# what a stage begins with


def test_a_stage_goes_on_only_with_the_student_that_it_began_with(
    folder, done, tmp_path, monkeypatch
):
    recipe = write_recipe(folder, "width.steps=2", "router.steps=2")
    whole = ToyDataset.batch
    dies = lambda self, step, *place: stop() if step else whole(self, step, *place)  # noqa: E731
    monkeypatch.setattr(ToyDataset, "batch", dies)
    with pytest.raises(Stopped):
        train_here(recipe, tmp_path, kinds=["router"], start=done / "1-width")
    monkeypatch.undo()
    begin(tmp_path / "2-router")
    monkeypatch.setattr(running, "load_teacher", stop)
    with pytest.raises(ValueError, match="2-router: it began with start.student .*--start"):
        train_here(recipe, tmp_path, kinds=["router"])
    # the same student with a router beside it is another beginning too
    both = tmp_path / "both"
    shutil.copytree(done / "1-width", both)
    shutil.copy(done / "2-router" / "router.safetensors", both)
    with pytest.raises(ValueError, match="2-router: it began with start.router = None"):
        train_here(recipe, tmp_path, kinds=["router"], start=both)
    # wherever it lies
    (both / "router.safetensors").unlink()
    with pytest.raises(Stopped):
        train_here(recipe, tmp_path, kinds=["router"], start=both / "student.safetensors")


def test_a_students_file_brings_the_router_beside_it(folder, done, tmp_path):
    recipe = write_recipe(folder, "steps.steps=2")
    for number, start in enumerate((done / "2-router" / "student.safetensors", done / "2-router")):
        last = train_here(recipe, tmp_path / str(number), kinds=["steps"], start=start)
        assert (last / "router.safetensors").exists()


def test_what_a_routers_file_was_trained_otherwise_with_is_said(folder, done, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    start = {"kinds": ["steps"], "start": done / "2-router"}
    train_here(write_recipe(folder), tmp_path / "same", **start)
    assert "the router was trained with" not in caplog.text
    changes = ("steps.k_min=0.25", "steps.shift=2.0")
    last = train_here(write_recipe(folder, *changes), tmp_path / "other", **start)
    said = "2-router: k_min: 0.25 is set here; the router was trained with 0.5"
    assert caplog.text.count(said) == 1
    assert "shift: 2.0 is set here; the router was trained with 3.0" in caplog.text
    assert "k_max: " not in caplog.text
    own = load_router(last / "router.safetensors").conditions
    assert own == Conditions(0.25, 0.875, "falling", "identity", 2.0)


def test_a_wrong_start_is_said_before_the_teacher_is_loaded(folder, tmp_path, unloaded):
    recipe = write_recipe(folder)
    with pytest.raises(ValueError, match=r"wan.safetensors: expected a slim checkpoint"):
        train_here(recipe, tmp_path, start=folder / "wan.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match="student.safetensors: there is no such file"):
        train_here(recipe, tmp_path, start=other)
    with pytest.raises(Stopped):
        train_here(recipe, tmp_path / "cut")
    start = tmp_path / "cut" / "start.safetensors"
    tiny = write_recipe(folder, "model=tiny", "profile=''")
    with pytest.raises(ValueError, match="start.safetensors: expected a student of .*16 blocks"):
        train_here(tiny, tmp_path / "tiny", start=start)


def test_a_router_that_looks_at_something_else_is_said_before_the_teacher_is_loaded(
    folder, done, tmp_path, unloaded
):
    recipe = write_recipe(folder, "router.content=none")
    with pytest.raises(ValueError, match="content: expected 'latent', as the router in 2-router"):
        train_here(recipe, tmp_path, kinds=["router"], start=done / "2-router")


def test_another_recipe_is_said_before_the_teacher_is_loaded(folder, done, unloaded):
    recipe = write_recipe(folder, "width.steps=2", "router.steps=2", "router.lr=0.5")
    with pytest.raises(ValueError, match="2-router: it began with stages.2.lr = 0.001"):
        train_here(recipe, done, kinds=["width", "router"])


def test_a_stale_cut_is_made_again(folder, tmp_path, unloaded):
    start = tmp_path / "start.safetensors"

    def cut(*changes):
        with pytest.raises(Stopped):
            train_here(write_recipe(folder, *changes), tmp_path)
        shutil.rmtree(tmp_path / "1-width", ignore_errors=True)
        return start.stat().st_mtime_ns

    first = cut()
    assert cut() == first
    second = cut("width.prune_ratio=0.5")
    assert second != first and read_header(start).made["prune_ratio"] == 0.5
    third = cut("width.prune_ratio=0.5", "width.protection=1")
    assert third != second and read_header(start).made["protection"] == 1
    profile = tmp_path / "profile.safetensors"
    shutil.copy(folder / "profile.safetensors", profile)
    said = ("width.prune_ratio=0.5", "width.protection=1", f"profile={profile}")
    assert cut(*said) == third
    changed(profile, "channel_norm")
    assert cut(*said) != third


def changed(path, name):
    """Another value at the beginning of a tensor; the header stays."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, metadata)


# what is the same


def test_contents_are_compared_and_not_paths(folder, done, tmp_path, unloaded):
    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(done, out)
    shutil.rmtree(out / "2-router")
    (out / "1-width" / "student.safetensors").unlink()
    begin(out / "1-width")
    shutil.copytree(folder, moved)
    said = ("width.steps=2", "router.steps=2")
    there = (f"profile={moved}/profile.safetensors", f"model={moved}/wan.safetensors")
    with pytest.raises(Stopped):
        train_here(write_recipe(folder, *said, *there), out)
    changed(moved / "profile.safetensors", "self_output")
    with pytest.raises(ValueError, match="1-width: it began with profile = "):
        train_here(write_recipe(folder, *said, *there), out)
    shutil.copy(folder / "profile.safetensors", moved)
    changed(moved / "wan.safetensors", "blocks.1.ffn.0.weight")
    with pytest.raises(ValueError, match="1-width: it began with model = "):
        train_here(write_recipe(folder, *said, *there), out)


def test_a_data_folder_may_move_and_loses_no_shard(folder, tmp_path, unloaded):
    prompts = {"empty": torch.zeros(1, 64), "negative": torch.ones(2, 64)}
    writer = ShardWriter(tmp_path / "data", {}, 24, prompts)
    for number in range(4):
        sample = Sample(torch.ones(16, 1, 4, 4), torch.ones(3, 64), torch.ones(20, 1, 4, 4))
        writer.add(f"{number}", sample)
        writer.flush()
    out = tmp_path / "out"
    for place in ("data", "elsewhere"):
        with pytest.raises(Stopped):
            train_here(write_recipe(folder, f"data.folder={tmp_path / place}"), out)
        begin(out / "1-width")
        if place == "data":
            (tmp_path / "data").rename(tmp_path / "elsewhere")
            said = json.loads((out / "1-width" / "recipe.json").read_text())
            assert str(tmp_path) not in json.dumps(said)
    next((tmp_path / "elsewhere").glob("shard*")).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="began with data.samples .* or bring its samples back"):
        train_here(write_recipe(folder, f"data.folder={tmp_path / 'elsewhere'}"), out)


@pytest.mark.parametrize(
    ("processes", "asked", "batch"), [(8, 2, 8), (2, 2, 8), (4, 2, 8), (3, 2, 3), (4, 3, 4)]
)
def test_a_run_on_other_processes_goes_on_with_its_batch(
    folder, tmp_path, caplog, processes, asked, batch
):
    """It began with a batch of 2, which 8 processes made 8."""
    begin(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps({"data": {"batch": 2}, "batch": 8}))
    recipe = write_recipe(folder, f"data.batch={asked}")
    with caplog.at_level(logging.INFO):
        here = SimpleNamespace(size=processes, first=True)
        shared = shared_out(recipe, here, [tmp_path, tmp_path / "2-router"])
    assert shared.data.batch == batch
    assert "of 2 becomes" in caplog.text or asked != 2


def test_processes_that_cannot_share_the_batch_are_told(
    folder, done, tmp_path, monkeypatch, unloaded
):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    (out / "2-router" / "student.safetensors").unlink()
    begin(out / "2-router")
    monkeypatch.setattr(running, "check_fit", lambda *_: None)
    path = out / "2-router" / "recipe.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"batch": 8, "data": said["data"] | {"batch": 5}}))
    recipe = write_recipe(folder, "width.steps=2", "router.steps=2")
    with pytest.raises(ValueError, match="data.batch = 5, and this is 2"):
        train_here(recipe, out, kinds=["router"])
    path.write_text(json.dumps(said | {"batch": 8}))
    monkeypatch.setattr(World, "wait", lambda self: None)
    with world("cpu") as processes:
        three = replace(processes, size=3)
        with pytest.raises(ValueError, match="batch of 8, which 3 processes cannot share out"):
            train(recipe, out, three, kinds=["router"])


def test_a_first_try_that_saved_nothing_may_be_changed(folder, tmp_path, unloaded):
    """Out of memory, say: another batch is another try, and on fewer GPUs no larger one."""
    with pytest.raises(Stopped):
        train_here(write_recipe(folder, "data.batch=8"), tmp_path)
    with pytest.raises(Stopped):
        train_here(write_recipe(folder, "data.batch=2"), tmp_path)
    said = json.loads((tmp_path / "1-width" / "recipe.json").read_text())
    assert (said["batch"], said["data"]["batch"]) == (2, 2)
    begin(tmp_path / "1-width")
    with pytest.raises(ValueError, match="1-width: it began with data.batch = 2, and this is 8"):
        train_here(write_recipe(folder, "data.batch=8"), tmp_path)


# the end of a stage


def test_a_last_video_that_fails_leaves_no_state(folder, tmp_path, monkeypatch):
    recipe = write_recipe(folder, "width.steps=3", "run.sample_every=100")
    monkeypatch.setattr(running, "draw_videos", stop)
    with pytest.raises(Stopped):
        train_here(recipe, tmp_path, kinds=["width"])
    assert (tmp_path / "1-width" / "student.safetensors").exists()
    assert not (tmp_path / "1-width" / "state").exists()


def test_state_that_a_kill_left_behind_the_last_step_goes(folder, done, unloaded, monkeypatch):
    recipe = write_recipe(folder, "width.steps=2", "router.steps=2")
    monkeypatch.setattr(running, "load_teacher", lambda *_: None)
    state = done / "1-width" / "state" / "step-1"
    state.mkdir(parents=True)
    train_here(replace(recipe, run=replace(recipe.run, keep_state=True)), done, kinds=["width"])
    assert state.exists()
    train_here(recipe, done, kinds=["width"])
    assert not state.parent.exists()


def test_an_expert_has_no_test_videos(folder, tmp_path, monkeypatch, caplog):
    said = ("width.steps=2", "width.sigma_max=0.875", "run.sample_every=1")
    monkeypatch.setattr(running, "draw_videos", stop)
    with caplog.at_level(logging.INFO):
        train_here(write_recipe(folder, *said), tmp_path, kinds=["width"])
    assert "no test videos" in caplog.text


# the command


def test_a_gpu_is_not_chosen_by_its_number(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training", "tiny", "--device", "cuda:1"])
    with pytest.raises(SystemExit):
        command.main()
    assert "invalid choice: 'cuda:1'" in capsys.readouterr().err


def test_a_router_on_clip_wants_a_model_that_looks_at_the_image_so(folder, tmp_path):
    recipe = write_recipe(folder)
    recipe = replace(recipe, task="i2v", data=replace(recipe.data, image_share=1.0))
    clip = replace(recipe.stages[1], content="clip")
    with pytest.raises(ValueError, match="content: expected 'latent' or 'none'.*'clip'"):
        open_origin(replace(recipe, stages=(recipe.stages[0], clip)))
