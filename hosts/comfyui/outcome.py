"""What came of a trial: its rows, what of it is kept in a profile, and the row that can be shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import comfy.model_management

from ...profiles.artifact import package_version
from ...report.compare import compare, why_not
from ...report.figures import step_work
from ...report.verdict import FORMAT, Choice, Row, row_json
from ...solve.tuned import Tuned
from ...solve.variants import HEADS, PLAN
from .trial import CACHE, STEPS, WHOLE, Candidate, Trial
from .trial_wrappers import is_oom
from .version import comfyui_version

OUT_OF_MEMORY = "out of memory while decoding"


def decode_all(
    trial: Trial, samples: Sequence[dict], vae
) -> tuple[list[torch.Tensor | None], dict[int, str]]:
    """The videos of the candidates' latents [b, c, f, h, w], and why some have none."""
    videos: list[torch.Tensor | None] = []
    failed: dict[int, str] = {}
    for place, (candidate, latent) in enumerate(zip(trial.candidates, samples, strict=False)):
        video = None
        try:
            if candidate.failed is None:
                # a batch of videos one behind the other, as VAE Decode gives it
                video = vae.decode(latent["samples"])
                video = video.reshape(-1, *video.shape[-3:])
        except BaseException as error:
            # the host's interrupt is no Exception
            if not is_oom(error):
                raise
            failed[place] = OUT_OF_MEMORY
        if place in failed:
            # out here nothing holds the tensors of what failed
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()
        videos.append(video)
    return videos, failed


def rows_of(
    trial: Trial,
    videos: Sequence[torch.Tensor | None],
    prompt: str | None,
    tick: Callable[[], None] = lambda: None,
) -> list[Row]:
    """A row for each candidate.

    Args:
        videos: decoded, [pixel_frames, h, w, 3] in 0..1, in the candidates' order; None is none.
        prompt: id of the queue entry that asks; what others sampled is said to be cached.
        tick: called behind each pixel frame that was compared.
    """
    rows = [_row(trial, one, prompt) for one in trial.candidates]
    whole = videos[0]
    for row, video in zip(rows, videos, strict=True):
        if row.failed is None:
            reason = None if video is None else why_not(video, None if row is rows[0] else whole)
            row.failed = "no video came" if video is None else reason and f"the video {reason}"
    if rows[0].failed is None:
        for row, video in zip(rows[1:], videos[1:], strict=True):
            if row.failed is None:
                row.found = compare(whole, video, tick)
    return rows


def _row(trial: Trial, candidate: Candidate, prompt: str | None) -> Row:
    row = Row(candidate.name, candidate.label, candidate.seconds, failed=candidate.failed)
    samplings = candidate.samplings
    if candidate.failed is None and len(samplings) < len(trial.parts):
        row.remarks.append(
            "it was never sampled: connect the model to a sampler, and take off bypasses"
        )
        return row
    row.cached = any(sampling.prompt != prompt for sampling in samplings.values())
    for sampling in samplings.values():
        row.remarks += sampling.notes
    for attachment in candidate.attachments().values():
        row.remarks += [] if attachment.record is None else attachment.record.notes
    if candidate.failed is None:
        row.work = _work(trial, candidate)
    if candidate.name == CACHE and candidate.failed is None:
        row.label += _cache_words(trial, candidate)
    if candidate.name == STEPS and row.work is not None:
        _check_steps(trial, candidate, row)
    return row


def _work(trial: Trial, candidate: Candidate) -> float | None:
    """Of the whole run's, by the cost model; of fewer steps by steps, of a step cache by calls."""
    whole = trial.whole.steps_done
    if not whole:
        return None
    if candidate.name in (WHOLE, STEPS, CACHE):
        done = [
            one.steps * (1 - one.left_out / max(trial.calls(part), 1))
            for part, one in candidate.samplings.items()
        ]
        return sum(done) / whole
    records = [attachment.record for attachment in candidate.attachments().values()]
    if len(records) < len(trial.parts) or None in records:
        return None
    works = [step_work(record, step) for record in records for step in record.steps]
    if not works or None in works:
        return None
    # a sampler may call the model several times for a step
    calls = sum(len(record.steps) for record in records)
    return sum(works) / calls * candidate.steps_done / whole


