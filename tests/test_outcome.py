"""What a report claims about work and speed, on runs whose figures are known beforehand."""

import json

import pytest

from wantrim.engine.plan import TrimPlan
from wantrim.engine.program import ALL, KEPT, READ, SKIP, Program, Row, expected_programs
from wantrim.engine.record import Record, Step, join_records
from wantrim.methods.cost import WanShape, block_work, outside_flops
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import FRAME, FULL, OFF, HeadPlan
from wantrim.methods.role_plan import RolePlan
from wantrim.methods.shares import Shares
from wantrim.report.figures import (
    _works,
    expected_speedup,
    measured_speed,
    report_json,
    step_work,
)
from wantrim.report.line import outcome, planned
from wantrim.report.words import record_text, verdict
from wantrim.solve.floor import device_rates

GRID = TokenGrid(2, 3, 4)
SHAPE = WanShape(64, 128, 4, text_tokens=8, text_dim=16, head_dim=16)
DENSE = outside_flops(SHAPE, 24) + 4 * block_work(SHAPE, 24).flops


def rows(kept, patterned=(), **fields) -> tuple[Row, ...]:
    """Of so many tokens in each block."""
    runs = {24: ALL, 0: SKIP}
    return tuple(
        Row(runs.get(tokens, KEPT), tokens, heads=index in patterned, **fields)
        for index, tokens in enumerate(kept)
    )


def step(kept, seconds=1.0, calls=2, patterned=(), planned=None, heads=None, **fields) -> Step:
    program = Program(rows(planned or kept, patterned, **fields), GRID, 6, heads=heads)
    return Step(0.9, 0.1, program, calls, seconds, list(rows(kept, patterned, **fields)))


def run(*steps: Step, plan=None, **fields) -> Record:
    fields = {"plan": plan or TrimPlan(), "planned": "half", "finished": True} | fields
    return Record("Wan", list(steps), shape=SHAPE, **fields)


WHOLE, HALF = [24] * 4, [12] * 4
NOT_WHOLE = "no step of this run that can be compared was whole"


def test_work_is_the_cost_models():
    report = run(step(WHOLE), step(HALF), step([24, 0, 12, 24]))
    whole, half, mixed = (step_work(report, one) for one in report.steps)
    assert whole == 1.0
    assert half == (outside_flops(SHAPE, 24) + 4 * block_work(SHAPE, 12).flops) / DENSE
    # a skipped block costs nothing, not even its keys of the text
    left = 2 * block_work(SHAPE, 24).flops + block_work(SHAPE, 12).flops
    assert mixed == (outside_flops(SHAPE, 24) + left) / DENSE
    report.shape = None
    assert step_work(report, report.steps[1]) is None


def test_remembered_keys_cost_attention_and_no_projections():
    report = run(step(HALF, context=READ))
    kept = outside_flops(SHAPE, 24) + 4 * (block_work(SHAPE, 12).flops + 4 * 12 * 12 * 64)
    assert step_work(report, report.steps[0]) == kept / DENSE


def test_heads_count_only_where_their_patterns_ran():
    self_heads = ((FULL,) * 4, (FRAME, OFF, FULL, FULL), (OFF,) * 4, (FULL,) * 4)
    plan = HeadPlan(self_heads, ((FULL,) * 4,) * 4)
    report = run(step(WHOLE, patterned=[1]), plan=TrimPlan(heads=plan))
    report.steps[0].program = Program(rows(WHOLE, [1, 2]), GRID, 12, heads=plan)
    # block 1: two full heads of 24 x 24 pairs and one of 2 x 12 x 12; block 2 was replaced
    pairs = 2 * 24 * 24 + 2 * 12 * 12
    left = 3 * block_work(SHAPE, 24).flops + block_work(SHAPE, 24, self_pairs=pairs).flops
    assert step_work(report, report.steps[0]) == (outside_flops(SHAPE, 24) + left) / DENSE
    heads = report_json(report)["steps"][0]
    assert heads["planned"]["heads"] == {"full": 10, "frame": 1, "off": 5}
    assert heads["executed"]["heads"] == {"full": 14, "frame": 1, "off": 1}


def test_a_report_of_heads_alone_does_not_say_that_all_work_was_done():
    plan = HeadPlan(((FRAME,) * 4,) * 4, ((FULL,) * 4,) * 4)
    made = step(WHOLE, patterned=range(4), heads=plan)
    report = run(made, plan=TrimPlan(heads=plan))
    text = record_text(report)
    work = step_work(report, report.steps[0])
    assert work < 1
    assert text.startswith(f"{1 / work:.2f}x less work; a step took 1.00 s.")
    assert "1 step with heads in patterns" in text and "100% of the tokens" not in text
    assert "patterns: 50.0%" in text


