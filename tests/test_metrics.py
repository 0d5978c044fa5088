"""Figures of the quality bench, on videos and numbers whose value is known beforehand."""

from functools import partial

import numpy as np
import pytest
import torch

from wantrim.benchmarks.metrics import difference, measure, summarise
from wantrim.toy.detector import read_scene
from wantrim.toy.held_out import held_out_scenes
from wantrim.toy.vae import ToyVAE
from wantrim.toy.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    PIXEL_FRAMES,
    Object,
    Scene,
    parse_prompt,
    render,
    render_background,
)

SIDE = 16
TRUTHS = 12
ADHERENCE = ("colour_ok", "shape_ok", "direction_ok")


def reader(scene: Scene):
    return partial(read_scene, scene=scene)


def tied(a, b, clusters) -> bool:
    """Cannot be told apart: 0 lies in the interval."""
    _, low, high = difference(a, b, clusters)
    return low <= 0 <= high


def slide(step: int = 2, colour: str = "red", ground: str = "black", frames: int = PIXEL_FRAMES):
    """A square with hard edges that goes `step` whole pixels to the right per pixel frame."""
    video = np.repeat(render_background(ground)[None], frames, 0)
    for index in range(frames):
        left = 4 + step * index
        video[index, 40 : 40 + SIDE, left : left + SIDE] = COLOURS[colour]
    return video


def noisy(video: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, video.shape)
    return np.clip(video + noise, 0, 1).astype(np.float32)


def still(video: np.ndarray) -> np.ndarray:
    return np.repeat(video[:1], len(video), 0)


def at_half_speed(video: np.ndarray) -> np.ndarray:
    return np.repeat(video, 2, 0)[: len(video)]


@pytest.fixture(scope="module")
def truth() -> list[tuple[Scene, np.ndarray]]:
    rng = np.random.default_rng(11)
    return [(scene, render(scene, rng)) for scene in held_out_scenes(TRUTHS, seed=5)]


# against the dense video


def test_psnr_of_a_known_offset():
    dense = slide(ground="gray") * 0.5
    # -10 log10(0.1^2), and of an offset in one of seventeen pixel frames
    assert measure(dense + 0.1, dense)["psnr_db"] == pytest.approx(20, abs=1e-4)
    once = dense.copy()
    once[3] += 0.1
    expected = 20 + 10 * np.log10(PIXEL_FRAMES)
    assert measure(once, dense)["psnr_db"] == pytest.approx(expected, abs=1e-3)


def test_equal_videos_are_perfect_and_finite():
    row = measure(slide(), slide())
    assert row["psnr_db"] == 100
    assert row["ssim"] == pytest.approx(1, abs=1e-6)
    # a mean over videos survives an equal one
    worse = measure(np.clip(slide() + 0.1, 0, 1), slide())
    mean = summarise([row, worse], None)["psnr_db"]
    assert mean == pytest.approx((100 + worse["psnr_db"]) / 2)


def test_ssim_of_flat_pictures_is_the_formula():
    half = np.full((2, 16, 16, 3), 0.5, np.float32)
    # (2ab + C1) / (a^2 + b^2 + C1) with C1 = (0.01 data_range)^2
    expected = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)
    assert measure(half + 0.1, half)["ssim"] == pytest.approx(expected, abs=1e-5)


def test_ssim_window_is_seven_pixels():
    dense = np.full((1, 32, 32, 3), 0.5, np.float32)
    video = dense.copy()
    video[0, 16, 16] = 0.9
    # 49 of the 26x26 windows hold the changed pixel; the variance is the sample's
    mean, variance = 0.5 + 0.4 / 49, 0.4**2 / 49
    luminance = (2 * 0.5 * mean + 1e-4) / (0.5**2 + mean**2 + 1e-4)
    hit = luminance * 9e-4 / (variance + 9e-4)
    expected = 1 - (1 - hit) * 49 / 26**2
    assert measure(video, dense)["ssim"] == pytest.approx(expected, abs=1e-5)


def test_ssim_falls_with_noise():
    dense = slide(ground="striped")
    values = [measure(noisy(dense, sigma), dense)["ssim"] for sigma in (0, 0.02, 0.08, 0.3)]
    assert values == sorted(values, reverse=True)
    assert values[1] < 0.99
    assert values[3] < 0.2


