import copy
from functools import partial

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import MagCacheConfig

from wantrim.benchmarks.flops import count_flops
from wantrim.benchmarks.peers.caches import teacache, zeus_like
from wantrim.benchmarks.peers.merging import match_tokens, random_tokens, tome
from wantrim.benchmarks.peers.of_diffusers import (
    calibrate_mag_ratios,
    first_block_cache,
    mag_cache,
    pyramid_attention_broadcast,
    sea_cache,
)
from wantrim.benchmarks.peers.registry import knob_for
from wantrim.hosts.diffusers.easycache import easycache
from wantrim.hosts.diffusers.sample import sample
from wantrim.hosts.diffusers.weights import load_original
from wantrim.methods.grid import TokenGrid
from wantrim.toy import CHECKPOINT
from wantrim.toy.text import encode_prompt

SIZE = (2, 12, 12)
GRID = TokenGrid(2, 6, 6)
STEPS = 6
RATIOS = [1.0, 0.99, 0.98, 0.99, 0.98, 0.97]
# the method, knobs that change nothing, knobs that save as much as they can
METHODS = {
    "easycache": (easycache, {"threshold": 0.0}, {"threshold": 99.0}),
    "teacache": (teacache, {"threshold": 0.0}, {"threshold": 99.0}),
    "first_block_cache": (first_block_cache, {"threshold": 0.0}, {"threshold": 99.0}),
    "mag_cache": (
        partial(mag_cache, mag_ratios=RATIOS, max_skips=9),
        {"threshold": 0.0},
        {"threshold": 99.0},
    ),
    "sea_cache": (sea_cache, {"threshold": 0.0}, {"threshold": 99.0}),
    "pyramid_attention_broadcast": (
        partial(pyramid_attention_broadcast, timesteps=(-1, 1001)),
        {"self_every": 1},
        {"self_every": 99},
    ),
    "zeus_like": (zeus_like, {"computed": 1.0}, {"computed": 0.5}),
    "tome": (tome, {"keep_ratio": 1.0}, {"keep_ratio": 0.25}),
    "random_tokens": (random_tokens, {"keep_ratio": 1.0}, {"keep_ratio": 0.3}),
}
# which of the six steps are computed in full with the saving knobs
COMPUTED = {
    "easycache": [0, 1, 5],
    "teacache": [0, 5],
    "first_block_cache": [0],
    "mag_cache": [0],
    "zeus_like": [0, 4, 5],
    "sea_cache": [0, 5],
}
each_method = pytest.mark.parametrize("name", list(METHODS))


@pytest.fixture(scope="module")
def model() -> WanTransformer3DModel:
    return load_original(CHECKPOINT)


def text() -> torch.Tensor:
    return encode_prompt("a red circle moving left slowly on a gray background")[None]


def video(model, size=SIZE, steps=STEPS, guidance=8.0, **options) -> torch.Tensor:
    return sample(model, text(), size, steps=steps, guidance=guidance, shift=3.0, **options)


@pytest.fixture(scope="module")
def dense(model) -> torch.Tensor:
    return video(model)


@pytest.fixture(scope="module")
def dense_flops(model) -> int:
    return count_flops(lambda: video(model))


def within(method, model, knobs, steps=STEPS, **options) -> torch.Tensor:
    with method(model, **{"steps": steps, "shift": 3.0, **knobs}):
        return video(model, steps=steps, **options)


def hooks_left(model) -> list[str]:
    return [
        name
        for module in model.modules()
        if hasattr(module, "_diffusers_hook")
        for name in module._diffusers_hook.hooks
    ]


class Recorder:
    """Latents that went into the model and velocities that came out, and which steps ran."""

    def __init__(self, model):
        self.inputs, self.outputs, self.computed, self.texts = [], [], [], []
        # inside what a cache may skip, or predict
        ffn = model.blocks[5].ffn.net[0]
        self.handles = [
            model.register_forward_hook(self.saw),
            ffn.register_forward_hook(lambda *a: self.computed.append(len(self.outputs))),
            model.condition_embedder.text_embedder.register_forward_hook(
                lambda module, args, out: self.texts.append(args[0])
            ),
        ]

    def saw(self, module, args, out):
        self.inputs.append(args[0][:, :16])
        self.outputs.append(out[0])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()


