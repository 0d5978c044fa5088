"""The one dial: a wanted speed-up, for a model or for both experts of Wan2.2."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..hosts.comfyui.attach import attach, attachment_of
from ..hosts.comfyui.profiling import check_profile
from ..hosts.comfyui.variants import check_variant
from ..hosts.profiling import ProfileFile
from ..hosts.session import TrimPlan
from ..methods.dial import HIGH, LOW, MAX_DENSE_STEPS, MAX_SPEEDUP, Dial
from ..methods.mixes import AUTO, PRIORITIES
from .profile import ProfileSocket

CATEGORY = "model/patch/wan"
NAME, PAIR = "WanTrim", "WanTrim Pair"
DRAFT, FINAL = "draft", "final"
DEFAULT_SPEEDUP = 1.5


def _dials(pair: bool) -> list:
    """The inputs that both nodes have, in their order."""
    first, last = ("high", "low") if pair else ("this", "this")
    whose = "both experts together" if pair else "the whole run"
    return [
        io.Float.Input(
            "speedup",
            default=DEFAULT_SPEEDUP,
            min=1.0,
            max=MAX_SPEEDUP,
            step=0.05,
            round=0.01,
            display_mode=io.NumberDisplay.slider,
            tooltip=(
                f"How much less {whose} should compute, in FLOPs. 1 is off and bit-exact. Seconds "
                "follow on large videos, less so on small ones. What cannot be reached is said in "
                "the log and in WanTrim Report."
            ),
        ),
        io.Combo.Input(
            "priority",
            options=list(PRIORITIES),
            default=AUTO,
            tooltip=(
                "What to spare. 'motion': the early steps, which decide it. 'detail': the late "
                "steps, which draw it. 'balanced': neither. 'auto': detail when the video begins "
                "with a given image, else motion"
                + (
                    ". Both experts take the same."
                    if pair
                    else "; balanced where they cannot reach the speedup."
                )
            ),
        ),
        io.Combo.Input(
            "render",
            options=[DRAFT, FINAL],
            default=DRAFT,
            tooltip=(
                "'draft': trimmed. 'final': the same seed with the untouched model, whatever other "
                "WanTrim nodes are on it."
            ),
        ),
        io.Int.Input(
            "dense_first_steps",
            default=1,
            min=0,
            max=MAX_DENSE_STEPS,
            advanced=True,
            tooltip=(
                f"Steps at the beginning of {first} model's sampling that compute everything. Later "
                "steps repeat parts of the last of them, so that 0 is hardly less than 1."
            ),
        ),
        io.Int.Input(
            "dense_last_steps",
            default=0,
            min=0,
            max=MAX_DENSE_STEPS,
            advanced=True,
            tooltip=f"Steps at the end of {last} model's sampling that compute everything.",
        ),
    ]


class WanTrim(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrim",
            display_name=NAME,
            category=CATEGORY,
            description=(
                "Makes the sampling of a Wan model cheaper by the factor that you ask for. What is "
                "trimmed is solved when sampling begins, for your model, size and steps: tokens, "
                "and with a profile blocks and attention heads too. No training; stacks with 4-step "
                "LoRAs. Place it after the LoRA and before ModelSamplingSD3. The video will change; "
                "speedup 1 changes nothing at all."
            ),
            search_aliases=[
                "wan speed",
                "accelerate wan",
                "speedup",
                "faster video",
                "TAPE",
                "PARE",
            ],
            # else ComfyUI takes equal nodes for one, and the live map is drawn on the other
            not_idempotent=True,
            inputs=[
                io.Model.Input("model", tooltip="A Wan 2.1 or 2.2 model, after its LoRAs."),
                ProfileSocket.Input(
                    "profile",
                    optional=True,
                    tooltip=(
                        "From WanTrim Load Profile, of this very model: then blocks and attention "
                        "heads are trimmed too. Without one only tokens are."
                    ),
                ),
                *_dials(pair=False),
            ],
            outputs=[io.Model.Output(tooltip="The model with the wish on it.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        speedup: float,
        priority: str,
        render: str,
        dense_first_steps: int,
        dense_last_steps: int,
        profile: ProfileFile | None = None,
    ) -> io.NodeOutput:
        check_variant(model, NAME)
        dial = _dial(
            NAME,
            render,
            speedup=speedup,
            priority=priority,
            dense_first_steps=dense_first_steps,
            dense_last_steps=dense_last_steps,
            profile=_profile(model, profile, NAME),
        )
        return io.NodeOutput(_with_dial(model, dial))


class WanTrimPair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimPair",
            display_name=PAIR,
            category=CATEGORY,
            description=(
                "One speed-up for both experts of Wan 2.2 14B, split by the steps that each one "
                "does. Place it after the LoRAs and before each ModelSamplingSD3. The first step of "
                "each expert computes everything, so that 2 + 2 steps reach about 1.6x. The video "
                "will change; speedup 1 changes nothing at all."
            ),
            search_aliases=["wan 2.2", "high noise", "low noise", "wan speed", "two experts"],
            not_idempotent=True,
            inputs=[
                io.Model.Input(
                    "model_high_noise", tooltip="The high noise expert, after its LoRAs."
                ),
                io.Model.Input("model_low_noise", tooltip="The low noise expert, after its LoRAs."),
                ProfileSocket.Input(
                    "profile_high_noise",
                    optional=True,
                    tooltip="From WanTrim Load Profile, of the high noise expert.",
                ),
                ProfileSocket.Input(
                    "profile_low_noise",
                    optional=True,
                    tooltip="From WanTrim Load Profile, of the low noise expert.",
                ),
                *_dials(pair=True),
                io.Float.Input(
                    "boundary",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.005,
                    round=0.001,
                    advanced=True,
                    tooltip=(
                        "Sigma at which the samplers change experts. 0 is automatic: where the steps "
                        "of each sampler end and begin. Wan's own are 0.875 for text to video and "
                        "0.9 for image to video."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "high",
                    display_name="high_noise",
                    tooltip="The high noise expert with the wish on it.",
                ),
                io.Model.Output(
                    "low",
                    display_name="low_noise",
                    tooltip="The low noise expert with the wish on it.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model_high_noise,
        model_low_noise,
        speedup: float,
        priority: str,
        render: str,
        dense_first_steps: int,
        dense_last_steps: int,
        boundary: float,
        profile_high_noise: ProfileFile | None = None,
        profile_low_noise: ProfileFile | None = None,
    ) -> io.NodeOutput:
        models = (model_high_noise, model_low_noise)
        for model in models:
            check_variant(model, PAIR)
        if model_high_noise.model is model_low_noise.model:
            raise ValueError(
                f"{PAIR}: 'model_high_noise' and 'model_low_noise' are the same model. Connect the "
                "two experts of Wan 2.2, or use WanTrim for a single model."
            )
        given = (profile_high_noise, profile_low_noise)
        profiles = [_profile(model, file, PAIR) for model, file in zip(models, given, strict=True)]
        options = {
            "speedup": speedup,
            "priority": priority,
            "dense_first_steps": dense_first_steps,
            "dense_last_steps": dense_last_steps,
            "boundary": boundary,
        }
        high, low = profiles
        dials = (
            _dial(PAIR, render, **options, expert=HIGH, profile=high, partner=low),
            _dial(PAIR, render, **options, expert=LOW, profile=low, partner=high),
        )
        return io.NodeOutput(*map(_with_dial, models, dials))


def _profile(model, file: ProfileFile | None, node: str):
    if file is None:
        return None
    check_profile(model, file.profile, node)
    return file.profile


def _dial(node: str, render: str, **options) -> Dial:
    # a linked value passes by what ComfyUI checks
    if render not in (DRAFT, FINAL):
        raise ValueError(f"{node}: render: expected {DRAFT} or {FINAL}, got {render!r:.60}")
    try:
        return Dial(final=render == FINAL, **options)
    except ValueError as error:
        raise ValueError(f"{node}: {error}") from error


def _with_dial(model, dial: Dial):
    """The parts that expert nodes put on the model stay, and win."""
    present = attachment_of(model)
    return attach(model, replace(present.plan if present else TrimPlan(), dial=dial))


NODES = [WanTrim, WanTrimPair]
