"""A run that does other steps than its sampler announced is solved anew for what is left."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from wantrim.engine.plan import TrimPlan
from wantrim.engine.record import Record
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import sigmas_for
from wantrim.hosts.diffusers.shape import wan_shape
from wantrim.methods.grid import TokenGrid
from wantrim.methods.shares import Shares, held_by_most, token_change
from wantrim.report.figures import mean_work
from wantrim.solve import priors
from wantrim.solve.course import Course, run_before
from wantrim.solve.curves import Curves
from wantrim.solve.dial import HIGH, LOW, Dial, Run, flops
from wantrim.solve.tuned import Travel, Tuned
from wantrim.tests.small_wan import SIZE, noise, random_wan, words

SHIFT = 5.0
GRID = TokenGrid(3, 4, 3)
# a plan that trims, so that the hooks are there; the course puts its own in its place
ANY = TrimPlan(shares=Shares((1.0,), (0.5,)))


def announced(steps: int) -> tuple[float, ...]:
    return tuple(sigmas_for(steps, SHIFT).tolist())


def pairs(steps: int):
    return list(itertools.pairwise(announced(steps)))


@pytest.fixture(autouse=True)
def nothing_learned_of_the_change(monkeypatch):
    """What is solved anew here is so because of the steps that come."""
    for name in ("TEXT_TO_VIDEO", "TEXT_TO_VIDEO_UNGUIDED"):
        monkeypatch.setattr(priors, name, replace(getattr(priors, name), held=()))
    monkeypatch.setattr("wantrim.solve.course.DECIDED", 0.0)


# the sigmas of the calls that come when so many steps are announced
def as_announced(steps):
    return announced(steps)[:-1]


def heun(steps):
    return [at for now, after in pairs(steps) for at in ((now, after) if after else (now,))]


def middle(steps):
    """As res_2s: the second call half of the way, by the logarithm of sigma."""
    return [
        at
        for now, after in pairs(steps)
        for at in ((now, (now * after) ** 0.5) if after else (now,))
    ]


def near(steps):
    """The second call close behind the first one."""
    return [
        at
        for now, after in pairs(steps)
        for at in ((now, now - 0.2 * (now - after)) if after else (now,))
    ]


def three(steps):
    return [
        at
        for now, after in pairs(steps)
        for at in ((now, (now + after) / 2, after) if after else (now,))
    ]


def to_the_end(steps):
    """As RES4LYF's: a second call on the way to 0 too, at the smallest sigma there is."""
    return [at for now, after in pairs(steps) for at in (now, (now * (after or 0.003)) ** 0.5)]


def once_more(steps):
    """One call at the last step, which nobody expects."""
    return [*announced(steps)[:-1], 0.05]


def jumps(steps):
    """Two of three steps."""
    return [at for i, at in enumerate(announced(steps)[:-1]) if i % 3 != 2]


def restarts(steps):
    sigmas = announced(steps)[:-1]
    return [*sigmas[:5], *sigmas[3:5], *sigmas[5:]]


