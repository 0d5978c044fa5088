import pytest
import torch

from wantrim.benchmarks.flops import count_flops
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import sample
from wantrim.hosts.diffusers.shape import wan_shape
from wantrim.hosts.diffusers.weights import load_original, new_transformer
from wantrim.hosts.session import COND, UNCOND, TrimPlan
from wantrim.methods.cost import WanShape, forward_flops, plan_flops, planned_tokens
from wantrim.methods.grid import TokenGrid
from wantrim.methods.schedule import Schedule
from wantrim.methods.tokens import TokenPlan
from wantrim.toy import CHECKPOINT

SIZE, GRID = (5, 12, 12), TokenGrid(5, 6, 6)


def counted(model, plan, steps, given=0, guidance=4.0):
    text = torch.randn(1, 24, model.config.text_dim, generator=torch.Generator().manual_seed(1))
    condition = torch.zeros(1, 20, *SIZE)
    condition[:, :4, :given] = 1
    options = {"guidance": guidance, "condition": condition if given else None}
    roles = (COND, UNCOND) if guidance != 1 else (COND,)
    with attach(model, TrimPlan(plan), cond_or_uncond=roles, shift=3.0) as attachment:
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
