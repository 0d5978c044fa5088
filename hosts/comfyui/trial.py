"""A trial: one seed sampled by several candidates, each timed by itself, kept and told apart.

A candidate is a MODEL with its place in the trial among its options. Keyed wrappers see to it that
its sampling is timed without loading and decoding, that one that runs out of memory does not end
the others, and that one that was finished before a cancel is not sampled again. Of the whole run
they also note what the other candidates are made by. Nothing of the model is touched.
"""

from __future__ import annotations

import logging
import statistics
import time
import weakref
from dataclasses import dataclass, field, replace

import torch

import comfy.model_management
import comfy.model_patcher
from comfy.patcher_extension import WrappersMP

from ...profiles.fingerprint import Fingerprint
from ...solve.tuned import Travel
from ...solve.variants import HEADS, OWN, PLAN, REPEATS, why_no_heads, why_no_repeats
from .attachment import KEY as PLAN_KEY
from .attachment import Attachment, attachment_of
from .easycache import Probe
from .given import Kept, levels_of
from .live import running_prompt, tell_node
from .runs import sampler_name, sampling_key
from .shape import device_name

log = logging.getLogger(__name__)

KEY = "wantrim_trial"
ARGUMENTS = ("noise", "latent_image", "sampler", "sigmas", "denoise_mask")
OUT_OF_MEMORY = "out of memory while sampling"
# of a trial's candidates
WHOLE, CACHE, STEPS = "whole", "easycache", "steps"


@dataclass
class Outcome:
    """One sampling of one model of a candidate.

    Args:
        prompt: id of the queue entry that sampled it.
        sigmas: of the sampler, the last included.
        seconds: of the sampler alone; None until it is done.
        warmed: seconds of the first step beyond a usual one.
        left_out: steps that EasyCache left out.
        threshold: that EasyCache had.
        travel: of the velocity, of a whole run.
    """

    prompt: str | None
    sampler: str = ""
    guidance: float | None = None
    sigmas: tuple[float, ...] = ()
    device: str = ""
    seconds: float | None = None
    warmed: float = 0.0
    left_out: int = 0
    threshold: float | None = None
    travel: Travel | None = None
    notes: list[str] = field(default_factory=list)
    # what the next run may take in place of sampling again
    result: torch.Tensor | None = None
    key: str = ""
    model: weakref.ref | None = None
    # while it runs
    ends: list[float] = field(default_factory=list)
    probe: Probe = field(default_factory=Probe)
    way: list[tuple] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return max(0, len(self.sigmas) - 1)

    def is_of(self, model, key: str) -> bool:
        known = None if self.model is None else self.model()
        return self.result is not None and known is model and self.key == key


@dataclass
class Candidate:
    """One way to sample.

    Args:
        name: short and fixed, for the JSON row; `label` is for people.
        steps: of the whole run, for the sampler; `change_at` is the first one of a second expert.
        speedup: that it was solved for; None is no plan of ours.
        models: by part of the trial.
    """

    name: str
    label: str
    steps: int
    change_at: int
    speedup: float | None = None
    models: dict[str, object] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    failed: str | None = None

    def attachments(self) -> dict[str, Attachment]:
        found = {part: attachment_of(model) for part, model in self.models.items()}
        return {part: one for part, one in found.items() if one is not None}

    @property
    def seconds(self) -> float | None:
        """Of its own sampling, without what the first run of all warms up; None is not measured."""
        done = [outcome.seconds for outcome in self.outcomes.values()]
        if len(done) < len(self.models) or None in done:
            return None
        warmed = sum(one.warmed for one in self.outcomes.values()) if self.name == WHOLE else 0.0
        return sum(done) - warmed

    @property
    def steps_done(self) -> int:
        return sum(outcome.steps for outcome in self.outcomes.values())


