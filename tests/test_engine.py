"""The engine on diffusers' WanTransformer3DModel: small random ones, and the tiny Wan."""

import copy
import gc
import weakref

import pytest
import torch

import wantrim.engine.memory as memory
from wantrim.engine.call import OUT_OF_MEMORY
from wantrim.engine.engine import COND, UNCOND, Engine
from wantrim.engine.memory import Prompt
from wantrim.engine.plan import TrimPlan
from wantrim.engine.program import KEPT, MIXED, NO_CONTEXT, NOT_REMEMBERED, SKIP
from wantrim.engine.record import Record
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.weights import load_original
from wantrim.kernels import reference
from wantrim.methods.depth import BlockPlan
from wantrim.methods.grid import TokenGrid, scatter_tokens
from wantrim.methods.heads import FULL, OFF, HeadPlan
from wantrim.methods.routers import FixedRouter
from wantrim.methods.schedule import Schedule
from wantrim.methods.shares import Shares
from wantrim.methods.tokens import TokenPlan
from wantrim.tests.small_wan import SIZE, noise, random_wan, words
from wantrim.toy import CHECKPOINT

BLOCKS, GRID = 5, TokenGrid(3, 4, 3)
BOTH = (COND, UNCOND)
SIGMAS = (0.95, 0.9, 0.8, 0.7, 0.55, 0.4)
MIXTURE = Shares(SIGMAS, (1, 1, 0.4, 0, 0.25, 1))
HEADS = HeadPlan((("frame", "full", OFF, "tile2"),) * BLOCKS, ((FULL, OFF, FULL, FULL),) * BLOCKS)
TAPE = TokenPlan(Schedule(0.6), reselect_every=3)
PLANS = {
    "shares": TrimPlan(shares=MIXTURE),
    "tape": TrimPlan(TAPE),
    "blocks": TrimPlan(blocks=BlockPlan(FixedRouter((1, 3)))),
    "heads and shares": TrimPlan(heads=HEADS, shares=MIXTURE),
    "all but context": TrimPlan(
        TAPE, HEADS, BlockPlan(FixedRouter((3,))), Shares(SIGMAS, (1, 0, 1, 1, 0, 1))
    ),
}


@pytest.fixture(scope="module")
def wan():
    return random_wan(BLOCKS)


@pytest.fixture(scope="module")
def tiny():
    return load_original(CHECKPOINT)


@torch.no_grad()
def run(model, plan, *, split=(), sigmas=SIGMAS, dtype=torch.float32, latent=None, attached=None):
    """(cond, uncond) velocities and latents of every step, and the record.

    Args:
        split: steps whose prompts come in two calls.
        attached: told the attachment before every step.
    """
    width = model.config.text_dim
    text = torch.stack([noise(7, width, seed=9), torch.zeros(7, width)]).to(dtype)
    y = noise(1, 16, *SIZE).to(dtype) if latent is None else latent
    rest = torch.zeros(1, model.config.in_channels - 16, *y.shape[2:], dtype=dtype)
    found = []
    with attach(model, plan, cond_or_uncond=BOTH, shift=3.0) as attachment:
        for number, sigma in enumerate(sigmas):
            if attached is not None:
                attached(number, attachment)
            x, t = torch.cat([y, rest], 1), torch.tensor([1000 * sigma])
            velocities = []
            for role in (BOTH[:1], BOTH[1:]) if number in split else (BOTH,):
                attachment.cond_or_uncond = role
                rows = list(role)
                out = model(
                    x.repeat(len(rows), 1, 1, 1, 1), t.repeat(len(rows)), text[rows],
                    return_dict=False,
                )[0]  # fmt: skip
                velocities += out.chunk(len(rows))
            found.append((*velocities, y))
            cond, uncond = velocities
            after = (*sigmas[1:], 0.0)[number]
            y = y + (after - sigma) * (uncond + 4 * (cond - uncond))
        return found, attachment.finish()


def same(one, other, exact=True) -> bool:
    """Whether two runs gave the same velocities."""
    pairs = [
        (a, b) for p, q in zip(one[0], other[0], strict=True) for a, b in zip(p, q, strict=True)
    ]
    if exact:
        return all(torch.equal(a, b) for a, b in pairs)
    return all(torch.allclose(a, b, atol=2e-4, rtol=2e-4) for a, b in pairs)


def rows(record) -> list:
    return [step.rows for step in record.steps]


