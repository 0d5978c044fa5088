"""Which model an artifact was made for: its sizes, and a sample of numbers that no format changes.

The modulation tables of a Wan are parameters that checkpoints keep in high precision and LoRAs
leave alone, so a sample of them tells models of the same size apart, such as the two experts of
Wan2.2, and holds for fp8, quantised and patched weights of the same model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from ..methods.cost import Width

# numbers taken of each modulation table
SAMPLES = 8
# relative distance up to which two samples are the same model: above what fp8 rounds away
SAME = 0.04
# `width_digest` of a model that keeps everything
WHOLE = "whole"


@dataclass(frozen=True)
class Fingerprint:
    """Sizes of a Wan transformer, and its sample.

    Args:
        width: `width_digest` of a student: what was cut tells it from its teacher and from another
            cut long before training moves the sample; None is not known.
    """

    dim: int
    ffn_dim: int
    num_blocks: int
    num_heads: int
    in_channels: int
    out_channels: int
    sample: tuple[float, ...] = ()
    width: str | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def to_json(self) -> dict:
        said = asdict(self) | {"sample": [float(f"{value:.6g}") for value in self.sample]}
        if self.width is None:
            del said["width"]
        return said

    @classmethod
    def from_json(cls, data: object) -> Fingerprint:
        """Read what `to_json` wrote."""
        sizes = ("dim", "ffn_dim", "num_blocks", "num_heads", "in_channels", "out_channels")
        if not isinstance(data, dict) or not all(type(data.get(n)) is int for n in sizes):
            raise ValueError(f"model: expected the sizes {', '.join(sizes)}, got {data!r:.200}")
        sample = data.get("sample", [])
        # no NaN either
        if not isinstance(sample, list) or not all(
            isinstance(x, int | float) and abs(x) < 1e30 for x in sample
        ):
            raise ValueError("model: expected a list of finite numbers as its sample")
        if min(data[name] for name in sizes) < 1 or data["dim"] % data["num_heads"]:
            raise ValueError(f"model: impossible sizes {data!r:.200}")
        width = data.get("width")
        if width is not None and not (isinstance(width, str) and len(width) <= 64):
            raise ValueError(f"model: expected a digest as its width, got {width!r:.80}")
        return cls(*(data[name] for name in sizes), tuple(float(x) for x in sample), width)

    def describe(self) -> str:
        return (
            f"{self.num_blocks} blocks, {self.num_heads} heads, dim {self.dim}, ffn {self.ffn_dim}, "
            f"{self.in_channels} input and {self.out_channels} output channels"
        )

    def differs(self, other: Fingerprint) -> str | None:
        """What makes `other` another model than this one, or None."""
        if self.describe() != other.describe():
            return f"expected {self.describe()}, got {other.describe()}"
        if None not in (self.width, other.width) and self.width != other.width:
            kinds = (
                "the full model" if w == WHOLE else "a slim one" for w in (self.width, other.width)
            )
            return "expected {}, got {}: other heads and channels were cut".format(*kinds)
        mine, theirs = torch.tensor(self.sample), torch.tensor(other.sample)
        if mine.shape != theirs.shape:
            return "their samples have different lengths"
        # a sample that is no number is like none
        if len(mine) and not float((mine - theirs).norm()) <= SAME * float(mine.norm()):
            return (
                "the sizes are the same but the weights are not (Wan2.2's two experts look alike: "
                "was the other one meant?)"
            )
        return None


def sample_modulation(tables: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """Evenly spaced numbers of each modulation table, as `Fingerprint.sample`."""
    numbers = []
    for table in tables:
        flat = table.detach().float().flatten()
        index = torch.linspace(0, len(flat) - 1, SAMPLES, device=flat.device).long()
        numbers += flat[index].tolist()
    return tuple(numbers)


def width_digest(model: Fingerprint, width: Width) -> str:
    """What tells a cut of a model from others: `WHOLE`, or a checksum of what each block keeps."""
    parts = (width.self_heads, width.cross_heads, width.ffn_channels)
    sizes = (model.num_heads, model.num_heads, model.ffn_dim)
    if all(len(kept) == size for part, size in zip(parts, sizes, strict=True) for kept in part):
        return WHOLE
    return hashlib.sha256(
        repr([[list(kept) for kept in part] for part in parts]).encode()
    ).hexdigest()[:16]
