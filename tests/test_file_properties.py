"""Files: what is written is read again, and what was changed by whatever is refused in words."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from wantrim.methods.routers import Content, RouterMLP
from wantrim.profiles.calibration import CALIBRATE, Calibration, input_size, load_calibration
from wantrim.profiles.fingerprint import Fingerprint
from wantrim.profiles.profile import Profile, load_profile
from wantrim.slim.file import DTYPES, Entry, list_entries, read_tensor, write_tensors
from wantrim.slim.router import TrainedRouter, load_router
from wantrim.tests.hypotheses import few
from wantrim.tests.test_fuzz_files import READERS, check, joined, parts, places, put
from wantrim.training.router_file import save_router

KINDS = [kind for kind in READERS if kind != "demo"]
LENGTH = 8
# any JSON, odd numbers and texts that are no UTF-8 among it
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["F32", "I32", "wantrim_profile/1", "wantrim_slim/1", "config"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def good(folder) -> dict[str, bytes]:
    """The bytes of a good file of every kind."""
    made = {}
    for kind in KINDS:
        path = folder / f"{kind}.safetensors"
        READERS[kind].write(path)
        made[kind] = path.read_bytes()
    return made


def damaged(data: bytes, draw) -> bytes:
    """Pieces cut out, put in, written over, doubled and exchanged."""
    head = LENGTH + int.from_bytes(data[:LENGTH], "little")
    for _ in range(draw(st.integers(1, 3))):
        # most of it where it hurts
        begins, ends = draw(
            st.sampled_from([(0, LENGTH), (LENGTH, head), (0, head), (0, len(data))])
        )
        at = draw(st.integers(begins, max(begins, min(ends, len(data)) - 1)))
        size = draw(st.integers(0, 40))
        piece = data[at : at + size]
        new = draw(
            st.binary(max_size=16)
            | st.just(piece * 2)
            | st.just(piece[::-1])
            | st.sampled_from([b"[", b"}", b'"', b"null", b"-1", b"1e999", b"NaN", b"\\ud800"])
        )
        data = data[:at] + new + data[at + size :]
    return data


@few
@pytest.mark.parametrize("kind", KINDS)
@given(draw=st.data())
def test_damaged_files_are_read_or_refused(kind, draw, good, folder):
    path = folder / "one.safetensors"
    path.write_bytes(damaged(good[kind], draw.draw))
    check(READERS[kind].use, path, kind)


@few
@pytest.mark.parametrize("kind", KINDS)
@given(draw=st.data())
def test_any_json_in_a_header_is_read_or_refused(kind, draw, good, folder):
    outer, body = parts(good[kind])
    key = READERS[kind].key
    said = json.loads(outer["__metadata__"][key])
    for _ in range(draw.draw(st.integers(1, 2))):
        said = put(said, draw.draw(st.sampled_from(places(said))), draw.draw(values))
        if not isinstance(said, dict) or not places(said):
            break
    path = folder / "one.safetensors"
    path.write_bytes(joined({**outer, "__metadata__": {key: json.dumps(said)}}, body))
    check(READERS[kind].use, path, kind)


@few
@pytest.mark.parametrize("kind", KINDS)
@given(draw=st.data())
def test_any_table_of_tensors_is_read_or_refused(kind, draw, good, folder):
    outer, body = parts(good[kind])
    names = [name for name in outer if name != "__metadata__"]
    changed = dict(outer)
    for name in draw.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        what = draw.draw(st.sampled_from(["drop", "rename", "swap", "shape", "dtype", "value"]))
        entry = changed.pop(name, outer[name])
        if what == "rename":
            changed[draw.draw(st.text(max_size=30))] = entry
        elif what == "swap":
            # of the same size or not
            other = draw.draw(st.sampled_from(names))
            changed[name], changed[other] = changed.get(other, outer[other]), entry
        elif what == "shape":
            size = draw.draw(st.lists(st.integers(-1, 100), max_size=4))
            changed[name] = {**entry, "shape": size}
        elif what == "dtype":
            changed[name] = {**entry, "dtype": draw.draw(st.sampled_from([*DTYPES, "U8", "BOOL"]))}
        elif what == "value":
            changed[name] = draw.draw(values)
    path = folder / "one.safetensors"
    path.write_bytes(joined(changed, body))
    check(READERS[kind].use, path, kind)


numbers = st.integers(1, 5)
models = st.builds(
    lambda heads, head_dim, ffn, blocks, channels, sample: Fingerprint(
        heads * head_dim, ffn, blocks, heads, channels, channels, tuple(sample)
    ),
    numbers, numbers, st.integers(1, 20), numbers, numbers,
    st.lists(st.floats(-1e6, 1e6), max_size=9),
)  # fmt: skip


@given(models)
def test_a_fingerprint_is_read_as_it_was_written(model):
    again = Fingerprint.from_json(json.loads(json.dumps(model.to_json())))
    assert model.differs(again) is None and again.differs(model) is None
    assert again.sample == pytest.approx(model.sample, rel=1e-5)
    # written twice is written once
    assert Fingerprint.from_json(again.to_json()) == again


@few
@given(
    models, st.integers(0, 99), st.lists(st.dictionaries(st.text(max_size=5), values), max_size=2)
)
def test_a_profile_is_read_as_it_was_written(folder, model, seed, runs):
    made, generator = Profile.empty(model), torch.Generator().manual_seed(seed)
    for name, value in made.tensors.items():
        made.tensors[name] = torch.rand(value.shape, generator=generator)
    made.runs = runs
    path = folder / "profile.safetensors"
    made.save(path)
    again = load_profile(path)
    assert all(torch.equal(again.tensors[name], value) for name, value in made.tensors.items())
    assert json.dumps(again.runs) == json.dumps(runs) and again.model.differs(model) is None
    both = again.merged(made)
    assert both.calls == pytest.approx(2 * float(made.tensors["count"].sum()), abs=0.5)
    assert torch.allclose(both.ratio() * both.calls, 2 * made.tensors["ratio"].sum(0))
    path.unlink()


@few
@given(models, st.integers(0, 99), st.sampled_from(["latent", "clip", "none"]), numbers, numbers)
def test_a_router_is_read_as_it_was_written(folder, model, seed, kind, hidden, half):
    content = {"none": 0, "latent": 4 * model.in_channels, "clip": 7}[kind]
    torch.manual_seed(seed)
    mlp = RouterMLP(model.num_blocks, content, hidden, 2 * half).requires_grad_(False)
    path = folder / "router.safetensors"
    save_router(path, TrainedRouter(mlp, kind, model))
    again = load_router(path)
    assert again.kind == kind and again.model.differs(model) is None
    written = mlp.state_dict()
    assert again.mlp.state_dict().keys() == written.keys()
    assert all(torch.equal(again.mlp.state_dict()[name], value) for name, value in written.items())
    seen = Content(torch.randn(1, model.in_channels, 2, 3, 4), torch.randn(1, 7))
    assert len(again.ask(torch.tensor([0.5]), seen)) == model.num_blocks


@few
@given(models, st.sampled_from(["attention", "all"]), st.data())
def test_a_calibration_is_read_as_it_was_written(folder, model, calibrate, data):
    made = Calibration(model, calibrate)
    for seed in range(data.draw(numbers)):
        kind = data.draw(st.sampled_from(CALIBRATE[calibrate]))
        inputs = torch.randn(
            3, input_size(model, kind), generator=torch.Generator().manual_seed(seed)
        )
        made.add(kind, data.draw(st.integers(0, model.num_blocks - 1)), inputs)
    path = folder / "calibration.safetensors"
    made.save(path)
    again = load_calibration(path)
    assert again.tokens == made.tokens
    assert all(torch.equal(again.named(name), gram) for name, gram in made.sums.items())
    # put together and taken apart
    made.absorb(again)
    assert all(made.tokens[name] == 2 * count for name, count in again.tokens.items())
    made.give_back(again)
    assert made.tokens == again.tokens
    assert all(torch.equal(again.named(name), gram) for name, gram in made.sums.items())


entries = st.lists(
    st.builds(
        Entry,
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.sampled_from(list(DTYPES)),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda entry: entry.name,
)


@given(entries, st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3))
@example([Entry("empty", "F32", (0, 3)), Entry("scalar", "BF16", ())], {})
def test_tensors_are_read_as_they_were_written(folder, entries, metadata):
    path, seen = folder / "tensors.safetensors", []

    def make(entry: Entry) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(entry.name))
        data = torch.randint(0, 255, (entry.size,), generator=generator, dtype=torch.uint8)
        # of a NaN the bits stay
        return data.view(DTYPES[entry.dtype]).reshape(entry.shape)

    size = write_tensors(
        path, entries, metadata, make, lambda done, total: seen.append((done, total))
    )
    assert path.stat().st_size == size
    assert seen == sorted(seen) and all(done <= total for done, total in seen)
    found, said = list_entries(path)
    assert sorted(found, key=lambda e: e.name) == sorted(entries, key=lambda e: e.name)
    assert said == metadata
    # and by safetensors itself
    stock = load_file(path)
    for entry in found:
        raw = make(entry).reshape(-1).view(torch.uint8)
        assert torch.equal(read_tensor(path, entry).reshape(-1).view(torch.uint8), raw)
        assert torch.equal(stock[entry.name].reshape(-1).view(torch.uint8), raw)
    path.unlink()
