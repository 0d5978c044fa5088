import html
import json
import re
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wantrim.demo.page import gained, write_page
from wantrim.demo.run import (
    CACHE,
    FEWER,
    PAPER,
    SPEEDUP,
    WANTRIM,
    WHOLE,
    Result,
    Run,
    paper,
    run_demo,
)
from wantrim.demo.strip import draw_strip, steps_in_words
from wantrim.demo.thumbnails import DRAWERS
from wantrim.demo.ways import Job, Trimmed, Way
from wantrim.engine.program import ALL, KEPT, Program, Row
from wantrim.engine.record import Record, Step
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import FRAME, FULL, OFF, HeadPlan
from wantrim.methods.tokens import Selection
from wantrim.report.picture import HEADS, TILE, TIME, draw_report, overlay
from wantrim.report.video_metrics import calm_places, flicker, motion, psnr
from wantrim.report.words import record_text
from wantrim.solve.dial import Dial
from wantrim.toy.held_out import held_out_scenes
from wantrim.toy.metrics import adherence
from wantrim.toy.world import parse_prompt, render

ROW = {
    "task", "name", "steps", "work", "seconds", "faster", "psnr_db", "motion_ratio", "colour_ok",
    "shape_ok", "direction_ok", "steps_work",
}  # fmt: skip
KINDS = (WHOLE, WANTRIM, FEWER, CACHE, PAPER)


@pytest.fixture(scope="module")
def result():
    return run_demo(steps=6, prompts=2, seed=1)


