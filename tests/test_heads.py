"""Head plans on diffusers' WanTransformer3DModel, against the dense model with masks."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import sample
from wantrim.hosts.diffusers.weights import load_original, new_transformer
from wantrim.methods.heads import FULL, OFF, HeadPlan
from wantrim.methods.schedule import Schedule
from wantrim.methods.shares import Shares
from wantrim.methods.tokens import TokenPlan
from wantrim.report.figures import attention_left
from wantrim.report.words import record_text
from wantrim.toy import CHECKPOINT

BLOCKS, HEADS = 3, 6
SIZE = (3, 8, 12)
GRID = (3, 4, 6)
BOTH = (COND, UNCOND)
MIXED = ("frame", FULL, "tile2", OFF, "tile2", "frame")


def wan(in_dim=16) -> torch.nn.Module:
    torch.manual_seed(0)
    model = new_transformer(
        dim=96,
        num_heads=HEADS,
        num_layers=BLOCKS,
        ffn_dim=64,
        in_dim=in_dim,
        out_dim=16,
        text_dim=24,
    )
    for block in model.blocks:
        torch.nn.init.normal_(block.scale_shift_table, std=0.5)
    return model.eval()


def text(batch=1) -> torch.Tensor:
    return torch.randn(batch, 7, 24, generator=torch.Generator().manual_seed(9))


def plan(*blocks, cross=None) -> HeadPlan:
    """A plan of these blocks, the rest full."""
    own = [*blocks, *[(FULL,) * HEADS] * (BLOCKS - len(blocks))]
    return HeadPlan(tuple(own), tuple(cross or [(FULL,) * HEADS] * BLOCKS))


def run(model, trim=None, batch=1, cond_or_uncond=BOTH, **options):
    options = {"steps": 2, "guidance": 4.0} | options
    if trim is None:
        return sample(model, text(batch), SIZE, **options)
    with attach(model, trim, cond_or_uncond=cond_or_uncond, shift=3.0):
        return sample(model, text(batch), SIZE, **options)


class Masked(TorchFunctionMode):
    """The host's attention with a plan's patterns as dense masks."""

    def __init__(self, heads: HeadPlan):
        super().__init__()
        self.heads, self.calls = heads, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        block, cross = divmod(self.calls % (2 * BLOCKS), 2)
        self.calls += 1
        kinds = (self.heads.self_attention, self.heads.cross_attention)[cross][block]
        q, k, v = args[:3] if args else (kwargs.pop(n) for n in ("query", "key", "value"))
        kwargs.pop("attn_mask", None)
        mask = torch.stack([_mask(kind, q.shape[2], k.shape[2]) for kind in kinds])
        out = func(q, k, v, attn_mask=mask[None], **kwargs)
        alive = torch.tensor([kind != OFF for kind in kinds], dtype=out.dtype)
        return out * alive.view(1, -1, 1, 1)


def _mask(kind: str, queries: int, keys: int) -> torch.Tensor:
    if kind in (FULL, OFF):
        return torch.ones(queries, keys, dtype=torch.bool)
    frames, height, width = GRID
    if kind == "frame":
        mine = _frames_of(queries)
        theirs = mine if keys == queries else torch.cat([mine, _dropped_frames(queries)])
        return mine[:, None] == theirs
    at = torch.arange(frames * height * width)
    frame, y, x = at // (height * width), at % (height * width) // width, at % width
    side, group = int(kind[-1]), torch.zeros_like(at)
    tile = (y * side // height) * side + x * side // width
    for number in range(frames):
        here = (frame == number).nonzero()[:, 0]
        parts = torch.tensor_split(here[tile[here].argsort(stable=True)], side**2)
        for part, some in enumerate(parts):
            group[some] = part
    return group[:, None] == group


def _counts(kept: int) -> list[int]:
    """Tokens kept of each latent frame: equally many, or all of the first one."""
    frames, height, width = GRID
    # half of each: 36 tokens; with the first one whole: 48, which three would share as well
    if kept != 48:
        return [kept // frames] * frames
    rest = (kept - height * width) // (frames - 1)
    return [height * width, *[rest] * (frames - 1)]


def _frames_of(kept: int) -> torch.Tensor:
    counts = torch.tensor(_counts(kept))
    return torch.repeat_interleave(torch.arange(GRID[0]), counts)


def _dropped_frames(kept: int) -> torch.Tensor:
    counts = GRID[1] * GRID[2] - torch.tensor(_counts(kept))
    return torch.repeat_interleave(torch.arange(GRID[0]), counts)


def test_a_plan_of_full_heads_is_exact():
    model = wan()
    assert TrimPlan(heads=HeadPlan.full(BLOCKS, HEADS)).neutral
    for batch in (1, 2):
        trimmed = run(model, TrimPlan(heads=HeadPlan.full(BLOCKS, HEADS)), batch)
        assert torch.equal(trimmed, run(model, batch=batch))


def test_the_same_plan_gives_the_same_video_each_time():
    model = wan()
    first, second = (run(model, TrimPlan(heads=plan(MIXED))) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, run(model))


@pytest.mark.parametrize("batch", [1, 2])
def test_patterns_equal_the_dense_model_with_masks(batch):
    cross = [(FULL, OFF, FULL, FULL, OFF, FULL), (OFF,) * HEADS, (FULL,) * HEADS]
    heads = plan(MIXED, ("tile2",) * HEADS, (OFF,) * HEADS, cross=cross)
    model = wan()
    trimmed = run(model, TrimPlan(heads=heads), batch)
    with Masked(heads) as masked:
        dense = run(model, batch=batch)
    assert masked.calls == 2 * 2 * BLOCKS
    torch.testing.assert_close(trimmed, dense, rtol=1e-4, atol=1e-4)
    assert (trimmed - run(model, batch=batch)).abs().max() > 1e-2


def test_split_prompts_give_what_a_batch_gives():
    tokens = TokenPlan(Schedule(0.6), reselect_every=2)
    model, trim = wan(), TrimPlan(tokens, plan(MIXED, MIXED))
    together = run(model, trim, steps=4)
    apart = _split_run(model, trim, steps=4)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def _split_run(model, trim, steps, guidance=4.0):
    """Guidance in two calls a step, as diffusers' pipeline does it."""
    with attach(model, trim, cond_or_uncond=(COND,), shift=3.0) as attachment:

        class Apart(torch.nn.Module):
            config, cache_context = model.config, model.cache_context

            def __init__(self):
                super().__init__()
                # the sampler asks a parameter for the device
                self.one = torch.nn.Parameter(torch.zeros(1))

            def forward(self, hidden, timestep, both, **options):
                outs = []
                for role, chunk, words in zip(BOTH, hidden.chunk(2), both.chunk(2), strict=True):
                    attachment.cond_or_uncond = (role,)
                    outs.append(model(chunk, timestep[: len(chunk)], words, **options)[0])
                return (torch.cat(outs),)

        return sample(Apart(), text(), SIZE, steps=steps, guidance=guidance)


