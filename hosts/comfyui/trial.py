"""A trial: one seed sampled by several candidates, each timed by itself, kept and told apart.

A candidate is a MODEL with its place in the trial among its options; what is done with it while it
is sampled is in trial_wrappers.py. Nothing of the model is touched.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field, replace

import torch

from ...profiles.fingerprint import Fingerprint
from ...solve.tuned import Travel
from ...solve.variants import HEADS, OWN, PLAN, REPEATS, why_no_heads, why_no_repeats
from .attachment import KEY as PLAN_KEY
from .attachment import Attachment, attachment_of
from .easycache import Probe
from .given import Kept
from .live import tell_node

log = logging.getLogger(__name__)

KEY = "wantrim_trial"
# of a trial's candidates
WHOLE, CACHE, STEPS = "whole", "easycache", "steps"


@dataclass
class Sampling:
    """One sampling of one model of a candidate.

    Args:
        prompt, node: ids of the queue entry and of the node that sampled it.
        sigmas: of the sampler, the last included.
        seconds: of the sampler alone; None until it is done.
        warmed: seconds of the first step beyond a usual one.
        left_out: model calls that EasyCache left out.
        threshold: that EasyCache had.
        travel: of the velocity, of a whole run.
    """

    prompt: str | None
    node: str | None = None
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
        models: by part of the trial.
    """

    name: str
    label: str
    steps: int
    change_at: int
    models: dict[str, object] = field(default_factory=dict)
    samplings: dict[str, Sampling] = field(default_factory=dict)
    failed: str | None = None

    def attachments(self) -> dict[str, Attachment]:
        found = {part: attachment_of(model) for part, model in self.models.items()}
        return {part: one for part, one in found.items() if one is not None}

    @property
    def seconds(self) -> float | None:
        """Of its own sampling, without what the first run of all warms up; None is not measured."""
        done = [sampling.seconds for sampling in self.samplings.values()]
        if len(done) < len(self.models) or None in done:
            return None
        warmed = sum(one.warmed for one in self.samplings.values()) if self.name == WHOLE else 0.0
        return sum(done) - warmed

    @property
    def steps_done(self) -> int:
        return sum(sampling.steps for sampling in self.samplings.values())


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
        ways = [getattr(self.whole.samplings.get(one), "travel", None) for one in parts]
        if None in ways:
            return ways[-1]
        return ways[0] if len(ways) == 1 else ways[0].joined(ways[1])

    def calls(self, part: str) -> int:
        """Model calls that the whole run's sampler made for a part: some make several a step."""
        whole = self.whole.samplings.get(part)
        return 0 if whole is None else len(whole.probe.steps) or whole.steps

    def why_not(self, candidate: Candidate, part: str) -> str | None:
        """Why a candidate is not worth its time, as far as the plan's run tells; or None."""
        ran = next(one for one in self.candidates if one.name == PLAN).attachments().get(part)
        if candidate.name == HEADS and getattr(ran, "solved", None) is not None:
            return why_no_heads(ran.solved.run)
        # what a second expert will do is not known yet
        if candidate.name == REPEATS and ran is not None and len(self.parts) == 1:
            return why_no_repeats(ran.record)
        return None

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
            for sampling in candidate.samplings.values():
                sampling.result = None


@dataclass
class Place(Kept):
    """Where a MODEL stands in a trial."""

    trial: Trial
    candidate: Candidate
    part: str

    @property
    def sampling(self) -> Sampling:
        return self.candidate.samplings[self.part]

    def prepare(self, options: dict, model_sampling) -> None:
        """What of a candidate only the whole run can tell."""
        whole = self.trial.whole.samplings.get(self.part)
        attachment = options.get(PLAN_KEY)
        if self.candidate.name == OWN and attachment is not None:
            travel = self.trial.travel(self.part)
            attachment.dial = replace(attachment.dial, travel=travel)
            if travel is None:
                self.sampling.notes.append(
                    "the whole run was not seen, so the curves that ship were used"
                )
        if self.candidate.name == CACHE and "easycache" in options:
            self._set_threshold(options["easycache"], whole, model_sampling)

    def _set_threshold(self, holder, whole: Sampling | None, model_sampling) -> None:
        if whole is None or whole.seconds is None or not whole.probe.steps:
            self.sampling.notes.append(
                f"the whole run was not seen: EasyCache ran at {holder.reuse_threshold:g}"
            )
        else:
            wanted = round(self.trial.calls(self.part) * (1 - 1 / self.trial.wanted))
            between = [
                float(model_sampling.percent_to_sigma(percent))
                for percent in (holder.start_percent, holder.end_percent)
            ]
            holder.reuse_threshold = whole.probe.threshold(wanted, *between)
        self.sampling.threshold = float(holder.reuse_threshold)
