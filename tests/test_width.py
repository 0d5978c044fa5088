import math

import pytest
import torch

from wantrim.methods.cost import Width
from wantrim.profiles.fingerprint import Fingerprint
from wantrim.profiles.profile import Profile
from wantrim.slim import width as module
from wantrim.slim.width import (
    channel_sizes,
    ffn_channels,
    ffn_count,
    head_scores,
    kept_count,
    pare_heads,
    pare_width,
)


def profile_of(blocks=3, heads=8, ffn=48, calls=4, seed=0) -> Profile:
    """Random measurements of `calls` calls in two sigma bins."""
    profile = Profile.empty(Fingerprint(heads * 16, ffn, blocks, heads, 36, 16))
    random = torch.Generator().manual_seed(seed)
    for value in profile.tensors.values():
        value.copy_(torch.rand(value.shape, generator=random) * calls)
    profile.tensors["count"].zero_()
    profile.tensors["count"][[2, 7]] = calls / 2
    for name in ("ratio", "self_output", "cross_output"):
        profile.tensors[name][[b for b in range(10) if b not in (2, 7)]] = 0
    profile.tensors["ratio"] /= 2
    return profile


def set_heads(profile, importance, ratio=None, block=0):
    """One block's self-attention importance and intra-slice ratio."""
    profile.tensors["self_o_norm"][block] = 1
    profile.tensors["self_output"][:, block] = 0
    profile.tensors["self_output"][2, block] = torch.tensor(importance) * profile.calls
    if ratio is not None:
        profile.tensors["ratio"][:, block] = 0
        profile.tensors["ratio"][2, block] = torch.tensor(ratio) * profile.calls


@pytest.mark.parametrize(
    ("heads", "prune_ratio", "kept"),
    [
        # the paper's 14B, and its minimum
        (40, 0.3, 28), (40, 0.0, 40), (40, 0.7, 12), (40, 0.9, 8), (80, 0.95, 8),
        # 1.3B, TI2V-5B and the tiny Wan: 8 of 40 is 3 of 12, 5 of 24, 2 of 8
        (12, 0.3, 9), (12, 0.9, 3), (24, 0.3, 17), (24, 0.9, 5), (8, 0.3, 6), (8, 0.9, 2),
        (1, 0.9, 1),
    ],
)  # fmt: skip
def test_how_many_heads_stay(heads, prune_ratio, kept):
    assert kept_count(heads, prune_ratio) == kept


@pytest.mark.parametrize(
    ("ffn_dim", "prune_ratio", "kept"),
    [
        (13824, 0.3, 9728), (8960, 0.3, 6272), (14336, 0.3, 10112), (13824, 0.0, 13824),
        (384, 0.3, 272), (384, 0.99, 16), (200, 0.1, 192), (200, 0.01, 200), (48, 0.0, 48),
    ],
)  # fmt: skip
def test_how_many_channels_stay(ffn_dim, prune_ratio, kept):
    assert ffn_count(ffn_dim, prune_ratio) == kept


def test_the_papers_14b_has_the_papers_size():
    """9.8B of 14B at p = 0.3 (text to video)."""
    heads, channels = kept_count(40, 0.3), ffn_count(13824, 0.3)
    block = 8 * 5120 * heads * 128 + 2 * 5120 * channels
    outside = 2 * 5120 * 2048 + 7 * 5120**2
    assert (40 * block + outside) / 1e9 == pytest.approx(9.8, rel=0.03)


def test_a_share_is_asked_for():
    for bad in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match="prune_ratio"):
            kept_count(40, bad)
        with pytest.raises(ValueError, match="prune_ratio"):
            pare_width(profile_of(), bad)


