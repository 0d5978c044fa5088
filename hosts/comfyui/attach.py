"""Put a plan on a ComfyUI MODEL, and take it off.

The plan travels in `transformer_options`; two keyed wrappers read it. OUTER_SAMPLE makes the
engine of a run and drops it afterwards; DIFFUSION_MODEL asks it what this call does and replaces
the blocks in its own copy of the options. Three more live only in a run's copy of the options and
see to it that the conditional prompt decides, and that another node's answers are known as such.
Nothing of the model is touched or held.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

import comfy.model_management
import comfy.model_patcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ...engine.call import Call
from ...engine.compiled import paused, resumed
from ...engine.engine import COND, Engine, check_latent
from ...engine.plan import TrimPlan
from ...engine.record import Record
from ...slim.router import TrainedRouter
from ...solve.dial import Dial
from .attachment import KEY, Attachment, attachment_of, replaced_by
from .blocks import replace_blocks
from .compiled import bare, compiled_of
from .dial import Wish
from .given import (
    ModelCall,
    as_dict,
    attached,
    levels_of,
    orders_prompts,
    own_options,
    prompts_due,
)
from .live import Live, running_node
from .run import SESSION_KEY, SamplingRun, hook_strengths, mark_network
from .runs import Ran, Where, keep_run, runs_before
from .shape import clip_tokens, device_name, full_shape, wan_shape
from .slim import slim_header
from .variants import (
    NO_VELOCITY,
    anchored_frames,
    gives_velocity,
    sees_between_blocks,
    token_grid,
    why_not_now,
    why_not_patched,
)

log = logging.getLogger(__name__)


def attach(
    model,
    plan: TrimPlan,
    dial: Dial | None = None,
    place: str = "auto",
    video: list[Ran] | None = None,
):
    """A clone of a MODEL with `plan` and `dial` on it; what was there before is replaced."""
    patched = detach(model)
    present, node = attachment_of(model), running_node()
    nodes = [] if present is None else [one for one in present.nodes if one != node]
    nodes += [] if node is None else [node]
    attachment = Attachment(
        plan, dial, place, tuple(nodes), replaced_by(present, plan, dial), video
    )
    patched.model_options["transformer_options"][KEY] = attachment
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    if attachment.neutral:
        return patched
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _diffusion_model)
    if plan.trims_blocks and isinstance(plan.blocks.router, TrainedRouter):
        patched.set_additional_models(KEY, [_carried(plan.blocks.router.mlp)])
    return patched


def _carried(mlp: torch.nn.Module):
    """What the host moves a router's weights with; weights that outlive theirs it calls a leak."""
    if not hasattr(mlp, KEY):
        # the host's own kind: for any other it moves models out of the way that need not go
        carried = comfy.model_patcher.CoreModelPatcher(
            mlp,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )
        setattr(mlp, KEY, carried)
    return getattr(mlp, KEY)


def attach_part(model, **parts):
    """A clone of a MODEL with parts of its plan replaced, by their names in `TrimPlan`."""
    present = attachment_of(model)
    if present is None:
        return attach(model, TrimPlan(**parts))
    video = None if present.video is present.runs else present.video
    return attach(model, replace(present.plan, **parts), present.dial, present.place, video)


def attach_dials(models: Sequence, dials: Sequence[Dial], place: str) -> list:
    """Clones of both experts of a video, or of one model, with a dial each.

    Each knows what the other one did; the parts that other nodes put on them stay.
    """
    video, made = [] if len(models) > 1 else None, []
    for model, dial in zip(models, dials, strict=True):
        present = attachment_of(model)
        plan = TrimPlan() if present is None else present.plan
        made.append(attach(model, plan, dial, place, video))
    return made


def detach(model):
    """A clone of a MODEL without any plan on it."""
    clean = model.clone()
    clean.model_options["transformer_options"].pop(KEY, None)
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.DIFFUSION_MODEL):
        clean.remove_wrappers_with_key(kind, KEY)
    clean.remove_additional_models(KEY)
    return clean


