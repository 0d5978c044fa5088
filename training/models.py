"""Teacher and student: a full Wan and its slim copy, as diffusers' transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..hosts.diffusers.checkpoints import checkpoint_config, empty_model
from ..hosts.diffusers.slim import empty_slim, save_slim
from ..hosts.diffusers.weights import to_diffusers_keys
from ..methods.cost import Width
from ..methods.routers import RouterMLP
from ..profiles.artifact import package_version
from ..profiles.fingerprint import sample_modulation, width_digest
from ..profiles.profile import Profile, load_profile
from ..slim.export import check_profile, export_slim
from ..slim.file import SlimHeader, read_header
from ..slim.router import Conditions, TrainedRouter, save_router
from ..slim.source import Source, open_source
from ..slim.width import channels, ffn_count, pare_heads
from ..solve.budget import solve_width
from ..toy import CHECKPOINT, PROFILE
from .loading import Waiting
from .recipe import TINY, Recipe, Stage


@dataclass(frozen=True)
class Origin:
    """Where a recipe starts from.

    Args:
        source: the full model's file.
        profile: what was measured about it.
    """

    source: Source
    profile: Profile

    def teacher(self, dtype: torch.dtype, learns: bool = False) -> Waiting:
        """The full model, all in one number format, which sharding wants.

        Raises:
            ValueError: diffusers' class cannot be this model.
        """
        return full_model(self.source, dtype, learns)

    def cut(self, path: Path, stage: Stage | None) -> None:
        """Write the student that training begins with: PARE's width, or the budget's.

        The norms are corrected for the missing heads; the rest is left to training.

        Args:
            stage: with the share that goes; None cuts nothing.
        """
        stage = stage or Stage("width", prune_ratio=0.0)
        export_slim(
            self.source,
            path,
            starting_width(self.profile, stage, self.source.signature),
            profile=self.profile,
            made={
                "package": package_version(),
                "rule": stage.rule,
                "prune_ratio": stage.prune_ratio,
                "protection": stage.protection,
            },
        )


def full_model(source: Source, dtype: torch.dtype, learns: bool = False) -> Waiting:
    """A full checkpoint as diffusers' transformer, all in one number format.

    Raises:
        ValueError: diffusers' class cannot be this model.
    """
    model = empty_model(checkpoint_config(source.path)).to(dtype)
    entries = to_diffusers_keys(source.entries)
    return Waiting(model.eval().requires_grad_(learns), source.path, entries)


def open_origin(recipe: Recipe) -> Origin:
    """Find what a recipe names.

    Raises:
        ValueError: a file is missing, damaged or does not fit the others.
    """
    tiny = recipe.model == TINY
    path = CHECKPOINT if tiny else Path(recipe.model)
    if path.is_dir():
        raise ValueError(
            f"model: {path.name} is a folder; expected one .safetensors file in Wan's original key "
            "names, as ComfyUI's Load Diffusion Model reads it"
        )
    source = open_source(path)
    origin = Origin(source, load_profile(Path(recipe.profile or PROFILE)))
    check_profile(source, origin.profile)
    wanted = {"t2v": source.model.out_channels, "i2v": 2 * source.model.out_channels + 4}
    expected = wanted.get(recipe.task, wanted["i2v"])
    if source.model.in_channels != expected:
        raise ValueError(
            f"task: expected a model with {expected} input channels for {recipe.task!r}, got "
            f"{source.model.in_channels}"
        )
    return origin


def starting_width(profile: Profile, stage: Stage, signature) -> Width:
    """What the student keeps, by the stage's rule."""
    if stage.rule == "budget":
        return solve_width(profile, 1.0 - stage.prune_ratio, signature)
    keep = ffn_count(profile.model.ffn_dim, stage.prune_ratio)
    return Width(
        pare_heads(profile, stage.prune_ratio, stage.protection),
        pare_heads(profile, stage.prune_ratio, kind="cross"),
        channels(profile.tensors["channel_norm"], [keep] * profile.model.num_blocks, signature),
    )


def open_student(path: Path) -> tuple[Waiting, SlimHeader]:
    """A slim model in fp32, to be trained.

    Raises:
        ValueError: it is not a slim file that diffusers' class can be.
    """
    model, entries = empty_slim(path)
    return Waiting(model.requires_grad_(True), path, entries), read_header(path)


def write_student(
    folder: Path,
    student: dict[str, torch.Tensor],
    router: RouterMLP | None,
    kind: str | None,
    header: SlimHeader,
    trained: list[dict],
    dtype: torch.dtype = torch.bfloat16,
    *,
    conditions: Conditions | None = None,
) -> None:
    """Write `student.safetensors` and, with a router, `router.safetensors` into a folder.

    Args:
        student: the whole state dict, by diffusers' names.
        kind: of content that the router looks at.
        trained: what the header says about the stages.
        conditions: that the router was trained under.
    """
    tables = [
        student[f"blocks.{index}.scale_shift_table"] for index in range(header.model.num_blocks)
    ]
    model = replace(header.model, sample=_sample(tables, student["scale_shift_table"], dtype))
    # a norm's factor of the cut is in its weights, which went on from there
    made = {**header.made, "trained": trained}
    header = replace(header, model=model, norm_scale={}, made=made)
    # the student last: where it is, the stage is done
    if router is not None:
        own = replace(model, width=width_digest(model, header.width))
        trained_router = TrainedRouter(router, kind, own, conditions)
        save_router(folder / "router.safetensors", trained_router)
    save_slim(folder / "student.safetensors", student, header, dtype)


def _sample(tables: list[torch.Tensor], last: torch.Tensor, dtype: torch.dtype) -> tuple:
    # as it will be read again
    return sample_modulation([table.to(dtype) for table in (*tables, last)])