def test_protection_changes_the_choice():
    profile = profile_of(blocks=2)
    importance = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.5, 1.0]
    # heads 5 and 6 are temporal; at 0.3 sharp a head is mixed
    ratio = [0.9, 0.5, 0.8, 0.3, 0.5, 0.29, 0.1, 0.3]
    set_heads(profile, importance, ratio)
    kept = pare_heads(profile, 0.5)[0]
    # 3 * 1.5 = 4.5 is more than head 4 has, but less than head 3
    assert kept == (0, 1, 2, 3)
    set_heads(profile, [8.0, 7.0, 6.0, 4.4, 4.0, 3.0, 2.9, 1.0], ratio)
    assert pare_heads(profile, 0.5)[0] == (0, 1, 2, 5)
    assert pare_heads(profile, 0.5, protection=1.6)[0] == (0, 1, 2, 5)
    assert pare_heads(profile, 0.5, protection=1.0)[0] == (0, 1, 2, 3)


def test_blocks_choose_for_themselves_and_keep_equally_many():
    profile = profile_of(blocks=3)
    set_heads(profile, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [0.5] * 8, block=0)
    set_heads(profile, [80.0, 70.0, 60.0, 50.0, 40.0, 30.0, 20.0, 10.0], [0.5] * 8, block=1)
    kept = pare_heads(profile, 0.3)
    assert kept[0] == (2, 3, 4, 5, 6, 7)
    assert kept[1] == (0, 1, 2, 3, 4, 5)
    assert {len(block) for block in kept} == {6}


def test_equal_heads_go_to_the_first():
    profile = profile_of()
    set_heads(profile, [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 1.0], [0.5] * 8)
    assert pare_heads(profile, 0.5)[0] == (0, 1, 3, 5)


def test_cross_attention_has_no_roles():
    profile = profile_of()
    assert pare_heads(profile, kind="cross", protection=99.0) == pare_heads(profile, kind="cross")
    assert torch.equal(head_scores(profile, "cross"), profile.importance("cross"))
    assert not torch.equal(head_scores(profile, "self"), profile.importance("self"))


def test_every_noise_level_counts_alike_however_often_it_was_recorded():
    """Eq. 3 over the bins: one call at low noise weighs as much as 19 at high noise."""
    profile = profile_of(blocks=1, heads=2)
    profile.tensors["count"].zero_()
    profile.tensors["count"][[1, 9]] = torch.tensor([1.0, 19.0])
    for kind in ("self", "cross"):
        profile.tensors[f"{kind}_o_norm"][0] = torch.tensor([1.0, 2.0])
        profile.tensors[f"{kind}_output"].zero_()
        # sums of the calls: 8 and 1 in the one, 2 and 3 in each of the 19
        profile.tensors[f"{kind}_output"][1, 0] = torch.tensor([8.0, 1.0])
        profile.tensors[f"{kind}_output"][9, 0] = torch.tensor([38.0, 57.0])
        assert profile.importance(kind)[0].tolist() == pytest.approx([5.0, 4.0])


def test_an_empty_profile_is_refused():
    with pytest.raises(ValueError, match="WanTrim Profile"):
        pare_width(Profile.empty(profile_of().model))


def test_channels_by_score_alone():
    score = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.5])
    assert ffn_channels(score, None, 2) == (1, 3)
    assert ffn_channels(score, None, 3) == (1, 2, 3)
    assert ffn_channels(score, torch.eye(5), 5) == (0, 1, 2, 3, 4)


def at_angles(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])


def test_a_channel_like_a_kept_one_is_skipped():
    """cos 20 = 0.94 is alike, cos 30 = 0.87 is not; what was skipped makes no other alike."""
    score = torch.tensor([5.0, 4.0, 3.0, 2.0])
    signature = at_angles(0, 20, 30, 90) * torch.tensor([[1.0], [100.0], [0.01], [3.0]])
    assert ffn_channels(score, signature, 2) == (0, 2)
    assert ffn_channels(score, signature, 3) == (0, 2, 3)
    assert ffn_channels(score, None, 3) == (0, 1, 2)
    # opposite is not alike
    assert ffn_channels(score[:2], at_angles(0, 180), 2) == (0, 1)