# of three steps the last computes half of the tokens, and sees remembered keys of the others
HALF = Shares((1.0, 0.857, 0.6), (1, 1, 0.5))
TOKENS = {
    "tape": {"tokens": TokenPlan(Schedule(0.5, "constant"), reselect_every=BLOCKS)},
    "shares": {"shares": HALF},
}


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("anchored", [False, True])
def test_heads_and_dropped_tokens_together(anchored, name):
    """Dropping tokens under masks that are as dense as the tokens that run."""
    model, parts = wan(36 if anchored else 16), TOKENS[name]
    options = {"steps": 3, "condition": _condition() if anchored else None}
    heads = plan(("frame", FULL, OFF, "frame", "frame", FULL), ("frame",) * HEADS)
    both = run(model, TrimPlan(heads=heads, **parts), **options)
    with Masked(heads) as masked:
        dense = run(model, TrimPlan(**parts), **options)
    assert masked.calls == 3 * 2 * BLOCKS
    # keys of 8 bits may round to the next one
    torch.testing.assert_close(both, dense, rtol=1e-3, atol=1e-3 if parts.get("shares") else 1e-4)
    assert (both - run(model, TrimPlan(**parts), **options)).abs().max() > 1e-2


def _condition() -> torch.Tensor:
    image = torch.randn(1, 20, *SIZE, generator=torch.Generator().manual_seed(8))
    image[:, :4] = 0
    image[:, :4, 0] = 1
    return image


def test_a_head_that_is_off_gives_the_output_projection_nothing():
    model = wan()
    heads = plan((OFF, *[FULL] * (HEADS - 1)))
    trimmed = run(model, TrimPlan(heads=heads))
    silenced = wan()
    silenced.blocks[0].attn1.to_out[0].weight.data[:, : 96 // HEADS] = 0
    torch.testing.assert_close(trimmed, run(silenced), rtol=1e-5, atol=1e-5)


def test_a_plan_of_another_model_is_refused():
    with pytest.raises(ValueError, match="expected a plan for 3 blocks of 6 heads, got one for 2"):
        attach(wan(), TrimPlan(heads=HeadPlan(((OFF,) * 6,) * 2, ((FULL,) * 6,) * 2)))


def test_nothing_stays_behind_after_an_error():
    model = wan()
    before = run(model)
    with pytest.raises(RuntimeError, match="stop"), attach(model, TrimPlan(heads=plan(MIXED))):
        raise RuntimeError("stop")
    assert torch.equal(run(model), before)


def test_the_report_says_what_the_heads_did():
    heads = plan(("frame",) * HEADS, (OFF,) * HEADS)
    with attach(wan(), TrimPlan(heads=heads), cond_or_uncond=BOTH, shift=3.0) as trim:
        sample(trim.model, text(), SIZE, steps=2, guidance=4.0)
        report = trim.finish()
    # a third of block 0, nothing of block 1, all of block 2
    assert attention_left(report) == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert "heads 6 full, 6 frame, 6 off" in report.planned
    assert "work left by the heads' patterns: 44.4%" in record_text(report)


def test_the_shipped_tiny_wan_takes_a_plan():
    model = load_original(CHECKPOINT)
    blocks, heads = len(model.blocks), model.config.num_attention_heads
    frames = HeadPlan(
        (("frame",) * heads, *[(FULL,) * heads] * (blocks - 1)), ((FULL,) * heads,) * blocks
    )
    words = torch.randn(1, 16, model.config.text_dim, generator=torch.Generator().manual_seed(1))
    size = (5, 12, 12)
    dense = sample(model, words, size, steps=2, guidance=1)
    with attach(model, TrimPlan(heads=frames), shift=3.0):
        trimmed = sample(model, words, size, steps=2, guidance=1)
    assert torch.isfinite(trimmed).all() and not torch.equal(trimmed, dense)
