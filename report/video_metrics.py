"""How far a video is from another of the same seed, and how it moves by itself.

Videos are torch tensors or arrays [pixel_frames, h, w, channels] in 0..1. These figures measure
difference, not beauty. The quality bench and WanTrim Compare share them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

# of SSIM, in pixels
SSIM_WINDOW = 7
# Wang et al. 2004, for values in 0..1
C1, C2 = 0.01**2, 0.03**2


def psnr(video, reference) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal videos."""
    video, reference = _tensor(video), _tensor(reference)
    pairs = zip(video, reference, strict=True)
    # frame by frame, because a double copy of a long video is large
    errors = [float((a.double() - b.double()).square().mean()) for a, b in pairs]
    error = sum(errors) / len(errors)
    return -10 * math.log10(error) if error else math.inf


def ssim(video, reference) -> float:
    """Structural similarity (Wang et al. 2004), mean over pixel frames and channels.

    Uniform 7x7 windows that lie inside of the picture and unbiased variances, as
    skimage.metrics.structural_similarity has them.
    """
    video, reference = _tensor(video), _tensor(reference)
    values = [_ssim(a, b) for a, b in zip(video, reference, strict=True)]
    return sum(values) / len(values)


def _ssim(picture: torch.Tensor, reference: torch.Tensor) -> float:
    x, y = (image.double().movedim(-1, 0)[None] for image in (picture, reference))

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(values, SSIM_WINDOW, stride=1)

    count = SSIM_WINDOW**2
    unbiased = count / (count - 1)
    mx, my = mean(x), mean(y)
    vx, vy = unbiased * (mean(x * x) - mx * mx), unbiased * (mean(y * y) - my * my)
    both = unbiased * (mean(x * y) - mx * my)
    above = (2 * mx * my + C1) * (2 * both + C2)
    below = (mx * mx + my * my + C1) * (vx + vy + C2)
    return float((above / below).mean())


def changes(video) -> torch.Tensor:
    """Mean absolute change of every pixel from one pixel frame to the next [pixel_frames - 1, h, w]."""
    video = _tensor(video)
    return (video[1:] - video[:-1]).abs().mean(-1)


def motion(video) -> float:
    """Mean absolute change from one pixel frame to the next; 0 for a single one."""
    change = changes(video)
    return float(change.mean(dtype=torch.float64)) if change.numel() else 0.0


def motion_ratio(moved: float, reference: float) -> float:
    """Motion relative to that of a reference; 1 when neither moves."""
    if reference:
        return moved / reference
    return math.inf if moved else 1.0


def calm_places(video) -> torch.Tensor:
    """The half of the places that changes least [pixel_frames - 1, h, w], with all that are equal."""
    change = changes(video)
    return change <= change.median() if change.numel() else change.bool()


def flicker(video, still) -> float:
    """Mean absolute change over time where a picture should stand still; 0 when it does nowhere.

    Args:
        still: bool [pixel_frames - 1, h, w], places that belong to what stands still.
    """
    change, still = changes(video), _tensor(still)
    return float(change[still].mean(dtype=torch.float64)) if still.any() else 0.0


def _tensor(video) -> torch.Tensor:
    # torch takes no array that runs backwards
    return torch.as_tensor(np.ascontiguousarray(video) if isinstance(video, np.ndarray) else video)
