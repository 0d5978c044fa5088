"""Profiles and calibrations as files: what is kept, merged and refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wantrim.demo.profile import PROFILE
from wantrim.profiles.calibration import load_calibration
from wantrim.profiles.profile import KIND, load_profile
from wantrim.profiles.recorder import calibration_path, open_profile, save_profile
from wantrim.tests.test_profile import GRID, TOKENS, recorded, same, wan


def test_a_saved_profile_is_the_profile(tmp_path):
    recorder = recorded(wan(), calibrate="attention")
    profile, path = recorder.profile(), tmp_path / "sub" / "one.safetensors"
    sums = {name: value.clone() for name, value in recorder.calibration.sums.items()}
    saved = save_profile(recorder, path, merge=True)
    assert saved.calibration == calibration_path(path) and saved.calibration.is_file()
    assert not recorder.calibration.sums
    opened = open_profile(path)
    same(opened.profile, profile, rtol=0, atol=0)
    assert opened.profile.runs == profile.runs
    assert opened.profile.runs[0]["grid"] == list(GRID)
    assert opened.profile.runs[0]["sigmas"] == [1.0, 0.75]
    found = load_calibration(opened.calibration)
    for name, value in sums.items():
        kind, block = name.split(".")
        assert torch.equal(found.gram(kind, int(block)), value)
    assert found.gram("ffn", 0) is None
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "one.calibration.safetensors",
        "one.safetensors",
    ]


def test_a_file_that_was_read_can_be_replaced(tmp_path):
    """On Windows one that is mapped cannot be; here it can be seen that it is not."""
    path = tmp_path / "one.safetensors"
    save_profile(recorded(wan()), path, merge=True)
    opened = open_profile(path)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()
    assert opened.profile.calls


def test_saving_again_adds_or_replaces(tmp_path):
    model, path = wan(), tmp_path / "one.safetensors"
    first = recorded(model, calibrate="attention")
    gram = first.calibration.sums["self.0"].clone()
    save_profile(first, path, merge=True)
    # the same recorder again: its calibration is on disk already
    assert save_profile(first, path, merge=False).calibration is not None
    second = recorded(model, seed=5, calibrate="attention")
    gram += second.calibration.sums["self.0"]
    both = save_profile(second, path, merge=True)
    assert both.profile.calls == 4 and len(both.profile.runs) == 2
    found = load_calibration(both.calibration)
    torch.testing.assert_close(found.gram("self", 0), gram)
    assert found.tokens["self.0"] == 4 * TOKENS
    # a run without a calibration leaves the old one where it is
    third = save_profile(recorded(model), path, merge=True)
    assert third.profile.calls == 6 and third.calibration is not None
    replaced = save_profile(recorded(model), path, merge=False)
    assert replaced.profile.calls == 2 and replaced.calibration is None
    assert not calibration_path(path).exists()


def test_a_run_is_added_once(tmp_path):
    recorder, path = recorded(wan()), tmp_path / "one.safetensors"
    recorder.about["id"] = "a"
    for _ in range(2):
        assert save_profile(recorder, path, merge=True).profile.calls == 2
    recorder.about["id"] = "b"
    assert save_profile(recorder, path, merge=True).profile.calls == 4


def test_another_model_is_refused_and_the_file_stays(tmp_path):
    path = tmp_path / "one.safetensors"
    save_profile(recorded(wan(), calibrate="attention"), path, merge=True)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="weights are not"):
        save_profile(recorded(wan(seed=1)), path, merge=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    other = recorded(wan(seed=1), calibrate="attention").calibration
    with pytest.raises(ValueError, match="two models"):
        other.absorb(load_calibration(calibration_path(path)))
    other.save(calibration_path(path))
    with pytest.raises(ValueError, match="another model than one.safetensors"):
        open_profile(path)


def rewrite(path, header=None, tensors=None, key=KIND.key):
    """Change a file's JSON header and tensors, by functions of the old ones."""
    with safe_open(path, "pt") as file:
        old = json.loads(file.metadata()[key])
        held = {name: file.get_tensor(name) for name in file.keys()}
    new = header(old) if header else old
    held = tensors(held) if tensors else held
    save_file(held, path, {key: new if isinstance(new, str) else json.dumps(new)})


def without(name):
    return lambda held: {key: value for key, value in held.items() if key != name}


