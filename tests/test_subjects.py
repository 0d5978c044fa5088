import gc
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5EncoderModel,
)

from wantrim.benchmarks.subjects import (
    PROMPTS,
    Subject,
    read_prompts,
    real_subject,
    toy_subject,
)
from wantrim.hosts.diffusers.sample import sample
from wantrim.hosts.diffusers.weights import save_original, to_original_keys
from wantrim.report.video_metrics import psnr
from wantrim.tests.tiny_pipeline import ASKED, NEGATIVE, TEXT_DIM, parts, transformer
from wantrim.toy.text import encode_prompt
from wantrim.toy.vae import ToyVAE
from wantrim.toy.world import parse_prompt, render

IMAGE_DIM = 20
SHIFT, STEPS, GUIDANCE = 5.0, 3, 3.0
VIDEO = {"width": 48, "height": 32, "pixel_frames": 9}
OPTIONS = {"device": "cpu", "dtype": torch.float32, **VIDEO}
SAMPLING = {"steps": STEPS, "guidance": GUIDANCE, "shift": SHIFT, "seed": 7}


class EvenSigmas(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler steps and shift on an even grid from 1 to 0; its own ends at 1/1000."""

    def set_timesteps(self, steps, device=None):
        super().set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist(), device=device)


@pytest.fixture(scope="module")
def pipeline():
    """diffusers' text-to-video pipeline in memory: what our reading of its folder has to equal."""
    return WanPipeline(**parts(), transformer=transformer())


@pytest.fixture(scope="module")
def t2v(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-t2v"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def i2v_pipeline():
    """Wan2.1 I2V: 36 input channels and a CLIP branch; text and VAE are those of `pipeline`."""
    torch.manual_seed(2)
    clip = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    return WanImageToVideoPipeline(
        **parts(),
        transformer=transformer(in_channels=36, image_dim=IMAGE_DIM, added_kv_proj_dim=32),
        image_encoder=CLIPVisionModel(clip).eval(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    )


@pytest.fixture(scope="module")
def i2v(i2v_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-i2v"
    i2v_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def subject(t2v) -> Subject:
    return real_subject(t2v, prompts=ASKED, negative_prompt=NEGATIVE, **OPTIONS)


def picture(path, width=48, height=32):
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def latents_of(subject: Subject, items) -> torch.Tensor:
    condition = None
    if items[0].condition is not None:
        condition = torch.stack([item.condition for item in items])
    rows = [subject.model_kwargs(item) for item in items]
    kwargs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    text = torch.stack([item.text for item in items])
    return sample(
        subject.model,
        text,
        subject.size,
        condition=condition,
        negative=subject.negative,
        model_kwargs=kwargs,
        **SAMPLING,
    )


def diffusers_result(pipeline, output_type, **changes):
    """What diffusers makes of the same noise, with its own Euler steps and shift."""
    parts = {**pipeline.components, "scheduler": EvenSigmas(shift=SHIFT)}
    pipeline = type(pipeline)(**parts, expand_timesteps=pipeline.config.expand_timesteps)
    pipeline.set_progress_bar_config(disable=True)
    options = {
        "prompt": ASKED,
        "negative_prompt": NEGATIVE,
        "width": VIDEO["width"],
        "height": VIDEO["height"],
        "num_frames": VIDEO["pixel_frames"],
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "generator": torch.Generator().manual_seed(SAMPLING["seed"]),
        "output_type": output_type,
    }
    return pipeline(**{**options, **changes}).frames


def assert_close(ours, theirs):
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=1e-5, rtol=1e-4)


def edited(folder, target, file, **changes):
    """A copy of a model folder with some values of one of its JSON files changed."""
    shutil.copytree(folder, target)
    path = target / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_a_folder_samples_as_diffusers_does(subject, pipeline):
    assert (subject.name, subject.tasks, subject.size) == ("tiny-t2v", ("t2v",), (3, 4, 6))
    latents = latents_of(subject, subject.items("t2v", 2, 1))
    assert_close(latents, diffusers_result(pipeline, "latent"))
    video = subject.to_video(latents)
    assert video.shape == (2, 9, 32, 48, 3)
    assert video.std() > 0.01
    assert_close(video, diffusers_result(pipeline, "np"))


def test_ti2v_5b_samples_text_to_video_as_diffusers_does(pipeline, t2v, tmp_path):
    folder = edited(t2v, tmp_path / "5b", "model_index.json", expand_timesteps=True)
    subject = real_subject(folder, prompts=ASKED, negative_prompt=NEGATIVE, **OPTIONS)
    latents = latents_of(subject, subject.items("t2v", 2, 1))
    per_token = WanPipeline(**pipeline.components, expand_timesteps=True)
    assert_close(latents, diffusers_result(per_token, "latent"))


def test_image_to_video_samples_as_diffusers_does(i2v, i2v_pipeline, pipeline, tmp_path):
    image = picture(tmp_path / "first.png")
    subject = real_subject(
        i2v, prompts=ASKED[:1], images=[image], negative_prompt=NEGATIVE, **OPTIONS
    )
    assert subject.tasks == ("i2v",)
    [item] = subject.items("i2v", 1, 1)
    assert item.condition.shape == (20, 3, 4, 6)
    # its own cleaning of prompts needs a package that is not asked for here
    text, negative = pipeline.encode_prompt(ASKED[0], NEGATIVE, max_sequence_length=512)
    texts = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": text,
        "negative_prompt_embeds": negative,
    }
    with Image.open(image) as opened:
        # 8-bit pixels, unchanged
        assert np.array_equal(np.asarray(opened), (item.first_image * 255).round())
        theirs = diffusers_result(i2v_pipeline, "latent", image=opened, **texts)
    assert_close(latents_of(subject, [item]), theirs)


def test_every_image_goes_with_its_prompt(i2v, tmp_path):
    wide, tall = picture(tmp_path / "wide.png"), picture(tmp_path / "tall.png", 32, 96)
    subject = real_subject(i2v, prompts=ASKED, images=[wide, tall], **OPTIONS)
    first, second = subject.items("i2v", 2, 1)
    assert first.first_image.shape == second.first_image.shape == (32, 48, 3)
    assert not torch.equal(first.condition, second.condition)
    seen = [subject.model_kwargs(item)["encoder_hidden_states_image"] for item in (first, second)]
    assert not torch.equal(*seen)
    same = real_subject(i2v, prompts=ASKED, images=[tall], **OPTIONS)
    for item in same.items("i2v", 2, 1):
        assert torch.equal(item.condition, second.condition)
        assert np.array_equal(item.first_image, second.first_image)
        assert torch.equal(*same.model_kwargs(item).values(), seen[1])


def test_items_are_all_prompts_of_a_seed_after_the_other(subject):
    items = subject.items("t2v", 2, 3)
    assert [(i.seed, i.prompt_index) for i in items] == [
        (seed, index) for seed in range(3) for index in range(2)
    ]
    assert [item.prompt for item in items] == ASKED * 3
    assert items[0].text.shape == subject.negative.shape == (512, TEXT_DIM)
    # no text after the last token: "two old dogs sleep under a tree" and its end
    assert torch.equal(items[1].text.abs().sum(1) > 0, torch.arange(512) < 8)
    assert all(i.scene is i.condition is i.first_image is None for i in items)
    assert [item.prompt for item in subject.items("t2v", 1, 1)] == ASKED[:1]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (("i2v", 1, 1), "does t2v, got 'i2v'"),
        (("t2v", 3, 1), "has 1 to 2, got 3"),
        (("t2v", 0, 1), "has 1 to 2, got 0"),
        (("t2v", 1, 0), "at least 1, got 0"),
    ],
)
def test_items_that_are_not_there_are_refused(subject, request_, said):
    with pytest.raises(ValueError, match=said):
        subject.items(*request_)