# whole, partial and repeated steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_whole_or_repeated_or_both_by_token(dtype):
    model = random_wan(BLOCKS).to(dtype)
    ran = []
    model.patch_embedding.register_forward_hook(lambda *_: ran.append(1))
    kept = {}

    def note(number, attachment):
        if number and attachment.engine.now.selections:
            kept[number - 1] = attachment.engine.now.selections[0]

    found, record = run(model, PLANS["shares"], dtype=dtype, attached=note)
    # the repeated step runs nothing of the model
    assert len(ran) == 5 and record.steps[3].program.repeats
    assert sorted(kept) == [2, 4]
    for number, selection in kept.items():
        budget = round(MIXTURE.shares[number] * 12)
        counts = (selection.index[0] // 12).bincount().tolist()
        assert counts == [budget] * 3 and selection.per_frame == (budget,) * 3
    for number, (*velocities, y) in enumerate(found):
        share = MIXTURE.shares[number]
        for prompt, velocity in enumerate(velocities):
            before = found[number - 1][prompt] if number else None
            if share == 0:
                assert torch.equal(velocity, before)
                continue
            model_alone = dense(model, y, SIGMAS[number], prompt, dtype)
            if share == 1:
                assert torch.allclose(
                    velocity, model_alone, atol=1e-6 if dtype == torch.float32 else 0.05
                )
                continue
            mask = in_latent(kept[number].index)
            assert torch.equal(velocity[~mask], before[~mask])
            assert (velocity[mask] != before[mask]).float().mean() > 0.9
            # of what changed since, the computed tokens have most: attention saw what is remembered
            stale = (before - model_alone)[mask].float().square().mean()
            assert (velocity - model_alone)[mask].float().square().mean() < 0.5 * stale


@torch.no_grad()
def dense(model, y, sigma, prompt, dtype):
    text = [noise(1, 7, 24, seed=9), torch.zeros(1, 7, 24)][prompt].to(dtype)
    return model(y, torch.tensor([1000 * sigma]), text, return_dict=False)[0]


def in_latent(index) -> torch.Tensor:
    """Where tokens lie in a latent [1, 16, f, h, w] of SIZE."""
    mask = torch.zeros(1, 36, dtype=torch.bool).scatter_(1, index, True).view(1, 1, 3, 4, 3)
    mask = mask.repeat_interleave(2, 3).repeat_interleave(2, 4)
    return mask.expand(1, 16, *SIZE)


def test_remembered_keys_stand_for_those_of_this_step(wan):
    """A step that hardly moved: computed tokens get what they would beside all others."""
    sigmas = (0.9, 0.8, 0.7, 0.6999)
    plan = TrimPlan(shares=Shares(sigmas, (1, 1, 1, 0.3)))
    y, text, found = noise(1, 16, *SIZE), words(), []
    with attach(wan, plan) as attachment, torch.no_grad():
        for number, sigma in enumerate(sigmas):
            if number:
                y = y + (sigma - sigmas[number - 1]) * found[-1]
            found.append(wan(y, torch.tensor([1000 * sigma]), text, return_dict=False)[0])
        index = attachment.engine.now.selections[0].index
    with torch.no_grad():
        exact = wan(y, torch.tensor([699.9]), text, return_dict=False)[0]
    mask = in_latent(index)
    # the others go on as they changed, over next to no way
    torch.testing.assert_close(found[3][~mask], found[2][~mask], atol=1e-3, rtol=0.0)
    moved = (exact - found[1])[mask].square().mean()
    assert (found[3] - exact)[mask].square().mean() < 1e-4 * moved
    # eight bits show
    assert not torch.equal(found[3][mask], exact[mask])


def test_the_tokens_that_change_most_are_computed(wan):
    """The left column of tokens gathers speed, the others stand still."""
    part = memory.Part(memory.Room())
    velocity = torch.zeros(1, 16, *SIZE)
    for number, sigma in enumerate((0.9, 0.8, 0.7)):
        part.begin(sigma, velocity)
        velocity = velocity.clone()
        velocity[..., :2] += number
        change = None
        if number:
            change = memory.change_between(velocity, part.prompts["a"].velocity, GRID)
        part.saw(change, None)
        part.remember("a", velocity, sigma, velocity, None)
    worth = part.worth(GRID).view(12, 3)
    assert (worth[:, 0] == 4.0).all() and (worth[:, 1:] == 0).all()
    # what was left out longer is worth more: by the square of the steps
    kept = torch.zeros(1, 36, dtype=torch.bool)
    kept[:, ::3] = True
    part.saw(torch.ones(1, 36), kept)
    part.skipped()
    assert (part.age.view(12, 3) == torch.tensor([1.0, 2.0, 2.0])).all()
    part.change = torch.ones(1, 36)
    assert (part.worth(GRID).view(12, 3) == torch.tensor([4.0, 9.0, 9.0])).all()


def test_all_tokens_get_their_turn(wan):
    """Nobody waits much longer than a fair turn: worth grows with the steps left out."""
    sigmas = tuple(0.95 - 0.05 * i for i in range(12))
    ages = []

    def note(number, attachment):
        state = attachment.engine.now
        if state is not None and state.part.age is not None:
            ages.append(state.part.age.max())

    plan = TrimPlan(shares=Shares(sigmas, (1, 1, *[0.34] * 10)))
    _, record = run(wan, plan, sigmas=sigmas, attached=note)
    assert [step.kept_share for step in record.steps] == [1, 1, *[pytest.approx(1 / 3)] * 10]
    assert 2 <= max(ages) <= 7


# prompts and passes


@pytest.mark.parametrize("name", PLANS)
def test_split_prompts_are_a_batch(wan, name):
    batched = run(wan, PLANS[name])
    for split in (range(6), range(3, 6), (2, 4)):
        apart = run(wan, PLANS[name], split=split)
        # also where the host changes its mind in mid-run: nothing is computed anew for it
        assert same(batched, apart, exact=False)
        assert rows(batched[1]) == rows(apart[1]) and batched[1].notes == apart[1].notes
        assert [step.calls for step in apart[1].steps] == [1 + (i in split) for i in range(6)]
    assert not same(batched, run(wan, TrimPlan()), exact=False)


def test_what_is_held_does_not_depend_on_the_batching(wan):
    held = []

    def note(number, attachment):
        if number == 5:
            (part,) = attachment.engine.memory.parts.values()
            held.append(sorted(part.prompts))

    for split in ((), range(6), range(3, 6)):
        run(wan, PLANS["shares"], split=split, attached=note)
    assert held == [[(None, COND, 1), (None, UNCOND, 1)]] * 3


@torch.no_grad()
def test_every_pass_of_a_prompt_repeats_its_own(wan):
    """Skip layer guidance: the same prompt once more in a step, by a worse model."""
    plan = TrimPlan(shares=Shares((0.9, 0.5), (1, 0)))
    x, found = noise(1, 16, *SIZE), []
    with attach(wan, plan) as attachment:
        for sigma in (0.9, 0.5):
            t, said = torch.tensor([1000 * sigma]), []
            # as a sampler goes on: along the velocity
            x = x if sigma == 0.9 else x - 0.4 * found[0][0]
            for role, text in ((COND, words()), (UNCOND, 0 * words()), (COND, 2 * words())):
                attachment.cond_or_uncond = (role,)
                said.append(wan(x, t, text, return_dict=False)[0])
            found.append(said)
        record = attachment.finish()
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[0][0], found[0][2])
    assert [step.calls for step in record.steps] == [3, 3] and not record.notes


