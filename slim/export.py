"""From a full Wan checkpoint to a slim one, tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..methods.cost import Width
from ..profiles.artifact import package_version
from ..profiles.calibration import load_calibration
from ..profiles.profile import Profile
from .cut import SHARES, Cut, check_width, find_cut, norm_scale, refit, take
from .file import DTYPES, PREFIX, Entry, Progress, SlimHeader, write_tensors
from .source import Source, open_source
from .width import check_ratio, pare_width, solve_width

log = logging.getLogger(__name__)

RULES = ("budget", "pare")
# progress of `slim_checkpoint`, and how much of it the choice of a width is
TICKS, CHOOSING = 1000, 200

# part ("self", "cross" or "ffn") and block -> sum of x x^T of that output projection's inputs
Grams = Callable[[str, int], torch.Tensor | None]


@dataclass
class Summary:
    """What an export wrote."""

    path: Path
    before: int
    after: int
    header: SlimHeader
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """In an artist's words."""
        width, model = self.header.width, self.header.model

        def share(blocks, most: int) -> str:
            kept = [len(block) for block in blocks]
            return (
                f"{100 * sum(kept) / (most * len(kept)):.0f}% ({min(kept)} to {max(kept)} of {most} "
                "per block)"
            )

        lines = [
            f"Wrote {self.path.name}",
            f"size: {self.before / 1e9:.3g} GB -> {self.after / 1e9:.3g} GB "
            f"({100 * self.after / self.before:.0f}%)",
            f"self-attention heads kept: {share(width.self_heads, model.num_heads)}",
            f"cross-attention heads kept: {share(width.cross_heads, model.num_heads)}",
            f"FFN channels kept: {share(width.ffn_channels, model.ffn_dim)}",
            f"corrections: {', '.join(self.header.made['corrections']) or 'none'}",
            *self.notes,
        ]
        return "\n".join(lines)