def _cache_words(trial: Trial, candidate: Candidate) -> str:
    said = []
    for part, sampling in candidate.samplings.items():
        calls = trial.calls(part)
        many = f"{sampling.steps}" if calls in (0, sampling.steps) else f"{calls} model calls"
        at = "" if sampling.threshold is None else f" at {sampling.threshold:.3g}"
        said.append(f"{at} ({sampling.left_out} of {many} left out)")
    return " and".join(said)


def _check_steps(trial: Trial, candidate: Candidate, row: Row) -> None:
    done, meant = candidate.steps_done, candidate.steps
    if trial.whole.steps_done != trial.whole.steps:
        row.remarks.append(
            f"the whole run did {trial.whole.steps_done} steps and WanTrim Candidates was told "
            f"{trial.whole.steps}: connect its output 'steps' to the sampler or scheduler"
        )
    elif done != meant:
        row.failed = f"{done} steps were sampled instead of {meant}"
        row.remarks.append("connect the output 'steps' to the sampler or scheduler")


def tuned_of(trial: Trial, rows: Sequence[Row], choice: Choice) -> dict[str, Tuned] | str:
    """What the dial may go by from now on, by part; in words why there is nothing."""
    if choice.best is None:
        return choice.reason
    best = trial.candidates[choice.best]
    plan = next(one for one in trial.candidates if one.name == PLAN).attachments()
    way = trial.travel(trial.parts[-1])
    if way is None or any(trial.whole.samplings[part].travel is None for part in trial.parts):
        return "the whole run has too few steps, or they do not fall"
    found = {}
    for part in trial.parts:
        known = getattr(plan.get(part), "solved", None)
        if known is None or known.run is None:
            return "the plan was not solved, so the run's size is not known"
        chosen = getattr(best.attachments().get(part), "solved", None)
        shares = None if chosen is None else chosen.plan.shares.shares
        run = known.run
        found[part] = Tuned(
            run.sigmas, run.prompts, run.starts_given, run.grid.tokens, trial.wanted,
            rows[choice.best].label[:200], shares, way,
            chosen.plan.heads.keep_ratio if best.name == HEADS else None,
        )  # fmt: skip
    return found


def shared_row(
    trial: Trial, rows: Sequence[Row], choice: Choice, videos: Sequence[torch.Tensor | None]
) -> dict:
    """The trial as plain data: no prompt, no path, no picture."""
    first = next(
        (one for part in trial.parts for one in [trial.whole.samplings.get(part)] if one), None
    )
    shown = next((video for video in videos if video is not None), None)
    solved = [
        attachment.solved
        for one in trial.candidates
        for attachment in one.attachments().values()
        if attachment.solved is not None and attachment.solved.run is not None
    ]
    run = solved[0].run if solved else None
    return {
        "format": FORMAT,
        "models": [
            {"class": trial.classes[part], **trial.fingerprints[part].to_json()}
            for part in trial.parts
        ],
        "run": {
            "pixels": None if shown is None else list(shown.shape[:3]),
            "grid": run and [run.grid.frames, run.grid.height, run.grid.width],
            "steps": trial.whole.steps_done,
            "sampler": first and first.sampler,
            "guidance": first and first.guidance,
            "prompts": run and run.prompts,
            "shift": run and run.shift,
            "start_image": run and run.starts_given,
        },
        "device": _plain((first and first.device) or "cpu"),
        "versions": {
            "wantrim": package_version(),
            "comfyui": _plain(comfyui_version()),
            "torch": _plain(torch.__version__),
        },
        "wanted": trial.wanted,
        "best": None if choice.best is None else rows[choice.best].name,
        "rows": [row_json(row) for row in rows],
    }


def _plain(text: str) -> str:
    """A name of somebody else's, short and without what a path has."""
    return " ".join(text.replace("/", " ").replace("\\", " ").split())[:80]
