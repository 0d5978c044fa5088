"""Recipes: what is trained, on what and how, as TOML files that are checked before anything runs.

What a file leaves out is PARE's value (arXiv 2605.27336, section 3.4) where the paper states one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from .changes import change, tomllib
from .expected import Checked, choice, expected_of, refuse_unread, table, value

SHIPPED = Path(__file__).parent / "recipes"
TINY, TOY = "tiny", "toy"


@dataclass(frozen=True)
class Weights(Checked):
    """Weights of the losses; (10, 6, 1, 8) for text- and (10, 6, 1, 4) for image-to-video."""

    feature: float = value(float, 10.0, low=0.0)
    teacher: float = value(float, 6.0, low=0.0)
    data: float = value(float, 1.0, low=0.0)
    temporal: float = value(float, 8.0, low=0.0)

    def __post_init__(self):
        super().__post_init__()
        if not any(dataclasses.astuple(self)):
            raise ValueError("feature, teacher, data, temporal: expected one above 0, got none")


# what all stages read, those with the four losses, and each kind
_ALL = {"kind", "steps", "lr", "warmup", "shift", "guidance", "ema_decay"}
_LOSSES = {"weights", "feature_blocks", "sigma_min", "sigma_max", "weighting"}
_ROUTED = {"k_min", "k_max"}
READ = {
    "width": _ALL | _LOSSES | {"prune_ratio", "rule", "protection"},
    "router": _ALL | _LOSSES | _ROUTED | {"router_lr", "content"},
    "self_forcing": _ALL | _ROUTED | {"sampler_steps", "critic", "critic_lr", "critic_updates"},
    "steps": _ALL | _ROUTED | {"sampler_steps", "weights"},
}
# ours where the paper states nothing: as it was tried, on the tiny Wan
_TRIED = {"steps": 300, "lr": 2e-4, "warmup": 20}
# what the first stage of a kind decides for all of it: the cut, and what the router looks at
ONCE = {"width": ("prune_ratio", "rule", "protection"), "router": ("content",)}


@dataclass(frozen=True)
class Stage(Checked):
    """One stage. A value that its kind does not read is refused, see `READ`.

    Args:
        kind: "width" (I), "router" (II), "self_forcing" (III) or "steps" (ours).
        lr: peak of the student's learning rate: warm-up, then a cosine.
        prune_ratio: share of the heads and FFN channels that goes.
        rule: as many heads in every block as the paper has it, or a budget across blocks.
        protection: factor on the score of temporal heads; 1 is none.
        feature_blocks: blocks that the feature loss looks at in a step, drawn at random.
        k_min, k_max: shares of the blocks that run, at no noise and at full noise.
        content: what the router looks at beside the timestep.
        shift: flow shift of the training sigmas.
        sigma_min, sigma_max: noise levels that are trained; an expert of Wan 2.2 knows its own only.
        weighting: of the samples in the losses of "width" and "router": alike (paper), or by
            log(1 + sigma), which leaves little of the loss to low noise (ours).
        guidance: of test videos; folded into the student in the stages "self_forcing" and "steps".
        sampler_steps: that the student of these stages samples with, without guidance.
        critic: what the critic of the stage "self_forcing" begins as: the full model, or the student,
            which takes less memory and has further to go.
        critic_lr: peak of the critic's learning rate in the stage "self_forcing".
        critic_updates: steps of the critic for each of the student, which both count as steps.
        ema_decay: of the averaged weights; 0 keeps no average.
    """

    kind: str = choice(MISSING, "width", "router", "self_forcing", "steps")
    steps: int = value(int, 7000, low=1)
    lr: float = value(float, 3e-5, low=0.0, high=1.0, above=True)
    router_lr: float = value(float, 5e-4, low=0.0, high=1.0, above=True)
    warmup: int = value(int, 100, low=0)
    weights: Weights = table(Weights, Weights())
    prune_ratio: float = value(float, 0.3, low=0.0, high=0.9)
    rule: str = choice("pare", "pare", "budget")
    protection: float = value(float, 1.5, low=1.0, high=10.0)
    feature_blocks: int = value(int, 4, low=1)
    k_min: float = value(float, 0.5, low=0.0, high=1.0, above=True)
    k_max: float = value(float, 0.875, low=0.0, high=1.0, above=True)
    content: str = choice("latent", "clip", "latent", "none")
    shift: float = value(float, 5.0, low=0.0, high=100.0, above=True)
    sigma_min: float = value(float, 0.0, low=0.0, high=1.0)
    sigma_max: float = value(float, 1.0, low=0.0, high=1.0, above=True)
    weighting: str = choice("none", "none", "log")
    guidance: float = value(float, 5.0, low=1.0, high=100.0)
    sampler_steps: int = value(int, 4, low=1, high=1000)
    critic: str = choice("full", "full", "student")
    critic_lr: float = value(float, 4e-7, low=0.0, high=1.0, above=True)
    critic_updates: int = value(int, 5, low=1, high=1000)
    ema_decay: float = value(float, 0.0, low=0.0, high=0.99999)

    @property
    def few(self) -> bool:
        """Whether its student samples in few steps without guidance."""
        return self.kind in ("self_forcing", "steps")

    @property
    def whole(self) -> bool:
        """Whether it trains all noise levels, and not an expert's alone."""
        return (self.sigma_min, self.sigma_max) == (0, 1)

    def __post_init__(self):
        super().__post_init__()
        if self.k_min > self.k_max:
            raise ValueError(f"k_min: expected at most k_max ({self.k_max:g}), got {self.k_min:g}")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min: expected less than sigma_max ({self.sigma_max:g}), got "
                f"{self.sigma_min:g}"
            )
        if not self.whole and self.few:
            raise ValueError(
                "sigma_min, sigma_max: expected 0 and 1 where whole runs are sampled (the stages "
                "'self_forcing' and 'steps'): one expert cannot sample them alone"
            )
        if self.warmup >= self.steps:
            raise ValueError(f"warmup: expected fewer than steps ({self.steps}), got {self.warmup}")
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        by = f"a stage {self.kind!r}"
        for key in expected_of(Stage):
            if key not in READ[self.kind]:
                refuse_unread(self, key, by)
        if self.rule == "budget":
            refuse_unread(self, "protection", "the rule 'budget'")
        if self.kind == "steps":
            for key in ("feature", "data"):
                refuse_unread(self.weights, key, by, "weights.")
            if not self.weights.teacher and not self.weights.temporal:
                raise ValueError("weights: expected teacher or temporal above 0, got neither")


