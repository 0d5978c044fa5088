"""Makes a slim student of a Wan by distillation: `python -m wantrim.training RECIPE`.

PARE (arXiv 2605.27336): I width, II router, III few steps. On several GPUs:
`torchrun --nproc-per-node 8 -m wantrim.training RECIPE`. A run that was stopped goes on with the
same command. Each stage leaves student.safetensors (for WanTrim Load Slim) and router.safetensors
(for WanTrim Blocks) in its folder.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from .parallel import world
from .recipe import load_recipe
from .run import train


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m wantrim.training",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("recipe", help="a TOML file, or the name of one that ships: tiny, t2v_14b, ...")
    add("--out", type=Path, help="folder of the run (default: out/training/NAME)")
    add("--start", type=Path, help="begin with this slim file or stage's folder")
    add("--stages", nargs="+", default=(), metavar="STAGE", help="only these: kinds or numbers")
    add("--set", nargs="+", default=(), metavar="KEY=VALUE", help="change the recipe")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    # which GPU is torchrun's affair
    add("--device", choices=("cpu", "cuda"), default=default)
    add("--threads", type=int, default=1, help="CPU threads of torch; 1 is fastest when shared")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: PyTorch sees no CUDA GPU here")
    if args.threads < 1:
        parser.error(f"--threads: expected at least 1, got {args.threads}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    try:
        recipe = load_recipe(args.recipe, args.set)
        out = args.out or Path("out/training") / recipe.name
        with world(args.device) as processes:
            folder = train(recipe, out, processes, start=args.start, kinds=args.stages)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last saved step")
    logging.info("done: %s", folder)


if __name__ == "__main__":
    main()