def block_flops(tokens: int, words: int = 24, dim: int = 128, ffn: int = 384) -> int:
    """One row through one block of the tiny Wan, by hand: 2 for each multiply-add."""
    self_attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    cross_attention = 2 * tokens * dim * dim + 2 * words * dim * dim + 2 * tokens * words * dim
    return 2 * (self_attention + cross_attention + 2 * tokens * dim * ffn)


@torch.no_grad()
def test_a_block_costs_what_it_costs_by_hand(model):
    hidden, words, temb = torch.randn(2, 72, 128), torch.randn(2, 24, 128), torch.randn(2, 6, 128)
    rotary = tuple(torch.randn(1, 72, 1, 16) for _ in range(2))
    counted = count_flops(lambda: model.blocks[0](hidden, words, temb, rotary))
    assert counted == 2 * block_flops(72)


@each_method
def test_the_neutral_knob_is_the_dense_model(model, dense, name):
    method, neutral, _ = METHODS[name]
    assert torch.equal(within(method, model, neutral), dense)


@each_method
def test_a_saving_knob_saves_and_every_video_is_a_fresh_run(model, dense, dense_flops, name):
    method, _, saving = METHODS[name]
    videos = []
    with method(model, steps=STEPS, shift=3.0, **saving):
        flops = count_flops(lambda: videos.append(video(model)))
    assert flops < 0.8 * dense_flops
    assert videos[0].isfinite().all()
    assert not torch.allclose(videos[0], dense, atol=1e-2)
    # another seed in between leaves no state behind
    within(method, model, saving, seed=3)
    assert torch.equal(within(method, model, saving), videos[0])
    assert torch.equal(video(model), dense)
    assert not hooks_left(model)


@pytest.mark.parametrize("name", list(COMPUTED))
def test_the_steps_that_a_cache_computes(model, name):
    method, _, saving = METHODS[name]
    with Recorder(model) as seen:
        within(method, model, saving)
    assert seen.computed == COMPUTED[name]


def test_mag_cache_reuses_four_steps_in_a_row(model):
    knobs = {"threshold": 99.0, "mag_ratios": [1.0] * 11}
    with Recorder(model) as seen:
        within(mag_cache, model, knobs, steps=11)
    assert seen.computed == [0, 1, 6]


@each_method
def test_without_guidance_there_is_one_row(model, name):
    method, neutral, saving = METHODS[name]
    dense = video(model, guidance=1.0)
    assert torch.equal(within(method, model, neutral, guidance=1.0), dense)
    assert not torch.allclose(within(method, model, saving, guidance=1.0), dense, atol=1e-2)


@each_method
def test_an_exception_leaves_nothing(model, dense, name):
    method, _, saving = METHODS[name]
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError

    handle = model.patch_embedding.register_forward_pre_hook(fail)
    # some skip the whole model: fail where it computes
    if name == "easycache":
        saving = {"threshold": 0.0}
    elif name == "zeus_like":
        saving = {"computed": 1.0}
    with pytest.raises(ZeroDivisionError):
        within(method, model, saving)
    handle.remove()
    assert not hooks_left(model)
    assert not model.is_cache_enabled
    assert torch.equal(video(model), dense)


def test_one_video_is_what_an_entry_is_for(model, dense):
    with pytest.raises(RuntimeError, match="one video of 5 steps, got a further model call"):
        within(easycache, model, {"threshold": 0.1, "steps": 5})
    with pytest.raises(RuntimeError, match="one video of 7 steps, got 6 model calls"):
        within(easycache, model, {"threshold": 0.1, "steps": 7})
    with (
        pytest.raises(ValueError, match="a batch of 4: sample one video at a time"),
        easycache(model, steps=STEPS, shift=3.0, threshold=0.1),
    ):
        sample(model, text().repeat(2, 1, 1), SIZE, steps=STEPS, guidance=8.0)
    assert not hooks_left(model)
    assert torch.equal(video(model), dense)


