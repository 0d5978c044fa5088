"""Records a profile on the training machine: `python -m wantrim.training.record RECIPE`.

PARE's calibration (arXiv 2605.27336, section 3.2): samples of the recipe's data, noised to ten
levels of equally many samples. Writes the file that the recipe names as its profile.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track

from ..hosts.diffusers.profiling import profile_run
from ..methods.schedule import BINS
from ..profiles.profile import Profile
from ..profiles.recorder import save_profile
from ..slim.source import open_source
from ..toy import CHECKPOINT
from .draws import Draws, noisy
from .models import full_model
from .pair import velocity
from .parallel import DTYPES, World, world
from .recipe import TINY, Recipe, load_recipe
from .run import check_fit, open_data

log = logging.getLogger(__name__)

# of the paper
SAMPLES = 200
# draws of the calibration, beside those of the stages
STAGE = 0


def record(recipe: Recipe, out: Path, processes: World, samples: int = SAMPLES) -> Profile:
    """Run the full model on noisy samples and write what its heads, channels and blocks did.

    Args:
        samples: of the recipe's data, in turn for each of ten noise levels within those that the
            recipe's first stage trains.

    Raises:
        ValueError: the model or the data cannot be read, do not fit each other, or give values that
            are not finite; or there are several processes, which would all do the same.
    """
    if processes.size > 1:
        raise ValueError(f"expected one process, got {processes.size}: start it without torchrun")
    # PARE's calibration has every sample's own text
    recipe = replace(recipe, data=replace(recipe.data, drop_text=0.0))
    data, dtype = open_data(recipe, processes), DTYPES[recipe.run.dtype]
    source = open_source(CHECKPOINT if recipe.model == TINY else Path(recipe.model))
    check_fit(data, source, processes)
    model = full_model(source, dtype).fill(processes.device)
    low, high = recipe.stages[0].sigma_min, recipe.stages[0].sigma_max
    cast = torch.autocast(processes.device.type, dtype, enabled=dtype != torch.float32)
    with profile_run(model) as recorder, torch.no_grad(), cast:
        for number in track(range(samples), "recording", disable=not processes.first):
            step, row = divmod(number, recipe.data.batch)
            one = data.batch(step).row(row).to(processes.device)
            draws = Draws(recipe.data.seed, STAGE, number)
            place = (number % BINS + draws.uniform(1)) / BINS
            sigma = (low + (high - low) * place).to(one.latents)
            noise = draws.noise(one.latents.shape).to(one.latents)
            velocity(model, noisy(one.latents, noise, sigma), sigma, one, dtype)
    return save_profile(recorder, out, merge=False).profile


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="wantrim.training.record", description=__doc__.splitlines()[0]
    )
    parser.add_argument("recipe", help="TOML file, or the name of one that comes with WanTrim")
    parser.add_argument("--out", type=Path, help="file to write (default: the recipe's profile)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="default 200, as in the paper")
    parser.add_argument(
        "--set", nargs="+", default=(), metavar="KEY=VALUE", help="change the recipe"
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    args = parser.parse_args(arguments)
    if args.samples < BINS:
        parser.error(f"--samples: expected {BINS} or more, one for each noise level")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        recipe = load_recipe(args.recipe, args.set)
        if args.out is None and not recipe.profile:
            raise ValueError("--out: expected a file, as the recipe names no profile")
        out = args.out or Path(recipe.profile)
        with world(args.device) as processes:
            profile = record(recipe, out, processes, args.samples)
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 1
    log.info("%d calls in %s", profile.calls, out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
