import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from wantrim.demo.recipe import Recipe as DemoRecipe
from wantrim.demo.train import Batches
from wantrim.toy import batches
from wantrim.toy.world import parse_prompt
from wantrim.training import shard_files, shards
from wantrim.training.shard_files import Sample, ShardWriter, file_sha256, read_index
from wantrim.training.shards import Batch, ShardDataset
from wantrim.training.toy_data import ToyDataset

PROMPTS = {"empty": torch.zeros(1, 3), "negative": torch.full((2, 3), -1.0)}
# sums of latents, condition and text of the demo's batch 77, as it was when its weights were made
SUMS = [3904.4878966994584, 14005.70564021566, -327.4530155733228]
MADE = {"vae": "one", "text_encoder": "two"}


def sample(number: int, wide: bool = False, image: bool = False) -> Sample:
    """Latents and text that say which sample it is."""
    size = (2, 2, 4 if wide else 2)
    latents = torch.full((16, *size), number + 1.0).bfloat16()
    text = torch.zeros(7, 3)
    text[: 1 + number % 3] = number + 1.0
    condition, clip = (torch.ones(20, *size), torch.ones(5, 2)) if image else (None, None)
    return Sample(latents, text, condition, clip)


def write(folder, count=10, shard_size=4, **options):
    writer = ShardWriter(folder, MADE, 7, PROMPTS, shard_size)
    for number in range(count):
        writer.add(f"{number}.mp4", sample(number, number % 3 == 0, **options))
    writer.flush()
    return writer


def shard(folder, number: int):
    """A shard's file, counted from 0 in the index."""
    return folder / read_index(folder).shards[number].file


def numbers(batch: Batch) -> list[int]:
    return [int(v) - 1 for v in batch.latents[:, 0, 0, 0, 0]]


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, image=True)
    data = ShardDataset(tmp_path, 2)
    assert len(data) == 10 and data.steps_per_epoch == 5
    for step in range(10):
        batch = data.batch(step)
        for row, number in enumerate(numbers(batch)):
            expected = sample(number, number % 3 == 0, True)
            assert torch.equal(batch.latents[row], expected.latents.float())
            assert torch.equal(batch.text[row], expected.text)
            assert torch.equal(batch.condition[row], expected.condition)
            assert torch.equal(batch.clip[row], expected.clip)
    assert torch.equal(data.negative_text[:2], PROMPTS["negative"])
    assert data.negative_text.shape == data.empty_text.shape == (7, 3)
    assert not list(tmp_path.glob("*.partial"))


def test_an_epoch_has_every_sample_and_a_batch_has_one_shape(tmp_path):
    write(tmp_path)
    data = ShardDataset(tmp_path, 4)
    # 4 wide samples are one batch, 6 others are two
    assert data.steps_per_epoch == 3
    epochs = [[numbers(data.batch(3 * e + s)) for s in range(3)] for e in range(2)]
    for epoch in epochs:
        assert {n for batch in epoch for n in batch} == set(range(10))
    # not only the batches' order is another one, but also who is in them
    assert {frozenset(batch) for batch in epochs[0]} != {frozenset(batch) for batch in epochs[1]}
    assert {data.batch(s).latents.shape[-1] for s in range(3)} == {2, 4}


def test_a_batch_is_the_same_for_any_number_of_processes_and_after_a_restart(tmp_path):
    write(tmp_path)
    for data in (
        ShardDataset(tmp_path, 4, seed=3, drop_text=0.4),
        ToyDataset(4, seed=3, drop_text=0.4),
    ):
        for step in (0, 5):
            whole = data.batch(step)
            for world in (2, 4):
                parts = [data.batch(step, rank, world) for rank in range(world)]
                assert torch.equal(torch.cat([p.latents for p in parts]), whole.latents)
                assert torch.equal(torch.cat([p.text for p in parts]), whole.text)
        with pytest.raises(ValueError, match="multiple of the 3 processes"):
            data.batch(0, 0, 3)
    again = ShardDataset(tmp_path, 4, seed=3, drop_text=0.4)
    first = ShardDataset(tmp_path, 4, seed=3, drop_text=0.4)
    first.batch(0)
    assert torch.equal(first.batch(7).text, again.batch(7).text)
    other = ShardDataset(tmp_path, 4, seed=4)
    assert [numbers(other.batch(s)) for s in range(3)] != [
        numbers(first.batch(s)) for s in range(3)
    ]


