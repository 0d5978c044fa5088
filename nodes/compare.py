"""The node that says what trimming cost: the trimmed video beside the whole one."""

from __future__ import annotations

import json

import torch

from comfy_api.latest import io

from ..report.compare import compare, draw_difference, side_by_side, why_not
from ..report.picture import as_pictures
from .inputs import image_output, shown, text_output, ticking

NAME = "WanTrim Compare"


class WanTrimCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimCompare",
            display_name=NAME,
            category="model/patch/wan",
            description=(
                "Compares a trimmed video with the whole model's of the same seed: PSNR, SSIM, motion "
                "and flicker, a clip of both side by side, where they differ, and a plain verdict. "
                "It measures difference, not beauty."
            ),
            search_aliases=["PSNR", "SSIM", "compare videos", "quality check"],
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "dense", tooltip="The decoded video of the untouched model, with the same seed."
                ),
                io.Image.Input(
                    "trimmed", tooltip="The decoded video of the model with WanTrim on it."
                ),
            ],
            outputs=[
                text_output("The verdict in words."),
                image_output(
                    "side_by_side", "The clip of both: whole on the left, trimmed on the right."
                ),
                image_output("difference", "A picture: frames of both, and where they differ."),
                text_output("The numbers as JSON.", "json"),
            ],
        )

    @classmethod
    def execute(cls, dense: torch.Tensor, trimmed: torch.Tensor) -> io.NodeOutput:
        given = {"dense": as_pictures(dense), "trimmed": as_pictures(trimmed)}
        for name, video in given.items():
            if video is None:
                raise ValueError(
                    f"{NAME}: '{name}' got no pictures. Connect the VAE Decode of a finished video."
                )
            reason = why_not(video, None if name == "dense" else given["dense"])
            if reason is not None:
                raise ValueError(
                    f"{NAME}: '{name}' {reason}. Decode both from samplers with the same latent and "
                    "seed; where values are no numbers its sampling diverged: lower what trims it"
                )
        dense, trimmed = given.values()
        found = compare(dense, trimmed, ticking(len(dense)))
        text = found.verdict()
        picture, told = shown(cls, draw_difference(dense, trimmed, found), text)
        figures = json.dumps(found.json(), indent=1)
        return io.NodeOutput(text, side_by_side(dense, trimmed), picture, figures, ui=told)


NODES = [WanTrimCompare]
