"""What a report claims about work and speed, on runs whose figures are known beforehand."""

import json

import pytest

from wantrim.engine.plan import TrimPlan
from wantrim.engine.program import ALL, KEPT, READ, SKIP, Program, Row
from wantrim.engine.record import Record, Step
from wantrim.methods.cost import WanShape, block_flops, outside_flops
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import FRAME, FULL, OFF, HeadPlan
from wantrim.report.figures import _works, measured_speed, report_json, step_work
from wantrim.report.words import record_text
from wantrim.solve.floor import device_rates

GRID = TokenGrid(2, 3, 4)
SHAPE = WanShape(64, 128, 4, text_tokens=8, text_dim=16, head_dim=16)
DENSE = outside_flops(SHAPE, 24) + 4 * block_flops(SHAPE, 24)


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
    assert half == (outside_flops(SHAPE, 24) + 4 * block_flops(SHAPE, 12)) / DENSE
    # a skipped block costs nothing, not even its keys of the text
    left = 2 * block_flops(SHAPE, 24) + block_flops(SHAPE, 12)
    assert mixed == (outside_flops(SHAPE, 24) + left) / DENSE
    report.shape = None
    assert step_work(report, report.steps[1]) is None


def test_remembered_keys_cost_attention_and_no_projections():
    report = run(step(HALF, context=READ))
    kept = outside_flops(SHAPE, 24) + 4 * (block_flops(SHAPE, 12) + 4 * 12 * 12 * 64)
    assert step_work(report, report.steps[0]) == kept / DENSE


def test_heads_count_only_where_their_patterns_ran():
    self_heads = ((FULL,) * 4, (FRAME, OFF, FULL, FULL), (OFF,) * 4, (FULL,) * 4)
    plan = HeadPlan(self_heads, ((FULL,) * 4,) * 4)
    report = run(step(WHOLE, patterned=[1]), plan=TrimPlan(heads=plan), attention_share=0.5)
    report.steps[0].program = Program(rows(WHOLE, [1, 2]), GRID, 12, heads=plan)
    # block 1: two full heads of 24 x 24 pairs and one of 2 x 12 x 12; block 2 was replaced
    pairs = 2 * 24 * 24 + 2 * 12 * 12
    left = 3 * block_flops(SHAPE, 24) + block_flops(SHAPE, 24, self_pairs=pairs)
    assert step_work(report, report.steps[0]) == (outside_flops(SHAPE, 24) + left) / DENSE
    heads = report_json(report)["steps"][0]
    assert heads["planned"]["heads"] == {"full": 10, "frame": 1, "off": 5}
    assert heads["executed"]["heads"] == {"full": 14, "frame": 1, "off": 1}


def test_a_report_of_heads_alone_does_not_say_that_all_work_was_done():
    plan = HeadPlan(((FRAME,) * 4,) * 4, ((FULL,) * 4,) * 4)
    made = step(WHOLE, patterned=range(4), heads=plan)
    report = run(made, plan=TrimPlan(heads=plan), attention_share=0.5)
    text = record_text(report)
    assert "Token work done" not in text
    work = step_work(report, report.steps[0])
    assert work < 1
    assert f"Work done: {work:.1%} of an untouched model's FLOPs" in text
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
    assert speed.expected == pytest.approx(1 / half)
    assert speed.expected_run == pytest.approx(4 / (2 + 2 * half))
    assert not speed.warming_up
    assert "a whole one 2.00 s (step 2 of this run): 1.60 x; all steps 1.23 x" in record_text(
        report
    )


def test_a_first_step_as_reference_is_said():
    report = run(step(WHOLE, 3.0), step(HALF, 1.0))
    assert measured_speed(report).warming_up
    assert "warms up as well: the measured figure may be too good" in record_text(report)
    assert report_json(report)["reference"]["warming_up"] is True


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
    assert f"Measured speed-up: none: {why}" in record_text(report)
    data = report_json(report)
    assert data["measured"] is data["reference"] is None
    assert data["no_reference"].startswith(why)


def test_a_step_timed_apart_is_the_reference_when_there_is_one():
    report = run(step(HALF, 1.0), step(HALF, 1.5), dense_seconds=2.0)
    speed = measured_speed(report)
    assert (speed.whole_steps, speed.whole, speed.trimmed) == ((), 2.0, 1.25)
    assert speed.run == pytest.approx(2 * 2.0 / 2.5) and not speed.warming_up
    assert speed.expected_run == pytest.approx(1 / step_work(report, report.steps[0]))
    assert "(timed apart, without the sampler's own work): 1.60 x" in record_text(report)
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
    # planned 3 of 4 blocks on half of the tokens
    assert "37.5%" in record_text(report)


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
    assert speed.expected_run == pytest.approx(4 / (2 + half))
    alone = run(step(WHOLE, 2.0), repeated())
    assert measured_speed(alone).trimmed is None
    assert "the others repeated; all steps 1.78 x" in record_text(alone)


def test_on_a_card_whose_rates_are_known_the_expected_is_its_time():
    """Where attention is slower than products, what it saves is worth more."""
    report = run(step(WHOLE), step(HALF))
    by_flops = measured_speed(report).expected
    assert "Expected from FLOPs:" in record_text(report)
    report.device = "NVIDIA GeForce RTX 4090"
    by_time = measured_speed(report).expected
    works = _works(report, report.steps[1])
    rates = device_rates(report.device)
    assert by_time == pytest.approx(rates.seconds(works[1]) / rates.seconds(works[0]))
    assert by_time != pytest.approx(by_flops, rel=0.003)
    assert "Expected from the rates of NVIDIA GeForce RTX 4090:" in record_text(report)
    assert report_json(report)["expected"]["by"] == "the rates of NVIDIA GeForce RTX 4090"
    # work done is still counted in FLOPs
    assert step_work(report, report.steps[1]) == pytest.approx(1 / by_flops)