def test_ssim_is_the_mean_over_pixel_frames():
    dense = slide(frames=5)
    video = dense.copy()
    video[2:] = noisy(dense[2:], 0.1)
    single = [measure(video[i : i + 1], dense[i : i + 1])["ssim"] for i in range(5)]
    assert single[0] == pytest.approx(1, abs=1e-6)
    assert single[2] < 0.9
    assert measure(video, dense)["ssim"] == pytest.approx(np.mean(single), abs=1e-6)


# motion


@pytest.mark.parametrize("step", [1, 2, 4])
def test_motion_of_a_sliding_square(step):
    # the square leaves and enters `step` columns of 16 pixels per pixel frame
    change = np.abs(np.subtract(COLOURS["red"], BACKGROUNDS["black"])).sum()
    expected = 2 * step * SIDE * change / (96 * 96 * 3)
    row = measure(slide(step), slide(2))
    assert row["motion"] == pytest.approx(expected, rel=1e-4)
    assert row["dense_motion"] == pytest.approx(expected * 2 / step, rel=1e-4)


def test_half_speed_is_half_the_motion(truth):
    rows = [measure(at_half_speed(video), video) for _, video in truth]
    assert summarise(rows, None)["motion_ratio"] == pytest.approx(0.5, abs=0.02)


def test_motion_ratio_is_of_the_means():
    rows = [measure(slide(1), slide(2)), measure(slide(4), slide(4))]
    # (1 + 4) / (2 + 4); the mean of the ratios would be 3/4
    assert summarise(rows, None)["motion_ratio"] == pytest.approx(5 / 6, rel=1e-4)


def test_motion_ratio_without_dense_motion():
    frozen = still(slide())
    assert summarise([measure(frozen, frozen)], None)["motion_ratio"] == 1
    assert summarise([measure(slide(), frozen)], None)["motion_ratio"] == np.inf


def test_a_frozen_video_moves_nowhere(truth):
    # among them scenes that go left, which is what the detector says of no motion at all
    assert {scene.objects[0].direction for scene, _ in truth} == set(DIRECTIONS)
    for scene, video in truth:
        row = measure(still(video), video, reader(scene))
        assert row["motion"] == 0
        assert row["dense_motion"] > 0
        assert row["direction_ok"] == 0, scene.prompt()
        assert (row["colour_ok"], row["shape_ok"]) == (1, 1)


# against the prompt


def test_rendered_truth_is_right(truth):
    for scene, video in truth:
        row = measure(video, video, reader(scene))
        assert [row[key] for key in ADHERENCE] == [1, 1, 1], scene.prompt()


def test_truth_through_the_toy_vae_is_right(truth):
    vae = ToyVAE.load()
    for scene, video in truth[:6]:
        model_video = torch.from_numpy(video).permute(3, 0, 1, 2)[None]
        decoded = vae.decode(vae.encode(model_video))[0].permute(1, 2, 3, 0).numpy()
        row = measure(decoded, video, reader(scene), video[0])
        assert [row[key] for key in ADHERENCE] == [1, 1, 1], scene.prompt()
        assert 20 < row["psnr_db"] < 40
        assert 20 < row["first_frame_db"] < 100


def test_reversed_in_time_is_the_wrong_direction(truth):
    for scene, video in truth:
        row = measure(video[::-1], video, reader(scene))
        assert [row[key] for key in ADHERENCE] == [1, 1, 0], scene.prompt()


def test_recoloured_is_the_wrong_colour(truth):
    for scene, video in truth:
        obj = scene.objects[0]
        colour = "blue" if obj.colour == "red" else "red"
        asked = Scene(
            (Object(colour, obj.shape, obj.direction, obj.speed),),
            scene.background,
        )
        row = measure(video, video, reader(asked))
        assert [row[key] for key in ADHERENCE] == [0, 1, 1], scene.prompt()


def test_reshaped_is_the_wrong_shape():
    asked = parse_prompt("a red circle moving right slowly on a black background")
    row = measure(slide(), slide(), reader(asked))
    assert [row[key] for key in ADHERENCE] == [1, 0, 1]


def test_first_frame_is_the_given_image():
    video = slide(ground="gray") * 0.5
    other_later = video.copy()
    other_later[1:] = 0
    assert measure(other_later, video, first_image=video[0])["first_frame_db"] == 100
    wrong = measure(video, video, first_image=video[0] + 0.1)["first_frame_db"]
    assert wrong == pytest.approx(20, abs=1e-4)
    assert measure(video, video, first_image=video[-1])["first_frame_db"] < 40


