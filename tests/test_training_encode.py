import json
import os
import socket
import subprocess
import sys
import time

import av
import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from wantrim.tests.tiny_pipeline import ASKED, TEXT_DIM, parts, transformer
from wantrim.training import encode
from wantrim.training.encode import encode_folder
from wantrim.training.encoder import Encoder
from wantrim.training.shard_files import read_index
from wantrim.training.shards import ShardDataset
from wantrim.training.video_files import Size, find_videos, fit, read_video

CPU = torch.device("cpu")
SIZE = Size(32, 16, 5, 16)


def write_video(path, pictures: int, width=48, height=32, rate=16, shade=lambda i: 10 * i):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("h264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "4"}
        for index in range(pictures):
            picture = np.full((height, width, 3), shade(index), np.uint8)
            picture[:, : width // 2, 0] = 200
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t2v")
    WanPipeline(**parts(), transformer=transformer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("i2v")
    torch.manual_seed(3)
    clip = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    WanImageToVideoPipeline(
        **parts(),
        transformer=transformer(in_channels=36, image_dim=32, added_kv_proj_dim=32),
        image_encoder=CLIPVisionModel(clip).eval(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def videos(tmp_path):
    """Two good videos, and one of each kind that cannot be used."""
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    write_video(folder / "a.mp4", 6)
    (folder / "a.txt").write_text(ASKED[0])
    write_video(folder / "more/b.mkv", 7, 32, 48, shade=lambda i: 250 - 9 * i)
    (folder / "captions.csv").write_text(f'file,caption\nmore/b.mkv,"{ASKED[1]}"\nshort.mp4,x\n')
    write_video(folder / "short.mp4", 3)
    write_video(folder / "silent.mp4", 6)
    whole = (folder / "a.mp4").read_bytes()
    (folder / "damaged.mp4").write_bytes(whole[: len(whole) // 2])
    rows = [{"file": "damaged.mp4", "caption": "a cat"}, {"file": "slow.mp4", "caption": "a cat"}]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_video(folder / "slow.mp4", 6, rate=8)
    (folder / "link.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / "link.txt").write_text("a cat")
    return folder


REASONS = {
    "short.mp4": "too short: 3 of 5",
    "silent.mp4": "no caption",
    "damaged.mp4": "cannot be read",
    "link.mp4": "cannot be read",
    "slow.mp4": "8 pictures a second, expected 16",
}


def test_a_folder_becomes_training_data(videos, t2v, tmp_path, caplog):
    out = tmp_path / "out"
    encoder = Encoder(t2v, "t2v", CPU, torch.float32)
    skipped = encode_folder(videos, out, encoder, SIZE)
    assert skipped.keys() == REASONS.keys()
    assert all(REASONS[name] in why for name, why in skipped.items())
    assert all(name in caplog.text for name in REASONS)
    said = {f"{name}@32x16x5": why for name, why in skipped.items()}
    assert json.loads((out / "skipped.json").read_text()) == said
    data = ShardDataset(out, 2)
    assert len(data) == 2
    batch = data.batch(0)
    assert batch.latents.shape == (2, 16, 2, 2, 4)
    assert batch.text.shape == (2, 512, TEXT_DIM)
    assert batch.condition is None and batch.clip is None
    # as the host's own pipeline makes them
    pipe = WanPipeline.from_pretrained(t2v, local_files_only=True)
    text, negative = pipe.encode_prompt(ASKED[0], encode.NEGATIVE, max_sequence_length=512)
    empty, _ = pipe.encode_prompt("", max_sequence_length=512)
    assert any(torch.allclose(row, text[0], atol=1e-5) for row in batch.text)
    assert torch.allclose(data.negative_text, negative[0], atol=1e-5)
    assert torch.allclose(data.empty_text, empty[0], atol=1e-5)
    assert not torch.allclose(data.empty_text, data.negative_text, atol=1e-5)
    assert not list(out.glob("*.partial"))


def test_latents_decode_to_the_video(videos, t2v):
    encoder = Encoder(t2v, "t2v", CPU, torch.float32)
    pictures = read_video(videos / "a.mp4", SIZE)
    latents = encoder.samples([pictures], ASKED[:1])[0].latents
    vae = encoder.pipe.vae
    mean, std = (
        torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    video = pictures.permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(video).latent_dist.mode()[0]
    assert torch.allclose(latents * std + mean, expected, atol=1e-5)


def test_image_to_video_has_its_condition_and_clip(videos, i2v, tmp_path):
    encoder = Encoder(i2v, "i2v", CPU, torch.float32)
    encode_folder(videos, tmp_path / "out", encoder, SIZE)
    batch = ShardDataset(tmp_path / "out", 2).batch(0)
    assert batch.condition.shape == (2, 20, 2, 2, 4)
    assert batch.condition[:, :4, 0].eq(1).all() and not batch.condition[:, :4, 1:].any()
    # the image is the first picture of its own video, and gray follows
    assert torch.allclose(batch.condition[:, 4:, 0], batch.latents[:, :, 0], atol=1e-5)
    assert not torch.allclose(batch.condition[:, 4:, 1], batch.latents[:, :, 1], atol=1e-2)
    assert batch.clip.shape == (2, 5, 32)
    assert not torch.equal(batch.clip[0], batch.clip[1])


def test_what_is_done_is_not_done_again(videos, t2v, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "out"
    encoder = Encoder(t2v, "t2v", CPU, torch.float32)
    real, read = encode.read_video, []

    def stopped(path, size):
        read.append(path.name)
        if path.name == "b.mkv":
            raise KeyboardInterrupt
        return real(path, size)

    monkeypatch.setattr(encode, "read_video", stopped)
    with pytest.raises(KeyboardInterrupt):
        encode_folder(videos, out, encoder, SIZE)
    assert "a.mp4" in read
    assert len(ShardDataset(out, 1)) == 1
    assert not list(out.glob("*.partial"))
    assert "silent.mp4@32x16x5" in json.loads((out / "skipped.json").read_text())
    monkeypatch.setattr(encode, "read_video", lambda p, s: read.append(p.name) or real(p, s))
    read.clear()
    encode_folder(videos, out, encoder, SIZE)
    assert "b.mkv" in read and "a.mp4" not in read
    assert "1 of 7 videos are there already" in caplog.text
    data = ShardDataset(out, 2)
    assert len(data) == 2 and not data.skipped
    # a bucket of another size goes into the same folder
    encode_folder(videos, out, encoder, Size(16, 16, 5))
    assert len(ShardDataset(out, 2).buckets) == 2
    # and what was skipped at either is said
    said = json.loads((out / "skipped.json").read_text())
    assert {"short.mp4@32x16x5", "short.mp4@16x16x5"} < set(said)


@pytest.mark.parametrize("change", ["file", "caption"])
def test_another_video_of_the_same_name_is_not_lost_without_a_word(videos, t2v, tmp_path, change):
    out, other = tmp_path / "out", tmp_path / "other"
    encoder = Encoder(t2v, "t2v", CPU, torch.float32)
    encode_folder(videos, out, encoder, SIZE)
    other.mkdir()
    write_video(other / "new.mp4", 6)
    (other / "new.txt").write_text(ASKED[0])
    if change == "file":
        write_video(other / "a.mp4", 7)
    else:
        (other / "a.mp4").write_bytes((videos / "a.mp4").read_bytes())
    (other / "a.txt").write_text(ASKED[0] + (", corrected" if change == "caption" else ""))
    with pytest.raises(ValueError, match="1 of its samples .a.mp4@32x16x5.*one VIDEOS"):
        encode_folder(other, out, encoder, SIZE)
    assert len(ShardDataset(out, 1)) == 2


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_a_batch_is_what_its_videos_are_alone(kind, videos, request):
    encoder = Encoder(request.getfixturevalue(kind), kind, CPU, torch.float32)
    pictures = [read_video(videos / name, SIZE) for name in ("a.mp4", "more/b.mkv")]
    both = encoder.samples(pictures, ASKED)
    assert len(both) == 2
    for made, video, caption in zip(both, pictures, ASKED, strict=True):
        (alone,) = encoder.samples([video], [caption])
        for name, value in alone.tensors().items():
            assert torch.allclose(made.tensors()[name], value, atol=1e-5), name
    assert not torch.allclose(both[0].latents, both[1].latents, atol=1e-2)


def test_videos_that_do_not_fill_a_batch_and_those_beside_bad_ones_come_too(videos, t2v, tmp_path):
    encoder = Encoder(t2v, "t2v", CPU, torch.float32)
    encode_folder(videos, tmp_path / "out", encoder, SIZE, shard_size=1, batch=3)
    assert len(read_index(tmp_path / "out").shards) == 2


def processes(command, count):
    """As torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "wantrim.training.encode", *map(str, command)],
            env={
                **os.environ,
                **told,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": "0",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]


@pytest.mark.slow
def test_three_processes_that_are_killed_and_two_that_go_on_make_what_one_makes(t2v, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for number, name in enumerate("acdef"):
        write_video(folder / f"{name}.mp4", 6, shade=lambda i, n=number: 10 * i + 30 * n)
    write_video(folder / "b.mp4", 3)
    for name in "abcdef":
        (folder / f"{name}.txt").write_text(ASKED[0])
    # the third process waits for a video that does not come, the others for the third
    (folder / "c.mp4").rename(tmp_path / "c.mp4")
    os.mkfifo(folder / "c.mp4")
    command = [folder, out, "--model", t2v, "--size", "32x16", "--pixel-frames", "5"]
    command += ["--device", "cpu", "--shard-size", "1"]
    started = processes(command, 3)
    try:
        patience = time.monotonic() + 240
        while len(list(out.glob("shard-*"))) < 3 and time.monotonic() < patience:
            time.sleep(0.1)
    finally:
        for process in started:
            process.kill()
            process.communicate()
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert len(before) == 3 and not (out / "index.json").exists()
    (tmp_path / "c.mp4").replace(folder / "c.mp4")
    for process in processes(command, 2):
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # the video that the second of them skipped
    assert list(json.loads((out / "skipped.json").read_text())) == ["b.mp4@32x16x5"]
    alone = Encoder(t2v, "t2v", CPU, torch.bfloat16)
    encode_folder(folder, tmp_path / "one", alone, Size(32, 16, 5), shard_size=1)
    assert read_index(out) == read_index(tmp_path / "one")
    assert len(ShardDataset(out, 1)) == 5


def test_another_model_is_kept_out_of_the_folder(videos, t2v, i2v, tmp_path):
    out = tmp_path / "out"
    encode_folder(videos, out, Encoder(t2v, "t2v", CPU, torch.float32), SIZE)
    with pytest.raises(ValueError, match="holds samples with task 't2v', expected 'i2v'"):
        encode_folder(videos, out, Encoder(i2v, "i2v", CPU, torch.float32), SIZE)


def test_number_formats_are_told_from_other_models(videos, t2v, tmp_path):
    out, bf16 = tmp_path / "out", torch.bfloat16
    encode_folder(videos, out, Encoder(t2v, "t2v", CPU, torch.float32), SIZE)
    with pytest.raises(ValueError, match="holds samples with vae_dtype 'fp32', expected 'bf16'"):
        encode_folder(videos, out, Encoder(t2v, "t2v", CPU, torch.float32, bf16), SIZE)
    with pytest.raises(ValueError, match="holds samples with dtype 'fp32', expected 'bf16'"):
        encode_folder(videos, out, Encoder(t2v, "t2v", CPU, bf16), SIZE)


def test_the_command(videos, t2v, tmp_path, caplog):
    asked = [str(videos), str(tmp_path / "out"), "--model", str(t2v), "--size", "32x16"]
    assert encode.main([*asked, "--pixel-frames", "5", "--device", "cpu"]) == 0
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert index["made"]["vae"].startswith("AutoencoderKLWan ")
    assert encode.main([*asked, "--pixel-frames", "6", "--device", "cpu"]) == 1
    assert "expected 4n + 1, as 81, got 6" in caplog.text
    asked[3] = str(tmp_path)
    assert encode.main([*asked, "--pixel-frames", "5", "--device", "cpu"]) == 1
    assert "expected a diffusers folder of a Wan" in caplog.text


def test_a_model_for_another_task_is_refused(t2v):
    with pytest.raises(ValueError, match="20 condition channels for task 'i2v', got 0"):
        Encoder(t2v, "i2v", CPU, torch.float32)


def test_pictures_are_taken_at_the_frame_rate(tmp_path):
    write_video(tmp_path / "v.mp4", 20, rate=32, shade=lambda i: 10 * i)
    shades = read_video(tmp_path / "v.mp4", Size(32, 16, 9, 16))[:, 8, -1, 1].float()
    assert (shades - torch.arange(9) * 20).abs().max() < 6
    every = read_video(tmp_path / "v.mp4", Size(32, 16, 9, 0))[:, 8, -1, 1].float()
    assert (every - torch.arange(9) * 10).abs().max() < 6


@pytest.mark.parametrize("rotation", [0, 90, -90, 180])
def test_a_picture_is_covered_cut_in_the_middle_and_turned_upright(rotation):
    # red on top as it is shown; the camera noted how it held the sensor
    shown = np.zeros((48, 64, 3), np.uint8)
    shown[:24, :, 0] = 255
    shown[:, :8, 2] = 255
    stored = np.ascontiguousarray(np.rot90(shown, -rotation // 90))
    picture = fit(av.VideoFrame.from_ndarray(stored, format="rgb24"), Size(16, 16, 1), rotation)
    assert picture.shape == (16, 16, 3)
    assert picture[:6, :, 0].min() > 240 and picture[10:, :, 0].max() < 15
    # 8 of 64 columns are cut off on both sides
    assert picture[:, 2:, 2].max() < 15


def test_a_camera_held_upright_gives_upright_pictures(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as file:
        stream = file.add_stream("h264", rate=16)
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot note a rotation")
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(-90)
        # red on the left of the sensor is on top of what was seen
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:, :32, 0] = 255
        file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    seen = read_video(tmp_path / "v.mp4", Size(32, 48, 1))[0].float()
    assert seen[:16, :, 0].mean() > 200 and seen[32:, :, 0].mean() < 50


def test_captions_that_cannot_be_read_are_named(tmp_path):
    write_video(tmp_path / "a.mp4", 2)
    (tmp_path / "captions.csv").write_text("video,text\na.mp4,x\n")
    with pytest.raises(ValueError, match="captions.csv: expected rows with `file` and `caption`"):
        find_videos(tmp_path)
    (tmp_path / "captions.csv").unlink()
    with pytest.raises(ValueError, match="expected videos .* found none"):
        (tmp_path / "a.mp4").unlink()
        find_videos(tmp_path)
