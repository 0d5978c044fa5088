"""What a step costs on the clock, dense and trimmed, in one run: `python -m wantrim.benchmarks.speed`.

Each case is one row of benchmarks/results/speed.csv: the measured speed-up of a model's forward
beside the one that the cost model predicts. Weights and inputs are random. Nothing is timed before
the tests of the code that is timed have passed. With --gpu, real Wan sizes and the kernels on a GPU;
without one, those rows say that they were not measured, and how to.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import torch

from ...engine.plan import TrimPlan
from ...solve.dial import flops
from ..table import RESULTS, commit, merge_rows, read_rows
from .comfyui import comfyui_rows, find_comfyui
from .gpu import LIMIT, ask_for_gpu, gpu_rows, rows_to_fill
from .models import Runner, build
from .plans import (
    ATTACHED,
    ATTACHED_NAME,
    NEUTRAL,
    PAPER,
    PARTIAL,
    REPEATED,
    TOGETHER,
    WHOLE,
    Size,
    plans,
    ratio,
    steady_work,
)
from .probes import take_turns, time_overhead, trimmed_blocks
from .rows import COLUMNS, KEY, row, say
from .scale import DRY, GPU
from .traffic import Traffic, peak_bytes

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
# what is timed, and what it is held against
TESTS = (
    "test_tokens.py", "test_attend.py", "test_heads.py", "test_oracle.py", "test_engine.py",
    "test_diffusers_host.py",
)  # fmt: skip
# its time is short, and it compares every kernel with its reference before it times it
GPU_TESTS = ("test_kernels.py", "test_engine.py")
# attention is 43 % of the FLOPs of the long one; the short one has blocks to skip
LONG = Size("1.3B, 1 block", 1536, 12, 8960, 1, (21, 32, 64))
SHORT = Size("1.3B, 4 blocks", 1536, 12, 8960, 4, (21, 16, 32))
# attention is four fifths of the FLOPs
HEAVY = Size("narrow, 4 blocks", 384, 3, 1536, 4, (21, 32, 64))
# for what a large one would not show better
SMALL = Size("narrow, 4 blocks", 384, 3, 1536, 4, (5, 16, 16))
# thin enough for what lies between products to show, which compiling joins
FUSED = Size("thin, 4 blocks", 256, 2, 512, 4, (9, 24, 24))
# as many blocks as 1.3B has, and so little in them that what is around them shows
HOLLOW = Size("48 wide, 30 blocks", 48, 4, 64, 30, (3, 8, 8))
LONG_PLANS = (PARTIAL, "heads 0.7, others off", "heads 0.7, others demoted")
SHORT_PLANS = (
    PARTIAL, REPEATED, PAPER, "blocks 0.75, identity", f"{PAPER}, heads and blocks",
)  # fmt: skip
HEAVY_PLANS = (PARTIAL, PAPER, "blocks 0.75, identity")
COMPILED_PLANS = (PARTIAL, PAPER, "blocks 0.75, identity", "heads 0.7, others off")
OVERHEAD = {NEUTRAL: TrimPlan(), ATTACHED_NAME: ATTACHED}


def check_tests(tests: Sequence[Path], seconds: float | None = None) -> None:
    """Refuse to time code whose tests fail, or take longer than this.

    Raises:
        SystemExit: with pytest's last line.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    log.info("running the tests of what is timed")
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": seconds}
    try:
        run = subprocess.run([*command, *map(str, tests)], check=False, **options)
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"not timed: its tests alone took {seconds:.0f} seconds") from error
    if run.returncode:
        said = (run.stdout + run.stderr).strip().splitlines() or ["no output"]
        raise SystemExit(f"not timed, because the tests are red: {said[-1]}")


def time_plans(
    size: Size, names: Sequence[str], rounds: int, compiled: str = "no"
) -> list[dict[str, object]]:
    """Dense and trimmed forwards in turns, one row for each plan.

    Every FLOP counts as any other in the prediction: a CPU's rates are not known beforehand.
    """
    model, chosen = build(size), {name: plans(size)[name] for name in names}
    others = {name: Runner(model, size, plan, compiled) for name, plan in chosen.items()}
    dense = Runner(model, size, compiled=compiled)
    # to warm up; the first steps of a plan that repeats something compute all
    dense.step()
    for name, plan in chosen.items():
        for _ in range(WHOLE * plan.trims_shares):
            others[name].step()
        if compiled != "no":
            # the trimmed shape is compiled, too
            others[name].step()
    whole = steady_work(size, TrimPlan())
    rows = []
    for name, taken in take_turns(dense, others, rounds).items():
        predicted = ratio(flops, whole, steady_work(size, chosen[name]))
        rows.append(row(size, name, taken, predicted=predicted, compiled=compiled))
        others[name].close()
        say(rows[-1])
    return rows