@dataclass
class Trial:
    """Candidates in their order; the first is the whole run.

    Args:
        parts: one name, or those of both experts.
        wanted: speed-up that was asked for.
        node: id of the node that made it.
        fingerprints: of the models, by part; `classes` are the names of their networks.
    """

    parts: tuple[str, ...]
    wanted: float
    candidates: list[Candidate] = field(default_factory=list)
    node: str | None = None
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def whole(self) -> Candidate:
        return self.candidates[0]

    def travel(self, part: str) -> Travel | None:
        """Of the whole run up to the end of a part, as far as it is known: all candidates of the
        first expert are sampled before any of the second one."""
        parts = self.parts[: self.parts.index(part) + 1]
        ways = [getattr(self.whole.outcomes.get(one), "travel", None) for one in parts]
        if None in ways:
            return ways[-1]
        return ways[0] if len(ways) == 1 else ways[0].joined(ways[1])

    def why_not(self, candidate: Candidate, part: str) -> str | None:
        """Why a candidate is not worth its time, as far as the plan's run tells; or None."""
        ran = next(one for one in self.candidates if one.name == PLAN).attachments().get(part)
        if candidate.name == HEADS and getattr(ran, "solved", None) is not None:
            return why_no_heads(ran.solved.run)
        # what a second expert will do is not known yet
        if candidate.name == REPEATS and ran is not None and len(self.parts) == 1:
            return why_no_repeats(ran.record)
        return None

    def add(self, candidate: Candidate, models: dict[str, object]) -> None:
        """A candidate; its models are told their place, outside of whatever is put on them later."""
        candidate.models = {
            part: _placed(model, Place(self, candidate, part)) for part, model in models.items()
        }
        self.candidates.append(candidate)

    def tell(self, candidate: Candidate, part: str) -> None:
        """Say which of how many is sampled now."""
        number = self.candidates.index(candidate) + 1
        whose = "" if len(self.parts) == 1 else f", {part} noise"
        said = f"{number} of {len(self.candidates)}{whose}: {candidate.label}"
        log.info("WanTrim Candidates: %s", said)
        tell_node(self.node, said)

    def let_go(self) -> None:
        """Forget the latents: every candidate has its video."""
        for candidate in self.candidates:
            for outcome in candidate.outcomes.values():
                outcome.result = None


@dataclass
class Place(Kept):
    """Where a MODEL stands in a trial."""

    trial: Trial
    candidate: Candidate
    part: str

    @property
    def outcome(self) -> Outcome:
        return self.candidate.outcomes[self.part]

    def prepare(self, options: dict, sampling) -> None:
        """What of a candidate only the whole run can tell."""
        whole = self.trial.whole.outcomes.get(self.part)
        attachment = options.get(PLAN_KEY)
        if self.candidate.name == OWN and attachment is not None:
            travel = self.trial.travel(self.part)
            attachment.dial = replace(attachment.dial, travel=travel)
            if travel is None:
                self.outcome.notes.append(
                    "the whole run was not seen, so the curves that ship were used"
                )
        if self.candidate.name == CACHE and "easycache" in options:
            self._set_threshold(options["easycache"], whole, sampling)

    def _set_threshold(self, holder, whole: Outcome | None, sampling) -> None:
        if whole is None or whole.seconds is None or not whole.probe.steps:
            self.outcome.notes.append(
                f"the whole run was not seen: EasyCache ran at {holder.reuse_threshold:g}"
            )
        else:
            wanted = round(whole.steps * (1 - 1 / self.trial.wanted))
            between = [
                float(sampling.percent_to_sigma(percent))
                for percent in (holder.start_percent, holder.end_percent)
            ]
            holder.reuse_threshold = whole.probe.threshold(wanted, *between)
        self.outcome.threshold = float(holder.reuse_threshold)


def place_of(model) -> Place | None:
    """Where a MODEL stands in a trial, or None."""
    return model.model_options["transformer_options"].get(KEY)


def _placed(model, place: Place):
    placed = model.clone()
    placed.model_options["transformer_options"][KEY] = place
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.SAMPLER_SAMPLE, _sampler_sample),
    ):
        _outermost(placed, kind, wrapper)
    if place.candidate.name == WHOLE:
        _outermost(placed, WrappersMP.PREDICT_NOISE, _predict_noise)
        _outermost(placed, WrappersMP.APPLY_MODEL, _apply_model)
    return placed


def _outermost(model, kind: str, wrapper) -> None:
    """Put a wrapper outside of those that are there: EasyCache's copies what we set for it."""
    model.remove_wrappers_with_key(kind, KEY)
    others = dict(model.wrappers.get(kind, {}))
    for key in others:
        model.remove_wrappers_with_key(kind, key)
    model.add_wrapper_with_key(kind, KEY, wrapper)
    for key, wrappers in others.items():
        for one in wrappers:
            model.add_wrapper_with_key(kind, key, one)


