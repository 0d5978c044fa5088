"""Does the verdict hold on videos that nothing was chosen on? `python -m wantrim.benchmarks.confirm`.

Plans were compared, and the default was chosen, on the first prompts of the bench. Here the telling
ones run once on others, at 0.67 of the compute: rows of benchmarks/results/confirm.csv.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .bench import Bench
from .cases import AUTO, METHODS, REFRESH, STUDY_TARGET, Case, tokens_case
from .quality import DENSE, parse_args, run_cases, selected

# after the bench's 32 prompts and those that peers are tuned on
FIRST_PROMPT = 40
TOKENS = (AUTO, REFRESH, "rotation_update_once", "random", "tape")


def all_cases() -> list[Case]:
    """Fewer steps and token plans."""
    target = STUDY_TARGET
    plans = [tokens_case("confirm", target, METHODS[name], name) for name in TOKENS]
    return [Case("confirm", "fewer_steps", "", target), *plans]


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
