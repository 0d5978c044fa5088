"""WanTrim from a shell: `python -m wantrim slim MODEL.safetensors --profile P.safetensors OUT`.

In ComfyUI's custom_nodes the package has its folder's name: `python -m ComfyUI-WanTrim slim ...`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from .profiles.recorder import open_profile
from .slim.export import RULES, slim_checkpoint

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="wantrim", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    slim = commands.add_parser("slim", help="write a smaller checkpoint of a Wan model")
    slim.add_argument("source", type=Path, help="the full checkpoint (safetensors)")
    slim.add_argument("out", type=Path, help="the slim checkpoint to write (safetensors)")
    slim.add_argument("--profile", type=Path, required=True, help="of this model, from WanTrim")
    slim.add_argument(
        "--calibration", type=Path, help="default: the one beside the profile, if there is one"
    )
    size = slim.add_mutually_exclusive_group()
    size.add_argument("--prune", type=float, default=0.3, help="share that goes, default 0.3")
    size.add_argument("--budget", type=float, help="share that stays, spent where it matters")
    slim.add_argument("--rule", choices=RULES, default="budget", help="default budget")
    slim.add_argument("--no-refit", action="store_true", help="leave the projections as they are")
    slim.add_argument("--overwrite", action="store_true", help="replace OUT when it is there")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.out.exists() and not args.overwrite:
        parser.error(f"{args.out} is there already; choose another name or add --overwrite")
    if args.out.suffix != ".safetensors":
        parser.error(f"out: expected a name that ends in .safetensors, got {args.out.name}")
    prune = args.prune if args.budget is None else 1.0 - args.budget
    try:
        opened = open_profile(args.profile)
        summary = slim_checkpoint(
            args.source,
            args.out,
            opened.profile,
            calibration=args.calibration or opened.calibration,
            rule=args.rule,
            prune_ratio=prune,
            refitted=not args.no_refit,
            progress=_Percent(),
        )
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 1
    log.info("%s", summary.text())
    return 0


class _Percent:
    """A line for every tenth of the work."""

    def __init__(self):
        self.said = -1

    def __call__(self, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if tenth != self.said:
            self.said = tenth
            log.info("%3d%%", 10 * tenth)


if __name__ == "__main__":
    sys.exit(main())