def _outer_sample(executor, *args, **kwargs):
    guider = executor.class_obj
    original = guider.model_options
    place: Place = original["transformer_options"][KEY]
    given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    candidate, part = place.candidate, place.part
    key = sampling_key(guider, given)
    known = candidate.outcomes.get(part)
    if known is not None and known.is_of(guider.model_patcher, key):
        log.info("WanTrim Candidates: %s was finished before and is taken", candidate.label)
        return known.result.clone()
    if part == place.trial.parts[0]:
        candidate.failed = place.trial.why_not(candidate, part)
        candidate.outcomes.clear()
    if candidate.failed is not None:
        return given["latent_image"].float()
    place.trial.tell(candidate, part)
    outcome = candidate.outcomes[part] = Outcome(
        running_prompt(),
        sampler_name(given.get("sampler")),
        _number(getattr(guider, "cfg", None)),
        tuple(levels_of(given.get("sigmas"))),
        device_name(guider.model_patcher.load_device),
    )
    options = comfy.model_patcher.create_model_options_clone(original)
    try:
        place.prepare(
            options["transformer_options"], guider.model_patcher.get_model_object("model_sampling")
        )
        guider.model_options = options
        result = executor(*args, **kwargs)
    except BaseException as error:
        # the host's interrupt is no Exception
        candidate.outcomes.pop(part, None)
        if not is_oom(error):
            raise
        candidate.failed = OUT_OF_MEMORY
        candidate.outcomes[part] = replace(outcome, seconds=None)
        log.warning("WanTrim Candidates: %s: %s", candidate.label, OUT_OF_MEMORY)
    finally:
        guider.model_options = original
    if candidate.failed is not None:
        # out here nothing holds the tensors of what failed; the host does the same
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        return given["latent_image"].float()
    _look_back(outcome, candidate.name == WHOLE)
    outcome.result, outcome.key = result.detach().cpu().clone(), key
    outcome.model = weakref.ref(guider.model_patcher)
    return result


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
    options = extra["model_options"]["transformer_options"]
    outcome = options[KEY].outcome
    given = [*args]
    if len(given) > 3:
        given[3] = _marking(outcome, given[3])
    else:
        kwargs = {**kwargs, "callback": _marking(outcome, kwargs.get("callback"))}
    begins = _now()
    result = executor(*given, **kwargs)
    outcome.seconds = _now() - begins
    outcome.ends = [begins, *outcome.ends]
    outcome.left_out = int(getattr(options.get("easycache"), "total_steps_skipped", 0))
    return result


def _marking(outcome: Outcome, callback):
    def mark(*args, **kwargs):
        outcome.ends.append(_now())
        return None if callback is None else callback(*args, **kwargs)

    return mark


def _now() -> float:
    if torch.cuda.is_available() and comfy.model_management.get_torch_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _predict_noise(executor, x, timestep, *args, **kwargs):
    """The guided velocity of a whole run: how far it goes from step to step."""
    out = executor(x, timestep, *args, **kwargs)
    options = next(one for one in (*args, *kwargs.values()) if isinstance(one, dict))
    way = options["transformer_options"][KEY].outcome.way
    sigma = float(timestep.flatten()[0])
    if not way or (sigma < way[-1][0] and way[-1][2].shape == x.shape):
        velocity = (x.float() - out.float()) / max(sigma, 1e-6)
        change = 0.0
        if way:
            change = float((velocity - way[-1][2]).square().mean().sqrt())
            # one velocity is held at a time
            way[-1] = (*way[-1][:2], None)
        way.append((sigma, change, velocity))
    return out


@torch.compiler.disable(recursive=False)
def _apply_model(executor, x, t, *args, **kwargs):
    """What EasyCache would have seen of a whole run."""
    out = executor(x, t, *args, **kwargs)
    given = (*args, *kwargs.values())
    options = next((one for one in given if isinstance(one, dict) and KEY in one), None)
    if options is not None and out.shape == x.shape:
        sigma = float(t.flatten()[0])
        velocity = (x - out) / max(sigma, 1e-6)
        options[KEY].outcome.probe.see(sigma, x, velocity, list(options.get("uuids", ())))
    return out


def _look_back(outcome: Outcome, whole: bool) -> None:
    """What a finished sampling tells."""
    spans = [b - a for a, b in zip(outcome.ends, outcome.ends[1:], strict=False)]
    if whole and len(spans) > 2:
        outcome.warmed = max(0.0, spans[0] - statistics.median(spans[1:]))
    if len(outcome.way) > 1:
        total, travel = 0.0, []
        for _, change, _ in outcome.way:
            total += change
            travel.append(total)
        sigmas = tuple(min(1.0, sigma) for sigma, *_ in outcome.way)
        if all(a > b for a, b in zip(sigmas, sigmas[1:], strict=False)):
            outcome.travel = Travel(sigmas, tuple(travel))
    outcome.way, outcome.ends = [], []


def _number(value) -> float | None:
    return float(value) if isinstance(value, int | float) else None
