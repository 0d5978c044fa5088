"""The node that says what really ran."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import torch

import comfy.model_management
from comfy_api.latest import io, ui

from ..engine.record import Record
from ..hosts.comfyui.attach import Attachment, attachment_of
from ..hosts.comfyui.dense_step import time_dense_step
from ..report.figures import reports_json
from ..report.picture import draw_report
from ..report.words import record_text

NAME = "WanTrim Report"


class WanTrimReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimReport",
            display_name=NAME,
            category="model/patch/wan",
            description=(
                "Says what WanTrim really did in the run that made these images: blocks, heads and "
                "tokens per step beside the plan, seconds per step beside whole steps of the same "
                "run, which parts of the picture were computed, and what did not happen and why."
            ),
            search_aliases=["trim report", "token overlay", "wan benchmark"],
            is_output_node=True,
            # the report of a run is not a function of the inputs
            not_idempotent=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that was sampled, with WanTrim on it."),
                io.Image.Input(
                    "images",
                    tooltip="The decoded video of that run; the kept tokens are drawn over it.",
                ),
                io.Model.Input(
                    "model_low_noise",
                    optional=True,
                    tooltip="Wan2.2: the second expert's model, to report both.",
                ),
                io.Boolean.Input(
                    "measure_dense_step",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "After the run, time one step of the untouched model on random input of the "
                        "same size, to compare the trimmed steps with. Takes two steps' time."
                    ),
                ),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="The report in words."),
                io.Image.Output(
                    "picture", display_name="picture", tooltip="The report as a picture."
                ),
                io.String.Output(
                    "json", display_name="json", tooltip="All figures of the report as JSON."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, images: torch.Tensor, model_low_noise=None, measure_dense_step: bool = False
    ) -> io.NodeOutput:
        reports = []
        pair = model_low_noise is not None
        if pair and attachment_of(model) is attachment_of(model_low_noise) is not None:
            raise ValueError(
                f"{NAME}: 'model' and 'model_low_noise' are the same model. Connect the high noise "
                "expert to 'model' and the low noise expert to 'model_low_noise'."
            )
        for label, patched in (("model", model), ("model_low_noise", model_low_noise)):
            if patched is None:
                continue
            attachment = attachment_of(patched)
            if attachment is None:
                # a bypassed node must not cost the artist a finished run
                reports.append(_nothing_on(label, type(patched.model.diffusion_model).__name__))
                continue
            if attachment.record is None:
                raise ValueError(
                    f"{NAME}: the model at '{label}' was not sampled yet. Connect 'images' to the "
                    "VAE Decode of the sampler that uses this model."
                )
            expert = {"model": "high noise", "model_low_noise": "low noise"}[label]
            report = attachment.record
            if measure_dense_step and report.steps:
                report = _with_dense_step(patched, attachment)
            reports.append(
                replace(report, model=f"{report.model}, {expert} expert") if pair else report
            )
        text = "\n\n".join(record_text(report) for report in reports)
        video = images.cpu().float().numpy()
        pages = [draw_report(report, video) for report in reports]
        width = max(page.width for page in pages)
        canvas = np.zeros((sum(page.height for page in pages), width, 3), np.float32)
        top = 0
        for page in pages:
            canvas[top : top + page.height, : page.width] = np.asarray(page, np.float32) / 255
            top += page.height
        picture = torch.from_numpy(canvas)[None]
        shown = {**ui.PreviewImage(picture, cls=cls).as_dict(), "text": (text,)}
        figures = json.dumps(reports_json(reports), indent=1)
        return io.NodeOutput(text, picture, figures, ui=shown)


def _nothing_on(label: str, model: str) -> Record:
    report = Record(model, planned="no WanTrim node on this model", finished=True)
    report.note(
        f"the input '{label}' has no WanTrim plan on it, so nothing was trimmed or timed; connect "
        "the output of WanTrim Tokens, or of a node behind it, and take off its bypass"
    )
    return report


def _with_dense_step(model, attachment: Attachment) -> Record:
    """The report with the seconds of a dense step, or with the reason why there are none."""
    report = replace(attachment.record, notes=[*attachment.record.notes])
    reason = attachment.unmeasurable
    if reason is None and len(attachment.calls) != report.steps[0].calls:
        reason = "another node made or answered calls of the first step"
    if reason is None:
        try:
            report.dense_seconds = time_dense_step(model, attachment.calls)
        except comfy.model_management.OOM_EXCEPTION:
            reason = "there was not enough memory for it"
    if reason is not None:
        report.note(f"no dense step was timed: {reason}")
    return report


NODES = [WanTrimReport]
