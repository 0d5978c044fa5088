"""The cost model: what torch counts, program by program, and traffic by hand."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from wantrim.benchmarks.flops import count_flops, forward_flops, plan_work
from wantrim.benchmarks.peers.random_router import RandomRouter
from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.engine.program import (
    ALL,
    KEPT,
    READ,
    SKIP,
    UPDATE,
    WRITE,
    Program,
    Row,
    expected_programs,
)
from wantrim.engine.work import program_work
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import denoise, sigmas_for
from wantrim.hosts.diffusers.shape import wan_shape
from wantrim.hosts.diffusers.weights import load_original, new_transformer
from wantrim.methods import importance
from wantrim.methods.cost import WanShape, Width, Work, block_work, outside_flops
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import OFF, PATTERNS, HeadPlan
from wantrim.methods.routers import FixedRouter
from wantrim.methods.schedule import Schedule
from wantrim.methods.shares import Shares
from wantrim.methods.tokens import TokenPlan
from wantrim.tests.small_wan import SIZE, condition, random_wan, words
from wantrim.toy import CHECKPOINT
from wantrim.training.parameters import block_parameters

GRID, BLOCKS, HEADS = TokenGrid(3, 4, 3), 6, 4
SHIFT, STEPS = 3.0, 5
SIGMAS = tuple(sigmas_for(STEPS, SHIFT)[:-1].tolist())


@pytest.fixture(scope="module")
def wan():
    return random_wan(BLOCKS, in_dim=36)


def mixed_heads(blocks=BLOCKS, heads=HEADS) -> HeadPlan:
    """Every pattern somewhere; one block is whole and one has no cross-attention."""
    rows = [tuple(PATTERNS[(b + n) % len(PATTERNS)] for n in range(heads)) for b in range(blocks)]
    cross = [
        tuple(OFF if (b + n) % 3 == 0 else "full" for n in range(heads)) for b in range(blocks)
    ]
    rows[1], cross[1] = ("full",) * heads, ("full",) * heads
    cross[2] = (OFF,) * heads
    return HeadPlan(tuple(rows), tuple(cross))


@pytest.fixture(autouse=True)
def few_queries(monkeypatch):
    """So few that they are sampled."""
    monkeypatch.setattr(importance, "MIN_QUERIES", 9)


def tape(every: int, **options) -> TokenPlan:
    return TokenPlan(Schedule(0.6), reselect_every=every, **options)


PARTS = Shares(SIGMAS, (1, 1, 0.4, 0, 0.25))
PLANS = {
    "nothing": TrimPlan(),
    "tape": TrimPlan(tape(3)),
    "tape, late": TrimPlan(tape(4, start=0.35)),
    "tape, loose": TrimPlan(tape(2, anchor=False)),
    "shares": TrimPlan(shares=PARTS),
    "repeats": TrimPlan(shares=Shares(SIGMAS, (1, 0, 0.5, 0, 1), context=False)),
    "blocks": TrimPlan(blocks=BlockPlan(RandomRouter(), BlockBudget(0.5, 0.8))),
    "heads": TrimPlan(heads=mixed_heads()),
    "heads and tape": TrimPlan(tape(3), mixed_heads()),
    "heads and shares": TrimPlan(heads=mixed_heads(), shares=PARTS),
    # a choosing block that is skipped leaves the choice, and the full run, to the next
    "tape and blocks": TrimPlan(tape(3), blocks=BlockPlan(FixedRouter((3, 4)))),
    "all but parts": TrimPlan(
        tape(4),
        mixed_heads(),
        BlockPlan(RandomRouter(3), BlockBudget(0.5, 0.8)),
        Shares(SIGMAS, (1, 0, 1, 0, 1)),
    ),
}


def counted(model, plan, prompts=2, given=0) -> tuple[list[int], object]:
    """What torch counts in every step, and the record."""
    options = {"steps": STEPS, "shift": SHIFT, "guidance": 4.0 if prompts == 2 else 1.0}
    with attach(model, plan, cond_or_uncond=(COND, UNCOND)[:prompts], shift=SHIFT) as attachment:
        steps = denoise(model, words(), SIZE, **options, condition=condition(range(given)))
        found = [count_flops(lambda: next(steps)) for _ in range(STEPS)]
        return found, attachment.finish()


@pytest.mark.parametrize("name", [name for name in PLANS if name != "nothing"])
@pytest.mark.parametrize(("given", "prompts"), [(0, 2), (1, 1)])
def test_rows_cost_what_torch_counts(wan, name, given, prompts):
    plan, shape = PLANS[name], wan_shape(wan, 7)
    found, record = counted(wan, plan, prompts, given)
    for flops, step in zip(found, record.steps, strict=True):
        works = [
            program_work(shape, step.program, plan, prompts, rows=rows)
            for rows in (None, step.rows)
        ]
        assert works[0] == works[1]
        # with context, tiles of one latent frame differ by a token
        close = 0.01 if plan.trims_heads and step.program.partial else 0
        assert works[0].flops == pytest.approx(flops, rel=close)
    dense = program_work(shape, Program((Row(ALL, 36),) * BLOCKS, GRID, 12), TrimPlan(), prompts)
    # the agreement would prove nothing if the plan hardly mattered
    assert sum(found) < 0.95 * STEPS * dense.flops
    assert dense.flops == prompts * forward_flops(shape, 36)


@pytest.mark.parametrize(
    "name", [name for name in PLANS if "blocks" not in name and "all" not in name]
)
def test_a_run_costs_what_is_expected_of_it(wan, name):
    """Also where a router decides in the run, when its blocks are alike."""
    plan, shape = PLANS[name], wan_shape(wan, 7)
    programs = expected_programs(plan, SIGMAS, SHIFT, GRID, BLOCKS, (True, False, False))
    found, _ = counted(wan, plan, 2, 1)
    close = 0.01 if plan.trims_heads and plan.shares is not None else 0
    assert plan_work(shape, programs, plan).flops == pytest.approx(sum(found), rel=close)


def test_blocks_that_a_router_picks_are_expected_by_number(wan):
    plan, shape = PLANS["blocks"], wan_shape(wan, 7)
    programs = expected_programs(plan, SIGMAS, SHIFT, GRID, BLOCKS)
    assert plan_work(shape, programs, plan).flops == sum(counted(wan, plan)[0])


def test_a_narrow_model_costs_what_torch_counts():
    """Widths of a slim model, in a model that has them throughout, on some of its tokens."""
    model = random_wan(BLOCKS, in_dim=36)
    shape = wan_shape(model, 7)
    width = Width(*[(tuple(range(n)),) * BLOCKS for n in (4, 4, 64)])
    wide = replace(shape, ffn_dim=200)
    for name in ("tape", "shares", "heads"):
        found, record = counted(model, PLANS[name], 1)
        for flops, step in zip(found, record.steps, strict=True):
            slim = program_work(wide, step.program, PLANS[name], width=width)
            assert slim.flops == flops
            if not step.program.repeats:
                assert program_work(wide, step.program, PLANS[name]).flops > 1.05 * flops


# traffic by hand: numbers that are read or written

SHAPE = WanShape(32, 64, 3, text_tokens=5, head_dim=8)
ROTARY = 4 * 8


def moved(*rows: Row, share=0.5, alone=True, bits=8, heads=None, **options) -> float:
    """Beside the blocks' own."""
    program = Program(rows, GRID, 6, share, alone=alone, bits=bits, heads=heads)
    plan = TrimPlan(shares=Shares((1.0, 0.5), (1.0, 0.5)))
    own = sum(block_work(SHAPE, row.tokens).moved for row in rows if row.run != SKIP)
    return program_work(SHAPE, program, plan, **options).moved - own


