"""Distils a tiny Wan for few steps into a LoRA: `python -m wantrim.training.four_steps`.

Progressive distillation with guidance folded in: the stage "steps", on low-rank factors
instead of the weights. One step of the student has to end where five guided steps of the teacher
end, so that four steps without guidance stand for twenty with it. The file goes into ComfyUI's
stock LoRA loader at strength 1; sample with as many steps, guidance (cfg) 1 and the same shift.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from ..hosts.diffusers.lora import add_low_rank, save_lora
from ..hosts.diffusers.weights import load_original
from ..toy.worlds import SECOND, WORLDS
from .began import check_same, contents
from .checkpoints import State
from .draws import Draws
from .log import StageLog
from .objectives import SUBSTEPS, Pair, few_steps
from .parallel import World, world
from .recipe import Stage, Weights
from .toy_data import ToyDataset
from .trainer import learning_rate

log = logging.getLogger(__name__)
METHOD = "progressive distillation with guidance folded in (arXiv 2202.00512, 2210.03142)"


@dataclass(frozen=True)
class FewSteps:
    """What is distilled; written into the header of the file.

    Args:
        canvases: (share of the steps until which, side of the videos in pixels), ascending; the
            rest is as large as the world's own.
    """

    world: str = SECOND.name
    steps: int = 700
    batch: int = 8
    seed: int = 0
    lr: float = 1e-3
    warmup: int = 20
    rank: int = 32
    sampler_steps: int = 4
    guidance: float = 5.0
    shift: float = 3.0
    image_share: float = 0.3
    canvases: tuple[tuple[float, int], ...] = ((0.4, 96), (0.75, 128))

    def side(self, step: int) -> int | None:
        """Side of the videos of a step, in pixels; None is the world's own."""
        return next((s for until, s in self.canvases if step < until * self.steps), None)

    def stage(self) -> Stage:
        """As the stage of a recipe whose loss is the distance to the teacher's velocity alone."""
        return Stage(
            kind="steps",
            steps=self.steps,
            lr=self.lr,
            warmup=self.warmup,
            weights=Weights(teacher=1.0, temporal=0.0),
            shift=self.shift,
            guidance=self.guidance,
            sampler_steps=self.sampler_steps,
        )


def distil(
    recipe: FewSteps,
    weights: Path,
    out: Path,
    here: World,
    *,
    every: int = 100,
    compile_blocks: bool = False,
) -> Path:
    """Train from where `out` stands to `recipe.steps`; returns the LoRA file.

    Args:
        weights: of the teacher; the student begins with them.
        every: steps between saves.

    Raises:
        ValueError: `out` was begun with another recipe or teacher, or the weights cannot be read.
    """
    check_same(out, {**vars(recipe), "teacher": contents(weights)}, here)
    stage = recipe.stage()
    teacher, student = load_original(weights), load_original(weights)
    teacher.requires_grad_(False).to(here.device)
    student.train().to(here.device)
    factors = torch.nn.ParameterList(add_low_rank(student, recipe.rank, recipe.seed))
    if compile_blocks:
        # ten of a step's thirteen forwards; the student's blocks would each be a graph of their own
        for block in teacher.blocks:
            block.compile(dynamic=False)
    optimizer = torch.optim.AdamW(factors, recipe.lr, weight_decay=0.0)
    state = State(out / "state", here, factors, optimizer, None)
    step = state.load()
    data = ToyDataset(recipe.batch, recipe.seed, 0.0, recipe.image_share, WORLDS[recipe.world])
    pair = Pair(student, teacher, None, None, None, data.negative_text.to(here.device))
    writer, path = StageLog(out, step), out / f"{weights.stem}_{recipe.sampler_steps}_steps_lora"
    path = path.with_suffix(".safetensors")
    columns = (
        *Progress.get_default_columns()[:3],
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("distilling", total=recipe.steps, completed=step, said="")
        while step < recipe.steps:
            begun = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * learning_rate(stage, step)
            data.side = recipe.side(step)
            batch = data.batch(step).to(here.device, torch.float32)
            terms = few_steps(pair, stage, batch, Draws(recipe.seed, 1, step))
            optimizer.zero_grad()
            terms["loss"].backward()
            torch.nn.utils.clip_grad_norm_(factors, 1.0)
            optimizer.step()
            step += 1
            loss = terms["loss"].item()
            writer.write(
                step,
                {
                    "loss": loss,
                    "side": data.side or data.world.side,
                    "seconds": time.perf_counter() - begun,
                },
            )
            progress.update(task, completed=step, said=f"loss {loss:.4f}")
            if step % every == 0 or step == recipe.steps:
                # first: what is behind the last saved step is never made again
                save_lora(path, student, _header(recipe, weights, step))
                state.save(step)
                log.info("step %d: loss %.4f", step, loss)
    writer.close()
    return path


def _header(recipe: FewSteps, weights: Path, step: int) -> dict[str, str]:
    made_by = {
        "method": METHOD,
        "teacher": weights.name,
        "teacher_steps": recipe.sampler_steps * SUBSTEPS,
        "step": step,
        "finished": step >= recipe.steps,
        "recipe": vars(recipe),
    }
    return {"wantrim": json.dumps(made_by)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=list(WORLDS), default=SECOND.name)
    parser.add_argument("--weights", type=Path, help="the teacher; default: the world's tiny Wan")
    parser.add_argument("--out", type=Path, default=Path("out/four_steps"))
    parser.add_argument("--steps", type=int, default=FewSteps.steps, help="of the optimizer")
    parser.add_argument("--batch", type=int, default=FewSteps.batch)
    parser.add_argument("--rank", type=int, default=FewSteps.rank)
    parser.add_argument("--lr", type=float, default=FewSteps.lr)
    parser.add_argument("--guidance", type=float, default=FewSteps.guidance, help="of the teacher")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="slower, starts at once")
    parser.add_argument("--every", type=int, default=100, help="steps between saves")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    recipe = FewSteps(
        world=args.world,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        warmup=min(FewSteps.warmup, args.steps - 1),
        rank=args.rank,
        guidance=args.guidance,
    )
    weights = args.weights or WORLDS[args.world].checkpoint
    options = {"every": args.every, "compile_blocks": not args.no_compile}
    try:
        with world(args.device) as here:
            path = distil(recipe, weights, args.out, here, **options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last saved step")
    log.info("wrote %s", path)


if __name__ == "__main__":
    main()