@torch.no_grad()
def test_of_several_positive_prompts_the_first_decides(wan):
    x, texts = noise(1, 16, *SIZE), 50 * noise(3, 7, 24, seed=4)
    # block 0 chooses before it has read the text
    plan = TrimPlan(TokenPlan(Schedule(0.3, "constant"), reselect_every=2))

    def chosen(roles, prompts):
        with attach(wan, plan, cond_or_uncond=roles) as attachment:
            count = len(prompts)
            wan(x.repeat(count, 1, 1, 1, 1), torch.full((count,), 700.0), prompts)
            return attachment.engine.now.selections[2].index

    alone = [chosen((COND,), texts[i : i + 1]) for i in range(3)]
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[1], alone[2])
    assert torch.equal(chosen((COND, COND, UNCOND), texts), alone[0])
    assert torch.equal(chosen((UNCOND, COND, COND), texts), alone[1])
    assert torch.equal(chosen((COND, UNCOND, UNCOND), texts), alone[0])
    # no positive one at all
    assert torch.equal(chosen((UNCOND, UNCOND), texts[:2]), alone[0])


@torch.no_grad()
def test_a_prompt_that_comes_late_is_computed_beside_those_that_repeat(wan):
    plan = TrimPlan(shares=Shares((0.9, 0.7, 0.5), (1, 1, 0.5)))
    x = noise(1, 16, *SIZE)
    with attach(wan, plan) as attachment:
        for sigma, roles in ((0.9, BOTH[:1]), (0.7, BOTH[:1]), (0.5, BOTH)):
            for role in roles:
                attachment.cond_or_uncond = (role,)
                t = torch.tensor([1000 * sigma])
                out = wan(x * sigma, t, words(), return_dict=False)[0]
        record = attachment.finish()
    assert torch.equal(out, wan(x * 0.5, torch.tensor([500.0]), words(), return_dict=False)[0])
    assert [step.kept_share for step in record.steps] == [1, 1, 0.5]
    assert "had nothing to repeat" in record.notes[0]


