"""How far the toy behaves like Wan: `python -m wantrim.benchmarks.calibration`.

The same or the nearest methods as were published for Wan2.1 1.3B run on the tiny Wan at the same
speed-up (in FLOPs), at several step counts and guidance scales, into results/calibration.csv.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .bench import Bench, read_result, write_result
from .cases import DEFAULT, PAPER, TAPE, Case, Point, dial_case, tokens_case
from .subjects import toy_subject
from .table import RESULTS, merge_rows

log = logging.getLogger(__name__)
STEPS = (20,)
GUIDANCE = (8.0, 11.0, 14.0)
COLUMNS = (
    "published", "speedup", "published_psnr_db", "source", "method", "knob", "steps", "guidance",
    "prompts", "seeds", "flops_ratio", "psnr_db", "psnr_lo", "psnr_hi", "ssim", "motion_ratio",
    "shape_ok",
)  # fmt: skip
KEY = ("published", "speedup", "method", "steps", "guidance", "prompts", "seeds")


@dataclass(frozen=True)
class Published:
    """A figure for Wan2.1 1.3B, 832x480, against the dense video of the same seed.

    Args:
        psnr_db: as published, a number or a range; empty where only the toy has one.
        source: a paper, or a repository that compares several methods.
        method: of ours, the same or the nearest.
    """

    name: str
    speedup: float
    psnr_db: str
    source: str
    method: str

    def case(self) -> Case:
        target = round(1 / self.speedup, 3)
        if self.method == DEFAULT:
            return dial_case("calibration", target)
        if self.method == PAPER:
            return tokens_case("calibration", target, TAPE)
        return Case("calibration", self.method, "", target)


PUBLISHED = (
    Published("EasyCache", 2.54, "25.2", "arXiv 2507.02860", "easycache"),
    Published("TeaCache", 2.00, "22.6", "arXiv 2507.02860", "teacache"),
    Published("MagCache", 2.68, "21.5", "arXiv 2506.09045", "mag_cache"),
    Published("PAB", 1.72, "18.8", "arXiv 2507.02860", "pyramid_attention"),
    Published("Astraea", 1.36, "29.2", "arXiv 2506.05096", "default"),
    Published("Astraea", 1.86, "22.5-25", "arXiv 2506.05096", "default"),
    Published("Astraea", 2.29, "22.4-24.3", "arXiv 2506.05096", "default"),
    Published("TAPE", 1.50, "", "arXiv 2605.17837", "paper"),
    Published("TaylorSeer", 1.90, "13.5", "KlingAIResearch/ScalingCache", "taylorseer"),
    Published("fewer steps", 1.36, "", "", "fewer_steps"),
    Published("fewer steps", 2.00, "15.8 (14B)", "KlingAIResearch/ScalingCache", "fewer_steps"),
    Published("fewer steps", 2.50, "14.5", "KlingAIResearch/ScalingCache", "fewer_steps"),
)


def run(points: Iterable[Point], prompts: int, seeds: int, work: Path, results: Path) -> None:
    """Run what is not in `work` yet, and write the rows."""
    subject, rows = toy_subject(), []
    for point in points:
        bench = Bench(subject, "t2v", point, prompts, seeds, work)
        for published in PUBLISHED:
            case = published.case()
            path = work / f"calibration_{bench.name}__{case.key}.json"
            result = read_result(path)
            if result is None:
                result = bench.run(case)
                write_result(path, result)
            row = {
                "published": published.name,
                "speedup": published.speedup,
                "published_psnr_db": published.psnr_db,
                "source": published.source,
                "method": published.method,
                "steps": point.steps,
                "guidance": point.guidance,
                "prompts": prompts,
                "seeds": seeds,
                **result.get("row", {"knob": result.get("unreachable", "")}),
            }
            rows.append(row)
            log.info(
                "%d steps, guidance %g: %s %gx, published %s dB: %s %s",
                point.steps, point.guidance, published.name, published.speedup,
                published.psnr_db or "none", row.get("psnr_db", "no row"), row["knob"],
            )  # fmt: skip
    merge_rows(results / "calibration.csv", rows, COLUMNS, KEY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE)
    parser.add_argument("--work", type=Path, default=Path("out/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    points = [Point(steps, guidance) for steps in args.steps for guidance in args.guidance]
    run(points, args.prompts, args.seeds, args.work, args.results)


if __name__ == "__main__":
    main()
