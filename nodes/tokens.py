"""The node that leaves tokens out of the computation (TAPE, arXiv 2605.17837)."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..engine.plan import TrimPlan
from ..hosts.comfyui.attach import attach, attach_part, attachment_of
from ..hosts.comfyui.variants import check_variant
from ..methods.schedule import DIRECTIONS, Schedule
from ..methods.tokens import TokenPlan, paper_plan
from ..solve.dial import Dial
from . import inputs
from .inputs import check_range, model_input, percent_inputs, planned_output, prune_input

CATEGORY = "model/patch/wan"
NAME = "WanTrim Tokens"
MAX_PRUNE = 0.75
AUTO, PAPER, CUSTOM = "auto", "paper", "custom"
PRESETS = (AUTO, PAPER, CUSTOM)


CUSTOM_INPUTS = [
    inputs.choice(
        "schedule",
        DIRECTIONS,
        "How the prune ratio moves over the run, 0.10 to either side of the mean. 'falling' is "
        "the paper's: prunes most in the early, noisy steps. 'rising' spares the early steps, "
        "which decide the motion. 'constant' does neither.",
    ),
    inputs.number(
        "alpha",
        0.5,
        (0.0, 1.0, 0.05),
        "Smoothing over time: weight of a latent frame's own importance against the one before "
        "it. Paper: 0.5. 1 is no smoothing.",
    ),
    inputs.number(
        "reselect_every",
        10,
        (1, 100),
        "Blocks between two choices of tokens. Paper: 10 (of 40 blocks).",
    ),
    inputs.switch(
        "anchor_given_frames",
        True,
        "Never leave out tokens of latent frames that are given: the start image, the end image, "
        "references (Fun models of Wan 2.1 do not say which are). Not studied in the paper; leave on.",
    ),
]


class WanTrimTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimTokens",
            display_name=NAME,
            category=CATEGORY,
            description=(
                "Makes each sampling step of a Wan model cheaper by computing only a part of the "
                "picture's tokens in it (preset 'paper' is TAPE, arXiv 2605.17837; 'auto' is what "
                "WanTrim does). Training-free; stacks with 4-step LoRAs. Place it after the LoRA and "
                "before ModelSamplingSD3; on Wan 2.2 one per expert, and in place of 'auto' WanTrim "
                "Pair. The video will change; prune ratio 0 changes nothing at all."
            ),
            search_aliases=[
                "TAPE",
                "token pruning",
                "token merging",
                "wan speed",
                "accelerate wan",
            ],
            # else ComfyUI takes equal nodes for one, and the live map is drawn on the other
            not_idempotent=True,
            inputs=[
                model_input(),
                prune_input(
                    MAX_PRUNE,
                    "Mean share of the tokens left out: with 'auto' of the whole run, with 'paper' of "
                    "the blocks that leave any out. 0 is off and bit-exact. The paper uses 0.20 "
                    "(mild), 0.30 and 0.40 (strong).",
                ),
                io.DynamicCombo.Input(
                    "preset",
                    options=[
                        io.DynamicCombo.Option(AUTO, []),
                        io.DynamicCombo.Option(PAPER, []),
                        io.DynamicCombo.Option(CUSTOM, CUSTOM_INPUTS),
                    ],
                    tooltip=(
                        "'auto': solved for the run as WanTrim does it: whole steps, steps on the "
                        "tokens that still change, and repeated ones. 'paper': TAPE, with sampled "
                        "attention. 'custom': TAPE with numbers of your own."
                    ),
                ),
                *percent_inputs("leaving out"),
            ],
            outputs=[planned_output()],
        )

    @classmethod
    def execute(
        cls,
        model,
        prune_ratio: float,
        start_percent: float,
        end_percent: float,
        preset: dict | str | None = None,
    ) -> io.NodeOutput:
        check_variant(model, NAME)
        check_range(NAME, "prune_ratio", prune_ratio, MAX_PRUNE)
        check_range(NAME, "start_percent", start_percent, 1)
        check_range(NAME, "end_percent", end_percent, 1)
        if start_percent > end_percent:
            raise ValueError(
                f"{NAME}: start_percent ({start_percent}) is after end_percent ({end_percent}); "
                "swap them"
            )
        # ComfyUI hands over the choice with its inputs, a linked one bare, an unknown one not at all
        name = preset["preset"] if isinstance(preset, dict) else preset
        window = {"start": start_percent, "end": end_percent}
        if name == AUTO:
            dial = Dial(1.0 / (1.0 - prune_ratio), **window)
            present = attachment_of(model)
            if present is None:
                return io.NodeOutput(attach(model, TrimPlan(), dial))
            if dial.off or (present.dial is not None and present.dial.final):
                # takes nothing from a speed-up that is there, and a final render stays one
                return io.NodeOutput(attach_part(model, tokens=None))
            plan = replace(present.plan, tokens=None)
            return io.NodeOutput(attach(model, plan, dial, present.place))
        try:
            tokens = _plan(name, preset, 1.0 - prune_ratio, window)
        except ValueError as error:
            raise ValueError(f"{NAME}: {error}") from error
        return io.NodeOutput(attach_part(model, tokens=tokens))


def _plan(name: str | None, preset, keep_ratio: float, window: dict[str, float]) -> TokenPlan:
    if name == PAPER:
        return paper_plan(keep_ratio, **window)
    if name != CUSTOM or not isinstance(preset, dict):
        raise ValueError(
            f"preset: expected one of {', '.join(PRESETS)}, got {name or 'none of them'}. "
            "Choose one at the node: the workflow may be from another version of WanTrim, and "
            "'custom' cannot be linked"
        )
    return TokenPlan(
        Schedule(keep_ratio, preset["schedule"]),
        reselect_every=preset["reselect_every"],
        alpha=preset["alpha"],
        anchor=preset["anchor_given_frames"],
        **window,
    )


NODES = [WanTrimTokens]
