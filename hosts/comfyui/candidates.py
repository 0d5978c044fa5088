"""Which candidates a trial has: whole, the solver's plan and its neighbours, a step cache, fewer steps."""

from __future__ import annotations

from ...methods.role_plan import RolePlan
from ...solve.dial import HIGH, LOW, Dial
from ...solve.variants import PLAN, Variant, variants
from .attach import attach_dials, attach_part, detach
from .attachment import attachment_of
from .easycache import easycache_node, with_easycache, without_caches
from .live import running_node
from .profiling import fingerprint_of
from .slim import slim_header
from .trial import CACHE, STEPS, WHOLE, Candidate, Trial
from .trial_wrappers import enter

ALONE = "this"
# how many neighbours a trial has, in an artist's words
FEW, ALL = "few", "all"


def make_trial(
    models: dict[str, object], wanted: float, steps: int, change_at: int, which: str
) -> Trial:
    """A trial of these MODELs.

    Args:
        models: by part: one under `ALONE`, or both experts under HIGH and LOW.
        steps: of the whole run, both experts together.
        change_at: first step of the low noise expert; 0 is half way.
        which: FEW or ALL.
    """
    trial = Trial(tuple(models), wanted, node=running_node())
    for part, model in models.items():
        trial.fingerprints[part] = fingerprint_of(model)
        trial.classes[part] = type(model.model.diffusion_model).__name__
    change_at = change_at or max(1, steps // 2)
    plain = {part: without_caches(model) for part, model in models.items()}
    if any(plain[part] is not model for part, model in models.items()):
        trial.notes.append(
            "EasyCache or LazyCache on this model was taken off for the trial: take it off the model "
            "that goes into WanTrim Candidates"
        )
    models = plain
    bare = {part: detach(model) for part, model in models.items()}

    def add(name: str, label: str, made: dict, *, count=steps, at=change_at) -> None:
        enter(trial, Candidate(name, label, count, at), made)

    experts = [part if part in (HIGH, LOW) else None for part in models]
    decided = any(map(_decides_heads, models.values()))
    add(WHOLE, "whole", bare)
    for one in variants(wanted):
        if (which == FEW and one.name != PLAN) or (one.heads is not None and decided):
            continue
        on = [model if one.heads is None else _by_roles(model, one) for model in models.values()]
        dials = [Dial(one.speedup, dense_first_steps=1, expert=expert) for expert in experts]
        made = attach_dials(on, dials, "auto" if one.context else "off")
        for attachment in map(attachment_of, made):
            # a node cannot show all of them, and the last one is not the trial
            attachment.nodes = ()
        add(one.name, one.label, dict(zip(models, made, strict=True)))
    if easycache_node() is None:
        trial.notes.append("this ComfyUI has no EasyCache that can be imported: it is left out")
    else:
        add(CACHE, "EasyCache", {part: with_easycache(model) for part, model in bare.items()})
    fewer = max(len(models), round(steps / wanted))
    if fewer >= steps:
        trial.notes.append(f"{steps} steps are too few for fewer steps at {wanted:g}x: left out")
    else:
        at = min(fewer - 1, max(1, round(fewer * change_at / steps))) if fewer > 1 else 0
        add(STEPS, f"{fewer} steps", bare, count=fewer, at=at)
    return trial


def _decides_heads(model) -> bool:
    """Whether a MODEL's heads are cut, or another node decides them."""
    present = attachment_of(model)
    return slim_header(model) is not None or (present is not None and present.plan.trims_heads)


def _by_roles(model, variant: Variant):
    """A clone of a MODEL whose heads run in patterns that are found in the run."""
    heads = model.model.diffusion_model.num_heads
    return attach_part(model, heads=RolePlan(variant.heads, heads))
