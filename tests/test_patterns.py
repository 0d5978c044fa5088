"""The study of patterns that the pack has not: its masks, its measure, and the rows of a real model."""

import math

import pytest
import torch

from wantrim.benchmarks import patterns
from wantrim.benchmarks.patterns import BUDGETS, NAMES, kept_by, masks_of, rows_of
from wantrim.hosts.diffusers.weights import load_original
from wantrim.kernels import frame_mass
from wantrim.methods.attend import Layout
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import CHEAP, FRAME
from wantrim.toy.worlds import SECOND

GRID = TokenGrid(3, 5, 7)


def attention(grid: TokenGrid, scale: float = 1.0):
    random = torch.Generator().manual_seed(3)
    return (scale * torch.randn(2, grid.tokens, 4, 8, generator=random) for _ in "qk")


def test_the_mask_of_a_frame_keeps_what_a_profile_measures():
    q, k = attention(GRID)
    shipped, _ = masks_of(GRID)
    assert tuple(shipped) == CHEAP
    within, _ = kept_by(q, k, list(shipped.values()))
    everything = torch.arange(GRID.tokens)
    size = (GRID.frames, GRID.height, GRID.width)
    known = frame_mass(q, k, size, everything).mean(0)
    torch.testing.assert_close(within[:, CHEAP.index(FRAME)], known, rtol=1e-4, atol=1e-5)


def test_the_mask_of_a_tile_is_its_groups_where_they_divide_the_picture():
    grid = TokenGrid(3, 4, 6)
    mask, seen = masks_of(grid)[0]["tile2"], torch.zeros(grid.tokens, grid.tokens, dtype=torch.bool)
    groups, _ = Layout(grid, grid.tokens).groups("tile2", torch.device("cpu"))
    for tokens in groups.order[0].split(groups.sizes):
        seen[tokens[:, None], tokens] = True
    assert torch.equal(mask, seen) and len(groups.sizes) == 4


def test_masks_by_hand():
    _, others = masks_of(GRID)

    def at(f: int, y: int, x: int) -> int:
        return (f * GRID.height + y) * GRID.width + x

    near, decay = others["window 2, next frames"], others["decay from 5"]
    middle = at(1, 2, 3)
    assert near[middle].sum() == 3 * 5 * 5 and not others["window 1"][middle, at(2, 2, 5)]
    # 5 in its own latent frame, 2 in the next one, 1 behind it
    seen = [int(decay[at(0, 0, 0), at(f, 0, 0) : at(f, 1, 0)].sum()) for f in range(3)]
    assert seen == [6, 3, 2]
    assert all(torch.equal(mask, mask.T) and mask.diagonal().all() for mask in others.values())


def test_even_attention_keeps_as_much_as_it_sees_and_no_pattern_beats_the_best_keys():
    shipped, others = masks_of(GRID)
    masks = [*shipped.values(), *others.values()]
    q, k = attention(GRID, 0.0)
    within, best = kept_by(q, k, masks)
    seen = torch.tensor([float(mask.float().mean()) for mask in masks])
    torch.testing.assert_close(within, seen.expand(4, -1), rtol=1e-4, atol=1e-5)
    keys = [math.floor(share * GRID.tokens) / GRID.tokens for share in BUDGETS]
    torch.testing.assert_close(best, torch.tensor(keys).expand(4, -1), rtol=1e-4, atol=1e-5)


def test_a_budget_takes_the_best_pattern_of_every_head_within_it():
    within = torch.tensor([[0.3, 0.9, 0.4], [0.6, 0.1, 0.2]])
    best = torch.linspace(0.5, 0.9, len(BUDGETS)).expand(2, -1)
    rows = rows_of(within, best, keys=[0.22, 0.3, 0.2], shipped=2)
    found = {float(row["keys"]): [row[name] for name in NAMES] for row in rows}
    assert found[0.2] == ["", "0.3000", "0.5000"]
    assert found[0.25] == ["0.4500", "0.5000", "0.7000"]
    assert found[0.35] == ["0.7500", "0.7500", "0.9000"]


def test_rows_of_a_real_model(monkeypatch):
    monkeypatch.setattr(patterns, "STEPS", 3)
    model = load_original(SECOND.checkpoint)
    text = torch.stack([SECOND.encode(SECOND.held_out_scenes(1, seed=5)[0].prompt())])
    rows = patterns.measure(model, text, SECOND.latent_size())
    assert [row["heads"] for row in rows] == ["128"] * len(BUDGETS)
    for row in rows:
        shipped, more, best = (float(row[name]) for name in NAMES)
        assert float(row["keys"]) < shipped <= more <= best < 1.0
    assert all(not block._diffusers_hook.hooks for block in model.blocks)


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_has_a_pattern_of_the_packs(budget):
    shipped, _ = masks_of(TokenGrid(5, 12, 12))
    assert any(float(mask.float().mean()) <= budget + 1e-6 for mask in shipped.values())
