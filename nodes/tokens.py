"""The node that leaves tokens out of the computation (TAPE, arXiv 2605.17837)."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..hosts.comfyui.attach import attach, attachment_of
from ..hosts.comfyui.variants import check_variant
from ..hosts.session import TrimPlan
from ..methods.importance import IMPORTANCE
from ..methods.presets import PRESETS, preset_plan
from ..methods.restore import RESTORE
from ..methods.schedule import DIRECTIONS, Schedule
from ..methods.tokens import TokenPlan

CATEGORY = "model/patch/wan"
NAME = "WanTrim Tokens"
MAX_PRUNE = 0.8
CUSTOM = "custom"
# shown to artists -> name in the plan
DROPPED_KV = {"leave out": "leave", "keep": "keep"}
# words of the plan -> words of the node, where they differ
WORDS = {
    "restore": "dropped_tokens_get",
    "trim_reselecting": "trim_choosing_block",
    "leave that block whole": "turn trim_choosing_block off",
}
# of all mixtures, those that are worth a place in the list
MIXTURES = ("velocity_change+rotation", "attention+rotation")


CUSTOM_INPUTS = [
    io.Combo.Input(
        "schedule",
        options=list(DIRECTIONS),
        default="constant",
        tooltip=(
            "How the prune ratio moves over the run, 0.10 to either side of the mean. 'falling' is "
            "the paper's: prunes most in the early, noisy steps. 'rising' spares the early steps, "
            "which decide the motion. 'constant' does neither."
        ),
    ),
    io.Combo.Input(
        "importance",
        options=[*IMPORTANCE, *MIXTURES],
        default="velocity_change+rotation",
        tooltip=(
            "What makes a token worth computing. 'attention' (how much attention it receives) is the "
            "paper's; 'velocity_change' computes what still changes from step to step; 'rotation' "
            "takes what was left out longest; '+' mixes two."
        ),
    ),
    io.Float.Input(
        "alpha",
        default=0.5,
        min=0.0,
        max=1.0,
        step=0.05,
        tooltip=(
            "Smoothing over time: weight of a latent frame's own importance against the one before "
            "it. Paper: 0.5. 1 is no smoothing."
        ),
    ),
    io.Combo.Input(
        "dropped_tokens_get",
        options=list(RESTORE),
        default="last_update",
        tooltip=(
            "'identity': nothing, they wait for the next choice (paper). 'frame_mean', 'nearest': "
            "what the computed tokens of their frame got. 'last_update', 'last_output': what they "
            "got when they were last computed, in an earlier step; needs memory."
        ),
    ),
    io.Int.Input(
        "reselect_every",
        default=40,
        min=1,
        max=100,
        tooltip=(
            "Blocks between two choices of tokens. Paper: 10 (of 40 blocks). As many as the model "
            "has blocks is one choice a step."
        ),
    ),
    io.Boolean.Input(
        "trim_choosing_block",
        default=True,
        tooltip=(
            "On: the block that chooses is trimmed too. Off: it runs on all tokens (paper); "
            "'attention', 'key_norm' and 'update_norm' need that."
        ),
    ),
    io.Combo.Input(
        "dropped_keys_values",
        options=list(DROPPED_KV),
        default="leave out",
        tooltip=(
            "'leave out': dropped tokens cannot be attended to either (paper, fastest). 'keep': "
            "they can, at the cost of their projections."
        ),
    ),
    io.Boolean.Input(
        "anchor_given_frames",
        default=True,
        tooltip=(
            "Never drop tokens of latent frames that are given: the start image, the end image, "
            "references. Not studied in the paper; leave on."
        ),
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
                "picture's tokens in it (token pruning; preset 'paper' is TAPE, arXiv 2605.17837). "
                "Training-free; stacks with 4-step LoRAs. Place it after the LoRA and before "
                "ModelSamplingSD3, one per expert on Wan2.2. The video will change; prune ratio 0 "
                "changes nothing at all."
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
                io.Model.Input("model", tooltip="A Wan 2.1 or 2.2 model, after its LoRAs."),
                io.Float.Input(
                    "prune_ratio",
                    default=0.30,
                    min=0.0,
                    max=MAX_PRUNE,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=(
                        "Mean share of the tokens left out, in the steps that leave any out. 0 is "
                        "off and bit-exact. The paper uses "
                        "0.20 (mild), 0.30 and 0.40 (strong)."
                    ),
                ),
                io.DynamicCombo.Input(
                    "preset",
                    options=[
                        *(io.DynamicCombo.Option(name, []) for name in PRESETS),
                        io.DynamicCombo.Option(CUSTOM, CUSTOM_INPUTS),
                    ],
                    tooltip=(
                        "'refresh': each step computes the tokens that change most and those left "
                        "out longest; the others repeat their last update, after a first step that "
                        "computes all. 'auto': refresh with the first quarter of the run whole, or, "
                        "of a video that begins with a given image, with its end whole. Kept most "
                        "of all token plans on our toy bench with 20 steps. "
                        "'paper': TAPE exactly as published. 'custom': everything by hand."
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
        start_percent: float,
        end_percent: float,
        preset: dict | str | None = None,
    ) -> io.NodeOutput:
        check_variant(model, NAME)
        # a linked value passes by the ranges that ComfyUI checks
        given = (
            ("prune_ratio", prune_ratio, MAX_PRUNE),
            ("start_percent", start_percent, 1),
            ("end_percent", end_percent, 1),
        )
        for name, value, most in given:
            if not 0.0 <= value <= most:
                raise ValueError(f"{NAME}: {name}: expected 0 to {most}, got {value}")
        if start_percent > end_percent:
            raise ValueError(
                f"{NAME}: start_percent ({start_percent}) is after end_percent ({end_percent}); "
                "swap them"
            )
        try:
            tokens = _plan(preset, 1.0 - prune_ratio, start=start_percent, end=end_percent)
        except ValueError as error:
            raise ValueError(f"{NAME}: {_shown(str(error))}") from error
        present = attachment_of(model)
        plan = replace(present.plan if present else TrimPlan(), tokens=tokens)
        return io.NodeOutput(attach(model, plan))


def _plan(preset: dict | str | None, keep_ratio: float, **window: float) -> TokenPlan:
    # ComfyUI hands over the choice with its inputs, a linked one bare, and an unknown one not at all
    name = preset["preset"] if isinstance(preset, dict) else preset
    if name in PRESETS:
        return preset_plan(name, keep_ratio, **window)
    if name != CUSTOM or not isinstance(preset, dict):
        raise ValueError(
            f"preset: expected one of {', '.join([*PRESETS, CUSTOM])}, got {name or 'none of them'}. "
            "Choose one at the node: the workflow may be from another version of WanTrim, and "
            "'custom' cannot be linked"
        )
    kept = preset["dropped_keys_values"]
    if kept not in DROPPED_KV:
        raise ValueError(
            f"dropped_keys_values: expected one of {', '.join(DROPPED_KV)}, got {kept!r}"
        )
    return TokenPlan(
        Schedule(keep_ratio, preset["schedule"]),
        reselect_every=preset["reselect_every"],
        alpha=preset["alpha"],
        importance=preset["importance"],
        dropped_kv=DROPPED_KV[kept],
        restore=preset["dropped_tokens_get"],
        trim_reselecting=preset["trim_choosing_block"],
        anchor=preset["anchor_given_frames"],
        **window,
    )


def _shown(message: str) -> str:
    """A message about a plan in the words of the node's inputs."""
    for word, shown in WORDS.items():
        message = message.replace(word, shown)
    return message


NODES = [WanTrimTokens]
