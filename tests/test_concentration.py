"""How concentrated change is: numbers that can be counted by hand, and a run of the tiny Wan."""

import sys

import numpy as np
import pytest
import torch

from wantrim.benchmarks import concentration
from wantrim.benchmarks.concentration import SHARES, measure
from wantrim.benchmarks.curves import velocities
from wantrim.benchmarks.subjects import toy_subject
from wantrim.benchmarks.table import read_rows
from wantrim.hosts.diffusers.sample import denoise, sigmas_for
from wantrim.methods.shares import held_by_most
from wantrim.tests.tiny_pipeline import ASKED, parts, transformer


def test_top_shares_count_tokens():
    even = torch.ones(2, 20)
    assert held_by_most(even, SHARES).tolist() == pytest.approx([0.15, 0.30, 0.60])
    one = torch.zeros(1, 20)
    one[0, 7] = 3.0
    assert held_by_most(one, SHARES).tolist() == [1.0, 1.0, 1.0]
    # the mean over samples, not of their sum
    both = torch.cat([even[:1], 1000 * one])
    assert held_by_most(both, [0.15]).tolist() == pytest.approx([(0.15 + 1) / 2])
    assert held_by_most(torch.zeros(1, 20), SHARES).tolist() == [0.0, 0.0, 0.0]


def test_velocities_are_the_models_own():
    class Linear(torch.nn.Module):
        """A model whose velocity is its input plus one."""

        config = type("Config", (), {"out_channels": 2, "in_channels": 2})

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.asked = []

        def cache_context(self, *args, **kwargs):
            return torch.no_grad()

        def forward(self, x, timestep, text, return_dict):
            self.asked.append(x + 1)
            return (x + 1,)

    model, sigmas = Linear(), sigmas_for(3, 2.0).tolist()
    text = torch.zeros(1, 1, 1)
    run = denoise(model, text, (1, 2, 2), steps=3, shift=2.0, guidance=1.0, seed=4)
    noise = torch.randn((1, 2, 1, 2, 2), generator=torch.Generator().manual_seed(4))
    *before, last = noise, *run
    found = velocities(before, last, sigmas)
    assert len(found) == 3
    for velocity, asked in zip(found, model.asked, strict=True):
        torch.testing.assert_close(velocity, asked)


def test_a_row_for_each_step_but_the_first():
    subject = toy_subject()
    items = subject.items("i2v", 2, 1)
    rows = measure(subject, items, 3, 5.0, 3.0)
    assert [row["step"] for row in rows] == ["1", "2"]
    assert float(rows[0]["sigma"]) == pytest.approx(float(sigmas_for(3, 3.0)[1]), abs=1e-4)
    for row in rows:
        tops = [float(row[name]) for name in concentration.TOPS]
        assert np.all(np.array(tops) > concentration.SHARES) and tops == sorted(tops)
        assert tops[-1] <= 1


def test_the_command_writes_rows_and_replaces_its_own(tmp_path, monkeypatch):
    options = ["--steps", "2", "--prompts", "1", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["concentration", *options])
    for _ in range(2):
        concentration.main()
    (row,) = read_rows(tmp_path / "concentration.csv")
    assert (row["model"], row["task"], row["steps"], row["step"]) == ("tiny_wan", "t2v", "2", "1")
    assert 0 < float(row["top_15"]) < float(row["top_60"]) <= 1


def test_real_weights_take_the_same_way(tmp_path, monkeypatch):
    from diffusers import WanPipeline

    folder, prompts = tmp_path / "my-wan", tmp_path / "prompts.txt"
    WanPipeline(**parts(), transformer=transformer()).save_pretrained(folder)
    prompts.write_text("\n".join(ASKED))
    options = [
        "--weights", str(folder), "--prompt-file", str(prompts), "--width", "32", "--height", "32",
        "--pixel-frames", "5", "--device", "cpu", "--dtype", "float32", "--steps", "3",
        "--prompts", "2", "--results", str(tmp_path),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["concentration", *options])
    concentration.main()
    rows = read_rows(tmp_path / "concentration.csv")
    assert [(row["model"], row["shift"], row["step"]) for row in rows] == [
        ("my-wan", "5", "1"),
        ("my-wan", "5", "2"),
    ]
    assert str(tmp_path) not in (tmp_path / "concentration.csv").read_text()