def test_methods_nest(model, dense):
    knobs = {"steps": STEPS, "shift": 3.0}
    with (
        tome(model, keep_ratio=0.5, **knobs),
        teacache(model, threshold=99.0, **knobs),
        Recorder(model) as seen,
    ):
        both = video(model)
    assert seen.computed == COMPUTED["teacache"]
    assert not torch.equal(both, within(teacache, model, {"threshold": 99.0}))
    assert not hooks_left(model)
    assert torch.equal(video(model), dense)


def within_steps(method, model, **knobs) -> Recorder:
    with Recorder(model) as seen:
        within(method, model, knobs)
    return seen


def test_easycache_reuses_while_its_estimate_stays_under_the_threshold(model):
    seen = within_steps(easycache, model, threshold=99.0)
    x, v = [row[0] for row in seen.inputs], [row[0] for row in seen.outputs]
    for step in (2, 3, 4):
        added = seen.outputs[1] - seen.inputs[1]
        assert torch.equal(seen.outputs[step], seen.inputs[step] + added)
    rate = (v[1] - v[0]).abs().mean() / (x[1] - x[0]).abs().mean()
    moved = [(x[t] - x[t - 1]).abs().mean() for t in range(1, STEPS)]
    # at step 2, and at step 3 after a reused step 2
    second, third = (float(rate * moved[t - 1] / v[1].abs().mean()) for t in (2, 3))
    expected = {0.99 * second: 2, second + 0.01 * third: 3, second + 1.01 * third: 4}
    for threshold, computed in expected.items():
        assert within_steps(easycache, model, threshold=threshold).computed[:3] == [0, 1, computed]
    # computing empties the account: one more step of reuse after it
    assert 4 not in within_steps(easycache, model, threshold=second + 0.01 * third).computed
    late = within_steps(easycache, model, threshold=99.0, warmup=4)
    assert late.computed == [0, 1, 2, 3, 5]


def test_zeus_extrapolates_and_repeats_in_turn(model):
    with Recorder(model) as seen:
        within(zeus_like, model, {"computed": 2 / 8, "steps": 8}, steps=8)
    # the first fifth of eight steps are two, and nothing is left to spread
    assert seen.computed == [0, 1]
    out = seen.outputs
    assert torch.equal(out[2], 2 * out[1] - out[0])
    assert torch.equal(out[3], out[2])
    # further steps come in pairs, so that a difference is one of computed outputs
    with Recorder(model) as seen:
        within(zeus_like, model, {"computed": 6 / 12, "steps": 12}, steps=12)
    assert seen.computed == [0, 1, 5, 6, 10, 11]
    out = seen.outputs
    assert torch.equal(out[7], 2 * out[6] - out[5]) and torch.equal(out[8], out[7])


@torch.no_grad()
def test_random_tokens_leave_a_quarter_of_the_blocks_whole(model, dense_flops):
    entered, left = [], []
    handles = [
        handle
        for block in model.blocks
        for handle in (
            block.register_forward_pre_hook(lambda m, args: entered.append(args[0])),
            block.register_forward_hook(lambda m, args, out: left.append(out)),
        )
    ]
    within(random_tokens, model, {"keep_ratio": 0.5}, steps=1)
    for handle in handles:
        handle.remove()
    changed = [(out != x).any(-1) for x, out in zip(entered, left, strict=True)]
    assert [bool(c.all()) for c in changed] == [index % 4 == 0 for index in range(16)]
    # both rows alike, one choice until the next whole block, as many tokens of each latent frame
    assert all(torch.equal(c[0], c[1]) for c in changed)
    assert torch.equal(changed[1], changed[3]) and not torch.equal(changed[1], changed[5])
    assert changed[1][0].view(2, 36).sum(1).tolist() == [18, 18]
    x, kept = entered[1], changed[1][0].nonzero()[:, 0]
    assert torch.equal(left[1][:, ~changed[1][0]], x[:, ~changed[1][0]])
    flops = count_flops(partial(within, random_tokens, model, {"keep_ratio": 0.5}))
    assert flops == dense_flops - STEPS * 12 * 2 * (block_flops(72) - block_flops(len(kept)))


