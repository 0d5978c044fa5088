"""Records a profile while a host samples: what every head and FFN channel does. Knows no host.

A host announces each model call (`Recorder.begin`), hands over what it sees inside each block, and
closes the call. Only conditional rows are recorded, and only calls in which every block ran on all
tokens: what was not seen is named in the notes and never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engine.engine import COND
from ..methods.grid import TokenGrid
from ..methods.schedule import sigma_bin
from ..solve.tuned import Tuned
from .artifact import replacing
from .calibration import Calibration, load_calibration
from .fingerprint import Fingerprint
from .profile import PER_BIN, Profile, load_profile
from .recording import CallRecord

# rows of the identity that a linear layer gets at once
CHUNK_ROWS = 4096
CALIBRATION_ENDING = ".calibration.safetensors"

Linear = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Projections:
    """Linear layers of a block, as the host runs them: [..., in] -> [..., out]."""

    self_o: Linear
    cross_o: Linear
    up: Linear
    down: Linear


class NotFinite(ValueError):
    """What was recorded cannot be saved; the message is for the artist."""


class Recorder:
    """Sums up a sampling run, or several.

    Args:
        image: the model has CLIP image cross-attention.
        calibrate: name in `profiles.calibration.CALIBRATE`.
        about: what else to say about the run, such as the plan on the model.
    """

    def __init__(
        self,
        model: Fingerprint,
        *,
        image: bool = False,
        calibrate: str = "none",
        about: dict | None = None,
    ):
        self.model, self.image, self.about = model, image, about or {}
        self.calibration = Calibration(model, calibrate)
        self.notes: list[str] = []
        # what the dial may go by, where the host saw all of a whole run
        self.whole_run: Tuned | None = None
        self.weights_known = False
        # where the calibration went: once on disk, its gigabytes are let go of
        self.calibrated: Path | None = None
        self._sums = Profile.empty(model).tensors
        self._grid: TokenGrid | None = None
        self._sigmas: list[float] = []
        self._context = 0

    def note(self, text: str) -> None:
        """Say once what was not recorded and why."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def calls(self) -> int:
        return round(float(self._sums["count"].sum()))

    def profile(self) -> Profile:
        """Everything so far."""
        if self._grid is None:
            return Profile(self.model, dict(self._sums))
        run = {
            **self.about,
            "grid": [self._grid.frames, self._grid.height, self._grid.width],
            "context_tokens": self._context,
            "sigmas": self._sigmas,
            "calls": self.calls,
            "notes": self.notes,
        }
        tuned = [] if self.whole_run is None else [self.whole_run.to_json()]
        return Profile(self.model, dict(self._sums), [run], tuned)

    def begin(
        self, *, sigma: float, grid: TokenGrid, cond_or_uncond: Sequence[int], batch: int
    ) -> CallRecord | None:
        """Start a model call; None when it has no conditional rows.

        Args:
            cond_or_uncond: COND or UNCOND per chunk of the batch.
            batch: rows of the model's input.
        """
        samples = batch // len(cond_or_uncond)
        rows = [
            slice(i * samples, (i + 1) * samples)
            for i, role in enumerate(cond_or_uncond)
            if role == COND
        ]
        # hosts round differently, and many schedules meet the edge of a bin
        return CallRecord(self, round(sigma, 5), grid, rows, samples) if rows else None

    @torch.no_grad()
    def measure_weights(self, blocks: Sequence[Projections], like: torch.Tensor) -> None:
        """Measure the norms of the weights, by running identity matrices through the layers.

        So LoRAs, quantised and offloaded weights count as the model has them.

        Args:
            like: has the dtype and device of the model's hidden state.
        """
        if self.weights_known:
            return
        self.weights_known = True
        heads, dim, channels = self.model.num_heads, self.model.dim, self.model.ffn_dim
        found: dict[str, list] = {name: [] for name in ("self", "cross", "channel", "down")}
        for block in blocks:
            for name, layer in (("self", block.self_o), ("cross", block.cross_o)):
                squares = torch.cat([part.square().sum(-1) for part in _rows(layer, dim, like)])
                found[name].append(squares.view(heads, -1).sum(-1).sqrt().cpu())
            up = sum(part.square().sum(0) for part in _rows(block.up, dim, like)).sqrt()
            down = torch.cat([part.norm(dim=-1) for part in _rows(block.down, channels, like)])
            found["channel"].append((up * down).cpu())
            found["down"].append(down.cpu())
        for name, key in (("self", "self_o"), ("cross", "cross_o")):
            self._sums[f"{key}_norm"] = torch.stack(found[name])
        self._sums["channel_norm"] = torch.stack(found["channel"])
        self._sums["down_norm"] = torch.stack(found["down"])

    def take(self, call: CallRecord) -> None:
        """Add a call in which all blocks were seen."""
        at = sigma_bin(call.sigma)
        for name in {name for found in call.found.values() for name in found}:
            shape = self._sums[name].shape[2 if name in PER_BIN else 1 :]
            missing = torch.zeros(shape)
            parts = [call.found[i].get(name, missing) for i in range(self.model.num_blocks)]
            device = next(part.device for part in parts if part is not missing)
            # one copy per measurement: each waits for the device
            added = torch.stack([part.to(device) for part in parts]).cpu()
            into = self._sums[name]
            self._sums[name] = (
                into.index_add(0, torch.tensor([at]), added[None])
                if name in PER_BIN
                else into + added
            )
        counted = torch.tensor([float(call.samples * len(call.rows))])
        self._sums["count"] = self._sums["count"].index_add(0, torch.tensor([at]), counted)
        if call.sigma not in self._sigmas:
            self._sigmas.append(call.sigma)
        self._context = call.context
        if self._grid is None:
            self._grid = call.grid
        elif self._grid != call.grid:
            self.note("the video was sampled in parts of several sizes, or at several sizes")


