"""Low-rank changes: exact when they are new, whole in the file, and refused where they do not fit."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wantrim.hosts.diffusers.lora import add_low_rank, low_rank_changes, merge_lora, save_lora
from wantrim.hosts.diffusers.weights import load_original, new_transformer, save_original
from wantrim.toy.text import TEXT_DIM
from wantrim.training import four_steps
from wantrim.training.four_steps import FewSteps, distil

CPU = SimpleNamespace(device=torch.device("cpu"), first=True, wait=lambda: None)
SIZES = {"dim": 48, "num_heads": 4, "num_layers": 2, "ffn_dim": 64, "in_dim": 36, "out_dim": 16}
LINEARS = [*(f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"), "ffn.0"]
LINEARS.append("ffn.2")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wan") / "small.safetensors"
    save_original(path, new_transformer(**SIZES, text_dim=TEXT_DIM), torch.float32, {})
    return path


def output(model):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(1, 36, 2, 4, 4, generator=random)
    text = torch.randn(1, 3, TEXT_DIM, generator=random)
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), text, return_dict=False)[0]


def changed(weights, size=0.1):
    model = load_original(weights)
    add_low_rank(model, 4)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, change in low_rank_changes(model):
            change.up.copy_(size * torch.randn(change.up.shape, generator=random))
            change.down.copy_(change.down.bfloat16())
            change.up.copy_(change.up.bfloat16())
    return model


def test_new_changes_change_nothing_and_only_they_are_trained(weights):
    model = load_original(weights)
    before = output(model)
    factors = add_low_rank(model, 4)
    assert torch.equal(output(model), before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in factors}
    # two factors of ten matrices in two blocks
    assert len(factors) == 40


def test_a_file_has_the_stock_names_and_merges_into_the_same_function(weights, tmp_path):
    model, path = changed(weights), tmp_path / "lora.safetensors"
    save_lora(path, model, {"made": "here"})
    tensors = load_file(path)
    assert set(tensors) == {
        f"diffusion_model.blocks.{block}.{name}.lora_{part}.weight"
        for block in range(2)
        for name in LINEARS
        for part in ("down", "up")
    }
    assert tensors["diffusion_model.blocks.1.ffn.0.lora_down.weight"].shape == (4, 48)
    assert tensors["diffusion_model.blocks.1.ffn.0.lora_up.weight"].shape == (64, 4)
    with safe_open(path, "pt") as file:
        assert file.metadata()["made"] == "here"
    merged = load_original(weights)
    dense = output(merged)
    merge_lora(merged, path)
    torch.testing.assert_close(output(merged), output(model), rtol=0, atol=1e-5)
    assert (output(merged) - dense).abs().max() > 1e-2
    merge_lora(merged, path, -1.0)
    torch.testing.assert_close(output(merged), dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 48])
def test_a_rank_that_saves_nothing_is_refused(weights, rank):
    with pytest.raises(ValueError, match=f"rank: expected 1 to 47 for this model, got {rank}"):
        add_low_rank(load_original(weights), rank)


def test_a_lora_of_another_model_is_refused(weights, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_lora(path, changed(weights), {})
    tensors = load_file(path)
    stem = "diffusion_model.blocks.0.ffn.0"
    lost = {k: v for k, v in tensors.items() if k != f"{stem}.lora_up.weight"}
    moved = {k.replace("blocks.1", "blocks.7"): v for k, v in tensors.items()}
    wide = tensors | {f"{stem}.lora_down.weight": torch.zeros(4, 50, dtype=torch.bfloat16)}
    other = {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}
    for damaged in (lost, moved, wide, other):
        save_file(damaged, path)
        with pytest.raises(ValueError, match="does not fit this model"):
            merge_lora(load_original(weights), path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable safetensors LoRA"):
        merge_lora(load_original(weights), path)


def test_distilling_writes_its_lora_and_says_how(weights, tmp_path):
    recipe = FewSteps(
        world="2", steps=4, batch=2, warmup=1, rank=4, lr=5e-3, canvases=((0.5, 32), (1.0, 48))
    )
    options = {"every": 2}
    whole = distil(recipe, weights, tmp_path / "whole", CPU, **options)
    assert whole.name == "small_4_steps_lora.safetensors"
    with safe_open(whole, "pt") as file:
        made = json.loads(file.metadata()["wantrim"])
    assert made["finished"] and made["step"] == 4
    assert made["teacher"] == "small.safetensors" and made["teacher_steps"] == 20
    assert "progressive distillation" in made["method"]
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert [json.loads(line)["side"] for line in lines] == [32, 32, 48, 48]
    assert any(t.any() for name, t in load_file(whole).items() if "lora_up" in name)


def test_a_distillation_that_was_killed_behind_its_last_step_has_its_file(
    weights, tmp_path, monkeypatch
):
    recipe = FewSteps(steps=2, batch=1, warmup=1, rank=4, canvases=((1.0, 32),))
    from wantrim.training.checkpoints import State

    real = State.save

    def stop(self, step):
        real(self, step)
        raise KeyboardInterrupt

    monkeypatch.setattr(State, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        distil(recipe, weights, tmp_path, CPU)
    monkeypatch.undo()
    with safe_open(distil(recipe, weights, tmp_path, CPU), "pt") as file:
        assert json.loads(file.metadata()["wantrim"])["finished"]


def test_the_command_says_what_is_wrong_in_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["four_steps", "--steps", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: steps: expected a whole number of 1 or more"):
        four_steps.main()


def test_a_distillation_that_was_stopped_goes_on_bit_for_bit(weights, tmp_path, monkeypatch):
    recipe = FewSteps(steps=4, batch=1, warmup=1, rank=4, canvases=((1.0, 32),))
    options = {"every": 2}
    whole = distil(recipe, weights, tmp_path / "whole", CPU, **options)

    def stop(self, step):
        real(self, step)
        if step == 2:
            raise KeyboardInterrupt

    from wantrim.training.checkpoints import State

    real = State.save
    monkeypatch.setattr(State, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        distil(recipe, weights, tmp_path / "cut", CPU, **options)
    monkeypatch.undo()
    # and not with another recipe
    with pytest.raises(ValueError, match="cut: it began with guidance = 5.0, and this is 4.0"):
        distil(replace(recipe, guidance=4.0), weights, tmp_path / "cut", CPU, **options)
    cut = distil(recipe, weights, tmp_path / "cut", CPU, **options)
    want, got = load_file(whole), load_file(cut)
    assert all(torch.equal(want[key], got[key]) for key in want)
