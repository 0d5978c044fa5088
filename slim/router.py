"""A trained router and its file (PARE, arXiv 2605.27336, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..methods.routers import Content, Router, RouterMLP, latent_statistics
from ..profiles.artifact import Kind, open_artifact
from ..profiles.fingerprint import Fingerprint

# 2: the header says what the router was trained with, and of which cut
KIND = Kind("router", "Choose a file that WanTrim's training wrote.", 2)
# of content that a trained router may look at
KINDS = ("clip", "latent", "none")
# what a skipped block gives: it is the identity, and adds nothing
NOTHING = "identity"


@dataclass(frozen=True)
class Conditions:
    """The budget and the kind of skipping that a router learned under (eq. 8 and 12).

    Args:
        k_min, k_max: shares of the blocks that run, at no noise and at full noise.
        curve: how the budget moves with the noise, name in `depth.SHAPES`.
        skipped: what a skipped block gives; "identity" is nothing (eq. 12), and all that is done.
        shift: flow shift of the noise levels.
    """

    k_min: float
    k_max: float
    curve: str = "falling"
    skipped: str = NOTHING
    shift: float = 1.0

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> Conditions:
        """Read what `to_json` wrote."""
        try:
            made = cls(**data)
            numbers = [float(n) for n in (made.k_min, made.k_max, made.shift)]
            words = (made.curve, made.skipped)
            right = all(map(math.isfinite, numbers)) and made.shift > 0
            right &= 0 < made.k_min <= made.k_max <= 1
            right &= all(isinstance(w, str) and len(w) <= 20 for w in words)
        except (TypeError, ValueError, OverflowError):
            right = False
        if not right:
            raise ValueError(f"trained: expected what a router was trained with, got {data!r:.200}")
        return made

    def settle(
        self, chosen: Mapping[str, object], usual: Mapping[str, object]
    ) -> tuple[dict, list[str]]:
        """Values to sample with, and what to say about those that are not the router's own.

        Args:
            chosen: by name of a field; what is `usual` here stands for "as it was trained".
            usual: what an input has when nobody touched it.
        """
        settled, said = {}, []
        for name, value in chosen.items():
            own = getattr(self, name)
            settled[name] = own if value == usual[name] else value
            if settled[name] != own:
                said.append(f"{name}: {value} is set here; the router was trained with {own}")
        return settled, said

    def describe(self) -> str:
        said = (
            f"The router was trained with k_min {self.k_min:g}, k_max {self.k_max:g}, "
            f"{self.curve}, shift {self.shift:g}."
        )
        if self.skipped != NOTHING:
            said += (
                f" Its skipped blocks gave {self.skipped!r} then; here they add nothing, so that it may "
                "keep less."
            )
        return said


class TrainedRouter(Router):
    """A `RouterMLP` with weights.

    Args:
        kind: of content, one of `KINDS`.
        conditions: that it was trained under; None where the file does not say.
    """

    name = "trained"

    def __init__(
        self, mlp: RouterMLP, kind: str, model: Fingerprint, conditions: Conditions | None = None
    ):
        self.mlp, self.kind, self.model, self.conditions = mlp, kind, model, conditions

    def check(self, num_blocks: int) -> None:
        if self.mlp.num_blocks != num_blocks:
            raise ValueError(
                f"router: expected one for {num_blocks} blocks, got {self.mlp.num_blocks}: it was "
                "trained for another model"
            )

    @torch.no_grad()
    def ask(self, sigma: torch.Tensor, content: Content) -> torch.Tensor:
        """Logits [l] for a sigma [1], on the router's device; reading them waits for it."""
        mlp, kind = self.mlp, self.kind
        given = None
        if kind == "clip":
            if content.clip is None:
                raise ValueError(
                    "router: this one looks at the start image through CLIP; connect a CLIP vision "
                    "output to the image-to-video conditioning, or use another router"
                )
            given = content.clip[:1]
        elif kind == "latent":
            given = latent_statistics(content.latent[:1])
        if given is not None and given.shape[1] != mlp.content_dim:
            raise ValueError(
                f"router: expected {mlp.content_dim} numbers of content, got {given.shape[1]}: it "
                "was trained for another kind of latent or image"
            )
        device = mlp.layers[0].weight.device
        given = None if given is None else given.to(device)
        return mlp(sigma.to(device), given)[0].float()


def load_router(path: Path) -> TrainedRouter:
    """Read a trained router.

    Raises:
        ValueError: the file is damaged or something else, in an artist's words.
    """
    with open_artifact(path, KIND) as (header, model, file):
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    sizes, kind = header.get("sizes"), header.get("content")
    if kind not in KINDS or not _plausible(sizes) or (kind == "none") != (sizes[1] == 0):
        raise ValueError(
            f"{path.name}: damaged file: impossible sizes {sizes!r:.100} for content {kind!r:.20}"
        )
    if model.num_blocks != sizes[0]:
        raise ValueError(
            f"{path.name}: damaged file: it is for {sizes[0]} blocks, and its model has "
            f"{model.num_blocks} blocks"
        )
    conditions = None
    if header.get("trained") is not None:
        try:
            conditions = Conditions.from_json(header["trained"])
        except ValueError as error:
            raise ValueError(f"{path.name}: damaged file: {error}") from error
    with torch.device("meta"):
        mlp = RouterMLP(*sizes)
    shapes = {name: value.shape for name, value in mlp.state_dict().items()}
    if {name: value.shape for name, value in tensors.items()} != shapes:
        raise ValueError(f"{path.name}: damaged file: its tensors do not fit its header")
    for name, value in tensors.items():
        if not value.is_floating_point() or not torch.isfinite(value.float()).all():
            raise ValueError(f"{path.name}: damaged file: {name} holds values that are not finite")
    # copies in one precision: a file that is mapped cannot be replaced on Windows
    own = {name: value.to(torch.float32, copy=True) for name, value in tensors.items()}
    mlp.load_state_dict(own, assign=True)
    return TrainedRouter(mlp.requires_grad_(False), kind, model, conditions)


def _plausible(sizes: object) -> bool:
    """Whether these are sizes of a `RouterMLP`."""
    if not isinstance(sizes, list) or len(sizes) != 4:
        return False
    if not all(type(n) is int and 0 <= n < 1 << 16 for n in sizes):
        return False
    num_blocks, _, hidden, time_dim = sizes
    return min(num_blocks, hidden, time_dim) > 0 and time_dim % 2 == 0
