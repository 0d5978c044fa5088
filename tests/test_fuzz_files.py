"""Profiles, routers, calibrations and checkpoints as a hostile or a dying disk hands them over."""

import faulthandler
import json
import os
import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wantrim.hosts.diffusers.weights import load_original, save_original
from wantrim.methods.routers import Content, RouterMLP
from wantrim.profiles.calibration import Calibration, load_calibration
from wantrim.profiles.fingerprint import Fingerprint
from wantrim.profiles.picture import summary
from wantrim.profiles.profile import KIND as PROFILE
from wantrim.profiles.profile import Profile
from wantrim.profiles.recorder import open_profile
from wantrim.slim.export import export_slim
from wantrim.slim.file import list_entries, read_header, read_tensor
from wantrim.slim.router import KIND as ROUTER
from wantrim.slim.router import TrainedRouter, load_router
from wantrim.slim.source import open_source
from wantrim.tests.test_slim import SMALL_WIDTH, small
from wantrim.training.router_file import save_router

MODEL = Fingerprint(48, 80, 3, 4, 16, 16, (0.5, -0.25))
# a reader that needs longer hangs, on however busy a machine
PATIENCE = 60
ROUNDS = 40


def write_profile(path: Path) -> None:
    made = Profile.empty(MODEL)
    torch.manual_seed(1)
    for name, value in made.tensors.items():
        made.tensors[name] = torch.rand_like(value)
    made.tensors["count"] = torch.ones(10)
    made.runs = [{"grid": [3, 4, 5], "context_tokens": 7, "sigmas": [1.0, 0.5], "calls": 2}]
    made.tuned = [{"sigmas": [1.0, 0.5, 0.0], "speedup": 1.5, "chosen": "WanTrim 1.5x"}]
    made.save(path)


def write_router(path: Path) -> None:
    torch.manual_seed(2)
    mlp = RouterMLP(MODEL.num_blocks, 16, hidden=8, time_dim=8).requires_grad_(False)
    save_router(path, TrainedRouter(mlp, "latent", MODEL))


def write_calibration(path: Path) -> None:
    made = Calibration(MODEL, "all")
    torch.manual_seed(3)
    for kind, size in (("self", 48), ("cross", 48), ("ffn", 80)):
        made.add(kind, 1, torch.randn(5, size))
    made.save(path)


def write_full(path: Path) -> None:
    save_original(path, small(), torch.float32, {})


def write_slim(path: Path) -> None:
    full = path.with_name("source.safetensors")
    write_full(full)
    export_slim(open_source(full), path, SMALL_WIDTH)
    full.unlink()


def use_profile(path: Path) -> None:
    opened = open_profile(path)
    summary(opened.profile)
    opened.profile.importance("self"), opened.profile.ratio()


def use_router(path: Path) -> None:
    router = load_router(path)
    content = Content(torch.zeros(1, 4, 3, 6, 5), torch.zeros(1, 16))
    router.ask(torch.tensor([0.5]), content)


def use_calibration(path: Path) -> None:
    saved = load_calibration(path)
    for name in saved.tokens:
        kind, _, block = name.partition(".")
        saved.gram(kind, int(block))


def use_slim(path: Path) -> None:
    header = read_header(path)
    assert header.transformer
    for entry in list_entries(path)[0]:
        read_tensor(path, entry)


def use_full(path: Path) -> None:
    source = open_source(path)
    for block in range(source.model.num_blocks):
        source.signature(block)


@dataclass
class Reader:
    """A kind of file: how a good one is made, and everything that reads it."""

    write: Callable[[Path], None]
    use: Callable[[Path], None]
    # its JSON header in safetensors' metadata
    key: str
    # how much of every loop it gets: one that builds a model takes its time
    share: float = 1.0


READERS = {
    "profile": Reader(write_profile, use_profile, "wantrim_profile"),
    "router": Reader(write_router, use_router, "wantrim_router"),
    "calibration": Reader(write_calibration, use_calibration, "wantrim_calibration"),
    "slim": Reader(write_slim, use_slim, "wantrim_slim"),
    "full": Reader(write_full, use_full, "config"),
    "demo": Reader(write_full, load_original, "config", 0.2),
}


def rounds(kind: str) -> int:
    return round(ROUNDS * READERS[kind].share)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, bytes]:
    """The bytes of a good file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    made = {}
    for name, reader in READERS.items():
        path = folder / f"{name}.safetensors"
        reader.write(path)
        reader.use(path)
        made[name] = path.read_bytes()
    return made


@contextmanager
def patience():
    """Ends the tests when a reader hangs: a signal would not, in code that is not Python's."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def check(use: Callable[[Path], None], path: Path, what: str) -> bool:
    """Read a damaged file; True when it is refused, by its name and in words."""
    with patience():
        try:
            use(path)
        except ValueError as error:
            # subclasses are accidents of the reader: UnicodeDecodeError, JSONDecodeError
            assert type(error) is ValueError, f"{what}: {error!r}"
            said = str(error)
            assert path.name in said and len(said) < 1500, f"{what}: {said[:3000]}"
            return True
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
    return False


