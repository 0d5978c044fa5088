"""What each way of cutting compute costs in quality: `python -m wantrim.benchmarks.quality`.

Every case is one row of benchmarks/results/quality.csv. Finished cases are kept in --work and not
run again, so an interrupted run can be taken up; --fresh forgets them. --full runs every case of
the registry (cases.py) on the tiny Wan of --world; without it a fast subset runs. Rows go into the
repository only from a clean commit and from a tiny Wan that is trained to its end.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch

from ..hosts.diffusers.slim import load_slim
from ..solve.dial import Run
from ..toy.worlds import FIRST, SECOND, WORLDS
from .bench import Bench, dense_path, read_result, sampling_of, write_result
from .cases import (
    DEFAULT,
    DENSE,
    DIALLED,
    MANY_STEPS,
    PAPER,
    POINTS,
    STUDY_TARGET,
    Case,
    Point,
    cases_at,
    solve_plan,
)
from .head_cases import head_cases
from .pairs import outdated, paired_rows
from .subjects import (
    Subject,
    read_prompts,
    real_subject,
    toy_subject,
)
from .table import COLUMNS, KEY, RESULTS, UNKNOWN, commit, merge_rows, read_rows

log = logging.getLogger(__name__)
# prompts and seeds of each world; the second one's full run takes 6 hours of one core
FULL = {"1": (32, 2), "2": (12, 1)}
# bytes of a file that is not read whole, and of what is read of it
LARGE, HEADER = 64 << 20, 1 << 20
# where rows go that are not the whole table's
ASIDE = Path("out/results")
# the fast subset: prompts, seeds and methods, in 4 and 20 steps at the study's target
FAST = {
    "1": (3, 1, ("fewer_steps", DEFAULT, PAPER, "easycache", "sea_cache", "zeus_like")),
    "2": (3, 1, ("fewer_steps", DEFAULT, "easycache")),
}


def selected(args: argparse.Namespace, point: Point) -> list[Case]:
    """The cases to run: those asked for by method or target, all, or the fast subset."""
    cases = cases_at(point.steps)
    # the first world's model has few roles
    if args.world == SECOND.name or args.only:
        cases += head_cases(point.steps)
    if args.targets:
        cases = [case for case in cases if case.target in args.targets]
    if args.only:
        cases = [case for case in cases if case.method in args.only]
    elif not (args.full or args.targets):
        methods = FAST[args.world][2]
        cases = [c for c in cases if c.method in methods and c.target == STUDY_TARGET]
    return [DENSE, *cases]


def result_path(args: argparse.Namespace, task: str, point: Point, case: Case) -> Path:
    """Where a finished case is kept; what the dial solves by its plan, which changes with the solver."""
    key, subject = case.key, load_subject(args, point)
    if case.method in DIALLED:
        plan = solve_plan(case, _sampling(subject, task, point))
        key += f"_{hashlib.sha256(repr(plan.shares).encode()).hexdigest()[:8]}"
    model = Path(args.weights).name if args.weights else subject.name
    sampling = f"{point.steps}_{point.guidance:g}_{point.shift:g}"
    run = f"{model}_{task}_{sampling}_{args.prompts}x{args.seeds}"
    return Path(args.work) / f"{run}_{args.digest}__{key}.json"


def digest(args: argparse.Namespace) -> str:
    """Stands for what a finished case was made of: weights, prompts, images, size and dtype."""
    files = [file for file in (args.components, args.prompt_file, *args.images, args.slim) if file]
    if args.weights:
        files.append(args.weights)
    else:
        world = WORLDS[args.world]
        lora = world.four_step_lora
        files += [world.checkpoint, world.vae_file, *([lora] if lora.exists() else [])]
    made_of = [args.width, args.height, args.pixel_frames, args.dtype]
    for path in map(Path, files):
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        made_of += [(p.name, *_told(p)) for p in inside]
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]


def _told(path: Path) -> tuple:
    """What a file holds; of large weights their header, size and time, for reading takes minutes."""
    about, large = path.stat(), path.stat().st_size > LARGE
    with path.open("rb") as file:
        held = hashlib.sha256(file.read(HEADER if large else -1)).hexdigest()
    return (held, about.st_size, about.st_mtime_ns) if large else (held,)


def refuse_rows(results: Path, world: str | None) -> None:
    """Stop before rows are made that must not be kept.

    Args:
        results: folder of the table; only the repository's own is guarded.
        world: whose tiny Wan the rows are of; None for real weights.

    Raises:
        SystemExit: more than rows was changed since the commit, or the tiny Wan is in training.
    """
    if Path(results).resolve() != RESULTS.resolve():
        return
    if commit() == UNKNOWN or commit().endswith("-dirty"):
        raise SystemExit("rows come from a clean commit: commit first, or give --results FOLDER")
    if world is not None and not WORLDS[world].finished:
        raise SystemExit(f"tiny Wan of world {world} is in training: give --results FOLDER")


@lru_cache(maxsize=2)
def _toy(world: str, device: str, few: bool, slim: Path | None) -> Subject:
    lora = WORLDS[world].four_step_lora
    found = toy_subject(1, device, WORLDS[world], lora if few and lora.exists() else None)
    if slim is None:
        return found
    return replace(found, name=f"{found.name}_slim", model=load_slim(slim).to(device))


@lru_cache(maxsize=1)
def _subject(weights, components, prompts, images, width, height, pixel_frames, device, dtype):
    return real_subject(
        Path(weights),
        components=Path(components) if components else None,
        prompts=read_prompts(prompts),
        images=[Path(image) for image in images],
        width=width,
        height=height,
        pixel_frames=pixel_frames,
        device=device,
        dtype=getattr(torch, dtype),
    )


def load_subject(args: argparse.Namespace, point: Point | None = None) -> Subject:
    """The model to measure, loaded once a process; at 4 steps a tiny Wan with its LoRA, if any."""
    a = args
    if a.weights is None:
        return _toy(a.world, a.device, point is not None and point.steps == 4, a.slim)
    return _subject(
        a.weights, a.components, a.prompt_file, tuple(a.images), a.width, a.height,
        a.pixel_frames, a.device, a.dtype,
    )  # fmt: skip


@lru_cache(maxsize=8)
def _sampling(subject: Subject, task: str, point: Point) -> Run:
    return sampling_of(subject, point, subject.items(task, 1, 1)[0])


@lru_cache(maxsize=8)
def _bench(
    kind: type[Bench],
    subject: Subject,
    task: str,
    point: Point,
    prompts: int,
    seeds: int,
    work: str,
    made_of: str,
) -> Bench:
    return kind(subject, task, point, prompts, seeds, Path(work), made_of)


def run_case(args: argparse.Namespace, task: str, point: Point, case: Case) -> dict:
    """Run one case and keep its result."""
    torch.set_num_threads(args.threads)
    work, subject = str(args.work), load_subject(args, point)
    bench = _bench(args.bench, subject, task, point, args.prompts, args.seeds, work, args.digest)
    result = bench.run(case)
    if "row" in result:
        result["row"] |= {
            "size": real_size(args), "commit": args.commit, "torch": torch.__version__,
            "device": _device(args),
        }  # fmt: skip
    write_result(result_path(args, task, point, case), result)
    return result


def _device(args: argparse.Namespace) -> str:
    cuda = str(args.device).startswith("cuda")
    return torch.cuda.get_device_name(args.device) if cuda else "cpu"


def main() -> None:
    args = parse_args()
    refuse_rows(args.results, None if args.weights else args.world)
    cases = {point: selected(args, point) for point in args.points}
    known = {
        point: [DENSE, *cases_at(point.steps), *head_cases(point.steps)] for point in args.points
    }
    run_cases(args, cases, known, args.results / "quality.csv")


def run_cases(
    args: argparse.Namespace,
    cases: Mapping[Point, Sequence[Case]],
    known: Mapping[Point, Sequence[Case]],
    table: Path,
    compare: Callable[[dict[tuple, dict]], list[dict]] = paired_rows,
    columns: Sequence[str] = COLUMNS,
    key: Sequence[str] = KEY,
) -> None:
    """Run what is not done yet, and write the rows of all finished `known` cases.

    Args:
        compare: makes the rows of the finished cases.
        columns, key: of the table.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = [
        (task, point, case) for point in cases for case in cases[point] for task in args.tasks
    ]
    if args.fresh:
        for task, point, _ in wanted:
            _dense_path(args, task, point).unlink(missing_ok=True)
    todo = [one for one in wanted if args.fresh or not _done(args, *one)]
    log.info("%d cases, %d of them done before", len(wanted), len(wanted) - len(todo))
    began = time.perf_counter()
    for count, (one, result) in enumerate(_run_all(args, todo), 1):
        left = (time.perf_counter() - began) / count * (len(todo) - count) / 60
        log.info("[%d/%d, %.0f min left] %s", count, len(todo), left, _line(one, result))
    rows = compare(_everything(args, known))
    merge_rows(table, [*outdated(read_rows(table), rows, key), *rows], columns, key)