def test_tau_is_relaxed_and_what_was_kept_stays():
    """Alike at 0.9 is less than 25.8 degrees apart, at 0.92 less than 23.1, at 0.94 less than 19.95.

    Channels 0 and 2 stay at once. At 0.94 channel 1, 20 degrees from channel 2, comes in before
    channel 3. Begun anew, 0.92 would do: channel 1 then keeps channel 2 out, and 3 stays.
    """
    score = torch.tensor([4.0, 3.0, 2.0, 1.0])
    signature = at_angles(0, 25, 45, 65)
    assert ffn_channels(score, signature, 2) == (0, 2)
    assert ffn_channels(score, signature, 3) == (0, 1, 2)
    assert ffn_channels(score[1:], signature[1:], 2) == (0, 2)


def test_where_nothing_is_unlike_the_highest_scores_fill_up():
    score = torch.tensor([3.0, 2.0, 1.0, 0.5])
    assert ffn_channels(score, torch.ones(4, 2), 3) == (0, 1, 2)
    # what was kept first stays: 3 is the only other direction
    assert ffn_channels(score, at_angles(0, 0, 0, 90), 3) == (0, 1, 3)


def accepted(score, signature, kept, keep, tau):
    """One pass of equation 7 over all that is not kept."""
    unit = torch.nn.functional.normalize(signature, dim=1)
    kept = list(kept)
    for k in sorted(range(len(score)), key=lambda i: (-float(score[i]), i)):
        free = k not in kept and len(kept) < keep
        if free and all(float(unit[k] @ unit[j]) <= tau for j in kept):
            kept.append(k)
    return kept


@pytest.mark.parametrize("chunk", [1, 7, 64, 1024])
@pytest.mark.parametrize("keep", [5, 20, 40])
def test_it_is_the_greedy_of_the_paper_in_any_chunks(monkeypatch, chunk, keep):
    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(chunk)
    # few directions, so that many are alike
    signature = torch.randn(12, 10)[torch.randint(12, (64,))] + 0.25 * torch.randn(64, 10)
    score = torch.rand(64).round(decimals=1)
    tau, wanted = 0.9, []
    while len(wanted) < keep:
        wanted = accepted(score, signature, wanted, keep, tau)
        tau += 0.02
    assert ffn_channels(score, signature, keep) == tuple(sorted(wanted))


def test_half_precision_signatures_are_compared_in_fp32():
    """Rounded to fp16 again, this cosine of 0.900007 would be 0.8999: not alike."""
    signature = (at_angles(0, 25.841, 90) * 60000).half()
    assert ffn_channels(torch.tensor([3.0, 2.0, 1.0]), signature, 2) == (0, 2)


def test_channels_by_energy_weigh_what_they_add():
    profile = profile_of(calls=4)
    profile.tensors["channel_energy"][0, :3] = torch.tensor([16.0, 4.0, 36.0])
    profile.tensors["down_norm"][0, :3] = torch.tensor([1.0, 5.0, 0.5])
    assert channel_sizes(profile)[0, :3].tolist() == [2.0, 5.0, 1.5]


def test_a_width_is_ascending_and_the_same_everywhere():
    profile = profile_of(blocks=3, heads=8, ffn=100)
    asked = []

    def signature(block):
        asked.append(block)
        return torch.randn(100, 6, generator=torch.Generator().manual_seed(block))

    made = pare_width(profile, 0.3, signature)
    assert isinstance(made, Width)
    assert asked == [0, 1, 2]
    assert [made.sizes(block) for block in range(3)] == [(6, 6, 80)] * 3
    for part in (made.self_heads, made.cross_heads, made.ffn_channels):
        assert all(list(block) == sorted(set(block)) for block in part)
    assert made.self_heads == pare_heads(profile)
    assert made.cross_heads == pare_heads(profile, kind="cross")
    assert made != pare_width(profile, 0.3)
    whole = pare_width(profile, 0.0)
    assert whole.sizes(0) == (8, 8, 100)


@pytest.mark.slow
def test_a_14bs_block_fits_in_memory(monkeypatch):
    """No c x c matrix: the largest product is CHUNK x CHUNK."""
    largest = 0
    matmul = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        out = matmul(a, b)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    signature = torch.randn(13824, 64).bfloat16()
    assert len(ffn_channels(torch.rand(13824), signature, 9728)) == 9728
    assert largest <= module.CHUNK**2
