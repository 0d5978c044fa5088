"""Slim checkpoints as files: read and written tensor by tensor, whole or not at all.

A slim file is safetensors. Its keys are Wan's original ones behind a prefix, so that no stock loader
takes it for a full model; what was kept is stored beside them, and the header says the rest.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..methods.cost import Width
from ..profiles.artifact import replacing
from ..profiles.fingerprint import Fingerprint
from .cut import SHARES, check_width, find_cut

FORMAT = "wantrim_slim/1"
KEY = "wantrim_slim"
PREFIX = "wantrim_slim."
# kept indices in the file: field of the width -> name within a block
KEPT = {
    "self_heads": "self_attn.kept_heads",
    "cross_heads": "cross_attn.kept_heads",
    "ffn_channels": "ffn.kept_channels",
}
# safetensors' name -> torch's
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I32": torch.int32,
}
# bytes done, bytes in all; may raise to cancel
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Entry:
    """One tensor in a file.

    Args:
        dtype: safetensors' name of it.
        offset: where its bytes begin in the file it was read from.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = field(default=0, compare=False)

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class SlimHeader:
    """What a slim file says about itself.

    Args:
        model: the full model.
        norm_scale: factor that was put on a norm's weight per block, by name of `SHARES`; a norm
            that is not listed was only cut.
        made: rule, budget, corrections, source file, package version.
        config: the source's own `config` metadata, as it was, or None.
    """

    model: Fingerprint
    width: Width
    norm_scale: dict[str, tuple[float, ...]] = field(default_factory=dict)
    made: dict = field(default_factory=dict)
    config: str | None = None

    @property
    def transformer(self) -> dict:
        """Constructor arguments in Wan's original words, as far as the source named them."""
        given = transformer_config(self.config)
        sizes = {
            "dim": self.model.dim,
            "ffn_dim": self.model.ffn_dim,
            "num_heads": self.model.num_heads,
            "num_layers": self.model.num_blocks,
        }
        return {**given, **sizes}

    def scale(self, name: str, block: int) -> float:
        """Factor on the weight of a norm, by name of `SHARES`."""
        return self.norm_scale[name][block] if name in self.norm_scale else 1.0

    def metadata(self) -> dict[str, str]:
        """As safetensors keeps it."""
        widths = [
            {kind: len(getattr(self.width, kind)[block]) for kind in KEPT}
            for block in range(self.model.num_blocks)
        ]
        said = {
            "format": FORMAT,
            "model": self.model.to_json(),
            "widths": widths,
            "norm_scale": {name: list(values) for name, values in self.norm_scale.items()},
            "made": self.made,
            "config": self.config,
        }
        return {KEY: json.dumps(said, sort_keys=True)}

    def kept(self) -> dict[str, torch.Tensor]:
        """The tensors that say what was kept, by name in the file."""
        return {
            f"{PREFIX}blocks.{block}.{name}": torch.tensor(
                getattr(self.width, kind)[block], dtype=torch.int32
            )
            for kind, name in KEPT.items()
            for block in range(self.model.num_blocks)
        }


def transformer_config(config: str | None) -> dict:
    """The `transformer` entry of a `config` metadata text; empty when there is none to read."""
    try:
        given = json.loads(config or "{}")
    except (ValueError, RecursionError):
        return {}
    inner = given.get("transformer") if isinstance(given, dict) else None
    return inner if isinstance(inner, dict) else {}


def list_entries(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """Tensors and metadata of a safetensors file; reads no tensor."""
    if not path.is_file():
        raise ValueError(f"{path.name}: there is no such file. Choose another one.")
    try:
        # checks the header; with "pt" it would map the file so that it has to fit into memory
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {
                name: (value.get_dtype(), tuple(value.get_shape()))
                for name, value in slices.items()
            }
            metadata = file.metadata() or {}
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path.name}: expected a safetensors file, got one that cannot be read ({error}). "
            "Download it again, or choose another file."
        ) from error
    entries = [
        Entry(name, dtype, shape, 8 + length + header[name]["data_offsets"][0])
        for name, (dtype, shape) in found.items()
    ]
    return entries, metadata


