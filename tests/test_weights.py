import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file

from wantrim.hosts.diffusers.weights import (
    load_original,
    new_transformer,
    save_original,
    to_diffusers_keys,
    to_original_keys,
)
from wantrim.toy import CHECKPOINT

SMALL = {"dim": 48, "num_heads": 4, "num_layers": 2, "ffn_dim": 64, "text_dim": 24, "out_dim": 16}


def test_names_go_there_and_back_also_for_image_to_video():
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=16,
        ffn_dim=32, num_layers=1, image_dim=20, added_kv_proj_dim=24, pos_embed_seq_len=6,
    )  # fmt: skip
    names = dict.fromkeys(model.state_dict())
    original = to_original_keys(names)
    assert list(to_diffusers_keys(original)) == list(names)
    for expected in (
        "blocks.0.self_attn.norm_q.weight", "blocks.0.cross_attn.k_img.weight",
        "blocks.0.cross_attn.norm_k_img.weight", "blocks.0.norm3.weight", "blocks.0.modulation",
        "img_emb.proj.0.bias", "img_emb.emb_pos", "head.modulation", "head.head.bias",
        "time_projection.1.weight", "text_embedding.2.bias", "patch_embedding.weight",
    ):  # fmt: skip
        assert expected in original


def test_an_unknown_key_is_named():
    with pytest.raises(ValueError, match="'blocks.0.self_attn.z.weight'"):
        to_diffusers_keys({"blocks.0.self_attn.z.weight": torch.zeros(1)})


@torch.no_grad()
def test_saved_and_loaded_is_the_same_function(tmp_path):
    model = new_transformer(**SMALL, in_dim=36).eval()
    save_original(tmp_path / "m.safetensors", model, torch.float32, {"made": "here"})
    again = load_original(tmp_path / "m.safetensors")
    x, t, text = torch.randn(1, 36, 2, 4, 6), torch.tensor([300.0]), torch.randn(1, 5, 24)
    assert torch.equal(model(x, t, text)[0], again(x, t, text)[0])
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata()["made"] == "here"
        assert json.loads(file.metadata()["config"])["transformer"]["in_dim"] == 36


def test_the_shipped_checkpoint_is_deep_and_small():
    model = load_original(CHECKPOINT)
    assert model.config.num_layers >= 16
    assert model.config.num_attention_heads >= 8
    assert CHECKPOINT.stat().st_size <= 20e6


def test_a_corrupt_file_is_refused_by_name(tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(CHECKPOINT.read_bytes()[:1000])
    with pytest.raises(ValueError, match="broken.safetensors is not a readable safetensors"):
        load_original(path)
    with pytest.raises(ValueError, match="missing.safetensors"):
        load_original(tmp_path / "missing.safetensors")


def test_a_file_without_config_or_with_a_wrong_one_is_refused(tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file({"head.modulation": torch.zeros(1, 2, 8)}, path)
    with pytest.raises(ValueError, match="plain.safetensors has no readable 'config'"):
        load_original(path)
    config = json.dumps({"transformer": SMALL | {"in_dim": 16}})
    save_file({"head.modulation": torch.zeros(1, 2, 8)}, path, {"config": config})
    with pytest.raises(ValueError, match="plain.safetensors does not fit its own config"):
        load_original(path)


@pytest.mark.parametrize(
    "config", [{}, [1], {"foo": 1}, {"num_heads": 0}, {"dim": "x"}, {"model_type": "i2v"}]
)
def test_a_hostile_config_is_refused(config, tmp_path):
    path = tmp_path / "hostile.safetensors"
    if isinstance(config, dict) and config:
        config = SMALL | {"in_dim": 16} | config
    save_file(
        {"head.modulation": torch.zeros(1, 2, 48)},
        path,
        {"config": json.dumps({"transformer": config})},
    )
    with pytest.raises(ValueError, match="hostile.safetensors does not fit its own config"):
        load_original(path)


def test_a_model_with_a_clip_branch_is_not_saved(tmp_path):
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=16,
        ffn_dim=32, num_layers=1, image_dim=20, added_kv_proj_dim=24, pos_embed_seq_len=6,
    )  # fmt: skip
    with pytest.raises(ValueError, match="without a CLIP branch, got one with image_dim"):
        save_original(tmp_path / "m.safetensors", model, torch.float32, {})
    assert not list(tmp_path.iterdir())
