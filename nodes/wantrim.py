"""The one dial: a wanted speed-up, for a model or for both experts of Wan 2.2."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..hosts.comfyui.attach import attach_dials
from ..hosts.comfyui.dial import PLACES
from ..hosts.comfyui.profiling import check_profile
from ..hosts.comfyui.variants import check_variant
from ..profiles.recorder import ProfileFile
from ..solve.dial import HIGH, LOW, MAX_DENSE_STEPS, MAX_SPEEDUP, Dial
from ..solve.tuned import Tuned, of_both
from . import inputs
from .inputs import check_choice, check_range, model_input
from .profile import ProfileSocket

log = logging.getLogger(__name__)
CATEGORY = "model/patch/wan"
NAME, PAIR = "WanTrim", "WanTrim Pair"
DRAFT, FINAL = "draft", "final"
DEFAULT_SPEEDUP = 1.5


def _dials(pair: bool) -> list:
    """The inputs that both nodes have, in their order."""
    first, last = ("high", "low") if pair else ("this", "this")
    whose = "both experts together" if pair else "the run"
    most = "With 4 steps ask for 2 at most, with 6 for 3: beyond half the number of steps no video comes."
    if pair:
        most = "With 2 + 2 steps 1.33 and 2 can be reached, and nothing else."
    return [
        inputs.number(
            "speedup",
            DEFAULT_SPEEDUP,
            (1.0, MAX_SPEEDUP, 0.05),
            f"How many times less {whose} should compute. 1 is off and bit-exact. {most} "
            "Seconds follow on large videos, less so on small ones. The node says what was "
            "reached.",
            slider=True,
            round=0.01,
        ),
        inputs.choice(
            "render",
            [DRAFT, FINAL],
            "'draft': trimmed. 'final': the same seed with the untouched model, whatever other "
            "WanTrim nodes are on it.",
        ),
        inputs.number(
            "dense_first_steps",
            1,
            (0, MAX_DENSE_STEPS),
            f"Steps at the beginning of {first} model's sampling that compute everything. The "
            "first one does in any case.",
            advanced=True,
        ),
        inputs.number(
            "dense_last_steps",
            0,
            (0, MAX_DENSE_STEPS),
            f"Steps at the end of {last} model's sampling that compute everything.",
            advanced=True,
        ),
        inputs.choice(
            "context",
            PLACES,
            "Memory for steps that compute only a part of the picture. 'auto': on the GPU where there "
            "is room, else in RAM. 'cpu': in RAM. 'off': no such steps, each is whole or repeated, as "
            "where there is no room.",
            advanced=True,
        ),
    ]


def _profile(name: str, whose: str):
    """The input that takes a profile with runs to go by."""
    return ProfileSocket.Input(
        name,
        optional=True,
        tooltip=(
            f"From WanTrim Load Profile: runs of {whose} that WanTrim Profile recorded or WanTrim "
            "Verdict tried. A run like one of them goes by it, and says so."
        ),
    )


class WanTrim(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrim",
            display_name=NAME,
            category=CATEGORY,
            description=(
                "Makes the sampling of a Wan model cheaper by the factor that you ask for. When "
                "sampling begins it is solved what each step is worth: everything, a part of the "
                "picture, or nothing: then the video goes on as it was moving. No training; stacks "
                "with 4-step LoRAs. Place it after the LoRA and before ModelSamplingSD3. The video "
                "will change; speedup 1 changes nothing at all."
            ),
            search_aliases=[
                "accelerate wan",
                "wan speed",
                "speedup",
                "faster video",
                "TAPE",
                "PARE",
            ],
            # else ComfyUI takes equal nodes for one, and the live map is drawn on the other
            not_idempotent=True,
            inputs=[
                model_input(),
                *_dials(pair=False),
                _profile("profile", "this model"),
            ],
            outputs=[io.Model.Output(tooltip="The model, ready for ModelSamplingSD3.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        speedup: float,
        render: str,
        dense_first_steps: int,
        dense_last_steps: int,
        context: str = PLACES[0],
        profile: ProfileFile | None = None,
    ) -> io.NodeOutput:
        check_variant(model, NAME)
        steps = {"dense_first_steps": dense_first_steps, "dense_last_steps": dense_last_steps}
        tuned = _tuned(NAME, "profile", model, profile)
        dial = _dial(NAME, render, context, speedup=speedup, tuned=tuned, **steps)
        return io.NodeOutput(*attach_dials([model], [dial], context))


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
                "each expert computes everything, so that 2 + 2 steps can be 1.33x or 2x, nothing "
                "between. The video will change; speedup 1 changes nothing at all."
            ),
            search_aliases=["wan 2.2", "high noise", "low noise", "wan speed", "two experts"],
            not_idempotent=True,
            inputs=[
                io.Model.Input(
                    "model_high_noise", tooltip="The high noise expert, after its LoRAs."
                ),
                io.Model.Input("model_low_noise", tooltip="The low noise expert, after its LoRAs."),
                *_dials(pair=True),
                inputs.number(
                    "boundary",
                    0.0,
                    (0.0, 0.99, 0.005),
                    "Sigma at which the samplers change experts. 0 is automatic: where the steps "
                    "of each sampler end and begin. Wan's own are 0.875 for text to video and "
                    "0.9 for image to video.",
                    round=0.001,
                    advanced=True,
                ),
                _profile("profile_high_noise", "the high noise expert"),
                _profile("profile_low_noise", "the low noise expert"),
            ],
            outputs=[
                io.Model.Output(
                    "high",
                    display_name="high_noise",
                    tooltip="The high noise expert, ready for ModelSamplingSD3.",
                ),
                io.Model.Output(
                    "low",
                    display_name="low_noise",
                    tooltip="The low noise expert, ready for ModelSamplingSD3.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model_high_noise,
        model_low_noise,
        speedup: float,
        render: str,
        dense_first_steps: int,
        dense_last_steps: int,
        boundary: float,
        context: str = PLACES[0],
        profile_high_noise: ProfileFile | None = None,
        profile_low_noise: ProfileFile | None = None,
    ) -> io.NodeOutput:
        models = (model_high_noise, model_low_noise)
        for name, model in zip(("model_high_noise", "model_low_noise"), models, strict=True):
            check_variant(model, PAIR, given=name)
        if model_high_noise.model is model_low_noise.model:
            raise ValueError(
                f"{PAIR}: 'model_high_noise' and 'model_low_noise' are the same model. Connect the "
                "two experts of Wan 2.2, or use WanTrim for a single model."
            )
        options = {
            "speedup": speedup,
            "dense_first_steps": dense_first_steps,
            "dense_last_steps": dense_last_steps,
            "boundary": boundary,
        }
        tuned = of_both(
            _tuned(PAIR, "profile_high_noise", model_high_noise, profile_high_noise),
            _tuned(PAIR, "profile_low_noise", model_low_noise, profile_low_noise),
        )
        dials = [
            _dial(PAIR, render, context, **options, expert=expert, tuned=runs)
            for expert, runs in zip((HIGH, LOW), tuned, strict=True)
        ]
        return io.NodeOutput(*attach_dials(models, dials, context))


def _tuned(node: str, name: str, model, profile: ProfileFile | None) -> tuple[Tuned, ...]:
    """The runs that a profile of this model holds, tried or recorded."""
    if profile is None:
        return ()
    check_profile(model, profile.profile, node, name)
    runs, unread = [], None
    for one in profile.profile.tuned:
        try:
            runs.append(Tuned.from_json(one))
        except ValueError as error:
            # of a later version, or damaged: the others are none the worse
            unread = error
            log.warning("%s: %s: a run in it cannot be read: %s", node, name, error)
    if not runs:
        why, then = "it holds no whole run", "with WanTrim Profile and no other WanTrim node"
        if unread is not None:
            why, then = f"the run in it cannot be read ({unread})", "anew, update WanTrim"
        raise ValueError(f"{node}: {name}: {why}. Record one {then}, or take it off")
    return tuple(runs)


def _dial(node: str, render: str, context: str, **options) -> Dial:
    check_choice(node, "render", render, (DRAFT, FINAL))
    check_choice(node, "context", context, PLACES)
    check_range(node, "speedup", options["speedup"], MAX_SPEEDUP, 1)
    try:
        return Dial(final=render == FINAL, **options)
    except ValueError as error:
        raise ValueError(f"{node}: {error}") from error


NODES = [WanTrim, WanTrimPair]