DAMAGE = {
    "no profile": ({"header": lambda h: h | {"format": "x"}}, "expected a WanTrim profile"),
    "a list": ({"header": lambda h: [h]}, "no profile header"),
    "no JSON": ({"header": lambda h: "{"}, "cannot be read"),
    "deep JSON": ({"header": lambda h: "[" * 100000}, "cannot be read"),
    "no model": ({"header": lambda h: h | {"model": None}}, "expected the sizes"),
    "other sizes": (
        {"header": lambda h: h | {"model": h["model"] | {"num_blocks": 10**9}}},
        "damaged file",
    ),
    "no number": (
        {"header": lambda h: h | {"model": h["model"] | {"sample": [float("nan")]}}},
        "finite numbers",
    ),
    "huge number": (
        {"header": lambda h: h | {"model": h["model"] | {"sample": [10**4000]}}},
        "finite numbers",
    ),
    "no ratio": ({"tensors": without("ratio")}, "ratio: expected"),
    "cut ratio": ({"tensors": lambda t: t | {"ratio": t["ratio"][:5]}}, "ratio: expected"),
    "nan": ({"tensors": lambda t: t | {"ratio": t["ratio"] * torch.nan}}, "not finite"),
    "bytes": ({"tensors": lambda t: t | {"ratio": t["ratio"].to(torch.float8_e5m2)}}, "ratio"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_profiles_are_refused(kind, tmp_path):
    change, said = DAMAGE[kind]
    path = tmp_path / "one.safetensors"
    recorded(wan(), steps=1).profile().save(path)
    load_profile(path)
    rewrite(path, **change)
    with pytest.raises(ValueError, match=said) as error:
        load_profile(path)
    assert "one.safetensors" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      "])
def test_files_that_are_no_safetensors_are_refused(content, tmp_path):
    path = tmp_path / "one.safetensors"
    path.write_bytes(content)
    for load in (load_profile, load_calibration):
        with pytest.raises(ValueError, match="one.safetensors: expected a WanTrim"):
            load(path)


CALIBRATION_DAMAGE = {
    "format": ({"header": lambda h: h | {"format": 1}}, "expected a WanTrim calibration"),
    "tokens": ({"header": lambda h: h | {"tokens": {}}}, "damaged file"),
    "count": ({"header": lambda h: h | {"tokens": h["tokens"] | {"self.0": True}}}, "self.0"),
    "name": ({"tensors": lambda t: t | {"self.99": t["self.0"].clone()}}, "damaged file"),
    "shape": ({"tensors": lambda t: t | {"self.0": t["self.0"][:2].clone()}}, "self.0"),
    "dtype": ({"tensors": lambda t: t | {"self.0": t["self.0"].half()}}, "self.0"),
}


@pytest.mark.parametrize("kind", CALIBRATION_DAMAGE)
def test_damaged_calibrations_are_refused(kind, tmp_path):
    change, said = CALIBRATION_DAMAGE[kind]
    path = tmp_path / "one.safetensors"
    recorded(wan(), steps=1, calibrate="attention").calibration.save(path)
    load_calibration(path)
    rewrite(path, key="wantrim_calibration", **change)
    with pytest.raises(ValueError, match=said) as error:
        load_calibration(path)
    assert "one.safetensors" in str(error.value)


def test_a_calibration_with_nan_is_refused_when_it_is_read(tmp_path):
    path = tmp_path / "one.safetensors"
    recorded(wan(), steps=1, calibrate="attention").calibration.save(path)
    nan = {"tensors": lambda t: t | {"self.0": t["self.0"] * torch.nan}}
    rewrite(path, key="wantrim_calibration", **nan)
    saved = load_calibration(path)
    assert saved.gram("self", 1) is not None
    with pytest.raises(ValueError, match=r"self\.0 holds values that are not finite"):
        saved.gram("self", 0)


def test_a_file_of_the_first_version_is_read(tmp_path):
    """It held what four patterns keep of the attention, the own latent frame first."""
    path = tmp_path / "old.safetensors"
    with safe_open(PROFILE, "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    ratio = tensors.pop("ratio")
    others = torch.full_like(ratio, 7.0)
    tensors["mass"] = torch.stack([ratio, others, others, others], -1)
    header["wantrim_profile"] = header["wantrim_profile"].replace("profile/2", "profile/1")
    save_file(tensors, path, header)
    read = load_profile(path)
    assert torch.equal(read.tensors["ratio"], ratio) and "mass" not in read.tensors
    read.save(tmp_path / "new.safetensors")
    assert torch.equal(load_profile(tmp_path / "new.safetensors").ratio(), read.ratio())
