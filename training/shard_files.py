"""Shards of training data on disk: safetensors files and the index that lists the whole ones.

A shard says itself what is in it, and its name is its checksum. So any number of processes write into
one folder without asking each other, and the index is made of what is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..slim.file import Entry, list_entries, read_tensor

log = logging.getLogger(__name__)

KEY = "wantrim_shards"
FORMAT = f"{KEY}/2"
# the first had numbered shards, which only the index knew
FORMATS = (f"{KEY}/1", FORMAT)
INDEX, PROMPTS, CHECKED = "index.json", "prompts.safetensors", "checked.json"
CHUNK = 1 << 23
# digits of the checksum that is a shard's name
DIGITS = 32
NUMBERED, NAMED = (
    re.compile(rf"shard-{digits}\.safetensors") for digits in (r"\d{5,9}", rf"[0-9a-f]{{{DIGITS}}}")
)
# seconds after which nobody writes a partial file any more
ABANDONED = 86400
FLOATS = {"F32", "F16", "BF16"}
# what a sample can have, and the number of its axes
PARTS = {"latents": 4, "text": 2, "condition": 4, "clip": 2}


@dataclass(frozen=True)
class Sample:
    """One video: latents [c, f, h, w], text [t, d], and for image-to-video condition
    [20, f, h, w] and, where the model looks at the image through CLIP, clip [257, 1280]."""

    latents: torch.Tensor
    text: torch.Tensor
    condition: torch.Tensor | None = None
    clip: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parts that are there, by name; zeros that pad the text are left out.

        Raises:
            ValueError: NaN or infinite values, or other axes.
        """
        found = {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}
        for name, value in found.items():
            if value.ndim != PARTS[name]:
                raise ValueError(f"{name}: expected {PARTS[name]} axes, got {list(value.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name} has NaN or infinite values")
        used = found["text"].abs().sum(1).nonzero()
        found["text"] = found["text"][: int(used[-1]) + 1 if len(used) else 1]
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}


@dataclass(frozen=True)
class Shard:
    """A shard in the index: its file, its checksum or the beginning of it, and the names and shapes
    of its samples; sources say which file and caption each was made of, where that is known."""

    file: str
    bytes: int
    sha256: str
    names: list[str]
    shapes: list[dict[str, list[int]]]
    sources: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Index:
    """What `index.json` says.

    Args:
        made: which VAE and text encoder (and CLIP) made the samples.
        text_tokens: length that texts are padded to.
    """

    made: dict
    text_tokens: int
    shards: tuple[Shard, ...] = ()


def read_index(folder: Path) -> Index:
    """Raises ValueError when there is none, or one that cannot be read."""
    path = folder / INDEX
    advice = "Expected a folder that `python -m wantrim.training.encode` wrote."
    if not path.is_file():
        raise ValueError(f"{folder}: there is no {INDEX}. {advice}")
    try:
        said = json.loads(path.read_text("utf-8"))
        if said["format"] not in FORMATS:
            raise ValueError(f"expected {FORMAT}, got {said['format']!r:.60}")
        index = Index(
            dict(said["made"]), said["text_tokens"], tuple(Shard(**s) for s in said["shards"])
        )
        _check_index(index)
    except (OSError, KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path}: it cannot be read ({error!r:.200}). {advice}") from error
    return index


def _check_index(index: Index) -> None:
    if type(index.text_tokens) is not int or not 0 < index.text_tokens < 1 << 16:
        raise ValueError(f"text_tokens: expected a length, got {index.text_tokens!r}")
    for shard in index.shards:
        if not (NUMBERED.fullmatch(shard.file) or NAMED.fullmatch(shard.file)):
            raise ValueError(f"expected the name of a shard, got {shard.file!r:.80}")
        counts = {len(shard.names), len(shard.shapes), len(shard.sources or shard.names)}
        if len(counts) > 1 or not shard.names:
            raise ValueError(f"{shard.file}: expected the shapes of its samples")
        for shapes in shard.shapes:
            right = {"latents", "text"} <= set(shapes) <= set(PARTS)
            if not right or any(len(shape) != PARTS[name] for name, shape in shapes.items()):
                raise ValueError(f"{shard.file}: expected latents and text, got {shapes!r:.120}")
            if shapes["text"][0] > index.text_tokens:
                raise ValueError(f"{shard.file}: a text is longer than {index.text_tokens}")


def write_index(folder: Path, index: Index) -> None:
    write_json(folder / INDEX, {"format": FORMAT, **asdict(index)})


