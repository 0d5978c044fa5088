import pytest
import torch

from wantrim.engine.engine import COND, UNCOND, Engine
from wantrim.engine.plan import TrimPlan
from wantrim.engine.record import Record
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import denoise, sample
from wantrim.hosts.diffusers.weights import new_transformer
from wantrim.hosts.past import Past
from wantrim.methods.grid import TokenGrid, gather_tokens
from wantrim.methods.importance import Evidence, rotation
from wantrim.methods.restore import RESTORE, frame_weights, nearest_kept
from wantrim.methods.schedule import Schedule
from wantrim.methods.tokens import TokenPlan

BLOCKS = 6
SIZE = (3, 8, 6)
BOTH = (COND, UNCOND)
ONCE = {"restore": "last_update", "trim_reselecting": True, "reselect_every": BLOCKS}
PLANS = [{"restore": name, "trim_reselecting": name == "last_output"} for name in RESTORE]
PLANS += [{"restore": "last_update", "trim_reselecting": True}]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    wan = new_transformer(
        dim=48, num_heads=4, num_layers=BLOCKS, ffn_dim=64, in_dim=16, out_dim=16, text_dim=24
    )
    for block in wan.blocks:
        torch.nn.init.normal_(block.scale_shift_table, std=0.5)
    return wan.eval()


def plan(keep=0.5, **options) -> TrimPlan:
    options = {"reselect_every": 3, "importance": "rotation"} | options
    return TrimPlan(TokenPlan(Schedule(keep, "constant"), **options))


def words(batch=1) -> torch.Tensor:
    return torch.randn(batch, 7, 24, generator=torch.Generator().manual_seed(9))


def run(model, trim=None, batch=1, **options):
    options = {"steps": 4, "guidance": 4.0} | options
    if trim is None:
        return sample(model, words(batch), SIZE, **options), None
    with attach(model, trim, cond_or_uncond=BOTH, shift=3.0) as attachment:
        return sample(model, words(batch), SIZE, **options), attachment.finish()


