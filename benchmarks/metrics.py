"""What a trimmed video is worth against the dense video of the same seed, and how sure that is.

Videos are float arrays [pixel_frames, h, w, 3] in 0..1. A row is one video's figures (`measure`);
rows are put together, and two sets of rows are compared, by a bootstrap that resamples prompts,
because two seeds of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..methods.video_metrics import SSIM_WINDOW, flicker, motion, motion_ratio, psnr, ssim
from ..toy.detector import MIN_PIXELS, Detection, classify_pixels, detect
from ..toy.metrics import still_ground
from ..toy.world import COLOURS, RADIUS_RANGE, SPEEDS, Scene

# equal videos have an infinite PSNR, which no mean survives
MAX_DB = 100.0
# pixels from an object's centre to the edge of its crop
REACH = int(RADIUS_RANGE[1]) + 3
# pixels per pixel_frame; the detector names a direction even for what stands still
MIN_SPEED = 0.25 * min(SPEEDS.values())
# how far outside of 0..1 rounding may take a value
SLACK = 1e-3
CONFIDENCE = 0.95


def measure(
    video: np.ndarray,
    dense: np.ndarray,
    scene: Scene | None = None,
    first_image: np.ndarray | None = None,
) -> dict[str, float]:
    """The figures of one video [pixel_frames, h, w, 3], `dense` being the same seed untrimmed.

    Every figure is finite, and what could not be found counts as wrong:

    - `psnr_db` and `ssim` (Wang et al. 2004, 7x7 windows, mean over pixel frames) against
      `dense`; PSNR is at most 100 dB
    - `motion` and `dense_motion`: mean absolute change per pixel frame; 0 for a single one
    - `flicker`: the same on the background only
    - `subject_consistency` and `background_consistency`: see the functions of these names;
      with a scene of several objects, the subject is the mean over its objects
    - with `scene`: `colour_ok`, `shape_ok`, `direction_ok`, the share of its objects that are
      right (0 or 1 for one object; what stands still has no direction), and `speed_error`,
      |speed - asked| / asked, 1 for an object that was not detected, mean over the objects
    - with `first_image` [h, w, 3], which I2V was given: `first_frame_db`, the PSNR of the first
      pixel frame against it

    Detection needs a path, so nothing is ever detected in a single pixel frame.

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
        "flicker": flicker(video, still_ground(video)),
    }
    # one object may have any colour; of several, each is looked for by its own
    several = scene is not None and len(scene.objects) > 1
    wanted = [obj.colour for obj in scene.objects] if several else [None]
    found = [detect(video, colour) for colour in wanted]
    row["subject_consistency"] = float(np.mean([_steadiness(video, seen) for seen in found]))
    row["background_consistency"] = background_consistency(video)
    if scene is not None:
        row |= _adherence(found, scene)
    if first_image is not None:
        image = _checked(first_image, "first_image", video.shape[1:])
        row["first_frame_db"] = _capped_psnr(video[0], image)
    return row


def subject_consistency(video: np.ndarray, colour: str | None = None) -> float:
    """How well an object keeps its look in a video [pixel_frames, h, w, 3]; 1 is the same always.

    The form is VBench's (arXiv 2311.17982): the mean over the later pixel frames of the
    likeness to the first and to the previous one, half each. VBench compares DINO features;
    here two crops, centred on the detected path and black outside of the object, are compared by
    the light they share, 2 sum(min(a, b)) / sum(a + b) over pixels and channels: 1 for equal
    crops, lower for another colour, brightness, shape or size, 0 for nothing in common.

    The object is `colour`'s or, without one, the largest. A pixel frame where it is not seen, for
    instance because it has become another colour of the palette, is like no other. 0 when there
    is no object at all. Being hidden by another object, or leaving the picture, lowers it too.
    """
    return _steadiness(np.asarray(video, np.float32), detect(video, colour))


def background_consistency(video: np.ndarray) -> float:
    """How well the background of a video [pixel_frames, h, w, 3] stays; 1 is the same always.

    VBench's form (arXiv 2311.17982) as in `subject_consistency`, without its CLIP features: the
    likeness of two pixel frames is 1 - mean |a - b| over the pixels that are background in both,
    and 0 when there are none. A single pixel frame is like itself.
    """
    video = np.asarray(video, np.float32)
    ground = classify_pixels(video) < 0

    def likeness(one: int, other: int) -> float:
        both = ground[one] & ground[other]
        if not both.any():
            return 0.0
        return 1 - float(np.abs(video[one][both] - video[other][both]).mean())

    return _first_and_previous(likeness, len(video))


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


def tied(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[int] | None,
    resamples: int = 2000,
    seed: int = 0,
) -> bool:
    """True when `a` and `b` cannot be told apart: 0 lies in the interval of `difference`."""
    _, low, high = difference(a, b, clusters, seed, resamples)
    return low <= 0 <= high


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


def _adherence(found: list[Detection | None], scene: Scene) -> dict[str, float]:
    rows = []
    for seen, obj in zip(found, scene.objects, strict=True):
        if seen is None:
            rows.append({"colour_ok": 0, "shape_ok": 0, "direction_ok": 0, "speed_error": 1})
            continue
        row = seen.matches(obj)
        row["direction_ok"] &= seen.speed >= MIN_SPEED
        asked = SPEEDS[obj.speed]
        rows.append({**row, "speed_error": abs(seen.speed - asked) / asked})
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def _steadiness(video: np.ndarray, seen: Detection | None) -> float:
    if seen is None:
        return 0.0
    masks = classify_pixels(video) == list(COLOURS).index(seen.colour)
    # the rule by which `detect` made the path
    frames = np.flatnonzero(masks.sum((1, 2)) >= MIN_PIXELS)
    crops = np.zeros((len(video), 2 * REACH + 1, 2 * REACH + 1, 3), np.float32)
    for index, centre in zip(frames, seen.path, strict=True):
        crops[index] = _crop(video[index] * masks[index, ..., None], centre)

    def likeness(one: int, other: int) -> float:
        light = crops[one].sum() + crops[other].sum()
        return 2 * float(np.minimum(crops[one], crops[other]).sum() / light) if light else 0.0

    return _first_and_previous(likeness, len(video))


def _crop(picture: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """[2 REACH + 1, 2 REACH + 1, 3] around `centre` (x, y), between pixels by interpolation."""
    padded = np.pad(picture, ((REACH, REACH + 1), (REACH, REACH + 1), (0, 0)))
    (x, y), (fx, fy) = np.floor(centre).astype(int), centre % 1
    size = 2 * REACH + 1
    window = padded[y : y + size + 1, x : x + size + 1]
    rows = (1 - fy) * window[:-1] + fy * window[1:]
    return (1 - fx) * rows[:, :-1] + fx * rows[:, 1:]


def _first_and_previous(likeness, pixel_frames: int) -> float:
    if pixel_frames == 1:
        return 1.0
    later = range(1, pixel_frames)
    return float(np.mean([(likeness(0, t) + likeness(t - 1, t)) / 2 for t in later]))


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
