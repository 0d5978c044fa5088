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
from ..slim.router import Conditions, TrainedRouter
from ..slim.source import Source, open_source
from ..slim.width import channels, ffn_count, pare_heads, solve_width
from ..toy import CHECKPOINT, PROFILE
from .began import ROUTER, STUDENT, contents
from .loading import Waiting
from .recipe import TINY, Recipe, Stage
from .router_file import save_router


@dataclass(frozen=True)
class Origin:
    """Where a recipe starts from.

    Args:
        source: the full model's file.
        profile: what was measured about it.
        contents: checksums of both, by "model" and "profile".
    """

    source: Source
    profile: Profile
    contents: dict[str, str]

    def made(self, stage: Stage | None) -> dict:
        """What decides the cut of a stage; None cuts nothing."""
        stage = stage or Stage("width", prune_ratio=0.0)
        said = {name: getattr(stage, name) for name in ("rule", "prune_ratio", "protection")}
        return said | self.contents

    def is_cut(self, path: Path, stage: Stage | None) -> bool:
        """Whether a file is the student that `cut` would write."""
        try:
            there = read_header(path).made
        except ValueError:
            return False
        return all(there.get(name) == value for name, value in self.made(stage).items())

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
            made={"package": package_version(), **self.made(stage)},
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
    profile = Path(recipe.profile or PROFILE)
    said = {"model": contents(path), "profile": contents(profile)}
    origin = Origin(source, load_profile(profile), said)
    check_profile(source, origin.profile)
    wanted = {"t2v": source.model.out_channels, "i2v": 2 * source.model.out_channels + 4}
    expected = wanted.get(recipe.task, wanted["i2v"])
    if source.model.in_channels != expected:
        raise ValueError(
            f"task: expected a model with {expected} input channels for {recipe.task!r}, got "
            f"{source.model.in_channels}"
        )
    if not looks_through_clip(source) and any(stage.content == "clip" for stage in recipe.stages):
        raise ValueError(
            "content: expected 'latent' or 'none', as this model does not look at the image through "
            "CLIP, got 'clip'"
        )
    return origin


def looks_through_clip(source: Source) -> bool:
    """Whether a model is given CLIP's view of the first image."""
    return any("img_emb." in name for name in source.entries)


def start_files(start: Path) -> tuple[Path, Path | None]:
    """The student to begin with, and its router where it has one.

    Args:
        start: a stage's folder, its student, or another slim file.
    """
    file = start / STUDENT if start.is_dir() else start
    router = file.with_name(ROUTER)
    return file, router if file.name == STUDENT and router.exists() else None


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
        save_router(folder / ROUTER, trained_router)
    save_slim(folder / STUDENT, student, header, dtype)


def _sample(tables: list[torch.Tensor], last: torch.Tensor, dtype: torch.dtype) -> tuple:
    # as it will be read again
    return sample_modulation([table.to(dtype) for table in (*tables, last)])
