"""What a trimmed video is worth against the dense video of the same seed, and how sure that is.

Videos are float arrays [pixel_frames, h, w, 3] in 0..1. A row is one video's figures (`measure`);
rows are put together, and two sets of rows are compared, by a bootstrap that resamples prompts,
because two seeds of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..report.video_metrics import SSIM_WINDOW, motion, motion_ratio, psnr, ssim

# equal videos have an infinite PSNR, which no mean survives
MAX_DB = 100.0
# how far outside of 0..1 rounding may take a value
SLACK = 1e-3
CONFIDENCE = 0.95


def measure(
    video: np.ndarray,
    dense: np.ndarray,
    read: Callable[[np.ndarray], dict[str, bool]] | None = None,
    first_image: np.ndarray | None = None,
) -> dict[str, float]:
    """The figures of one video [pixel_frames, h, w, 3], `dense` being the same seed untrimmed.

    Every figure is finite:

    - `psnr_db` and `ssim` (Wang et al. 2004, 7x7 windows, mean over pixel frames) against
      `dense`; PSNR is at most 100 dB
    - `motion` and `dense_motion`: mean absolute change per pixel frame; 0 for a single one
    - with `read`, which tells what of its prompt a video shows: its figures, 0 or 1
    - with `first_image` [h, w, 3], which I2V was given: `first_frame_db`, the PSNR of the first
      pixel frame against it

    Raises:
        ValueError: shapes that differ or are no video of at least 7x7 pixels, or values that are
            not in 0..1.
    """
    video = np.asarray(video, np.float32)
    if video.ndim != 4 or not len(video) or min(video.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            "expected a video [pixel_frames, h, w, 3] of at least one pixel frame with h and w of "
            f"{SSIM_WINDOW} or more, got {list(video.shape)}"
        )
    video = _checked(video, "video", (*video.shape[:3], 3))
    dense = _checked(dense, "dense", video.shape)
    row = {
        "psnr_db": _capped_psnr(video, dense),
        "ssim": ssim(video, dense),
        "motion": motion(video),
        "dense_motion": motion(dense),
    }
    if read is not None:
        row |= {name: float(right) for name, right in read(video).items()}
    if first_image is not None:
        image = _checked(first_image, "first_image", video.shape[1:])
        row["first_frame_db"] = _capped_psnr(video[0], image)
    return row


def summarise(
    rows: Sequence[dict[str, float]],
    clusters: Sequence[int] | None,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, float]:
    """The rows of `measure` as one: the mean of every figure over the videos, and three more.

    `motion_ratio` is mean motion / mean dense motion, the dynamic degree relative to dense (1 when
    neither moves, infinite when only dense stands still). `psnr_lo` and `psnr_hi` bound the mean
    PSNR (dB): a 95% percentile bootstrap over prompts, as in `difference`.

    Args:
        rows: one per video, all with the same figures.
        clusters: the prompt's number of every row; None when no two rows share a prompt.
        seed: of the resampling; the result is a function of the arguments.
        resamples: how often the prompts are drawn anew.

    Raises:
        ValueError: no rows, rows with different figures, or not one cluster per row.
    """
    if not rows:
        raise ValueError("expected at least one row of measure(), got none")
    for index, row in enumerate(rows):
        if differs := sorted(row.keys() ^ rows[0].keys()):
            raise ValueError(
                f"expected the same figures in every row, but rows 0 and {index} differ in "
                f"{', '.join(differs)}; summarise T2V and I2V apart"
            )
    result = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    result["motion_ratio"] = motion_ratio(result["motion"], result["dense_motion"])
    _, result["psnr_lo"], result["psnr_hi"] = _bootstrap(
        [row["psnr_db"] for row in rows], clusters, seed, resamples
    )
    return result


def difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[int] | None,
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[float, float, float]:
    """Mean of a - b, and the ends of its 95% interval by a paired bootstrap over prompts.

    `a` and `b` hold one figure of the same videos (prompt and seed) in the same order, `clusters`
    the prompt's number of each; None when no two share a prompt. Whole prompts are drawn with
    replacement, with all their seeds. One prompt says nothing about others: its interval is
    (-inf, inf). A percentile interval is somewhat narrow below about 20 prompts.

    Raises:
        ValueError: lengths that differ, no values, or values that are not finite.
    """
    if len(a) != len(b):
        raise ValueError(
            f"expected a and b of the same videos, got {len(a)} and {len(b)} values; "
            "leave out what only one of them has"
        )
    return _bootstrap(np.subtract(a, b), clusters, seed, resamples)


def _checked(picture: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    picture = np.asarray(picture, np.float32)
    if picture.shape != shape:
        raise ValueError(
            f"expected {name} to be {list(shape)}, got {list(picture.shape)}; "
            "videos are [pixel_frames, h, w, 3], and all of one call have the same size"
        )
    low, high = picture.min(), picture.max()
    # written so that nan fails as well
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise ValueError(
            f"expected {name} in 0..1, got {low:.4g} to {high:.4g}; "
            "divide bytes by 255, clamp a decoder's output; nan means that sampling diverged"
        )
    return picture


def _capped_psnr(video: np.ndarray, reference: np.ndarray) -> float:
    return min(psnr(video, reference), MAX_DB)


def _bootstrap(
    values: Sequence[float], clusters: Sequence[int] | None, seed: int, resamples: int
) -> tuple[float, float, float]:
    values = np.asarray(values, np.float64)
    clusters = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    if not len(values) or clusters.shape != values.shape:
        raise ValueError(
            "expected at least one value and the number of its prompt for each, "
            f"got {len(values)} values and {len(clusters)} clusters"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"expected finite values, got {values[~np.isfinite(values)][0]}")
    mean = float(values.mean())
    _, prompt = np.unique(clusters, return_inverse=True)
    counts = np.bincount(prompt)
    if len(counts) < 2:
        return mean, -np.inf, np.inf
    sums = np.bincount(prompt, weights=values)
    drawn = np.random.default_rng(seed).integers(0, len(counts), (resamples, len(counts)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return mean, float(low), float(high)