def test_kept_tokens_are_taken_out_and_put_back_once_a_stretch():
    whole, kept, skip = Row(ALL, 36), Row(KEPT, 18), Row(SKIP)
    # 18 rows of 32 numbers and of the rotary table, read and written; then a copy of all 36 rows
    # with the 18
    rotary, hidden = 2 * 18 * ROTARY, 2 * 18 * 32 + 2 * (36 + 18) * 32
    once = rotary + hidden
    assert moved(whole, whole, whole) == 0
    for rows in ((kept, kept, kept), (whole, kept, kept), (kept, skip, kept), (whole, skip, kept)):
        assert moved(*rows) == once
    # the same choice needs its rotary rows once
    assert moved(kept, whole, kept) == once + hidden
    assert program_work(SHAPE, Program((kept,) * 3, GRID, 6, 0.5), TrimPlan(), 2).moved == 2 * (
        once + 3 * block_work(SHAPE, 18).moved
    )


def test_kept_tokens_go_back_in_place_behind_the_block_that_chose_them():
    choose, kept, skip = Row(ALL, 36, choose=True), Row(KEPT, 18), Row(SKIP)
    once = 2 * 18 * (32 + ROTARY) + 2 * 18 * 32
    for rows in ((choose, kept, kept), (choose, skip, kept)):
        assert moved(*rows) == once
    assert moved(choose, kept, choose, kept) == 2 * once