def test_shares_of_texts_and_images_that_are_dropped(tmp_path):
    write(tmp_path, image=True)
    data = ShardDataset(tmp_path, 4, drop_text=0.3, image_share=0.6)
    found = [data.batch(step) for step in range(60)]
    empty = [not row.any() for batch in found for row in batch.text]
    with_image = [bool(row.any()) for batch in found for row in batch.condition]
    assert with_image == [bool(row.any()) for batch in found for row in batch.clip]
    assert 0.2 < sum(empty) / len(empty) < 0.4
    assert 0.5 < sum(with_image) / len(with_image) < 0.7


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def poison(path):
    tensors = load_file(path)
    tensors["0.latents"][0, 0, 0, 0] = float("nan")
    rewrite(path, tensors)


def misshape(path):
    tensors = load_file(path)
    tensors["0.latents"] = tensors["0.latents"].transpose(0, 1).contiguous()
    rewrite(path, tensors)


def rewrite(path, tensors):
    """As a program that keeps the index right, but not the values."""
    save_file(tensors, path)
    index = json.loads((path.parent / "index.json").read_text())
    (record,) = [r for r in index["shards"] if r["file"] == path.name]
    record |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (path.parent / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove, "missing"),
        (truncate, "bytes, got"),
        (flip, "checksum"),
        (poison, "0.latents has NaN"),
        (misshape, "other names or shapes"),
    ],
)
def test_a_damaged_shard_is_named_and_skipped(tmp_path, caplog, damage, said):
    write(tmp_path)
    before = ShardDataset(tmp_path, 2)
    path = shard(tmp_path, 1)
    damage(path)
    data = ShardDataset(tmp_path, 2)
    assert list(data.skipped) == [path.name]
    assert said in data.skipped[path.name]
    assert path.name in caplog.text and "1 of 3 shards" in caplog.text
    assert data.fingerprint != before.fingerprint
    found = {n for s in range(data.steps_per_epoch) for n in numbers(data.batch(s))}
    assert found == {0, 1, 2, 3, 8, 9}
    # the writer makes what was lost again, and leaves what was there
    writer = ShardWriter(tmp_path, MADE, 7, PROMPTS, 4)
    assert path.with_name(f"{path.name}.damaged").exists() != (damage is remove)
    assert writer.done == {f"{n}.mp4" for n in found}
    for number in range(4, 8):
        writer.add(f"{number}.mp4", sample(number, number % 3 == 0))
    writer.flush()
    assert ShardDataset(tmp_path, 2).fingerprint == before.fingerprint


@pytest.mark.parametrize("broken", ["file_sha256", "list_entries", "read_tensor"])
def test_a_disk_that_fails_for_a_moment_costs_no_sample(tmp_path, monkeypatch, broken):
    write(tmp_path)
    (tmp_path / "checked.json").unlink(missing_ok=True)
    before = {path.name for path in tmp_path.glob("shard-*")}

    def fails(path, *_):
        error = OSError(5, "Input/output error")
        if broken == "list_entries":
            # as it says it
            raise ValueError("one that cannot be read") from error
        raise error

    monkeypatch.setattr(shard_files, broken, fails)
    for opened in (
        lambda: ShardWriter(tmp_path, MADE, 7, PROMPTS),
        lambda: ShardDataset(tmp_path, 2),
    ):
        with pytest.raises(OSError, match="Input/output error.*start again"):
            opened()
    monkeypatch.undo()
    assert {path.name for path in tmp_path.glob("shard-*")} == before
    assert len(ShardWriter(tmp_path, MADE, 7, PROMPTS).done) == len(ShardDataset(tmp_path, 2)) == 10


def test_folders_without_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no index.json"):
        ShardDataset(tmp_path, 2)
    write(tmp_path, count=2)
    path = shard(tmp_path, 0)
    truncate(path)
    with pytest.raises(ValueError, match=f"1 damaged shards.*{path.name}"):
        ShardDataset(tmp_path, 2)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"shards": []}))
    with pytest.raises(ValueError, match="an empty index"):
        ShardDataset(tmp_path, 2)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"empty": torch.zeros(1, 3)}, "expected the empty and the negative"),
        (PROMPTS | {"negative": torch.zeros(2, 3, dtype=torch.uint8)}, "expected the empty and"),
        (PROMPTS | {"negative": torch.full((2, 3), float("nan"))}, "it has NaN"),
    ],
)
def test_prompts_that_are_damaged_are_refused(tmp_path, tensors, said):
    write(tmp_path, count=2)
    save_file(tensors, tmp_path / "prompts.safetensors")
    with pytest.raises(ValueError, match=f"prompts.safetensors: {said}"):
        ShardDataset(tmp_path, 2)
    (tmp_path / "prompts.safetensors").unlink()
    with pytest.raises(ValueError, match="prompts.safetensors: there is no such file"):
        ShardDataset(tmp_path, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"text_tokens": "7"},
        {"shards": [{"file": "../x.safetensors"}]},
        {"shards": 3},
    ],
)
def test_an_index_that_is_something_else_is_refused(tmp_path, change):
    write(tmp_path, count=2)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match="index.json: it cannot be read"):
        ShardDataset(tmp_path, 2)
    index["shards"][0]["file"] = "../shard-00001.safetensors"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected the name of a shard"):
        read_index(tmp_path)


