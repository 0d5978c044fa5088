"""The second toy world's truth must be readable: grammar, camera, light, and what is in front."""

import itertools

import numpy as np
import pytest
import torch

from wantrim.toy import render2
from wantrim.toy.batches import image_condition
from wantrim.toy.detector2 import classify_pixels, find_camera, find_object, read_scene
from wantrim.toy.render2 import Motion, draw_motion, render, times_of
from wantrim.toy.text import TEXT_DIM, TEXT_TOKENS, encode_prompt
from wantrim.toy.world import DIRECTIONS, MAX_OBJECTS, SHAPES
from wantrim.toy.world2 import (
    CAMERAS,
    COLOURS,
    HEIGHT,
    PIXEL_FRAMES,
    WIDTH,
    Object,
    Scene,
    held_out_scenes,
    parse_prompt,
    random_scene,
)
from wantrim.toy.worlds import SECOND

SINGLES = [
    Scene((Object(*words),), camera)
    for *words, camera in itertools.product(COLOURS, SHAPES, DIRECTIONS, CAMERAS)
]
TRUTH_SCENES = 34
RIGHT = {"colour_ok": True, "shape_ok": True, "direction_ok": True, "camera_ok": True}


@pytest.fixture(scope="module")
def truth() -> list[tuple[Scene, np.ndarray]]:
    rng = np.random.default_rng(77)
    scenes = [random_scene(rng) for _ in range(TRUTH_SCENES)]
    return [(scene, render(scene, rng)) for scene in scenes]


@pytest.fixture(scope="module")
def cloth() -> np.ndarray:
    """A soft gray picture [400, 400] that is not made by the renderer."""
    noise = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(3))
    size = (400, 400)
    return torch.nn.functional.interpolate(noise, size, mode="bicubic")[0, 0].numpy() * 0.3 + 0.3


def panned(cloth: np.ndarray, x: int, y: int, side: int = 128) -> np.ndarray:
    """A view over the cloth that moves by whole pixels a pixel frame."""
    left = [132 + x * (t - 8) for t in range(PIXEL_FRAMES)]
    top = [132 + y * (t - 8) for t in range(PIXEL_FRAMES)]
    views = [cloth[v : v + side, u : u + side] for u, v in zip(left, top, strict=True)]
    return np.repeat(np.stack(views)[..., None], 3, -1).astype(np.float32)


def through_vae(video: np.ndarray, vae) -> np.ndarray:
    latents = vae.encode(torch.from_numpy(video).permute(3, 0, 1, 2)[None])
    return vae.decode(latents)[0].permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("vae", [None, SECOND.load_vae()], ids=["pixels", "vae"])
def test_detector_reads_the_truth(truth, vae):
    rows = [read_scene(through_vae(v, vae) if vae else v, scene) for scene, v in truth]
    for key in RIGHT:
        assert sum(row[key] for row in rows) >= 0.97 * TRUTH_SCENES, key


@pytest.mark.parametrize("objects", [2, 3])
def test_detector_reads_several_objects(objects):
    rng = np.random.default_rng(objects)
    scenes = [random_scene(rng, objects) for _ in range(8)]
    rows = [read_scene(render(scene, rng), scene) for scene in scenes]
    assert all(sum(row[key] for row in rows) >= 7 for key in RIGHT)


def test_detector_contradicts_what_is_not_shown(truth):
    scene, video = truth[0]
    (obj,) = scene.objects
    others = {
        "shape_ok": Object(
            obj.colour, "cross" if obj.shape != "cross" else "circle", obj.direction
        ),
        "direction_ok": Object(
            obj.colour, obj.shape, "left" if obj.direction != "left" else "right"
        ),
    }
    for key, other in others.items():
        assert read_scene(video, Scene((other,), scene.camera)) == RIGHT | {key: False}
    for camera in CAMERAS:
        seen = read_scene(video, Scene((obj,), camera))
        assert seen["camera_ok"] == (camera == scene.camera)


