"""A LoRA of a tiny Wan goes through ComfyUI's stock loader, every pair of factors of it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import comfy.sd
import comfy.utils
from wantrim.nodes.demo import WanTrimDemoModel
from wantrim.toy import CHECKPOINT

# as hosts/diffusers/lora.py writes them; tests/test_lora.py holds that
NAMES = [
    f"blocks.{block}.{name}"
    for block in range(16)
    for name in (
        *(f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"),
        "ffn.0",
        "ffn.2",
    )
]


@pytest.fixture(scope="module")
def factors() -> dict[str, torch.Tensor]:
    random, weights, made = torch.Generator().manual_seed(0), load_file(CHECKPOINT), {}
    for name in NAMES:
        out_dim, in_dim = weights[f"{name}.weight"].shape
        for part, shape in (("down", (4, in_dim)), ("up", (out_dim, 4))):
            made[f"diffusion_model.{name}.lora_{part}.weight"] = 0.05 * torch.randn(
                shape, generator=random
            )
    return made


def test_the_stock_loader_takes_every_factor_and_adds_their_product(factors, tmp_path, caplog):
    path = tmp_path / "lora.safetensors"
    save_file(factors, path)
    model = WanTrimDemoModel.execute().result[0]
    lora = comfy.utils.load_torch_file(str(path), safe_load=True)
    changed, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)
    assert "not loaded" not in caplog.text
    assert set(changed.patches) == {f"diffusion_model.{name}.weight" for name in NAMES}
    weights = load_file(CHECKPOINT)
    changed.patch_model()
    try:
        state = changed.model.state_dict()
        for name in NAMES[::23]:
            stem = f"diffusion_model.{name}"
            product = factors[f"{stem}.lora_up.weight"] @ factors[f"{stem}.lora_down.weight"]
            before = weights[f"{name}.weight"].float()
            torch.testing.assert_close(
                state[f"{stem}.weight"].float(), before + product, rtol=0, atol=2e-2
            )
    finally:
        changed.unpatch_model()