def _done(args: argparse.Namespace, task: str, point: Point, case: Case) -> bool:
    # the others would each make the dense videos anew
    kept = case != DENSE or _dense_path(args, task, point).exists()
    return kept and read_result(result_path(args, task, point, case)) is not None


def _dense_path(args: argparse.Namespace, task: str, point: Point) -> Path:
    subject = load_subject(args, point)
    return dense_path(args.work, subject, task, point, args.prompts, args.seeds, args.digest)


def _everything(
    args: argparse.Namespace, known: Mapping[Point, Sequence[Case]]
) -> dict[tuple, dict]:
    """All finished cases, also those that this call was not asked for: rows are compared."""
    found = {}
    for point, cases in known.items():
        for case in cases:
            for task in args.tasks:
                result = read_result(result_path(args, task, point, case))
                if result is not None:
                    found[task, point, case] = result
    return found


def _run_all(args: argparse.Namespace, todo: list[tuple]):
    """Yield (case, result) as they come; the dense videos of a task are made before the rest."""
    if args.jobs == 1:
        for one in todo:
            yield one, run_case(args, *one)
        return
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        for part in ([t for t in todo if t[2] == DENSE], [t for t in todo if t[2] != DENSE]):
            futures = {pool.submit(run_case, args, *one): one for one in part}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _line(one: tuple, result: dict) -> str:
    task, point, case = one
    head = f"{task} {point.steps} steps {case.target} {case.method} {case.setting}"
    if "row" not in result:
        return f"{head}: no row, {result['unreachable']}"
    row = result["row"]
    return (
        f"{head}: {row['flops_ratio']:.3f} of the FLOPs, {row['psnr_db']:.2f} dB "
        f"[{row['psnr_lo']:.2f}, {row['psnr_hi']:.2f}], motion {row['motion_ratio']:.2f}"
    )


