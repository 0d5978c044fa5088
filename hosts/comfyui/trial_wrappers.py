"""Times each candidate of a trial: keyed wrappers around its sampling, and nothing else of the model.

What fails for want of memory does not end the others, and what was finished before a cancel is not
sampled again. Of the whole run it is noted what the other candidates are made by.
"""

from __future__ import annotations

import logging
import statistics
import time
import weakref
from dataclasses import replace

import torch

import comfy.model_management
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ...solve.tuned import Way
from .given import attached, guidance_of, levels_of, options_in, own_options, watch_velocity
from .live import running_node, running_prompt
from .runs import sampler_name, sampling_key
from .shape import device_name
from .trial import CACHE, KEY, WHOLE, Candidate, Place, Sampling, Trial

log = logging.getLogger(__name__)

ARGUMENTS = ("noise", "latent_image", "sampler", "sigmas", "denoise_mask")
OUT_OF_MEMORY = "out of memory while sampling"


def enter(trial: Trial, candidate: Candidate, models: dict[str, object]) -> None:
    """A candidate of a trial, by these MODELs; they are told their place, outside of whatever is put
    on them later.
    """
    candidate.models = {
        part: _placed(model, Place(trial, candidate, part)) for part, model in models.items()
    }
    trial.candidates.append(candidate)


def _placed(model, place: Place):
    """A clone that is told its place outside of what is on it: EasyCache's copies what we set for it."""
    placed, kind = model.clone(), WrappersMP.OUTER_SAMPLE
    placed.model_options["transformer_options"][KEY] = place
    placed.remove_wrappers_with_key(kind, KEY)
    others = dict(placed.wrappers.get(kind, {}))
    for key in others:
        placed.remove_wrappers_with_key(kind, key)
    for key, wrappers in {KEY: [_outer_sample], **others}.items():
        for one in wrappers:
            placed.add_wrapper_with_key(kind, key, one)
    return placed


def _outer_sample(executor, *args, **kwargs):
    guider = executor.class_obj
    place: Place | None = attached(
        guider.model_options, KEY, "a candidate of a trial is not known as such"
    )
    if place is None:
        return executor(*args, **kwargs)
    given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    candidate, part = place.candidate, place.part
    key = sampling_key(guider, given)
    known = candidate.samplings.get(part)
    if known is not None and known.is_of(guider.model_patcher, key):
        log.info("WanTrim Candidates: %s was finished before and is taken", candidate.label)
        return known.result.clone()
    if part == place.trial.parts[0]:
        candidate.failed = place.trial.why_not(candidate, part)
        candidate.samplings.clear()
    elif known is not None and known.seconds is None:
        # it failed here, in an earlier run
        candidate.failed = None
    if candidate.failed is not None:
        return given["latent_image"].float()
    place.trial.tell(candidate, part)
    sampling = candidate.samplings[part] = Sampling(
        running_prompt(),
        running_node(),
        sampler_name(given.get("sampler")),
        guidance_of(guider),
        tuple(levels_of(given.get("sigmas"))),
        device_name(guider.model_patcher.load_device),
    )
    # by another node of the same queue entry; the others go the same way
    again = known is not None and known.prompt == sampling.prompt and known.node != sampling.node
    if again and candidate.name == WHOLE:
        sampling.notes.append("all were sampled by two samplers; the figures are of the last")
    try:
        with own_options(guider) as options:
            model_sampling = guider.model_patcher.get_model_object("model_sampling")
            place.prepare(options["transformer_options"], model_sampling)
            way, own = Way(), {WrappersMP.SAMPLER_SAMPLE: _sampler_sample}
            if candidate.name == WHOLE:
                watch_velocity(options, KEY, way.see)
                own[WrappersMP.APPLY_MODEL] = _apply_model
            for kind, wrapper in own.items():
                add_wrapper_with_key(kind, KEY, wrapper, options, is_model_options=True)
            result = executor(*args, **kwargs)
            sampling.travel = way.ended()
    except BaseException as error:
        # the host's interrupt is no Exception
        candidate.samplings.pop(part, None)
        candidate.failed = _why_failed(candidate, error)
        if candidate.failed is None:
            raise
        candidate.samplings[part] = replace(sampling, seconds=None)
        if candidate.failed != OUT_OF_MEMORY:
            candidate.samplings[part].notes.append(str(error))
        log.warning("WanTrim Candidates: %s: %s", candidate.label, candidate.failed)
    if candidate.failed is not None:
        # out here nothing holds the tensors of what failed; the host does the same
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        return given["latent_image"].float()
    _look_back(sampling, candidate.name == WHOLE)
    sampling.result, sampling.key = result.detach().cpu().clone(), key
    sampling.model = weakref.ref(guider.model_patcher)
    return result


def _why_failed(candidate: Candidate, error: BaseException) -> str | None:
    """Why a candidate ends without the others; None where what went wrong is not its own."""
    if is_oom(error):
        return OUT_OF_MEMORY
    # the whole run went through here before: it is the node that cannot
    if candidate.name == CACHE and isinstance(error, Exception):
        # the error's own words may hold a path, and this is shared
        return f"EasyCache cannot run here ({type(error).__name__})"
    return None


def is_oom(error: BaseException) -> bool:
    """Whether a device ran out of memory."""
    # older hosts have the exception alone
    known = getattr(comfy.model_management, "is_oom", None)
    kind = comfy.model_management.OOM_EXCEPTION
    if kind is Exception:
        return isinstance(error, MemoryError)
    return known(error) if known is not None else isinstance(error, kind)


def _sampler_sample(executor, *args, **kwargs):
    """The sampler's own steps: models are loaded, nothing is decoded yet."""
    extra = args[2] if len(args) > 2 else kwargs["extra_args"]
    options = options_in(extra.get("model_options"))
    sampling = options[KEY].sampling
    given = [*args]
    if len(given) > 3:
        given[3] = _marking(sampling, given[3])
    else:
        kwargs = {**kwargs, "callback": _marking(sampling, kwargs.get("callback"))}
    begins = _now()
    result = executor(*given, **kwargs)
    sampling.seconds = _now() - begins
    sampling.ends = [begins, *sampling.ends]
    sampling.left_out = int(getattr(options.get("easycache"), "total_steps_skipped", 0))
    return result


def _marking(sampling: Sampling, callback):
    def mark(*args, **kwargs):
        sampling.ends.append(_now())
        return None if callback is None else callback(*args, **kwargs)

    return mark


def _now() -> float:
    if torch.cuda.is_available() and comfy.model_management.get_torch_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.compiler.disable(recursive=False)
def _apply_model(executor, x, t, *args, **kwargs):
    """What EasyCache would have seen of a whole run."""
    out = executor(x, t, *args, **kwargs)
    given = (*args, *kwargs.values())
    options = next((one for one in given if isinstance(one, dict) and KEY in one), None)
    if options is not None and out.shape == x.shape:
        sigma = float(t.flatten()[0])
        velocity = (x - out) / max(sigma, 1e-6)
        options[KEY].sampling.probe.see(sigma, x, velocity, list(options.get("uuids", ())))
    return out


def _look_back(sampling: Sampling, whole: bool) -> None:
    """What a finished sampling tells."""
    spans = [b - a for a, b in zip(sampling.ends, sampling.ends[1:], strict=False)]
    if whole and len(spans) > 2:
        sampling.warmed = max(0.0, spans[0] - statistics.median(spans[1:]))
    sampling.ends = []