@torch.no_grad()
def test_prompts_of_different_areas_in_one_call_are_all_computed(wan):
    for plan in (PLANS["shares"], PLANS["tape"]):
        with attach(wan, plan, cond_or_uncond=(COND, COND)) as attachment:
            for sigma in SIGMAS:
                x = noise(2, 16, *SIZE) * sigma
                t, text = torch.full((2,), 1000 * sigma), words(2)
                out = wan(x, t, text, return_dict=False)[0]
                if not attachment.engine.now.step.program.repeats:
                    attachment.model, off = wan, attachment.engine.now.step.program
                    assert off.whole
            record = attachment.finish()
        assert MIXED in record.notes and not any("cache" in note for note in record.notes)
        repeats = [step.program.repeats for step in record.steps]
        assert [step.kept_share for step in record.steps] == [1.0 - again for again in repeats]
        assert out.shape == x.shape


# the parts of a video, and what is held of them


class Adds:
    """A block that adds a number to every token that it computes."""

    movable = True

    def __init__(self, hidden, value: float):
        self.hidden, self.value = hidden, value

    def run(self, hidden, places, attend):
        if attend is not None:
            q = torch.ones(*hidden.shape[:2], 1, 4)
            attend(q, q, q, lambda q, k, v: q)
        return hidden + self.value


def model_call(engine, sigma, value, window=None, way=0.0) -> torch.Tensor:
    """Velocity of a model that says `value` everywhere, on a way along `way`."""
    latent = noise(1, 16, *SIZE, seed=hash(window) % 99) + sigma * way
    call = engine.begin(
        latent=latent, levels=torch.tensor(sigma), cond_or_uncond=(COND,), grid=GRID,
        num_blocks=2, window=window,
    )  # fmt: skip
    if call.repeats:
        return call.repeated()
    hidden = torch.zeros(1, GRID.tokens, 4)
    for index in range(2):
        hidden = call.block(index, Adds(hidden, value))
    assert hidden.shape[1] == GRID.tokens
    return call.output(torch.full_like(latent, value))


def test_kept_tokens_stay_short_until_the_last_block():
    engine = engine_of(1, 1, 0.5)
    for sigma in (1.0, 0.9):
        model_call(engine, sigma, sigma)
    call = engine.begin(
        latent=noise(1, 16, *SIZE), levels=torch.tensor(0.8), cond_or_uncond=(COND,), grid=GRID,
        num_blocks=2,
    )  # fmt: skip
    hidden, lengths = torch.zeros(1, GRID.tokens, 4), []
    for index in range(2):
        hidden = call.block(index, Adds(hidden, 1.0))
        lengths.append(hidden.shape[1])
    assert lengths == [18, 36]
    # what was left out is as it came
    assert sorted(hidden[0, :, 0].tolist()) == [0.0] * 18 + [2.0] * 18


def test_a_choice_is_shared_with_a_prompt_that_has_tokens_in_front():
    engine = engine_of(1, 1, 0.5)
    for sigma in (1.0, 0.9, 0.8):
        found = []
        for role, grid in ((COND, GRID), (UNCOND, TokenGrid(3, 4, 3, start=2))):
            latent = noise(1, 16, *SIZE)
            call = engine.begin(
                latent=latent, levels=torch.tensor(sigma), cond_or_uncond=(role,), grid=grid,
                num_blocks=2,
            )  # fmt: skip
            hidden = torch.zeros(1, grid.start + grid.tokens, 4)
            for index in range(2):
                hidden = call.block(index, Adds(hidden, 1.0))
            call.output(latent * sigma)
            found.append(hidden[0, :, 0])
    assert found[0].sum() == 2 * 18 and torch.equal(found[1][2:], found[0])
    # those in front are always computed
    assert found[1][:2].tolist() == [2.0, 2.0]


def engine_of(*values) -> Engine:
    sigmas = tuple(1 - 0.1 * i for i in range(len(values)))
    return Engine(TrimPlan(shares=Shares(sigmas, values)), Record())


