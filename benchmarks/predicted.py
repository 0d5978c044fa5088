"""What the cost model expects of a 14B: the table of the first page, and the one with heads."""

from __future__ import annotations

from ..engine.context import context_bytes
from ..engine.plan import TrimPlan
from ..engine.work import program_work
from ..hosts.diffusers.sample import sigmas_for
from ..methods.cost import WanShape
from ..methods.grid import TokenGrid
from ..methods.role_plan import RolePlan
from ..solve.dial import Dial, Run
from ..solve.floor import device_rates

# the sizes that Wan comes in; each expert of Wan 2.2's A14B has those of 14B
WAN = {
    "1.3B": WanShape(1536, 8960, 30),
    "5B": WanShape(3072, 14336, 30, 48, 48),
    "14B": WanShape(5120, 13824, 40),
    "14B I2V": WanShape(5120, 13824, 40, 36, image_tokens=257),
    "A14B I2V": WanShape(5120, 13824, 40, 36),
}
SHAPE, PIXEL_FRAMES, SHIFT = WAN["14B"], 81, 5.0
HEADS = SHAPE.dim // SHAPE.head_dim
SIZES = {"480p": (832, 480), "720p": (1280, 720)}
# torch's name: name in the table, and bytes a second from RAM where the context has to lie there
CARDS = {
    "NVIDIA H200": ("H200", None),
    # PCIe 4.0 with 16 lanes, as far as copies of this size reach it
    "NVIDIA GeForce RTX 4090": ("RTX 4090", 22e9),
}
# of self-attention, what heads leave
LEFT = 0.5
# steps, and prompts of each: with guidance, and as the 4-step LoRAs sample
SAMPLINGS = {"20 steps with guidance": (20, 2), "4 steps without it": (4, 1)}


def video_grid(shape: WanShape, width: int, height: int, pixel_frames: int) -> TokenGrid:
    """Token grid of a video in pixels: the VAE's strides are 4, 8, 8, and 4, 16, 16 for 5B's."""
    stride = 16 if shape.out_channels == 48 else 8
    time, rows, columns = shape.patch
    latent_frames = (pixel_frames - 1) // 4 + 1
    return TokenGrid(latent_frames // time, height // stride // rows, width // stride // columns)


def step_seconds(device: str, size: str, steps: int, prompts: int) -> dict[str, float]:
    """Floor of 14B's mean step in seconds: whole, with the default, with heads by role, and both.

    A step on a part of the tokens takes at least as long as its context comes from RAM and goes back.

    Args:
        device: torch's name, in `CARDS`.
        size: name in `SIZES`.
        prompts: 2 with guidance, 1 without.
    """
    rates, speed = device_rates(device), CARDS[device][1]
    grid = video_grid(SHAPE, *SIZES[size], PIXEL_FRAMES)
    run = Run(SHAPE, grid, tuple(sigmas_for(steps, SHIFT).tolist()), SHIFT, prompts)
    shares = Dial(dense_first_steps=1).solve(run, cost=rates.seconds).plan.shares
    heads = RolePlan(LEFT, HEADS)
    copied = 2 * prompts * context_bytes(SHAPE.num_blocks, grid.tokens, HEADS, SHAPE.head_dim, 8)

    def seconds(program, plan: TrimPlan) -> float:
        computed = rates.seconds(program_work(SHAPE, program, plan, prompts))
        return max(computed, copied / speed) if speed and program.partial else computed

    def mean(plan: TrimPlan) -> float:
        return sum(seconds(program, plan) for program in run.programs(plan)) / steps

    plans = {
        "whole": TrimPlan(),
        "default": TrimPlan(shares=shares),
        "heads": TrimPlan(heads=heads),
        "both": TrimPlan(heads=heads, shares=shares),
    }
    return {name: mean(plan) for name, plan in plans.items()}


def _lines(name: str, told) -> str:
    lines = [f"| {name} | " + " | ".join(SAMPLINGS) + " |", "|---" * (1 + len(SAMPLINGS)) + "|"]
    for device, (title, speed) in CARDS.items():
        for size in SIZES:
            cells = [told(step_seconds(device, size, *one)) for one in SAMPLINGS.values()]
            where = ", context in RAM" if speed else ""
            lines.append("| " + " | ".join([f"{title}, {size}{where}", *cells]) + " |")
    return "\n".join(lines)


def predicted_table() -> str:
    """Seconds of a whole step and of the default's mean step, by card and size."""
    return _lines("predicted, 14B", lambda found: "{whole:.1f} → {default:.1f} s".format(**found))


def heads_table() -> str:
    """As above, with half of self-attention left by heads, alone and with the default's shares."""
    form = "{whole:.1f} → {default:.1f}, {heads:.1f}, {both:.1f} s"
    return _lines("whole → shares, heads, both", lambda found: form.format(**found))
