"""The main job without ComfyUI or downloads: `python -m wantrim.demo` (or `make demo`)."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from .page import gained, write_page
from .run import STEPS, run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--prompts", type=int, default=4, help="videos per run, 1 to 16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps: expected at least 2, got {args.steps}")
    if not 1 <= args.prompts <= 16:
        parser.error(f"--prompts: expected 1 to 16, got {args.prompts}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    result = run_demo(args.steps, args.prompts, args.seed)
    write_page(result, args.out)
    logging.info("%s", gained(result))
    logging.info("open %s", (args.out / "report.html").as_posix())


if __name__ == "__main__":
    main()