def test_windows_remember_apart_and_a_new_one_is_computed():
    engine = engine_of(1, 0, 0, 1)
    for sigma in (1.0, 0.9):
        for window in (1, 2):
            # both prompts of the second step would say 5
            said = model_call(engine, sigma, window if sigma == 1.0 else 5.0, window, way=window)
            assert (said == window).all()
    assert not engine.record.notes
    assert (model_call(engine, 0.8, 5.0, 3) == 5.0).all()
    assert (model_call(engine, 0.8, 5.0, 1, way=1.0) == 1.0).all()
    record = engine.finish(True)
    assert [step.kept_share for step in record.steps] == [1, 1, 0, 0, 1, 0]
    assert NOT_REMEMBERED in record.notes


@pytest.mark.parametrize("fits", [True, False])
def test_a_further_part_remembers_keys_and_values_only_where_there_is_room(fits):
    engine = engine_of(1, 1, 0.5)
    engine.memory.room = memory.Room(more=lambda: fits)
    for sigma in (1.0, 0.9, 0.8):
        for window in (1, 2):
            model_call(engine, sigma, sigma, window)
    assert engine.memory.holds_context is fits
    record = engine.finish(True)
    assert [step.program.partial for step in record.steps] == [False] * 4 + [fits] * 2
    assert (OUT_OF_MEMORY in record.notes) is not fits


def test_calls_of_one_step_may_round_its_sigma_apart():
    engine = engine_of(1, 1, 1)
    for sigma in (0.9, 0.900005, 0.899995, 0.89998):
        model_call(engine, sigma, 1.0)
    assert [step.calls for step in engine.finish(True).steps] == [3, 1]


def test_steps_that_never_came_are_not_said_to_have_left_nothing_out():
    engine = engine_of(1, 1, 0)
    for sigma in (1.0, 0.9):
        model_call(engine, sigma, 1.0)
    assert engine.finish(True).notes == [
        "1 of 3 steps that the sampler announced never came to the model: another node's cache, or "
        "a sampler that goes its own way"
    ]


def test_parts_that_are_sampled_no_more_are_forgotten():
    engine = engine_of(1, 1, 1, 0)
    for number, sigma in enumerate((1.0, 0.9, 0.8, 0.7)):
        for window in (0, number):
            model_call(engine, sigma, number, window)
    # a prompt's name stands beside its window
    assert sorted(window for window, _ in engine.memory.parts) == [0, 2, 3]
    engine.finish(True)
    assert not engine.memory.parts


def test_a_window_of_another_size_begins_anew():
    engine = engine_of(1, 0, 0)
    model_call(engine, 1.0, 1.0)
    small = torch.zeros(1, 16, 2, 8, 6)
    call = engine.begin(
        latent=small, levels=torch.tensor(0.9), cond_or_uncond=(COND,), grid=TokenGrid(2, 4, 3),
        num_blocks=2,
    )  # fmt: skip
    assert not call.repeats and engine.now.step.program.whole and engine.now.part.seen == 0
    # what is no velocity of this latent is handed on, and nothing is learned of it
    for other in (small[:, :, :1], torch.cat([small, small], 2)):
        assert call.output(other) is other and not engine.now.part.prompts
        assert engine.record.notes[-1:] == [
            "the model gave a video of another size than it was given: nothing is repeated"
        ]
    assert torch.equal(call.output(small + 3), small + 3) and engine.now.part.prompts


def test_steps_that_another_cache_answers_did_no_work():
    engine = Engine(PLANS["tape"], Record())
    for sigma in SIGMAS:
        engine.begin(
            latent=torch.full((1, 16, *SIZE), sigma), levels=torch.tensor(sigma),
            cond_or_uncond=(COND,), grid=GRID, num_blocks=2,
        )  # fmt: skip
    record = engine.finish(True)
    assert all(step.answered and step.kept_share == 0 for step in record.steps)
    assert record.notes == ["the model's blocks did not run in some steps: another node's cache"]


