from itertools import product

import pytest
import torch

from wantrim.benchmarks.head_cases import solve_heads
from wantrim.methods.attend import attention_share
from wantrim.methods.cost import Width
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import FULL, OFF, HeadPlan
from wantrim.profiles.fingerprint import Fingerprint
from wantrim.profiles.profile import Profile
from wantrim.slim.width import pare_width, solve_width, unit_parameters
from wantrim.tests.test_width import profile_of, set_heads

GRID = TokenGrid(5, 6, 6)
SIZES = {"text_tokens": 24}
BUDGETS = (0.2, 0.35, 0.5, 0.65, 0.75, 0.9, 0.99, 1.0)


def width_share(width: Width, model: Fingerprint) -> float:
    """Share of the parameters of heads and channels that a width keeps."""
    head, channel = unit_parameters(model)
    left = [head * (a + b) + channel * c for a, b, c in map(width.sizes, range(model.num_blocks))]
    whole = 2 * head * model.num_heads + channel * model.ffn_dim
    return sum(left) / (model.num_blocks * whole)


def importance_left(profile: Profile, plan: HeadPlan) -> float:
    """What a plan keeps of every block's importance, head by head."""
    ratio, own, cross = profile.ratio(), profile.importance("self"), profile.importance("cross")
    total = 0.0
    for b, n in product(range(plan.num_blocks), range(profile.model.num_heads)):
        pattern = plan.self_attention[b][n]
        kept = {FULL: 1.0, OFF: 0.0}.get(pattern)
        if kept is None:
            kept = max(0.0, 2 * float(ratio[b, n]) - 1)
        total += kept * float(own[b, n] / own[b].sum())
        if plan.cross_attention[b][n] == FULL:
            total += float(cross[b, n] / cross[b].sum())
    return total


def test_a_budget_is_never_exceeded_and_more_is_never_worth_less():
    profile = profile_of(blocks=4)
    last = 0.0
    for budget in BUDGETS:
        plan = solve_heads(profile, GRID, budget, **SIZES)
        share = attention_share(plan, GRID, **SIZES)
        # and spent, but for a head
        assert budget - 1 / 32 <= share <= budget
        worth = importance_left(profile, plan)
        assert worth >= last
        last = worth
    assert plan == HeadPlan.full(4, 8)


def test_each_head_gets_its_own_roles_pattern():
    """3 heads worth the same: one in its frame, two everywhere; one is worth next to nothing."""
    profile = profile_of(blocks=1, heads=4)
    set_heads(profile, [5.0, 5.0, 5.0, 0.1])
    ratio = torch.tensor([0.98, 0.3, 0.4, 0.0])
    profile.tensors["ratio"].zero_()[7, 0] = ratio * profile.calls
    plan = solve_heads(profile, GRID, 0.65, **SIZES)
    assert plan.self_attention == (("frame", "full", "full", "off"),)
    assert plan.cross_attention == ((FULL,) * 4,)


LEVEL, STEEP = [9.0] * 8, [0.1, 0.2, 0.1, 90.0, 0.1, 0.1, 0.1, 0.1]


def test_one_budget_for_the_whole_model():
    """A block whose heads all matter keeps them, another one its one; PARE would halve both."""
    profile = profile_of(blocks=2)
    set_heads(profile, LEVEL, [0.5] * 8, block=0)
    set_heads(profile, STEEP, [0.5] * 8, block=1)
    cross = 24 / (24 + 180)
    plan = solve_heads(profile, GRID, cross + (1 - cross) * 0.6, **SIZES)
    assert plan.self_attention[0] == (FULL,) * 8
    assert plan.self_attention[1] == (OFF, OFF, OFF, FULL, OFF, OFF, OFF, OFF)
    # cross-attention costs little and is worth as much
    assert plan.cross_attention == ((FULL,) * 8,) * 2
    # ten times as much of everything is the same model
    profile.tensors["self_o_norm"][0] *= 10
    assert solve_heads(profile, GRID, cross + (1 - cross) * 0.6, **SIZES) == plan


@pytest.mark.parametrize(("ratio", "pattern"), [(0.49, OFF), (0.65, "frame")])
def test_a_pattern_that_keeps_less_than_half_is_worse_than_nothing(ratio, pattern):
    """What the renormalised attention misplaces would outweigh what it keeps."""
    profile = profile_of(blocks=1, heads=2)
    set_heads(profile, [9.0, 1.0], [0.1, ratio])
    plan = solve_heads(profile, GRID, 0.7, **SIZES)
    assert plan.self_attention == ((FULL, pattern),)


def test_every_block_keeps_a_head():
    profile = profile_of(blocks=3)
    set_heads(profile, [0.0] * 8, [0.5] * 8, block=1)
    plan = solve_heads(profile, GRID, 0.2, **SIZES)
    assert plan.self_attention[1].count(FULL) == 1
    # all the same to the profile: the first
    assert plan.self_attention[1][0] == FULL
    with pytest.raises(ValueError, match="budget: expected at least 0.09 here.*got 0.02"):
        solve_heads(profile, GRID, 0.02, **SIZES)


def test_temporal_heads_are_not_protected():
    profile = profile_of(blocks=1, heads=2)
    set_heads(profile, [1.0, 1.2], [0.2, 0.6])
    plan = solve_heads(profile, GRID, 0.6, **SIZES)
    assert plan.self_attention[0] == (OFF, FULL)


def test_cross_attention_costs_its_keys():
    plan = HeadPlan(((FULL, OFF),), ((FULL, OFF),))
    assert attention_share(plan, GRID, 34) == 0.5
    only = HeadPlan(((FULL, FULL),), ((OFF, OFF),))
    assert attention_share(only, GRID, 34) == 180 / (180 + 34)
    cheap = HeadPlan((("frame", "tile2"),), ((OFF, OFF),))
    pairs = 180**2 / 5 + 180**2 / 4
    assert attention_share(cheap, GRID, 34) == pytest.approx(pairs / (2 * 180 * (180 + 34)))