@dataclass(frozen=True)
class Data(Checked):
    """What is trained on.

    Args:
        folder: shards that `python -m wantrim.training.encode` wrote, or several folders of them, or
            "toy".
        batch: samples of a step, of all processes together; what they cannot share out evenly is
            made larger.
        drop_text: share of the samples that lose their text.
        negative_share: share of those that get the negative prompt that people sample with, and not
            the empty one.
        image_share: share of the samples that keep their image; below 1 only for task "both".
    """

    folder: str | tuple[str, ...] = value(str, several=True)
    batch: int = value(int, 4, low=1)
    seed: int = value(int, 0, low=0)
    drop_text: float = value(float, 0.1, low=0.0, high=1.0)
    negative_share: float = value(float, 0.5, low=0.0, high=1.0)
    image_share: float = value(float, 1.0, low=0.0, high=1.0)

    @property
    def toy(self) -> bool:
        return self.folder == TOY

    @property
    def folders(self) -> tuple[Path, ...]:
        """Of shards."""
        given = (self.folder,) if isinstance(self.folder, str) else self.folder
        return tuple(Path(one) for one in given)

    @property
    def names(self) -> str:
        """Of the folders, without the paths that lead there."""
        return ", ".join(folder.name for folder in self.folders)


@dataclass(frozen=True)
class Run(Checked):
    """How it runs.

    Args:
        dtype: that is computed in; weights and optimizer stay fp32.
        checkpointing: compute a block again in the backward pass instead of keeping it.
        teacher: shared out over the GPUs, in CPU memory a block at a time, or whole on every GPU.
        optimizer: torch's AdamW, or torchao's with moments in 8 bits.
        keep_state: leave a stage's saved step where it is when the stage is done.
        sample_every: steps between test videos; 0 makes none.
    """

    dtype: str = choice("bf16", "bf16", "fp32")
    checkpointing: bool = value(bool, True)
    teacher: str = choice("sharded", "sharded", "offloaded", "whole")
    optimizer: str = choice("adamw", "adamw", "adamw8bit")
    keep_state: bool = value(bool, False)
    save_every: int = value(int, 500, low=1)
    sample_every: int = value(int, 500, low=0)
    log_every: int = value(int, 10, low=1)
    grad_clip: float = value(float, 1.0, low=0.0, above=True)
    weight_decay: float = value(float, 0.0, low=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
    """A whole recipe.

    Args:
        model: a safetensors file in Wan's original key names, or "tiny".
        profile: what was recorded of this model; empty for the tiny Wan's own.
        task: "both" is one model with 36 input channels, zero for text-to-video.
    """

    name: str = value(str)
    model: str = value(str)
    profile: str = value(str, "")
    task: str = choice(MISSING, "t2v", "i2v", "both")
    data: Data = table(Data)
    stages: tuple[Stage, ...] = table(Stage, many=True)
    run: Run = table(Run, Run())

    def __post_init__(self):
        super().__post_init__()
        for key in ("name", "model"):
            if not getattr(self, key).strip():
                raise ValueError(f"{key}: expected a text, got an empty one")
        if not self.profile and self.model != TINY:
            raise ValueError(
                "profile: expected the file that WanTrim Profile, or `python -m "
                "wantrim.training.record`, writes of this model, got none"
            )
        if self.data.image_share < 1 and self.task != "both":
            raise ValueError(
                f"[data] image_share: expected 1 for task {self.task!r}, got {self.data.image_share:g}"
            )
        first: dict[str, int] = {}
        for number, stage in enumerate(self.stages, 1):
            where = f"[[stage]] number {number}: "
            if stage.kind == "width" and set(first) - {"width"}:
                raise ValueError(f"{where}expected the stage 'width' before all others")
            same = first.setdefault(stage.kind, number)
            for key in ONCE.get(stage.kind, ()):
                value, wanted = getattr(stage, key), getattr(self.stages[same - 1], key)
                if value != wanted:
                    raise ValueError(
                        f"{where}{key}: expected {wanted!r}, as in number {same}, got {value!r}"
                    )
            if stage.content == "clip" and self.task != "i2v":
                raise ValueError(
                    f"{where}content: 'clip' looks at the first image, "
                    f"expected task 'i2v', got {self.task!r}"
                )


# names in the file that are others here
KEYS = {"stages": "stage"}


def load_recipe(path: Path | str, changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: of a file, or the name of a recipe that comes with the package.
        changes: KEY=VALUE pairs to put into it, see `change`.

    Raises:
        ValueError: names the file, the table and the key, what was expected and what came.
    """
    path = Path(path)
    if not path.is_file():
        shipped = SHIPPED / f"{path.name.removesuffix('.toml')}.toml"
        if path.parent != Path() or not shipped.is_file():
            names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
            raise ValueError(
                f"{path}: there is no such recipe. Expected a TOML file or one of {names}"
            )
        path = shipped
    try:
        given = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: expected a recipe in TOML: {error}") from error
    change(given, changes)
    _fill(given)
    return _build(Recipe, given, path.name, "")


def _fill(given: dict) -> None:
    """Put values of a kind and a task where the recipe says nothing: the paper's, or what was tried.

    Few steps are learned under what the last router before them learned under.
    """
    stages, routed = given.get("stage"), {}
    for stage in stages if isinstance(stages, list) else ():
        if not isinstance(stage, dict):
            continue
        kind, own = stage.get("kind"), {}
        if kind == "router":
            routed = {name: stage[name] for name in ("k_min", "k_max", "shift") if name in stage}
        elif kind == "self_forcing":
            own = {"steps": 1200, "lr": 2e-6, **routed}
        elif kind == "steps":
            own = {**_TRIED, **routed}
        if given.get("task") == "i2v" and kind != "self_forcing":
            if kind == "router":
                own["content"] = "clip"
            weights = stage.setdefault("weights", {})
            if isinstance(weights, dict):
                weights.setdefault("temporal", 4.0)
        for name, said in own.items():
            stage.setdefault(name, said)


def _build(cls: type, given: object, file: str, place: str) -> Any:
    """A table of the file as its dataclass; `place` says where it is."""
    where = f"{file}: {place}: " if place else f"{file}: "
    if not isinstance(given, dict):
        raise ValueError(f"{where}expected a table, got {given!r:.80}")
    expected = {KEYS.get(name, name): (name, what) for name, what in expected_of(cls).items()}
    unknown = sorted(set(given) - set(expected))
    if unknown:
        raise ValueError(
            f"{where}{unknown[0]}: there is no such key; expected one of {', '.join(expected)}"
        )
    values = {}
    for key, (name, what) in expected.items():
        default = cls.__dataclass_fields__[name].default
        if key not in given:
            if default is MISSING:
                raise ValueError(f"{where}{key}: expected {what}, got nothing")
            continue
        value = given[key]
        if what.inner is not None:
            inside = f"{place}: {key}" if place else f"[{key}]"
            if what.kind is list:
                value = _build_list(what.inner, value, file, key)
            else:
                value = _build(what.inner, value, file, inside)
        elif what.several and isinstance(value, list):
            value = tuple(value)
        elif what.kind is float and what.fits(value):
            value = float(value)
        values[name] = value
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _build_list(cls: type, given: object, file: str, key: str) -> tuple:
    if not isinstance(given, list) or not given:
        raise ValueError(f"{file}: [[{key}]]: expected one or more tables, got {given!r:.80}")
    return tuple(
        _build(cls, item, file, f"[[{key}]] number {number}")
        for number, item in enumerate(given, 1)
    )
