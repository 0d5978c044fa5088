"""WanTrim Compare on videos whose differences are known."""

import json
import math

import numpy as np
import pytest
import torch

import comfy.model_management
import comfy.utils
from wantrim.nodes.compare import WanTrimCompare
from wantrim.report import compare
from wantrim.report.compare import GAP
from wantrim.report.picture import small

FRAMES, HEIGHT, WIDTH = 9, 32, 48


def moving(step: int = 2, light: float = 0.9) -> torch.Tensor:
    """A bright square on a still, textured ground."""
    generator = torch.Generator().manual_seed(1)
    ground = 0.3 + 0.2 * torch.rand(1, HEIGHT, WIDTH, 3, generator=generator)
    video = ground.repeat(FRAMES, 1, 1, 1)
    for index in range(FRAMES):
        left = 2 + step * index
        video[index, 8:20, left : left + 12] = light
    return video


def noisy(video: torch.Tensor, sigma: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return video + sigma * torch.randn(video[:1].shape, generator=generator)


def run(dense, trimmed) -> tuple[str, torch.Tensor, torch.Tensor, dict]:
    text, clip, picture, figures = WanTrimCompare.execute(dense, trimmed).result
    return text, clip, picture, json.loads(figures)


def test_it_shows_how_far_it_is_and_can_be_cancelled(monkeypatch):
    moved = []

    def cancel(now, total, *_, **__):
        moved.append((now, total))
        comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(moving(), moving())
    assert moved[0] == (1, FRAMES) and len(moved) < FRAMES


def test_equal_videos():
    dense = moving()
    text, clip, picture, figures = run(dense, dense.clone())
    assert text == figures["verdict"] == "The two videos are equal in every pixel."
    assert figures["equal"] and figures["psnr_db"] is None
    assert figures["ssim"] == pytest.approx(1) and figures["motion_ratio"] == 1
    assert clip.shape == (FRAMES, HEIGHT, 2 * WIDTH + GAP, 3)
    assert picture.shape[0] == 1 and picture.shape[2:] == (960, 3)


def test_the_whole_one_is_left_and_the_trimmed_one_right():
    dense, trimmed = moving(), moving(1)
    clip = run(dense, trimmed)[1]
    assert torch.equal(clip[:, :, :WIDTH], dense) and torch.equal(clip[:, :, -WIDTH:], trimmed)


@pytest.mark.parametrize(
    ("sigma", "words"),
    [(0.005, "Very close"), (0.02, "Close"), (0.06, "Clearly another"), (0.25, "Another video")],
)
def test_the_verdict_follows_the_distance(sigma, words):
    dense = moving()
    text, _, _, figures = run(dense, noisy(dense, sigma))
    assert figures["psnr_db"] == pytest.approx(-20 * math.log10(sigma), abs=0.3)
    assert text.startswith(words)
    # a still noise neither moves nor flickers
    assert text.endswith("motion and flicker are the whole one's.")


def test_motion_that_is_lost_or_added_is_said():
    dense = moving()
    frozen = dense[:1].repeat(FRAMES, 1, 1, 1)
    text, _, _, figures = run(dense, frozen)
    assert figures["motion_ratio"] == 0 and "moves less (0.00 x the motion)" in text
    text, _, _, figures = run(frozen, dense)
    assert figures["motion_ratio"] is None and "moves where the whole one stands still" in text
    assert "moves more" in run(moving(1), moving(2))[0]


def test_flicker_is_said_and_measured_where_dense_is_calm():
    dense = moving()
    flickering = dense.clone()
    flickering[1::2, 24:] += 0.02
    text, _, _, figures = run(dense, flickering)
    assert figures["dense_flicker"] == 0 and "calm places flicker more" in text
    # a quarter of the rows flickers, among the calm places that are most of the picture
    assert 0.005 < figures["flicker"] < 0.01
    # more motion of what moves is no flicker
    assert "flicker more" not in run(moving(light=0.6), dense)[0]


def test_the_worst_frame_is_named_and_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        compare, "small", lambda frame, *size: drawn.append(frame) or small(frame, *size)
    )
    dense = moving()
    broken = noisy(dense, 0.005)
    # it is not among those that are drawn of a video of nine
    broken[4] = 1 - dense[4]
    text, _, _, figures = run(dense, broken)
    assert figures["worst_frame"] == 4 and "frame 5 is far worse" in text
    assert any(np.array_equal(frame, broken[4].clamp(0, 1)) for frame in drawn)
    assert len(figures["frame_psnr_db"]) == FRAMES


def test_a_single_picture_and_one_with_a_mask():
    dense = torch.rand(1, 16, 16, 4)
    text, clip, _, figures = run(dense, dense * 0.9)
    assert clip.shape == (1, 16, 32 + GAP, 3)
    assert figures["motion"] == figures["flicker"] == 0 and figures["motion_ratio"] == 1
    assert "motion" not in text and text.splitlines()[0].endswith(")."), text


@pytest.mark.parametrize(
    ("dense", "trimmed", "said"),
    [
        (
            (9, 32, 48, 3),
            (5, 32, 48, 3),
            "'trimmed' is 5 frames of 48x32, the whole one 9 frames of 48x32. ",
        ),
        (
            (9, 32, 48, 3),
            (9, 48, 32, 3),
            "'trimmed' is 9 frames of 32x48, the whole one 9 frames of 48x32. ",
        ),
        ((1, 6, 8, 3), (1, 6, 8, 3), "'dense' is smaller than 7x7. "),
    ],
)
def test_sizes_that_do_not_fit_are_refused(dense, trimmed, said):
    with pytest.raises(ValueError, match="^WanTrim Compare: ") as caught:
        run(torch.rand(dense), torch.rand(trimmed))
    assert said in str(caught.value)


def test_a_video_of_no_numbers_is_refused_by_name():
    dense = moving()
    broken = dense.clone()
    broken[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="'trimmed' holds values that are no numbers"):
        run(dense, broken)
