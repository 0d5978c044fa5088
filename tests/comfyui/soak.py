"""Hundreds of runs in a row on one model, and whether anything is left of them.

Plans take turns; every 10th run is cancelled and every 15th raises inside a block. From the
repository's root, with the folder of a ComfyUI and its interpreter (benchmarks/results/soak.csv):

    PYTHONPATH=$COMFYUI_PATH $COMFYUI_PATH/.venv/bin/python tests/comfyui/soak.py --runs 200
"""

import argparse
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    # this folder's server.py is not ComfyUI's
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != HERE]
    for folder in (HERE.parent, HERE):
        runpy.run_path(str(folder / "conftest.py"))

import gc  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402

import psutil  # noqa: E402
import torch  # noqa: E402
from comfyui_version import __version__ as comfyui_version  # noqa: E402

from comfy.model_management import InterruptProcessingException  # noqa: E402
from wantrim.benchmarks.table import RESULTS, commit, merge_rows  # noqa: E402
from wantrim.engine.engine import TrimPlan  # noqa: E402
from wantrim.hosts.comfyui.attach import attach  # noqa: E402
from wantrim.tests.comfyui import test_accidents, tiny  # noqa: E402

COLUMNS = (
    "runs", "finished", "cancelled", "raised", "rss_mb_begin", "rss_mb_end", "tensors_begin",
    "tensors_end", "objects_begin", "objects_end", "of_runs_left", "carried_begin", "carried_end",
    "seconds_first", "seconds_last", "comfyui", "commit", "torch", "device",
)  # fmt: skip
KEY = ("runs", "comfyui", "device")
PLANS = {
    **test_accidents.PLANS,
    "neutral": lambda model: attach(model, TrimPlan()),
}
CANCELLED, RAISED = 10, 15
# every plan to its end, cancelled and raising
WARM_UP = 3 * len(PLANS)
# runs at each end whose times are compared
ENDS = 20


@dataclass
class Soak:
    """What runs in a row gave, and what is left of them.

    Attributes:
        outputs: of every plan, the first that it gave.
        wrong: runs that gave something else than the same plan did before.
        seconds: of the processor, of each run that finished, with its plan.
    """

    model: object = field(default_factory=tiny.base_model)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    seconds: list[tuple[str, float]] = field(default_factory=list)
    cancelled: int = 0
    raised: int = 0

    def run(self, name: str, accident: type[BaseException] | None = None) -> None:
        """One run of a plan that is put on anew, as when its node was changed."""
        model, options = PLANS[name](self.model), {}
        error = accident and accident("of the soak")
        if accident is InterruptProcessingException:

            def callback(index, *_):
                # keys and values are remembered by then
                if index == 2:
                    raise error

            options["callback"] = callback
        elif accident is not None:
            model = test_accidents.breaking(model, error, 31 if name == "shares" else 7)
        begun = time.process_time()
        try:
            out = test_accidents.run(model, **options)
        except (InterruptProcessingException, RuntimeError) as found:
            if found is not error:
                raise
            # a traceback holds on to all that the run had
            found.__traceback__ = None
            return
        self.seconds.append((name, time.process_time() - begun))
        if not torch.equal(self.outputs.setdefault(name, out), out):
            self.wrong.append(name)

    def warm_up(self) -> None:
        for accident in (None, InterruptProcessingException, RuntimeError):
            for name in PLANS:
                self.run(name, accident)
        self.seconds.clear()

    def several(self, runs: int) -> None:
        names = list(PLANS)
        for number in range(1, runs + 1):
            accident = None
            if number % CANCELLED == 0:
                accident, self.cancelled = InterruptProcessingException, self.cancelled + 1
            elif number % RAISED == 0:
                accident, self.raised = RuntimeError, self.raised + 1
            self.run(names[number % len(names)], accident)

    def figures(self) -> dict[str, float]:
        """What there is of everything that could grow."""
        gc.collect()
        alive = test_accidents.alive()
        return {
            "rss_mb": psutil.Process().memory_info().rss / 2**20,
            "tensors": sum(count for what, count in alive.items() if isinstance(what, tuple)),
            "objects": len(gc.get_objects()),
            "of_runs": sum(count for what, count in alive.items() if isinstance(what, str)),
            "carried": carried(self.model),
        }

    def slower(self) -> tuple[float, float]:
        """Seconds of the processor for a run at the beginning and at the end: medians of plans, then their mean."""
        found = []
        for some in (self.seconds[:ENDS], self.seconds[-ENDS:]):
            by_plan: dict[str, list[float]] = {}
            for name, seconds in some:
                by_plan.setdefault(name, []).append(seconds)
            found.append(statistics.fmean(map(statistics.median, by_plan.values())))
        return found[0], found[1]


def carried(model) -> int:
    """How many patches, wrappers, callbacks and hooks hang on a MODEL and its network."""

    def count(value) -> int:
        if isinstance(value, dict):
            return sum(count(inner) for inner in value.values())
        return sum(count(v) for v in value) if isinstance(value, list | tuple) else 1

    network = model.model.diffusion_model
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())
    return hooks + sum(
        count(getattr(model, name))
        for name in (
            "wrappers", "callbacks", "patches", "object_patches", "injections",
            "additional_models", "attachments", "model_options",
        )
    )  # fmt: skip


def soak(runs: int) -> tuple[Soak, dict[str, object]]:
    """Sample so many times after a warm-up; the row for the table."""
    with torch.inference_mode():
        done = Soak()
        done.warm_up()
        begin = done.figures()
        done.several(runs)
        end = done.figures()
    row: dict[str, object] = {"runs": runs, "finished": len(done.seconds)}
    row |= {"cancelled": done.cancelled, "raised": done.raised, "of_runs_left": end["of_runs"]}
    for name in ("rss_mb", "tensors", "objects", "carried"):
        row |= {f"{name}_begin": begin[name], f"{name}_end": end[name]}
    row["seconds_first"], row["seconds_last"] = done.slower()
    row |= {"comfyui": comfyui_version, "commit": commit()}
    return done, row | {"torch": torch.__version__, "device": "cpu"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.csv")
    args = parser.parse_args()
    done, row = soak(args.runs)
    merge_rows(args.out, [row], COLUMNS, KEY)
    sys.stdout.write("".join(f"{name}: {row[name]}\n" for name in COLUMNS))
    grown = [n for n in ("tensors", "carried") if row[f"{n}_end"] > row[f"{n}_begin"]]
    if done.wrong or grown or row["of_runs_left"]:
        sys.exit(f"left over: {grown}, {row['of_runs_left']} objects; other outputs: {done.wrong}")


if __name__ == "__main__":
    main()