def test_where_noise_is_added_the_video_is_repeated_not_the_velocity():
    """By hand: the step before said velocity 2 at sigma 1, so the clean video is noise - 2."""
    engine, first, fresh = engine_of(1, 1, 0), noise(1, 16, *SIZE), noise(1, 16, *SIZE, seed=4)

    def call(latent, sigma):
        return engine.begin(
            latent=latent, levels=torch.tensor(sigma), cond_or_uncond=(COND,), grid=GRID,
            num_blocks=2,
        )  # fmt: skip

    call(first, 1.0).output(2 * torch.ones_like(first))
    # ancestral: the clean video with other noise
    clean = first - 2.0
    second = clean + 0.9 * fresh
    call(second, 0.9).output(fresh)
    assert engine.now.part.noisy
    third = clean + 0.8 * first
    repeated = call(third, 0.8).repeated()
    torch.testing.assert_close(third - 0.8 * repeated, clean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("split", [(), range(6)])
def test_guidance_and_euler_are_no_noise(wan, split):
    seen = []

    def note(number, attachment):
        if attachment.engine.now is not None:
            seen.append(attachment.engine.now.part.noisy)

    run(wan, PLANS["shares"], split=split, attached=note)
    assert seen == [False] * 5


def test_nothing_is_held_after_a_run_however_it_ends(wan, monkeypatch):
    alive = []
    born = Prompt.__init__

    def noted(self, *args, **fields):
        born(self, *args, **fields)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(Prompt, "__init__", noted)
    run(wan, PLANS["shares"])
    handle = None

    def fails(number, attachment):
        nonlocal handle
        assert any(ref() is not None for ref in alive) or number == 0
        if number == 4:
            handle = wan.blocks[-1].register_forward_hook(lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        run(wan, PLANS["shares"], attached=fails)
    handle.remove()
    gc.collect()
    assert len(alive) >= 4 and all(ref() is None for ref in alive)
    assert same(run(wan, TrimPlan()), run(wan, TrimPlan()))


def test_keys_and_values_are_held_no_longer_than_a_later_step_reads_them(wan):
    held = []

    def note(number, attachment):
        if number:
            (part,) = attachment.engine.memory.parts.values()
            held.append({len(prompt.blocks) for prompt in part.prompts.values()})
            assert attachment.engine.memory.holds_context is (held[-1] != {0})

    sigmas = tuple(0.95 - 0.1 * i for i in range(8))
    plan = TrimPlan(shares=Shares(sigmas, (1, 1, 0.5, 0, 0.2, 1, 0, 1)))
    run(wan, plan, sigmas=sigmas, attached=note)
    # the fifth step reads them last
    assert held == [{0}, {BLOCKS}, {BLOCKS}, {BLOCKS}, {BLOCKS}, {0}, {0}]


@pytest.mark.parametrize("at", [0, 3, 21, 23])
def test_out_of_memory_a_run_goes_on_without_context(wan, monkeypatch, at):
    """Each of two prompts packs keys and values of five blocks in a step: 20 a step."""
    packs, count = reference.pack_rows, iter(range(10_000))

    def full(x, bits):
        if next(count) >= at:
            raise torch.OutOfMemoryError("planted")
        return packs(x, bits)

    monkeypatch.setattr(reference, "pack_rows", full)
    found, record = run(wan, TrimPlan(shares=Shares(SIGMAS, (1, 1, 0.4, 0.3, 0, 0.4))))
    assert OUT_OF_MEMORY in record.notes
    assert all(out.isfinite().all() for step in found for out in step)
    done = [step.kept_share for step in record.steps]
    # the step in which it happened is done with what there is
    assert done == [1, 1, 5 / 12 if at > 20 else 1, 1, 0, 1]


def plant(monkeypatch, wan, where: str, at: int, times: int = 1) -> None:
    """Memory runs out in the fourth block's calls from `at` on, so many times."""
    count = iter(range(10_000))

    def short():
        if at <= next(count) < at + times:
            raise torch.OutOfMemoryError("planted")

    if where == "join":
        join = memory.Part.join

        def joined(self, keys, block, *args):
            if block == 3:
                short()
            return join(self, keys, block, *args)

        monkeypatch.setattr(memory.Part, "join", joined)
        return
    ffn = wan.blocks[3].ffn
    forward = ffn.forward

    def planted(hidden):
        short()
        return forward(hidden)

    monkeypatch.setattr(ffn, "forward", planted)


def shared(*values) -> TrimPlan:
    return TrimPlan(shares=Shares(SIGMAS, values))


@pytest.mark.parametrize(
    ("where", "at", "done"),
    [
        ("ffn", 1, (1, 1, 1, 1, 0, 1)),
        ("ffn", 2, (1, 1, 1, 1, 0, 1)),
        ("ffn", 3, (1, 1, 0.4, 1, 0, 1)),
        ("join", 0, (1, 1, 1, 1, 0, 1)),
        ("join", 1, (1, 1, 0.4, 1, 0, 1)),
    ],
)
def test_what_has_no_memory_beside_the_context_runs_again_without_it(
    wan, monkeypatch, where, at, done
):
    right, _ = run(wan, shared(*done))
    plant(monkeypatch, wan, where, at)
    found, record = run(wan, shared(1, 1, 0.4, 0.3, 0, 0.4))
    assert OUT_OF_MEMORY in record.notes
    assert not any("as planned" in note or "nothing to repeat" in note for note in record.notes)
    assert [step.program.share for step in record.steps] == list(done)
    # as if it had been planned so
    assert same((found,), (right,))


def test_of_a_step_that_was_begun_the_prompts_that_ran_stay(wan, monkeypatch):
    partly = shared(1, 1, 0.4, 0.3, 0, 0.4)
    whole, part = (run(wan, plan, split=(2,))[0] for plan in (shared(1, 1, 1, 1, 0, 1), partly))
    plant(monkeypatch, wan, "ffn", 3)
    found, record = run(wan, partly, split=(2,))
    assert torch.equal(found[2][0], part[2][0]) and torch.equal(found[2][1], whole[2][1])
    assert [step.kept_share for step in record.steps] == [1, 1, 5 / 12, 1, 0, 1]
    assert record.notes == [OUT_OF_MEMORY, NO_CONTEXT]


@pytest.mark.parametrize(
    ("values", "times"), [((1, 1, 0.4, 0.4, 0, 1), 2), ((1, 1, 1, 0, 0, 1), 1)]
)
def test_what_has_no_memory_without_the_context_either_fails(wan, monkeypatch, values, times):
    plant(monkeypatch, wan, "ffn", 2, times)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        run(wan, shared(*values))


# skipped blocks


@pytest.mark.parametrize("blocks", [(3,), (1, 2), (2, 3)])
def test_skipping_a_block_is_deleting_it_from_the_model(wan, blocks):
    smaller = copy.deepcopy(wan)
    kept = [block for index, block in enumerate(smaller.blocks) if index not in blocks]
    smaller.blocks = torch.nn.ModuleList(kept)
    skipped, record = run(wan, TrimPlan(blocks=BlockPlan(FixedRouter(blocks))), split=(1,))
    assert same((skipped,), run(smaller, TrimPlan(), split=(1,)))
    assert all(
        [i for i, row in enumerate(step.rows) if row.run == SKIP] == list(blocks)
        for step in record.steps
    )


@pytest.mark.parametrize("watched", [False, True])
def test_between_tapes_blocks_a_skipped_one_adds_nothing(watched):
    """On the short path a block sees what the one before gave it; on the other, all tokens."""
    model, seen, ran = random_wan(BLOCKS), {}, []
    plan = TrimPlan(TAPE, blocks=BlockPlan(FixedRouter((1, 3))))
    for index, block in enumerate(model.blocks):
        block.ffn.register_forward_pre_hook(lambda m, a, i=index: ran.append((i, a[0].shape[1])))
        if watched:
            block.register_forward_hook(lambda m, a, out, i=index: seen.update({i: (a[0], out)}))
    _, record = run(model, plan, sigmas=SIGMAS[:1])
    # 0 chooses; 1 and 3 are off; 3 was to choose, the last need not
    kept = record.steps[0].rows[2].tokens
    assert ran == [(0, 36), (2, kept), (4, 36)] and 0 < kept < 36
    assert record.steps[0].tokens_per_block == [36, 0, kept, 0, 36]
    # the block that chose computed all tokens
    assert record.steps[0].coverage.sum().item() == pytest.approx((72 + kept) / BLOCKS)
    for index, (before, after) in seen.items():
        assert before.shape == after.shape == (2, 36, 48)
        assert torch.equal(before, after) == (index in (1, 3))


# the short path and the long one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLANS)
def test_kept_tokens_that_stay_short_are_the_same(name, dtype):
    model = random_wan(BLOCKS).to(dtype)
    widths = []
    for block in model.blocks:
        block.attn1.register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[1]))
    short = run(model, PLANS[name], dtype=dtype)
    ran, lengths = widths[:], set()
    widths.clear()
    # whoever watches one block gets all tokens of every block
    for index in (0, 3):
        model.blocks[index].register_forward_hook(lambda m, a, out: lengths.add(out.shape[1]))
    long = run(model, PLANS[name], dtype=dtype)
    assert same(short, long) and rows(short[1]) == rows(long[1])
    assert widths == ran and lengths == {36}
    assert (min(ran) < 36) == (name != "blocks")


