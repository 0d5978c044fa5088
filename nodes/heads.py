"""The node that gives each attention head what its role is worth (PARE, arXiv 2605.27336)."""

from __future__ import annotations

from comfy_api.latest import io

from ..hosts.comfyui.attach import attach_part
from ..hosts.comfyui.profiling import check_profile, model_fingerprint
from ..hosts.comfyui.slim import refuse_slim
from ..hosts.comfyui.variants import check_variant
from ..methods.attend import attention_share
from ..methods.grid import TokenGrid
from ..methods.heads import OFF, HeadPlan
from ..methods.role_plan import RolePlan
from ..profiles.profile import Profile
from ..profiles.recorder import ProfileFile
from ..slim.width import pare_heads
from . import inputs
from .inputs import check_choice, check_range, model_input, planned_output, prune_input, text_output
from .profile import ProfileSocket

NAME = "WanTrim Heads"
MAX_PRUNE = 0.9
DEMOTE, PAPER = "demote", "paper"
METHODS = (DEMOTE, PAPER)


class WanTrimHeads(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimHeads",
            display_name=NAME,
            category="model/patch/wan",
            description=(
                "Gives each attention head of a Wan model only the attention that its role needs: "
                "its own latent frame, or a tile of the picture through all frames (PARE, arXiv "
                "2605.27336, and beyond). Roles are measured in the run's own whole steps, and what "
                "a head then misses is given back to each latent frame as its mean. No training; "
                "works with LoRAs, fp8 and WanTrim Tokens. Place it after the LoRA and before "
                "ModelSamplingSD3, one per expert on Wan 2.2. The video will change; prune ratio 0 "
                "changes nothing at all."
            ),
            search_aliases=[
                "PARE",
                "head pruning",
                "attention heads",
                "sparse attention",
                "wan speed",
            ],
            # else ComfyUI takes equal nodes for one, and the live map is drawn on the other
            not_idempotent=True,
            inputs=[
                model_input(),
                ProfileSocket.Input(
                    "profile",
                    optional=True,
                    tooltip=(
                        "From WanTrim Load Profile: what was measured about this model. Only method "
                        "'paper' needs it; 'demote' measures in each run's own steps, the first of "
                        "which computes all attention."
                    ),
                ),
                prune_input(
                    MAX_PRUNE,
                    "Share of self-attention that is not computed; with 'paper', of the heads. 0 is "
                    "off and bit-exact. The paper drops 0.30 of the heads, and then trains the model "
                    "again.",
                ),
                inputs.choice(
                    "method",
                    METHODS,
                    "'demote': a head keeps to its own latent frame, or to a tile of the picture "
                    "through all frames, before it is dropped. 'paper': PARE's rule, equally many "
                    "heads off in every block; needs a profile.",
                ),
            ],
            outputs=[planned_output(), text_output("What the heads will do.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        profile: ProfileFile | None = None,
        prune_ratio: float = 0.3,
        method: str = DEMOTE,
    ) -> io.NodeOutput:
        check_variant(model, NAME, "trim the heads of")
        refuse_slim(model, NAME)
        if profile is not None:
            check_profile(model, profile.profile, NAME)
        check_range(NAME, "prune_ratio", prune_ratio, MAX_PRUNE)
        check_choice(NAME, "method", method, METHODS)
        if method == DEMOTE:
            heads = model_fingerprint(model.model.diffusion_model).num_heads
            plan = RolePlan(1 - prune_ratio, heads)
            return io.NodeOutput(attach_part(model, heads=plan), _online_text(prune_ratio, profile))
        if profile is None:
            raise ValueError(
                f"{NAME}: method '{method}' drops heads by their importance, which only a "
                f"profile tells: connect WanTrim Load Profile, or choose '{DEMOTE}'"
            )
        size = _size(profile.profile)
        try:
            plan = pare_plan(profile.profile, prune_ratio)
        except ValueError as error:
            raise ValueError(f"{NAME}: {error}") from error
        return io.NodeOutput(attach_part(model, heads=plan), _text(plan, *size))


def pare_plan(profile: Profile, prune_ratio: float) -> HeadPlan:
    """PARE's heads, as many in every block; at prune ratio 0 all."""
    model = profile.model
    if prune_ratio == 0:
        return HeadPlan.full(model.num_blocks, model.num_heads)
    kept = (pare_heads(profile, prune_ratio, kind=kind) for kind in ("self", "cross"))
    return HeadPlan.keeping(model.num_heads, *kept)


def _size(profile: Profile) -> tuple[TokenGrid, int]:
    """Token grid and keys of cross-attention in the last recorded run; costs depend on them."""
    run = profile.runs[-1] if profile.runs else {}
    sizes, context = run.get("grid"), run.get("context_tokens")
    known = isinstance(sizes, list) and len(sizes) == 3
    if not known or not all(type(n) is int and 0 < n < 1 << 16 for n in (*sizes, context)):
        raise ValueError(
            f"{NAME}: profile: expected one that says how large the recorded video was, got "
            f"{sizes!r:.60}. Record one with WanTrim Profile."
        )
    return TokenGrid(*sizes), context


def _online_text(prune_ratio: float, profile: ProfileFile | None) -> str:
    if prune_ratio == 0:
        return "Prune ratio 0: every head computes all of its attention."
    return (
        "The first step of each run computes all attention and measures what every head needs; "
        f"from the second on {1 - prune_ratio:.0%} of self-attention is left. WanTrim Report says "
        "what the heads did."
    ) + ("" if profile is None else f" The profile is not used: only method '{PAPER}' needs it.")


def _text(plan: HeadPlan, grid: TokenGrid, context: int) -> str:
    lines = [
        f"Attention left at {grid.frames} latent frames of {grid.height} x {grid.width} tokens: "
        f"{attention_share(plan, grid, context):.1%}",
        "heads that are off, in self- and in cross-attention:",
    ]
    pairs = zip(plan.self_attention, plan.cross_attention, strict=True)
    lines += [f"block {i}: {a.count(OFF)}, {b.count(OFF)}" for i, (a, b) in enumerate(pairs)]
    return "\n".join(lines)


NODES = [WanTrimHeads]
