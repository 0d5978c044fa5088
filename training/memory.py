"""What a recipe needs, computed without running it: `python -m wantrim.training.memory RECIPE`.

Memory of each GPU under FSDP2 (fp32 weights, gradients and AdamW's moments shared out, computed in
bf16, a block gathered at a time), and hours from the FLOPs at a stated utilisation.
"""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..methods.cost import WanShape, block_work, outside_flops
from ..slim.file import list_entries
from ..slim.source import open_source
from ..slim.width import ffn_count, kept_count
from ..toy import CHECKPOINT
from ..toy.text import TEXT_DIM, TEXT_TOKENS
from .encode_cost import describe_encoding
from .objectives import SUBSTEPS
from .parameters import block_parameters, outside_parameters, parameters
from .recipe import TINY, Recipe, Stage, load_recipe
from .shard_files import INDEX, read_index
from .shards import even_batch
from .video_files import Size, parse_size

log = logging.getLogger(__name__)

GIB = 1 << 30
CLIP_TOKENS = 257
# published models, for recipes whose model is not on this machine
KNOWN = {
    "t2v_14b": WanShape(5120, 13824, 40),
    "i2v_14b": WanShape(5120, 13824, 40, in_channels=36, image_tokens=CLIP_TOKENS),
    **dict.fromkeys(("t2v_a14b_high", "t2v_a14b_low"), WanShape(5120, 13824, 40)),
    **dict.fromkeys(("i2v_a14b_high", "i2v_a14b_low"), WanShape(5120, 13824, 40, in_channels=36)),
    "t2v_1_3b": WanShape(1536, 8960, 30),
    "i2v_1_3b": WanShape(1536, 8960, 30, in_channels=36, image_tokens=CLIP_TOKENS),
}
# bytes that autograd keeps of a token in a block computed in bf16, per channel of the residual, of
# self-attention, of cross-attention and of the FFN; measured on diffusers' block
KEPT = (32, 24, 12, 4)
# beside them, per channel of the residual, when its backward pass begins
PASSING = 20
# CUDA, NCCL and what the allocator cannot use, in GiB; an estimate
RESERVED = 4.0
# H100 SXM, bf16 without sparsity
TFLOPS, UTILISATION = 989.0, 0.4
# forwards of the teacher for one of the student; "steps" needs both prompts in each part of a step
TEACHER_CALLS = {"width": 1, "router": 1, "steps": 2 * SUBSTEPS}
# bytes of AdamW's moments for each weight, and of a saved step's
MOMENTS = {"adamw": 8, "adamw8bit": 2}
# Python, torch and CUDA in the machine's memory, in GiB for each process; an estimate
PROCESS = 4.0
ROW_NAMES = {
    "weights": "student, fp32",
    "gradients": "gradients, fp32",
    "moments": "AdamW's moments",
    "average": "averaged weights, fp32",
    "critic": "critic, its gradients and moments",
    "teacher": "teacher",
    "gathered": "gathered blocks",
    "inputs": "kept block inputs",
    "block": "activations computed again",
    "feature": "feature loss",
    "reserved": "CUDA, NCCL, fragments",
}


