"""Head plans on ComfyUI's Wan models, against the host's own attention with masks."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from comfy.patcher_extension import WrappersMP
from wantrim.engine import call
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import attach, attachment_of, detach
from wantrim.hosts.comfyui.blocks import OVERRIDE
from wantrim.methods.heads import FULL, OFF, HeadPlan
from wantrim.nodes.tokens import WanTrimTokens
from wantrim.report.figures import attention_left
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.test_chaining import counting
from wantrim.tests.comfyui.test_neutral import keep_everything

WHOLE = (FULL,) * tiny.HEADS
MIXED = ("frame", FULL, OFF, "frame", "tile2", FULL, OFF, "tile2")
SOME_OFF = (OFF, FULL, FULL, FULL, OFF, FULL, FULL, FULL)


def heads(own=None, cross=None) -> HeadPlan:
    """A plan of the given blocks; the others are full."""
    own, cross = own or {0: MIXED, 3: ("frame",) * tiny.HEADS}, cross or {1: SOME_OFF}
    return HeadPlan(
        *(tuple(kind.get(i, WHOLE) for i in range(tiny.LAYERS)) for kind in (own, cross))
    )


def trimmed(model, plan=None, tokens=None):
    return attach(model, TrimPlan(tokens, plan or heads()))


def with_masks(model, plan: HeadPlan, case: tiny.Case):
    """A clone whose attention is dense, masked as the plan's patterns say."""
    masked = model.clone()
    reference = tiny.PER_FRAME if "reference_latents" in case.positive[0][1] else 0

    def override(func, q, k, v, *args, **kwargs):
        block = kwargs["transformer_options"]["block_index"]
        own = q.shape[1] == k.shape[1]
        kinds = (plan.self_attention if own else plan.cross_attention)[block]
        heads = kwargs["heads"]
        parts = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        mask = torch.stack([_mask(kind, q.shape[1], k.shape[1], reference) for kind in kinds])
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask[None])
        alive = torch.tensor([float(kind != OFF) for kind in kinds]).view(1, -1, 1, 1)
        return (out * alive).transpose(1, 2).flatten(2)

    masked.model_options["transformer_options"][OVERRIDE] = override
    return masked


