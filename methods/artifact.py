"""What the pack writes and reads: safetensors with a JSON header, whole or not at all."""

from __future__ import annotations

import json
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


def save_artifact(
    path: Path, kind: Kind, model: Fingerprint, header: dict, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a file; nothing is left behind when the disk is full."""
    said = {"format": kind.format, "model": model.to_json(), **header}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(dict(tensors), partial, {kind.key: json.dumps(said)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def open_artifact(path: Path, kind: Kind, framework: str = "pt") -> Iterator[tuple]:
    """Open a file; gives its header, the model it was made for, and safetensors' handle.

    Args:
        framework: "np" for files that may be larger than memory, which "pt" would map whole.

    Raises:
        ValueError: the file is damaged or something else, in an artist's words.
    """
    try:
        with safe_open(path, framework) as file:
            header = _parsed(path, kind, (file.metadata() or {}).get(kind.key, "null"))
            yield header, _model(path, kind, header), file
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, kind, error) from error


def _unreadable(path: Path, kind: Kind, error: Exception) -> ValueError:
    return ValueError(
        f"{path.name}: expected a WanTrim {kind.name}, got a file that cannot be read ({error}). "
        f"{kind.advice}"
    )


def _parsed(path: Path, kind: Kind, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, kind, error) from error


def _model(path: Path, kind: Kind, header: object) -> Fingerprint:
    if not isinstance(header, dict) or header.get("format") != kind.format:
        came = header.get("format") if isinstance(header, dict) else f"no {kind.name} header"
        raise ValueError(
            f"{path.name}: expected a WanTrim {kind.name} ({kind.format}), got {came!r:.80}. "
            f"{kind.advice} Or update WanTrim."
        )
    try:
        return Fingerprint.from_json(header.get("model"))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