@pytest.mark.parametrize(
    ("x", "y", "name"),
    [
        (0, 0, "holds"),
        (3, 0, "pans right"),
        (-1, 0, "pans left"),
        (0, 2, "pans down"),
        (0, -4, "pans up"),
    ],
)
def test_a_pan_is_named_by_the_way_the_view_goes(cloth, x, y, name):
    camera = find_camera(panned(cloth, x, y))
    assert camera.name == name
    assert np.allclose(camera.motion.pan, (x, y), atol=0.3)
    assert camera.correlation > 0.95


def test_light_that_changes_does_not_move_the_camera(cloth):
    video = panned(cloth, 2, 0)
    lamp = np.linspace(0.6, 1.4, PIXEL_FRAMES, dtype=np.float32)[:, None, None, None]
    camera = find_camera(np.clip(video * lamp, 0, 1))
    assert camera.name == "pans right"


def test_growing_ground_is_a_zoom_in():
    scene = parse_prompt("a red circle moving left, the camera zooms in")
    video = render(scene, np.random.default_rng(1))
    assert find_camera(video).motion.rate > 0.004
    backwards = find_camera(np.ascontiguousarray(video[::-1]))
    assert backwards.name == "zooms out"


def test_noise_has_no_camera_and_no_object():
    rng = np.random.default_rng(0)
    noise = rng.uniform(0.4, 0.6, (PIXEL_FRAMES, 96, 96, 3)).astype(np.float32)
    assert find_camera(noise) is None
    assert find_object(classify_pixels(noise), None) is None
    scene = SINGLES[0]
    assert not any(read_scene(noise, scene).values())


def test_direction_is_on_the_ground_not_in_the_picture(cloth):
    # the object keeps its place in the picture while the view goes right: it moves right too
    video = panned(cloth, 2, 0)
    video[:, 50:80, 50:80] = COLOURS["red"]
    scene = parse_prompt("a red square moving right, the camera pans right")
    assert read_scene(video, scene) == RIGHT
    # one that falls back in the picture by less than the view goes on still moves right
    video = panned(cloth, 3, 0)
    for t in range(PIXEL_FRAMES):
        video[t, 50:80, 80 - t : 110 - t] = COLOURS["blue"]
    camera = find_camera(video)
    seen = find_object(classify_pixels(video), camera)
    assert (seen.colour, seen.direction) == ("blue", "right")
    assert np.allclose(seen.velocity, (2, 0), atol=0.2)
    assert find_object(classify_pixels(video), None).direction == "left"


def test_an_object_that_is_crossed_keeps_its_shape(cloth):
    # green is in front and passes over red
    video = panned(cloth, 0, 0)
    for t in range(PIXEL_FRAMES):
        video[t, 40:76, 30 + t : 66 + t] = COLOURS["red"]
        video[t, 50:66, 100 - 4 * t : 116 - 4 * t] = COLOURS["green"]
    scene = parse_prompt(
        "a green square moving left and a red square moving right, the camera holds"
    )
    assert read_scene(video, scene) == RIGHT


def test_every_prompt_is_parsed_back():
    assert len(SINGLES) == 560
    assert all(parse_prompt(scene.prompt()) == scene for scene in SINGLES)
    for objects in (2, 3):
        scene = random_scene(np.random.default_rng(objects), objects)
        assert parse_prompt(scene.prompt().upper().replace(",", " ")) == scene


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "a white circle moving left, the camera holds",
        "a red circle moving left slowly, the camera holds",
        "a red star moving left, the camera holds",
        "a red circle moving away, the camera holds",
        "a red circle moving left, the camera shakes",
        "a red circle moving left",
        " and ".join(["a red circle moving left"] * (MAX_OBJECTS + 1)) + ", the camera holds",
    ],
)
def test_a_bad_prompt_is_told_the_words(prompt):
    with pytest.raises(ValueError, match="second toy world does not know the prompt") as caught:
        parse_prompt(prompt)
    for word in (*COLOURS, *SHAPES, *DIRECTIONS, *CAMERAS):
        assert word in str(caught.value)