def test_checksums_are_taken_once(tmp_path, monkeypatch):
    write(tmp_path)
    real, taken = shard_files.file_sha256, []
    monkeypatch.setattr(shard_files, "file_sha256", lambda p: taken.append(p.name) or real(p))
    ShardDataset(tmp_path, 2)
    assert len(taken) == 3
    ShardDataset(tmp_path, 2)
    assert len(taken) == 3
    flip(shard(tmp_path, 0))
    assert ShardDataset(tmp_path, 2).skipped
    assert len(taken) == 4


def test_a_shard_that_changes_in_use_is_noticed(tmp_path, monkeypatch):
    write(tmp_path)
    data = ShardDataset(tmp_path, 2)
    monkeypatch.setattr(shards, "MAX_HEADERS", 1)
    for path in tmp_path.glob("shard-*"):
        truncate(path)
    with pytest.raises(ValueError, match="shard-[0-9a-f]{32}"):
        for step in range(5):
            data.batch(step)
    assert len(data._headers) <= 1


def test_nothing_half_written_is_left_and_what_is_finished_stays(tmp_path, monkeypatch):
    writer = write(tmp_path, count=4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors, path, *rest):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(shard_files, "save_file", full)
    writer.add("x.mp4", sample(9))
    with pytest.raises(OSError, match="no space"):
        writer.flush()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    writer.flush()
    assert len(ShardDataset(tmp_path, 1)) == 5


def test_a_sample_with_nan_is_not_written(tmp_path):
    writer = write(tmp_path, count=1)
    bad = sample(1)
    bad.latents[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="latents has NaN or infinite"):
        writer.add("bad.mp4", bad)
    writer.flush()
    assert writer.done == {"0.mp4"}


def test_samples_of_another_model_do_not_go_into_a_folder(tmp_path):
    write(tmp_path, count=1)
    with pytest.raises(ValueError, match="holds samples with vae 'one', expected 'three'"):
        ShardWriter(tmp_path, MADE | {"vae": "three"}, 7, PROMPTS)


def test_moving_a_batch_keeps_what_is_not_there(tmp_path):
    batch = ToyDataset(2).batch(0).to("cpu", torch.bfloat16)
    assert batch.latents.dtype == batch.condition.dtype == batch.text.dtype == torch.bfloat16
    assert batch.clip is None


def test_the_toy_world_holds_out_its_scenes_and_has_both_tasks(monkeypatch):
    seen = []
    real = batches.encode_prompt
    monkeypatch.setattr(batches, "encode_prompt", lambda p, parse: seen.append(p) or real(p))
    data = ToyDataset(8, drop_text=0.25, image_share=0.5)
    found = [data.batch(step) for step in range(12)]
    prompts = [prompt for prompt in seen if prompt]
    assert 0.6 < len(prompts) / len(seen) < 0.9
    assert not any(parse_prompt(prompt).held_out for prompt in prompts)
    images = [bool(row.any()) for batch in found for row in batch.condition]
    assert 0.3 < sum(images) / len(images) < 0.7
    assert found[0].condition.shape[1] == 20


def test_the_demos_batches_are_what_they_were():
    latents, condition, text = Batches(DemoRecipe(batch=16))[77]
    found = [latents.double().sum(), condition.double().sum(), text.double().sum()]
    assert [float(v) for v in found] == pytest.approx(SUMS, rel=1e-6)


def test_several_folders_are_one_set_of_samples(tmp_path):
    folders = [tmp_path / name for name in ("one", "other")]
    write(folders[0], 6)
    writer = ShardWriter(folders[1], MADE, 7, PROMPTS, 4)
    for number in range(20, 26):
        writer.add(f"{number}.mp4", sample(number))
    writer.flush()
    data = ShardDataset(folders, 2, seed=1)
    assert len(data) == 12
    seen = {n for step in range(data.steps_per_epoch) for n in numbers(data.batch(step))}
    assert seen == {*range(6), *range(20, 26)}
    assert data.fingerprint != ShardDataset(folders[0], 2).fingerprint
    path = shard(folders[1], 0)
    path.write_bytes(b"no")
    assert list(ShardDataset(folders, 2).skipped) == [f"other/{path.name}"]