def _outer_sample(executor, *args, **kwargs):
    guider = executor.class_obj
    original = guider.model_options
    attachment: Attachment | None = attached(original, KEY, "nothing is trimmed")
    if attachment is None:
        return executor(*args, **kwargs)
    record = Record(type(guider.model_patcher.model.diffusion_model).__name__)
    # noise, latent, sampler, sigmas
    sigmas = levels_of(args[3] if len(args) > 3 else kwargs.get("sigmas"))
    record.announced = tuple(sigmas[:-1])
    shift, completed = _shift(guider, record), False
    live = Live(record, attachment.nodes, sigmas, shift)
    plan = TrimPlan() if attachment.neutral else attachment.plan
    ran = Ran(record, Where.now(), expert=getattr(attachment.dial, "expert", None))
    run = SamplingRun(Engine(plan, record, live.step), shift, original, ran)
    try:
        with own_options(guider) as options:
            _prepare(run, attachment, guider, options)
            result = executor(*args, **kwargs)
        completed = True
        return result
    finally:
        run.close(completed, len(sigmas))
        earlier = runs_before(attachment.video, ran.where)
        live.end([one.record for one in earlier if one is not ran])


def _shift(guider, record: Record) -> float:
    shift = getattr(guider.model_patcher.get_model_object("model_sampling"), "shift", None)
    if shift is None:
        record.note("this model's sampling has no flow shift: the schedule follows sigma itself")
    return shift or 1.0


def _prepare(run: SamplingRun, attachment: Attachment, guider, options: dict) -> None:
    """Put a run into its own copy of a guider's options, with what is known of it before it begins."""
    record, ran, dial = run.engine.record, run.ran, attachment.dial
    record.planned = attachment.describe()
    header = slim_header(guider.model_patcher)
    record.width = None if header is None else header.width
    options["transformer_options"][SESSION_KEY] = run
    keep_run(attachment.runs, ran)
    if attachment.video is not attachment.runs:
        keep_run(attachment.video, ran)
    if dial is None or not dial.final:
        for remark in attachment.replaced:
            record.note(remark)
    if attachment.neutral:
        return
    run.wanted = True
    if not gives_velocity(guider.model_patcher):
        run.dense = f"{NO_VELOCITY}: nothing was left out"
    if dial is not None and not dial.off:
        place, rooms = attachment.place, attachment.rooms
        run.wish = Wish.of(dial, attachment.plan, place, rooms, guider, run.shift)
        earlier = runs_before(attachment.video, ran.where)
        run.wish.earlier = [one.came for one in earlier if one.came is not None]
    # last, so that what other packs do per batch of prompts is done once
    for kind, wrapper in (
        (WrappersMP.CALC_COND_BATCH, _calc_cond_batch),
        (WrappersMP.APPLY_MODEL, _apply_model),
        (WrappersMP.DIFFUSION_MODEL, mark_network),
    ):
        add_wrapper_with_key(kind, SESSION_KEY, wrapper, options, is_model_options=True)
    if orders_prompts(guider):
        record.note(
            "this guider orders its prompts in its own way; the first of them decided which "
            "tokens stay"
        )
    run.patched = why_not_patched(guider.model_patcher)


class _UncondFirst(Exception):
    """Short of memory, the host began with the prompt that must not decide."""


def _calc_cond_batch(executor, model, conds, x_in, timestep, model_options):
    """The conditional prompt first when the host cannot run both in one call."""
    run: SamplingRun | None = model_options["transformer_options"].get(SESSION_KEY)
    if run is not None and "multigpu_clones" in model_options:
        run.dense = (
            "several GPUs share a step and would choose tokens and blocks apart: all were computed"
        )
        # now, because a compiled model may not come by again
        run.engine.record.note(run.dense)
    if run is not None:
        run.due = prompts_due(conds, timestep)
    both = conds and conds[0] is not None and any(cond is not None for cond in conds[1:])
    if run is None or run.dense or not both:
        return executor(model, conds, x_in, timestep, model_options)
    if not run.split:
        run.awaits_cond = True
        try:
            return executor(model, conds, x_in, timestep, model_options)
        except _UncondFirst:
            # no block ran yet
            log.debug("WanTrim: the conditional prompt goes first, in a call of its own")
        finally:
            run.awaits_cond = False
    others = [None] * (len(conds) - 1)
    run.awaits_cond = True
    first = executor(model, [conds[0], *others], x_in, timestep, model_options)
    # one that has no part in this step says nothing of those to come
    run.split, run.awaits_cond = not run.awaits_cond, False
    rest = executor(model, [None, *conds[1:]], x_in, timestep, model_options)
    return [first[0], *rest[1:]]