def test_nearest_is_in_the_same_frame_and_ties_go_to_the_lowest_position():
    grid = TokenGrid(2, 3, 4, start=5)
    # frame 0 keeps its corners 0 and 11, frame 1 only 5
    kept = torch.tensor([[0, 1, 2, 3, 4, 5, 16, 22, 29]])
    dropped = torch.tensor([[p for p in range(5, 29) if p not in kept[0].tolist()]])
    place = nearest_kept(kept, dropped, grid)
    for position, found in zip(dropped[0].tolist(), place[0].tolist(), strict=True):
        frame, cell = divmod(position - 5, 12)
        row, column = divmod(cell, 4)
        near = {0: [(0, 5), (11, 16)], 1: [(5, 22)]}[frame]
        far = [((row - c // 4) ** 2 + (column - c % 4) ** 2, p) for c, p in near]
        assert kept[0, found] == min(far)[1]


def test_frame_mean_takes_each_frames_kept_tokens_only():
    grid = TokenGrid(3, 1, 4, start=2)
    kept = torch.tensor([[0, 1, 2, 4, 6, 7, 13], [0, 1, 3, 5, 8, 9, 12]])
    update = torch.randn(2, 7, 5)
    got = frame_weights(kept, grid, torch.float32) @ update
    torch.testing.assert_close(got[0, 0], (update[0, 2] + update[0, 3]) / 2)
    torch.testing.assert_close(got[0, 2], update[0, 6])
    torch.testing.assert_close(got[1, 1], (update[1, 4] + update[1, 5]) / 2)


@pytest.mark.parametrize("options", PLANS)
@pytest.mark.parametrize("batch", [1, 2])
def test_every_treatment_changes_only_what_was_dropped_and_is_the_same_again(model, options, batch):
    dense, _ = run(model, batch=batch)
    trimmed, report = run(model, plan(**options), batch)
    assert torch.isfinite(trimmed).all()
    assert not torch.allclose(trimmed, dense, atol=1e-3)
    assert torch.equal(trimmed, run(model, plan(**options), batch)[0])
    assert torch.equal(run(model, batch=batch)[0], dense)
    assert 0.4 < report.kept_share < 0.95
    neutral, _ = run(model, plan(1.0, **options), batch)
    assert torch.equal(neutral, dense)


@pytest.mark.parametrize("importance", ["rotation", "velocity_change+rotation"])
@pytest.mark.parametrize("options", PLANS)
def test_spared_steps_are_whole_and_what_the_next_one_repeats(model, options, importance):
    trim = plan(spare=0.5, importance=importance, **options)
    whole = list(denoise(model, words(), SIZE, steps=4, guidance=4.0))
    with attach(model, trim, cond_or_uncond=BOTH, shift=3.0) as attachment:
        steps = list(denoise(model, words(), SIZE, steps=4, guidance=4.0))
        report = attachment.finish()
    assert all(torch.equal(steps[i], whole[i]) for i in (0, 1))
    assert not torch.allclose(steps[2], whole[2], atol=1e-3)
    shares = [step.kept_share for step in report.steps]
    assert shares[:2] == [1.0, 1.0] and max(shares[2:]) < 1.0
    assert [step.kept_per_block for step in report.steps] == [
        step.planned_tokens for step in report.steps
    ]
    assert not report.notes
    # a plan that begins in the second step computes all of that one, and remembers it too
    later, _ = run(model, plan(start=0.2, importance=importance, **options))
    if trim.tokens.remembers and trim.tokens.trim_reselecting:
        assert torch.equal(steps[-1], later)


@torch.no_grad()
@pytest.mark.parametrize("spare", [0.0, 0.5])
def test_steps_that_another_cache_answers_did_no_work(spare):
    session = Session(plan(**ONCE, spare=spare), Report())
    grid = TokenGrid(3, 4, 3)
    for number in range(4):
        sigma = 1 - number / 4
        latent = torch.full((1, 16, *SIZE), sigma)
        session.begin(
            latent=latent, sigma=sigma, progress=1 - sigma, cond_or_uncond=(COND,), grid=grid,
            num_blocks=2,
        )  # fmt: skip
    assert [step.kept_share for step in session.finish(True).steps] == [0.0] * 4


@torch.no_grad()
def test_spared_steps_hold_one_update_at_a_time():
    session, grid = Session(plan(**ONCE, spare=0.5), Report()), TokenGrid(3, 4, 3)
    for number in range(3):
        sigma = 1 - number / 8
        call = session.begin(
            latent=torch.full((1, 16, *SIZE), sigma), sigma=sigma, progress=1 - sigma,
            cond_or_uncond=(COND,), grid=grid, num_blocks=2,
        )  # fmt: skip
        hidden = torch.zeros(1, grid.tokens, 4)
        hidden = call.block(0, AddBlock(hidden, number))
        # of the step before nothing is left while this one is on its way
        assert not session.decision.past._kept
        call.block(1, AddBlock(hidden, number))
        assert len(session.decision.past._kept) == 1


def test_a_run_within_what_is_spared_is_exact(model):
    out, report = run(model, plan(spare=1.0, **ONCE))
    assert torch.equal(out, run(model)[0])
    assert report.kept_share == 1.0 and "no token was left out" in report.notes[0]


def test_spared_steps_cost_no_step_more(model):
    """The first of two steps is all that there is to remember."""
    for options in ({}, {"spare": 0.2}):
        _, report = run(model, plan(**ONCE, **options), steps=2)
        assert [step.kept_share for step in report.steps] == [1.0, 0.5]


@pytest.mark.parametrize("options", PLANS)
@pytest.mark.parametrize("dropped_kv", ["leave", "keep"])
@torch.no_grad()
def test_split_calls_equal_batched_ones(model, options, dropped_kv):
    x = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(3))
    text = words()
    none = torch.zeros_like(text)
    trim = plan(dropped_kv=dropped_kv, **options)
    outs = []
    for split in (False, True):
        chunks = (COND,) if split else BOTH
        with attach(model, trim, cond_or_uncond=chunks) as attachment:
            y, steps = x, []
            for sigma in (0.9, 0.7, 0.5):
                t = torch.tensor([1000 * sigma])
                if split:
                    attachment.cond_or_uncond = (COND,)
                    cond = model(y, t, text, return_dict=False)[0]
                    attachment.cond_or_uncond = (UNCOND,)
                    uncond = model(y, t, none, return_dict=False)[0]
                else:
                    twice = torch.cat([text, none])
                    pair = model(y.repeat(2, 1, 1, 1, 1), t.expand(2), twice, return_dict=False)[0]
                    cond, uncond = pair.chunk(2)
                y = y - 0.2 * (uncond + 4 * (cond - uncond))
                steps.append(y)
            outs.append(torch.stack(steps))
    torch.testing.assert_close(*outs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("restore", ["last_update", "last_output"])
@torch.no_grad()
def test_dropped_tokens_get_what_they_got_in_the_step_before(model, restore):
    x = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([700.0])
    starts, ends = [], []
    handles = [
        model.blocks[0].register_forward_pre_hook(lambda m, args: starts.append(args[0])),
        model.norm_out.register_forward_pre_hook(lambda m, args: ends.append(args[0])),
    ]
    trim = plan(restore=restore, trim_reselecting=True, reselect_every=BLOCKS)
    with attach(model, trim) as attachment:
        model(x, t, words(), return_dict=False)
        model(x * 1.1, t, words(), return_dict=False)
        dropped = attachment.session.decision.selections[0].dropped[0]
        report = attachment.finish()
    for handle in handles:
        handle.remove()
    full = model.patch_embedding(x * 1.1).flatten(2).transpose(1, 2)
    want = ends[0]
    if restore == "last_update":
        want = full + (ends[0] - starts[0])
    torch.testing.assert_close(ends[1][:, dropped], want[:, dropped], atol=1e-5, rtol=1e-4)
    kept = [p for p in range(want.shape[1]) if p not in dropped.tolist()]
    assert (ends[1][:, kept] - want[:, kept]).abs().amax(-1).min() > 1e-4
    assert [step.kept_share for step in report.steps] == [1.0, 0.5]


def test_restored_tokens_get_the_mean_of_their_frame_in_a_block(model):
    """One block after the choice: dropped rows move by the mean of what the kept rows moved."""
    moves = {}
    for restore in ("identity", "frame_mean", "nearest"):
        seen = []
        handle = model.blocks[1].register_forward_hook(
            lambda m, a, out, s=seen: s.append((a[0], out))
        )
        with attach(model, plan(restore=restore, reselect_every=6), shift=3.0) as attachment:
            with torch.no_grad():
                x = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(3))
                model(x, torch.tensor([700.0]), words(), return_dict=False)
            chosen = attachment.session.decision.selections[0]
        handle.remove()
        before, after = seen[-1]
        moves[restore] = (after - before)[0], chosen
    assert (moves["identity"][0][moves["identity"][1].dropped[0]] == 0).all()
    move, chosen = moves["frame_mean"]
    per_frame = 12
    for frame in range(3):
        inside = [p for p in chosen.index[0].tolist() if p // per_frame == frame]
        lost = [p for p in chosen.dropped[0].tolist() if p // per_frame == frame]
        want = move[inside].mean(0).expand(len(lost), -1)
        torch.testing.assert_close(move[lost], want, atol=1e-5, rtol=1e-4)
    move, chosen = moves["nearest"]
    inside = move[chosen.index[0]]
    for lost in chosen.dropped[0].tolist():
        assert (move[lost] - inside).abs().amax(-1).min() < 1e-5


def test_restoring_by_block_is_restoring_by_stretch(model):
    """The kept tokens are the same in all blocks of a stretch, so their means add up."""
    states = []
    handles = [
        model.blocks[1].register_forward_pre_hook(lambda m, args: states.append(args[0])),
        model.blocks[BLOCKS - 1].register_forward_hook(lambda m, args, out: states.append(out)),
    ]
    with attach(model, plan(restore="frame_mean", reselect_every=BLOCKS)) as attachment:
        with torch.no_grad():
            x = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(3))
            model(x, torch.tensor([700.0]), words(), return_dict=False)
        chosen = attachment.session.decision.selections[0]
    for handle in handles:
        handle.remove()
    move = (states[-1] - states[0])[0]
    for frame in range(3):
        inside = [p for p in chosen.index[0].tolist() if p // 12 == frame]
        lost = [p for p in chosen.dropped[0].tolist() if p // 12 == frame]
        want = move[inside].mean(0).expand(len(lost), -1)
        torch.testing.assert_close(move[lost], want, atol=1e-4, rtol=1e-3)


def test_rotation_brings_back_what_was_left_out_longest(model):
    _, report = run(
        model, plan(0.5, reselect_every=BLOCKS, trim_reselecting=True, alpha=1.0), steps=6
    )
    halves = [step.coverage for step in report.steps]
    # at one half, two steps in a row cover every token once
    for first, second in zip(halves, halves[1:], strict=False):
        torch.testing.assert_close(first + second, torch.ones_like(first))


def test_rotation_spreads_the_first_choice_over_the_frame():
    grid = TokenGrid(2, 4, 9)
    chosen = rotation(Evidence(grid, torch.zeros(1, grid.tokens, 1))).view(2, 36)
    first = chosen.topk(18).indices.sort(-1).values
    gaps = first.diff(dim=-1)
    assert gaps.max() <= 3
    assert not torch.equal(first[0], first[1])


def test_velocity_change_prefers_the_tokens_that_move(model):
    trim = plan(0.5, importance="velocity_change", alpha=1.0, reselect_every=2)
    with attach(model, trim) as attachment, torch.no_grad():
        x = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(3))
        velocity = torch.zeros_like(x)
        for number, sigma in enumerate((0.9, 0.8, 0.7, 0.6)):
            model(x, torch.tensor([1000 * sigma]), words(), return_dict=False)
            # the left half of the picture gathers speed
            velocity[..., :3] = number
            x = x - 0.1 * velocity
        chosen = attachment.session.decision.selections[0]
    columns = chosen.index[0] % 12 % 3
    assert chosen.index.shape[1] == 18
    # the column of tokens 0..1 of 3 holds the left half; 8 of 12 tokens of a frame are there
    assert (columns < 2).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"restore": "magic"}, "restore: expected one of identity.*'magic'"),
        (
            {"importance": "attention", "trim_reselecting": True},
            "attention can only be known after",
        ),
        ({"restore": "last_output"}, "last_output.*trim_reselecting"),
    ],
)
def test_plans_that_cannot_work_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        plan(**options)