def test_random_tokens_leave_the_given_frame_whole(model):
    condition = torch.zeros(1, 20, *SIZE)
    condition[:, :4, 0] = 1
    changed = []
    handle = model.blocks[2].register_forward_hook(
        lambda module, args, out: changed.append((out != args[0]).any(-1)[0].view(2, 36).sum(1))
    )
    within(random_tokens, model, {"keep_ratio": 0.25}, condition=condition)
    handle.remove()
    assert [found.tolist() for found in changed] == [[36, 9]] * STEPS


def test_teacache_reuses_the_residual_of_the_blocks(model):
    entered, modulated, left = [], [], []
    first, last = model.blocks[0], model.blocks[-1]
    handles = [
        first.register_forward_pre_hook(lambda module, args: entered.append(args[0])),
        first.attn1.register_forward_pre_hook(lambda module, args: modulated.append(args[0][0])),
        last.register_forward_hook(lambda module, args, out: left.append(out)),
    ]
    within(teacache, model, {"threshold": 99.0})
    for handle in handles:
        handle.remove()
    for step in (1, 2, 3, 4):
        torch.testing.assert_close(left[step] - entered[step], left[0] - entered[0])
    change = [
        float((new - old).abs().mean() / old.abs().mean())
        for old, new in zip(modulated, modulated[1:], strict=False)
    ]
    expected = {0.99 * change[0]: 1, change[0] + 0.01 * change[1]: 2, sum(change[:2]) + 1e-4: 3}
    for threshold, computed in expected.items():
        assert within_steps(teacache, model, threshold=threshold).computed[:2] == [0, computed]


def test_reused_steps_cost_what_is_left_of_the_model(model):
    step = count_flops(lambda: video(model, steps=1))
    blocks = 2 * 16 * block_flops(72)
    costs = {"easycache": 3 * step, "teacache": 6 * step - 4 * blocks}
    costs["first_block_cache"] = 6 * step - 5 * blocks * 15 // 16
    costs["mag_cache"] = 6 * step - 5 * blocks
    costs["sea_cache"] = 6 * step - 4 * blocks
    # TeaCache projects nothing: it leaves the first block before its attention
    for name, cost in costs.items():
        method, _, saving = METHODS[name]
        assert count_flops(partial(within, method, model, saving)) == cost, name


def test_mag_ratios_are_diffusers_own(model):
    config = MagCacheConfig(calibrate=True, num_inference_steps=STEPS + 1)
    measured = []
    for seed in (0, 1):
        model.enable_cache(config)
        video(model, seed=seed)
        manager = (
            model.blocks[0]._diffusers_hook.get_hook("mag_cache_leader_block_hook").state_manager
        )
        (state,) = manager._state_cache.values()
        measured.append(state.calibration_ratios)
        model.disable_cache()
    samples = [partial(video, model, seed=seed) for seed in (0, 1)]
    ratios = calibrate_mag_ratios(model, samples, steps=STEPS)
    assert ratios == pytest.approx([sum(pair) / 2 for pair in zip(*measured, strict=True)])
    assert ratios[0] == 1.0
    assert not hooks_left(model)
    with pytest.raises(ValueError, match="at least one video"):
        calibrate_mag_ratios(model, [], steps=STEPS)
    with pytest.raises(ValueError, match="expected 6, one per step, got 5"):
        within(mag_cache, model, {"threshold": 0.1, "mag_ratios": RATIOS[:5]})


def test_pyramid_attention_broadcast_keeps_to_its_timesteps(model):
    with Recorder(model) as seen:
        counts = []
        handle = model.blocks[5].attn1.to_q.register_forward_hook(
            lambda *a: counts.append(len(seen.outputs))
        )
        knobs = {"self_every": 99, "timesteps": (100, 800)}
        within(pyramid_attention_broadcast, model, knobs)
        handle.remove()
    assert counts == [0, 1, 2]
    assert seen.computed == list(range(STEPS))


