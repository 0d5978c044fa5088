"""Precomputed training data: batches out of a folder of shards.

A folder holds shards (safetensors), `prompts.safetensors` with the embeddings of the empty and the
negative prompt, and `index.json`, which lists the shards that are whole. Latents are normalised as
the transformer takes them. Samples may differ in shape; a batch never does.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from ..slim.file import Entry, list_entries, read_tensor
from .shard_files import FLOATS, PROMPTS, Index, Shard, check_shards, read_index

log = logging.getLogger(__name__)

# headers of shards that are kept in memory; no file stays open
MAX_HEADERS = 16


@dataclass(frozen=True)
class Batch:
    """What a training step is given.

    Args:
        latents: [b, c, f, h, w], normalised.
        text: [b, t, d], padded with zeros.
        condition: [b, 20, f, h, w]: Wan's 4 mask channels and 16 latents of the image; None for
            a model without them.
        clip: [b, 257, 1280]: CLIP's view of the image, of Wan2.1 image-to-video.
    """

    latents: torch.Tensor
    text: torch.Tensor
    condition: torch.Tensor | None = None
    clip: torch.Tensor | None = None

    def row(self, number: int) -> Batch:
        """One of its samples, as a batch."""
        values = (getattr(self, field.name) for field in fields(self))
        return Batch(*(v if v is None else v[number : number + 1] for v in values))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        values = (getattr(self, field.name) for field in fields(self))
        return Batch(*(v if v is None else v.to(device, dtype, non_blocking=True) for v in values))


def even_batch(batch: int, processes: int) -> int:
    """The batch that so many processes make of one: as much for each, at least one sample."""
    return -(-batch // processes) * processes


def own_rows(batch: int, rank: int, world: int) -> range:
    """The rows of a global batch that are a rank's.

    Raises:
        ValueError: the batch cannot be shared out evenly.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected 0 to {world - 1}, got {rank}")
    if batch % world:
        raise ValueError(
            f"batch: expected a multiple of the {world} processes, so that each gets as many "
            f"samples, got {batch}"
        )
    each = batch // world
    return range(rank * each, (rank + 1) * each)