@torch.compiler.disable(recursive=False)
def _apply_model(
    executor,
    x,
    t,
    c_concat=None,
    c_crossattn=None,
    control=None,
    transformer_options=None,
    **kwargs,
):
    options = as_dict(transformer_options)
    run: SamplingRun | None = options.get(SESSION_KEY)
    if run is not None and run.awaits_cond:
        if COND not in (options.get("cond_or_uncond") or [COND]):
            raise _UncondFirst
        run.awaits_cond = False
    # several GPUs call it at once, and how torch compiles is one for all of their threads
    if run is None or run.dense:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    run.latent, run.strengths = x, hook_strengths(executor.class_obj)
    try:
        dm, record = executor.class_obj.diffusion_model, run.engine.record
        run.compiled = compiled_of(dm, x, run.model_options, record)
        # up to the model itself, which then decides what runs compiled
        with paused():
            out = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    finally:
        run.latent = run.compiled = None
    given = {"x": x, "t": t, "c_concat": c_concat, "c_crossattn": c_crossattn, "control": control}
    run.note_call({**given, **kwargs})
    return out


@torch.compiler.disable
def _diffusion_model(executor, *args, **kwargs):
    given = ModelCall.of(*args, **kwargs)
    options, dm = given.options, executor.class_obj
    run: SamplingRun | None = options.get(SESSION_KEY)
    if run is None:
        with resumed():
            return given.run(executor, options)
    call, compiled = _begin(dm, run, given), run.compiled
    if call is not None and call.repeats:
        return call.repeated()
    touched = call is not None and call.touches_blocks
    if compiled is not None and compiled.whole is not None and not touched:
        plain = bare(options, (KEY, SESSION_KEY))
        if plain is not None:
            with resumed():
                if call is None:
                    return given.run(compiled.whole, plain)
                out = call.run(partial(given.run, compiled.whole, plain))
            if call.first:
                call.state.reached = True
            return call.output(out)
        # another node's wrapper around ours ran already, and may be in the graph too
        touched = call is not None
    if touched:
        options = replace_blocks(options, call, len(dm.blocks), compiled)
        run.call, run.replaced = call, options["patches_replace"]["dit"]
    run.reached = False
    try:
        with resumed():
            if call is None:
                return given.run(executor, options)
            out = call.run(partial(given.run, executor, options))
    finally:
        run.call = run.replaced = None
    if call.first:
        call.state.reached = run.reached
    return call.output(out)


def _begin(dm, run: SamplingRun, given: ModelCall) -> Call | None:
    """The engine's call for a call of the model; None where the model runs without us."""
    record, x = run.engine.record, given.x
    in_the_way = given.unreadable or run.dense
    if in_the_way is not None:
        record.note(in_the_way)
        return None
    check_latent(x)
    if run.network is None:
        run.network = dm
    if dm is not run.network:
        record.note(
            "this guider samples one of the prompts with another model: all of it was computed there"
        )
        return None
    grid = token_grid(dm, x, given.time_dim_concat, given.extra)
    anchored = anchored_frames(dm, x, given.timestep, grid, given.extra)
    inside = run.patched or why_not_now(given.options)
    alone = not sees_between_blocks(dm, given.options)
    if run.wish is not None:
        told = (dm, given, grid, anchored, run.engine, inside, alone)
        run.course, run.wish = run.wish.solve(*told), None
        log.info("WanTrim: %s", record.planned)
    if record.shape is None:
        sizes = full_shape if record.width is not None else wan_shape
        record.shape = sizes(dm, given.text_tokens, clip_tokens(dm, given.clip_fea))
        record.device = device_name(x.device)
    # without the image channels, which only one of the two prompts may have
    noise = x[:, : dm.out_dim]
    if run.latent is not None and run.latent.shape == noise.shape:
        # the change of the velocity drowns in the rounding of a half-precision latent
        noise = run.latent
    return run.engine.begin(
        levels=given.levels,
        latent=noise,
        cond_or_uncond=given.roles,
        grid=grid,
        num_blocks=len(dm.blocks),
        shift=run.shift,
        anchored=anchored,
        window=given.window,
        due=run.due if given.prompts and not run.strengths else (),
        # other weights answer otherwise, and are another prompt's
        prompts=[(name, run.strengths) if run.strengths else name for name in given.prompts],
        clip=None if given.clip_fea is None else given.clip_fea[:, 0],
        inside=inside,
        alone=alone,
        by_frame=given.by_frame,
    )