def test_the_text_encoder_is_gone_after_the_prompts(t2v):
    def encoders():
        gc.collect()
        return sum(type(thing) is UMT5EncoderModel for thing in gc.get_objects())

    before = encoders()
    subject = real_subject(t2v, prompts=ASKED, **OPTIONS)
    assert encoders() == before
    assert subject.text.device.type == "cpu"


def test_a_checkpoint_is_its_folder(subject, t2v, tmp_path):
    checkpoint = tmp_path / "tiny.safetensors"
    save_original(checkpoint, transformer(), torch.float32, {})
    ours = real_subject(
        checkpoint, components=t2v, prompts=ASKED, negative_prompt=NEGATIVE, **OPTIONS
    )
    assert ours.name == "tiny.safetensors"
    latents = latents_of(ours, ours.items("t2v", 2, 1))
    assert torch.equal(latents, latents_of(subject, subject.items("t2v", 2, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_checkpoint_is_its_folder(i2v, tmp_path, dtype):
    # what others write: ComfyUI's prefix, no configuration
    wide = {"attention_head_dim": 128, "added_kv_proj_dim": 256}
    model = transformer(in_channels=36, image_dim=IMAGE_DIM, **wide)
    tensors = to_original_keys(model.state_dict())
    checkpoint = tmp_path / "wide.safetensors"
    save_file({f"model.diffusion_model.{k}": v for k, v in tensors.items()}, checkpoint)
    shutil.copytree(i2v, tmp_path / "wide")
    model.save_pretrained(tmp_path / "wide" / "transformer")
    image = picture(tmp_path / "first.png")
    options = {**OPTIONS, "prompts": ASKED[:1], "images": [image], "dtype": dtype}
    ours = real_subject(checkpoint, components=i2v, **options)
    theirs = real_subject(tmp_path / "wide", **options)
    expected = theirs.model.state_dict()
    assert {v.dtype for v in expected.values()} == {dtype, torch.float32}
    for name, tensor in ours.model.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    item = ours.items("i2v", 1, 1)[0]
    assert item.text.dtype == ours.negative.dtype == dtype
    result = latents_of(ours, [item])
    assert result.isfinite().all()
    assert torch.equal(result, latents_of(theirs, theirs.items("i2v", 1, 1)))


def test_image_to_video_without_clip(t2v, tmp_path):
    # Wan2.2's kind and the tiny Wan's; the parts of a text-to-video folder are enough
    checkpoint = tmp_path / "tiny.safetensors"
    save_original(checkpoint, transformer(in_channels=36), torch.float32, {})
    image = picture(tmp_path / "first.png")
    subject = real_subject(checkpoint, components=t2v, prompts=ASKED[:1], images=[image], **OPTIONS)
    item = subject.items("i2v", 1, 1)[0]
    assert subject.model_kwargs(item) == {}
    assert torch.equal(item.condition[:4, 0], torch.ones(4, 4, 6))
    assert not item.condition[:4, 1:].any()
    assert latents_of(subject, [item]).shape == (1, 16, 3, 4, 6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 40}, "multiples of 16, got 40x32"),
        ({"height": 0}, "multiples of 16, got 48x0"),
        ({"pixel_frames": 8}, "4n \\+ 1, got 8"),
        ({"pixel_frames": -3}, "4n \\+ 1, got -3"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["a cat", " "]}, "no empty one"),
        ({"images": ["a.png"]}, "text-to-video model, got 1 images"),
        ({"components": "."}, "only for a checkpoint"),
    ],
)
def test_what_a_model_cannot_make_is_refused(t2v, changes, said):
    with pytest.raises(ValueError, match=said):
        real_subject(t2v, **{"prompts": ASKED, **OPTIONS, **changes})


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_images_is_refused(i2v, tmp_path, count):
    images = [picture(tmp_path / f"{i}.png") for i in range(count)]
    with pytest.raises(ValueError, match=f"expected 1 image or 3.*got {count}"):
        real_subject(i2v, prompts=[*ASKED, NEGATIVE], images=images, **OPTIONS)