class ShardDataset:
    """Batches out of folders of shards; which ones is a function of seed and step alone.

    Every sample comes up once in an epoch; the last batch of each shape is filled up with the
    first samples of its order. On several processes, make it on one of them first: the checksums
    are then taken once.

    Args:
        batch: samples of all processes together.
        drop_text: share of the samples that lose their text.
        negative_share: share of those that get the negative prompt, and not the empty one.
        image_share: share of the samples that keep their image condition; the others get zeros.

    Attributes:
        skipped: damaged shards, by name, with what is wrong.
        empty_text, negative_text: [t, d] of the empty and the negative prompt.
        fingerprint: of the samples that are there; another one means other batches.

    Raises:
        ValueError: no folder of shards, none of them can be used, or different models made them.
    """

    def __init__(
        self,
        folder: Path | Sequence[Path],
        batch: int,
        seed: int = 0,
        drop_text: float = 0.0,
        image_share: float = 1.0,
        negative_share: float = 0.0,
    ):
        folders = [folder] if isinstance(folder, Path) else list(folder)
        self.size, self.seed = batch, seed
        self.drop_text, self.image_share = drop_text, image_share
        self.negative_share = negative_share
        indexes = [read_index(one) for one in folders]
        self.text_tokens = _same_makers(folders, indexes)
        self.skipped: dict[str, str] = {}
        self._shards: list[tuple[Path, Shard]] = []
        for one, index in zip(folders, indexes, strict=True):
            damaged = check_shards(one, index)
            where = f"{one.name}/" if len(folders) > 1 else ""
            self.skipped |= {where + name: why for name, why in damaged.items()}
            self._shards += [(one, s) for s in index.shards if s.file not in damaged]
        for name, why in self.skipped.items():
            log.warning("%s: %s: the shard is skipped", name, why)
        if not self._shards:
            said = "; ".join(f"{name}: {why}" for name, why in list(self.skipped.items())[:3])
            raise ValueError(
                f"{', '.join(map(str, folders))}: expected training samples, got "
                + (f"{len(self.skipped)} damaged shards ({said})" if said else "an empty index")
                + ". Encode the videos again with `python -m wantrim.training.encode`."
            )
        if self.skipped:
            total = sum(len(index.shards) for index in indexes)
            log.warning("%d of %d shards are damaged and skipped", len(self.skipped), total)
        self.empty_text, self.negative_text = self._read_prompts(folders[0])
        digest = hashlib.sha256("".join(s.sha256 for _, s in self._shards).encode())
        self.fingerprint = digest.hexdigest()[:16]
        # (shard, sample in it), and which of them are of one shape; one that two writers made once
        places = {
            (folder, name): (i, j)
            for i, (folder, shard) in enumerate(self._shards)
            for j, name in enumerate(shard.names)
        }
        self._samples = list(places.values())
        buckets: dict[str, list[int]] = {}
        for number, (i, j) in enumerate(self._samples):
            buckets.setdefault(self._shape_key(i, j), []).append(number)
        self.buckets = {key: np.array(buckets[key]) for key in sorted(buckets)}
        self._epoch: tuple[int, np.ndarray] | None = None
        self._headers: dict[Path, dict[str, Entry]] = {}

    def __len__(self) -> int:
        """Samples that can be used."""
        return len(self._samples)

    @property
    def steps_per_epoch(self) -> int:
        return sum(-(-len(bucket) // self.size) for bucket in self.buckets.values())

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """A rank's part of the batch of a step, in fp32.

        Raises:
            ValueError: the batch cannot be shared out, or a shard was changed meanwhile.
        """
        rows = own_rows(self.size, rank, world)
        epoch, at = divmod(step, self.steps_per_epoch)
        picked = self._order(epoch)[at]
        samples = [self._sample(int(picked[row]), step, row) for row in rows]
        return Batch(
            *(None if part[0] is None else torch.stack(part) for part in zip(*samples, strict=True))
        )

    def _shape_key(self, shard: int, sample: int) -> str:
        shapes = dict(self._shards[shard][1].shapes[sample])
        # texts are padded to one length
        del shapes["text"]
        return json.dumps(shapes, sort_keys=True)

    def _order(self, epoch: int) -> np.ndarray:
        """Samples [steps_per_epoch, batch] of an epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, 1])
            batches = []
            for bucket in self.buckets.values():
                count = -(-len(bucket) // self.size)
                filled = np.resize(rng.permutation(bucket), count * self.size)
                batches.append(filled.reshape(count, self.size))
            order = np.concatenate(batches)
            self._epoch = epoch, order[rng.permutation(len(order))]
        return self._epoch[1]

    def _sample(self, number: int, step: int, row: int) -> tuple:
        shard, sample = self._samples[number]
        drop, leave, which = np.random.default_rng([self.seed, step, row, 2]).random(3)
        latents = self._read(shard, sample, "latents")
        text = self.negative_text if which < self.negative_share else self.empty_text
        if drop >= self.drop_text:
            text = self._padded(self._read(shard, sample, "text"))
        condition, clip = (self._read(shard, sample, name) for name in ("condition", "clip"))
        if leave >= self.image_share:
            condition, clip = (v if v is None else torch.zeros_like(v) for v in (condition, clip))
        return latents, text, condition, clip

    def _read(self, shard: int, sample: int, name: str) -> torch.Tensor | None:
        folder, record = self._shards[shard]
        if name not in record.shapes[sample]:
            return None
        path = folder / record.file
        if path not in self._headers:
            while len(self._headers) >= MAX_HEADERS:
                self._headers.pop(next(iter(self._headers)))
            self._headers[path] = {entry.name: entry for entry in list_entries(path)[0]}
        entry = self._headers[path].get(f"{sample}.{name}")
        if entry is None or entry.shape != tuple(record.shapes[sample][name]):
            raise ValueError(f"{record.file}: the shard was changed while it was in use")
        return read_tensor(path, entry).float()

    def _padded(self, text: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(text, (0, 0, 0, self.text_tokens - len(text)))

    def _read_prompts(self, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        path = folder / PROMPTS
        entries = {entry.name: entry for entry in list_entries(path)[0]}
        found = [entries.get(name) for name in ("empty", "negative")]
        if not all(entry and entry.dtype in FLOATS and len(entry.shape) == 2 for entry in found):
            raise ValueError(f"{PROMPTS}: expected the empty and the negative prompt's embeddings")
        empty, negative = (self._padded(read_tensor(path, entry).float()) for entry in found)
        if not (empty.isfinite().all() and negative.isfinite().all()):
            raise ValueError(f"{PROMPTS}: it has NaN or infinite values")
        return empty, negative


def _same_makers(folders: Sequence[Path], indexes: Sequence[Index]) -> int:
    """The length that texts are padded to, which is one where one model made the samples."""
    first = indexes[0]
    for folder, index in zip(folders, indexes, strict=True):
        if (index.made, index.text_tokens) != (first.made, first.text_tokens):
            raise ValueError(
                f"{folder}: expected samples that the same models made as those in {folders[0]} "
                "(task, VAE, text encoder, number formats, frame rate); encode one of them again"
            )
    return first.text_tokens