@torch.no_grad()
def test_parts_of_the_video_that_are_sampled_apart_remember_apart():
    """Two context windows in turn: each gets its own last update, and a new one is computed."""
    session = Session(plan(**ONCE), Report())
    grid = TokenGrid(3, 4, 3)
    kept = []

    def step(sigma: float, window, value: float) -> torch.Tensor:
        latent = torch.full((1, 16, *SIZE), sigma + value)
        call = session.begin(
            latent=latent, sigma=sigma, progress=1 - sigma, cond_or_uncond=(COND,), grid=grid,
            num_blocks=2, window=window,
        )  # fmt: skip
        hidden = torch.zeros(1, grid.tokens, 4)
        for index in range(2):
            hidden = call.block(index, AddBlock(hidden, value))
        kept.append(session.decision.ran[0])
        return hidden

    for window in ("left", "right"):
        assert (
            step(0.9, window, 1.0 if window == "left" else 10.0)
            == 2 * (1 if window == "left" else 10)
        ).all()
    assert not session.report.notes
    left, right = step(0.8, "left", 3.0), step(0.8, "right", 30.0)
    assert sorted(left.unique().tolist()) == [2.0, 6.0]
    assert sorted(right.unique().tolist()) == [20.0, 60.0]
    moved = step(0.7, "middle", 5.0)
    assert (moved == 10.0).all()
    assert [selection is None for selection in kept] == [True, True, False, False, True]
    assert "nothing was remembered" in session.finish(True).notes[0]


