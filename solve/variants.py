"""Which plans a trial tries: the solver's, and its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.plan import TrimPlan
from ..engine.record import Record
from ..engine.work import program_work
from .dial import MAX_SPEEDUP, Run

# of the gain of the wanted speed-up, what the neighbours on both sides are solved for
LESS, MORE = 0.7, 1.4
# of self-attention, what heads in their patterns leave
HEADS_LEFT = 0.75
# of a step's FLOPs, what attention has to be for heads in patterns to be tried
WORTH = 0.5
PLAN, OWN, REPEATS, HEADS = "plan", "own", "repeats", "heads"


@dataclass(frozen=True)
class Variant:
    """A way to solve the dial.

    Args:
        name: short and fixed; `label` is for people.
        context: whether keys and values of left out tokens may be remembered.
        own: solved by the travel of the whole run.
        heads: share of self-attention that is left by heads in patterns, or None.
    """

    name: str
    label: str
    speedup: float
    context: bool = True
    own: bool = False
    heads: float | None = None


def variants(wanted: float) -> list[Variant]:
    """The solver's plan first, then its neighbours."""
    said = f"WanTrim {wanted:g}x"
    less, more = (round(min(MAX_SPEEDUP, 1 + (wanted - 1) * part), 2) for part in (LESS, MORE))
    found = [
        Variant(PLAN, said, wanted),
        Variant(OWN, f"{said} by the whole run", wanted, own=True),
        Variant(REPEATS, f"{said}, steps whole or repeated", wanted, context=False),
        Variant("less", f"WanTrim {less:g}x", less),
        Variant("more", f"WanTrim {more:g}x", more),
        Variant(HEADS, f"{said} with WanTrim Heads {1 - HEADS_LEFT:g}", wanted, heads=HEADS_LEFT),
    ]
    # at the most that can be asked there is no more
    return [one for one in found if one.name != "more" or one.speedup > wanted]


def why_no_heads(run: Run) -> str | None:
    """Why heads in patterns are not tried in a run, in an artist's words, or None."""
    work = program_work(run.shape, run.programs(TrimPlan())[0], TrimPlan(), run.prompts)
    share = work.attention / work.flops
    if share >= WORTH:
        return None
    return f"not tried: attention is {share:.0%} of the work at this size, too little for heads"


def why_no_repeats(ran: Record | None) -> str | None:
    """Why steps that are whole or repeated need no run of their own beside the plan's, or None."""
    if ran is None or not ran.finished or any(step.program.partial for step in ran.steps):
        return None
    return "not tried: WanTrim had no steps but whole and repeated ones here, so it is the same"
