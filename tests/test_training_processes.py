"""Training on two processes with FSDP2 (gloo, on the CPU), against one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from wantrim.hosts.diffusers.slim import load_slim
from wantrim.tests.small_wan import make_origin, train_here, write_recipe
from wantrim.training.parallel import world
from wantrim.training.run import train

CHANGES = ("width.steps=10", "data.image_share=0.0")
# seconds, on a busy machine
PATIENCE = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_origin(tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module", params=["sharded", "offloaded"])
def teacher(request):
    return request.param


def start(folder, out, *changes, told=("--stages", "width", "router")):
    """Two processes with what torchrun would tell them; torchrun's own cannot be killed at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "wantrim.training", str(folder / "small.toml")]
    command += ["--out", str(out), *told, "--set", *(changes or CHANGES)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    place |= {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]


def finish(processes):
    for process in processes:
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said[-3000:]


def kill_after_a_save(processes, state):
    until = time.monotonic() + PATIENCE
    try:
        while not any(state.glob("step-*")):
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def rows(folder, *terms):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [[line[term] for term in terms] for line in lines]


def losses(out):
    return {stage: sum(rows(out / stage, "loss"), []) for stage in ("1-width", "2-router")}


def alone(recipe, out):
    with world("cpu") as processes:
        train(recipe, out, processes, kinds=["width", "router"])
    return losses(out)


def same(one, other):
    # AdamW moves a weight by its gradient's sign at first, and rounding has a say in that
    for stage, within in (("1-width", 2e-4), ("2-router", 3e-3)):
        assert other[stage] == pytest.approx(one[stage], rel=within), stage


def apart(one, other):
    """How far the weights of two students are apart at most, of their size."""
    one, other = (load_slim(folder / "student.safetensors") for folder in (one, other))
    return max(
        float((mine - theirs).norm() / mine.norm())
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_two_processes_are_one_and_go_on_after_a_kill(folder, teacher, tmp_path):
    recipe = write_recipe(folder, *CHANGES, teacher=teacher, checkpointing="true")
    whole = alone(recipe, tmp_path / "one")
    assert [len(values) for values in whole.values()] == [10, 4]
    out, fewer = tmp_path / "two", tmp_path / "fewer"
    kill_after_a_save(start(folder, out), out / "1-width" / "state")
    assert not (out / "2-router").exists()
    shutil.copytree(out, fewer)
    # the same processes again, and one instead of two
    finish(start(folder, out))
    same(whole, losses(out))
    same(whole, alone(recipe, fewer))
    assert apart(tmp_path / "one" / "2-router", out / "2-router") < 0.02


def test_two_processes_compute_in_bf16_and_keep_their_weights_in_fp32(folder, tmp_path):
    """What every recipe of a real Wan does: FSDP2 with bf16, here at a rate that bf16 would lose."""
    rate = 1e-5
    changes = [
        "run.dtype='bf16'",
        "run.keep_state=true",
        "data.batch=1",
        "data.image_share=0.0",
        "router.k_min=0.4",
        "router.k_max=0.8",
    ]
    changes += [f"width.lr={rate}", "width.ema_decay=0", f"router.lr={rate}"]
    write_recipe(folder, teacher="sharded", checkpointing="true")
    finish(start(folder, tmp_path / "two", *changes))
    # one sample cannot be shared out over two processes: both take one
    exact = write_recipe(folder, *changes[3:], "data.batch=2")
    whole, low = alone(exact, tmp_path / "one"), losses(tmp_path / "two")
    for stage, values in whole.items():
        assert len(values) == 4
        assert low[stage] == pytest.approx(values, rel=0.03) and low[stage] != values
    for stage in ("1-width", "2-router"):
        (saved,) = (tmp_path / "two" / stage / "state").glob("step-*")
        tensors = FileSystemReader(saved).read_metadata().state_dict_metadata
        kept = {n: m.properties.dtype for n, m in tensors.items() if n.startswith("model.")}
        assert len(kept) > 100 and set(kept.values()) == {torch.float32}
        moments = [m.properties.dtype for n, m in tensors.items() if n.endswith("exp_avg_sq")]
        assert moments and set(moments) == {torch.float32}
    name = "model.student.blocks.1.ffn.net.2.weight"
    now = {name: torch.zeros(tensors[name].size)}
    dcp.load(now, storage_reader=FileSystemReader(saved), no_dist=True)
    began = load_slim(tmp_path / "two" / "1-width" / "student.safetensors").state_dict()
    moved = (now[name] - began[name.removeprefix("model.student.")]).abs()
    # two steps of AdamW at about the rate, where bf16 knows no number between
    assert 0.5 * rate < float(moved.median()) < 2.5 * rate


@pytest.fixture(scope="module")
def routed(folder, tmp_path_factory):
    """A student with a router."""
    recipe = write_recipe(folder, "router.steps=2")
    return train_here(recipe, tmp_path_factory.mktemp("routed"), kinds=["router"])


@pytest.mark.parametrize("kind", ["self_forcing", "steps"])
def test_two_processes_learn_few_steps_as_one_does(folder, routed, tmp_path, kind):
    """From one student, so that nothing of earlier stages is between them."""
    changes = ["steps.steps=4", "steps.sampler_steps=3", "run.save_every=9"]
    terms = ["loss", "active", "grad_norm"]
    if kind == "self_forcing":
        changes += ["steps.critic_updates=2", "steps.critic_lr=1e-3", "steps.kind='self_forcing'"]
        terms += ["match", "critic"]
    recipe = write_recipe(folder, *changes, teacher="sharded")
    told = ("--stages", kind, "--start", str(routed))
    finish(start(folder, tmp_path / "two", *changes, told=told))
    one = train_here(recipe, tmp_path / "one", kinds=[kind], start=routed)
    two = tmp_path / "two" / one.name
    whole, shared = rows(one, *terms), rows(two, *terms)
    assert len(whole) == 4
    for mine, theirs in zip(whole, shared, strict=True):
        assert theirs == pytest.approx(mine, rel=2e-5)
    # as they are written, in bf16
    assert apart(one, two) < 1e-3


@pytest.mark.slow
def test_two_processes_share_moments_in_8_bits_and_go_on_with_them(folder, tmp_path, monkeypatch):
    """What the recipes of 14B do, but for the compiled step, which crashes on two CPU processes."""
    pytest.importorskip("torchao", reason="8-bit moments are torchao's")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    changes = ("run.optimizer='adamw8bit'", "data.image_share=0.0", "width.steps=6")
    recipe = write_recipe(folder, *changes, teacher="sharded")
    out = tmp_path / "two"
    kill_after_a_save(start(folder, out, *changes), out / "1-width" / "state")
    finish(start(folder, out, *changes))
    with torch.compiler.set_stance("force_eager"):
        whole = alone(recipe, tmp_path / "one")
    two = losses(out)
    assert [len(values) for values in two.values()] == [6, 4]
    for stage, values in whole.items():
        assert two[stage] == pytest.approx(values, rel=0.03), stage
