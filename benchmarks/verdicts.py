"""Whether a trial of one video chooses what the bench finds best: `python -m wantrim.benchmarks.verdicts`.

Every held-out prompt gets the candidates that WanTrim Candidates gives an artist, and the rule of
WanTrim Verdict chooses one by this prompt's video alone. The bench's best is found on all the other
prompts: the candidate with the highest mean PSNR of those that save enough, and every one whose
paired 95 % interval to it reaches zero. Finished prompts are kept in --work. Rows go into
benchmarks/results/verdicts.csv, from a clean commit and a tiny Wan that is trained to its end.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from ..engine.plan import TrimPlan
from ..hosts.diffusers.easycache import Budget, EasyHook, easycache
from ..hosts.diffusers.one_video import a_fifth
from ..methods.role_plan import RolePlan
from ..report.compare import Comparison, compare
from ..report.verdict import Row, choose, enough
from ..solve.dial import Dial
from ..solve.tuned import Travel, Way
from ..solve.variants import Variant, variants, why_no_heads
from ..toy.worlds import FIRST, SECOND, WORLDS
from .bench import Bench, read_result, write_result
from .cases import POINTS
from .curves import keeping_calls
from .metrics import difference
from .quality import refuse_rows
from .subjects import Item, toy_subject
from .table import RESULTS, commit, merge_rows

log = logging.getLogger(__name__)
FILE = "verdicts.csv"
KEY = ("candidate", "model", "task", "steps", "guidance", "wanted", "first", "prompts")
COLUMNS = (
    *KEY, "shift", "work", "psnr_db", "psnr_lo", "psnr_hi", "chosen", "best", "agrees", "commit",
    "torch",
)  # fmt: skip
EASYCACHE, STEPS = "easycache", "steps"
# thresholds of EasyCache that are looked up in the whole run
THRESHOLDS = np.geomspace(1e-3, 3.0, 240)


class WholeRun:
    """A whole run of a video, and what the other candidates are made by.

    Args:
        calls: input and output of the model, step by step.
    """

    def __init__(self, bench: Bench, item: Item):
        with keeping_calls(bench.model) as self.calls:
            self.latents = bench.sample(item)
        self.sigmas, self.guidance = bench.sampling.sigmas, bench.point.guidance

    @property
    def travel(self) -> Travel:
        """Of the guided velocity."""
        way = Way()
        for sigma, (_, out) in zip(self.sigmas, self.calls, strict=False):
            way.see(sigma, self._guided(out))
        return way.ended()

    def _guided(self, out: torch.Tensor) -> torch.Tensor:
        if len(out) == 1:
            return out
        cond, uncond = out.chunk(2)
        return uncond + self.guidance * (cond - uncond)

    def threshold(self, left_out: int) -> float:
        """EasyCache's, at which it would have left out so many of these steps."""
        off = np.array([abs(self._left_out(one) - left_out) for one in THRESHOLDS])
        nearest = THRESHOLDS[off == off.min()]
        return float(nearest[len(nearest) // 2])

    def _left_out(self, threshold: float) -> int:
        steps = len(self.calls)
        hook = EasyHook(Budget(threshold, steps, a_fifth(steps)))
        module = SimpleNamespace(config=SimpleNamespace(out_channels=self.calls[0][1].shape[1]))
        for hidden, out in self.calls:
            hook.fn_ref = SimpleNamespace(original_forward=lambda *_, out=out, **__: (out,))
            hook.new_forward(module, hidden)
        return hook.budget.computed.count(False)


def candidates(bench: Bench, item: Item, wanted: float) -> dict[str, tuple[float, torch.Tensor]]:
    """Work and latents of each candidate of one video, the whole one first."""
    whole, steps = WholeRun(bench, item), bench.point.steps
    found = {"whole": (1.0, whole.latents)}
    for one in variants(wanted):
        if one.heads is not None and why_no_heads(bench.sampling) is not None:
            continue
        found[one.name] = _dialled(bench, item, one, whole.travel)
    threshold = whole.threshold(round(steps * (1 - 1 / wanted)))
    options = {"steps": steps, "shift": bench.point.shift, "threshold": threshold}
    with easycache(bench.model, **options) as budget:
        latents = bench.sample(item)
    found[EASYCACHE] = (budget.computed.count(True) / steps, latents)
    fewer = max(1, round(steps / wanted))
    if fewer < steps:
        found[STEPS] = (fewer / steps, bench.sample(item, fewer))
    return found


def _dialled(
    bench: Bench, item: Item, variant: Variant, travel: Travel
) -> tuple[float, torch.Tensor]:
    """Work and latents of a plan that the dial solves, and solves anew as ComfyUI's runs do."""
    run = replace(bench.sampling, partial=variant.context)
    dial = Dial(variant.speedup, dense_first_steps=1, travel=travel if variant.own else None)
    others = TrimPlan()
    if variant.heads is not None:
        others = TrimPlan(heads=RolePlan(variant.heads, run.shape.dim // run.shape.head_dim))
    with bench.steered(dial, run, others) as (engine, course):
        latents = bench.sample(item)
        # with its last step in the record
        engine.finish(True)
        return 1 / course.ended.reached, latents


def judge(bench: Bench, item: Item, wanted: float) -> dict:
    """Figures of a prompt's candidates."""
    found = candidates(bench, item, wanted)
    videos = {
        name: torch.from_numpy(bench.subject.to_video(latents)[0])
        for name, (_, latents) in found.items()
    }
    return {
        "work": {name: work for name, (work, _) in found.items()},
        "found": {
            name: asdict(compare(videos["whole"], video))
            for name, video in videos.items()
            if name != "whole"
        },
    }


def decided(figures: Mapping, wanted: float, steps: int) -> dict:
    """Figures of `judge`, with what the verdict chooses by the rules of today."""
    found = {name: Comparison(**one) for name, one in figures["found"].items()}
    rows = [Row(name, name, work=w, found=found.get(name)) for name, w in figures["work"].items()]
    best = choose(rows, wanted, steps).best
    return {
        "work": figures["work"],
        "psnr_db": {name: one.psnr_db for name, one in found.items()},
        "chosen": None if best is None else rows[best].name,
        "commit": figures["commit"],
    }


def bests(judged: Sequence[Mapping], wanted: float, steps: int) -> set[str]:
    """The candidates that save enough over these prompts, and are the best or as good as it."""
    names = list(judged[0]["psnr_db"])
    works = {name: float(np.mean([one["work"][name] for one in judged])) for name in names}
    able = [name for name in names if name in enough(works, wanted, steps)]
    psnr = {name: [one["psnr_db"][name] for one in judged] for name in able}
    top = max(able, key=lambda name: np.mean(psnr[name]), default=None)
    return {
        name for name in able if name == top or difference(psnr[name], psnr[top], None)[2] >= 0.0
    }


def agreement(judged: Sequence[Mapping], wanted: float, steps: int) -> list[set[str]]:
    """Of each prompt the bench's bests by all the others."""
    return [bests([*judged[:at], *judged[at + 1 :]], wanted, steps) for at in range(len(judged))]


def rows_of(
    judged: Sequence[Mapping], bench: Bench, wanted: float, first: int = 0
) -> list[dict[str, object]]:
    """A row for each candidate, and one for the verdict: in how many prompts it chose a best one."""
    good, point = agreement(judged, wanted, bench.point.steps), bench.point
    facts = {
        "model": bench.subject.name, "task": bench.task, "steps": point.steps,
        "guidance": point.guidance, "shift": point.shift, "wanted": wanted,
        "first": first, "prompts": len(judged),
        # of the videos, and not of the rules
        "commit": " ".join(dict.fromkeys(one["commit"] for one in judged)), "torch": torch.__version__,
    }  # fmt: skip
    chosen = [one["chosen"] for one in judged]
    agrees = [name in found for name, found in zip(chosen, good, strict=True)]
    rows = []
    for name in judged[0]["psnr_db"]:
        psnr = [one["psnr_db"][name] for one in judged]
        mean, low, high = difference(psnr, [0.0] * len(psnr), None)
        rows.append({
            **facts, "candidate": name,
            "work": float(np.mean([one["work"][name] for one in judged])),
            "psnr_db": mean, "psnr_lo": low, "psnr_hi": high,
            "chosen": chosen.count(name),
            "best": sum(name in found for found in good),
            "agrees": sum(a for a, c in zip(agrees, chosen, strict=True) if c == name),
        })  # fmt: skip
    return [*rows, {**facts, "candidate": "verdict", "chosen": len(judged), "agrees": sum(agrees)}]


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--world", choices=[FIRST.name, SECOND.name], default=SECOND.name)
    parser.add_argument("--task", choices=["t2v", "i2v"], default="t2v")
    parser.add_argument("--steps", type=int, choices=[20, 50], default=20)
    parser.add_argument("--speedup", type=float, default=1.5)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--first", type=int, default=0, help="the prompt to begin with")
    parser.add_argument("--work", type=Path, default=Path("out/verdicts"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    say = say or log.info
    if args.prompts < 3:
        parser.error("--prompts: expected 3 or more: the best is found on all but one of them")
    point = next((one for one in POINTS[args.world] if one.steps == args.steps), None)
    if point is None:
        parser.error(f"--steps: the bench samples --world {args.world} in no {args.steps}")
    refuse_rows(args.results, args.world)
    made = commit()
    args.work.mkdir(parents=True, exist_ok=True)
    subject = toy_subject(world=WORLDS[args.world])
    bench = Bench(subject, args.task, point, args.first + args.prompts, 1, args.work)
    judged = []
    for item in bench.items[args.first :]:
        name = f"{subject.name}_{args.task}_{args.steps}_{args.speedup:g}_{item.prompt_index}.json"
        figures = read_result(args.work / name)
        # older ones have no figures
        if figures is None or "found" not in figures:
            figures = judge(bench, item, args.speedup) | {"commit": made}
            write_result(args.work / name, figures)
        one = decided(figures, args.speedup, args.steps)
        judged.append(one)
        shown = ", ".join(f"{n} {db:.1f}" for n, db in one["psnr_db"].items())
        say(f"{len(judged)} of {args.prompts}: chosen {one['chosen']} ({shown})")
    rows = rows_of(judged, bench, args.speedup, args.first)
    merge_rows(args.results / FILE, rows, COLUMNS, KEY)
    say(
        f"the verdict chose one of the bench's best in {rows[-1]['agrees']} of {len(judged)} prompts"
    )


if __name__ == "__main__":
    main()
