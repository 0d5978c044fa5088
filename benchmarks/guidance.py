"""Does the order of the methods hold where paths bend more? `python -m wantrim.benchmarks.guidance`.

Guidance decides how much is lost by leaving out steps, and the toy's guidance is ours to choose
(benchmarks/calibration.py). Here the most telling methods run at 0.67 of the compute with more of
it: rows of benchmarks/results/guidance.csv. Those of the bench's own guidance are in quality.csv.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .calibration import GUIDANCE
from .cases import AUTO, METHODS, REFRESH, STUDY_TARGET, Case, Point, tokens_case
from .quality import DENSE, parse_args, run_cases, selected

STEPS = 20
# the bench itself measures at the first
MORE = GUIDANCE[1:]
PEERS = ("easycache", "teacache")
TOKENS = (AUTO, REFRESH, "random", "tape")


def all_cases() -> list[Case]:
    """Fewer steps, step caches and token plans."""
    target = STUDY_TARGET
    cases = [Case("guidance", name, "", target) for name in ("fewer_steps", *PEERS)]
    return cases + [tokens_case("guidance", target, METHODS[name], name) for name in TOKENS]


def main() -> None:
    args = parse_args(__doc__, work=Path("out/guidance"), tasks=("t2v",))
    if args.weights:
        raise SystemExit("--weights: give wantrim.benchmarks.quality --weights its --guidance")
    torch.set_num_threads(args.threads)
    args.points = [Point(STEPS, guidance) for guidance in MORE]
    known = all_cases()
    cases = selected(True, args.only, args.targets, known)
    run_cases(args, cases, [DENSE, *known], args.results / "guidance.csv")


if __name__ == "__main__":
    main()
