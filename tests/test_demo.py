import json
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from wantrim.demo.page import write_page
from wantrim.demo.run import SPEEDUP, Contestant, Job, paper, run_demo
from wantrim.engine.program import ALL, KEPT, Program, Row
from wantrim.engine.record import Record, Step
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import FRAME, FULL, OFF, HeadPlan
from wantrim.methods.tokens import Selection
from wantrim.report.picture import HEADS, TILE, TIME, draw_report, overlay
from wantrim.report.video_metrics import flicker, motion, psnr
from wantrim.report.words import record_text
from wantrim.solve.dial import Dial
from wantrim.toy.metrics import adherence, still_ground
from wantrim.toy.world import held_out_scenes, parse_prompt, render

ROW = {
    "task", "name", "seconds_per_step", "flops_per_step", "speedup_measured", "speedup_flops",
    "psnr_db", "motion_ratio", "flicker", "colour_ok", "shape_ok", "direction_ok",
}  # fmt: skip


@pytest.fixture(scope="module")
def result():
    return run_demo(steps=5, prompts=1, seed=0)


def test_demo_writes_everything_it_promises(result, tmp_path):
    write_page(result, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["neutral_exact"] is True
    assert data["environment"]["torch"] == torch.__version__
    names = [(run["task"], run["name"]) for run in data["runs"]]
    kinds = ("dense", "default", "fewer_steps", "paper")
    assert names == [(task, kind) for task in ("t2v", "i2v") for kind in kinds]
    assert all(set(run) >= ROW for run in data["runs"])
    for task in ("t2v", "i2v"):
        with av.open(str(tmp_path / f"{task}_side_by_side.mp4")) as file:
            assert sum(1 for _ in file.decode(video=0)) == 17
        assert Image.open(tmp_path / f"{task}_contact_sheet.png").width > 400
    page = (tmp_path / "report.html").read_text()
    for name in ("t2v_side_by_side.mp4", "i2v_default_report.png", "plots.png"):
        assert name in page
        assert (tmp_path / name).stat().st_size > 0
    said = (tmp_path / "i2v_default_report.txt").read_text()
    assert "everything ran as planned" in said and "of 5 steps" in said
    assert said.splitlines()[0] in page
    assert not list(tmp_path.glob("*.partial"))


def test_the_default_costs_what_was_asked_and_others_as_much(result):
    for task in ("t2v", "i2v"):
        by_name = {run.name: run for run in result.runs if run.task == task}
        dense = by_name["dense"]
        assert (dense.speedup_measured, dense.speedup_flops, dense.psnr_db) == (1, 1, None)
        assert by_name["default"].speedup_flops == pytest.approx(SPEEDUP, rel=0.03)
        # 3 of 5 steps
        assert by_name["fewer_steps"].speedup_flops == pytest.approx(5 / 3, rel=0.01)
        if task == "i2v":
            # five guided steps without a given frame are too few for anybody to leave something out
            assert by_name["default"].psnr_db > by_name["paper"].psnr_db + 5


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_counted_flops_are_those_of_the_cost_model(task):
    job = Job(task, held_out_scenes(1, seed=3), 0, 5)
    contestant = Contestant("default", Dial(1.4))
    contestant.prepare(job)
    run = job.sampling(contestant.model)
    dense = Contestant("dense").flops(job, 1)
    counted = dense / contestant.flops(job, 5)
    assert counted == pytest.approx(run.speedup(contestant.attachment.plan), rel=0.01)
    assert counted == pytest.approx(1.4, rel=0.03)


def test_counted_flops_match_the_work_that_the_report_states():
    # every cost but attention is linear in the tokens, so the count lies between the two laws
    job = Job("t2v", held_out_scenes(1, seed=3), 0, 5)
    contestant = Contestant("paper", paper(0.7, alpha=1.0))
    contestant.prepare(job)
    trimmed, dense = contestant.flops(job, 5), Contestant("dense").flops(job, 1)
    # 4 of 16 blocks run on all 36 tokens of a latent frame, the others on 22, 23, 25, 27 and 29
    share = np.mean([kept / 36 for kept in (22, 23, 25, 27, 29)])
    linear = (4 + 12 * share) / 16
    quadratic = (4 + 12 * share**2) / 16
    assert quadratic < trimmed / dense < linear


def test_metrics_on_truth():
    scene = parse_prompt("a red circle moving left slowly on a black background")
    video = render(scene, np.random.default_rng(0))
    assert adherence([video], [scene]) == {"colour_ok": 1.0, "shape_ok": 1.0, "direction_ok": 1.0}
    wrong = parse_prompt("a blue square moving up slowly on a black background")
    assert set(adherence([video], [wrong]).values()) == {0.0}
    two = parse_prompt(
        "a red circle moving left slowly and a blue square moving up slowly on a black background"
    )
    assert set(adherence([video], [two]).values()) == {0.0}
    # equal videos; then half a gray level off everywhere: 20 log10(2)
    assert psnr(video, video) == float("inf")
    assert psnr(np.full((2, 4, 4, 3), 0.5), np.zeros((2, 4, 4, 3))) == pytest.approx(6.0206, 1e-4)
    assert motion(np.repeat(video[:1], 5, 0)) == 0.0
    assert motion(video) > 0
    # only the soft edge of the shape, which is dark enough for background
    assert flicker(video, still_ground(video)) < 0.001
    noisy = video + 0.05 * (np.arange(17) % 2).reshape(-1, 1, 1, 1)
    assert flicker(noisy, still_ground(noisy)) == pytest.approx(0.05, rel=0.1)


def record_of(kept: list[int], frames=2) -> Record:
    """A step of 4 blocks, of which the second ran on some tokens of each latent frame."""
    grid = TokenGrid(frames, 3, 4)
    index = torch.cat([torch.tensor(kept) + 12 * f for f in range(frames)])[None]
    whole, part = Row(ALL, grid.tokens), Row(KEPT, len(index[0]))
    rows = [whole, part, whole, whole]
    step = Step(0.9, 0.1, Program(tuple(rows), grid, len(kept)), calls=1, seconds=0.5)
    choice = Selection(index, grid.tokens, (len(kept),) * frames)
    step.close(rows, [None, choice, None, None])
    step.settle()
    return Record("Wan", [step], planned="half", finished=True)


def test_overlay_tints_what_was_left_out_in_its_latent_frame():
    record = record_of([0, 1, 2])
    # block 1 of 4 ran on 3 of 12 tokens a frame, the other blocks on all
    assert record.steps[0].tokens_per_block == [24, 6, 24, 24]
    coverage = record.coverage().numpy()
    assert coverage[0, 0, 0].tolist() == pytest.approx([1, 1, 1, 0.75])
    for shade in (0.0, 1.0):
        video = np.full((5, 30, 40, 3), shade, np.float32)
        shown = overlay(video, coverage, range(5))
        assert shown[0, 5, 5] == pytest.approx(shade)
        # the scale is fixed: what three of four blocks computed has a quarter of the tint
        never = overlay(video, 0 * coverage, range(5))[0, 5, 35] - shade
        assert shown[0, 5, 35] - shade == pytest.approx(never / 4, abs=0.01)
        assert abs(never).max() > 0.3
        assert shown.shape == video.shape


@pytest.mark.parametrize("video", [None, np.ones((1, 31, 17, 3)), np.ones((17, 96, 96, 3))])
def test_report_picture_draws_any_video_and_an_empty_run(video):
    picture = draw_report(record_of([0, 1]), video)
    assert picture.width == 960
    assert len(picture.getcolors(1 << 20)) > 3
    assert draw_report(Record("Wan"), video).height > 50


def test_a_video_that_is_not_the_grids_is_drawn_with_a_doubt():
    # 2 latent frames are 5 pixel frames
    fits, other = (draw_report(record_of([0]), np.ones((n, 9, 9, 3))) for n in (5, 6))
    # a line more; frames are one to a cell
    assert other.height - fits.height == 24 + 2 * (928 // 6 - 928 // 5)


def test_the_picture_shows_what_heads_did_in_every_block():
    record = record_of([0, 1])
    bare = draw_report(record).height
    heads = HeadPlan(((FULL, FRAME), ("tile3", OFF), (FULL,) * 2, (FULL,) * 2), ((FULL,) * 2,) * 4)
    step = record.steps[0]
    step.program = replace(step.program, heads=heads)
    step.rows[1] = replace(step.rows[1], heads=True)
    drawn = np.asarray(draw_report(record))[bare - 70 :]
    counts = [(drawn == colour).all(-1).sum() for colour in (TILE, HEADS[OFF], TIME)]
    # a block has a quarter of the width, a head half of the height, and each a square in the key
    assert counts[:2] == pytest.approx([928 / 4 * 30] * 2, rel=0.1)
    # block 0 did not run in its patterns
    assert counts[2] < 300


def test_without_a_step_on_a_part_nothing_is_tinted():
    record = record_of([0, 1])
    whole = Row(ALL, 24)
    record.steps[0].rows = [whole] * 4
    assert record.coverage() is None
    video = np.full((5, 30, 40, 3), 0.5)
    assert draw_report(record, video).height < draw_report(record_of([0, 1]), video).height


def test_report_text_says_what_did_not_happen():
    record = record_of([0])
    record.note("the sky fell")
    record.note("the sky fell")
    assert record_text(record).count("the sky fell") == 1
    record.finished = False
    assert "did not finish" in record_text(record)
    assert "no sampling run" in record_text(Record())
    untouched = Record("Wan", planned="nothing trimmed", finished=True, seconds=3.25)
    assert "ran untouched, 3.2 s in all" in record_text(untouched)