def test_speed_is_measured_against_whole_steps_of_the_run():
    # the first step warms up; the other whole one is the reference
    report = run(step(WHOLE, 5.0), step(WHOLE, 2.0), step(HALF, 1.0), step(HALF, 1.5))
    speed = measured_speed(report)
    assert (speed.whole_steps, speed.whole, speed.trimmed) == ((2,), 2.0, 1.25)
    assert speed.measured == pytest.approx(1.6)
    # had it not warmed up, it would have taken as long as the other
    assert speed.run == pytest.approx(4 * 2.0 / 6.5)
    half = step_work(report, report.steps[2])
    assert expected_speedup(report) == pytest.approx(4 / (2 + 2 * half))
    assert not speed.warming_up
    text = record_text(report)
    assert "a whole step 2.00 s (step 2 of this run), a trimmed one 1.25 s, 1.60x faster" in text
    # the verdict is of the mean step
    assert text.startswith(
        f"{expected_speedup(report):.2f}x less work; a step took 1.62 s instead of 2.00 s"
    )
    assert "2 of 4 steps whole, 2 at half: 1.3x less work, 1.2x faster here" in text


def test_a_first_step_as_reference_is_said():
    report = run(step(WHOLE, 3.0), step(HALF, 1.0))
    assert measured_speed(report).warming_up
    text = record_text(report)
    assert "which warms up as well" in text
    assert "instead of" not in text and "faster here" not in text
    assert report_json(report)["reference"]["warming_up"] is True


def test_the_first_steps_of_all_runs_of_a_video_warm_up():
    runs = [run(step(WHOLE, 9.0), step(HALF)), run(step(WHOLE, 5.0), step(HALF))]
    joined = join_records(runs)
    assert measured_speed(joined).warming_up and outcome(joined).faster is None
    assert "The whole steps were the first ones of their runs" in record_text(joined)
    runs[1].steps.append(step(WHOLE, 2.0))
    assert measured_speed(join_records(runs)).whole_steps == (5,)


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([step(HALF), step(HALF)], NOT_WHOLE),
        # another number of model calls is another step
        ([step(WHOLE, calls=1), step(HALF)], NOT_WHOLE),
        ([step(WHOLE), step(WHOLE)], "nothing was left out"),
    ],
)
def test_without_a_measured_reference_no_speed_up_is_claimed(steps, why):
    report = run(*steps)
    assert measured_speed(report) is None
    assert f"No seconds are compared: {why}" in record_text(report)
    assert "instead of" not in record_text(report) and "faster" not in record_text(report)
    data = report_json(report)
    assert data["measured"] is data["reference"] is None
    assert data["no_reference"].startswith(why)


def test_a_step_timed_apart_is_the_reference_when_there_is_one():
    report = run(step(HALF, 1.0), step(HALF, 1.5), dense_seconds=2.0)
    speed = measured_speed(report)
    assert (speed.whole_steps, speed.whole, speed.trimmed) == ((), 2.0, 1.25)
    assert speed.run == pytest.approx(2 * 2.0 / 2.5) and not speed.warming_up
    text = record_text(report)
    assert "(timed apart, without the sampler's own work), a trimmed one 1.25 s, 1.60x" in text
    assert "a step took 1.25 s instead of 2.00 s" in text
    # it is of the first step's size
    report.steps[0].calls = 1
    report.steps.append(step(HALF))
    assert measured_speed(report) is None


def test_json_holds_plan_and_deed_side_by_side():
    report = run(step(WHOLE), step([24, 0, 12, 24], planned=[12, 0, 12, 12]))
    report.note("the sky fell")
    data = json.loads(json.dumps(report_json(report)))
    second = data["steps"][1]
    assert second["planned"] == {"blocks": 3, "tokens_per_block": [12, 0, 12, 12]}
    assert second["executed"] == {"blocks": 3, "tokens_per_block": [24, 0, 12, 24]}
    assert data["did_not_happen"] == ["the sky fell"]
    assert data["measured"]["run"] == pytest.approx(1.0)
    assert json.loads(json.dumps(report_json(Record())))["steps"] == []
    # 60 of 72 tokens in the blocks that ran
    assert "83% of the tokens, 3 of 4 blocks" in record_text(report)
    assert record_text(report).splitlines()[0] == verdict([report])


def repeated(seconds=0.25, answered=False) -> Step:
    made = step([0] * 4, seconds)
    made.program, made.answered = Program(rows([0] * 4), GRID, 12, share=0.0), answered
    return made


def test_a_step_that_a_cache_answered_is_no_trimmed_one():
    report = run(step(WHOLE, 2.0), step(WHOLE, 2.0), repeated(0.01, answered=True), step(HALF, 1.0))
    speed = measured_speed(report)
    assert speed.trimmed == 1.0 and speed.run == pytest.approx(3 * 2.0 / 5.0)


def test_a_repeated_step_counts_in_the_run_and_is_no_trimmed_one():
    report = run(step(WHOLE, 2.0), step(WHOLE, 2.0), repeated(), step(HALF, 1.0))
    speed = measured_speed(report)
    assert speed.trimmed == 1.0 and speed.run == pytest.approx(4 * 2.0 / 5.25)
    half = step_work(report, report.steps[3])
    assert step_work(report, report.steps[2]) == 0.0
    assert expected_speedup(report) == pytest.approx(4 / (2 + half))
    alone = run(step(WHOLE, 2.0), repeated())
    assert measured_speed(alone).trimmed is None
    # its whole step is the first one
    assert "the others repeated" in record_text(alone) and "faster" not in record_text(alone)


