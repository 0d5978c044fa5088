"""A trial on the artist's own model: candidates of one seed, and the verdict that keeps the best."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError

import folder_paths
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker

from ..hosts.comfyui.candidates import ALL, ALONE, FEW, make_trial
from ..hosts.comfyui.live import running_prompt
from ..hosts.comfyui.outcome import decode_all, rows_of, shared_row, tuned_of
from ..hosts.comfyui.trial import Trial
from ..hosts.comfyui.variants import check_variant
from ..profiles.profile import Profile, load_profile
from ..report.picture import as_pictures
from ..report.verdict import choose, clip_of_all, draw_verdict, headline, verdict_text
from ..solve.dial import HIGH, LOW, MAX_SPEEDUP
from ..solve.tuned import Tuned
from . import inputs
from .files import SUFFIX, cannot_write, plain_name, valid_name
from .inputs import check_choice, check_range, image_output, model_input, text_output
from .profile import FOLDER

CATEGORY = "model/patch/wan"
NAME, VERDICT = "WanTrim Candidates", "WanTrim Verdict"
MAX_STEPS = 1000

TrialSocket = io.Custom("WANTRIM_TRIAL")


class WanTrimCandidates(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimCandidates",
            display_name=NAME,
            category=CATEGORY,
            description=(
                "Tries on your own model what is best for you: ComfyUI samples and decodes one seed "
                "once for each candidate (the whole model, WanTrim at your speed-up and its "
                "neighbours, EasyCache and fewer steps at the same cost), and WanTrim Verdict "
                "compares them. A cancelled trial goes on where it was when you queue it again. "
                "Place it after the LoRAs and before ModelSamplingSD3."
            ),
            search_aliases=["benchmark", "EasyCache", "tune", "wan speed", "compare settings"],
            not_idempotent=True,
            inputs=[
                model_input(),
                inputs.number(
                    "speedup",
                    1.5,
                    (1.05, MAX_SPEEDUP, 0.05),
                    "How much less the candidates should compute.",
                    slider=True,
                    round=0.01,
                ),
                inputs.number(
                    "steps",
                    20,
                    (2, MAX_STEPS),
                    "Steps of the whole run, both experts together. Connect the output 'steps' "
                    "to the sampler or scheduler, so that fewer steps can be tried too.",
                ),
                inputs.choice(
                    "candidates",
                    [ALL, FEW],
                    "'few': whole, WanTrim, EasyCache, fewer steps. 'all': also WanTrim solved "
                    "by the whole run, without context, for a little less and a little more, and with "
                    "WanTrim Heads.",
                ),
                io.Model.Input(
                    "model_low_noise",
                    optional=True,
                    tooltip="Wan 2.2: the low noise expert; 'model' is the high noise one.",
                ),
                inputs.number(
                    "change_at",
                    0,
                    (0, MAX_STEPS),
                    "Wan 2.2: the first step of the low noise expert in the whole run. 0 is half "
                    "way.",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model_out",
                    display_name="model",
                    is_output_list=True,
                    tooltip="The candidates, one after the other; with two experts the high noise one's.",
                ),
                io.Model.Output(
                    "low_noise",
                    display_name="low_noise",
                    is_output_list=True,
                    tooltip="The candidates of the low noise expert.",
                ),
                io.Int.Output(
                    "steps_out",
                    display_name="steps",
                    is_output_list=True,
                    tooltip="Steps of each candidate, for the sampler or scheduler.",
                ),
                io.Int.Output(
                    "change_at_out",
                    display_name="change_at",
                    is_output_list=True,
                    tooltip=(
                        "Wan 2.2: for 'end_at_step' of the first sampler and 'start_at_step' of the "
                        "second."
                    ),
                ),
                TrialSocket.Output("trial", display_name="trial", tooltip="For WanTrim Verdict."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        speedup: float,
        steps: int,
        candidates: str,
        model_low_noise=None,
        change_at: int = 0,
    ) -> io.NodeOutput:
        models = {ALONE: model} if model_low_noise is None else {HIGH: model, LOW: model_low_noise}
        for one in models.values():
            check_variant(one, NAME)
        check_range(NAME, "speedup", speedup, MAX_SPEEDUP, 1.05)
        check_range(NAME, "steps", steps, MAX_STEPS, 2)
        check_range(NAME, "change_at", change_at, steps - 1)
        check_choice(NAME, "candidates", candidates, (ALL, FEW))
        if len({id(one.model) for one in models.values()}) < len(models):
            raise ValueError(
                f"{NAME}: 'model' and 'model_low_noise' are the same model. Connect the two experts "
                "of Wan 2.2, or leave 'model_low_noise' open."
            )
        trial = make_trial(models, speedup, steps, change_at, candidates)
        first = [one.models[trial.parts[0]] for one in trial.candidates]
        if len(models) == 1:
            missing = f"{NAME}: 'low_noise' has no candidates: connect 'model_low_noise'"
            last = [ExecutionBlocker(missing)]
        else:
            last = [one.models[LOW] for one in trial.candidates]
        counts = [one.steps for one in trial.candidates]
        return io.NodeOutput(
            first, last, counts, [one.change_at for one in trial.candidates], trial
        )


class WanTrimVerdict(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimVerdict",
            display_name=VERDICT,
            category=CATEGORY,
            description=(
                "Compares the candidates' videos with the whole one's: seconds, work, PSNR, SSIM, "
                "motion and flicker; which is best and by how much; all of them side by side. Keeps "
                "the best in a profile, for WanTrim to go by, and gives a row to share."
            ),
            search_aliases=["benchmark", "which is best", "tune", "quality check"],
            is_output_node=True,
            is_input_list=True,
            # what the runs took is not a function of the inputs
            not_idempotent=True,
            inputs=[
                TrialSocket.Input("trial", tooltip="From WanTrim Candidates."),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip=(
                        "The decoded videos: VAE Decode of the candidates' sampler. Or connect "
                        "'samples' and 'vae'."
                    ),
                ),
                io.String.Input(
                    "filename",
                    default="",
                    tooltip=(
                        "Name of a profile in models/wantrim/profiles to keep the outcome in; it is "
                        "added to what is there. Empty keeps nothing. Of two experts each gets a "
                        "file of its own."
                    ),
                ),
                io.Latent.Input(
                    "samples",
                    optional=True,
                    tooltip=(
                        "In place of 'images': the latents of the candidates' sampler. Decoded here, a "
                        "video that runs out of memory is a row that says so, and ends nothing."
                    ),
                ),
                io.Vae.Input("vae", optional=True, tooltip="For 'samples'."),
            ],
            outputs=[
                text_output("The verdict as a table."),
                image_output("side_by_side", "The clip of all candidates, each under its name."),
                image_output("picture", "Frames of all with their figures."),
                text_output(
                    "The row to share: figures only, no prompt, no path, no picture.", "json"
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, filename: list | str | None = None) -> bool | str:
        # a node that takes lists is asked with lists; None comes over a link
        for name in filename if isinstance(filename, list) else [filename]:
            named = isinstance(name, str) and name.strip()
            if named and (said := valid_name(VERDICT, name, "my_wan")) is not True:
                return said
        return True

    @classmethod
    def execute(
        cls,
        trial: list,
        filename: list,
        images: list | None = None,
        samples: list | None = None,
        vae: list | None = None,
    ) -> io.NodeOutput:
        held: Trial = trial[0]
        name, failed = filename[0], {}
        if images is None:
            if samples is None or vae is None:
                raise ValueError(
                    f"{VERDICT}: connect 'images' to the VAE Decode of the candidates' sampler, or "
                    "'samples' to that sampler and 'vae' to the VAE"
                )
            _check_count(held, samples, "samples")
            images, failed = decode_all(held, samples, vae[0])
        videos = _videos(held, images)
        frames = [0 if video is None else len(video) for video in videos]
        # all are compared with the first one, and all are drawn
        tick = inputs.ticking(sum(frames[1:]) + max(frames))
        rows = rows_of(held, videos, running_prompt(), tick)
        for place, reason in failed.items():
            rows[place].failed = reason
        whole = held.whole.steps_done or held.whole.steps
        choice = choose(rows, held.wanted, whole)
        notes = [*held.notes]
        if len(images) < len(videos):
            notes.append(f"{len(images)} videos came for {len(videos)} candidates: taken in order")
        clip = clip_of_all(rows, videos, tick)
        kept = _keep(held, tuned_of(held, rows, choice), name) if name.strip() else ""
        warmed = sum(one.warmed for one in held.whole.samplings.values())
        text = verdict_text(rows, choice, held.wanted, notes, warmed)
        text = f"{text}\n{kept}" if kept else text
        drawn = draw_verdict(rows, videos, choice, headline(rows, choice, held.wanted))
        picture, told = inputs.shown(cls, drawn, text)
        figures = json.dumps(shared_row(held, rows, choice, videos), indent=1)
        held.let_go()
        return io.NodeOutput(text, clip, picture, figures, ui=told)


def _videos(trial: Trial, images: list) -> list[torch.Tensor | None]:
    """A video or None for each candidate; one that failed has a blank one, which is left out."""
    _check_count(trial, images, "images")
    videos = [*map(as_pictures, images)]
    videos += [None] * (len(trial.candidates) - len(videos))
    return [
        None if one.failed is not None else video
        for one, video in zip(trial.candidates, videos, strict=True)
    ]


def _check_count(trial: Trial, came: list, name: str) -> None:
    if len(came) > len(trial.candidates):
        raise ValueError(
            f"{VERDICT}: {name}: {len(came)} videos came for {len(trial.candidates)} candidates. "
            "Connect what is behind the sampler that uses this trial's models, and no other."
        )


def _keep(trial: Trial, found: dict[str, Tuned] | str, filename: str) -> str:
    """Keep a trial's outcome in the profiles of its models; in words what was done."""
    if isinstance(found, str):
        return f"Nothing was kept: {found}."
    name = plain_name(VERDICT, filename, "my_wan")
    folder, ready = Path(folder_paths.get_folder_paths(FOLDER)[0]), {}
    for part, tuned in found.items():
        path = folder / f"{name if len(found) == 1 else f'{name}_{part}_noise'}{SUFFIX}"
        try:
            model = trial.fingerprints[part]
            profile = load_profile(path) if path.is_file() else Profile.empty(model)
            reason = profile.model.differs(model)
            if reason is not None:
                return f"Nothing was kept: {path.name} is of another model: {reason}."
            ready[path] = profile.with_tuned(tuned.to_json())
        except (ValueError, OSError, SafetensorError) as error:
            return f"Nothing was kept: {path.name} cannot be added to ({error})."
    kept: list[str] = []
    # all of them could be read: a pair is kept whole or not at all
    for path, profile in ready.items():
        try:
            profile.save(path)
        except (OSError, SafetensorError) as error:
            before = f"Kept in {kept[0]}, but" if kept else "Nothing was kept:"
            return f"{before} {cannot_write(path, error)}"
        kept.append(path.name)
    return (
        f"Kept in {' and '.join(kept)}: load it with WanTrim Load Profile and connect it to WanTrim, "
        "which then goes by it in runs like this one."
    )


NODES = [WanTrimCandidates, WanTrimVerdict]
