"""A recipe's stages, one after the other. The loop itself is `run_stage`."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .log import StageLog
from .models import Origin, open_origin
from .parallel import DTYPES, World, shard
from .recipe import Recipe
from .shard_files import write_json
from .shards import Batch, ShardDataset, even_batch
from .toy_data import ToyDataset
from .trainer import Trainer
from .videos import draw_videos, write_videos

log = logging.getLogger(__name__)
STUDENT = "student.safetensors"


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
    recipe = shared_out(recipe, world)
    data, origin = open_data(recipe, world), open_origin(recipe)
    done = [out / f"{number}-{stage.kind}" for number, stage in enumerate(recipe.stages, 1)]
    done = [folder for folder in done[: chosen[0][0] - 1] if (folder / STUDENT).exists()]
    if start is None and done:
        start = done[-1]
    check_fit(data, origin, world)
    if start is None:
        start = out / "start.safetensors"
        width = next((stage for stage in recipe.stages if stage.kind == "width"), None)
        if width is None and world.first:
            log.info('the recipe has no stage "width": the student keeps all heads and channels')
        if world.first and not start.exists():
            origin.cut(start, width)
        world.wait()
    teacher = load_teacher(origin, recipe, world)
    for number, stage in chosen:
        folder = out / f"{number}-{stage.kind}"
        check_same(folder, recipe, number, data.fingerprint, world)
        if not (folder / STUDENT).exists():
            trainer = Trainer(
                recipe, stage, number, world, teacher, data.negative_text, start, folder, origin
            )
            try:
                run_stage(trainer, data)
            finally:
                trainer.close()
                # before the next stage's weights come
                del trainer
                gc.collect()
        elif world.first:
            log.info("%s is done", folder.name)
        start = folder
    return start


def shared_out(recipe: Recipe, world: World) -> Recipe:
    """The recipe with a batch that the processes can share out, which is said where it changes."""
    batch = even_batch(recipe.data.batch, world.size)
    if batch != recipe.data.batch and world.first:
        log.info(
            "a batch of %d cannot be shared out over %d processes: it becomes %d",
            recipe.data.batch,
            world.size,
            batch,
        )
    return replace(recipe, data=replace(recipe.data, batch=batch))


def load_teacher(origin: Origin, recipe: Recipe, world: World) -> torch.nn.Module:
    """The frozen full model, where the recipe wants it to be."""
    dtype = DTYPES[recipe.run.dtype]
    teacher = origin.teacher(dtype)
    if recipe.run.teacher == "offloaded":
        shard(teacher.model, world.mesh, dtype, offload=True)
        return teacher.fill("cpu", tables=world.device)
    if recipe.run.teacher == "sharded" and world.size > 1:
        shard(teacher.model, world.mesh, dtype)
    return teacher.fill(world.device)


def check_fit(data: ToyDataset | ShardDataset, origin: Origin, world: World) -> None:
    """Refuse samples that the model cannot take.

    Raises:
        ValueError: other channels, or CLIP's view of an image where the model wants none or one.
    """
    one = data.batch(0, world.rank, world.size)
    parts = [one.latents] + ([] if one.condition is None else [one.condition])
    came, expected = sum(part.shape[1] for part in parts), origin.source.model.in_channels
    if came != expected:
        raise ValueError(
            f"data: expected samples of {expected} channels for this model, got {came}. Encode them "
            "for its task (--task t2v or i2v)."
        )
    wants = any("img_emb." in name for name in origin.source.entries)
    if wants != (one.clip is not None):
        raise ValueError(
            f"data: expected samples {'with' if wants else 'without'} CLIP's view of the image for "
            "this model; encode them with a diffusers folder of the same Wan"
        )


def check_same(folder: Path, recipe: Recipe, number: int, data: str, world: World) -> None:
    """Refuse to go on with a stage by another recipe or other data than it began with.

    Raises:
        ValueError: names what differs.
    """
    stages = [asdict(stage) for stage in recipe.stages[:number]]
    whole, run = asdict(recipe), asdict(recipe.run)
    now = {name: whole[name] for name in ("model", "profile", "task", "data")}
    # the rest of it says how a step is computed, not what
    said = ("dtype", "grad_clip", "weight_decay", "optimizer")
    now["run"] = {name: run[name] for name in said}
    now = json.loads(json.dumps(now | {"stages": stages, "samples": data}))
    path = folder / "recipe.json"
    world.wait()
    if not path.exists():
        if world.first:
            write_json(path, now)
        world.wait()
        return
    world.wait()
    before, after = _flat(json.loads(path.read_text("utf-8"))), _flat(now)
    # a table that was not there has other names than the one that is
    for name in dict.fromkeys((*before, *after)):
        was, became = before.get(name), after.get(name)
        if became != was:
            raise ValueError(
                f"{folder.name}: it began with {name} = {was!r}, and this is {became!r}. Choose "
                "another --out (and --start, to begin with what is there)."
            )


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Leaves of nested tables and lists by their dotted names."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value, 1)
    found = {}
    for key, inner in items:
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found


def run_stage(trainer: Trainer, data: ToyDataset | ShardDataset) -> None:
    """Train to the last step, saving on the way, and write the student."""
    stage, run, world = trainer.stage, trainer.recipe.run, trainer.world
    folder, model = trainer.folder, trainer.header.model
    writer = StageLog(folder, trainer.step) if world.first else None
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
            if run.sample_every and (step % run.sample_every == 0 or last):
                batch = batch.to(world.device)
                with trainer.averaged(), trainer.cast():
                    latents = draw_videos(trainer.pair, trainer.recipe, stage, batch, model, step)
                if world.first:
                    write_videos(folder / "videos", latents, trainer.recipe, step)
    if writer is not None:
        writer.close()
    if not run.keep_state:
        trainer.state.remove()


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
