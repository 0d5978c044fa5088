"""PSNR, SSIM, motion and flicker on videos whose figures are known."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from wantrim.report.video_metrics import (
    SSIM_WINDOW,
    calm_places,
    changes,
    flicker,
    motion,
    motion_ratio,
    psnr,
    ssim,
)

RNG = np.random.default_rng(3)


def noise(*shape: int, dtype=np.float32) -> np.ndarray:
    return RNG.random(shape).astype(dtype)


@pytest.mark.parametrize("size", [(7, 7), (7, 31), (40, 23)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ssim_is_skimages(size, dtype):
    video, reference = noise(3, *size, 3, dtype=dtype), noise(3, *size, 3, dtype=dtype)
    # from far away to close
    for share in (1.0, 0.3, 0.01):
        other = (1 - share) * reference + share * video
        options = {"win_size": SSIM_WINDOW, "data_range": 1.0, "channel_axis": -1}
        pairs = zip(other.astype(np.float64), reference.astype(np.float64), strict=True)
        expected = np.mean([structural_similarity(a, b, **options) for a, b in pairs])
        assert ssim(other, reference) == pytest.approx(expected, abs=1e-9)
    assert ssim(reference, reference) == pytest.approx(1, abs=1e-12)


def test_psnr_of_a_known_error():
    dense = torch.full((4, 8, 8, 3), 0.5)
    assert psnr(dense, dense) == math.inf
    assert psnr(dense + 0.1, dense) == pytest.approx(20, abs=1e-4)
    # half of the frames a tenth off: half the error
    half = dense.clone()
    half[:2] += 0.1
    assert psnr(half, dense) == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)


def test_motion_of_a_known_change():
    video = np.zeros((3, 4, 4, 3), np.float32)
    video[1, 0] = 0.5
    # a quarter of the rows changes by 0.5, there and back
    assert motion(video) == pytest.approx(0.125)
    assert changes(video).shape == (2, 4, 4)
    assert motion(video[:1]) == 0.0
    assert motion_ratio(0.2, 0.4) == 0.5
    assert motion_ratio(0.0, 0.0) == 1.0 and motion_ratio(0.1, 0.0) == math.inf


def test_flicker_is_change_where_a_picture_should_stand_still():
    # the upper half moves, the lower one stands still
    dense = torch.zeros(5, 8, 8, 3)
    dense[:, :4] = torch.linspace(0, 1, 5).view(5, 1, 1, 1)
    calm = calm_places(dense)
    assert torch.equal(calm[:, 4:], torch.ones(4, 4, 8, dtype=torch.bool)) and not calm[:, :4].any()
    assert flicker(dense, calm) == 0.0
    flickering = dense.clone()
    flickering[1::2, 4:] += 0.1
    assert flicker(flickering, calm) == pytest.approx(0.1)
    # what moves more is not flicker
    assert flicker(dense.flip(0) * 2, calm) == 0.0
    assert flicker(dense, torch.zeros_like(calm)) == 0.0
    assert flicker(dense[:1], calm_places(dense[:1])) == 0.0


def test_calm_places_of_a_video_that_moves_everywhere_are_its_calmer_half():
    video = torch.from_numpy(noise(6, 16, 16, 3))
    assert 0.45 < calm_places(video).float().mean() < 0.55