def compiled_in_comfyui(size: Size, comfyui: Path, rounds: int) -> list[dict[str, object]]:
    """What a plan gains in ComfyUI with its compile node, beside what it gains without."""
    names, rows = (PARTIAL, TOGETHER), []
    for compiled in ("no", backend()):
        options = {"cpu": True, "compiled": compiled, "names": names}
        rows += comfyui_rows(row, size, comfyui, None, rounds, **options)
    without = {made["plan"]: made["speedup"] for made in rows if made["compiled"] == "no"}
    for made in rows:
        if made["compiled"] != "no":
            share = made["speedup"] / without[made["plan"]]
            made["note"] = f"{share:.2f} of the {without[made['plan']]:.2f}x that it is uncompiled"
        say(made)
    return rows


def measure_memory(size: Size, rows: list[dict[str, object]]) -> None:
    """Fill in the peak of four steps, and by how many hidden states it is above that of dense."""
    model, named = build(size), plans(size)
    state = size.grid.tokens * size.dim * next(model.parameters()).element_size()

    def peak(plan) -> int:
        runner = Runner(model, size, plan)
        most = peak_bytes(lambda: [runner.step() for _ in range(WHOLE + 2)])
        runner.close()
        return most

    dense = peak(None)
    for made in rows:
        if made["plan"] in named:
            most = peak(named[made["plan"]])
            made["peak_mb"] = most / 2**20
            made["extra_states"] = (most - dense) / state
            log.info("%s: %.2f hidden states above dense", made["plan"], made["extra_states"])


def measure_traffic(size: Size, rows: list[dict[str, object]]) -> None:
    """Note what a trimmed block launches, moves and allocates beside its own work, in the mean."""
    model, named = build(size), plans(size)
    for made in rows:
        found = trimmed_blocks(model, size, named[made["plan"]])
        if found:
            mean = sum(found, Traffic()) * (1 / len(found))
            made["note"] = (
                f"a trimmed block: {mean.launches:.1f} launches, {mean.moved:.1f} hidden states "
                f"moved and {mean.allocated:.1f} allocated beside its own"
            )
            log.info("%s: %s", made["plan"], made["note"])


def backend() -> str:
    """Of torch.compile: inductor needs a C++ compiler for the CPU; the other compiles nothing."""
    return "inductor" if shutil.which("g++") else "aot_eager"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m wantrim.benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--gpu", action="store_true", help="real sizes and kernels on a GPU, in place of the CPU's")
    add("--dry", action="store_true", help="what --gpu does, on the CPU at tiny sizes")
    add(
        "--comfyui",
        type=Path,
        help="a ComfyUI, to time in it: with --gpu or --dry the real sizes too (else the one that "
        "the tests find), without them only a small one with its compile node",
    )
    add("--limit", type=float, default=LIMIT, help="seconds that --gpu may take, tests included")
    add("--rounds", type=int, default=2, help="turns of each plan at the large sizes")
    add("--pairs", type=int, default=40, help="pairs of forwards for the overhead")
    add("--small", action="store_true", help="only the small size")
    add("--results", type=Path, default=RESULTS, help="folder of speed.csv")
    args, began = parser.parse_args(arguments), time.monotonic()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # of what the rows are, whatever is changed while they are measured
    commit()
    if args.gpu:
        ask_for_gpu()
    if args.gpu or args.dry:
        comfyui = find_comfyui(args.comfyui)
        if comfyui is None:
            log.warning("no ComfyUI found, so nothing is timed in it; name one with --comfyui")
    if not args.dry:
        tests = [ROOT / "tests" / name for name in (GPU_TESTS if args.gpu else TESTS)]
        check_tests(tests, args.limit if args.gpu else None)
    path = args.results / "speed.csv"

    def keep(rows: Sequence[dict[str, object]]) -> None:
        merge_rows(path, rows, COLUMNS, KEY)

    if args.gpu or args.dry:
        left = args.limit - (time.monotonic() - began)
        for rows in gpu_rows(row, comfyui, DRY if args.dry else GPU, left):
            for made in rows:
                say(made)
            # as each part ends: what there is no time for takes nothing with it
            keep(rows)
        return
    if args.comfyui:
        keep(compiled_in_comfyui(FUSED, args.comfyui, args.rounds))
        return
    # a GPU's own rows stay, and there is nothing to wait for beside them
    same = itemgetter("case", "host", "plan", "compiled")
    known = {same(r) for r in read_rows(path) if r["dense_ms"]}
    waiting = [r for r in rows_to_fill() if same(r) not in known]
    keep([dict.fromkeys(COLUMNS, "") | made for made in waiting])
    # the time of a process is that of all its threads
    torch.set_num_threads(1)
    for size in (HOLLOW, SMALL):
        rows = time_overhead(row, size, build(size), OVERHEAD, args.pairs)
        for made in rows:
            say(made)
        keep(rows)
    small = time_plans(SMALL, list(plans(SMALL)), 3)
    measure_memory(SMALL, small)
    measure_traffic(SMALL, small)
    keep(small)
    keep(time_plans(SMALL, COMPILED_PLANS, 5, backend()))
    if args.small:
        return
    keep(time_plans(SHORT, SHORT_PLANS, args.rounds))
    keep(time_plans(HEAVY, HEAVY_PLANS, args.rounds))
    keep(time_plans(LONG, LONG_PLANS, 1))


if __name__ == "__main__":
    main()