def test_on_the_tiny_wan_too(tiny):
    latent = noise(1, 16, 5, 12, 12)
    plan = TrimPlan(shares=Shares(SIGMAS, (1, 1, 0.3, 0, 0.5, 0.2)))
    chosen = []

    def note(number, attachment):
        if number and attachment.engine.now.selections:
            chosen.append(attachment.engine.now.selections[0].index.tolist())

    short = run(tiny, plan, latent=latent, attached=note)
    handle = tiny.blocks[7].register_forward_hook(lambda *_: None)
    long = run(tiny, plan, latent=latent, attached=note)
    handle.remove()
    assert same(short, long)
    apart = run(tiny, plan, split=range(6), latent=latent, attached=note)
    assert chosen[:2] == chosen[2:4] == chosen[4:] and len(chosen) == 6
    # a key that rounding moves to the next of its 256 codes
    off = torch.cat([a - b for a, b in zip(short[0][-1], apart[0][-1], strict=True)])
    assert off.abs().max() < 0.01 * short[0][-1][0].abs().max()
    kept = [[row.tokens for row in step.rows if row.run == KEPT] for step in long[1].steps]
    assert kept == [[], [], [55] * 16, [], [90] * 16, [35] * 16]
    assert long[1].steps[2].coverage.sum() == 55 and not long[1].notes