def _rows(layer: Linear, size: int, like: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a linear layer without its bias makes of the identity [size, size]: fp32 [m, out]."""
    bias = layer(like.new_zeros(1, 1, size)).float()
    for first in range(0, size, CHUNK_ROWS):
        count = min(CHUNK_ROWS, size - first)
        eye = like.new_zeros(1, count, size)
        at = torch.arange(count, device=like.device)
        eye[0, at, first + at] = 1
        yield (layer(eye).float() - bias)[0]


@dataclass(frozen=True)
class ProfileFile:
    """A profile, and the file with the calibration that was recorded with it, if any."""

    profile: Profile
    calibration: Path | None = None


def calibration_path(path: Path) -> Path:
    """Where the calibration of a profile file lies."""
    return path.with_name(path.stem + CALIBRATION_ENDING)


def open_profile(path: Path) -> ProfileFile:
    """Read a profile and check the calibration beside it.

    Raises:
        ValueError: one of them is damaged or something else, or they are of different models.
    """
    profile, beside = load_profile(path), calibration_path(path)
    if not beside.is_file():
        return ProfileFile(profile)
    reason = profile.model.differs(load_calibration(beside).model)
    if reason is not None:
        raise ValueError(
            f"{beside.name}: the calibration is of another model than {path.name}: {reason}. "
            "Delete it, or move the one that belongs there back."
        )
    return ProfileFile(profile, beside)


def save_profile(recorder: Recorder, path: Path, merge: bool) -> ProfileFile:
    """Write what was recorded, profile and calibration.

    Args:
        merge: add it to the file that is there; else that one is replaced. A run that the file
            already holds is not added again.

    Raises:
        NotFinite: what was recorded is no numbers; what was there stays.
        ValueError: the file there is damaged or of another model.
        OSError, SafetensorError: it cannot be written; what was there stays, and the recorder can
            be saved again.
    """
    profile, calibration = recorder.profile(), recorder.calibration
    beside, merged = calibration_path(path), None
    if not (profile.finite and calibration.finite):
        # no reader would take the file, and what is merged with it would be lost
        raise NotFinite(
            "what was recorded holds values that are not finite, as when the video comes out black. "
            "Nothing was saved; sample again with settings that give a video"
        )
    merge = merge and path.is_file()
    if merge:
        old = open_profile(path)
        own = recorder.about.get("id")
        if own is not None and own in [run.get("id") for run in old.profile.runs]:
            return old
        profile = old.profile.merged(profile)
        if old.calibration is not None and calibration.sums:
            merged = load_calibration(old.calibration)
            calibration.absorb(merged)
    if not calibration.sums and recorder.calibrated not in (None, beside):
        recorder.note(f"the calibration of this run is in {recorder.calibrated.name} already")
    # without one, that of a profile that is replaced goes with it
    both = calibration.sums or not (merge or recorder.calibrated == beside)
    try:
        with replacing(*((beside, path) if both else (path,))) as partials:
            if calibration.sums:
                calibration.save(partials[0])
            profile.save(partials[-1])
    except BaseException:
        if merged is not None:
            calibration.give_back(merged)
        raise
    if calibration.sums:
        calibration.clear()
        recorder.calibrated = beside
    return ProfileFile(profile, beside if beside.is_file() else None)