def test_an_image_that_is_none_is_refused(i2v, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match="a.png is not a readable image"):
        real_subject(i2v, prompts=ASKED, images=[tmp_path / "a.png"], **OPTIONS)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"boundary_ratio": 0.9}, "two experts"),
        ("model_index.json", {"transformer_2": ["diffusers", "X"]}, "two experts"),
        ("transformer/config.json", {"_class_name": "WanVACETransformer3DModel"}, "got WanVACE"),
        ("transformer/config.json", {"pos_embed_seq_len": 514}, "first-and-last-frame"),
        ("transformer/config.json", {"in_channels": 52}, "control models"),
        ("transformer/config.json", {"image_dim": 20}, "needs image_encoder"),
        ("transformer/config.json", {"num_layers": 3}, "transformer cannot be read"),
        ("text_encoder/config.json", {"d_model": 4096}, "text encoder makes 4096"),
        ("vae/config.json", {"z_dim": 48}, "VAE reads 48"),
    ],
)
def test_a_model_that_would_come_out_wrong_is_refused(t2v, tmp_path, file, changes, said):
    folder = edited(t2v, tmp_path / "changed", file, **changes)
    with pytest.raises(ValueError, match=said):
        real_subject(folder, prompts=ASKED, **OPTIONS)


@pytest.mark.parametrize("part", ["model_index.json", "vae", "tokenizer", "transformer"])
def test_a_missing_part_is_named(t2v, tmp_path, part):
    shutil.copytree(t2v, tmp_path / "copy")
    (tmp_path / "copy" / part).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"it has no \\['{part}'\\]"):
        real_subject(tmp_path / "copy", prompts=ASKED, **OPTIONS)


