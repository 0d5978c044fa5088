"""What each number of the dial keeps, and what its options cost: `python -m wantrim.benchmarks.dial`.

The quality bench (benchmarks/quality.py) on what the node WanTrim solves (solve/dial.py), on the tiny
Wan: rows of benchmarks/results/dial.csv. A target is one over the dial's number; `predicted_ratio` is
one over what the node says that it reached.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .cases import DEFAULT, SKIP, Case, dial_case, once
from .quality import DENSE, parse_args, run_cases, selected

# the fast subset runs the second
SPEEDUPS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
# of 20 steps, at the speed-ups at which they can be met
OPTIONS = (
    {"dense_first_steps": 3},
    {"dense_first_steps": 6},
    {"dense_last_steps": 2},
    {"dense_last_steps": 4},
    {"end": 0.8},
)
OPTIONS_AT = (1.5, 2.0)


def target_of(speedup: float) -> float:
    return round(1 / speedup, 3)


def all_cases() -> list[Case]:
    """Every row, the most telling first, beside fewer steps."""
    cases: list[Case] = []
    for speedup in SPEEDUPS:
        target = target_of(speedup)
        cases.append(Case("speedup", "fewer_steps", "", target))
        cases += [dial_case("speedup", target, name) for name in (DEFAULT, SKIP)]
    for speedup in OPTIONS_AT:
        cases += [dial_case("options", target_of(speedup), **options) for options in ({}, *OPTIONS)]
    return once(cases)


def main() -> None:
    args = parse_args(__doc__, work=Path("out/dial"))
    if args.weights:
        raise SystemExit("--weights: give wantrim.benchmarks.quality --only default; leave it out")
    torch.set_num_threads(args.threads)
    known = all_cases()
    targets = args.targets or (None if args.full or args.only else [target_of(SPEEDUPS[1])])
    cases = selected(True, args.only, targets, known)
    run_cases(args, cases, [DENSE, *known], args.results / "dial.csv")


if __name__ == "__main__":
    main()
