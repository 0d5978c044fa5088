"""A recipe's stages, one after the other. The loop itself is `run_stage`."""

from __future__ import annotations

import gc
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..slim.file import read_header
from ..slim.router import load_router
from ..slim.source import Source
from .began import STUDENT, check_same, contents, read_began
from .log import StageLog
from .models import Origin, full_model, looks_through_clip, open_origin, start_files
from .parallel import DTYPES, World, shard
from .recipe import Recipe, Stage
from .shards import Batch, ShardDataset, even_batch
from .toy_data import ToyDataset
from .trainer import Trainer
from .videos import draw_videos, write_videos

log = logging.getLogger(__name__)


def open_data(recipe: Recipe, world: World) -> ToyDataset | ShardDataset:
    """The recipe's samples; the first process checks the files before the others look."""
    d = recipe.data
    if d.toy:
        return ToyDataset(d.batch, d.seed, d.drop_text, d.image_share)
    if not world.first:
        world.wait()
    data = ShardDataset(
        d.folders, d.batch, d.seed, d.drop_text, d.image_share, negative_share=d.negative_share
    )
    if world.first:
        world.wait()
    return data


def train(
    recipe: Recipe,
    out: Path,
    world: World,
    *,
    start: Path | None = None,
    kinds: Sequence[str] = (),
) -> Path:
    """Run the stages that are not done yet; returns the folder of the last one.

    Every stage has a folder in `out` with its state, its log and, when it is done, its student,
    which the next stage begins with.

    Args:
        start: a stage's folder or a slim file to begin with; None is the stage before the first of
            these where it is done, else the full model is cut.
        kinds: kinds or numbers of the stages to run; empty runs all.

    Raises:
        ValueError: a file does not fit, or there is no such stage.
    """
    chosen = [
        (number, stage)
        for number, stage in enumerate(recipe.stages, 1)
        if not kinds or stage.kind in kinds or str(number) in kinds
    ]
    there = [stage.kind for stage in recipe.stages]
    for kind in kinds:
        if kind not in there and kind not in map(str, range(1, len(there) + 1)):
            raise ValueError(
                f"stages: expected some of {', '.join(there)} or 1 to {len(there)}, got {kind!r}"
            )
    folders = {number: out / f"{number}-{stage.kind}" for number, stage in chosen}
    asked, recipe = recipe, shared_out(recipe, world, list(folders.values()))
    data, origin = open_data(recipe, world), open_origin(recipe)
    check_fit(data, origin.source, world)
    start = start or find_start(recipe, chosen[0][0], out, origin, world)
    check_start(start, recipe, chosen[0][1], origin)

    def is_done(number: int, begins: Path) -> bool:
        """Refuses a stage that began with something else."""
        done = (folders[number] / STUDENT).exists()
        now = beginning(recipe, asked, number, origin, data.fingerprint, begins)
        check_same(folders[number], now, world, done)
        return done

    # what is wrong is said before a model is loaded
    begins = start
    for number, folder in folders.items():
        if not is_done(number, begins):
            break
        begins = folder
    teacher = load_teacher(origin.source, recipe, world)
    for number, stage in chosen:
        folder = folders[number]
        if not is_done(number, start):
            trainer = Trainer(
                recipe, stage, number, world, teacher, data.negative_text, start, folder,
                origin.source,
            )  # fmt: skip
            try:
                run_stage(trainer, data)
            finally:
                trainer.close()
                # before the next stage's weights come
                del trainer
                gc.collect()
        elif world.first:
            # it was killed behind its last step
            if not recipe.run.keep_state:
                shutil.rmtree(folder / "state", ignore_errors=True)
            log.info("%s is done", folder.name)
        start = folder
    return start


def find_start(recipe: Recipe, first: int, out: Path, origin: Origin, world: World) -> Path:
    """The last stage before the first of a run that is done, else the full model, cut."""
    before = list(enumerate(recipe.stages, 1))[: first - 1]
    for folder in reversed([out / f"{number}-{stage.kind}" for number, stage in before]):
        if (folder / STUDENT).exists():
            return folder
    start = out / "start.safetensors"
    width = next((stage for stage in recipe.stages if stage.kind == "width"), None)
    if width is None and world.first:
        log.info('the recipe has no stage "width": the student keeps all heads and channels')
    if world.first and not origin.is_cut(start, width):
        origin.cut(start, width)
    world.wait()
    return start


def shared_out(recipe: Recipe, world: World, folders: Sequence[Path] = ()) -> Recipe:
    """The recipe with a batch that the processes can share out, which is said where it changes.

    Args:
        folders: of the stages; the batch that the last of them began with stays where it can.
    """
    asked = recipe.data.batch
    batch = even_batch(asked, world.size)
    for folder in folders:
        said = read_began(folder) or {}
        own, before = said.get("data", {}).get("batch"), said.get("batch")
        if own == asked and before and before % world.size == 0:
            batch = before
    if batch != asked and world.first:
        log.info("a batch of %d becomes %d for %d processes", asked, batch, world.size)
    return replace(recipe, data=replace(recipe.data, batch=batch))


