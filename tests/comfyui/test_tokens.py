"""What a block computes for the kept tokens, against the host's block on all of them.

Two identities hold for any block, whatever its weights: with the dropped keys and values kept, a
kept token comes out as from the full block; without them, as from the full block with the dropped
keys masked. They fail when rotary tables, modulation, reference tokens or rows of the batch are
gathered wrongly.
"""

import pytest
import torch

from wantrim.hosts.comfyui.blocks import OVERRIDE, _Block
from wantrim.tests.comfyui import tiny

BLOCK = 2


def some_tokens(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept and dropped positions; each latent frame keeps another number of tokens."""
    generator = torch.Generator().manual_seed(4)
    kept, dropped = [], []
    for _ in range(batch):
        order = torch.randperm(length, generator=generator)
        kept.append(order[: length * 2 // 3].sort().values)
        dropped.append(order[length * 2 // 3 :].sort().values)
    return torch.stack(kept), torch.stack(dropped)


def mask_keys(dropped: torch.Tensor):
    """An attention override in which no self-attention sees the dropped keys."""

    def override(func, q, k, v, *args, **kwargs):
        if q.shape[1] == k.shape[1]:
            mask = torch.ones(len(dropped), 1, 1, k.shape[1], dtype=torch.bool)
            mask.scatter_(-1, dropped[:, None, None], False)
            kwargs["mask"] = mask
        return func(q, k, v, *args, **kwargs)

    return override


def rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return torch.stack([t[i] for t, i in zip(tensor, index, strict=True)])


def compare_in_a_block(model, given, compare) -> None:
    """Calls `compare` with the arguments of one real block call."""
    seen = []

    def probe(args, extra):
        seen.append(args["vec"].shape)
        compare(args, extra)
        return extra["original_block"](args)

    model = model.clone()
    model.set_model_patch_replace(probe, "dit", "double_block", BLOCK)
    tiny.sample(model, given, steps=1)
    assert len(seen) == 1


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_kept_tokens_with_all_keys_come_out_as_from_the_full_block(kind, batch):
    def compare(args, extra):
        hidden = args["img"]
        kept, dropped = some_tokens(*hidden.shape[:2])
        full = extra["original_block"](args)["img"]
        some = _Block(args, extra, None).run_subset(kept, dropped)
        assert torch.allclose(some, rows(full, kept), atol=1e-4)
        leave = _Block(args, extra, None).run_subset(kept, None)
        assert not torch.allclose(leave, some, atol=1e-2)

    compare_in_a_block(tiny.base_model(kind), tiny.case(kind, batch=batch), compare)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_kept_tokens_alone_come_out_as_with_the_others_masked(kind, batch):
    def compare(args, extra):
        hidden = args["img"]
        kept, dropped = some_tokens(*hidden.shape[:2])
        options = {**args["transformer_options"], OVERRIDE: mask_keys(dropped)}
        masked = extra["original_block"]({**args, "transformer_options": options})["img"]
        some = _Block(args, extra, None).run_subset(kept, None)
        assert torch.allclose(some, rows(masked, kept), atol=1e-4)

    compare_in_a_block(tiny.base_model(kind), tiny.case(kind, batch=batch), compare)


def test_modulation_per_latent_frame_goes_with_its_tokens():
    def compare(args, extra):
        vec, hidden = args["vec"], args["img"]
        assert vec.shape[1] == tiny.FRAMES
        # the given frame is at another timestep
        assert (vec[:, 0] - vec[:, 1]).abs().max() > 0.1
        kept, _ = some_tokens(*hidden.shape[:2])
        frame = kept // tiny.PER_FRAME
        assert len({int((frame[0] == f).sum()) for f in range(tiny.FRAMES)}) > 1
        by_hand = {
            **args,
            "img": rows(hidden, kept),
            "pe": torch.cat([args["pe"][:, i] for i in kept]),
            "vec": rows(vec, frame),
        }
        expected = extra["original_block"](by_hand)["img"]
        some = _Block(args, extra, None).run_subset(kept, None)
        assert torch.allclose(some, expected, atol=1e-5)
        by_position = extra["original_block"]({**by_hand, "vec": vec})["img"]
        assert not torch.allclose(by_position, expected, atol=1e-2)

    compare_in_a_block(tiny.base_model("ti2v"), tiny.case("ti2v"), compare)


@pytest.mark.parametrize("height", [9, 8])
def test_modulation_that_does_not_divide_the_tokens_is_spread_as_the_host_does(height):
    # 3 latent frames and one token too many, as with tokens outside the grid
    def compare(args, extra):
        hidden = torch.cat([args["img"], args["img"][:, :1]], 1)
        pe = torch.cat([args["pe"], args["pe"][:, :1]], 1)
        args = {**args, "img": hidden, "pe": pe}
        kept, dropped = some_tokens(*hidden.shape[:2])
        full = extra["original_block"](args)["img"]
        some = _Block(args, extra, None).run_subset(kept, dropped)
        assert torch.allclose(some, rows(full, kept), atol=1e-4)

    compare_in_a_block(tiny.base_model("ti2v"), tiny.case("ti2v", height=height), compare)


@pytest.mark.parametrize("kind", ["t2v", "i2v", "i2v_clip", "ti2v", "vace"])
def test_keeping_keys_and_values_gives_another_result(kind):
    model, given = tiny.base_model(kind), tiny.case(kind)
    dense = tiny.sample(model, given, steps=1)
    outs = {}
    for dropped_kv in ("leave", "keep"):
        patched = tiny.trimmed(model, dropped_kv=dropped_kv, reselect_every=6)
        outs[dropped_kv] = tiny.sample(patched, given, steps=1)
        assert not tiny.report_of(patched).notes
    assert not torch.allclose(outs["leave"], outs["keep"], atol=1e-3)
    assert torch.isfinite(outs["keep"]).all()
    assert not torch.allclose(outs["keep"], dense, atol=1e-3)


@pytest.mark.parametrize("importance", ["attention", "update_norm", "hidden_norm", "random"])
@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
def test_keeping_keys_and_values_runs_with_every_importance(kind, importance):
    patched = tiny.trimmed(tiny.base_model(kind), dropped_kv="keep", importance=importance)
    out = tiny.sample(patched, tiny.case(kind))
    assert torch.isfinite(out).all()
    assert tiny.report_of(patched).kept_share < 0.9
