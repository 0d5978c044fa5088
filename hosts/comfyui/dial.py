"""A dial's plan, made at a run's first model call: only there everything that it costs is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...methods.floor import device_rates
from ...methods.grid import TokenGrid
from ...methods.solve import Run, Solved, floor_cost, flops_cost
from ...methods.width import Width
from ..report import Report
from ..session import TrimPlan
from .shape import clip_tokens, device_name, full_shape
from .slim import slim_header
from .variants import tells_start


@dataclass
class Wish:
    """A plan with a dial that waits for the first model call.

    Args:
        prompts: 2 with guidance, 1 without.
        width: of a slim model.
    """

    plan: TrimPlan
    shift: float
    prompts: int
    width: Width | None = None

    @classmethod
    def of(cls, plan: TrimPlan, guider, shift: float) -> Wish:
        """What a guider tells about the run before it begins."""
        prompts = sum(bool(conds) for conds in guider.conds.values())
        skips_negative = not guider.model_options.get("disable_cfg1_optimization", False)
        if skips_negative and math.isclose(getattr(guider, "cfg", 0.0), 1.0):
            prompts = 1
        header = slim_header(guider.model_patcher)
        return cls(plan, shift, max(1, prompts), None if header is None else header.width)

    def solve(
        self,
        dm,
        context: torch.Tensor,
        clip_fea: torch.Tensor | None,
        grid: TokenGrid,
        anchored: torch.Tensor | None,
        sigmas: torch.Tensor,
        report: Report,
    ) -> tuple[TrimPlan, Solved]:
        """The plan for a session; the report takes in what it is and what is in its way."""
        given = [] if anchored is None else anchored.tolist()
        # a reference in front of the grid costs what a given latent frame does
        before = round(grid.start / grid.per_frame)
        run = Run(
            full_shape(dm, context.shape[1], clip_tokens(dm, clip_fea)),
            TokenGrid(grid.frames + before, grid.height, grid.width),
            tuple(sigmas.tolist()),
            self.shift,
            self.prompts,
            sum(given) + before,
            any(given[:1]) and tells_start(dm),
            self.width,
        )
        name = device_name(context.device)
        rates = device_rates(name)
        cost = flops_cost if rates is None else floor_cost(rates)
        solved = self.plan.dial.solve(run, self.plan.parts, cost)
        plan = self.plan.solved(solved.parts)
        measure = "in FLOPs" if rates is None else f"by the rates of {name}"
        report.planned = _sentence(self.plan, plan, solved, measure)
        if solved.why is not None:
            report.note(
                f"{solved.wanted:.2f}x was asked for and {solved.reached:.2f}x is expected: "
                f"{solved.why}"
            )
        if type(dm).__name__ == "VaceWanModel":
            report.note("VACE's control branch runs in full, and what is expected leaves it out")
        return plan, solved


def _sentence(wish: TrimPlan, plan: TrimPlan, solved: Solved, measure: str) -> str:
    own = "" if wish.dial.expert is None else " of this expert's own steps"
    basis = "by its profile" if wish.dial.profile is not None else "without a profile"
    return (
        f"{wish.dial.describe(solved)}, {basis}: {plan.describe()}; expected {solved.reached:.2f}x{own} "
        f"{measure}"
    )