class AddBlock:
    """A block that adds a number to every token that it computes."""

    def __init__(self, hidden: torch.Tensor, value: float):
        self.hidden, self.value = hidden, value

    def run(self) -> torch.Tensor:
        return self.hidden + self.value

    def run_subset(self, index, others):
        return gather_tokens(self.hidden, index) + self.value


def test_rotation_reaches_every_token_in_every_stretch(model):
    """Several choices a step: each stretch has a memory of its own, and so an age of its own."""
    trim = plan(0.6, restore="last_update", trim_reselecting=True, alpha=1.0, reselect_every=2)
    waits = {}
    with attach(model, trim, cond_or_uncond=BOTH, shift=3.0) as attachment:
        for latents in denoise(model, words(), SIZE, steps=8, guidance=4.0):
            assert torch.isfinite(latents).all()
            for block, chosen in attachment.session.decision.selections.items():
                age = waits.setdefault(block, torch.zeros(36, dtype=torch.int64))
                age[chosen.dropped[0]] += 1
                age[chosen.index[0]] = 0
                assert age.max() <= 2
    assert sorted(waits) == [0, 2, 4]


def test_the_mean_of_large_updates_fits_half_precision():
    grid = TokenGrid(1, 60, 60)
    kept = torch.arange(2520)[None]
    update = torch.full((1, 2520, 4), 40.0, dtype=torch.float16)
    mean = frame_weights(kept, grid, torch.float16) @ update
    torch.testing.assert_close(mean, torch.full_like(mean, 40.0), rtol=5e-3, atol=0)