def read_tensor(path: Path, entry: Entry, rows: range | None = None) -> torch.Tensor:
    """A tensor of a safetensors file, by its entry in `list_entries`.

    Args:
        rows: of its first axis, without gaps; None reads all of it.
    """
    shape, offset = entry.shape, entry.offset
    if rows is not None:
        row = replace(entry, shape=shape[1:]).size
        shape, offset = (len(rows), *shape[1:]), offset + rows.start * row
    data = torch.empty(replace(entry, shape=shape).size, dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(offset)
        if file.readinto(data.numpy().data) != len(data):
            raise ValueError(f"{path.name}: {entry.name}: the file was changed while it was read")
    return data.view(DTYPES[entry.dtype]).reshape(shape)


def write_tensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: dict[str, str],
    make: Callable[[Entry], torch.Tensor],
    progress: Progress | None = None,
) -> int:
    """Write a safetensors file tensor by tensor; returns its size in bytes.

    Nothing is left behind when `make` or `progress` raises. Wide dtypes come first, so that every
    tensor is aligned.

    Args:
        make: the tensor of an entry, of its dtype and shape.

    Raises:
        OSError: the disk is full or cannot be written.
        ValueError: `make` gave something else.
    """
    ordered = sorted(entries, key=lambda entry: (-DTYPES[entry.dtype].itemsize, entry.name))
    header: dict[str, dict] = {"__metadata__": metadata}
    total = 0
    for entry in ordered:
        end = total + entry.size
        offsets = [total, end]
        said = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        header[entry.name] = said
        total = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with replacing(path) as (partial,), partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            tensor = make(entry)
            if (tensor.dtype, tuple(tensor.shape)) != (DTYPES[entry.dtype], entry.shape):
                raise ValueError(
                    f"{entry.name}: expected {entry.dtype} {entry.shape}, got {tensor.dtype} "
                    f"{tuple(tensor.shape)}"
                )
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(data.numpy().data)
            del tensor, data
            done += entry.size
            if progress is not None:
                progress(done, total)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + total


def is_slim(metadata: dict[str, str]) -> bool:
    """Whether a safetensors file's metadata is that of a slim file."""
    return KEY in metadata


def read_header(path: Path) -> SlimHeader:
    """Read and check what a slim file says; reads no weight.

    Raises:
        ValueError: it is something else, or its tensors are not those that its header promises.
    """
    entries, metadata = list_entries(path)
    again = "Make it again with WanTrim Slim."
    if not is_slim(metadata):
        raise ValueError(
            f"{path.name}: expected a slim checkpoint that WanTrim Slim wrote, got a file without "
            "its header. A full Wan model belongs into Load Diffusion Model."
        )
    try:
        said = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: its header cannot be read. {again}") from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        came = said.get("format") if isinstance(said, dict) else None
        raise ValueError(
            f"{path.name}: expected a slim checkpoint ({FORMAT}), got {came!r:.60}. {again} Or "
            "update WanTrim."
        )
    try:
        model = Fingerprint.from_json(said.get("model"))
        header = SlimHeader(
            model,
            _read_width(path, model, {entry.name: entry for entry in entries}),
            _norm_scale(said.get("norm_scale"), model),
            said["made"] if isinstance(said.get("made"), dict) else {},
            said["config"] if isinstance(said.get("config"), str) else None,
        )
        check_width(header.width, model)
        _check_entries(entries, header)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}: damaged file. {again}") from error
    return header


def _read_width(path: Path, model: Fingerprint, there: dict[str, Entry]) -> Width:
    kept: dict[str, tuple] = {}
    limit = {"self_heads": model.num_heads, "cross_heads": model.num_heads}
    for kind, name in KEPT.items():
        blocks = []
        for block in range(model.num_blocks):
            key = f"{PREFIX}blocks.{block}.{name}"
            entry = there.get(key)
            most = limit.get(kind, model.ffn_dim)
            if entry is None or entry.dtype != "I32" or not 0 < entry.size <= 4 * most:
                came = "nothing" if entry is None else f"{entry.dtype} {entry.shape}"
                raise ValueError(f"{key}: expected 1 to {most} indices, got {came}")
            blocks.append(tuple(read_tensor(path, entry).flatten().tolist()))
        kept[kind] = tuple(blocks)
    return Width(**kept)


def _norm_scale(said: object, model: Fingerprint) -> dict[str, tuple[float, ...]]:
    if not isinstance(said, dict) or not set(said) <= set(SHARES):
        raise ValueError(f"norm_scale: expected factors of {', '.join(SHARES)}")
    for name, values in said.items():
        right = isinstance(values, list) and len(values) == model.num_blocks
        if not right or not all(
            # no NaN either, and no whole number that is too large for a float
            isinstance(value, int | float) and 0 < value < 1e30
            for value in values
        ):
            raise ValueError(f"norm_scale: {name}: expected a positive factor per block")
    return {name: tuple(float(value) for value in values) for name, values in said.items()}


def _check_entries(entries: Sequence[Entry], header: SlimHeader) -> None:
    """Every cut tensor is as long as the width says; nothing is missing that cuts belong to."""
    seen = set()
    for entry in entries:
        key = entry.name.removeprefix(PREFIX)
        if key == entry.name or entry.dtype not in DTYPES:
            raise ValueError(f"{entry.name} ({entry.dtype}) does not belong into it")
        cut = find_cut(key)
        if cut is None:
            continue
        if cut.block >= header.model.num_blocks or len(entry.shape) <= cut.axis:
            raise ValueError(f"{key} does not belong into it")
        units = len(cut.units(header.width))
        expected = units if cut.part == "ffn" else units * header.model.head_dim
        if entry.shape[cut.axis] != expected:
            raise ValueError(f"{key}: expected {expected} of its axis, got {entry.shape[cut.axis]}")
        seen.add((cut.block, cut.name))
    for block in range(header.model.num_blocks):
        for name in ("self_attn.q", "self_attn.o", "cross_attn.q", "ffn.0", "ffn.2"):
            if (block, name) not in seen:
                raise ValueError(f"blocks.{block}.{name} is missing")
