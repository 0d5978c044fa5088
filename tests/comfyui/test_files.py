"""File names and files as a node gets them: in the allowed folders, readable, or refused in words."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import folder_paths
from wantrim.hosts.comfyui.slim import load_slim
from wantrim.methods.cost import Width
from wantrim.methods.routers import RouterMLP
from wantrim.nodes import blocks, profile, slim, tuned
from wantrim.nodes.files import plain_name
from wantrim.profiles.profile import load_profile
from wantrim.profiles.recorder import ProfileFile
from wantrim.slim.export import export_slim
from wantrim.slim.file import KEY
from wantrim.slim.router import TrainedRouter
from wantrim.slim.source import open_source
from wantrim.tests.comfyui import put, tiny
from wantrim.toy import CHECKPOINT
from wantrim.training.router_file import save_router

FOLDERS = ("diffusion_models", profile.FOLDER, blocks.FOLDER, slim.FOLDER)
WIDTH = Width(
    ((0, 2, 5),) * tiny.LAYERS, ((1, 7),) * tiny.LAYERS, (tuple(range(64)),) * tiny.LAYERS
)
IMAGES = torch.zeros(1, 8, 8, 3)
# names that lead out of a folder, are none, or mean something to some file system
OUT = [
    "..", ".", "/", "", " ", "../one.safetensors", "../../one.safetensors", "x/../../one.safetensors",
    "..\\one.safetensors", "/one.safetensors", "//one.safetensors", "C:\\one.safetensors",
    "\\\\host\\share\\one.safetensors", "one.safetensors\0.txt", "\0", "one.safetensors/",
    "~/one.safetensors", "file:///one.safetensors", "%2e%2e/one.safetensors", "con", "nul.safetensors",
    "x" * 5000, "\ud800", "\n", "one.safetensors:stream", None, 3, True, [], ["one.safetensors"], {},
]  # fmt: skip


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Every folder that nodes read and write, alone in a place of its own."""
    for name in FOLDERS:
        (tmp_path / "models" / name).mkdir(parents=True)
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths,
            name,
            ([str(tmp_path / "models" / name)], {".safetensors"}),
        )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    # what must not be reached
    for outside in (tmp_path, tmp_path / "models"):
        (outside / "one.safetensors").write_bytes(profile.DEMO_FILE.read_bytes())
    return tmp_path / "models"


@pytest.fixture(scope="module")
def good_slim(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("slim")
    weights, metadata = tiny.state_dict("t2v")
    save_file(weights, folder / "full.safetensors", metadata)
    export_slim(open_source(folder / "full.safetensors"), folder / "slim.safetensors", WIDTH)
    return (folder / "slim.safetensors").read_bytes()


def write_slim(name, **options):
    given = ProfileFile(load_profile(profile.DEMO_FILE))
    inputs = {"diffusion_model": slim.DEMO, "prune_ratio": 0.3, "rule": "pare", "refit": False}
    return slim.WanTrimSlim.execute(profile=given, filename=name, **{**inputs, **options})


def write_profile(name):
    return profile.WanTrimSaveProfile.execute(None, None, name, True)


LOADERS = {
    "profile": (profile.FOLDER, profile.WanTrimLoadProfile.execute),
    "router": (
        blocks.FOLDER,
        lambda name: put.routed(tiny.base_model(), "trained", file=name),
    ),
    "slim": (slim.FOLDER, slim.WanTrimLoadSlim.execute),
    "full": ("diffusion_models", lambda name: write_slim("new", diffusion_model=name)),
}
NODE = {"profile": profile.LOAD, "router": blocks.NAME, "slim": slim.LOAD, "full": slim.TRIM}


def everything(folder) -> set:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(kind: str, name) -> str:
    with pytest.raises(ValueError) as error:
        LOADERS[kind][1](name)
    assert type(error.value) is ValueError, repr(error.value)
    said = str(error.value)
    assert said.startswith(f"{NODE[kind]}: ") and len(said) < 1000, said
    return said


@pytest.mark.parametrize("kind", LOADERS)
def test_names_that_lead_out_of_the_folder_load_nothing(kind, folders):
    before = everything(folders.parent)
    for name in OUT:
        refused(kind, name)
    assert everything(folders.parent) == before


@pytest.mark.parametrize("kind", LOADERS)
def test_what_is_no_file_is_not_waited_for(kind, folders):
    folder = folders / LOADERS[kind][0]
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "nowhere.safetensors").symlink_to(folder / "gone")
    for name in ("folder", "pipe", "loop", "nowhere", "gone"):
        refused(kind, f"{name}.safetensors")