def _mask(kind: str, queries: int, keys: int, reference: int) -> torch.Tensor:
    if kind in (FULL, OFF):
        return torch.ones(queries, keys, dtype=torch.bool)
    at = torch.arange(queries) - reference
    frame, place = at // tiny.PER_FRAME, at % tiny.PER_FRAME
    group = frame
    if kind == "tile2":
        # 4 x 5 tokens in a latent frame: columns 0 to 2 and 3 to 4; then equal parts of five
        y, x = place // 5, place % 5
        tile = (y * 2 // 4) * 2 + x * 2 // 5
        group = torch.zeros_like(at)
        for number in range(int(frame.max()) + 1):
            here = (frame == number).nonzero()[:, 0]
            group[here[tile[here].argsort(stable=True)]] = torch.arange(len(here)) // 5
    outside = at < 0
    return (group[:, None] == group) | outside[:, None] | outside


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_plan_of_full_heads_equals_the_untouched_model(kind):
    model, given = tiny.base_model(kind), tiny.case(kind)
    plan = HeadPlan.full(tiny.LAYERS, tiny.HEADS)
    assert torch.equal(tiny.ksampler(trimmed(model, plan), given), tiny.ksampler(model, given))


@pytest.mark.parametrize("kind", ["t2v", "i2v", "i2v_clip", "ti2v", "camera", "fun"])
def test_patterns_equal_the_host_with_masks(kind):
    model, given, plan = tiny.base_model(kind), tiny.case(kind), heads()
    out = tiny.ksampler(trimmed(model, plan), given)
    torch.testing.assert_close(
        out, tiny.ksampler(with_masks(model, plan, given), given), rtol=1e-3, atol=1e-3
    )
    assert (out - tiny.ksampler(model, given)).abs().max() > 0.05


def test_vace_takes_a_plan_and_its_own_blocks_are_left_alone():
    model, given = tiny.base_model("vace"), tiny.case("vace")
    everything, calls = trimmed(model), Counter()

    def count(func, q, k, v, *args, **kwargs):
        calls[q.shape[1] == k.shape[1], kwargs["heads"]] += 1
        return func(q, k, v, *args, **kwargs)

    everything.model_options["transformer_options"][OVERRIDE] = count
    out = tiny.ksampler(everything, given, steps=2)
    assert torch.isfinite(out).all()
    # two steps, prompts of one length in one call: 4 of 6 blocks and 2 vace blocks are whole
    assert calls[True, tiny.HEADS] == 2 * (4 + 2) + 2
    # block 0 runs two full, two frame and two tile heads; block 3 all eight within latent frames
    assert calls[True, 2] == 2 * 3


@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v", "fun"])
def test_heads_and_tokens_in_any_wiring_order_are_one_plan(kind):
    model, given = tiny.base_model(kind), tiny.case(kind)

    def with_tokens(m):
        return WanTrimTokens.execute(m, 0.4, 0.0, 1.0, {"preset": "paper"}).result[0]

    def with_heads(m):
        present = attachment_of(m)
        return attach(m, replace(present.plan if present else TrimPlan(), heads=heads()))

    one = with_tokens(with_heads(model))
    other = with_heads(with_tokens(model))
    out = tiny.ksampler(one, given)
    assert torch.equal(out, tiny.ksampler(other, given))
    report = tiny.report_of(one)
    assert report.kept_share < 0.9 and attention_left(report) < 0.95
    for alone in (with_tokens(model), with_heads(model)):
        assert not torch.allclose(out, tiny.ksampler(alone, given), atol=1e-3)


@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v", "fun"])
def test_heads_in_whole_partial_and_repeated_steps(kind):
    """The remembered keys of left out tokens are seen by the heads whose pattern has them."""
    model, given = tiny.base_model(kind), tiny.case(kind)
    steps = (1, 1, 0, 0.4)

    def run(plan):
        patched = tiny.shared(model, *steps, heads=plan)
        out = tiny.sample(patched, given, steps=4)
        assert torch.isfinite(out).all() and not tiny.report_of(patched).notes
        assert tiny.shares(patched) == pytest.approx(steps)
        return out, tiny.report_of(patched).steps

    out, ran = run(heads())
    assert [step.patterned for step in ran] == [[0, 1, 3], [0, 1, 3], [], [0, 1, 3]]
    alone, _ = run(None)
    assert not torch.allclose(out, alone, atol=1e-3)
    # a plan of full heads is none, and one whose heads are all within latent frames is another
    frames, _ = run(heads(dict.fromkeys(range(tiny.LAYERS), ("frame",) * tiny.HEADS), {0: WHOLE}))
    assert not torch.allclose(out, frames, atol=1e-3)
    full = HeadPlan.full(tiny.LAYERS, tiny.HEADS)
    assert torch.equal(run(full)[0], alone)


def test_patterns_of_a_partial_step_equal_the_host_with_masks(monkeypatch):
    """With all tokens computed a partial step is the whole step: with none left out, and all."""
    model, given = tiny.base_model(), tiny.case()
    monkeypatch.setattr(call, "select_tokens", keep_everything)
    out = tiny.sample(tiny.shared(model, 1, 1, 0.4, heads=heads()), given)
    masked = tiny.sample(with_masks(model, heads(), given), given)
    torch.testing.assert_close(out, masked, rtol=1e-3, atol=1e-3)


def test_earlier_override_runs_every_part_of_every_attention():
    base = tiny.base_model().clone()
    seen = counting(base)
    plan = heads({0: MIXED}, {0: WHOLE})
    tiny.sample(trimmed(base, plan), steps=1)
    tokens = tiny.FRAMES * tiny.PER_FRAME
    # of block 0: full heads, frames as a batch, tiles as a batch
    assert seen.count((tiny.PER_FRAME, tiny.PER_FRAME)) == 1
    assert seen.count((15, 15)) == 1
    assert seen.count((tokens, tokens)) == tiny.LAYERS


@pytest.mark.parametrize("tokens", [(7, 7), (7, 9)], ids=["one call", "two calls"])
def test_split_and_batched_prompts_agree(tokens):
    model = tiny.base_model()
    given = tiny.case(tokens=tokens)
    out = tiny.sample(trimmed(model), given)
    masked = tiny.sample(with_masks(model, heads(), given), given)
    torch.testing.assert_close(out, masked, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["euler", "heun", "uni_pc", "lcm"])
def test_samplers(sampler):
    model, given = tiny.base_model(), tiny.case()
    out = tiny.sample(trimmed(model), given, sampler=sampler)
    masked = tiny.sample(with_masks(model, heads(), given), given, sampler=sampler)
    torch.testing.assert_close(out, masked, rtol=5e-3, atol=5e-3)
    shared = tiny.shared(model, 1, 1, 0, 0.4, heads=heads())
    assert torch.isfinite(tiny.sample(shared, given, steps=4, sampler=sampler)).all()
    assert tiny.report_of(shared).kept_share < 0.8


def test_batch_of_two_videos():
    model, given = tiny.base_model(), tiny.case(batch=2)
    tokens = tiny.token_plan(0.6)
    out = tiny.sample(trimmed(model, heads(), tokens), given)
    noise = tiny.comfy.sample.prepare_noise(given.latent, 7)
    for i in range(2):
        one = tiny.sample(
            trimmed(model, heads(), tokens), tiny.case(), noise=noise[i : i + 1].clone()
        )
        torch.testing.assert_close(out[i : i + 1], one, rtol=1e-3, atol=1e-3)


def test_nothing_stays_behind():
    model, given = tiny.base_model(), tiny.case()
    before = tiny.sample(model, given)
    patched = trimmed(model)

    def stop(executor, *args, **kwargs):
        executor(*args, **kwargs)
        raise RuntimeError("stop")

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "stop", stop)
    with pytest.raises(RuntimeError, match="stop"):
        tiny.sample(patched, given)
    assert torch.equal(tiny.sample(model, given), before)
    assert torch.equal(tiny.sample(detach(trimmed(model)), given), before)
    again = trimmed(trimmed(model))
    assert torch.equal(tiny.sample(again, given), tiny.sample(trimmed(model), given))


def test_bf16_model_runs_and_stays_near():
    weights, metadata = tiny.state_dict("t2v")
    half = tiny.comfy.sd.load_diffusion_model_state_dict(
        {k: v.bfloat16() for k, v in weights.items()},
        model_options={"dtype": torch.bfloat16},
        metadata=metadata,
    )
    out = tiny.sample(trimmed(half))
    whole = tiny.sample(trimmed(tiny.base_model()))
    dense = tiny.sample(tiny.base_model()) - tiny.sample(half)
    assert (out - whole).abs().mean() < 3 * dense.abs().mean()
