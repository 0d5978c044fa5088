"""What the cost model expects of the default on a 14B: the table of the first page."""

from __future__ import annotations

from ..engine.plan import TrimPlan
from ..engine.work import program_work
from ..hosts.diffusers.sample import sigmas_for
from ..solve.dial import Dial, Run
from ..solve.floor import WAN, device_rates, video_grid

SHAPE, PIXEL_FRAMES, SHIFT = WAN["14B"], 81, 5.0
SIZES = {"480p": (832, 480), "720p": (1280, 720)}
# torch's name: name in the table, and whether there is room for the context
CARDS = {
    "NVIDIA H200": ("H200", True),
    "NVIDIA GeForce RTX 4090": ("RTX 4090", False),
}
# steps, and prompts of each: with guidance, and as the 4-step LoRAs sample
SAMPLINGS = {"20 steps with guidance": (20, 2), "4 steps without it": (4, 1)}


def step_seconds(device: str, size: str, steps: int, prompts: int) -> tuple[float, float]:
    """Floor of a whole step of 14B, and of the mean step with the default, in seconds.

    Args:
        device: torch's name, in `CARDS`.
        size: name in `SIZES`.
        prompts: 2 with guidance, 1 without.
    """
    rates = device_rates(device)
    grid = video_grid(SHAPE, *SIZES[size], PIXEL_FRAMES)
    sigmas = tuple(sigmas_for(steps, SHIFT).tolist())
    run = Run(SHAPE, grid, sigmas, SHIFT, prompts, partial=CARDS[device][1])
    plan = Dial(dense_first_steps=1).solve(run, cost=rates.seconds).plan

    def mean(plan: TrimPlan) -> float:
        works = (program_work(SHAPE, one, plan, prompts) for one in run.programs(plan))
        return sum(map(rates.seconds, works)) / steps

    return mean(TrimPlan()), mean(plan)


def predicted_table() -> str:
    """Seconds of a whole step and of the default's mean step, by card and size."""
    lines = ["| predicted, 14B | " + " | ".join(SAMPLINGS) + " |", "|---" * 3 + "|"]
    for device, (title, partial) in CARDS.items():
        for size in SIZES:
            cells = [
                "{:.1f} → {:.1f} s".format(*step_seconds(device, size, *sampling))
                for sampling in SAMPLINGS.values()
            ]
            lines.append(
                "| "
                + " | ".join([f"{title}, {size}{'' if partial else ', no context'}", *cells])
                + " |"
            )
    return "\n".join(lines)