def test_figures_are_those_that_were_asked_for():
    scene = parse_prompt("a red square moving right slowly on a black background")
    always = set(measure(slide(), slide()))
    assert not always & {*ADHERENCE, "first_frame_db"}
    row = measure(slide(), slide(), reader(scene), slide()[0])
    assert set(row) == always | {*ADHERENCE, "first_frame_db"}
    assert all(type(value) is float for value in row.values())


# awkward videos


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(17, 63, 65), (1, 96, 96), (2, 7, 7), (1, 7, 33), (5, 40, 129)]
)
@pytest.mark.parametrize("num_objects", [1, 3])
def test_awkward_sizes(frames, height, width, num_objects):
    rng = np.random.default_rng(0)
    scene = held_out_scenes(1, seed=3, num_objects=num_objects)[0]
    video = render(scene, rng, width, height)[:frames]
    # twice, so that the objects are also looked for where they are not
    for seen in (video, np.zeros_like(video)):
        row = measure(seen, video, reader(scene), video[0])
        assert all(np.isfinite(value) for value in row.values()), row


def test_a_single_pixel_frame_has_no_path():
    scene = parse_prompt("a red square moving right slowly on a black background")
    row = measure(slide(frames=1), slide(frames=1), reader(scene))
    assert row["motion"] == row["dense_motion"] == 0
    assert [row[key] for key in ADHERENCE] == [0, 0, 0]


def test_the_input_is_left_alone():
    scene = parse_prompt("a red square moving right slowly on a black background")
    video, dense = slide(), noisy(slide(), 0.05)
    before = video.copy(), dense.copy()
    measure(video, dense, reader(scene), dense[0])
    assert np.array_equal(video, before[0])
    assert np.array_equal(dense, before[1])


@pytest.mark.parametrize(
    ("video", "dense", "image", "said"),
    [
        (slide(), slide(frames=16), None, r"expected dense to be \[17, 96, 96, 3\], got \[16,"),
        (slide()[0], slide()[0], None, r"expected a video .* got \[96, 96, 3\]"),
        (slide()[:0], slide()[:0], None, r"at least one pixel frame .* got \[0, 96, 96, 3\]"),
        (slide()[:, :6], slide()[:, :6], None, r"7 or more, got \[17, 6, 96, 3\]"),
        (slide()[..., :1], slide()[..., :1], None, r"expected video to be .*, got \[17, 96, 96, 1"),
        (slide(), slide(), slide()[:1], r"expected first_image to be \[96, 96, 3\], got \[1, 96"),
        (slide() * 255, slide(), None, r"expected video in 0\.\.1, got .* to 2.*divide bytes"),
        (slide(), slide() * np.nan, None, r"expected dense in 0\.\.1, got nan"),
        (slide() - 0.5, slide(), None, r"expected video in 0\.\.1, got -0\.46"),
    ],
)
def test_what_is_no_video_is_refused(video, dense, image, said):
    with pytest.raises(ValueError, match=said):
        measure(video, dense, first_image=image)


# the bootstrap


def rows_of(values) -> list[dict[str, float]]:
    return [{"psnr_db": float(v), "motion": 1.0, "dense_motion": 2.0} for v in values]


