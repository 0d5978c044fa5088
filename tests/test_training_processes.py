"""Training on two processes with FSDP2 (gloo, on the CPU), against one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from wantrim.hosts.diffusers.slim import load_slim
from wantrim.tests.small_wan import make_origin, write_recipe
from wantrim.training.parallel import world
from wantrim.training.run import train

CHANGES = ("width.steps=10", "router.tokens={keep_min=0.5}", "data.image_share=0.0")
CHANGES += ("width.tokens={keep_min=0.5}",)
# seconds, on a busy machine
PATIENCE = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_origin(tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module", params=["sharded", "offloaded"])
def teacher(request):
    return request.param


def start(folder, out):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "wantrim.training", str(folder / "small.toml")]
    command += ["--out", str(out), "--stages", "width", "router", "--set", *CHANGES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said[-3000:]


def kill_after_a_save(process, state):
    until = time.monotonic() + PATIENCE
    while not any(state.glob("step-*")):
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def losses(out):
    found = {}
    for stage in ("1-width", "2-router"):
        lines = (out / stage / "log.jsonl").read_text().splitlines()
        found[stage] = [json.loads(line)["loss"] for line in lines]
    return found


def alone(recipe, out):
    with world("cpu") as processes:
        train(recipe, out, processes, kinds=["width", "router"])
    return losses(out)


def same(one, other):
    for stage, values in one.items():
        assert other[stage] == pytest.approx(values, rel=2e-4), stage


def test_two_processes_are_one_and_go_on_after_a_kill(folder, teacher, tmp_path):
    recipe = write_recipe(folder, *CHANGES, teacher=teacher, checkpointing="true")
    whole = alone(recipe, tmp_path / "one")
    assert [len(values) for values in whole.values()] == [10, 4]
    out, fewer = tmp_path / "two", tmp_path / "fewer"
    process = start(folder, out)
    try:
        kill_after_a_save(process, out / "1-width" / "state")
    finally:
        process.kill()
    assert not (out / "2-router").exists()
    shutil.copytree(out, fewer)
    # the same processes again, and one instead of two
    finish(start(folder, out))
    same(whole, losses(out))
    same(whole, alone(recipe, fewer))
    one, two = (
        load_slim(path / "2-router" / "student.safetensors") for path in (tmp_path / "one", out)
    )
    theirs = dict(two.named_parameters())
    for name, value in one.named_parameters():
        assert torch.allclose(value, theirs[name], atol=2e-3), name
