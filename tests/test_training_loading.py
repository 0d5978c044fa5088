"""What a process reads of a model, and how a batch is shared out over processes."""

import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from wantrim.slim.file import list_entries, read_tensor
from wantrim.training.loading import own_part
from wantrim.training.memory import KNOWN, Video, plan_recipe
from wantrim.training.recipe import SHIPPED, load_recipe
from wantrim.training.run import shared_out
from wantrim.training.shards import even_batch, own_rows

RECIPES = sorted(file.stem for file in SHIPPED.glob("*.toml"))


@pytest.mark.parametrize("rows", [1, 5, 8, 13])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_parts_of_a_weight_are_those_of_fsdp(rows, processes):
    weight = torch.arange(3.0 * rows).view(rows, 3)
    parts = []
    for rank in range(processes):
        mesh = SimpleNamespace(size=lambda: processes, get_local_rank=lambda rank=rank: rank)
        part = own_part(SimpleNamespace(shape=weight.shape, device_mesh=mesh))
        parts.append(weight[part.start : part.stop])
    wanted = weight.chunk(processes)
    assert all(torch.equal(*both) for both in zip(parts, wanted, strict=False))
    assert torch.equal(torch.cat(parts), weight)


def test_rows_of_a_tensor_are_read_and_nothing_else(tmp_path):
    path = tmp_path / "some.safetensors"
    tensors = {
        "before": torch.full((3,), 7.0),
        "low": torch.randn(6, 2, 3).bfloat16(),
        "wide": torch.randn(6, 5),
    }
    save_file(tensors, path)
    entries = {entry.name: entry for entry in list_entries(path)[0]}
    for name in ("low", "wide"):
        for rows in (range(0, 2), range(2, 5), range(5, 6), range(3, 3)):
            got = read_tensor(path, entries[name], rows)
            assert torch.equal(got, tensors[name][rows.start : rows.stop])
        assert torch.equal(read_tensor(path, entries[name]), tensors[name])


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_shared_out_as_the_planner_says(name, processes, caplog):
    recipe = load_recipe(name)
    with caplog.at_level(logging.INFO):
        shared = shared_out(recipe, SimpleNamespace(size=processes, first=True))
    batch = shared.data.batch
    parts = [own_rows(batch, rank, processes) for rank in range(processes)]
    assert [row for part in parts for row in part] == list(range(batch))
    # no more than it takes
    assert recipe.data.batch <= batch < recipe.data.batch + processes
    assert (f"becomes {batch}" in caplog.text) == (batch != recipe.data.batch)
    if name in KNOWN:
        plans = plan_recipe(recipe, KNOWN[name], Video(3, 4, 4), processes)
        assert {plan.batch for plan in plans} == {batch}


def test_a_batch_becomes_no_larger_than_it_has_to():
    assert [even_batch(4, n) for n in (1, 2, 3, 4, 5, 8)] == [4, 4, 6, 4, 5, 8]
    assert even_batch(6, 4) == 8