@pytest.mark.parametrize("kind", LOADERS)
def test_files_of_the_wrong_kind_are_refused_by_node_and_name(kind, folders, good_slim):
    folder = folders / LOADERS[kind][0]
    base = tiny.base_model()
    mlp = RouterMLP(tiny.LAYERS, 0, hidden=8, time_dim=8).requires_grad_(False)
    router = folders / "router.safetensors"
    model = open_source(CHECKPOINT).model
    save_router(router, TrainedRouter(mlp, "none", model))
    files = {
        "profile": profile.DEMO_FILE.read_bytes(),
        "router": router.read_bytes(),
        "slim": good_slim,
        "full": CHECKPOINT.read_bytes(),
        "nothing": b"",
        "text": b"<html>404</html>" * 10,
        "pickle": b"\x80\x02}q\x00." * 30,
    }
    for other, data in files.items():
        # the demo's router is of another model than the base
        if other != kind or kind == "router":
            (folder / "other.safetensors").write_bytes(data)
            assert "other.safetensors" in refused(kind, "other.safetensors")
    assert not base.model_options["transformer_options"]


def test_names_that_cannot_be_files_everywhere_are_never_written(folders):
    before = everything(folders.parent)
    for name in OUT:
        for node, save in ((slim.TRIM, write_slim), (profile.SAVE, write_profile)):
            with pytest.raises(ValueError, match="filename: expected a plain name") as error:
                save(name)
            assert str(error.value).startswith(f"{node}: ") and len(str(error.value)) < 400
        # and before the queue begins
        if isinstance(name, str) and name.strip():
            for node in (slim.WanTrimSlim, profile.WanTrimSaveProfile, tuned.WanTrimVerdict):
                assert "expected a plain name" in node.validate_inputs(filename=name)
    for node in (slim.WanTrimSlim, profile.WanTrimSaveProfile):
        assert node.validate_inputs(filename="my_wan") is node.validate_inputs() is True
        # letters with marks of their own, and as macOS writes accents
        for name in ("วิดีโอ", "मेरा मॉडल", "cafe\u0301", "映像" * 33):
            assert node.validate_inputs(filename=name) is True, name
        # a file system counts bytes, and an ending comes behind it
        assert "at most 100, of other than Latin letters 66" in node.validate_inputs(
            filename="映像" * 34
        )
    assert everything(folders.parent) == before


def test_any_name_that_is_taken_is_a_file_in_the_folder(tmp_path):
    """Names by lot, of what is dangerous in names."""
    pick, taken = random.Random(1), 0
    pieces = [".", "..", "/", "\\", ":", "a", "con", "nul", " ", "-", "\0", "\n", "ü", "1", "~", "$",
              "*", "\u202e", "\uff0e", "\u2215", ".safetensors", ".calibration", "aux", "(", "com1"]  # fmt: skip
    for _ in range(3000):
        given = "".join(pick.choice(pieces) for _ in range(pick.randrange(1, 6)))
        try:
            name = plain_name("Node", given, "x")
        except ValueError:
            continue
        taken += 1
        path = tmp_path / f"{name}.safetensors"
        assert path.resolve().parent == tmp_path.resolve() and path.name == f"{name}.safetensors"
        assert not set(name) & set('/\\:*?"<>|\0\n~$\u202e\u2215') and not name.startswith(
            (".", "-")
        )
        assert name.split(".")[0].lower() not in ("con", "nul", "aux", "com1"), name
    assert taken > 100


def test_a_full_disk_is_said_and_loses_nothing(folders, monkeypatch):
    target = folders / slim.FOLDER / "mine.safetensors"
    target.write_bytes(b"what was there")
    before = everything(folders)

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(target), "replace", full)
    with pytest.raises(
        ValueError, match="WanTrim Slim: mine.safetensors cannot be written"
    ) as error:
        write_slim("mine", overwrite=True)
    assert "No space" in str(error.value)
    assert everything(folders) == before and target.read_bytes() == b"what was there"
    monkeypatch.undo()


def rewritten(data: bytes, path, change) -> None:
    """A slim file with other tensors under the same header."""
    path.write_bytes(data)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    tensors = load_file(path)
    change(tensors)
    assert KEY in metadata
    save_file(tensors, path, metadata)


def test_slim_weights_that_are_missing_or_of_another_size_are_refused(tmp_path, good_slim):
    """By name, and never a model that is whole only in part."""
    path, pick = tmp_path / "bad.safetensors", random.Random(2)
    path.write_bytes(good_slim)
    load_slim(str(path))
    names = sorted(load_file(path))
    top = [name for name in names if ".blocks." not in name]
    for name in [*pick.sample(top, 5), *pick.sample(sorted(set(names) - set(top)), 7)]:
        changes = [lambda t, n=name: t.pop(n)]
        changes.append(lambda t, n=name: t.update({n: torch.cat([t[n], t[n]])}))
        changes.append(lambda t, n=name: t.update({n: t[n].reshape(-1)[:1].clone()}))
        for number, change in enumerate(changes):
            rewritten(good_slim, path, change)
            with pytest.raises(ValueError, match="bad.safetensors") as error:
                load_slim(str(path))
            assert type(error.value) is ValueError and len(str(error.value)) < 1000, (name, number)
