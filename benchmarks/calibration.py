"""How far the toys behave like Wan: `python -m wantrim.benchmarks.calibration` (`--world 2`).

The same or the nearest methods as were published for Wan run on a tiny Wan at the same speed-up (in
FLOPs), sampled as Wan is, in the quality bench's runner: rows of benchmarks/results/calibration.csv.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from ..toy.worlds import WORLDS
from .cases import DEFAULT, DENSE, PAPER, Case, Point, case_of
from .peers.registry import PYRAMID
from .quality import load_subject, parse_args, refuse_rows, run_cases

# Wan2.1's own for 1.3B, for which most figures were published
POINT = Point(50, 6.0, shift=8.0)
# prompts and seeds of all rows
VIDEOS = (2, 1)
# asked of the root mean square, and marked where one figure is further off
TOLERATED_DB = 3.0
COLUMNS = (
    "published", "speedup", "published_psnr_db", "source", "model", "task", "method", "knob",
    "steps", "guidance", "shift", "prompts", "seeds", "target", "flops_ratio", "psnr_db", "psnr_lo",
    "psnr_hi", "ssim", "motion_ratio", "shape_ok", "commit",
)  # fmt: skip
KEY = ("published", "speedup", "model", "method", "steps", "guidance", "shift", "prompts", "seeds")


@dataclass(frozen=True)
class Published:
    """A figure for Wan, against the dense video of the same seed.

    Args:
        psnr_db: as published, a number or a range, and the model where it is not Wan2.1 1.3B.
        source: a paper, or a repository that compares several methods.
        method: of ours, the same or the nearest; empty where only a pair of experts could tell.
    """

    name: str
    speedup: float
    psnr_db: str
    source: str
    method: str

    def case(self) -> Case:
        return case_of(self.method, round(1 / self.speedup, 3))


EASYCACHE, ASTRAEA, THIRD = "arXiv 2507.02860", "arXiv 2506.05096", "a third party's"
PUBLISHED = (
    Published("EasyCache", 2.54, "25.2", EASYCACHE, "easycache"),
    Published("TeaCache", 2.00, "22.6", EASYCACHE, "teacache"),
    Published("SeaCache", 2.00, "26.6", "arXiv 2602.18993", "sea_cache"),
    Published("SeaCache", 1.86, "30.1 (14B)", THIRD, "sea_cache"),
    Published("ZEUS", 1.88, "32.8 (14B)", "arXiv 2604.01552", "zeus_like"),
    Published("MagCache", 2.68, "21.5", "arXiv 2506.09045", "mag_cache"),
    Published("PAB", 1.72, "18.8", EASYCACHE, PYRAMID),
    Published("Astraea", 1.36, "29.2", ASTRAEA, DEFAULT),
    Published("Astraea", 1.86, "22.5-25", ASTRAEA, DEFAULT),
    Published("Astraea", 2.29, "22.4-24.3", ASTRAEA, DEFAULT),
    Published("fewer steps", 2.00, "15.8 (14B)", "KlingAIResearch/ScalingCache", "fewer_steps"),
    Published("fewer steps", 2.50, "14.5", "KlingAIResearch/ScalingCache", "fewer_steps"),
    Published("TAPE", 1.50, "", "arXiv 2605.17837", PAPER),
    *(
        Published("SeaCache", speedup, f"{there} (Wan2.2)", THIRD, "")
        for speedup, there in ((1.11, "35.6"), (1.41, "27.7"), (1.58, "24.3-27.5"), (1.98, "22.2"))
    ),
    Published("ZEUS", 2.07, "23.7 (Wan2.2)", THIRD, ""),
)


def calibration_rows(results: dict[tuple, dict], **ran) -> list[dict]:
    """A row for each published figure that something was run for; `ran` says on what."""
    rows = []
    for (task, point, case), result in results.items():
        for one in PUBLISHED:
            if not one.method or one.case() != case:
                continue
            run = {"task": task, **ran, **asdict(point)}
            rows.append(
                {
                    "published": one.name,
                    "speedup": one.speedup,
                    "published_psnr_db": one.psnr_db,
                    "source": one.source,
                    "method": one.method,
                    **run,
                    **result.get("row", {"knob": result.get("unreachable", "")}),
                }
            )
    return rows


def middle(published: str) -> float:
    """Of "22.5-25", "14.5" or "15.8 (14B)"."""
    ends = [float(end) for end in published.partition(" ")[0].split("-")]
    return sum(ends) / len(ends)


def calibration_table(rows: Sequence[dict[str, str]]) -> str:
    """Published figures beside each toy's; last the root mean square of the differences.

    A cell that is further off than TOLERATED_DB says by how much.
    """
    toys = {world.checkpoint.stem: f"tiny Wan {name}" for name, world in WORLDS.items()}
    lines = [
        "| published | speed-up | PSNR there, dB | nearest here | "
        + " | ".join(toys.values())
        + " |"
    ]
    lines.append("|---" * (4 + len(toys)) + "|")
    apart: dict[str, list[float]] = {toy: [] for toy in toys}
    for one in PUBLISHED:
        near = one.method.replace("_", " ") or "needs a pair"
        cells = [one.name, f"{one.speedup:g}x", one.psnr_db, near]
        for toy in toys:
            mine = [
                r
                for r in rows
                if (r["model"], r["published"], r["method"]) == (toy, one.name, one.method)
                and float(r["speedup"]) == one.speedup
            ]
            cells.append(_cell(max(mine, key=_videos), one.psnr_db, apart[toy]) if mine else "")
        lines.append("| " + " | ".join(cells) + " |")
    cells = [f"{np.sqrt(np.mean(np.square(apart[toy]))):.1f}" if apart[toy] else "" for toy in toys]
    lines.append("| root mean square of the differences | | | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _videos(row: dict[str, str]) -> int:
    return int(row["prompts"]) * int(row["seeds"])


def _cell(row: dict[str, str], there: str, apart: list[float]) -> str:
    if not row["psnr_db"]:
        return "not reached"
    cell = f"{float(row['psnr_db']):.1f} ({1 / float(row['flops_ratio']):.2f}x)"
    if there:
        apart.append(float(row["psnr_db"]) - middle(there))
        if abs(apart[-1]) > TOLERATED_DB:
            cell += f", **{apart[-1]:+.1f}**"
    return cell


def main() -> None:
    args = parse_args(__doc__, tasks=("t2v",), videos=VIDEOS)
    if args.weights:
        raise SystemExit("--weights: the toys are calibrated here; use wantrim.benchmarks.quality")
    refuse_rows(args.results, args.world)
    cases = {POINT: [DENSE, *dict.fromkeys(one.case() for one in PUBLISHED if one.method)]}
    ran = {"model": load_subject(args).name, "prompts": args.prompts, "seeds": args.seeds}
    compare = partial(calibration_rows, **ran)
    run_cases(args, cases, cases, args.results / "calibration.csv", compare, COLUMNS, key=KEY)


if __name__ == "__main__":
    main()