@pytest.mark.parametrize(
    ("name", "tensors", "components", "said"),
    [
        ("there.safetensors", None, True, "nothing is downloaded"),
        ("a.gguf", {}, True, "GGUF"),
        ("a.ckpt", {}, True, "a .safetensors file, got a.ckpt"),
        ("a.safetensors", {}, False, "transformer only"),
        ("a.safetensors", {"x": (1,)}, True, "in the original key names"),
        ("a.safetensors", "no tensors", True, "in the original key names"),
        ("wan_low_noise.safetensors", "model", True, "two experts"),
        ("a.safetensors", "quantised", True, "scale_weight.*not a key"),
        (
            "a.safetensors",
            "cut",
            True,
            "1 weights are missing or misshapen, as blocks.1.attn1.to_q.weight",
        ),
    ],
)
def test_a_checkpoint_that_does_not_do_is_refused(t2v, tmp_path, name, tensors, components, said):
    path = tmp_path / name
    if tensors == "no tensors":
        path.write_text(tensors)
    elif isinstance(tensors, str):
        save_original(path, transformer(), torch.float32, {})
        with safe_open(path, "pt") as file:
            header = file.metadata()
        weights = load_file(path)
        if tensors == "quantised":
            weights["blocks.0.self_attn.q.scale_weight"] = torch.ones(1)
        if tensors == "cut":
            del weights["blocks.1.self_attn.q.weight"]
        save_file(weights, path, header)
    elif tensors is not None:
        save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, path)
    with pytest.raises(ValueError, match=said):
        real_subject(path, components=t2v if components else None, prompts=ASKED, **OPTIONS)


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_a_missing_package_is_named(t2v, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        real_subject(t2v, prompts=ASKED, **OPTIONS)


def test_prompts_come_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat\n\n  two dogs \r\nein Br\u00f6tchen\n", "utf-8")
    assert read_prompts(path) == ["a cat", "two dogs", "ein Br\u00f6tchen"]
    assert read_prompts(None) == list(PROMPTS)
    assert len(set(PROMPTS)) == 8
    path.write_text(" \n")
    with pytest.raises(ValueError, match="prompts.txt has no prompt"):
        read_prompts(path)
    with pytest.raises(ValueError, match="UTF-8 text file"):
        read_prompts(tmp_path / "none.txt")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8 text file"):
        read_prompts(path)


@pytest.fixture(scope="module")
def toy():
    return toy_subject()


def test_toy_items_are_the_same_every_time(toy):
    again = toy_subject()
    state = torch.get_rng_state()
    for task in toy.tasks:
        items = toy.items(task, 3, 2)
        more = [item for item in again.items(task, 5, 2) if item.prompt_index < 3]
        assert [(i.seed, i.prompt_index) for i in items] == [
            (s, p) for s in (0, 1) for p in range(3)
        ]
        for item, other in zip(items, more, strict=True):
            assert item.prompt == other.prompt
            assert torch.equal(item.text, other.text)
            if task == "i2v":
                assert torch.equal(item.condition, other.condition)
                assert np.array_equal(item.first_image, other.first_image)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("objects", [1, 2])
def test_toy_prompts_were_not_trained_on(objects):
    items = toy_subject(objects).items("t2v", 100, 1)
    assert len({item.prompt for item in items}) == 100
    for item in items:
        assert item.scene.held_out
        assert len(item.scene.objects) == objects
        assert item.scene == parse_prompt(item.prompt)
        assert torch.equal(item.text, encode_prompt(item.prompt))
        assert item.condition is item.first_image is None


def test_toy_prompts_beyond_the_world_are_refused(toy):
    with pytest.raises(ValueError, match="has 1 to 100, got 101"):
        toy.items("t2v", 101, 1)
    for objects in (0, 4):
        with pytest.raises(ValueError, match=f"expected 1 to 3, got {objects}"):
            toy_subject(objects)


def test_toy_condition_shows_the_first_image(toy):
    items = toy.items("i2v", 3, 2)
    vae = ToyVAE.load()
    for number, item in enumerate(items):
        assert torch.equal(item.condition[:4, 0], torch.ones(4, 12, 12))
        assert not item.condition[:4, 1:].any()
        shown = vae.decode(item.condition[None, 4:])[0].permute(1, 2, 3, 0).numpy()
        assert abs(shown[5:] - 0.5).max() < 0.05
        quality = [psnr(shown[0], other.first_image) for other in items]
        assert int(np.argmax(quality)) == number
        assert quality[number] > 25


def test_toy_image_to_video_starts_with_the_image(toy):
    items = toy.items("i2v", 2, 1)
    # tables of one release have to be comparable with those of the next
    for item in items:
        rng = np.random.default_rng([item.prompt_index, item.seed, 5])
        assert np.array_equal(item.first_image, render(item.scene, rng)[0])
    assert (toy.name, toy.size, toy.negative) == ("tiny_wan", (5, 12, 12), None)
    videos = toy.to_video(latents_of(toy, items))
    assert videos.shape == (2, 17, 96, 96, 3)
    assert videos.min() >= 0 and videos.max() <= 1
    for video, item, other in zip(videos, items, items[::-1], strict=True):
        assert psnr(video[0], item.first_image) > psnr(video[0], other.first_image) + 5