def other_sigmas(steps):
    """A schedule of its own, with half as many steps again."""
    return torch.linspace(1, 0.02, steps * 3 // 2).tolist()


WAYS = [as_announced, heun, middle, near, three, to_the_end, once_more, jumps, restarts]


def go(sigmas, dial=None, run=None, *, plan=ANY, wrong=None, straight=False):
    """A run of a small Wan at these sigmas; gives its record, its course and what that said.

    Args:
        wrong: called with the engine before each call.
        straight: along its velocities, as Euler goes; else with other noise in every call.
    """
    model = random_wan(4)
    told = []
    with attach(model, plan, shift=SHIFT) as attached:
        engine = attached.engine
        given = (dial or Dial(1.5), run or run_of(12))
        course = Course(*given, TrimPlan(), flops, engine, told.append)
        latent = noise(1, 16, *SIZE)
        for at, sigma in enumerate(sigmas):
            if not straight:
                latent = noise(1, 16, *SIZE, seed=at)
            if wrong is not None:
                wrong(engine, at)
            timestep = torch.full((1,), 1000 * sigma)
            velocity = model(latent, timestep, words(), return_dict=False)[0]
            after = sigmas[at + 1] if at + 1 < len(sigmas) else 0.0
            latent = latent + (after - sigma) * velocity
    return engine.record, course, told


def test_uneven_calls_of_a_step_cost_what_they_did():
    """One whole and one repeated call of two: not a step on half of the tokens."""
    plan, run = TrimPlan(shares=Shares(announced(2)[:-1], (0.5, 1.0))), run_of(2, calls=(2.0, 1.0))
    came = replace(run, done=(0.5,), costs=(0.5,))
    assert came.speedup(plan) == pytest.approx(3 / (2 * 0.5 + 1))
    # a fraction in the first step would be whole, which nothing came before
    assert run.speedup(plan) == 1.0
    record, course, told = go(heun(2), run=run_of(2))
    assert [step.kept_share for step in record.steps] == [1.0, 0.0, 1.0]
    assert 1 / mean_work(record) == pytest.approx(1.5)
    for solved in (course.ended, told[-1]):
        assert solved.reached == pytest.approx(1.5) and solved.why is None


def run_of(steps: int, **options) -> Run:
    shape = wan_shape(random_wan(4), 7)
    return Run(shape, GRID, announced(steps), SHIFT, prompts=1, **options)


def done(record: Record) -> float:
    return 1 / mean_work(record)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("wanted", [1.3, 1.5, 2.0])
def test_the_wish_is_met_whatever_comes(way, steps, wanted):
    record, course, told = go(way(steps), Dial(wanted), run_of(steps))
    assert len(record.steps) == len(way(steps))
    met = done(record) == pytest.approx(wanted, rel=0.03)
    # a call at the last one, which nobody expected, may be more than that where steps are few, or
    # whole and repeated alone
    said = "cannot make up for those that came" in (course.solved.why or "")
    parts = any(0.0 < step.program.share < 1.0 for step in record.steps)
    coarse = way in (to_the_end, once_more) and (steps == 8 or not parts)
    # a call that does not come shortly before the end: no part can make up for it without a context
    coarse = coarse or (way is jumps and wanted == 2.0 and not course._engine.memory.holds_context)
    assert met != said and (met or coarse)
    # then by half a call at most
    assert met or abs(mean_work(record) - 1 / wanted) * len(record.steps) <= 0.5 + 1e-6
    # what is expected in the end is what was done
    assert course.solved.reached == pytest.approx(done(record), rel=0.03)
    assert (len(told) == 1) == (way is as_announced)


def test_a_schedule_of_its_own_is_met():
    for steps in (8, 20):
        record, course, _ = go(other_sigmas(steps), Dial(1.5), run_of(steps))
        assert course.solved.reached == pytest.approx(done(record), rel=0.03)
        assert done(record) == pytest.approx(1.5, rel=0.03)


def test_what_began_at_a_step_goes_on_as_it_began():
    for way in (heun, near):
        record, course, _ = go(way(8), run=run_of(8))
        shares = course.solved.plan.shares
        for step in record.steps:
            assert step.program.share == pytest.approx(shares.at(step.sigma))


def test_a_step_that_computed_everything_is_made_up_for():
    def forget(engine, at):
        if at in (3, 4):
            # as for context windows that move, or prompts that come anew
            engine.memory.clear()

    record, course, told = go(as_announced(12), wrong=forget)
    assert len(told) > 1
    assert done(record) == pytest.approx(1.5, rel=0.03)
    assert course.solved.reached == pytest.approx(done(record), rel=0.01)


def test_what_a_step_saved_that_another_node_answered_is_spent_later():
    def answered(engine, at):
        if at == 4:
            # the call of the step before never came to the model
            engine.now.reached = False

    record, course, told = go(as_announced(12), wrong=answered)
    assert record.steps[3].answered and record.steps[3].program.share == 1.0 and len(told) > 1
    assert done(record) == pytest.approx(1.5, rel=0.03)
    assert course.solved.reached == pytest.approx(done(record), rel=0.01)


def test_without_room_for_the_context_what_is_left_is_whole_or_repeated():
    def full(engine, at):
        if at == 4:
            engine.memory.lose_context()

    record, course, _ = go(as_announced(20), run=run_of(20), wrong=full)
    assert {step.program.share for step in record.steps[4:]} == {0.0, 1.0}
    assert done(record) == pytest.approx(1.5, rel=0.03)
    assert not course.solved.plan.shares.partial or course.solved.plan.shares.context is False


def test_the_same_calls_give_the_same_plan():
    for way in (heun, jumps):
        first, second = (go(way(8), run=run_of(8))[1].solved for _ in range(2))
        assert first == second


def test_a_plan_that_a_trial_chose_is_not_solved_anew():
    for way in (heun, middle):
        record, course, _ = go(way(8), Dial(1.5), run_of(8))
        plan, run = course.solved.plan, course.solved.run
        sigmas = run.sigmas[:-1]
        travel = Travel(sigmas, tuple(map(float, range(len(sigmas)))))
        trial = Tuned(run.sigmas, 1, False, GRID.tokens, 1.5, "it", plan.shares.shares, travel)
        again, tuned, _ = go(way(8), Dial(1.5, tuned=(trial,)), run_of(8))
        assert tuned.solved.plan == plan and "it" in tuned.solved.tuned
        assert [step.program.share for step in again.steps] == pytest.approx(
            [step.program.share for step in record.steps]
        )


# both experts


def both(high_calls, low_steps, speedup=1.5):
    """Both experts' records; the low one may know what the high one did."""
    steps = announced(12)
    high, first, _ = go(high_calls, Dial(speedup, expert=HIGH), run_of(12))
    low_run = Run(run_of(1).shape, GRID, steps[-low_steps - 1 :], SHIFT, 1)
    low_run = replace(low_run, before=run_before(low_run, [first.ran]))
    low, second, _ = go(steps[-low_steps - 1 : -1], Dial(speedup, expert=LOW), low_run)
    return high, low, second


def together(*records) -> float:
    steps = [(record, step) for record in records for step in record.steps]
    works = [mean_work(record) * len(record.steps) for record in records]
    return len(steps) / sum(works)


@pytest.mark.parametrize("stops", [3, 5, 6, 8])
@pytest.mark.parametrize("speedup", [1.3, 1.5])
def test_the_low_noise_expert_makes_up_for_a_high_one_that_stopped_early(stops, speedup):
    """Steps to run: it announces all, and nobody says where it will stop."""
    high, low, course = both(announced(12)[:stops], 12 - stops, speedup)
    assert together(high, low) == pytest.approx(speedup, rel=0.03)
    assert course.solved.together == pytest.approx(together(high, low), rel=0.01)
    assert course.solved.why is None and low.steps[0].whole


def test_a_wish_that_the_low_noise_expert_cannot_meet_any_more_is_said():
    high, low, course = both(announced(12)[:8], 4, 4.0)
    assert together(high, low) != pytest.approx(4.0, rel=0.03)
    assert course.solved.together == pytest.approx(together(high, low), rel=0.01)
    assert course.solved.why is not None


def test_a_high_noise_expert_of_two_calls_a_step_is_known_as_it_ran():
    high, low, course = both(heun(12)[:11], 6)
    assert len(high.steps) == 11 and sum(course.solved.run.before.calls) == 11
    assert 1.5 / together(high, low) == pytest.approx(1, abs=0.03)


def knowing(held: tuple[float, ...]) -> Curves:
    """The curves that ship, as if change had lain so in their recording and parts were worth much."""
    shipped = priors.TEXT_TO_VIDEO_UNGUIDED
    left = tuple((1.0, *(0.4 * one for one in row[1:])) for row in shipped.left)
    return replace(shipped, held=((0.0, *held, 1.0),) * 2, left=left)


# a random model's change is spread nearly evenly
EVEN, NARROW = (0.13, 0.25, 0.42, 0.57, 0.85), (0.9, 0.95, 0.97, 0.98, 0.99)


@pytest.mark.parametrize(("held", "parts"), [(EVEN, True), (NARROW, False)])
def test_where_change_is_spread_evenly_few_steps_are_partial(held, parts, monkeypatch):
    monkeypatch.setattr(priors, "TEXT_TO_VIDEO_UNGUIDED", knowing(held))
    record, course, told = go(as_announced(20), run=run_of(20))
    assert told[0].plan.shares.partial and told[0].run.concentration is None
    partial = sum(0.0 < step.program.share < 1.0 for step in record.steps)
    assert partial > 4 if parts else partial < 2
    assert (len(told) > 1) == (not parts)
    # the first plan has them, and what is solved after it knows so
    assert [solved.run.parts for solved in told[:2]] == [False, True][: len(told)]
    assert done(record) == pytest.approx(1.5, rel=0.03)
    assert course.solved.reached == pytest.approx(done(record), rel=0.01)


def test_the_change_that_is_seen_is_that_between_the_last_two_velocities(monkeypatch):
    monkeypatch.setattr(priors, "TEXT_TO_VIDEO_UNGUIDED", knowing(NARROW))
    _, course, _ = go(as_announced(3), run=run_of(3))
    sigma, held = course._run.concentration
    assert sigma == pytest.approx(announced(3)[2], abs=1e-3)
    model = random_wan(4)
    velocities = [
        model(noise(1, 16, *SIZE, seed=at), torch.full((1,), 1000 * at_sigma), words())[0]
        for at, at_sigma in enumerate(announced(3)[:2])
    ]
    change = token_change(velocities[1] - velocities[0], GRID)
    assert held == pytest.approx(held_by_most(change).tolist(), rel=1e-3)


def test_a_high_noise_expert_that_goes_on_in_the_low_ones_place_does_what_is_left():
    parts = announced(20)[:10], announced(20)[9:]
    records, earlier = [], []
    for sigmas in parts:
        run = Run(run_of(1).shape, GRID, sigmas, SHIFT, 1)
        run = replace(run, before=run_before(run, earlier))
        record, course, _ = go(sigmas[:-1], Dial(1.5, expert=HIGH), run)
        records.append(record)
        earlier.append(course.ran)
    assert together(*records) == pytest.approx(1.5, rel=0.03)


@pytest.mark.parametrize("wanted", [1.3, 1.5, 2.0])
def test_the_first_step_that_is_left_out_waits_until_changes_go_on(wanted, monkeypatch):
    """Where nothing is enough it waits while the wish can be met, and what is lost is bounded."""
    run, dial = replace(run_of(20), prompts=2), Dial(wanted)
    planned = dial.solve(run).plan.shares.shares
    before = next(i for i, share in enumerate(planned) if share < 1)
    # of the first three steps it is not known
    assert before >= 3
    monkeypatch.setattr("wantrim.solve.course.DECIDED", 1.0)
    record, course, told = go(as_announced(20), dial, run, straight=True)
    first = next(i for i, step in enumerate(record.steps) if step.program.share < 1)
    assert first > before and len(told) > 1
    assert done(record) == pytest.approx(wanted, rel=0.03) and course.solved.why is None
    # where noise is added it is not known, and nothing waits
    shares = [step.program.share for step in go(as_announced(20), dial, run)[0].steps]
    assert shares == pytest.approx(planned)
    # waiting once more would have been too long
    least, further = dial.solve(run).error, replace(run, done=(1.0,) * first, waits=first)
    assert dial.solve(further).error > 10**1.2 * least >= course.solved.error
    monkeypatch.setattr("wantrim.solve.course.WAITED", math.inf)
    record, course, _ = go(as_announced(20), dial, run, straight=True)
    last = next(i for i, step in enumerate(record.steps) if step.program.share < 1)
    assert last > first and course.solved.error > 10**1.5 * least
    assert dial.solve(replace(further, done=(1.0,) * last, waits=last)).why is not None


def test_where_changes_go_on_the_first_step_is_left_out_as_planned():
    dial = Dial(1.5)
    planned = dial.solve(run_of(12)).plan.shares.shares
    record, _, told = go(as_announced(12), dial, straight=True)
    assert [step.program.share for step in record.steps] == pytest.approx(planned)
    assert len(told) == 1 and min(planned) < 1.0


def test_what_was_sampled_before_is_one_run():
    run = replace(run_of(3), sigmas=(0.6, 0.3, 0.0))
    first = replace(run, sigmas=(1.0, 0.9, 0.8), calls=(2, 1), done=(1.0, 0.5))
    second = replace(run, sigmas=(0.8, 0.7, 0.6), calls=(1, 3), done=(1.0, 0.0), before=first)
    before = run_before(run, [first, second])
    assert before.sigmas == (1.0, 0.9, 0.8, 0.7, 0.6) and before.before is None
    assert before.calls == (2, 1, 1, 3) and before.done == (1.0, 0.5, 1.0, 0.0)
    # what it cost is known where each part's is
    assert before.spent is None
    first_cost, second_cost = replace(first, spent=2.0), replace(second, spent=1.5)
    assert run_before(run, [first_cost, second_cost]).spent == 3.5
    assert run_before(run, [first_cost, second]).spent is None
    # what went lower is of another video, as is one of another size
    lower = replace(first, sigmas=(0.9, 0.6, 0.5))
    other = replace(second, grid=TokenGrid(3, 4, 4))
    assert run_before(run, [first, lower]) is run_before(run, [first, other]) is None
    assert run_before(run, [lower, second]) == run_before(run, [second])
