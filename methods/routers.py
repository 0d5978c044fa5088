"""Which blocks matter at a step: one logit per block from sigma and content.

PARE (arXiv 2605.27336, section 3.3) trains a router (eq. 9) and finds that it recovers the size of
what each block adds at each timestep; the profiled router reads that off a profile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from .artifact import Kind, open_artifact, save_artifact
from .conditions import Conditions
from .fingerprint import Fingerprint
from .profile import BINS, Profile, sigma_bin
from .schedule import millionths

# 2: the header says what the router was trained with, and of which cut
KIND = Kind("router", "Choose a file that WanTrim's training wrote.", 2)
# of content that a trained router may look at
KINDS = ("clip", "latent", "none")


@dataclass
class Content:
    """What a router may look at besides sigma.

    Args:
        latent: the model's input of the conditional prompt [b, c, f, h, w].
        clip: class embedding of the given image [b, c], or None.
    """

    latent: torch.Tensor
    clip: torch.Tensor | None = None


class RouterRun(Protocol):
    """A router during one sampling run."""

    def logits(self, sigma: float, content: Content) -> torch.Tensor:
        """One logit per block [l]; the highest run."""


class Router(Protocol):
    """Plain data; `run` makes the state of one sampling run."""

    name: str
    skips_nothing: bool

    def count(self, num_blocks: int, budget: int) -> int:
        """Blocks that run where the budget asks for `budget`."""

    def run(self, num_blocks: int) -> RouterRun: ...


class _Budgeted:
    """A router that follows the budget."""

    skips_nothing = False

    def count(self, num_blocks: int, budget: int) -> int:
        return budget


@dataclass(frozen=True)
class FixedRouter:
    """Always the same blocks, whatever the budget.

    Args:
        skipped: blocks that never run; the first and the last block run all the same.
    """

    skipped: tuple[int, ...]
    name = "fixed"

    @property
    def skips_nothing(self) -> bool:
        return not self.skipped

    def _inside(self, num_blocks: int) -> set[int]:
        outside = [index for index in self.skipped if not 0 <= index < num_blocks]
        if outside:
            raise ValueError(f"blocks: expected numbers from 0 to {num_blocks - 1}, got {outside}")
        return set(self.skipped) - {0, num_blocks - 1}

    def count(self, num_blocks: int, budget: int) -> int:
        return num_blocks - len(self._inside(num_blocks))

    def run(self, num_blocks: int) -> RouterRun:
        logits = torch.ones(num_blocks)
        logits[sorted(self._inside(num_blocks))] = 0
        return _Constant(logits)


class _Constant:
    def __init__(self, logits: torch.Tensor):
        self._logits = logits

    def logits(self, sigma: float, content: Content) -> torch.Tensor:
        return self._logits


@dataclass(frozen=True)
class RandomRouter(_Budgeted):
    """Blocks by chance, anew at every sigma: what any other router has to beat."""

    seed: int = 0
    name = "random"

    def run(self, num_blocks: int) -> RouterRun:
        return _Random(num_blocks, self.seed)


class _Random(_Constant):
    def __init__(self, num_blocks: int, seed: int):
        super().__init__(torch.zeros(num_blocks))
        self._seed = seed

    def logits(self, sigma: float, content: Content) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + millionths(sigma))
        return torch.rand(len(self._logits), generator=generator)


def residual_sizes(profile: Profile) -> torch.Tensor:
    """What each block adds relative to its input, per sigma bin [t, l].

    Bins that saw no call take over from the nearest one that did.

    Raises:
        ValueError: the profile holds no calls.
    """
    counts = profile.tensors["count"]
    seen = counts.nonzero()[:, 0]
    if not len(seen):
        raise ValueError("profile: expected one with at least one recorded run, got an empty one")
    size = profile.mean("residual") / profile.mean("hidden").clamp(min=1e-12)
    nearest = (torch.arange(BINS)[:, None] - seen).abs().argmin(1)
    return size[seen[nearest]]


class ProfiledRouter(_Budgeted):
    """By the size of what each block added at this sigma when the profile was recorded."""

    name = "profiled"

    def __init__(self, profile: Profile):
        self.sizes = residual_sizes(profile)

    def run(self, num_blocks: int) -> RouterRun:
        if self.sizes.shape[1] != num_blocks:
            raise ValueError(
                f"profile: expected one of a model with {num_blocks} blocks, got "
                f"{self.sizes.shape[1]}: the profile is of another model"
            )
        return _Profiled(self.sizes)


class _Profiled(_Constant):
    def __init__(self, sizes: torch.Tensor):
        super().__init__(sizes[0])
        self._sizes = sizes

    def logits(self, sigma: float, content: Content) -> torch.Tensor:
        return self._sizes[sigma_bin(sigma)]


def latent_statistics(latent: torch.Tensor) -> torch.Tensor:
    """Statistics of a noisy latent [b, c, f, h, w] as content [b, 4 * c].

    Mean, standard deviation, mean absolute difference in time and mean absolute spatial gradient of
    every channel. Which ones is not stated in the paper.
    """
    x = latent.float()
    over = (2, 3, 4)
    parts = [x.mean(over), x.std(over, correction=0)]
    for axes in ((2,), (3, 4)):
        change = [x.diff(dim=axis).abs().flatten(2) for axis in axes if x.shape[axis] > 1]
        still = torch.zeros_like(parts[0])
        parts.append(torch.cat(change, 2).mean(2) if change else still)
    return torch.cat(parts, 1)


class RouterMLP(nn.Module):
    """The trained router (eq. 9): three layers with SiLU, one logit per block.

    Args:
        content_dim: 0 leaves the content out (the paper's timestep-only router).
    """

    def __init__(self, num_blocks: int, content_dim: int, hidden: int = 256, time_dim: int = 256):
        super().__init__()
        self.num_blocks, self.content_dim = num_blocks, content_dim
        self.hidden, self.time_dim = hidden, time_dim
        self.layers = nn.Sequential(
            nn.Linear(time_dim + content_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, num_blocks),
        )

    def forward(self, sigma: torch.Tensor, content: torch.Tensor | None) -> torch.Tensor:
        """Logits [b, l] for sigma [b] and content [b, content_dim]."""
        half = self.time_dim // 2
        steps = torch.arange(half, device=sigma.device, dtype=torch.float32)
        angles = 1000 * sigma.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
        given = torch.cat([angles.cos(), angles.sin()], 1)
        if self.content_dim:
            given = torch.cat([given, content.float()], 1)
        return self.layers(given.to(self.layers[0].weight.dtype))


class TrainedRouter(_Budgeted):
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

    def run(self, num_blocks: int) -> RouterRun:
        if self.mlp.num_blocks != num_blocks:
            raise ValueError(
                f"router: expected one for {num_blocks} blocks, got {self.mlp.num_blocks}: it was "
                "trained for another model"
            )
        return _Trained(self)

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


class _Trained(_Constant):
    def __init__(self, router: TrainedRouter):
        super().__init__(torch.zeros(router.mlp.num_blocks))
        self._router = router

    def logits(self, sigma: float, content: Content) -> torch.Tensor:
        return self._router.ask(torch.tensor([sigma]), content).cpu()


def save_router(path: Path, router: TrainedRouter, package: str = "") -> None:
    """Write it whole or not at all."""
    mlp = router.mlp
    sizes = [mlp.num_blocks, mlp.content_dim, mlp.hidden, mlp.time_dim]
    header = {"content": router.kind, "sizes": sizes, "package": package}
    if router.conditions is not None:
        header["trained"] = router.conditions.to_json()
    tensors = {name: value.detach().cpu().contiguous() for name, value in mlp.state_dict().items()}
    save_artifact(path, KIND, router.model, header, tensors)


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
    mlp.load_state_dict(tensors, assign=True)
    return TrainedRouter(mlp.requires_grad_(False), kind, model, conditions)


def _plausible(sizes: object) -> bool:
    """Whether these are sizes of a `RouterMLP`."""
    if not isinstance(sizes, list) or len(sizes) != 4:
        return False
    if not all(type(n) is int and 0 <= n < 1 << 16 for n in sizes):
        return False
    num_blocks, _, hidden, time_dim = sizes
    return min(num_blocks, hidden, time_dim) > 0 and time_dim % 2 == 0