def test_matching_by_hand():
    # one latent frame of 3 x 3: destinations 0, 2, 6, 8
    hidden = torch.eye(9)
    hidden[1] = 5 * hidden[2] + 0.1 * hidden[0]
    hidden[7] = hidden[0] + 0.5 * hidden[6]
    # long, so that its product with 8 is the largest, and yet far from it
    hidden[4] = 9 * hidden[8] + 40 * hidden[4]
    grid = TokenGrid(1, 3, 3)
    merge = match_tokens(hidden, grid, 7 / 9)
    # the two most similar: 1 to 2 whatever its length, 7 to 0 across the frame
    assert merge.kept.tolist() == [0, 2, 3, 4, 5, 6, 8]
    assert merge.group.tolist() == [0, 1, 1, 2, 3, 4, 5, 0, 6]
    merged = merge.merge(hidden[None])[0]
    assert torch.equal(merged[0], (hidden[0] + hidden[7]) / 2)
    assert torch.equal(merged[3], hidden[4])
    unmerged = merge.unmerge(merged[None])[0]
    assert torch.equal(unmerged[7], unmerged[0])
    assert torch.equal(unmerged[7], merged[0])
    assert match_tokens(hidden, grid, 1.0) is None
    # destinations stay, however little is to be kept
    assert match_tokens(hidden, grid, 0.01).kept.tolist() == [0, 2, 6, 8]


@pytest.mark.parametrize(("size", "cells"), [((3, 5, 7), 12), ((2, 1, 1), 1), ((1, 1, 6), 3)])
def test_every_latent_frame_is_matched_on_its_own(size, cells):
    grid = TokenGrid(*size)
    hidden = torch.randn(grid.tokens, 8, generator=torch.Generator().manual_seed(1))
    for keep in (0.3, 0.6, 0.8):
        merge = match_tokens(hidden, grid, keep)
        budget = max(cells, round(keep * grid.per_frame))
        if merge is None:
            assert budget == grid.per_frame
            continue
        frame = torch.arange(grid.tokens) // grid.per_frame
        assert torch.equal(frame[merge.kept[merge.group]], frame)
        assert torch.equal(merge.group[merge.kept], torch.arange(len(merge.kept)))
        assert frame[merge.kept].bincount().tolist() == [budget] * grid.frames


@torch.no_grad()
def test_tome_runs_every_part_on_merged_tokens_at_their_own_positions(model):
    block, seen = model.blocks[4], {}

    def remember(part):
        # a hook that returns something would replace the output
        return lambda module, args, out: seen.update({part: (args, out)})

    handles = [getattr(block, p).register_forward_hook(remember(p)) for p in ("attn1", "ffn")]
    handles.append(block.register_forward_hook(remember("block")))
    within(tome, model, {"keep_ratio": 0.5}, steps=1)
    for handle in handles:
        handle.remove()
    merge = match_tokens(seen["block"][0][0][0], GRID, 0.5)
    assert len(merge.kept) == 36
    (hidden, _, _, rotary), out = seen["attn1"]
    kept = tuple(part[:, merge.kept] for part in rotary)
    means = torch.zeros(2, 36, 128)
    for place in range(36):
        means[:, place] = hidden[:, merge.group == place].mean(1)
    want = block.attn1(means, None, None, kept)[:, merge.group]
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)
    (hidden,), out = seen["ffn"]
    want = block.ffn(merge.merge(hidden))[:, merge.group]
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_tome_costs_its_merged_tokens_and_the_match(model):
    full = count_flops(lambda: video(model, steps=1))
    for keep, kept in ((0.5, 36), (0.25, 18)):
        merged = count_flops(partial(within, tome, model, {"keep_ratio": keep}, steps=1))
        # 2 latent frames of 27 sources and 9 destinations
        match = 16 * 2 * 2 * 27 * 9 * 128
        assert full - merged == 2 * 16 * (block_flops(72) - block_flops(kept)) - match