def test_images_are_keys_too():
    plan = solve_heads(profile_of(blocks=4), GRID, 0.5, text_tokens=24 + 257)
    share = attention_share(plan, GRID, 24 + 257)
    assert 0.5 - 1 / 32 <= share <= 0.5


def test_what_a_head_and_a_channel_store():
    """By hand: 3 heads of 4 numbers in a model of 12; q, k and v have biases, q and k norms."""
    assert unit_parameters(Fingerprint(12, 20, 2, 3, 36, 16)) == (4 * 4 * 12 + 5 * 4, 12 + 1 + 12)


def test_every_block_keeps_some_channels(monkeypatch):
    monkeypatch.setattr("wantrim.slim.width.FFN_WORTH", 1e-9)
    width = solve_width(profile_of(blocks=3, ffn=64), 0.6)
    assert min(width.sizes(block)[2] for block in range(3)) == 16


def test_the_same_plan_every_time():
    plans = [solve_heads(profile_of(seed=3), GRID, 0.5, **SIZES) for _ in range(2)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("solve", [solve_width, lambda p, b: solve_heads(p, GRID, b)])
def test_what_is_no_budget_is_refused(solve):
    for bad in (0.0, -1.0, 1.01):
        with pytest.raises(ValueError, match="budget"):
            solve(profile_of(), bad)
    with pytest.raises(ValueError, match="WanTrim Profile"):
        solve(Profile.empty(profile_of().model), 0.5)


def test_a_width_within_its_budget():
    profile = profile_of(blocks=4, ffn=200)
    last = -1
    for budget in BUDGETS:
        width = solve_width(profile, budget)
        share = width_share(width, profile.model)
        assert share <= budget
        # and spent, but for a head or a group of channels
        assert share > budget - 1 / 16
        assert share >= last
        last = share
        for block in range(4):
            assert min(width.sizes(block)) >= 1
            assert width.sizes(block)[2] % 16 == 0 or width.sizes(block)[2] == 200
    assert width == pare_width(profile, 0.0)


def test_a_width_is_widest_where_it_matters(monkeypatch):
    profile = profile_of(blocks=2, ffn=64)
    t = profile.tensors
    for name in ("self_output", "self_o_norm", "cross_output", "cross_o_norm", "channel_energy"):
        t[name].fill_(1.0)
    t["down_norm"].fill_(1.0)
    t["self_o_norm"][0], t["cross_o_norm"][1] = torch.tensor(STEEP), torch.tensor(STEEP)
    t["channel_energy"][0, 8:] = 1e-6
    monkeypatch.setattr("wantrim.slim.width.FFN_WORTH", 2.0)
    width = solve_width(profile, 0.575)
    assert width.sizes(0) == (1, 8, 16)
    assert width.sizes(1) == (8, 1, 64)
    assert width.self_heads[0] == width.cross_heads[1] == (3,)
    assert width.ffn_channels[0][:8] == tuple(range(8))


def test_channels_are_weighed_against_heads(monkeypatch):
    profile = profile_of(blocks=1, heads=2, ffn=64)
    for name in ("self_output", "self_o_norm", "cross_output", "cross_o_norm"):
        profile.tensors[name].fill_(1.0)
    profile.tensors["channel_energy"].fill_(1.0)
    profile.tensors["down_norm"].fill_(3.0)
    head, channel = unit_parameters(profile.model)
    # beside what every block keeps there is room for either a head or 48 channels; a head is half
    # of its attention
    equal = 0.5 / head * 64 * channel
    for factor, kept in ((1.1, 64), (0.9, 16)):
        monkeypatch.setattr("wantrim.slim.width.FFN_WORTH", factor * equal)
        width = solve_width(profile, 0.665)
        assert width.sizes(0) == ((1, 1, 64) if kept == 64 else (2, 1, 16))


@pytest.mark.parametrize("name", ["cross_output", "channel_energy"])
def test_what_could_not_be_recorded_is_not_taken_for_unimportant(name):
    profile = profile_of()
    value = profile.tensors[name]
    (value[:, 1] if name == "cross_output" else value[1]).zero_()
    with pytest.raises(ValueError, match=r"of 1 of 3 blocks \(first: block 1\)"):
        solve_width(profile, 0.5)
    if name == "cross_output":
        with pytest.raises(ValueError, match="cross-attention heads"):
            solve_heads(profile, GRID, 0.5)
        with pytest.raises(ValueError, match="cross-attention heads"):
            pare_width(profile)
    else:
        # eq. 6 needs the weights alone
        assert pare_width(profile).sizes(1) == (6, 6, 48)
        solve_heads(profile, GRID, 0.5)


def test_channels_that_are_alike_are_told_apart(monkeypatch):
    profile = profile_of(blocks=2, ffn=64, seed=1)
    asked = []

    def signature(block):
        asked.append(block)
        return torch.eye(32)[torch.arange(64) // 2]

    monkeypatch.setattr("wantrim.slim.width.FFN_WORTH", 0.25)
    plain, aware = (solve_width(profile, 0.4, s) for s in (None, signature))
    assert asked == [0, 1]
    assert [plain.sizes(b) for b in range(2)] == [aware.sizes(b) for b in range(2)]
    for width, apart in ((plain, False), (aware, True)):
        for block in width.ffn_channels:
            assert 16 <= len(block) <= 32
            assert (len({channel // 2 for channel in block}) == len(block)) is apart