def add_real_weights(parser: argparse.ArgumentParser) -> None:
    """The options that `load_subject` reads."""
    parser.add_argument("--slim", type=Path, help="a slim student in the tiny Wan's place")
    real = parser.add_argument_group("real weights (no truth metrics)")
    real.add_argument("--weights", help="a diffusers folder, or a Wan checkpoint (.safetensors)")
    real.add_argument("--components", help="a diffusers folder with VAE and text encoder")
    real.add_argument("--prompt-file", help="one prompt a line")
    real.add_argument("--images", nargs="+", default=[], help="first images, for image-to-video")
    real.add_argument("--width", type=int, default=832)
    real.add_argument("--height", type=int, default=480)
    real.add_argument("--pixel-frames", type=int, default=81)
    real.add_argument("--guidance", type=float, default=5.0)
    real.add_argument("--shift", type=float, default=5.0)
    real.add_argument("--device", help="default: cuda with --weights, else cpu")
    real.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))


def real_size(args: argparse.Namespace) -> str:
    """Of videos of real weights, and their dtype; empty for a tiny Wan."""
    if not args.weights:
        return ""
    dtype = args.dtype.replace("float", "fp").replace("bfp", "bf")
    return f"{args.width}x{args.height}x{args.pixel_frames} {dtype}"


def parse_args(
    description: str | None = __doc__,
    bench: type[Bench] = Bench,
    work: Path = Path("out/quality"),
    tasks: Sequence[str] = ("t2v", "i2v"),
    videos: tuple[int, int] | None = None,
) -> argparse.Namespace:
    """The command line; a study of its own names its bench, its work folder and its tasks.

    Args:
        videos: prompts and seeds of a study, with --full and without; its rows are the
            repository's.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--full", action="store_true", help="every case, with all prompts and seeds")
    add("--world", choices=list(WORLDS), default=FIRST.name, help="of the tiny Wan")
    add("--only", nargs="+", help="methods, for example: default easycache")
    add("--targets", nargs="+", type=float, help="only these shares of the dense FLOPs")
    add(
        "--steps",
        nargs="+",
        type=int,
        help="only these numbers of steps (default: 4 and 20; all of the\nregistry with --full)",
    )
    add("--tasks", nargs="+", default=None, choices=("t2v", "i2v"))
    add("--prompts", type=int)
    add("--seeds", type=int)
    add("--fresh", action="store_true", help="forget finished cases")
    add("--jobs", type=int, help="processes (default: the cores, at most 4; 1 with --weights)")
    add("--threads", type=int, default=1, help="of torch, in each process")
    add("--work", type=Path, default=work, help="finished cases")
    add(
        "--results",
        type=Path,
        help=f"folder of the CSV file (default: {ASIDE};\nthe repository's with --full)",
    )
    add_real_weights(parser)
    args = parser.parse_args()
    if args.weights and args.slim:
        parser.error("--slim: a student of the tiny Wan; leave out --weights")
    args.results = args.results or (RESULTS if args.full or videos else ASIDE)
    prompts, seeds = videos or (FULL[args.world] if args.full else FAST[args.world][:2])
    if args.weights:
        prompts = min(prompts, len(read_prompts(args.prompt_file)))
    args.prompts, args.seeds = args.prompts or prompts, args.seeds or seeds
    asked = args.steps or [p.steps for p in POINTS[args.world] if args.full or p.steps < MANY_STEPS]
    args.points = [p for p in POINTS[args.world] if p.steps in asked]
    if args.weights:
        args.points = [Point(n, args.guidance, args.shift) for n in args.steps or (20,)]
    # what is changed while it runs is not in it
    args.digest, args.commit = digest(args), commit()
    args.device = args.device or ("cuda" if args.weights else "cpu")
    args.jobs = args.jobs or (1 if args.weights else min(os.cpu_count() or 1, 4))
    if args.tasks is None:
        args.tasks = load_subject(args).tasks if args.weights else tasks
    args.bench = bench
    return args


if __name__ == "__main__":
    main()