def test_kept_tokens_are_taken_out_around_each_block_where_somebody_looks_between_them():
    choose, kept = Row(ALL, 36, choose=True), Row(KEPT, 18)
    each, rotary = 2 * 18 * 32 + 2 * (36 + 18) * 32, 2 * 18 * ROTARY
    assert moved(kept, kept, kept, alone=False) == 3 * each + rotary
    # into a copy, since what the choosing block gave is not ours alone
    assert moved(choose, kept, kept, alone=False) == 2 * each + rotary
    assert moved(choose, kept, choose, kept, alone=False) == 2 * (each + rotary)


def test_heads_in_patterns_are_taken_out_and_put_back():
    own = ("full", "frame", OFF, OFF)
    whole, some = ("full",) * 4, ("full", "full", "full", OFF)
    for cross, more in ((whole, 0), (some, 3 * 4 * (36 + 5) + 36)):
        heads = HeadPlan((own,) * 3, (cross,) * 3)
        # of each of two heads q, k, v and the result are read and written; zeros of the two others
        each = 8 * (2 * 8 * 36 + 2 * 36 + more)
        assert moved(*[Row(ALL, 36, heads=True)] * 3, share=1.0, heads=heads) == 3 * each
    heads = HeadPlan((own,) * 3, (whole,) * 3)
    rows = [Row(KEPT, 12, context=READ, heads=on) for on in (True, False)]
    # keys and values of all tokens
    each = 8 * (2 * (4 * 12 + 4 * 36) + 2 * 12)
    assert moved(*[rows[0]] * 3, heads=heads) - moved(*[rows[1]] * 3) == 3 * each
    # what is whole runs in one piece
    heads = HeadPlan((whole,) * 3, (whole,) * 3)
    assert moved(*[Row(ALL, 36, heads=True)] * 3, share=1.0, heads=heads) == 0


def test_what_patterns_leave_out_is_given_back_by_a_few_queries():
    """Of each latent frame 8 queries attend to all 36 tokens, in 4 heads of 8."""
    own, cross = ("full", "frame", OFF, OFF), ("full",) * 4
    bare, given = (
        program_work(
            SHAPE, Program((Row(ALL, 36, heads=True),) * 3, GRID, 12, heads=plan), TrimPlan()
        )
        for plan in (HeadPlan((own,) * 3, (cross,) * 3, corrected=on) for on in (False, True))
    )
    assert given.attention - bare.attention == 3 * 4 * 8 * 4 * 24 * 36
    assert given.moved - bare.moved == 3 * 32 * (2 * 36 + 10 * 24)
    # left out tokens are keys too; of 4 tokens of a latent frame all are asked
    rows = (Row(KEPT, 12, context=READ, heads=True),) * 3
    bare, given = (
        program_work(SHAPE, Program(rows, GRID, 4, 0.5, heads=plan), TrimPlan())
        for plan in (HeadPlan((own,) * 3, (cross,) * 3, corrected=on) for on in (False, True))
    )
    assert given.attention - bare.attention == 3 * 4 * 8 * 4 * 12 * 36
    # where all heads of a block are full nothing is left out
    whole = HeadPlan((cross,) * 3, (cross,) * 3, corrected=True)
    assert moved(*[Row(ALL, 36, heads=True)] * 3, share=1.0, heads=whole) == 0