def test_demo_writes_everything_it_promises(result, tmp_path):
    write_page(result, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["neutral_exact"] is True
    assert data["environment"]["torch"] == torch.__version__
    assert len(data["prompts"]) == 2
    names = [(run["task"], run["name"]) for run in data["runs"]]
    assert names == [(task, kind) for task in ("t2v", "i2v") for kind in KINDS]
    assert all(set(run) == ROW for run in data["runs"])
    for task in ("t2v", "i2v"):
        with av.open(str(tmp_path / f"{task}_side_by_side.mp4")) as file:
            assert sum(1 for _ in file.decode(video=0)) == 17
    page = (tmp_path / "report.html").read_text()
    for name in ("t2v_side_by_side.mp4", "i2v_strip.png", "i2v_wantrim_report.png", "plots.png"):
        assert name in page
        assert (tmp_path / name).stat().st_size > 0
    # what was gained comes first, and nothing before it
    first = re.search(r"<body>|</style>", page).end()
    assert page[first:].lstrip().startswith(f"<h1>{html.escape(data['gained'])}</h1>")
    said = (tmp_path / "i2v_wantrim_report.txt").read_text()
    assert "everything ran as planned" in said and "of 6 steps" in said
    assert html.escape(said.splitlines()[0]) in page
    assert not list(tmp_path.glob("*.partial"))


def test_everybody_gets_the_work_that_the_default_takes(result):
    for task in ("t2v", "i2v"):
        runs = result.of(task)
        whole = runs[WHOLE]
        assert (whole.faster, whole.work, whole.psnr_db) == (1, 1, None)
        assert runs[WANTRIM].work == pytest.approx(1 / SPEEDUP, rel=0.05)
        # 4 of 6 steps
        assert (runs[FEWER].steps, runs[FEWER].work) == (4, pytest.approx(4 / 6))
        assert all(share in (0, 1) for share in runs[CACHE].steps_work)
        for run in runs.values():
            assert len(run.steps_work) == run.steps
            assert run.videos.shape == (2, 17, 96, 96, 3)
            # of the first of two videos, whose plans are alike; a cache decides for each
            if run.name != CACHE:
                assert sum(run.steps_work) / 6 == pytest.approx(run.work)
    # the races were of two prompts and two seeds
    assert not np.array_equal(*result.of("t2v")[WHOLE].videos)


def run_of(name: str, psnr_db: float | None, work: float = 0.5, steps: int = 20) -> Run:
    return Run("t2v", name, steps, work, 1.0, 1.4, psnr_db)


def test_first_line_says_what_was_gained_and_what_is_free():
    runs, others = (
        [run_of(WANTRIM, ours), run_of(FEWER, fewer, 0.6, 12), run_of(CACHE, cache, 0.7)]
        for ours, fewer, cache in ((45.0, 19.0, 31.0), (25.0, None, 41.0))
    )
    for run in others:
        run.task = "i2v"
    said = gained(Result({}, True, [], runs + others))
    text, _, image = said.partition(" Image to video: ")
    assert text == (
        "Text to video: WanTrim does 50% of the work (1.4x as fast here), and beside the whole "
        "model's the videos look the same. In 12 of 20 steps (60% of the work) they are other "
        "videos; with a step cache (70%) they differ in details."
    )
    assert "beside the whole model's the videos are clearly different. In 12 of 20" in image
    assert "of the work) they are the same; with a step cache (70%) they look the same." in image


def test_strip_counts_steps_and_fits_its_words():
    work = [1.0, 1.0, 0.3, 0.0]
    assert steps_in_words(work) == "2 steps whole, 1 in part, 1 repeated"
    assert steps_in_words([1.0]) == "1 step whole"
    video = np.zeros((17, 96, 96, 3))
    few, many = (draw_strip([("a", video)] * n, "said", work) for n in (1, 2))
    assert many.width == few.width == 640 and many.height > few.height
    plain = np.asarray(draw_strip([("a", video)], "said", [1.0] * 4))
    assert (np.asarray(few) != plain).any()


def test_pictures_of_the_templates_are_drawn_by_the_command(root):
    templates = {path.stem for path in (root / "workflows").glob("*.json")}
    assert set(DRAWERS) == templates
    # of four steps, so that it takes a second
    name = "wan2.2_i2v_14b"
    drawn = np.asarray(DRAWERS[name](), np.float32)
    with Image.open(root / "workflows" / f"{name}.jpg") as shipped:
        kept = np.asarray(shipped, np.float32)
    assert kept.shape == drawn.shape and np.abs(kept - drawn).mean() < 3


def counted(way: Way, job: Job) -> float:
    """FLOPs of a video, counted by torch."""
    # the fused CPU attention is unknown to torch's counter, the plain one is counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for _ in way.begin(job, 0):
            pass
    way.end()
    return counter.get_total_flops()


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_counted_flops_are_those_of_the_cost_model(task):
    job = Job(task, held_out_scenes(1, seed=3), 0, 5)
    trimmed = Trimmed("trimmed", job, dial=Dial(1.4))
    ratio = counted(Way("whole", 5), job) / counted(trimmed, job)
    assert ratio == pytest.approx(trimmed.speedup, rel=0.01)
    assert ratio == pytest.approx(1.4, rel=0.03)


def test_counted_flops_match_the_work_that_the_report_states():
    # every cost but attention is linear in the tokens, so the count lies between the two laws
    job = Job("t2v", held_out_scenes(1, seed=3), 0, 5)
    trimmed = Trimmed("paper", job, paper(0.7, alpha=1.0))
    ratio = counted(trimmed, job) / counted(Way("whole", 5), job)
    # 4 of 16 blocks run on all 36 tokens of a latent frame, the others on 22, 23, 25, 27 and 29
    share = np.mean([kept / 36 for kept in (22, 23, 25, 27, 29)])
    linear = (4 + 12 * share) / 16
    quadratic = (4 + 12 * share**2) / 16
    assert quadratic < ratio < linear


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
    assert flicker(video, calm_places(video)) < 0.001
    noisy = video + 0.05 * (np.arange(17) % 2).reshape(-1, 1, 1, 1)
    assert flicker(noisy, calm_places(noisy)) == pytest.approx(0.05, rel=0.1)


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
    heads = HeadPlan(((FULL, FRAME), ("tile2", OFF), (FULL,) * 2, (FULL,) * 2), ((FULL,) * 2,) * 4)
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
    failed = record_text(Record())
    assert failed.startswith("The run did not finish") and "as planned" not in failed
    untouched = Record("Wan", planned="nothing trimmed", finished=True, seconds=3.25)
    assert "ran untouched, 3.2 s in all" in record_text(untouched)
