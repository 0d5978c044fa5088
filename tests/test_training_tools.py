"""What a training machine does beside training: recording a profile, decoding test videos, hours."""

import av
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from wantrim.hosts.diffusers.profiling import profile_run
from wantrim.profiles.profile import load_profile
from wantrim.tests.small_wan import make_origin, write_recipe
from wantrim.tests.tiny_pipeline import parts
from wantrim.training import decode, encode_cost, memory, record
from wantrim.training.decode import decode_folder
from wantrim.training.draws import Draws
from wantrim.training.models import full_model, open_origin
from wantrim.training.parallel import world
from wantrim.training.shard_files import Sample, ShardWriter
from wantrim.training.toy_data import ToyDataset
from wantrim.training.videos import write_videos


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_origin(tmp_path_factory.mktemp("origin"))


def recorded(recipe, out, samples):
    with world("cpu") as processes:
        record.record(recipe, out, processes, samples)
    return load_profile(out)


def test_a_profile_is_recorded_on_the_recipes_data_at_ten_noise_levels(folder, tmp_path):
    recipe = write_recipe(folder, "data.batch=4", "data.seed=5", "data.drop_text=1.0")
    profile = recorded(recipe, tmp_path / "profile.safetensors", 20)
    assert profile.tensors["count"].tolist() == [2] * 10
    assert profile.runs[0]["grid"] == [5, 6, 6]
    # the recipe can train with it
    origin = open_origin(write_recipe(folder, f"profile='{tmp_path}/profile.safetensors'"))
    assert origin.profile.calls == 20
    # the sample of one noise level by hand
    # no text is dropped: nobody samples without one
    data = ToyDataset(4, 5, 0.0, recipe.data.image_share)
    model = full_model(origin.source, torch.float32).fill("cpu")
    with profile_run(model) as recorder, torch.no_grad():
        for number in (3, 13):
            batch = data.batch(number // 4)
            draws = Draws(5, 0, number)
            sigma = (3 + draws.uniform(1)) / 10
            noise, row = draws.noise(batch.latents[:1].shape), slice(number % 4, number % 4 + 1)
            x = (1 - sigma) * batch.latents[row] + sigma * noise
            model(torch.cat([x, batch.condition[row]], 1), 1000 * sigma, batch.text[row])
    mine = recorder.profile().tensors
    for name in ("self_output", "cross_output", "ratio"):
        assert torch.allclose(profile.tensors[name][3], mine[name][3], rtol=1e-4)


def test_an_expert_is_recorded_at_its_own_noise_levels(folder, tmp_path):
    changes = ("width.sigma_min=0.7", "width.sigma_max=0.9")
    profile = recorded(write_recipe(folder, *changes), tmp_path / "profile.safetensors", 10)
    assert profile.tensors["count"].tolist() == [0] * 7 + [5, 5, 0]


def test_samples_of_another_task_are_refused_in_words(folder, tmp_path):
    prompts = {"empty": torch.zeros(1, 64), "negative": torch.ones(2, 64)}
    writer = ShardWriter(tmp_path / "data", {}, 24, prompts)
    writer.add("a", Sample(torch.ones(16, 1, 4, 4), torch.ones(3, 64)))
    writer.flush()
    recipe = write_recipe(folder, f"data.folder={tmp_path / 'data'}")
    with pytest.raises(ValueError, match="samples of 36 channels for this model, got 16"):
        recorded(recipe, tmp_path / "profile.safetensors", 10)


def test_the_command_of_recording(folder, tmp_path, caplog, capsys):
    write_recipe(folder)
    recipe, out = str(folder / "small.toml"), tmp_path / "deep" / "made.safetensors"
    with pytest.raises(SystemExit):
        record.main([recipe, "--samples", "9"])
    assert "expected 10 or more" in capsys.readouterr().err
    assert record.main([recipe, "--samples", "10", "--out", str(out), "--device", "cpu"]) == 0
    assert load_profile(out).calls == 10
    end = tmp_path / "end.safetensors"
    changes = ["data.batch=4", "width.sigma_min=0.7", f"profile={end}"]
    command = [recipe, "--samples", "10", "--device", "cpu", "--set", *changes]
    assert record.main(command) == 0
    assert load_profile(end).tensors["count"][7:].sum() == 10
    assert record.main([*command, "data.batch=no"]) == 1
    assert "batch: expected a whole number" in caplog.text
    assert record.main(["nothing", "--device", "cpu"]) == 1
    assert "there is no such recipe" in caplog.text


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan")
    parts()["vae"].save_pretrained(path / "vae")
    return path


def pictures(path):
    with av.open(str(path)) as file:
        rate = file.streams.video[0].average_rate
        return rate, [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]


def test_latents_become_the_teachers_video_beside_the_students(wan, tmp_path):
    videos = tmp_path / "1-width" / "videos"
    videos.mkdir(parents=True)
    torch.manual_seed(4)
    latents = {name: torch.randn(16, 2, 4, 6) for name in ("teacher", "student")}
    save_file(latents, videos / "step-20.safetensors")
    command = [str(tmp_path), "--model", str(wan), "--frame-rate", "12.5", "--device", "cpu"]
    assert decode.main(command) == 0
    assert sorted(path.name for path in videos.iterdir()) == ["step-20.mp4", "step-20.safetensors"]
    rate, seen = pictures(videos / "step-20.mp4")
    assert float(rate) == 12.5 and len(seen) == 5 and seen[0].shape == (32, 96, 3)
    vae = parts()["vae"]
    config = vae.config
    for name, half in (("teacher", seen[0][:, :48]), ("student", seen[0][:, 48:])):
        z = latents[name][None]
        mean, std = (
            torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        with torch.no_grad():
            video = vae.decode(z * std + mean).sample[0].clamp(-1, 1)
        wanted = (video[:, 0].permute(1, 2, 0) + 1) * 127.5
        assert (torch.tensor(half).float() - wanted).abs().mean() < 12
    # done once
    assert decode_folder(tmp_path, vae) == []


def test_latents_that_are_not_there_or_no_latents_are_said(wan, tmp_path, caplog):
    command = [str(tmp_path), "--model", str(wan), "--device", "cpu"]
    assert decode.main(command) == 1
    assert "expected test videos of a run" in caplog.text
    save_file({"teacher": torch.randn(16, 2, 4, 4)}, tmp_path / "step-1.safetensors")
    assert decode.main(command) == 1
    assert "expected latents of a teacher and a student" in caplog.text
    assert not list(tmp_path.glob("*.mp4*"))


def test_latents_that_cannot_be_read_do_not_keep_others_from_being_decoded(wan, tmp_path, caplog):
    (tmp_path / "step-1.safetensors").write_bytes(b"half")
    save_file(
        {n: torch.randn(16, 2, 4, 4) for n in ("teacher", "student")},
        tmp_path / "step-2.safetensors",
    )
    assert decode.main([str(tmp_path), "--model", str(wan), "--device", "cpu"]) == 1
    assert (tmp_path / "step-2.mp4").exists()
    assert "step-1.safetensors: expected latents" in caplog.text
    assert "1 of 2 could not be decoded" in caplog.text


def test_test_latents_are_written_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    recipe = write_recipe(folder, "data.folder=data")
    latents = {"teacher": torch.ones(16, 1, 4, 4), "student": torch.ones(16, 1, 4, 4)}

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("wantrim.training.videos.save_file", full)
    with pytest.raises(OSError, match="no space"):
        write_videos(tmp_path, latents, recipe, 3)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert write_videos(tmp_path, latents, recipe, 3) == tmp_path / "step-3.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["step-3.safetensors"]


def test_the_flops_of_encoding_are_those_that_torch_counts():
    with torch.device("meta"):
        vae = AutoencoderKLWan()

    def counted(pictures):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.encode(torch.empty(1, 3, pictures, 480, 832, device="meta"))
        return counter.get_total_flops()

    wanted = counted(1) + 20 * (counted(5) - counted(1))
    said = encode_cost.sample_flops(832, 480, 81, "t2v") - encode_cost.TEXT
    assert said == pytest.approx(wanted, rel=0.01)
    both = encode_cost.sample_flops(832, 480, 81, "i2v") - encode_cost.TEXT
    assert both == 2 * said


def test_the_plan_says_how_long_encoding_takes(capsys):
    assert memory.main(["t2v_14b", "--gpus", "1", "8", "--tflops", "500", "--videos", "9000"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    hours = 9000 * encode_cost.sample_flops(832, 480, 81, "t2v") / (500e12 * 0.05) / 3600
    assert "encoding 9,000 videos of 832x480 and 81 pictures: hours at 5% of 500 TFLOPS" in said
    assert f"{hours:.1f} on 1, {hours / 8:.1f} on 8 GPUs" in said
    assert memory.main(["tiny"]) == 0
    assert "encoding" not in capsys.readouterr().out