def parts(data: bytes) -> tuple[dict, bytes]:
    """safetensors' own header and the bytes behind it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize("kind", READERS)
def test_truncated_files_are_refused(kind, good, tmp_path):
    data, path = good[kind], tmp_path / "one.safetensors"
    pick = random.Random(1)
    length = 8 + int.from_bytes(data[:8], "little")
    ends = {0, 1, 7, 8, 9, length - 1, length, length + 1, len(data) - 1}
    for end in sorted(ends | {pick.randrange(len(data)) for _ in range(rounds(kind))}):
        path.write_bytes(data[:end])
        assert check(READERS[kind].use, path, f"cut at {end}"), end


@pytest.mark.parametrize("kind", READERS)
def test_files_with_flipped_bits_are_read_or_refused(kind, good, tmp_path):
    data, path = good[kind], tmp_path / "one.safetensors"
    pick, refused = random.Random(2), 0
    length = 8 + int.from_bytes(data[:8], "little")
    for number in range(3 * rounds(kind)):
        bad = bytearray(data)
        # two of three in the header, where they hurt
        most = length if number % 3 else len(data)
        for _ in range(pick.choice((1, 1, 4))):
            bad[pick.randrange(most)] ^= 1 << pick.randrange(8)
        path.write_bytes(bad)
        refused += check(READERS[kind].use, path, f"bits {number}")
    assert refused > rounds(kind)


HEADERS = {
    "huge length": (1 << 63).to_bytes(8, "little") + b"{}",
    "longest length": b"\xff" * 8 + b"{}",
    "100 MB length": (100_000_001).to_bytes(8, "little") + b" " * 1000,
    "no JSON": joined(b"not json", b""),
    "no text": joined(b"\xff\xfe\x00{}", b""),
    "nested": joined(b"[" * 200_000, b""),
    "nested metadata": joined(b'{"__metadata__":' + b'{"a":' * 100_000, b""),
    "a list": joined(b"[]", b""),
    "null": joined(b"null", b""),
    "nothing in it": joined(b"{}", b""),
    "page": b"<html><body>404 not found</body></html>" * 20,
    "pickle": b"\x80\x02}q\x00X\x05\x00\x00\x00stateq\x01cos\nsystem\n" + b"\0" * 100,
    "zip": b"PK\x03\x04" + b"\0" * 200,
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("what", HEADERS)
def test_what_is_no_safetensors_is_refused(kind, what, tmp_path):
    path = tmp_path / "one.safetensors"
    path.write_bytes(HEADERS[what])
    assert check(READERS[kind].use, path, what)


# what a hostile JSON value may be
ODD = [
    None, True, -1, 0, 3, 10**6, 10**9, 10**30, 10**400, 1e308, -0.5, float("nan"), float("inf"), "", "x",
    "\ud800", "a" * 5000, [], [[]], [None], [1, 2], ["x"], {}, {"a": 1}, {"id": []}, [{"id": []}],
    [{"grid": "x"}], [{"grid": [1]}], [{"grid": [[]] * 3, "sigmas": 1, "context_tokens": "x"}],
    [{"sigmas": ["x"]}], [{"sigmas": [None, []]}], [{"calls": {}}],
]  # fmt: skip


def places(value, path=()) -> list[tuple]:
    """Every place in a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:3]):
            found += places(inner, (*path, index))
    return found


def put(value, path: tuple, new):
    """A copy of a JSON value with another value at a place."""
    copied = json.loads(json.dumps(value))
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return copied


@pytest.mark.parametrize("kind", READERS)
def test_odd_values_anywhere_in_the_header_are_read_or_refused(kind, good, tmp_path):
    outer, body = parts(good[kind])
    key, path = READERS[kind].key, tmp_path / "one.safetensors"
    said = json.loads(outer["__metadata__"][key])
    everywhere = [(place, new) for place in places(said) for new in ODD]
    pick, refused = random.Random(3), 0
    # what readers look at first is tried whole, the rest by lot
    chosen = pick.sample(everywhere, min(len(everywhere), 4 * rounds(kind)))
    for place, new in chosen:
        text = json.dumps(put(said, place, new))
        path.write_bytes(joined({**outer, "__metadata__": {key: text}}, body))
        refused += check(READERS[kind].use, path, f"{place} = {new!r:.60}")
    assert refused > rounds(kind) // 2


