"""The toy world is the ruler of every quality number: its truth must be readable."""

import itertools

import numpy as np
import pytest
import torch

from wantrim.toy.batches import image_condition
from wantrim.toy.detector import detect
from wantrim.toy.held_out import held_out_scenes
from wantrim.toy.text import TEXT_DIM, TEXT_TOKENS, encode_prompt
from wantrim.toy.vae import (
    ToyVAE,
    from_patches,
    from_wan_scale,
    to_patches,
    to_wan_scale,
)
from wantrim.toy.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    HEIGHT,
    MAX_OBJECTS,
    PIXEL_FRAMES,
    SHAPES,
    SPEEDS,
    WIDTH,
    Object,
    Scene,
    parse_prompt,
    random_scene,
    render,
    render_background,
    shape_distance,
)

TRUTH_SCENES = 200
SINGLES = [
    Scene((Object(*words),), background)
    for *words, background in itertools.product(COLOURS, SHAPES, DIRECTIONS, SPEEDS, BACKGROUNDS)
]


@pytest.fixture(scope="module")
def vae() -> ToyVAE:
    return ToyVAE.load()


@pytest.fixture(scope="module")
def truth() -> list[tuple[Scene, np.ndarray]]:
    rng = np.random.default_rng(123)
    scenes = [random_scene(rng) for _ in range(TRUTH_SCENES)]
    return [(scene, render(scene, rng)) for scene in scenes]


def to_model(video: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(video).permute(3, 0, 1, 2)[None]


def to_picture(video: torch.Tensor) -> np.ndarray:
    return video[0].permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("through_vae", [False, True])
def test_detector_reads_the_truth(truth, vae, through_vae):
    right = {"colour_ok": 0, "shape_ok": 0, "direction_ok": 0}
    half_way = np.mean(list(SPEEDS.values()))
    speed_right = 0
    for scene, video in truth:
        if through_vae:
            video = to_picture(vae.decode(vae.encode(to_model(video))))
        obj, seen = scene.objects[0], detect(video)
        assert seen is not None, scene.prompt()
        for key, ok in seen.matches(obj).items():
            right[key] += ok
        speed_right += (seen.speed < half_way) == (obj.speed == "slowly")
    for key, count in {**right, "speed": speed_right}.items():
        assert count >= 0.98 * TRUTH_SCENES, (key, count)


def test_detector_measures_the_path():
    scene = parse_prompt("a red square moving right slowly on a black background")
    seen = detect(render(scene, np.random.default_rng(0)))
    # 17 pixel frames, 1.25 pixels each; a square's edges fall on whole pixels
    steps = np.diff(seen.path, axis=0)
    assert len(steps) == PIXEL_FRAMES - 1
    assert np.allclose(steps, [1.25, 0.0], atol=0.3)
    assert seen.speed == pytest.approx(1.25, abs=0.01)


def test_detector_is_not_fooled_by_noise_or_emptiness():
    rng = np.random.default_rng(0)
    for background in BACKGROUNDS:
        empty = np.repeat(render_background(background)[None], PIXEL_FRAMES, 0)
        assert detect(empty) is None, background
    scene = parse_prompt("a red square moving right slowly on a black background")
    video = render(scene, rng)
    assert detect(video, "blue") is None
    # in fewer than half of the frames is not in the video
    video[8:] = 0.04
    assert detect(video) is None


def test_detector_finds_a_named_colour_among_several():
    scene = parse_prompt(
        "a red circle moving left slowly and a white cross moving down quickly on a navy background"
    )
    video = render(scene, np.random.default_rng(5))
    for obj in scene.objects:
        seen = detect(video, obj.colour)
        assert seen.colour == obj.colour
        assert seen.direction == obj.direction


def test_every_prompt_is_parsed_back():
    assert len(SINGLES) == 768
    for scene in SINGLES:
        assert parse_prompt(scene.prompt()) == scene


@pytest.mark.parametrize("num_objects", [1, 2, 3])
def test_random_prompts_are_parsed_back(num_objects):
    rng = np.random.default_rng(num_objects)
    for _ in range(50):
        scene = random_scene(rng, num_objects)
        assert len({obj.colour for obj in scene.objects}) == num_objects
        assert parse_prompt(scene.prompt()) == scene


def test_prompt_spelling_is_free():
    plain = "a red circle moving left slowly on a black background"
    assert parse_prompt(
        "  A red circle, moving LEFT slowly,  on a black background. "
    ) == parse_prompt(plain)


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "a pink circle moving left slowly on a black background",
        "a red hexagon moving left slowly on a black background",
        "a red circle moving away slowly on a black background",
        "a red circle moving left lazily on a black background",
        "a red circle moving left slowly on a beige background",
        "a red circle moving left slowly",
        "a red circle moving left slowly and on a black background",
        " and ".join(["a red circle moving left slowly"] * (MAX_OBJECTS + 1))
        + " on a black background",
    ],
)
def test_a_bad_prompt_is_told_the_words(prompt):
    with pytest.raises(ValueError, match="does not know the prompt") as caught:
        parse_prompt(prompt)
    message = str(caught.value)
    assert repr(prompt) in message
    for word in (*COLOURS, *SHAPES, *DIRECTIONS, *SPEEDS, *BACKGROUNDS):
        assert word in message