def test_held_out_scenes_are_many_and_stable():
    assert sum(scene.held_out for scene in SINGLES) == 78
    scenes = held_out_scenes(64)
    assert len({scene.prompt() for scene in scenes}) == 64
    assert held_out_scenes(64) == scenes
    assert all(scene.held_out for scene in scenes)


def test_the_longest_prompt_fits_and_every_prompt_is_its_own():
    scene = random_scene(np.random.default_rng(0), MAX_OBJECTS)
    used = len(scene.prompt().replace(" and ", " ").split())
    embedding = encode_prompt(scene.prompt(), parse_prompt)
    assert embedding.shape == (TEXT_TOKENS, TEXT_DIM)
    assert embedding[:used].abs().sum(1).min() > 0
    assert not embedding[used:].any()
    embeddings = torch.stack([SECOND.encode(scene.prompt()) for scene in SINGLES]).flatten(1)
    assert len(torch.unique(embeddings, dim=0)) == len(SINGLES)


def test_a_video_is_a_function_of_the_seed_and_leaves_the_rest_open():
    scene = SINGLES[5]
    first = render(scene, np.random.default_rng(3))
    assert first.shape == (PIXEL_FRAMES, HEIGHT, WIDTH, 3)
    assert first.dtype == np.float32
    assert first.min() >= 0 and first.max() <= 1
    assert np.array_equal(first, render(scene, np.random.default_rng(3)))
    assert np.abs(first - render(scene, np.random.default_rng(4))).mean() > 0.03


@pytest.mark.parametrize(("width", "height"), [(128, 96), (63, 40), (8, 8)])
def test_odd_sizes_render(width, height):
    rng = np.random.default_rng(0)
    for objects in (1, 2, 3):
        video = render(random_scene(rng, objects), rng, width, height)
        assert video.shape == (PIXEL_FRAMES, height, width, 3)
        assert np.isfinite(video).all()


def test_everything_changes_when_the_camera_moves():
    def changed(camera: str) -> float:
        scene = parse_prompt(f"a red circle moving left, the camera {camera}")
        video = render(scene, np.random.default_rng(0))
        # over a latent frame, by more than the light drifts
        return float((np.abs(video[12] - video[8]).max(-1) > 0.04).mean())

    for camera in CAMERAS:
        assert (changed(camera) > 0.35) == (camera != "holds"), camera


def test_places_on_the_ground_and_in_the_picture_are_inverse():
    rng, times = np.random.default_rng(0), times_of(17)
    for camera in CAMERAS:
        motion = draw_motion(camera, rng)
        places, centre = rng.uniform(0, 192, (17, 2)), np.array([95.5, 60.0])
        seen = motion.to_picture(places, times, centre)
        assert np.allclose(motion.to_ground(seen, times, centre), places)
    # a view that goes right shows what stands still further and further left
    seen = Motion(np.array([2.0, 0.0]), 0.0).to_picture(np.zeros((17, 2)), times, np.zeros(2))
    assert np.allclose(np.diff(seen[:, 0]), -2)


def test_objects_stay_in_the_picture():
    rng, times = np.random.default_rng(9), times_of(PIXEL_FRAMES)
    size = np.array([WIDTH, HEIGHT])
    for index in range(60):
        scene = random_scene(rng, 1 + index % 3)
        motion, paths, radii = render2._place(scene, rng, times, size)
        for path, radius in zip(paths, radii, strict=True):
            reach = (radius * motion.scale(times))[:, None]
            assert (path - reach > -0.01).all() and (path + reach < size - 0.99).all()


def test_textures_are_long_enough_for_the_vae(truth):
    vae = SECOND.load_vae()
    noise = [float(((through_vae(video, vae) - video) ** 2).mean()) for _, video in truth[:8]]
    assert -10 * np.log10(np.mean(noise)) > 31
    latents = vae.encode(
        torch.from_numpy(np.stack([v for _, v in truth[:8]])).permute(0, 4, 1, 2, 3)
    )
    assert 0.6 < latents.std() < 1.4
    condition = image_condition(vae, torch.rand(1, 3, 192, 192), PIXEL_FRAMES)
    assert condition.shape == (1, 20, *SECOND.latent_size())