def test_to_measure_heads_costs_a_few_queries_of_one_prompt():
    """24 queries see the pairs of a head's latent frame, tiles and all: 432, 324 and 1296 of 36."""
    rows = [(Row(ALL, 36, measure=on),) * 3 for on in (True, False)]
    for prompts in (1, 2):
        found, plain = (
            program_work(SHAPE, Program(some, GRID, 12), TrimPlan(), prompts) for some in rows
        )
        assert found.attention - plain.attention == 3 * 4 * 24 * 57 * 32
        assert found.moved - plain.moved == 3 * 4 * 36 * 32
    # of a slim model's three heads
    width = Width(*[(tuple(range(n)),) * 3 for n in (3, 4, 64)])
    found, plain = (
        program_work(SHAPE, Program(some, GRID, 12), TrimPlan(), width=width) for some in rows
    )
    assert found.attention - plain.attention == 3 * 4 * 24 * 57 * 24


@pytest.mark.parametrize("bits", [8, 4])
def test_remembered_keys_and_values_are_packed_and_unpacked(bits):
    # 32 numbers of keys and as many of values, of 16 bits; and a scale of 16 for each of 4 heads
    packed = 2 * (32 * bits // 16 + 4)
    written = 2 * 32 + packed
    assert moved(*[Row(ALL, 36, context=WRITE)] * 3, share=1.0, bits=bits) == 3 * 36 * written
    once = moved(*[Row(KEPT, 12)] * 3)
    # those of 12 kept tokens and the packed ones of 24 read, all 36 written
    read = 12 * 2 * 32 + 24 * packed + 36 * 2 * 32
    reads, updates = (Row(KEPT, 12, context=name) for name in (READ, UPDATE))
    assert moved(*[reads] * 3, bits=bits) - once == 3 * read
    assert moved(*[updates] * 3, bits=bits) - once == 3 * (read + 12 * written)


def test_a_repeated_step_moves_a_latent_and_computes_nothing():
    program = Program((Row(SKIP),) * 3, GRID, 12, 0.0)
    # a token is 2 x 2 numbers of 16 channels
    assert program_work(SHAPE, program, TrimPlan(), 2) == Work(moved=2 * 136 * 36 * 4 * 16)
    # skipped blocks alone are no repeated step
    beside = program_work(SHAPE, replace(program, share=1.0), TrimPlan())
    assert beside == Work(outside_flops(SHAPE, 36))


def test_bytes_follow_tokens_and_widths():
    shape = WanShape(1536, 8960, 30)
    whole, half = block_work(shape, 1000), block_work(shape, 500)
    assert half.moved == whole.moved / 2
    # 19 + 8 + 2 times over the hidden state, and twice over the channels
    assert whole.moved == 1000 * (29 * 1536 + 2 * 8960)
    slim = block_work(shape, 1000, width=(6, 12, 4480))
    assert whole.moved - slim.moved == 1000 * (8 * 768 + 2 * 4480)


def test_remembered_keys_have_no_projections():
    shape = WanShape(1536, 8960, 30)
    alone, beside = block_work(shape, 500), block_work(shape, 500, 300)
    assert beside.linear == alone.linear and beside.moved == alone.moved
    assert beside.attention - alone.attention == 4 * 500 * 300 * 1536
    # of a slim block too: six heads
    slim = [block_work(shape, 500, extra, width=(6, 12, 4480)) for extra in (0, 300)]
    assert slim[1].flops - slim[0].flops == 4 * 500 * 300 * 768


# blocks and models


@pytest.mark.parametrize("dim", [48, 96])
@pytest.mark.parametrize("size", [(1, 2, 2), (3, 6, 10)])
def test_a_dense_forward_costs_what_torch_counts(dim, size):
    model = new_transformer(
        dim=dim, num_heads=4, num_layers=3, ffn_dim=200, in_dim=36, out_dim=16, text_dim=24
    ).eval()
    tokens = size[0] * size[1] * size[2] // 4
    text, latent = torch.randn(1, 7, 24), torch.randn(1, 36, *size)
    with torch.no_grad():
        total = count_flops(lambda: model(latent, torch.tensor([500.0]), text))
    assert forward_flops(wan_shape(model, 7), tokens) == total


def test_a_model_that_is_given_an_image_costs_what_torch_counts():
    """Wan2.1's image-to-video: CLIP tokens have keys and values of their own."""
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=36, text_dim=20, freq_dim=32,
        ffn_dim=40, num_layers=2, image_dim=16, added_kv_proj_dim=24,
    ).eval()  # fmt: skip
    # diffusers takes what lies before the last 512 for the image
    text, image, latent = (torch.randn(1, *n) for n in ((512, 20), (5, 16), (36, 3, 4, 6)))
    with torch.no_grad():
        total = count_flops(lambda: model(latent, torch.tensor([500.0]), text, image))
    assert forward_flops(wan_shape(model, 512, 5), 18) == total


