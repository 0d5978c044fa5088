"""The tiny Wan in ComfyUI: runs on a CPU, downloads nothing."""

from __future__ import annotations

import numpy as np
import torch

import comfy.sd
from comfy_api.latest import io

from ..toy import CHECKPOINT
from ..toy.text import encode_prompt
from ..toy.vae import ToyVAE, from_wan_scale, to_wan_scale
from ..toy.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    HEIGHT,
    MAX_OBJECTS,
    SHAPES,
    SPEEDS,
    WIDTH,
    parse_prompt,
    render,
)
from . import inputs

CATEGORY = "model/patch/wan/demo"
PROMPT = "a red circle moving right slowly on a black background"
GRAMMAR = (
    f"'a COLOUR SHAPE moving DIRECTION SPEED on a GROUND background', up to {MAX_OBJECTS} shapes "
    f"joined by 'and'. Colours: {', '.join(COLOURS)}. Shapes: {', '.join(SHAPES)}. Directions: "
    f"{', '.join(DIRECTIONS)}. Speeds: {', '.join(SPEEDS)}. Grounds: {', '.join(BACKGROUNDS)}."
)


class DemoVAE:
    """The toy VAE with the two methods that ComfyUI's own VAE nodes call."""

    def __init__(self):
        self.vae = ToyVAE.load()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images [frames, h, w, 3] to a Wan latent [1, 16, f, h/8, w/8]."""
        video = pixels[..., :3].movedim(-1, 0)[None]
        return to_wan_scale(self.vae.encode(video.float().cpu()))

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Wan latents [b, 16, f, h, w] to images [b, frames, 8h, 8w, 3]."""
        return self.vae.decode(from_wan_scale(samples.float().cpu())).movedim(1, -1)


def _valid(node: str, prompt: str) -> bool | str:
    """Whether a prompt that does not come over a link is one, or why not."""
    try:
        parse_prompt(prompt)
    except ValueError as error:
        return f"{node}: {error}"
    return True


class WanTrimDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimDemoModel",
            display_name="WanTrim Demo: Tiny Wan",
            category=CATEGORY,
            description=(
                "A real Wan of 3.9 M parameters, trained on a toy world of moving shapes. It makes "
                f"{WIDTH}x{HEIGHT} videos of 17 frames, text- or image-to-video, on any computer. "
                "A test bench, not a promise about the 14B model."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The tiny Wan, for text- and image-to-video."),
                io.Vae.Output(tooltip="Its VAE, for VAE Decode and WanImageToVideo."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        try:
            model = comfy.sd.load_diffusion_model(str(CHECKPOINT))
        except Exception as error:
            raise ValueError(
                f"WanTrim Demo: Tiny Wan: {CHECKPOINT.name} that came with the pack cannot be read "
                f"({error}). Expected the tiny Wan as safetensors; reinstall the pack."
            ) from error
        return io.NodeOutput(model, DemoVAE())


class WanTrimDemoPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimDemoPrompt",
            display_name="WanTrim Demo: Prompt",
            category=CATEGORY,
            description=f"Encodes a prompt of the toy world: {GRAMMAR}",
            inputs=[
                io.String.Input(
                    "prompt",
                    default=PROMPT,
                    multiline=True,
                    tooltip=f"{GRAMMAR} Empty is the negative prompt.",
                )
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def validate_inputs(cls, prompt: str | None = None) -> bool | str:
        return prompt is None or not prompt.strip() or _valid("WanTrim Demo: Prompt", prompt)

    @classmethod
    def execute(cls, prompt: str) -> io.NodeOutput:
        return io.NodeOutput([[encode_prompt(prompt)[None], {}]])


class WanTrimDemoImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimDemoImage",
            display_name="WanTrim Demo: Start Image",
            category=CATEGORY,
            description="Draws the first frame of a toy video, to start image-to-video from.",
            inputs=[
                io.String.Input("prompt", default=PROMPT, multiline=True, tooltip=GRAMMAR),
                inputs.number(
                    "seed",
                    0,
                    (0, 2**32 - 1),
                    "Chooses where the shapes stand and how large they are.",
                    control_after_generate=io.ControlAfterGenerate.fixed,
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def validate_inputs(cls, prompt: str | None = None) -> bool | str:
        return prompt is None or _valid("WanTrim Demo: Start Image", prompt)

    @classmethod
    def execute(cls, prompt: str, seed: int) -> io.NodeOutput:
        video = render(parse_prompt(prompt), np.random.default_rng(seed))
        return io.NodeOutput(torch.from_numpy(video[:1].copy()))


NODES = [WanTrimDemoModel, WanTrimDemoPrompt, WanTrimDemoImage]