def test_on_a_card_whose_rates_are_known_the_expected_is_its_time():
    """Where attention is slower than products, what it saves is worth more."""
    report = run(step(HALF))
    by_flops = expected_speedup(report)
    assert "Work: by FLOPs of" in record_text(report)
    report.device = "NVIDIA GeForce RTX 4090"
    by_time = expected_speedup(report)
    works = _works(report, report.steps[0])
    rates = device_rates(report.device)
    assert by_time == pytest.approx(rates.seconds(works[1]) / rates.seconds(works[0]))
    assert by_time != pytest.approx(by_flops, rel=0.003)
    assert "Work: by the rates of NVIDIA GeForce RTX 4090 of" in record_text(report)
    assert report_json(report)["done"]["by"] == "the rates of NVIDIA GeForce RTX 4090"
    # work done is still counted in FLOPs
    assert step_work(report, report.steps[0]) == pytest.approx(1 / by_flops)


def dialled(*steps: Step, **fields) -> Record:
    return run(*steps, **{"asked": 1.5, "expected": 1.5} | fields)


def test_the_verdict_says_what_was_asked_and_what_was_done():
    report = dialled(step(WHOLE, 2.0), step(WHOLE, 2.0), step(HALF, 1.0))
    did = expected_speedup(report)
    data = report_json(report)
    assert (data["asked"], data["expected"], data["done"]["run"]) == (1.5, 1.5, did)
    assert verdict([report]) == (
        f"Asked 1.5x, did {did:.2f}x; a step took 1.67 s instead of 2.00 s."
    )
    report.both = True
    assert verdict([report]).startswith(f"Asked 1.5x of both experts, this one did {did:.2f}x;")
    # of both it is all that they did together
    low = dialled(step(WHOLE, 2.0), step(HALF, 1.0), both=True)
    together = 5 / (3 / did + 2 / expected_speedup(low))
    assert verdict([report, low]).startswith(f"Asked 1.5x, did {together:.2f}x;")
    assert verdict([run(step(WHOLE, 2.0))]) == "Nothing was left out; a step took 2.00 s."
    report.finished = False
    assert verdict([report]).startswith("The run did not finish (cancelled or failed). Asked 1.5x")


def test_one_line_says_the_steps_the_work_and_what_was_measured():
    whole, part = step(WHOLE, 2.0), step([3] * 4, 1.0)
    report = dialled(*(step(WHOLE, 2.0) for _ in range(3)), part, part, repeated(0.1))
    less = expected_speedup(report)
    line = f"3 of 6 steps whole, 2 at an eighth, 1 repeated: {less:.2g}x less work"
    assert outcome(report).line() == f"{line}, 1.5x faster here"
    # without a measure there is none
    report.steps[4].seconds = 0.0
    assert outcome(report).line() == line
    report.missed, report.asked = True, 2.5
    assert outcome(report).line() == f"{line}, 2.5x was asked for"
    mixed = dialled(whole, whole, part, step(HALF), repeated(answered=True))
    assert (
        outcome(mixed)
        .line()
        .startswith("2 of 5 steps whole, 2 at an eighth to half, 1 answered by another node: ")
    )
    assert outcome(run(whole, whole)).line() == "all 2 steps whole"
    # half the first step's pace, twice it, or the same
    slow = [dialled(whole, step(WHOLE, 2.0), step(HALF, s)) for s in (8.0, 2.0)]
    assert [outcome(one).line().split(", ")[-1] for one in slow] == [
        "2x slower here", "not faster here",
    ]  # fmt: skip
    for one, said in zip(slow, ("4.00x slower.", "not faster."), strict=True):
        assert said in record_text(one)


def test_a_run_that_computes_its_first_step_alone_is_no_video():
    report = dialled(step(WHOLE, 2.0), repeated(), repeated(), repeated(), asked=4.0)
    said = "1 of 4 steps whole, 3 repeated: 4x less work, too little for a video"
    assert outcome(report).line() == said
    # an expert of two has the other one's steps beside it
    report.both = True
    assert "too little" not in outcome(report).line()
    report.both, report.steps[3] = False, step(HALF)
    assert "too little" not in outcome(report).line()


def test_the_plan_is_said_while_it_runs_as_it_will_be():
    sigmas = (0.9, 0.8, 0.6, 0.4, 0.2)
    # a part of the second step is not known yet: nothing was seen to change
    shares = Shares(sigmas, (1.0, 0.5, 0.14, 0.33, 0.0))
    plan = TrimPlan(heads=RolePlan(0.5, 4), shares=shares)
    report = dialled(step(WHOLE), plan=plan, expected=2.04)
    # 2 and 4 of a latent frame's 12 tokens
    said = "1 of 5 steps whole, 2 at a sixth to a third, 1 with heads in patterns, 1 repeated"
    assert (
        planned(report, expected_programs(plan, sigmas, 1.0, GRID, 4)).line()
        == f"{said}: 2x less work"
    )