def test_a_reference_frame_behind_the_video_has_no_change():
    past, grid = Past(), TokenGrid(4, 2, 2)
    latents = torch.zeros(3, 1, 2, 3, 4, 4)
    # the velocity changes in the middle latent frame only
    latents[2][:, :, 1] = 1.0
    for sigma, latent in zip((0.9, 0.8, 0.7), latents, strict=True):
        change = past.see(sigma, latent, grid, 1, trimmed=True)
    assert change.view(4, 4).amax(1).gt(0).tolist() == [False, True, False, False]


def test_parts_that_are_sampled_no_more_are_forgotten():
    session = Session(plan(**ONCE), Report())
    latent = torch.randn(1, 16, *SIZE)
    for number, sigma in enumerate((0.9, 0.8, 0.7, 0.6)):
        for window in (0, number):
            session.begin(
                latent=latent * sigma + window, sigma=sigma, progress=0.0, cond_or_uncond=(COND,),
                grid=TokenGrid(3, 4, 3), num_blocks=2, window=window,
            )  # fmt: skip
    assert sorted(session.pasts) == [0, 2, 3]
    session.finish(True)
    assert not session.pasts


def test_prompts_of_different_areas_in_one_call_are_all_computed():
    session = Session(plan(**ONCE), Report())
    call = session.begin(
        latent=torch.randn(2, 16, *SIZE), sigma=0.9, progress=0.1, cond_or_uncond=(COND, COND),
        grid=TokenGrid(3, 4, 3), num_blocks=2,
    )  # fmt: skip
    assert not call.trims
    assert "different areas" in session.finish(True).notes[0]


def test_a_run_too_short_to_know_the_velocity_says_so(model):
    trim = plan(**{**ONCE, "importance": "velocity_change+rotation"})
    assert not any("left out alone" in note for note in run(model, trim, steps=4)[1].notes)
    assert any("left out alone" in note for note in run(model, trim, steps=2)[1].notes)