def test_a_step_under_way_trains():
    """Gradients reach every block that ran, and are those of the long path."""
    model = random_wan(BLOCKS).requires_grad_(True)
    plan = TrimPlan(TAPE, HEADS, BlockPlan(FixedRouter((2,))))
    grads = []
    for watched in (False, True):
        if watched:
            model.blocks[1].register_forward_hook(lambda *_: None)
        model.zero_grad()
        with attach(model, plan):
            out = model(noise(2, 16, *SIZE), torch.full((2,), 700.0), words(2))[0]
        out.square().mean().backward()
        grads.append([block.ffn.net[2].weight.grad for block in model.blocks])
        assert [grad is None or bool((grad == 0).all()) for grad in grads[-1]] == [
            index == 2 for index in range(BLOCKS)
        ]
    for one, other in zip(*grads, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("alpha", "kept"), [(1.0, [0, 14, 24]), (0.6, [0, 14, 26]), (0.3, [0, 12, 26])]
)
def test_the_choice_is_by_tapes_smoothed_scores(wan, monkeypatch, alpha, kept):
    """One token of each latent frame stays: by hand, from the attention that they receive."""
    scores = torch.zeros(1, 3, 12)
    scores[0, 0, 0] = 2.0
    # 0.6 * 3 > 0.4 * 2, but 0.3 * 3 < 0.7 * 2
    scores[0, 1, 2] = 3.0
    # 0.6 * 1 < 0.4 * 3
    scores[0, 2, 0] = 1.0
    monkeypatch.setattr(
        "wantrim.engine.call.attention_received", lambda *_, **__: scores.flatten(1)
    )
    plan = TrimPlan(TokenPlan(Schedule(0.1, "constant"), alpha=alpha, reselect_every=BLOCKS))
    with attach(wan, plan) as attachment, torch.no_grad():
        wan(noise(1, 16, *SIZE), torch.tensor([700.0]), words())
        assert attachment.engine.now.selections[0].index.tolist() == [kept]


@torch.no_grad()
def test_what_somebody_else_saw_of_a_block_stays_as_it_was(wan, monkeypatch):
    """Kept tokens are put back in place only where nobody else has the sequence."""
    seen, in_place = [], []

    def put_back(*args, **options):
        in_place.append(options.get("in_place", False))
        return scatter_tokens(*args, **options)

    def look(module, given, out):
        seen.append((out, out.clone()))

    monkeypatch.setattr("wantrim.engine.call._scatter", put_back)
    alone = run(wan, TrimPlan(TAPE))
    assert in_place and all(in_place)
    in_place.clear()
    hooks = [block.register_forward_hook(look) for block in wan.blocks]
    beside = run(wan, TrimPlan(TAPE))
    for hook in hooks:
        hook.remove()
    assert in_place and not any(in_place)
    assert seen and all(torch.equal(out, then) for out, then in seen)
    assert same(alone, beside, exact=False)


def test_gradients_go_through_tokens_that_are_put_back(wan):
    x = noise(1, wan.config.in_channels, *SIZE).requires_grad_()
    with attach(wan, TrimPlan(TAPE), shift=3.0):
        out = wan(x, torch.tensor([900.0]), words(), return_dict=False)[0]
    out.square().sum().backward()
    assert x.grad.abs().sum() > 0
