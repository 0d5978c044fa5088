"""Skipped blocks on diffusers' WanTransformer3DModel."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch

from wantrim.engine.engine import COND, UNCOND, Engine
from wantrim.engine.plan import TrimPlan
from wantrim.engine.record import Record
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import sample, sigmas_for
from wantrim.hosts.diffusers.weights import new_transformer
from wantrim.hosts.past import Past
from wantrim.hosts.report_picture import KEPT, _heat
from wantrim.hosts.skipping import Skips
from wantrim.methods.depth import BlockBudget, BlockPlan, blocks_per_step, choose_blocks
from wantrim.methods.fingerprint import Fingerprint
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import OFF, HeadPlan
from wantrim.methods.presets import preset_plan
from wantrim.methods.profile import BINS, Profile
from wantrim.methods.routers import (
    Content,
    FixedRouter,
    OnlineRouter,
    ProfiledRouter,
    RandomRouter,
    RouterMLP,
    TrainedRouter,
)
from wantrim.methods.schedule import progress_at

BLOCKS, HEADS = 8, 4
SIZE, GRID = (3, 8, 6), TokenGrid(3, 4, 3)
BOTH = (COND, UNCOND)
SHIFT, STEPS = 3.0, 5
MODEL = Fingerprint(48, 64, BLOCKS, HEADS, 16, 16)
HALF = BlockBudget(0.5, 0.75)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    wan = new_transformer(
        dim=48, num_heads=HEADS, num_layers=BLOCKS, ffn_dim=64, in_dim=16, out_dim=16, text_dim=24
    )
    # the stock gates are so small that a missing block would hardly show
    for block in wan.blocks:
        torch.nn.init.normal_(block.scale_shift_table, std=0.5)
    return wan.eval()


def profile() -> Profile:
    """Every sigma bin has another order of the blocks."""
    made = Profile.empty(MODEL)
    made.tensors["count"] += 1
    made.tensors["hidden"] += 1
    sizes = torch.rand(BINS, BLOCKS, generator=torch.Generator().manual_seed(4))
    made.tensors["residual"] += 0.1 + sizes
    return made


def trained() -> TrainedRouter:
    torch.manual_seed(1)
    return TrainedRouter(RouterMLP(BLOCKS, 64, 32, 16).requires_grad_(False), "latent", MODEL)


ROUTERS = {
    "fixed": FixedRouter((2, 3, 5)),
    "random": RandomRouter(),
    "profiled": ProfiledRouter(profile()),
    "online": OnlineRouter(profile()),
    "trained": trained(),
}
each_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
either = pytest.mark.parametrize("skipped", ["identity", "reuse"])


def words(batch=1) -> torch.Tensor:
    return torch.randn(batch, 7, 24, generator=torch.Generator().manual_seed(9))


def put_on(model, trim, cond_or_uncond=BOTH, steps=STEPS):
    sigmas = sigmas_for(steps, SHIFT)[:-1]
    return attach(model, trim, cond_or_uncond=cond_or_uncond, shift=SHIFT, sigmas=sigmas)


def run(model, plan=None, batch=1, steps=STEPS, **parts):
    options = {"steps": steps, "guidance": 4.0, "shift": SHIFT}
    if plan is None:
        return sample(model, words(batch), SIZE, **options), None
    with put_on(model, TrimPlan(blocks=plan, **parts), steps=steps) as attachment:
        return sample(model, words(batch), SIZE, **options), attachment.finish()


class Watch:
    """Full-length hidden states around every block, and which blocks really run, by model call."""

    def __init__(self, model):
        self.calls: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = []
        self.ran: list[set[int]] = []
        self._handles = [model.register_forward_pre_hook(lambda *_: self._begin())]
        for index, block in enumerate(model.blocks):
            self._handles += [
                block.register_forward_hook(lambda m, args, out, i=index: self._saw(i, args, out)),
                block.ffn.register_forward_pre_hook(lambda *_, i=index: self.ran[-1].add(i)),
            ]

    def _begin(self):
        self.calls.append({})
        self.ran.append(set())

    def _saw(self, index, args, out):
        self.calls[-1][index] = args[0].clone(), out.clone()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("batch", [1, 2])
@either
@each_router
def test_a_budget_of_all_blocks_is_exact(model, router, skipped, batch):
    dense, _ = run(model, batch=batch)
    everything = BlockPlan(router, BlockBudget(1.0, 1.0), skipped)
    assert torch.equal(run(model, everything, batch)[0], dense)
    # not neutral in general, but no step lies between start and end
    outside = BlockPlan(router, HALF, skipped, start=0.999)
    assert not outside.neutral
    assert torch.equal(run(model, outside, batch)[0], dense)


@either
@each_router
def test_the_blocks_that_run_are_those_of_the_schedule(model, router, skipped):
    plan = BlockPlan(router, HALF, skipped)
    with Watch(model) as watch:
        trimmed, report = run(model, plan)
    ran = [sorted(blocks) for blocks in watch.ran]
    wanted = blocks_per_step(plan, sigmas_for(STEPS, SHIFT)[:-1].tolist(), SHIFT, BLOCKS)
    assert [len(blocks) for blocks in ran] == wanted == [s.blocks_run for s in report.steps]
    assert min(wanted) < BLOCKS
    assert all({0, BLOCKS - 1} <= set(blocks) for blocks in ran)
    for step, blocks in zip(report.steps, ran, strict=True):
        assert [i for i, kept in enumerate(step.kept_per_block) if kept] == blocks
    assert torch.isfinite(trimmed).all() and not torch.allclose(trimmed, run(model)[0], atol=1e-3)


@either
@each_router
def test_the_same_run_gives_the_same_blocks_and_bytes(model, router, skipped):
    plan = BlockPlan(router, HALF, skipped)
    one, first = run(model, plan)
    other, second = run(model, plan)
    assert torch.equal(one, other)
    assert [s.kept_per_block for s in first.steps] == [s.kept_per_block for s in second.steps]


@either
@each_router
@torch.no_grad()
def test_split_prompts_run_the_blocks_of_a_batch(model, router, skipped):
    x = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(3))
    text, outs = words(), []
    none = torch.zeros_like(text)
    sigmas, ran = sigmas_for(STEPS, SHIFT), []
    for split in (False, True):
        y, watch = x, Watch(model)
        plan = TrimPlan(blocks=BlockPlan(router, HALF, skipped))
        with put_on(model, plan, (COND,) if split else BOTH) as attachment, watch:
            for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
                t = 1000 * sigma.view(1)
                if split:
                    attachment.cond_or_uncond = (COND,)
                    cond = model(y, t, text, return_dict=False)[0]
                    attachment.cond_or_uncond = (UNCOND,)
                    uncond = model(y, t, none, return_dict=False)[0]
                else:
                    both = model(
                        torch.cat([y, y]), t.expand(2), torch.cat([text, none]), return_dict=False
                    )
                    cond, uncond = both[0].chunk(2)
                y = y + (after - sigma) * (uncond + 4.0 * (cond - uncond))
        outs.append(y)
        ran.append(watch.ran)
    batched, apart = ran
    assert apart == [blocks for blocks in batched for _ in range(2)]
    torch.testing.assert_close(*outs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("blocks", [(3,), (1, 2, 6), (2, 3, 4, 5)])
def test_skipping_a_block_is_deleting_it_from_the_model(model, blocks):
    smaller = copy.deepcopy(model)
    kept = [block for index, block in enumerate(smaller.blocks) if index not in blocks]
    smaller.blocks = torch.nn.ModuleList(kept)
    plan = BlockPlan(FixedRouter(blocks))
    for batch in (1, 2):
        assert torch.equal(run(model, plan, batch)[0], run(smaller, batch=batch)[0])


def _pieces(blocks: set[int]) -> list[list[int]]:
    pieces: list[list[int]] = []
    for index in sorted(blocks):
        if pieces and pieces[-1][-1] == index - 1:
            pieces[-1].append(index)
        else:
            pieces.append([index])
    return pieces


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("max_age", [0, 1, 2])
@pytest.mark.parametrize("router", ["fixed", "profiled", "random"])
def test_reuse_gives_what_the_stretch_gave_when_it_last_ran(model, router, max_age, batch):
    plan = BlockPlan(ROUTERS[router], HALF, "reuse", max_age=max_age, memory=99)
    with Watch(model) as watch:
        _, report = run(model, plan, batch)
    assert len(watch.calls) == STEPS and len(watch.ran[0]) == BLOCKS
    checked = 0
    for number, seen in enumerate(watch.calls):
        for gap in _pieces(set(range(BLOCKS)) - watch.ran[number]):
            added = seen[gap[-1]][1] - seen[gap[0]][0]
            # a gap may be several remembered stretches side by side
            by_hand, fresh = torch.zeros_like(added), True
            for index in gap:
                last = max(n for n in range(number) if index in watch.ran[n])
                before, after = watch.calls[last][index]
                by_hand += after - before
                fresh &= last == number - 1
            # of a stretch that came apart nothing is left to give
            if fresh or not report.notes:
                torch.testing.assert_close(added, by_hand, atol=1e-4, rtol=1e-4)
                checked += by_hand.abs().max() > 0.1
    assert checked >= 4
    if max_age == 1 or router == "fixed":
        assert not report.notes


@torch.no_grad()
def test_ages_bring_a_block_back_within_the_budget():
    """By hand: of 6 inner blocks the budget runs half, so every block runs every second step."""
    plan = BlockPlan(ProfiledRouter(profile()), BlockBudget(0.625, 0.625), "reuse", max_age=1)
    sets = _skipped(plan, steps=8)
    assert sets[0] == set() and all(len(skipped) == 3 for skipped in sets[1:])
    assert all(not one & other for one, other in zip(sets[1:], sets[2:], strict=False))
    # without ages the order of a sigma bin decides alone
    free = _skipped(BlockPlan(plan.router, plan.budget, "reuse", max_age=0), steps=8)
    for sigma, skipped in list(zip(sigmas_for(8, SHIFT)[:-1].tolist(), free, strict=True))[1:]:
        runs = choose_blocks(plan.router.run(BLOCKS).logits(sigma, None), 5)
        assert skipped == set(range(BLOCKS)) - set(runs)


def test_blocks_that_wait_longest_run_first_where_the_budget_is_too_small_for_all():
    plan = BlockPlan(RandomRouter(), BlockBudget(0.5, 0.5), "reuse", max_age=1)
    sets = _skipped(plan, steps=12)
    waits = [0] * BLOCKS
    for skipped in sets:
        assert len(skipped) in (0, 4)
        waits = [wait + 1 if i in skipped else 0 for i, wait in enumerate(waits)]
        # 4 of 6 inner blocks wait, 2 run: every third step
        assert max(waits) <= 2


def _skipped(plan: BlockPlan, steps: int) -> list[set[int]]:
    skips, sigmas = Skips(plan), sigmas_for(steps, SHIFT)[:-1].tolist()
    sets = []
    for sigma, after in zip(sigmas, [*sigmas[1:], None], strict=True):
        upcoming = None if after is None else (after, progress_at(after, SHIFT))
        content = Content(torch.zeros(1, 16, *SIZE))
        step = skips.step(sigma, progress_at(sigma, SHIFT), content, BLOCKS, upcoming)
        assert skips.step(sigma, 0.0, content, BLOCKS, None) is step
        sets.append(set(step.skipped))
    return sets


@pytest.mark.parametrize("memory", [1, 2, 4])
def test_reuse_holds_no_more_than_its_memory_and_says_what_it_could_not_repeat(
    model, memory, monkeypatch
):
    held = []
    remember = Past.remember

    def counted(self, key, value):
        remember(self, key, value)
        held.append(len(self._kept))

    monkeypatch.setattr(Past, "remember", counted)
    # singles, so that a stretch is a block
    plan = BlockPlan(FixedRouter((1, 3, 5, 6)), skipped="reuse", memory=memory)
    _, report = run(model, plan)
    assert max(held) == min(memory, 3)
    assert any("'memory'" in note for note in report.notes) == (memory < 3)
    held.clear()
    run(model, BlockPlan(ROUTERS["random"], HALF, "reuse", memory=memory))
    assert 0 < max(held) <= memory


def test_the_longest_stretch_is_remembered_first(model):
    plan = BlockPlan(FixedRouter((1, 3, 4, 6)), skipped="reuse", memory=1)
    with Watch(model) as watch:
        run(model, plan, steps=2)
    assert watch.ran[1] == {0, 2, 5, 7}
    first, second = watch.calls
    known = first[4][1] - first[3][0]
    torch.testing.assert_close(second[4][1] - second[3][0], known, atol=1e-5, rtol=1e-5)
    for block in (1, 6):
        assert torch.equal(*second[block])


def test_nothing_is_held_after_the_run(model, monkeypatch):
    alive = []
    remember = Past.remember

    def noted(self, key, value):
        alive.append(weakref.ref(value))
        remember(self, key, value)

    monkeypatch.setattr(Past, "remember", noted)
    with put_on(model, TrimPlan(blocks=BlockPlan(ROUTERS["online"], HALF, "reuse"))) as attachment:
        sample(model, words(), SIZE, steps=STEPS, guidance=4.0, shift=SHIFT)
        session = attachment.session
        assert any(ref() is not None for ref in alive)
        attachment.finish()
        gc.collect()
        assert session.pasts == {} and all(ref() is None for ref in alive)
    assert alive


def test_a_run_that_fails_leaves_nothing_behind(model):
    wan = copy.deepcopy(model)
    dense, _ = run(wan)
    for skipped in ("identity", "reuse"):
        plan = BlockPlan(RandomRouter(), HALF, skipped)
        expected, _ = run(wan, plan)
        handle = wan.blocks[BLOCKS - 1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(wan, plan)
        handle.remove()
        assert torch.equal(run(wan)[0], dense)
        assert torch.equal(run(wan, plan)[0], expected)


@pytest.mark.parametrize("preset", ["paper", "refresh"])
def test_a_skipped_block_adds_nothing_where_tokens_are_dropped(model, preset):
    tokens = preset_plan(preset, 0.6)
    with Watch(model) as watch:
        _, report = run(model, BlockPlan(FixedRouter((2, 3, 5))), tokens=tokens)
    assert watch.ran == [{0, 1, 4, 6, 7}] * STEPS
    for seen in watch.calls:
        for block, (before, after) in seen.items():
            assert torch.equal(before, after) == (block in (2, 3, 5))
    for step in report.steps:
        assert [i for i, kept in enumerate(step.kept_per_block) if not kept] == [2, 3, 5]
    assert any(0 < step.kept_per_block[1] < GRID.tokens for step in report.steps)
    assert report.kept_share < (BLOCKS - 3) / BLOCKS


@pytest.mark.parametrize("preset", ["paper", "refresh"])
@each_router
def test_blocks_and_tokens_and_heads_together(model, router, preset):
    tokens = preset_plan(preset, 0.6)
    heads = HeadPlan(
        (("frame", "full", OFF, "tile2"),) * BLOCKS, (("full", OFF, "full", "full"),) * BLOCKS
    )
    plan = BlockPlan(router, HALF, "reuse")
    together, report = run(model, plan, batch=2, tokens=tokens, heads=heads)
    assert torch.isfinite(together).all()
    assert torch.equal(run(model, plan, 2, tokens=tokens, heads=heads)[0], together)
    alone, only_blocks = run(model, plan, 2)
    assert not torch.allclose(together, alone, atol=1e-3)
    assert report.kept_share < only_blocks.kept_share < 1.0
    # neutral partners change nothing at all
    full = HeadPlan.full(BLOCKS, HEADS)
    assert torch.equal(run(model, plan, 2, tokens=preset_plan(preset, 1.0), heads=full)[0], alone)


def test_a_choosing_block_that_is_skipped_leaves_the_choice_to_the_next(model):
    tokens = preset_plan("paper", 0.5, reselect_every=3, importance="hidden_norm")
    _, report = run(model, BlockPlan(FixedRouter((3,))), tokens=tokens, steps=1)
    kept = report.steps[0].kept_per_block
    assert kept[0] == 36 and kept[1] == kept[2] < 36
    assert kept[3] == 0 and kept[4] == 36 and kept[5] < 36 and kept[6] == 36


def test_online_sees_what_the_conditional_rows_of_this_run_added(model):
    """The router is told |update| / |input| of the conditional row, once per block and step."""
    router, told = OnlineRouter(profile()), []

    class Told:
        watches = True

        def __init__(self, inner):
            self.inner = inner

        def logits(self, sigma, content):
            return self.inner.logits(sigma, content)

        def observe(self, sigma, index, size):
            told.append((round(sigma, 4), index, float(size)))
            self.inner.observe(sigma, index, size)

        def unread(self):
            return self.inner.unread()

        def read(self, values):
            self.inner.read(values)

    class Spy(OnlineRouter):
        def run(self, num_blocks):
            return Told(super().run(num_blocks))

    plain, _ = run(model, BlockPlan(router, HALF))
    with Watch(model) as watch:
        same, _ = run(model, BlockPlan(Spy(profile()), HALF))
    assert torch.equal(same, plain)
    by_hand = []
    for number, sigma in enumerate(sigmas_for(STEPS, SHIFT)[:-1].tolist()):
        for index in sorted(watch.ran[number]):
            before, after = watch.calls[number][index]
            # the conditional prompt comes first in this sampler's batch
            size = (after - before)[0].norm() / before[0].norm()
            by_hand.append((round(sigma, 4), index, float(size)))
    assert [t[:2] for t in told] == [b[:2] for b in by_hand]
    assert [t[2] for t in told] == pytest.approx([b[2] for b in by_hand], rel=1e-4)
    # and it is another choice than the profile's alone
    flat = profile()
    flat.tensors["residual"][:] = 1
    online, profiled = (
        run(model, BlockPlan(kind(flat), HALF))[1].steps for kind in (OnlineRouter, ProfiledRouter)
    )
    assert online[0].kept_per_block == profiled[0].kept_per_block
    assert online[-1].kept_per_block != profiled[-1].kept_per_block


@torch.no_grad()
def test_online_is_told_of_the_first_prompt_only_where_prompts_come_apart():
    told = []

    class Spy(OnlineRouter):
        def run(self, num_blocks):
            inner = super().run(num_blocks)
            inner.observe = lambda sigma, index, size: told.append((index, float(size)))
            return inner

    session = Session(TrimPlan(blocks=BlockPlan(Spy(profile()), HALF)), Report())
    for role, value in ((COND, 2.0), (UNCOND, 5.0)):
        call = session.begin(
            latent=torch.ones(1, 16, *SIZE), sigma=0.9, progress=0.1, cond_or_uncond=(role,),
            grid=GRID, num_blocks=BLOCKS,
        )  # fmt: skip
        for index in range(BLOCKS):
            call.block(index, Call(torch.ones(1, GRID.tokens, 4), value))
    assert len(told) == session.finish(True).steps[0].blocks_run
    assert {size for _, size in told} == {2.0}


def test_a_router_of_another_model_is_refused_before_the_first_block(model):
    other = TrainedRouter(RouterMLP(5, 0, 16, 16), "none", MODEL)
    with pytest.raises(ValueError, match="expected one for 8 blocks, got 5"):
        run(model, BlockPlan(other))
    with pytest.raises(ValueError, match="from 0 to 7, got"):
        run(model, BlockPlan(FixedRouter((40,))))


def test_reuse_without_knowing_the_next_step_says_so(model):
    plan = TrimPlan(blocks=BlockPlan(FixedRouter((2, 3)), skipped="reuse"))
    with attach(model, plan, cond_or_uncond=BOTH, shift=SHIFT) as attachment:
        sample(model, words(), SIZE, steps=3, guidance=4.0, shift=SHIFT)
        report = attachment.finish()
    assert any("no update to repeat" in note for note in report.notes)


class Call:
    """A block that adds a number, and the number of times that it ran."""

    ran = 0

    def __init__(self, hidden: torch.Tensor, value: float):
        self.hidden, self.value = hidden, value

    def run(self):
        Call.ran += 1
        return self.hidden + self.value


@torch.no_grad()
def test_windows_of_one_step_share_its_blocks_and_remember_apart():
    plan = TrimPlan(blocks=BlockPlan(FixedRouter((1, 2)), skipped="reuse"))
    session = Session(plan, Report())

    def step(sigma, window, value, after):
        call = session.begin(
            latent=torch.full((1, 16, *SIZE), sigma + value), sigma=sigma, progress=1 - sigma,
            cond_or_uncond=(COND,), grid=GRID, num_blocks=4, window=window,
            upcoming=(after, 1 - after),
        )  # fmt: skip
        hidden = torch.zeros(1, GRID.tokens, 4)
        for index in range(4):
            hidden = call.block(index, Call(hidden, value))
        return float(hidden.mean())

    assert (step(0.9, "left", 1.0, 0.8), step(0.9, "right", 10.0, 0.8)) == (4.0, 40.0)
    # two blocks run, and the other two repeat what they gave to this window
    assert (step(0.8, "left", 3.0, 0.7), step(0.8, "right", 30.0, 0.7)) == (8.0, 80.0)
    assert step(0.7, "left", 5.0, 0.6) == 12.0
    assert not session.report.notes
    # a window that was not there has nothing to repeat, and the report says so
    assert step(0.7, "middle", 5.0, 0.6) == 10.0
    assert any("context windows" in note for note in session.finish(True).notes)


def test_the_report_says_and_draws_which_blocks_ran(model):
    _, report = run(model, BlockPlan(FixedRouter((2, 5)), HALF))
    text = report.text()
    assert "Blocks run: 6.0 of 8 (per step: 6 6 6 6 6)." in text
    assert "always the same blocks skipped" in text
    assert report.kept_share == pytest.approx(6 / 8)
    # rows of the heat map, below its title: block by step, bright where it ran
    heat = np.asarray(_heat(report))[24:, 16:-16]
    height = max(min(8 * BLOCKS, 320), 64)
    for block in range(BLOCKS):
        row = heat[int((block + 0.5) * height / BLOCKS)]
        ran = (row == np.array(KEPT)).all(-1)
        assert ran.all() if block not in (2, 5) else not ran.any()
    coverage = report.coverage()
    assert torch.allclose(coverage, torch.full_like(coverage, 6 / 8))