def write_json(path: Path, content: object) -> None:
    with _partial(path.parent) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        partial.replace(path)


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """A file of this process alone, to write and to put into its place; removed where it was not."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{uuid.uuid4().hex}.partial"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def find_shards(folder: Path, index: Index) -> tuple[Index, dict[str, str]]:
    """The index with all shards that are there, whoever wrote them; and what is wrong with which.

    Raises:
        ValueError: a shard holds samples that something else than the index's made.
        OSError: one cannot be read now, which is no damage.
    """
    # those of the first format say nothing of themselves
    found = [s for s in index.shards if NUMBERED.fullmatch(s.file) and (folder / s.file).is_file()]
    damaged = {}
    for path in folder.glob("shard-*.safetensors"):
        if not NAMED.fullmatch(path.name):
            continue
        try:
            made, shard = _described(path)
        except OSError as error:
            raise _passing(path, error) from error
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            damaged[path.name] = f"it cannot be read ({error!r:.200})"
            continue
        _same_made(folder, made, index)
        found.append(shard)
    shards = sorted(found, key=lambda shard: (shard.names[0], shard.file))
    return replace(index, shards=tuple(shards)), damaged


def _entries(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """`list_entries`, but that a disk fails is no fault of the file's."""
    try:
        return list_entries(path)
    except ValueError as error:
        raise error.__cause__ if isinstance(error.__cause__, OSError) else error from None


def _passing(path: Path, error: OSError) -> OSError:
    advice = "nothing was changed: look at the disk, and start again"
    return OSError(error.errno, f"{error.strerror or error}; {advice}", str(path))


def _described(path: Path) -> tuple[dict, Shard]:
    """What a shard says of itself: what made it, and its place in the index."""
    entries, metadata = _entries(path)
    said = json.loads(metadata[KEY])
    if said["format"] not in FORMATS:
        raise ValueError(f"expected {FORMAT}, got {said['format']!r:.60}")
    shapes: list[dict[str, list[int]]] = [{} for _ in said["names"]]
    for entry in entries:
        number, _, name = entry.name.partition(".")
        shapes[int(number)][name] = list(entry.shape)
    digest = path.stem.removeprefix("shard-")
    names, sources = list(said["names"]), list(said.get("sources", ()))
    shard = Shard(path.name, path.stat().st_size, digest, names, shapes, sources)
    _check_index(Index(said["made"], said["text_tokens"], (shard,)))
    return {**said["made"], "text_tokens": said["text_tokens"]}, shard


def _same_made(folder: Path, came: dict, index: Index) -> None:
    for name, value in {**index.made, "text_tokens": index.text_tokens}.items():
        if came.get(name) != value:
            raise ValueError(
                f"{folder}: holds samples with {name} {came.get(name)!r}, expected {value!r}. "
                "Choose another folder."
            )


def check_shards(folder: Path, index: Index) -> dict[str, str]:
    """What is wrong with which shard. Checksums of unchanged shards are taken once.

    Raises OSError for one that cannot be read now, which is no damage.
    """
    checked = _load_checked(folder)
    open_ones = [s for s in index.shards if not _is_checked(folder, s, checked)]
    if len(open_ones) > 1:
        size = sum(shard.bytes for shard in open_ones) / 1e9
        log.info("checking %d shards (%.1f GB), once", len(open_ones), size)
    # reading, hashing and comparing all let other threads run
    with ThreadPoolExecutor(4) as pool:
        reasons = list(pool.map(lambda shard: _damage(folder, shard), open_ones))
    damaged = {s.file: why for s, why in zip(open_ones, reasons, strict=True) if why}
    for shard in open_ones:
        checked.pop(shard.file, None)
        if shard.file not in damaged:
            checked[shard.file] = _state(folder / shard.file, shard)
    if open_ones:
        try:
            write_json(folder / CHECKED, checked)
        except OSError as error:
            log.info("%s cannot be written (%s): checksums will be taken again", CHECKED, error)
    return damaged


def _load_checked(folder: Path) -> dict:
    try:
        found = json.loads((folder / CHECKED).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _state(path: Path, shard: Shard) -> list:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, shard.sha256]


def _is_checked(folder: Path, shard: Shard, checked: dict) -> bool:
    path = folder / shard.file
    return path.is_file() and checked.get(shard.file) == _state(path, shard)