def test_folders_of_different_models_are_not_mixed(tmp_path):
    write(tmp_path / "one")
    writer = ShardWriter(tmp_path / "other", MADE | {"vae": "another"}, 7, PROMPTS, 4)
    writer.add("a.mp4", sample(1))
    writer.flush()
    with pytest.raises(ValueError, match="other: expected samples that the same models made"):
        ShardDataset([tmp_path / "one", tmp_path / "other"], 2)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_dropped_texts_become_the_empty_or_the_negative_prompt(tmp_path, share):
    write(tmp_path)
    data = ShardDataset(tmp_path, 2, drop_text=0.6, negative_share=share)
    kinds = {"text": 0, "empty": 0, "negative": 0}
    for step in range(300):
        for text in data.batch(step).text:
            kind = "negative" if torch.equal(text, data.negative_text) else "text"
            kinds["empty" if torch.equal(text, data.empty_text) else kind] += 1
    dropped = kinds["empty"] + kinds["negative"]
    assert dropped / 600 == pytest.approx(0.6, abs=0.06)
    assert kinds["negative"] / dropped == pytest.approx(share, abs=0.08)


def test_writers_that_know_nothing_of_each_other_lose_nothing(tmp_path, monkeypatch):
    writers = [ShardWriter(tmp_path, MADE, 7, PROMPTS, 2) for _ in range(2)]
    # both make 3 and 4; the first is stopped before it lists anything
    for number in range(5):
        writers[0].add(f"{number}.mp4", sample(number))
    writers[0].write_shard()
    for number in range(3, 8):
        writers[1].add(f"{number}.mp4", sample(number))
    writers[1].flush()
    data = ShardDataset(tmp_path, 1)
    assert len(data) == 8 and data.steps_per_epoch == 8
    assert sorted(numbers(data.batch(s))[0] for s in range(8)) == list(range(8))
    # a third goes on where both were
    assert ShardWriter(tmp_path, MADE, 7, PROMPTS).done == {f"{n}.mp4" for n in range(8)}


def test_an_index_that_another_writer_overtook_is_written_again(tmp_path, monkeypatch):
    first, second = (ShardWriter(tmp_path, MADE, 7, PROMPTS, 2) for _ in range(2))
    real = shard_files.write_index

    def late(folder, index):
        monkeypatch.setattr(shard_files, "write_index", real)
        second.add("b.mp4", sample(2))
        second.flush()
        real(folder, index)

    monkeypatch.setattr(shard_files, "write_index", late)
    first.add("a.mp4", sample(1))
    first.flush()
    assert len(ShardDataset(tmp_path, 1)) == 2


def test_a_shard_that_was_never_listed_is_looked_at_before_it_is_believed(tmp_path, caplog):
    writer = ShardWriter(tmp_path, MADE, 7, PROMPTS, 1)
    for number in range(4):
        writer.add(f"{number}.mp4", sample(number))
    paths = [tmp_path / s.file for s in writer.index.shards]
    flip(paths[0])
    truncate(paths[1])
    save_file({"0.latents": torch.ones(1)}, paths[2])
    assert ShardWriter(tmp_path, MADE, 7, PROMPTS).done == {"3.mp4"}
    assert [path.exists() for path in paths] == [False, False, False, True]
    assert all(path.name in caplog.text for path in paths[:3])
    with pytest.raises(ValueError, match="holds samples with vae 'one', expected 'three'"):
        ShardWriter(tmp_path, MADE | {"vae": "three"}, 7, PROMPTS)


def test_an_index_of_the_first_format_is_read_and_added_to(tmp_path):
    write(tmp_path, 8)
    index = json.loads((tmp_path / "index.json").read_text())
    for number, record in enumerate(index["shards"], 1):
        name = f"shard-{number:05}.safetensors"
        (tmp_path / record["file"]).rename(tmp_path / name)
        record |= {"file": name, "sha256": file_sha256(tmp_path / name)}
    (tmp_path / "index.json").write_text(json.dumps(index | {"format": "wantrim_shards/1"}))
    assert len(ShardDataset(tmp_path, 2)) == 8
    writer = ShardWriter(tmp_path, MADE, 7, PROMPTS, 4)
    assert len(writer.done) == 8
    writer.add("8.mp4", sample(8))
    writer.flush()
    assert len(ShardDataset(tmp_path, 2)) == 9


def test_partial_files_of_a_crash_go_when_nobody_writes_them_any_more(tmp_path):
    old, young = tmp_path / "a.partial", tmp_path / "b.partial"
    for path, age in ((old, 90000), (young, 600)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    ShardWriter(tmp_path, MADE, 7, PROMPTS)
    assert young.exists() and not old.exists()