@dataclass(frozen=True)
class Video:
    """The largest sample: latents and text."""

    frames: int
    height: int
    width: int
    text_tokens: int = 512

    def tokens(self, shape: WanShape) -> int:
        t, h, w = shape.patch
        return (self.frames // t) * (self.height // h) * (self.width // w)


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs.

    Args:
        batch: samples of a step, of all GPUs together.
        parameters: of the student.
        rows: GiB on each GPU, by key of `ROW_NAMES`.
        flops: of a whole step.
        host: GiB of a machine's own memory, with all the GPUs in one.
        disk: GiB of the stage's folder: two saved steps while one is written, student and start.
    """

    stage: Stage
    gpus: int
    batch: int
    parameters: int
    teacher_parameters: int
    rows: dict[str, float]
    flops: float
    host: float
    disk: float

    @property
    def total(self) -> float:
        """GiB on each GPU."""
        return sum(self.rows.values())

    def hours(self, tflops: float = TFLOPS, utilisation: float = UTILISATION) -> float:
        """Of the whole stage."""
        seconds = self.stage.steps * self.flops / (self.gpus * tflops * 1e12 * utilisation)
        return seconds / 3600


def slim_sizes(shape: WanShape, prune_ratio: float) -> tuple[int, int, int]:
    """Heads and FFN channels that stay in a block, on average."""
    heads = kept_count(shape.dim // shape.head_dim, prune_ratio)
    return heads, heads, ffn_count(shape.ffn_dim, prune_ratio)


def kept_bytes(shape: WanShape, width: tuple[int, int, int]) -> int:
    """Bytes that autograd keeps of one token in one block computed in bf16."""
    sizes = (shape.dim, width[0] * shape.head_dim, width[1] * shape.head_dim, width[2])
    return sum(each * size for each, size in zip(KEPT, sizes, strict=True))


def plan_stage(
    recipe: Recipe, stage: Stage, shape: WanShape, video: Video, gpus: int, prune_ratio: float
) -> StagePlan:
    """A stage on so many GPUs; a batch that they cannot share out is made larger.

    Args:
        prune_ratio: of the student in this stage.
    """
    run = recipe.run
    each = even_batch(recipe.data.batch, gpus) // gpus
    low = 2 if run.dtype == "bf16" else 4
    width = slim_sizes(shape, prune_ratio)
    own, full = parameters(shape, width), parameters(shape)
    block, teacher_block = block_parameters(shape, width), block_parameters(shape)
    tokens = video.tokens(shape) * each
    hidden = tokens * shape.dim
    # this block and the next; gradients of one, before and after their sum over the GPUs
    student_gathered = 2 * low * block + (low + 4) * block + low * outside_parameters(shape)
    teacher_gathered = 2 * low * teacher_block
    teacher = {"sharded": low * full / gpus, "whole": low * full}.get(run.teacher, teacher_gathered)
    gathered = student_gathered
    if run.teacher == "sharded":
        gathered = max(student_gathered, teacher_gathered)
    one = tokens * kept_bytes(shape, width) * low / 2
    inputs = shape.num_blocks * hidden * low if run.checkpointing else 0
    passing = PASSING * hidden * low / 2
    activations = one + passing if run.checkpointing else shape.num_blocks * one + passing
    moments, critic = MOMENTS[run.optimizer], 0
    critic_width = width if stage.critic == "student" else slim_sizes(shape, 0.0)
    critic_parameters = parameters(shape, critic_width)
    if stage.kind == "self_forcing":
        # weights and gradients in fp32; both models' graphs wait for one backward pass
        critic = (8 + moments) * critic_parameters / gpus
        gathered += low * block_parameters(shape, critic_width)
        its = tokens * kept_bytes(shape, critic_width) * low / 2
        inputs *= 2
        activations = max(activations, its + passing)
        if not run.checkpointing:
            activations = shape.num_blocks * (one + its) + passing
    compares = stage.weights.feature and not stage.few
    looked_at = min(stage.feature_blocks, shape.num_blocks) if compares else 0
    sizes = {
        "weights": 4 * own / gpus,
        "gradients": 4 * own / gpus,
        "moments": moments * own / gpus,
        "average": 4 * own / gpus if stage.ema_decay else 0,
        "critic": critic,
        "teacher": teacher,
        "gathered": gathered,
        "inputs": inputs,
        "block": activations,
        # the teacher's outputs, and both in fp32
        "feature": looked_at * hidden * (low + 8),
        "reserved": RESERVED * GIB,
    }
    rows = {name: size / GIB for name, size in sizes.items()}
    flops = each * gpus * _sample_flops(stage, shape, video, width, run.checkpointing)
    # the first process gathers the student to write it
    host = PROCESS * gpus + (4 * own + (low * full if run.teacher == "offloaded" else 0)) / GIB
    trained = own + (critic_parameters if stage.kind == "self_forcing" else 0)
    state = (4 + moments) * trained + (4 * own if stage.ema_decay else 0)
    disk = (2 * state + 2 * 2 * own) / GIB
    return StagePlan(stage, gpus, each * gpus, own, full, rows, flops, host, disk)


def _sample_flops(
    stage: Stage, shape: WanShape, video: Video, width: tuple[int, int, int], again: bool
) -> float:
    tokens = video.tokens(shape)
    # blocks that a router leaves out are computed for its gradient
    blocks = shape.num_blocks * block_work(shape, tokens, width=width).flops
    # forward, twice that backward, and forward again where nothing was kept
    times = 4 if again else 3
    outside = outside_flops(shape, tokens)
    whole = shape.num_blocks * block_work(shape, tokens).flops
    critic = blocks if stage.critic == "student" else whole
    teacher = whole + outside
    if stage.kind != "self_forcing":
        return times * blocks + 3 * outside + TEACHER_CALLS[stage.kind] * teacher
    # a rollout ends at any of its steps; the critic learns each time, the student in its turn, for
    # which critic and guided teacher are asked
    rollout = (stage.sampler_steps + 1) / 2 * (blocks + outside)
    turn = (times - 1) * blocks + 2 * outside + critic + outside + 2 * teacher
    return rollout + times * critic + 3 * outside + turn / stage.critic_updates


def plan_recipe(recipe: Recipe, shape: WanShape, video: Video, gpus: int) -> list[StagePlan]:
    """Every stage; from the stage "width" on the student is slim."""
    plans, prune_ratio = [], 0.0
    for stage in recipe.stages:
        if stage.kind == "width":
            prune_ratio = stage.prune_ratio
        plans.append(plan_stage(recipe, stage, shape, video, gpus, prune_ratio))
    return plans


def model_shape(recipe: Recipe) -> WanShape:
    """Sizes of a recipe's model, or of the published one that the recipe is named after.

    Raises:
        ValueError: neither is there.
    """
    path = CHECKPOINT if recipe.model == TINY else Path(recipe.model)
    if path.is_file():
        clip = any("img_emb." in entry.name for entry in list_entries(path)[0])
        model = open_source(path).model
        shape = WanShape(
            model.dim, model.ffn_dim, model.num_blocks, model.in_channels, model.out_channels,
            image_tokens=CLIP_TOKENS if clip else 0, head_dim=model.head_dim,
        )  # fmt: skip
        return replace(shape, text_dim=TEXT_DIM) if recipe.model == TINY else shape
    if recipe.name not in KNOWN:
        raise ValueError(
            f"model: {recipe.model} is not there. Expected a checkpoint, or a "
            f"recipe with the name {', '.join(KNOWN)}"
        )
    log.info("%s is not there: planned with the sizes of %s", recipe.model, recipe.name)
    return KNOWN[recipe.name]


def largest_video(recipe: Recipe, size: Size) -> Video:
    """The largest sample of the recipe's data, or one of this size when it is not there."""
    if recipe.data.toy:
        return Video(5, 12, 12, TEXT_TOKENS)
    folders = recipe.data.folders
    if not all((folder / INDEX).is_file() for folder in folders):
        return Video((size.pixel_frames - 1) // 4 + 1, size.height // 8, size.width // 8)
    indexes = [read_index(folder) for folder in folders]
    shards = [shard for index in indexes for shard in index.shards]
    found = [shapes["latents"][1:] for shard in shards for shapes in shard.shapes]
    if not found:
        raise ValueError(f"{recipe.data.names}: expected training samples, got an empty index")
    return Video(*max(found, key=math.prod), indexes[0].text_tokens)


def describe(
    plans: list[list[StagePlan]], gpu_gb: float, tflops: float, utilisation: float
) -> list[Table]:
    """A table for every stage, with a column for every number of GPUs."""
    tables = []
    for number, same in enumerate(zip(*plans, strict=True), 1):
        first = same[0]
        table = Table(
            title=f"{number}. {first.stage.kind}: {first.parameters / 1e9:.2f} of "
            f"{first.teacher_parameters / 1e9:.2f} billion weights, {first.stage.steps} steps"
        )
        table.add_column("GiB on each GPU")
        for plan in same:
            table.add_column(f"{plan.gpus} GPUs, batch {plan.batch}", justify="right")
        for key, name in ROW_NAMES.items():
            table.add_row(name, *(f"{plan.rows[key]:.1f}" for plan in same))
        table.add_section()
        fits = (("fits" if p.total <= gpu_gb else "DOES NOT FIT") for p in same)
        said = (f"{p.total:.1f} ({fit})" for p, fit in zip(same, fits, strict=True))
        table.add_row(f"together, of {gpu_gb:g}", *said)
        hours = (f"{p.hours(tflops, utilisation):.1f}" for p in same)
        table.add_row(f"hours at {utilisation:.0%} of {tflops:g} TFLOPS", *hours)
        table.add_row("machine's memory", *(f"{p.host:.0f}" for p in same))
        table.add_row("disk", *(f"{p.disk:.0f}" for p in same))
        tables.append(table)
    return tables


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="wantrim.training.memory", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("recipe", help="TOML file, or the name of one that comes with WanTrim")
    add("--gpus", type=int, nargs="+", default=[4, 8], help="default 4 and 8")
    add("--gpu-gb", type=float, default=80.0, help="memory of each, default 80")
    add("--size", type=parse_size, default=(832, 480), help="when the data is not there yet")
    add("--pixel-frames", type=int, default=81)
    add("--videos", type=int, default=30000, help="to encode, default 30000")
    add("--tflops", type=float, default=TFLOPS, help="of a GPU; default an H100's")
    add("--utilisation", type=float, default=UTILISATION, help="default 0.4")
    add("--set", nargs="+", default=(), metavar="KEY=VALUE", help="change the recipe")
    args = parser.parse_args(arguments)
    if min(args.gpus) < 1 or args.tflops <= 0 or not 0 < args.utilisation <= 1:
        parser.error("expected GPUs and TFLOPS above 0 and a utilisation of 0 to 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        recipe, size = load_recipe(args.recipe, args.set), Size(*args.size, args.pixel_frames)
        shape = model_shape(recipe)
        video = largest_video(recipe, size)
        shape = replace(shape, text_tokens=video.text_tokens)
        plans = [plan_recipe(recipe, shape, video, gpus) for gpus in args.gpus]
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 1
    console = Console()
    console.print(f"{recipe.name}: {video.tokens(shape):,} tokens a video")
    if not recipe.data.toy:
        pixels = (*args.size, args.pixel_frames)
        console.print(describe_encoding(args.videos, pixels, recipe.task, args.gpus, args.tflops))
    for table in describe(plans, args.gpu_gb, args.tflops, args.utilisation):
        console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
