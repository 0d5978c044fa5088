"""A full disk, a failing write or a failing rename loses nothing that was there."""

import errno
import os
import random
import shutil
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from wantrim.profiles import artifact
from wantrim.profiles.artifact import replacing
from wantrim.profiles.calibration import Calibration, load_calibration
from wantrim.profiles.recorder import NotFinite, Recorder, open_profile, save_profile
from wantrim.slim import file as slim_file
from wantrim.slim.file import Entry, write_tensors
from wantrim.tests.test_fuzz_files import MODEL, write_calibration, write_profile, write_router

try:
    import resource
except ImportError:
    resource = None

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(n)`: the n-th write from now on leaves half a file and fails."""
    real = artifact.save_file

    def break_at(number: int) -> None:
        left = count(number, -1)

        def save(tensors, path, metadata):
            real(tensors, path, metadata)
            if next(left) == 0:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                raise SafetensorError("Error while serializing: I/O error: No space left on device")

        monkeypatch.setattr(artifact, "save_file", save)

    return break_at


@pytest.fixture
def stuck(monkeypatch):
    """`stuck(n)`: the n-th rename from now on fails, once."""
    real = os.replace

    def break_at(number: int) -> None:
        left = count(number, -1)

        def replace(source, target):
            if next(left) == 0:
                raise NO_SPACE
            real(source, target)

        monkeypatch.setattr(Path, "replace", replace)

    return break_at


def test_what_a_crash_left_aside_comes_back_or_goes(tmp_path):
    path, other = tmp_path / "one", tmp_path / "two"
    for there in (False, True):
        (tmp_path / "one.old").write_bytes(b"before the crash")
        if there:
            path.write_bytes(b"after it")
        with pytest.raises(ValueError, match="x"), replacing(path, other):
            raise ValueError("x")
        assert files(tmp_path) == {"one": b"after it" if there else b"before the crash"}


@pytest.mark.parametrize("write", [write_profile, write_router, write_calibration])
@pytest.mark.parametrize("there", [True, False])
def test_an_artifact_that_cannot_be_written_leaves_what_was_there(
    write, there, full_disk, stuck, tmp_path
):
    path = tmp_path / "one.safetensors"
    if there:
        path.write_bytes(b"what was there")
    before = files(tmp_path)
    full_disk(0)
    with pytest.raises(SafetensorError):
        write(path)
    assert files(tmp_path) == before
    stuck(0)
    with pytest.raises(OSError, match="No space"):
        write(path)
    assert files(tmp_path) == before
    write(path)
    assert list(files(tmp_path)) == ["one.safetensors"]


def recorder(seed: int, calibrate="attention") -> Recorder:
    """One with a call and a calibration in it, as a run leaves it."""
    torch.manual_seed(seed)
    made = Recorder(MODEL, calibrate=calibrate)
    for name, value in made._sums.items():
        made._sums[name] = torch.rand_like(value)
    made._sums["count"] = torch.eye(10)[seed]
    if calibrate != "none":
        for block in range(MODEL.num_blocks):
            for kind in ("self", "cross"):
                made.calibration.add(kind, block, torch.randn(5, MODEL.dim))
    made.about["id"] = f"run {seed}"
    return made


@pytest.mark.parametrize("calibrate", ["none", "attention"])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("there", ["nothing", "profile", "both"])
def test_a_profile_and_its_calibration_are_written_together(
    merge, calibrate, there, full_disk, stuck, tmp_path, monkeypatch
):
    folder, trial = tmp_path / "folder", tmp_path / "trial"
    path = folder / "one.safetensors"
    folder.mkdir()
    if there != "nothing":
        save_profile(recorder(1, "attention" if there == "both" else "none"), path, merge=False)
    before = files(folder)
    shutil.copytree(folder, trial)
    save_profile(recorder(2, calibrate), trial / path.name, merge)
    for break_at in (full_disk, stuck):
        fresh, failures = recorder(2, calibrate), 0
        sums = {name: value.clone() for name, value in fresh.calibration.sums.items()}
        for number in range(8):
            break_at(number)
            try:
                save_profile(fresh, path, merge)
                break
            except (OSError, SafetensorError):
                failures += 1
            assert files(folder) == before
            # the run is still all there
            assert fresh.calibration.sums.keys() == sums.keys()
            for name, value in sums.items():
                torch.testing.assert_close(fresh.calibration.sums[name], value)
        monkeypatch.undo()
        # one failure for each file at least, and then it is as if there had been none
        assert failures >= 1 + (calibrate != "none")
        same_files(path, trial / path.name)
        shutil.rmtree(folder)
        folder.mkdir()
        for name, data in before.items():
            (folder / name).write_bytes(data)


def same_files(path: Path, other: Path) -> None:
    assert files(path.parent).keys() == files(other.parent).keys()
    ours, theirs = open_profile(path), open_profile(other)
    assert ours.profile.runs == theirs.profile.runs
    for name, value in ours.profile.tensors.items():
        assert torch.equal(value, theirs.profile.tensors[name])
    if ours.calibration is not None:
        one, two = load_calibration(ours.calibration), load_calibration(theirs.calibration)
        assert one.tokens == two.tokens
        for name in one.tokens:
            torch.testing.assert_close(one.named(name), two.named(name))


def test_a_calibration_that_is_damaged_half_way_is_not_taken_in(tmp_path):
    """The artist is told to turn merge off: the run must not carry a part of the old one then."""
    path = tmp_path / "one.safetensors"
    old = recorder(1)
    saved = save_profile(old, path, merge=False).calibration
    damaged = Calibration(MODEL, "attention")
    damaged.absorb(load_calibration(saved))
    damaged.sums["cross.2"][:] = torch.nan
    damaged.save(saved)
    fresh = recorder(2)
    sums = {name: value.clone() for name, value in fresh.calibration.sums.items()}
    tokens = dict(fresh.calibration.tokens)
    with pytest.raises(ValueError, match="not finite"):
        save_profile(fresh, path, merge=True)
    assert fresh.calibration.tokens == tokens
    for name, value in sums.items():
        torch.testing.assert_close(fresh.calibration.sums[name], value)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("what", ["profile", "calibration"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_came_out_black_is_not_saved_over_a_good_one(what, merge, value, tmp_path):
    path = tmp_path / "one.safetensors"
    save_profile(recorder(1), path, merge=False)
    before = files(tmp_path)
    black = recorder(2)
    sums = black._sums if what == "profile" else black.calibration.sums
    sums[sorted(sums)[-1]].view(-1)[3] = value
    with pytest.raises(NotFinite, match="not finite, as when the video comes out black"):
        save_profile(black, path, merge)
    assert files(tmp_path) == before
    open_profile(path)


@contextmanager
def disk_of(size: int):
    """No file grows beyond `size` bytes: the system itself ends the write in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_any(path: Path) -> None:
    entries = [Entry("a", "F32", (700,)), Entry("b", "F16", (300, 2))]
    write_tensors(path, entries, {}, lambda e: torch.ones(e.shape, dtype=slim_file.DTYPES[e.dtype]))


@pytest.mark.skipif(resource is None, reason="no limit on the size of files on this system")
@pytest.mark.parametrize("write", [write_profile, write_router, write_calibration, write_any])
def test_a_write_that_the_system_ends_loses_nothing(write, tmp_path):
    trial, path = tmp_path / "trial.safetensors", tmp_path / "one.safetensors"
    write(trial)
    whole = trial.read_bytes()
    trial.unlink()
    path.write_bytes(b"what was there")
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        with pytest.raises((OSError, SafetensorError)) as error, disk_of(size):
            write(path)
        assert "too large" in str(error.value)
        assert files(tmp_path) == {path.name: b"what was there"}, size
    with disk_of(len(whole)):
        write(path)
    assert path.stat().st_size == len(whole)


@pytest.mark.parametrize("fails", ["write", "flush", "rename", "making"])
def test_a_slim_file_that_cannot_be_written_leaves_the_old_one(fails, stuck, tmp_path, monkeypatch):
    path = tmp_path / "slim.safetensors"
    path.write_bytes(b"what was there")
    entries = [Entry("a", "F32", (4,)), Entry("b", "F16", (2, 2))]

    def make(entry):
        if fails == "making" and entry.name == "b":
            raise NO_SPACE
        return torch.ones(entry.shape, dtype=slim_file.DTYPES[entry.dtype])

    def progress(done, total):
        if fails == "write":
            raise NO_SPACE

    def fsync(number):
        raise NO_SPACE

    if fails == "flush":
        monkeypatch.setattr(slim_file.os, "fsync", fsync)
    if fails == "rename":
        stuck(0)
    with pytest.raises(OSError, match="No space"):
        write_tensors(path, entries, {}, make, progress)
    assert files(tmp_path) == {"slim.safetensors": b"what was there"}
    monkeypatch.undo()
    fails = ""
    assert write_tensors(path, entries, {}, make) == path.stat().st_size


def test_a_partial_file_that_is_a_link_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.safetensors.partial").symlink_to(outside)
    write_router(folder / "a.safetensors")
    entry = Entry("x", "F32", (4,))
    write_tensors(folder / "b.safetensors", [entry], {}, lambda _: torch.ones(4))
    assert outside.read_bytes() == b"mine"
    assert sorted(files(folder)) == ["a.safetensors", "b.safetensors"]


def test_any_failure_among_many_files_takes_everything_back(tmp_path, stuck, monkeypatch):
    pick = random.Random(5)
    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths = [folder / name for name in "abc"]
        for path in paths:
            if pick.random() < 0.6:
                path.write_text(f"old {path.name}")
        before, written = files(folder), [pick.random() < 0.7 for _ in "ab"] + [True]
        stuck(pick.randrange(8))
        try:
            with replacing(*paths) as partials:
                for partial, wanted in zip(partials, written, strict=True):
                    if wanted:
                        partial.write_text("new")
        except OSError:
            expected = before
        else:
            expected = {
                path.name: b"new" for path, wanted in zip(paths, written, strict=True) if wanted
            }
        monkeypatch.undo()
        assert files(folder) == expected, number
