"""The node that says what really ran."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import comfy.model_management
from comfy_api.latest import io

from ..engine.record import Record, join_records
from ..hosts.comfyui.attach import attachment_of
from ..hosts.comfyui.dense_step import time_dense_step
from ..hosts.comfyui.runs import ImagesOf, Ran
from ..report.figures import measured_speed, reports_json
from ..report.picture import as_pictures, draw_report, stacked
from ..report.words import record_text, verdict
from . import inputs
from .inputs import image_output, shown, text_output

log = logging.getLogger(__name__)

NAME = "WanTrim Report"
EXPERTS = {"model": "high noise", "model_low_noise": "low noise"}


class WanTrimReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimReport",
            display_name=NAME,
            category="model/patch/wan",
            description=(
                "Says what WanTrim really did in the run that made these images: how much less work "
                "and time it took, what each step computed, which parts of the picture were left "
                "out, and what did not happen and why."
            ),
            search_aliases=["trim report", "token overlay", "wan benchmark"],
            is_output_node=True,
            # the report of a run is not a function of the inputs
            not_idempotent=True,
            # to find the samplers that the images come of
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model that was sampled, with WanTrim on it."),
                io.Image.Input(
                    "images",
                    tooltip="The decoded video of that run; what was left out is drawn over it.",
                ),
                io.Model.Input(
                    "model_low_noise",
                    optional=True,
                    tooltip="Wan 2.2: the second expert's model, to report both.",
                ),
                inputs.switch(
                    "measure_dense_step",
                    False,
                    "After the run, time one whole step of the untouched model on random input "
                    "of the same size, to compare with. Takes two steps' time; not done where the "
                    "run has whole steps of its own.",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[
                text_output("The report in words."),
                image_output("picture", "The report as a picture."),
                text_output("All figures of the report as JSON.", "json"),
            ],
        )

    @classmethod
    def execute(
        cls, model, images: torch.Tensor, model_low_noise=None, measure_dense_step: bool = False
    ) -> io.NodeOutput:
        made_by = None
        if cls.hidden is not None and cls.hidden.dynprompt is not None:
            made_by = ImagesOf(cls.hidden.dynprompt, cls.hidden.unique_id, "images")
        pair = model_low_noise is not None
        reports = []
        for label, patched in (("model", model), ("model_low_noise", model_low_noise)):
            if patched is None and (pair or label != "model"):
                continue
            found = _report(label, patched, made_by, measure_dense_step)
            # what is said here is not the run's
            report = replace(found, notes=[*found.notes])
            if pair:
                report.model += f", {EXPERTS[label]} expert"
            reports.append(report)
        if pair and attachment_of(model) is attachment_of(model_low_noise) is not None:
            del reports[1:]
            reports[0].note(
                "'model' and 'model_low_noise' are the same model, so there is one report; connect "
                "the high noise expert to 'model' and the low noise expert to 'model_low_noise'"
            )
        title = verdict(reports)
        texts = [record_text(report) for report in reports]
        text = "\n\n".join(texts if len(reports) == 1 else [title, *texts])
        pictures = as_pictures(images)
        # not a copy: what is shown of it is cleaned where it is drawn
        video = None if pictures is None else pictures.numpy()
        pages = [
            _page(report, video, title if at == 0 else "") for at, report in enumerate(reports)
        ]
        picture, told = shown(cls, stacked(pages), text)
        figures = json.dumps({"verdict": title, **reports_json(reports)}, indent=1)
        return io.NodeOutput(text, picture, figures, ui=told)


def _report(label: str, patched, made_by: ImagesOf | None, measure: bool) -> Record:
    """What is known of the runs of a MODEL that made the images; a finished run never ends here."""
    attachment = attachment_of(patched)
    network = getattr(getattr(patched, "model", None), "diffusion_model", None)
    name = "no model" if network is None else type(network).__name__
    if attachment is None:
        # a bypassed node must not cost the artist a finished run
        return _nothing(
            name, "no WanTrim node on this model",
            f"the input '{label}' has no WanTrim plan on it, so nothing was trimmed or timed; "
            "connect the model that comes out of a WanTrim node, or of a node behind it, and take off "
            "its bypass",
        )  # fmt: skip
    if not attachment.runs:
        return _nothing(
            name, attachment.describe(),
            f"the model at '{label}' was not sampled: its sampler had no step to do, another model "
            "is connected there, or ComfyUI forgot the run when memory was short. Connect 'images' "
            "to the VAE Decode of the sampler that uses this model",
        )  # fmt: skip
    found = attachment.runs[-1:] if made_by is None else made_by.find(attachment.runs)
    if not found:
        return _nothing(
            name, attachment.describe(),
            f"the model at '{label}' did not sample these images: its last run made others, or an "
            "earlier version of them. Connect 'images' to the VAE Decode of the sampler that uses "
            "this model, and the sampler to this model",
        )  # fmt: skip
    report = join_records([ran.record for ran in found])
    speed = measured_speed(report)
    if measure and report.steps and (speed is None or speed.warming_up):
        first = next(ran for ran in found if ran.record.steps)
        report = _with_dense_step(report, patched, first)
    return report


def _nothing(model: str, planned: str, why: str) -> Record:
    report = Record(model, planned=planned, finished=True)
    report.note(why)
    return report


def _page(report: Record, video: np.ndarray | None, title: str) -> Image.Image:
    try:
        return draw_report(report, video, title)
    except Exception:
        # whatever came as images, the run is done and its words are there
        log.warning("WanTrim Report: the picture could not be drawn", exc_info=True)
        why = "the picture could not be drawn; see the text"
        return draw_report(_nothing(report.model, report.planned, why))


def _with_dense_step(report: Record, model, ran: Ran) -> Record:
    """The report with the seconds of a whole step, or with the reason why there are none."""
    report = replace(report, notes=[*report.notes])
    reason = ran.unmeasurable
    if reason is None and len(ran.calls) != report.steps[0].calls:
        reason = "another node made or answered calls of the first step"
    if reason is None:
        try:
            report.dense_seconds = time_dense_step(model, ran.calls)
        except comfy.model_management.OOM_EXCEPTION:
            reason = "there was not enough memory for it"
        except Exception as error:
            log.warning("WanTrim Report: no whole step could be timed", exc_info=True)
            reason = f"the model could not be run apart ({type(error).__name__})"
    if reason is not None:
        report.note(f"no whole step was timed: {reason}")
    return report


NODES = [WanTrimReport]
