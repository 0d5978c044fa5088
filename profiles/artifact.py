"""What the pack writes and reads: safetensors with a JSON header, whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .fingerprint import Fingerprint


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        name: as an artist knows it; `wantrim_{name}` holds the header.
        advice: what to do when a file is not of this kind.
        version: that is written; all from 1 on are read.
    """

    name: str
    advice: str
    version: int = 1

    @property
    def key(self) -> str:
        return f"wantrim_{self.name}"

    @property
    def format(self) -> str:
        return f"{self.key}/{self.version}"

    @property
    def formats(self) -> tuple[str, ...]:
        """All that can be read."""
        return tuple(f"{self.key}/{version}" for version in range(1, self.version + 1))


@contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Partial files to write instead of `paths`: they take their places together, or none does.

    A path whose partial file was not written is removed, save the last, which has to be. Whatever
    fails, what was there before is there afterwards and no partial file is.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    partials = tuple(path.with_name(path.name + ".partial") for path in paths)
    for path, partial in zip(paths, partials, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        # of a crash; it could be a link to somewhere else too
        partial.unlink(missing_ok=True)
        aside = _aside(path)
        if aside.exists() and not path.exists():
            aside.replace(path)
        aside.unlink(missing_ok=True)
    try:
        yield partials
        _exchange(paths, partials)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _exchange(paths: tuple[Path, ...], partials: tuple[Path, ...]) -> None:
    asides: dict[Path, Path] = {}
    done: list[Path] = []
    try:
        for path, partial in zip(paths[:-1], partials[:-1], strict=True):
            if path.exists():
                path.replace(_aside(path))
                asides[path] = _aside(path)
            if partial.exists():
                partial.replace(path)
                done.append(path)
        # the moment when all of it is done
        partials[-1].replace(paths[-1])
    except BaseException:
        for path in done:
            path.unlink()
        for path, aside in asides.items():
            aside.replace(path)
        raise
    for aside in asides.values():
        aside.unlink(missing_ok=True)


def package_version() -> str:
    """WanTrim's version, as its folder says; empty when it does not."""
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    text = project.read_text("utf-8") if project.is_file() else ""
    found = re.search(r'^version = "([\w.+-]{1,40})"$', text, re.MULTILINE)
    return found[1] if found else ""


def save_artifact(
    path: Path, kind: Kind, model: Fingerprint, header: dict, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError, SafetensorError: the disk is full or cannot be written.
    """
    said = {"format": kind.format, "model": model.to_json(), "package": package_version(), **header}
    with replacing(path) as (partial,):
        save_file(dict(tensors), partial, {kind.key: json.dumps(said)})


@contextmanager
def open_artifact(path: Path, kind: Kind, framework: str = "pt") -> Iterator[tuple]:
    """Open a file; gives its header, the model it was made for, and safetensors' handle.

    Args:
        framework: "np" for files that may be larger than memory, which "pt" would map whole.

    Raises:
        ValueError: the file is damaged or something else, in an artist's words.
    """
    # a pipe would be waited for, and a folder is opened on some systems
    if not path.is_file():
        raise _unreadable(path, kind, "there is no such file")
    try:
        with safe_open(path, framework) as file:
            said = (file.metadata() or {}).get(kind.key, "null")
            yield *_read(path, kind, said), file
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, kind, error) from error


def _unreadable(path: Path, kind: Kind, error: Exception | str) -> ValueError:
    return ValueError(
        f"{path.name}: expected a WanTrim {kind.name}, got a file that cannot be read ({error}). "
        f"{kind.advice}"
    )


def _read(path: Path, kind: Kind, text: str) -> tuple[dict, Fingerprint]:
    """A header, and the model that it names."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, kind, error) from error
    if not isinstance(header, dict) or header.get("format") not in kind.formats:
        came = header.get("format") if isinstance(header, dict) else f"no {kind.name} header"
        raise ValueError(
            f"{path.name}: expected a WanTrim {kind.name} ({kind.format}), got {came!r:.80}. "
            f"{kind.advice} Or update WanTrim."
        )
    try:
        return header, Fingerprint.from_json(header.get("model"))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
