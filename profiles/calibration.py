"""What the output projections of a model get to see: second moments of their inputs (ours).

The least-squares refit of a slim model needs the sum of x x^T of the inputs x of each output
projection, never the inputs themselves. Sums, so that runs can be merged by adding them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .artifact import Kind, open_artifact, save_artifact
from .fingerprint import Fingerprint

KIND = Kind("calibration", "Record it again with WanTrim Profile.")
# what is recorded -> which inputs: of self- and cross-attention's o, of the FFN's down projection
CALIBRATE = {"none": (), "attention": ("self", "cross"), "all": ("self", "cross", "ffn")}


def input_size(model: Fingerprint, kind: str) -> int:
    """Length of the inputs of a kind, "self", "cross" or "ffn"."""
    return model.ffn_dim if kind == "ffn" else model.dim


def calibration_bytes(model: Fingerprint, calibrate: str) -> int:
    """Memory (and file size) that a calibration needs: 14B "attention" 8.4 GB, "all" 39 GB."""
    return sum(4 * model.num_blocks * input_size(model, kind) ** 2 for kind in CALIBRATE[calibrate])


class Calibration:
    """Sums of x x^T, fp32 on the CPU, as they grow during a run.

    Args:
        calibrate: name in `CALIBRATE`.

    Attributes:
        sums: "{kind}.{block}" -> [size, size].
        tokens: "{kind}.{block}" -> how many inputs x are in the sum.
    """

    def __init__(self, model: Fingerprint, calibrate: str):
        if calibrate not in CALIBRATE:
            raise ValueError(
                f"calibrate: expected one of {', '.join(CALIBRATE)}, got {calibrate!r}"
            )
        self.model = model
        self.kinds = CALIBRATE[calibrate]
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, kind: str, block: int, inputs: torch.Tensor) -> None:
        """Take in inputs [m, size] of a block's projection, any float type and device."""
        x = inputs.float()
        self._add(f"{kind}.{block}", (x.T @ x).cpu(), len(x))

    def absorb(self, saved: SavedCalibration) -> None:
        """Add what a file holds, one tensor at a time."""
        reason = self.model.differs(saved.model)
        if reason is not None:
            raise ValueError(
                f"{saved.path.name}: cannot merge calibrations of two models: {reason}"
            )
        added: list[str] = []
        try:
            for name, tokens in saved.tokens.items():
                self._add(name, saved.named(name), tokens)
                added.append(name)
        except ValueError:
            self.give_back(saved, added)
            raise

    def give_back(self, saved: SavedCalibration, names: Iterable[str] | None = None) -> None:
        """Take out again what `absorb` added, up to rounding; None is all of it."""
        for name in saved.tokens if names is None else names:
            self._add(name, -saved.named(name), -saved.tokens[name])
            if not self.tokens[name]:
                del self.sums[name], self.tokens[name]

    @property
    def finite(self) -> bool:
        """Whether all of it are numbers."""
        return all(bool(torch.isfinite(gram).all()) for gram in self.sums.values())

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        save_artifact(path, KIND, self.model, {"tokens": self.tokens}, self.sums)

    def clear(self) -> None:
        """Let go of everything."""
        self.sums.clear()
        self.tokens.clear()

    def _add(self, name: str, gram: torch.Tensor, tokens: int) -> None:
        if name not in self.sums:
            # outside inference mode: it is added to wherever the next call runs
            with torch.inference_mode(False):
                self.sums[name] = torch.zeros(gram.shape)
        self.sums[name] += gram
        self.tokens[name] = self.tokens.get(name, 0) + tokens


class SavedCalibration:
    """A calibration file; tensors are read one at a time, when they are asked for.

    Args:
        tokens: how many inputs are in each sum, by "{kind}.{block}".
    """

    def __init__(self, path: Path, model: Fingerprint, tokens: dict[str, int]):
        self.path, self.model, self.tokens = path, model, tokens

    def gram(self, kind: str, block: int) -> torch.Tensor | None:
        """Sum of x x^T [size, size] of a projection's inputs in fp32; None if it is not there.

        Args:
            kind: "self", "cross" or "ffn".

        Raises:
            ValueError: the file is damaged, or changed since it was opened.
        """
        name = f"{kind}.{block}"
        return self.named(name) if name in self.tokens else None

    def named(self, name: str) -> torch.Tensor:
        """The sum of a name in `tokens`, as `gram` gives it."""
        try:
            # as numpy: with "pt" the whole file would have to fit into memory
            with safe_open(self.path, "np") as file:
                gram = torch.from_numpy(file.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path.name}: {name} cannot be read ({error})") from error
        if not torch.isfinite(gram).all():
            raise ValueError(
                f"{self.path.name}: {name} holds values that are not finite: damaged file"
            )
        return gram


def load_calibration(path: Path) -> SavedCalibration:
    """Open a calibration and check everything but its numbers.

    Raises:
        ValueError: the file is damaged or something else, in an artist's words.
    """
    with open_artifact(path, KIND, "np") as (header, model, file):
        parts = {name: file.get_slice(name) for name in file.keys()}
        found = {name: (tuple(p.get_shape()), p.get_dtype()) for name, p in parts.items()}
    tokens = header.get("tokens")
    if not isinstance(tokens, dict) or tokens.keys() != found.keys():
        raise ValueError(f"{path.name}: the header does not list what the file holds: damaged file")
    for name, came in found.items():
        shape = _shape(model, name)
        if came != (shape, "F32") or type(tokens[name]) is not int or tokens[name] < 1:
            raise ValueError(
                f"{path.name}: {name:.60}: expected {shape} in F32, got {came[0]} in "
                f"{came[1]} from {tokens[name]!r:.20} tokens: damaged file"
            )
    return SavedCalibration(path, model, tokens)


def _shape(model: Fingerprint, name: str) -> tuple[int, int] | None:
    """Of a sum "{kind}.{block}", or None when the model has no such projection."""
    kind, _, block = name.partition(".")
    known = kind in CALIBRATE["all"] and re.fullmatch(r"0|[1-9][0-9]{0,5}", block)
    if not known or int(block) >= model.num_blocks:
        return None
    return (input_size(model, kind),) * 2