def test_held_out_scenes_are_stable():
    # crc32 of the prompt decides, so this count is the same everywhere
    assert sum(scene.held_out for scene in SINGLES) == 111
    first = held_out_scenes(16, seed=1)
    assert held_out_scenes(16, seed=1) == first
    assert held_out_scenes(20, seed=1)[:16] == first
    assert held_out_scenes(16, seed=2) != first
    assert len({scene.prompt() for scene in first}) == 16


@pytest.mark.parametrize("num_objects", [1, 2, 3])
def test_held_out_scenes_are_never_trained_on(num_objects):
    # training draws random scenes and passes over those whose held_out is true
    rng = np.random.default_rng(0)
    drawn = [random_scene(rng, num_objects) for _ in range(3000)]
    trained = {scene.prompt() for scene in drawn if not scene.held_out}
    tested = {scene.prompt() for scene in held_out_scenes(40, 3, num_objects)}
    assert not trained & tested
    share = 1 - sum(not scene.held_out for scene in drawn) / len(drawn)
    assert 0.08 < share < 0.18


def test_rendering_is_a_function_of_the_seed():
    scene = SINGLES[0]
    first = render(scene, np.random.default_rng(3))
    assert np.array_equal(first, render(scene, np.random.default_rng(3)))
    assert not np.array_equal(first, render(scene, np.random.default_rng(4)))


def test_picture_values():
    scene = parse_prompt("a white square moving up quickly on a striped background")
    video = render(scene, np.random.default_rng(0))
    assert video.shape == (PIXEL_FRAMES, HEIGHT, WIDTH, 3)
    assert video.dtype == np.float32
    assert 0 <= video.min() <= video.max() <= 1


@pytest.mark.parametrize(("width", "height"), [(95, 96), (63, 101), (33, 57), (7, 5), (1, 1)])
def test_odd_sizes_render(width, height):
    rng = np.random.default_rng(0)
    for scene in (random_scene(rng, 1 + index % 3) for index in range(6)):
        video = render(scene, rng, width, height)
        assert video.shape == (PIXEL_FRAMES, height, width, 3)
        assert np.isfinite(video).all()


def test_a_later_object_is_in_front():
    red, blue = Object("red", "square", "left", "slowly"), Object("blue", "square", "up", "quickly")
    # too small for any free path: both pass the middle halfway
    for objects in ((red, blue), (blue, red)):
        video = render(Scene(objects, "black"), np.random.default_rng(0), 25, 25)
        assert np.allclose(video[PIXEL_FRAMES // 2, 12, 12], COLOURS[objects[-1].colour])


def test_unknown_shape_is_named():
    with pytest.raises(ValueError, match="unknown shape 'star'; expected one of circle, square"):
        shape_distance("star", np.zeros(1), np.zeros(1), 1.0)


@pytest.mark.parametrize(
    ("batch", "frames", "height", "width"), [(1, 1, 8, 8), (2, 5, 16, 24), (1, 17, 96, 96)]
)
def test_vae_shapes(vae, batch, frames, height, width):
    video = torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(0))
    latents = vae.encode(video)
    assert latents.shape == (batch, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    decoded = vae.decode(latents)
    assert decoded.shape == video.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 15, 16), (1, 3, 5, 16, 20)])
def test_vae_refuses_other_sizes(vae, shape):
    frames, height, width = shape[2:]
    with pytest.raises(ValueError, match=rf"4n\+1 .* got {frames} frames of {width}x{height}"):
        vae.encode(torch.zeros(shape))


