"""Does the verdict hold on videos that nothing was chosen on? `python -m wantrim.benchmarks.confirm`.

Methods were compared, and the default was made, on the first prompts of the bench. Here the telling
ones run once on others: rows of benchmarks/results/confirm.csv.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .bench import Bench
from .cases import DEFAULT, SKIP, TAPE, TARGETS, Case, dial_case, tokens_case
from .quality import DENSE, parse_args, run_cases, selected

# after the bench's 32 prompts and those that peers are tuned on
FIRST_PROMPT = 40
PEERS = ("easycache", "sea_cache")


def all_cases() -> list[Case]:
    """Fewer steps, the default with and without context, TAPE and the best step caches."""
    cases = []
    for target in TARGETS:
        cases.append(Case("confirm", "fewer_steps", "", target))
        cases += [dial_case("confirm", target, name) for name in (DEFAULT, SKIP)]
        cases.append(tokens_case("confirm", target, TAPE))
        cases += [Case("confirm", name, "", target) for name in PEERS]
    return cases


class OtherPrompts(Bench):
    """The bench on other prompts, and so with other noise and other first frames."""

    first_prompt = FIRST_PROMPT


def main() -> None:
    args = parse_args(__doc__, OtherPrompts, Path("out/confirm"))
    if args.weights:
        raise SystemExit("--weights: give wantrim.benchmarks.quality a --prompt-file of your own")
    torch.set_num_threads(args.threads)
    known = all_cases()
    cases = selected(True, args.only, args.targets, known)
    run_cases(args, cases, [DENSE, *known], args.results / "confirm.csv")


if __name__ == "__main__":
    main()