def _damage(folder: Path, shard: Shard) -> str | None:
    path = folder / shard.file
    if not path.is_file():
        return "the file is missing"
    try:
        if (size := path.stat().st_size) != shard.bytes:
            return f"expected {shard.bytes:,} bytes, got {size:,}"
        digest = file_sha256(path)
        if shard.sha256 not in (digest, digest[:DIGITS]):
            return "its checksum is another than in the index"
        entries = _entries(path)[0]
        expected = {
            f"{number}.{name}": tuple(shape)
            for number, shapes in enumerate(shard.shapes)
            for name, shape in shapes.items()
        }
        if {entry.name: entry.shape for entry in entries} != expected:
            return "its tensors have other names or shapes than in the index"
        for entry in entries:
            if entry.dtype not in FLOATS:
                return (
                    f"{entry.name}: expected one of {', '.join(sorted(FLOATS))}, got {entry.dtype}"
                )
            if not read_tensor(path, entry).isfinite().all():
                return f"{entry.name} has NaN or infinite values"
    except ValueError as error:
        return f"it cannot be read ({error})"
    except OSError as error:
        raise _passing(path, error) from error
    return None


def file_sha256(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


class ShardWriter:
    """Adds samples to a folder, a shard at a time; `flush` lists all whole shards in the index.

    Others may write into the folder at the same time.

    Args:
        made: which VAE and text encoder (and CLIP) make the samples.
        prompts: embeddings [t, d] of the "empty" and the "negative" prompt.

    Raises:
        ValueError: the folder holds samples that something else made.
    """

    def __init__(
        self,
        folder: Path,
        made: dict,
        text_tokens: int,
        prompts: Mapping[str, torch.Tensor],
        shard_size: int = 64,
    ):
        self.folder, self.shard_size = Path(folder), shard_size
        self.index = self._usable(self._listed(Index(made, text_tokens)))
        with _partial(self.folder) as partial:
            save_file({k: v.detach().cpu().contiguous() for k, v in prompts.items()}, partial)
            partial.replace(self.folder / PROMPTS)
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._sources: dict[str, str] = {}

    def _listed(self, index: Index) -> Index:
        """The index on disk, or an empty one."""
        if not (self.folder / INDEX).exists():
            return index
        listed = read_index(self.folder)
        _same_made(self.folder, {**listed.made, "text_tokens": listed.text_tokens}, index)
        return listed

    def _usable(self, index: Index) -> Index:
        for path in self.folder.glob("*.partial"):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink(missing_ok=True)
        index, damaged = find_shards(self.folder, index)
        damaged |= check_shards(self.folder, index)
        for name, why in damaged.items():
            log.warning(
                "%s: %s: it becomes %s.damaged, its samples are made again", name, why, name
            )
            with suppress(FileNotFoundError):
                (self.folder / name).replace(self.folder / f"{name}.damaged")
        return replace(index, shards=tuple(s for s in index.shards if s.file not in damaged))

    @property
    def done(self) -> set[str]:
        """Names of the samples in finished shards, as far as this writer knows them."""
        return {name for shard in self.index.shards for name in shard.names}

    def add(self, name: str, sample: Sample, source: str = "") -> None:
        """Raises ValueError for a sample with NaN, which is then not added."""
        self._waiting[name] = sample.tensors()
        self._sources[name] = source
        if len(self._waiting) >= self.shard_size:
            self.write_shard()

    def write_shard(self) -> None:
        """Write what waits as a shard, whole or not at all; a shorter one at the end."""
        if not self._waiting:
            return
        samples = list(self._waiting.values())
        tensors = {f"{i}.{key}": v for i, parts in enumerate(samples) for key, v in parts.items()}
        made, names = self.index.made, list(self._waiting)
        sources = [self._sources[name] for name in names]
        said = {"format": FORMAT, "made": made, "names": names, "sources": sources}
        said["text_tokens"] = self.index.text_tokens
        with _partial(self.folder) as partial:
            save_file(tensors, partial, {KEY: json.dumps(said)})
            size, digest = partial.stat().st_size, file_sha256(partial)[:DIGITS]
            path = self.folder / f"shard-{digest}.safetensors"
            partial.replace(path)
        shapes = [{key: list(v.shape) for key, v in parts.items()} for parts in samples]
        shard = Shard(path.name, size, digest, names, shapes, sources)
        self.index = replace(self.index, shards=(*self.index.shards, shard))
        self._waiting, self._sources = {}, {}

    def flush(self) -> Index:
        """Write what waits, then the index of all shards in the folder, which is given back."""
        self.write_shard()
        while True:
            known = self._listed(self.index)
            self.index, _ = find_shards(self.folder, known)
            if self.index == known and (self.folder / INDEX).exists():
                return self.index
            # and look again: another writer may have finished a shard, or have listed fewer, meanwhile
            write_index(self.folder, self.index)