def test_patches_come_back():
    video = torch.rand(2, 3, 9, 16, 24, generator=torch.Generator().manual_seed(0))
    # the first frame is the mean of four equal ones, exact because four is a power of two
    assert torch.equal(from_patches(to_patches(video)), video)


def test_vae_latents_come_back(vae):
    # small, so that no pixel is clamped; the first latent frame can only hold a still picture
    latents = 0.05 * torch.randn(1, 16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    again = vae.encode(vae.decode(latents))
    assert torch.allclose(again[:, :, 1:], latents[:, :, 1:], atol=1e-4)
    assert not torch.allclose(again[:, :, :1], latents[:, :, :1], atol=1e-2)


def test_latents_have_about_unit_scale(vae, truth):
    latents = torch.cat([vae.encode(to_model(video)) for _, video in truth[:40]])
    assert 0.7 < latents.std() < 1.3


def test_still_video_has_equal_latent_frames(vae):
    scene = parse_prompt("a green cross moving up slowly on a striped background")
    picture = render(scene, np.random.default_rng(0))[:1]
    latents = vae.encode(to_model(np.repeat(picture, 17, 0)))
    assert latents.shape[2] == 5
    assert torch.allclose(latents, latents[:, :, :1].expand_as(latents), atol=1e-6)


def test_wan_scale_comes_back():
    latents = torch.randn(2, 16, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    there = to_wan_scale(latents)
    assert torch.allclose(from_wan_scale(there), latents, atol=1e-6)
    # Wan2.1's first channel: mean -0.7571, std 2.8184
    assert torch.allclose(there[:, 0], latents[:, 0] * 2.8184 - 0.7571)
    assert from_wan_scale(there.half()).dtype == torch.float16


def test_image_condition_layout(vae):
    picture = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    condition = image_condition(vae, picture, 9)
    assert condition.shape == (2, 20, 3, 2, 3)
    # four mask channels, one for the given latent frame; then the image's latents
    assert (condition[:, :4, 0] == 1).all()
    assert (condition[:, :4, 1:] == 0).all()
    assert torch.allclose(condition[:, 4:, :1], vae.encode(picture[:, :, None]), atol=1e-6)
    gray = vae.encode(torch.full((2, 3, 1, 16, 24), 0.5))
    assert torch.allclose(condition[:, 4:, 1:], gray.expand(-1, -1, 2, -1, -1), atol=1e-6)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_the_empty_prompt_is_zeros(prompt):
    embedding = encode_prompt(prompt)
    assert torch.equal(embedding, torch.zeros(TEXT_TOKENS, TEXT_DIM))


def test_prompt_embeddings_tell_prompts_apart():
    embeddings = torch.stack([encode_prompt(scene.prompt()) for scene in SINGLES]).flatten(1)
    assert len(torch.unique(embeddings, dim=0)) == len(SINGLES)
    one = (
        "a red circle moving left slowly and a blue square moving left slowly on a black background"
    )
    other = (
        "a blue circle moving left slowly and a red square moving left slowly on a black background"
    )
    assert not torch.equal(encode_prompt(one), encode_prompt(other))


def test_the_longest_prompt_fits():
    scene = random_scene(np.random.default_rng(0), MAX_OBJECTS)
    embedding = encode_prompt(scene.prompt())
    used = len(scene.prompt().replace(" and ", " ").split())
    assert embedding[:used].abs().sum(1).min() > 0
    assert embedding[used:].abs().sum() == 0


def test_word_vectors_are_the_same_everywhere():
    # a checkpoint is trained on these numbers
    embedding = encode_prompt("a red circle moving left slowly on a black background")
    assert embedding[0, :3].tolist() == pytest.approx([-0.264128, 1.542922, 0.697418], abs=1e-5)
    assert embedding[9, :3].tolist() == pytest.approx([2.033236, -0.980694, -0.909786], abs=1e-5)


def test_a_bad_prompt_is_not_encoded():
    with pytest.raises(ValueError, match="does not know the prompt"):
        encode_prompt("a cat on a mat")


def test_more_held_out_scenes_than_there_are_is_an_error():
    assert len(held_out_scenes(111)) == 111
    with pytest.raises(ValueError, match="found only 111.*got 112"):
        held_out_scenes(112)