def export_slim(
    source: Source,
    out: Path,
    width: Width,
    *,
    profile: Profile | None = None,
    gram: Grams | None = None,
    made: dict | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Cut a checkpoint to `width` and write it; a few tensors are in memory at a time.

    Args:
        profile: of this model, for the correction of the norms; None leaves them uncorrected.
        gram: for the refit of the output projections; None leaves them as they are.
        made: added to what the header says about how it was made.

    Raises:
        ValueError: the width or the profile is of another model.
    """
    model, notes = source.model, []
    if profile is not None:
        check_profile(source, profile)
    check_width(width, model)
    scales = _scales(source, width, profile, notes)
    refits = _Refits(source, width, gram, notes)
    corrections = [
        *(["norms rescaled for the heads that are left"] if scales else []),
        *(["output projections refitted by least squares"] if refits.wanted else []),
    ]
    said = {"source": source.path.name, **(made or {}), "corrections": corrections}
    header = SlimHeader(model, width, scales, said, source.config)
    kept = header.kept()
    entries = [Entry(name, "I32", tuple(tensor.shape)) for name, tensor in kept.items()]
    for key, entry in source.entries.items():
        shape, cut = list(entry.shape), find_cut(key)
        if cut is not None:
            if len(shape) <= cut.axis or shape[cut.axis] != cut.size(model):
                raise ValueError(
                    f"{source.path.name}: {key}: expected {cut.size(model)} of its axis {cut.axis}, "
                    f"got shape {tuple(shape)}"
                )
            shape[cut.axis] = len(cut.index(width, model.head_dim))
        entries.append(Entry(PREFIX + key, entry.dtype, tuple(shape)))

    def make(entry: Entry) -> torch.Tensor:
        if entry.name in kept:
            return kept[entry.name]
        key = entry.name.removeprefix(PREFIX)
        tensor, cut = source.tensor(key), find_cut(key)
        if cut is None:
            return tensor
        if cut.axis == 1 and refits.wanted:
            return refits.columns(cut, tensor)
        narrow = take(tensor, cut.axis, cut.index(width, model.head_dim))
        scale = header.scale(cut.name, cut.block) if cut.leaf == "weight" else 1.0
        return narrow if scale == 1.0 else (narrow.float() * scale).to(narrow.dtype)

    size = write_tensors(out, entries, header.metadata(), make, progress)
    before = sum(entry.size for entry in source.entries.values())
    log.info("WanTrim: %s: %.3g GB became %.3g GB", out.name, before / 1e9, size / 1e9)
    return Summary(out, before, size, header, notes)


def _scales(
    source: Source, width: Width, profile: Profile | None, notes: list[str]
) -> dict[str, tuple[float, ...]]:
    """Factors for the norms over all heads, by name of `SHARES` and block."""
    scales: dict[str, tuple[float, ...]] = {}
    if profile is None:
        notes.append("the norms were not corrected for the missing heads: there is no profile")
        return scales
    unmeasured = []
    for name, measured in SHARES.items():
        if f"blocks.0.{name}.weight" not in source.entries:
            continue
        heads = width.self_heads if name.startswith("self") else width.cross_heads
        shares = profile.tensors[measured]
        factors = [norm_scale(shares[block], kept) for block, kept in enumerate(heads)]
        if None in factors:
            unmeasured.append(name)
        elif any(factor != 1.0 for factor in factors):
            scales[name] = tuple(float(f"{factor:.6g}") for factor in factors)
    if unmeasured:
        notes.append(
            f"not corrected for the missing heads: {', '.join(unmeasured)}; the profile has no "
            "measurement of them (an image-to-video model has to be profiled with a start image)"
        )
    return scales


class _Refits:
    """The least-squares refit of the output projections, where it can be done."""

    def __init__(self, source: Source, width: Width, gram: Grams | None, notes: list[str]):
        self.source, self.width, self.gram, self.notes = source, width, gram, notes
        cuts = [(find_cut(key), DTYPES[entry.dtype]) for key, entry in source.entries.items()]
        sizes = {dtype.itemsize for cut, dtype in cuts if cut is not None and cut.axis == 1}
        self.wanted = gram is not None and max(sizes, default=1) > 1
        if gram is not None and 1 in sizes:
            notes.append(
                "output projections in fp8 were not refitted: fp8 is too coarse to store the result; "
                "cut the bf16 or fp16 file to get it"
            )

    def columns(self, cut: Cut, weight: torch.Tensor) -> torch.Tensor:
        index = cut.index(self.width, self.source.model.head_dim)
        if len(index) == weight.shape[1]:
            return weight
        if weight.dtype.itemsize == 1:
            return take(weight, 1, index)
        gram = self.gram(cut.part.removesuffix("_attn"), cut.block)
        if gram is None:
            note = f"no calibration of {cut.name}: not refitted there"
            if note not in self.notes:
                self.notes.append(note)
            return take(weight, 1, index)
        try:
            return refit(weight, gram, index).to(weight.dtype)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"calibration: {cut.name} of block {cut.block} is not a sum of x x^T ({error}). "
                "Record it again."
            ) from error


def slim_checkpoint(
    path: Path,
    out: Path,
    profile: Profile,
    *,
    calibration: Path | None = None,
    rule: str = RULES[0],
    prune_ratio: float = 0.3,
    refitted: bool = True,
    progress: Progress | None = None,
) -> Summary:
    """Choose a width from a profile and write the slim checkpoint.

    Args:
        rule: "pare" keeps equally many heads and channels in every block (arXiv 2605.27336, section
            3.2); "budget" (ours) spends the same parameters where the profile says they matter.
        prune_ratio: share of the heads and FFN channels that goes.
        progress: gets parts of `TICKS`; may raise to cancel.

    Raises:
        ValueError: the file cannot be cut, or the profile or calibration is not of this model.
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    check_ratio(prune_ratio)
    source = open_source(path)
    check_profile(source, profile)

    def signature(block: int) -> torch.Tensor:
        if progress is not None:
            progress(CHOOSING * block // source.model.num_blocks, TICKS)
        return source.signature(block)

    def written(done: int, total: int) -> None:
        if progress is not None:
            progress(CHOOSING + (TICKS - CHOOSING) * done // max(1, total), TICKS)

    if rule == "pare":
        width = pare_width(profile, prune_ratio, signature)
    else:
        width = solve_width(profile, 1.0 - prune_ratio, signature)
    gram = None
    if refitted and calibration is not None:
        saved = load_calibration(calibration)
        reason = saved.model.differs(source.model)
        if reason is not None:
            raise ValueError(f"{calibration.name}: the calibration is of another model: {reason}")
        gram = saved.gram
    said = {"package": package_version(), "rule": rule, "prune_ratio": prune_ratio}
    summary = export_slim(
        source, out, width, profile=profile, gram=gram, made=said, progress=written
    )
    if refitted and calibration is None:
        summary.notes.append(
            "the output projections were not refitted: the profile was recorded without calibration"
        )
    return summary


def check_profile(source: Source, profile: Profile) -> None:
    """Refuse a profile of another model."""
    reason = profile.model.differs(source.model)
    if reason is not None:
        raise ValueError(
            f"{source.path.name}: the profile is of another model: {reason}. Choose the profile that "
            "was made with this model."
        )
