import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from wantrim.benchmarks.flops import count_flops
from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import sample
from wantrim.hosts.diffusers.shape import wan_shape
from wantrim.hosts.diffusers.weights import load_original, new_transformer
from wantrim.methods.cost import (
    WanShape,
    block_flops,
    block_parameters,
    forward_flops,
    plan_flops,
    planned_tokens,
)
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import OFF, PATTERNS, HeadPlan
from wantrim.methods.schedule import Schedule
from wantrim.methods.tokens import TokenPlan
from wantrim.methods.width import Width
from wantrim.toy import CHECKPOINT

SIZE, GRID = (5, 12, 12), TokenGrid(5, 6, 6)


def counted(model, plan, steps, given=0, guidance=4.0, heads=None):
    text = torch.randn(1, 24, model.config.text_dim, generator=torch.Generator().manual_seed(1))
    condition = torch.zeros(1, 20, *SIZE)
    condition[:, :4, :given] = 1
    options = {"guidance": guidance, "condition": condition if given else None}
    roles = (COND, UNCOND) if guidance != 1 else (COND,)
    with attach(model, TrimPlan(plan, heads), cond_or_uncond=roles, shift=3.0) as attachment:
        total = count_flops(lambda: sample(model, text, SIZE, steps=steps, **options))
        return total, attachment.finish()


@pytest.fixture(scope="module")
def tiny():
    return load_original(CHECKPOINT)


PLANS = [
    {},
    {"reselect_every": 4, "importance": "random"},
    {"reselect_every": 6, "dropped_kv": "keep", "importance": "update_norm"},
    {"restore": "frame_mean", "importance": "rotation", "trim_reselecting": True},
    {"restore": "last_update", "importance": "rotation", "trim_reselecting": True},
    {"restore": "last_output", "importance": "rotation", "trim_reselecting": True},
    {"start": 0.35, "reselect_every": 5},
    {"spare": 0.35, "restore": "last_update", "importance": "rotation", "trim_reselecting": True},
    {"spare": 0.35, "restore": "last_update", "importance": "rotation", "start": 0.1},
    {"spare": 0.35, "restore": "frame_mean", "importance": "rotation"},
]


@pytest.mark.parametrize("options", PLANS)
@pytest.mark.parametrize(("given", "guidance"), [(0, 4.0), (1, 1.0)])
def test_plans_cost_what_torch_counts(tiny, options, given, guidance):
    steps = 5
    plan = TokenPlan(Schedule(0.6), **options)
    total, report = counted(tiny, plan, steps, given, guidance)
    progress = [i / steps for i in range(steps)]
    shape = wan_shape(tiny, 24)
    prompts = 2 if guidance != 1 else 1
    assert plan_flops(shape, plan, GRID, progress, given, prompts) == pytest.approx(total, rel=0.01)
    planned = planned_tokens(plan, GRID, 16, progress, given)
    assert planned == [step.kept_per_block for step in report.steps]


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


def test_the_cost_of_a_known_model_at_a_known_size():
    """Wan2.1 1.3B at 480p, 81 pixel frames: attention is about half of the 0.28 PFLOPs."""
    shape = WanShape(1536, 8960, 30)
    tokens = 21 * 30 * 52
    total = forward_flops(shape, tokens)
    attention = 30 * 4 * tokens**2 * 1536
    assert total == pytest.approx(
        attention + 30 * 2 * tokens * (6 * 1536**2 + 2 * 1536 * 8960), rel=0.03
    )


def mixed_heads(blocks=16, heads=8) -> HeadPlan:
    """Every pattern in every block; one block is whole and one has no cross-attention."""
    rows = [tuple(PATTERNS[(b + n) % len(PATTERNS)] for n in range(heads)) for b in range(blocks)]
    cross = [
        tuple(OFF if (b + n) % 3 == 0 else "full" for n in range(heads)) for b in range(blocks)
    ]
    rows[1], cross[1] = ("full",) * heads, ("full",) * heads
    cross[2] = (OFF,) * heads
    return HeadPlan(tuple(rows), tuple(cross))


@pytest.mark.parametrize("options", [None, *PLANS[:4]])
@pytest.mark.parametrize(("given", "guidance"), [(0, 4.0), (1, 1.0)])
def test_heads_in_place_cost_what_torch_counts(tiny, options, given, guidance):
    steps, heads = 3, mixed_heads()
    plan = None if options is None else TokenPlan(Schedule(0.6), **options)
    total, _ = counted(tiny, plan, steps, given, guidance, heads)
    progress = [i / steps for i in range(steps)]
    prompts = 2 if guidance != 1 else 1
    cost = plan_flops(wan_shape(tiny, 24), plan, GRID, progress, given, prompts, heads=heads)
    assert cost == pytest.approx(total, rel=0.01)
    # a test that would hold without the heads proves nothing
    dense = plan_flops(wan_shape(tiny, 24), plan, GRID, progress, given, prompts)
    assert cost < 0.95 * dense


def test_a_plan_of_full_heads_costs_what_none_costs(tiny):
    shape, heads = wan_shape(tiny, 24), HeadPlan.full(16, 8)
    assert forward_flops(shape, 180, grid=GRID, heads=heads) == forward_flops(shape, 180)
    with pytest.raises(ValueError, match="grid"):
        forward_flops(shape, 180, heads=heads)
    whole = Width(*[(tuple(range(n)),) * 16 for n in (8, 8, 384)])
    assert forward_flops(shape, 180, width=whole) == forward_flops(shape, 180)


def test_patterns_cost_their_share_of_the_pairs():
    shape = WanShape(1536, 8960, 1)
    grid = TokenGrid(4, 8, 8)
    empty = forward_flops(shape, 256, grid=grid, heads=HeadPlan((("off",) * 12,), ((OFF,) * 12,)))
    full = forward_flops(shape, 256, grid=grid, heads=HeadPlan((("full",) * 12,), ((OFF,) * 12,)))
    attention = 4 * 256**2 * 1536
    assert full - empty == attention
    for pattern, share in (("frame", 4), ("tile2", 4), ("tile4", 16)):
        heads = HeadPlan(((pattern,) * 12,), ((OFF,) * 12,))
        assert forward_flops(shape, 256, grid=grid, heads=heads) - empty == attention // share
    # off in place saves no projection, cut out it does
    cut = Width(((),), ((),), (tuple(range(8960)),))
    assert empty - forward_flops(shape, 256, width=cut) == (8 * 256 + 4 * (256 + 512)) * 1536**2


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
    assert block_flops(shape, tokens, width=(3, 2, 32)) == total
    stored = sum(p.numel() for part in (own, cross, up, down) for p in part.parameters())
    assert block_parameters(shape, (3, 2, 32)) == stored + 8 * dim


def test_a_block_stores_what_the_tiny_wan_does(tiny):
    shape = wan_shape(tiny, 24)
    stored = sum(p.numel() for p in tiny.blocks[3].parameters())
    assert block_parameters(shape) == block_parameters(shape, (8, 8, 384)) == stored
    clip = WanShape(64, 96, 1, head_dim=16, image_tokens=5)
    more = block_parameters(clip) - block_parameters(WanShape(64, 96, 1, head_dim=16))
    # k_img, v_img with their biases, and the norm of k_img
    assert more == 2 * (64 * 64 + 64) + 64