@pytest.mark.parametrize("kind", READERS)
def test_odd_inner_headers_are_refused(kind, good, tmp_path):
    outer, body = parts(good[kind])
    key, path = READERS[kind].key, tmp_path / "one.safetensors"
    deep = ['{"format":' * 50_000, "[" * 200_000, '{"transformer":' * 100_000]
    for text in ["", "x", "[1]", "null", "7", '"x"', "NaN", "1" * 5000, "\x00", *deep]:
        path.write_bytes(joined({**outer, "__metadata__": {key: text}}, body))
        refused = check(READERS[kind].use, path, text[:40])
        # a full checkpoint need not have a config
        assert refused or kind == "full", text[:40]


@pytest.mark.parametrize("kind", READERS)
def test_odd_tensor_tables_are_read_or_refused(kind, good, tmp_path):
    """Shapes, dtypes and offsets that do not go together, and names that stand twice."""
    outer, body = parts(good[kind])
    path, pick = tmp_path / "one.safetensors", random.Random(4)
    names = [name for name in outer if name != "__metadata__"]
    changes = [
        {"dtype": name}
        for name in ("F64", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL", "F4", "C64", "X9", "")
    ]
    changes += [{"shape": s} for s in ([], [0], [1], [2**40], [2**62, 4], [-1], [1.5], None)]
    changes += [{"data_offsets": o} for o in ([0, 0], [8, 4], [0, 2**60], [-4, 4], [0], None)]
    for name in pick.sample(names, min(2 if READERS[kind].share < 1 else 5, len(names))):
        for change in changes:
            path.write_bytes(joined({**outer, name: outer[name] | change}, body))
            assert check(READERS[kind].use, path, f"{name} {change}") or change == {"shape": []}
    # the right number of bytes in another dtype or shape
    for name in pick.sample(names, min(2 if READERS[kind].share < 1 else 5, len(names))):
        entry = outer[name]
        if entry["dtype"] != "F32":
            continue
        for change in (
            {"dtype": "I32"},
            {"dtype": "U32"},
            {"dtype": "BF16", "shape": [2, *entry["shape"]]},
            {"dtype": "U8", "shape": [4, *entry["shape"]]},
            {"dtype": "F8_E8M0", "shape": [4, *entry["shape"]]},
            {"shape": [*entry["shape"], 1]},
            {"shape": entry["shape"][::-1]},
        ):
            path.write_bytes(joined({**outer, name: entry | change}, body))
            check(READERS[kind].use, path, f"{name} {change}")
    # the same name twice, with two meanings
    text = json.dumps(outer)
    first = names[0]
    for other in (names[-1], "__metadata__"):
        twice = text[:-1] + f", {json.dumps(other)}: {json.dumps(outer[first])}}}"
        path.write_bytes(joined(twice.encode(), body))
        assert check(READERS[kind].use, path, f"{other} twice")


@pytest.mark.parametrize("kind", ["profile", "router", "calibration"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -1.0, -3e38])
def test_numbers_that_cannot_be_are_read_or_refused(kind, value, good, tmp_path):
    path = tmp_path / "one.safetensors"
    path.write_bytes(good[kind])
    metadata = parts(good[kind])[0]["__metadata__"]
    tensors = load_file(path)
    for name, tensor in tensors.items():
        for where in (slice(None), slice(0, 1)):
            bad = tensor.clone()
            bad.view(-1)[where] = value
            save_file({**tensors, name: bad}, path, metadata)
            refused = check(READERS[kind].use, path, f"{name} {value}")
            finite = abs(value) < float("inf")
            assert refused or finite, name
            # calls that cannot be counted
            assert refused or name != "count" or value == 1.0, name


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_file_is_refused(kind, good, tmp_path):
    use = READERS[kind].use
    assert check(use, tmp_path / "none.safetensors", "missing")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert check(use, folder, "folder")
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert check(use, pipe, "pipe")
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    assert check(use, loop, "loop")
    assert check(use, Path("/dev/zero"), "device")


@pytest.mark.parametrize("kind", READERS)
def test_files_of_another_kind_or_of_a_later_format_are_refused(kind, good, tmp_path):
    path = tmp_path / "one.safetensors"
    for other, data in good.items():
        if READERS[other].key != READERS[kind].key:
            path.write_bytes(data)
            assert check(READERS[kind].use, path, other)
    if READERS[kind].key == "config":
        return
    outer, body = parts(good[kind])
    key = READERS[kind].key
    newest = {kind.key: kind.version for kind in (ROUTER, PROFILE)}.get(key, 1)
    for version in (f"{key}/{newest + 1}", f"{key}/1.1", f"{key}/1 ", key, f"{key}/9999999999"):
        text = json.dumps(json.loads(outer["__metadata__"][key]) | {"format": version})
        path.write_bytes(joined({**outer, "__metadata__": {key: text}}, body))
        with pytest.raises(ValueError, match="(?i)update WanTrim"):
            READERS[kind].use(path)