@torch.no_grad()
def test_equal_tokens_merge_without_loss(model):
    # 4 x 4 equal latent pixels are 2 x 2 equal tokens, and stay so where positions say nothing
    model = copy.deepcopy(model)
    nowhere = torch.ones(1, 72, 1, 16), torch.zeros(1, 72, 1, 16)
    model.rope.forward = lambda hidden_states: nowhere
    x = torch.randn(1, 36, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    x = x.repeat_interleave(4, 3).repeat_interleave(4, 4)

    def velocity(x):
        return model(x, torch.tensor([600.0]), text(), return_dict=False)[0]

    def merged(x, keep):
        with tome(model, steps=1, shift=3.0, keep_ratio=keep):
            return velocity(x)

    torch.testing.assert_close(merged(x, 0.25), velocity(x), atol=1e-4, rtol=1e-4)
    # which is no matter of course
    x = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    assert (merged(x, 0.25) - velocity(x)).abs().max() > 0.1


@torch.no_grad()
def test_the_first_row_decides_what_is_merged(model):
    # two latents: with one, the first block's match would be the same for both rows, and it stays
    # the match, because tokens that were merged get more alike
    x = torch.randn(2, 36, *SIZE, generator=torch.Generator().manual_seed(3))

    def velocity(x):
        with tome(model, steps=1, shift=3.0, keep_ratio=0.5):
            t, words = torch.full((len(x),), 600.0), text().expand(len(x), -1, -1)
            return model(x, t, words, return_dict=False)[0]

    both = velocity(x)
    torch.testing.assert_close(both[:1], velocity(x[:1]), atol=1e-4, rtol=1e-4)
    assert (both[1:] - velocity(x[1:])).abs().max() > 0.05


@pytest.mark.parametrize("keep", [0.0, 1.01, -1.0])
def test_tome_refuses_a_keep_ratio_out_of_range(model, keep):
    with pytest.raises(ValueError, match="keep_ratio: expected more than 0 and at most 1"):
        within(tome, model, {"keep_ratio": keep})


def test_tome_on_odd_grids(model):
    # 5 x 3 tokens
    size = (2, 10, 6)
    dense = video(model, size, steps=2)
    knobs = {"steps": 2, "shift": 3.0}
    with tome(model, keep_ratio=1.0, **knobs):
        assert torch.equal(video(model, size, steps=2), dense)
    with tome(model, keep_ratio=0.4, **knobs):
        merged = video(model, size, steps=2)
    assert merged.isfinite().all()
    assert not torch.allclose(merged, dense, atol=1e-2)


def test_a_knob_is_found_from_either_side():
    runs = []

    def falling(knob):
        runs.append(knob)
        # a step cache of 20 steps
        return 1 - round(20 * min(knob, 0.8)) / 20

    knob, ratio = knob_for(0.5, falling, 0.0, 10.0)
    assert ratio == falling(knob) == 0.5
    assert len(runs) <= 13
    knob, ratio = knob_for(0.5, lambda keep: keep**2, 0.0, 1.0, near=1e-3, tries=30)
    assert ratio == pytest.approx(0.5, abs=1e-3)
    assert ratio <= 0.52


def test_the_search_for_a_knob_stops_near_the_target():
    asked = []

    def run(keep):
        asked.append(keep)
        return keep

    knob, ratio = knob_for(0.67, run, 0.25, 1.0)
    assert ratio == knob == pytest.approx(0.67, abs=0.005)
    assert len(asked) == 9


def test_a_knob_never_lands_above_the_target():
    levels = {1: 1.0, 2: 0.55, 3: 0.4, 4: 0.35}
    asked = []

    def run(every):
        asked.append(every)
        return levels[every]

    assert knob_for(0.5, run, 1, 4, whole=True) == (3, 0.4)
    assert all(isinstance(every, int) for every in asked)
    # a level just above the target will do
    assert knob_for(0.54, run, 1, 4, whole=True) == (2, 0.55)
    with pytest.raises(ValueError, match="at most 0.220 of the dense FLOPs, got 0.350 at best"):
        knob_for(0.2, run, 1, 4, whole=True)


def test_a_knob_for_a_real_method(model, dense_flops):
    def run(threshold):
        return count_flops(lambda: within(teacache, model, {"threshold": threshold})) / dense_flops

    knob, ratio = knob_for(0.6, run, 0.0, 2.0, tries=6)
    assert run(knob) == ratio
    assert 0.4 < ratio <= 0.62