def test_the_cost_of_a_known_model_at_a_known_size():
    """Wan2.1 1.3B at 480p, 81 pixel frames: attention is about half of the 0.28 PFLOPs."""
    shape = WanShape(1536, 8960, 30)
    # umT5's and CLIP's sizes
    assert (shape.text_tokens, shape.text_dim, shape.image_dim) == (512, 4096, 1280)
    assert (shape.in_channels, shape.out_channels, shape.freq_dim) == (16, 16, 256)
    tokens = 21 * 30 * 52
    total = forward_flops(shape, tokens)
    attention = 30 * 4 * tokens**2 * 1536
    assert total == pytest.approx(
        attention + 30 * 2 * tokens * (6 * 1536**2 + 2 * 1536 * 8960), rel=0.03
    )


def test_patterns_cost_their_share_of_the_pairs():
    shape, grid = WanShape(1536, 8960, 1), TokenGrid(4, 8, 8)

    def cost(pattern: str) -> float:
        plan = TrimPlan(heads=HeadPlan(((pattern,) * 12,), ((OFF,) * 12,)))
        rows = (Row(ALL, 256, heads=True),)
        return program_work(shape, Program(rows, grid, 64, heads=plan.heads), plan).flops

    attention = 4 * 256**2 * 1536
    assert cost("full") - cost(OFF) == attention
    for pattern, share in (("frame", 4), ("tile2", 4)):
        assert cost(pattern) - cost(OFF) == attention // share
    # off in place saves no projection, cut out it does
    cut = block_work(shape, 256, width=(0, 0, 8960)).flops + outside_flops(shape, 256)
    assert cost(OFF) - cut == (8 * 256 + 4 * (256 + 512)) * 1536**2


def test_a_slim_block_costs_what_torch_counts():
    """A Wan of fewer heads and channels throughout is the slim model of equal widths."""
    dim, tokens = 64, 60
    shape = WanShape(dim, 96, 1, text_tokens=7, head_dim=16)
    torch.manual_seed(0)
    own = WanAttention(dim, heads=3, dim_head=16, processor=WanAttnProcessor())
    options = {"cross_attention_dim_head": 16, "processor": WanAttnProcessor()}
    cross = WanAttention(dim, heads=2, dim_head=16, **options)
    up, down = torch.nn.Linear(dim, 32), torch.nn.Linear(32, dim)
    hidden, text = torch.randn(1, tokens, dim), torch.randn(1, 7, dim)
    with torch.no_grad():
        total = count_flops(lambda: (own(hidden), cross(hidden, text), down(up(hidden))))
    assert block_work(shape, tokens, width=(3, 2, 32)).flops == total
    stored = sum(p.numel() for part in (own, cross, up, down) for p in part.parameters())
    assert block_parameters(shape, (3, 2, 32)) == stored + 8 * dim


def test_a_block_stores_what_the_tiny_wan_does():
    tiny = load_original(CHECKPOINT)
    shape = wan_shape(tiny, 24)
    stored = sum(p.numel() for p in tiny.blocks[3].parameters())
    assert block_parameters(shape) == block_parameters(shape, (8, 8, 384)) == stored
    clip = WanShape(64, 96, 1, head_dim=16, image_tokens=5)
    more = block_parameters(clip) - block_parameters(WanShape(64, 96, 1, head_dim=16))
    # k_img, v_img with their biases, and the norm of k_img
    assert more == 2 * (64 * 64 + 64) + 64