def load_teacher(source: Source, recipe: Recipe, world: World) -> torch.nn.Module:
    """The frozen full model, where the recipe wants it to be."""
    dtype = DTYPES[recipe.run.dtype]
    teacher = full_model(source, dtype)
    if recipe.run.teacher == "offloaded":
        shard(teacher.model, world.mesh, dtype, offload=True)
        return teacher.fill("cpu", tables=world.device)
    if recipe.run.teacher == "sharded" and world.size > 1:
        shard(teacher.model, world.mesh, dtype)
    return teacher.fill(world.device)


def check_fit(data: ToyDataset | ShardDataset, source: Source, world: World) -> None:
    """Refuse samples that the model cannot take.

    Raises:
        ValueError: other channels, or CLIP's view of an image where the model wants none or one.
    """
    one = data.batch(0, world.rank, world.size)
    parts = [one.latents] + ([] if one.condition is None else [one.condition])
    came, expected = sum(part.shape[1] for part in parts), source.model.in_channels
    if came != expected:
        raise ValueError(
            f"data: expected samples of {expected} channels for this model, got {came}. Encode them "
            "for its task (--task t2v or i2v)."
        )
    wants = looks_through_clip(source)
    if wants != (one.clip is not None):
        raise ValueError(
            f"data: expected samples {'with' if wants else 'without'} CLIP's view of the image for "
            "this model; encode them with a diffusers folder of the same Wan"
        )


def check_start(start: Path, recipe: Recipe, stage: Stage, origin: Origin) -> None:
    """Refuse a student or a router that the first stage cannot begin with.

    Raises:
        ValueError: the student is none or another model's, or the router looks at something else.
    """
    file, router = start_files(start)
    # by its sizes: training moved its sample, and what was cut is its own
    student, full = (
        replace(model, sample=(), width=None)
        for model in (read_header(file).model, origin.source.model)
    )
    if differs := full.differs(student):
        raise ValueError(f"{file.name}: expected a student of this recipe's model: {differs}")
    if router is not None and stage.kind == "router":
        kind = load_router(router).kind
        if kind != stage.content:
            raise ValueError(
                f"content: expected {kind!r}, as the router in {router.parent.name} has it, got "
                f"{stage.content!r}. Begin with a student without a router, or change the recipe."
            )


def beginning(
    recipe: Recipe, asked: Recipe, number: int, origin: Origin, data: str, start: Path
) -> dict:
    """What decides what a stage makes, by contents: where files lie does not.

    Args:
        asked: the recipe with its own batch.
        data: fingerprint of the samples.
    """
    whole, run = asdict(asked), asdict(recipe.run)
    samples = {name: value for name, value in whole["data"].items() if name != "folder"}
    # the rest of it says how a step is computed, not what
    said = ("dtype", "grad_clip", "weight_decay", "optimizer")
    file, router = start_files(start)
    return {
        "task": recipe.task,
        **origin.contents,
        "data": samples | {"samples": data},
        "batch": recipe.data.batch,
        "run": {name: run[name] for name in said},
        "stages": whole["stages"][:number],
        "start": {"student": contents(file), "router": router and contents(router)},
    }


def run_stage(trainer: Trainer, data: ToyDataset | ShardDataset) -> None:
    """Train to the last step, saving on the way, and write the student."""
    stage, run, world = trainer.stage, trainer.recipe.run, trainer.world
    folder, model = trainer.folder, trainer.header.model
    writer = StageLog(folder, trainer.step) if world.first else None
    every = run.sample_every if stage.whole else 0
    if every != run.sample_every and world.first:
        log.info("no test videos: an expert alone cannot sample whole runs")
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, disable=not world.first) as progress:
        task = progress.add_task(
            f"stage {trainer.number} ({stage.kind})",
            total=stage.steps,
            completed=trainer.step,
            said="",
        )
        began, before = time.perf_counter(), trainer.step
        for batch in batches(data, range(trainer.step, stage.steps), world):
            terms = trainer.train_step(batch)
            step, last = trainer.step, trainer.step == stage.steps
            if step % run.log_every == 0 or last:
                values = {name: float(value) for name, value in terms.items()}
                now = time.perf_counter()
                speed = (step - before) * trainer.recipe.data.batch / (now - began)
                values |= {"samples_per_second": speed, "skipped_shards": len(data.skipped)}
                began, before = now, step
                if writer is not None:
                    writer.write(step, values)
                progress.update(task, said=f"loss {values['loss']:.4f}, {speed:.1f} samples/s")
            progress.update(task, completed=step)
            if step % run.save_every == 0 and not last:
                trainer.state.save(step)
            if last:
                # a video that fails must not cost the stage
                trainer.write(trainer.recipe.data.names)
                if not run.keep_state:
                    trainer.state.remove()
            if every and (step % every == 0 or last):
                batch = batch.to(world.device)
                with trainer.averaged(), trainer.cast():
                    latents = draw_videos(trainer.pair, trainer.recipe, stage, batch, model, step)
                if world.first:
                    write_videos(folder / "videos", latents, trainer.recipe, step)
    if writer is not None:
        writer.close()


def batches(data: ToyDataset | ShardDataset, steps: range, world: World) -> Iterator[Batch]:
    """This process's batches, each made while the one before is trained on."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for step in steps:
            now = ahead or pool.submit(data.batch, step, world.rank, world.size)
            following = step + steps.step
            ahead = None
            if following in steps:
                ahead = pool.submit(data.batch, following, world.rank, world.size)
            yield now.result()
