"""The node that leaves tokens out of the computation (TAPE, arXiv 2605.17837)."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..hosts.comfyui.attach import attach, attachment_of
from ..hosts.comfyui.variants import check_tokens
from ..hosts.session import TrimPlan
from ..methods.importance import IMPORTANCE
from ..methods.schedule import DIRECTIONS, Schedule
from ..methods.tokens import TokenPlan

CATEGORY = "model/patch/wan"
NAME = "WanTrim Tokens"
MAX_PRUNE = 0.8
# shown to artists -> name in the plan
DROPPED_KV = {"leave out": "leave", "keep": "keep"}


class WanTrimTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimTokens",
            display_name=NAME,
            category=CATEGORY,
            description=(
                "Makes each sampling step of a Wan model cheaper by computing only the most "
                "important part of the picture in most blocks (TAPE, arXiv 2605.17837). Training-free; "
                "stacks with 4-step LoRAs. Place it after the LoRA and before ModelSamplingSD3, one "
                "per expert on Wan2.2. The video will change; prune ratio 0 changes nothing at all."
            ),
            search_aliases=[
                "TAPE",
                "token pruning",
                "token merging",
                "wan speed",
                "accelerate wan",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A Wan 2.1 or 2.2 model, after its LoRAs."),
                io.Float.Input(
                    "prune_ratio",
                    default=0.30,
                    min=0.0,
                    max=MAX_PRUNE,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=(
                        "Mean share of the tokens left out. 0 is off and bit-exact. The paper uses "
                        "0.20 (mild), 0.30 and 0.40 (strong)."
                    ),
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(DIRECTIONS),
                    default="falling",
                    tooltip=(
                        "How the prune ratio moves over the run, 0.10 to either side of the mean. "
                        "'falling' is the paper's: prunes most in the early, noisy steps. 'rising' "
                        "spares the early steps, which decide the motion. 'constant' does neither."
                    ),
                ),
                io.Int.Input(
                    "reselect_every",
                    default=10,
                    min=1,
                    max=40,
                    advanced=True,
                    tooltip=(
                        "Blocks between two choices of tokens; the choosing block runs on all of "
                        "them. Paper: 10 (of 40 blocks). 1 computes everything."
                    ),
                ),
                io.Float.Input(
                    "alpha",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip=(
                        "Smoothing over time: weight of a latent frame's own importance against the "
                        "one before it. Paper: 0.5. 1 is no smoothing."
                    ),
                ),
                io.Combo.Input(
                    "importance",
                    options=list(IMPORTANCE),
                    default="attention",
                    advanced=True,
                    tooltip=(
                        "What makes a token important. 'attention' (how much attention it receives) "
                        "is the paper's; the others are cheaper controls."
                    ),
                ),
                io.Combo.Input(
                    "dropped_keys_values",
                    options=list(DROPPED_KV),
                    default="leave out",
                    advanced=True,
                    tooltip=(
                        "'leave out': dropped tokens cannot be attended to either (paper, fastest). "
                        "'keep': they can, at the cost of their projections (safer)."
                    ),
                ),
                io.Boolean.Input(
                    "anchor_given_frames",
                    default=True,
                    advanced=True,
                    tooltip=(
                        "Never drop tokens of latent frames that are given: the start image, the end "
                        "image, references. Not studied in the paper; leave on."
                    ),
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Progress of the whole run (both experts) at which dropping starts.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Progress of the whole run (both experts) at which dropping ends.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the plan on it.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        prune_ratio: float,
        schedule: str,
        reselect_every: int,
        alpha: float,
        importance: str,
        dropped_keys_values: str,
        anchor_given_frames: bool,
        start_percent: float,
        end_percent: float,
    ) -> io.NodeOutput:
        check_tokens(model, NAME)
        if not 0.0 <= prune_ratio <= MAX_PRUNE:
            raise ValueError(f"{NAME}: prune_ratio: expected 0 to {MAX_PRUNE}, got {prune_ratio}")
        if start_percent > end_percent:
            raise ValueError(
                f"{NAME}: start_percent ({start_percent}) is after end_percent ({end_percent}); "
                "swap them"
            )
        try:
            tokens = TokenPlan(
                Schedule(1.0 - prune_ratio, schedule),
                reselect_every=reselect_every,
                alpha=alpha,
                importance=importance,
                dropped_kv=DROPPED_KV.get(dropped_keys_values, dropped_keys_values),
                anchor=anchor_given_frames,
                start=start_percent,
                end=end_percent,
            )
        except ValueError as error:
            raise ValueError(f"{NAME}: {error}") from error
        present = attachment_of(model)
        plan = replace(present.plan if present else TrimPlan(), tokens=tokens)
        return io.NodeOutput(attach(model, plan))


NODES = [WanTrimTokens]