def test_summary_is_the_means_and_an_interval():
    values = np.random.default_rng(0).normal(30, 2, 200)
    result = summarise(rows_of(values), None)
    assert set(result) == {
        *("psnr_db", "motion", "dense_motion", "motion_ratio", "psnr_lo", "psnr_hi")
    }
    assert result["psnr_db"] == pytest.approx(values.mean())
    assert (result["motion"], result["motion_ratio"]) == (1, 0.5)
    # of 200 independent values, the normal approximation is good
    half = 1.96 * values.std() / np.sqrt(200)
    assert result["psnr_lo"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert result["psnr_hi"] == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_summary_is_a_function_of_the_seed():
    rows = rows_of(np.random.default_rng(1).normal(30, 2, 12))
    clusters = [index // 2 for index in range(12)]
    first = summarise(rows, clusters)
    assert summarise(rows, clusters) == first
    other = summarise(rows, clusters, seed=1)
    assert other["psnr_lo"] != first["psnr_lo"]
    assert other["psnr_db"] == first["psnr_db"]
    # the numbers of the prompts are only names
    assert summarise(rows, [7 * c - 3 for c in clusters]) == first


def test_equal_values_have_no_spread():
    result = summarise(rows_of([31.7] * 9), [0, 0, 1, 1, 2, 2, 2, 2, 3])
    assert result["psnr_lo"] == pytest.approx(31.7, abs=1e-9)
    assert result["psnr_hi"] == pytest.approx(31.7, abs=1e-9)


def test_seeds_of_one_prompt_are_not_independent():
    rng = np.random.default_rng(2)
    by_prompt = rng.normal(30, 3, 40)
    values, clusters = np.repeat(by_prompt, 4), np.repeat(np.arange(40), 4)

    def width(values, clusters):
        result = summarise(rows_of(values), clusters)
        assert result["psnr_lo"] < result["psnr_db"] < result["psnr_hi"]
        return result["psnr_hi"] - result["psnr_lo"]

    # four equal seeds say no more than one: twice the width of four times as many prompts
    assert width(values, clusters) == pytest.approx(width(by_prompt, None), rel=0.05)
    assert width(values, clusters) / width(values, None) == pytest.approx(2, rel=0.1)
    # and the order of the rows says nothing
    order = rng.permutation(160)
    assert width(values[order], clusters[order]) == pytest.approx(width(values, clusters))


def test_whole_prompts_are_drawn():
    # three seeds of one prompt, one of the other: only the means 0, 1/4 and 1 can come out
    assert difference([0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]) == (0.25, 0, 1)
    # a prompt weighs as much as it has seeds, as in the mean: nine zeros for every one
    clusters = np.concatenate([np.repeat(np.arange(50), 9), np.arange(50, 100)])
    a = (clusters >= 50).astype(float)
    mean, low, high = difference(a, np.zeros(500), clusters)
    assert mean == pytest.approx(0.1)
    assert 0.06 < low < 0.1 < high < 0.16


def test_one_prompt_says_nothing_about_others():
    result = summarise(rows_of([30.0, 31.0]), [4, 4])
    assert (result["psnr_lo"], result["psnr_hi"]) == (-np.inf, np.inf)
    assert difference([1.0, 1.0], [0.0, 0.0], [4, 4]) == (1, -np.inf, np.inf)
    assert tied([1.0, 1.0], [0.0, 0.0], [4, 4])


def test_difference_is_paired():
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(20), 2)
    # 5 dB from prompt to prompt hide 0.3 dB, unless the same videos are compared
    base = np.repeat(rng.normal(30, 5, 20), 2) + rng.normal(0, 1, 40)
    better = base + 0.3 + rng.normal(0, 0.2, 40)
    mean, low, high = difference(better, base, clusters)
    assert mean == pytest.approx((better - base).mean())
    assert 0.15 < low < mean < high < 0.45
    assert not tied(better, base, clusters)
    assert not tied(base, better, clusters)
    assert tied(rng.permutation(better), base, clusters)
    back = difference(base, better, clusters)
    assert back == pytest.approx((-mean, -high, -low), abs=0.01)


def test_noise_ties():
    base = np.random.default_rng(4).normal(30, 5, 40)
    clusters = np.repeat(np.arange(20), 2)
    told_apart = 0
    for seed in range(60):
        rng = np.random.default_rng([5, seed])
        a, b = base + rng.normal(0, 1, 40), base + rng.normal(0, 1, 40)
        told_apart += not tied(a, b, clusters)
    # 5% of the time chance looks like a difference, a little more with 20 prompts
    assert told_apart <= 9
    assert tied(base, base, clusters)


def test_a_difference_that_rests_on_few_prompts_ties():
    # two of six prompts are better in all of their 10 seeds
    a = np.repeat([3.0, 2.0, 0.0, 0.0, -0.2, 0.0], 10)
    b = np.zeros(60)
    assert tied(a, b, np.repeat(np.arange(6), 10))
    assert not tied(a, b, None)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="expected a and b of the same videos, got 2 and 3 values"):
        tied([1, 2], [1, 2, 3], None)
    with pytest.raises(ValueError, match="got 2 values and 3 clusters"):
        difference([1, 2], [1, 2], [0, 1, 2])
    with pytest.raises(ValueError, match="got 0 values"):
        difference([], [], None)
    with pytest.raises(ValueError, match="expected finite values, got nan"):
        difference([1, np.nan], [1, 2], None)
    with pytest.raises(ValueError, match="expected finite values, got inf"):
        summarise(rows_of([30, np.inf]), None)
    with pytest.raises(ValueError, match="at least one row"):
        summarise([], None)
    mixed = [*rows_of([30]), {**rows_of([30])[0], "first_frame_db": 20.0}]
    with pytest.raises(ValueError, match="rows 0 and 1 differ in first_frame_db; summarise T2V"):
        summarise(mixed, None)
