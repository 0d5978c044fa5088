"""The nodes that write and load slim checkpoints: fewer heads and FFN channels, for good."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..hosts.comfyui.slim import DTYPES, load_slim
from ..slim.export import RULES, TICKS, slim_checkpoint
from ..toy import CHECKPOINT
from . import inputs
from .files import SUFFIX, add_folder, cannot_write, find_file, list_files, plain_name, valid_name
from .inputs import check_choice, check_range, prune_input, text_output
from .profile import DEMO, ProfileSocket

CATEGORY = "model/patch/wan"
TRIM, LOAD = "WanTrim Slim", "WanTrim Load Slim"
FOLDER = "wantrim_slim"
MAX_PRUNE = 0.8

add_folder(FOLDER, "slim", first=True)


class WanTrimSlim(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimSlim",
            display_name=TRIM,
            category=CATEGORY,
            description=(
                "Writes a smaller checkpoint of a Wan model: whole attention heads and FFN channels "
                "are left out, chosen from a profile (PARE, arXiv 2605.27336). Runs faster and "
                "needs less memory everywhere; no training. Load it with WanTrim Load Slim."
            ),
            search_aliases=["PARE", "prune model", "smaller wan", "export slim checkpoint"],
            is_output_node=True,
            inputs=[
                inputs.choice(
                    "diffusion_model",
                    [DEMO, *list_files("diffusion_models")],
                    "The full Wan checkpoint that was profiled: bf16, fp16, fp32 or plain fp8 "
                    "safetensors. GGUF and scaled fp8 cannot be cut.",
                ),
                ProfileSocket.Input(
                    "profile",
                    tooltip="From WanTrim Load Profile or WanTrim Save Profile, of this model.",
                ),
                prune_input(
                    MAX_PRUNE,
                    "Share that goes: of the parameters of heads and FFN channels, with rule 'pare' of "
                    "the heads and channels of every block. The paper uses 0.30, with training "
                    "afterwards; without, stay below.",
                ),
                inputs.choice(
                    "rule",
                    RULES,
                    "'budget': that share of the parameters goes where the profile says that it "
                    "matters least; kept more on our toy bench. 'pare': as published, equally many in every "
                    "block.",
                ),
                inputs.switch(
                    "refit",
                    True,
                    "Let the projections that are left make up for what goes (least squares). "
                    "Needs a profile that was recorded with calibration on.",
                ),
                io.String.Input(
                    "filename",
                    default="wan_slim",
                    tooltip="Name of the new file in models/wantrim/slim.",
                ),
                inputs.switch(
                    "overwrite", False, "Replace a file of that name. Off: refuse.", advanced=True
                ),
            ],
            outputs=[text_output("What was written, in words.")],
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = None) -> bool | str:
        return valid_name(TRIM, filename, "wan_slim")

    @classmethod
    def execute(
        cls,
        diffusion_model: str,
        profile,
        prune_ratio: float,
        rule: str,
        refit: bool,
        filename: str,
        overwrite: bool = False,
    ) -> io.NodeOutput:
        check_range(TRIM, "prune_ratio", prune_ratio, MAX_PRUNE)
        name = plain_name(TRIM, filename, "wan_slim")
        out = Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{name}{SUFFIX}"
        if out.exists() and not overwrite:
            raise ValueError(
                f"{TRIM}: filename: {out.name} is there already. Choose another name, or turn "
                "overwrite on."
            )
        source = CHECKPOINT
        if diffusion_model != DEMO:
            source = find_file("diffusion_models", diffusion_model)
        if source is None:
            raise ValueError(
                f"{TRIM}: diffusion_model: there is no file {diffusion_model!r:.120} in "
                "models/diffusion_models. Choose one of the list."
            )
        bar = comfy.utils.ProgressBar(TICKS)

        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        try:
            summary = slim_checkpoint(
                source,
                out,
                profile.profile,
                calibration=profile.calibration,
                rule=rule,
                prune_ratio=prune_ratio,
                refitted=refit,
                progress=progress,
            )
        except ValueError as error:
            raise ValueError(f"{TRIM}: {error}") from error
        except OSError as error:
            raise ValueError(f"{TRIM}: {cannot_write(out, error)}") from error
        text = summary.text()
        return io.NodeOutput(text, ui={"text": (text,)})


class WanTrimLoadSlim(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimLoadSlim",
            display_name=LOAD,
            category=CATEGORY,
            description=(
                "Loads a slim Wan checkpoint that WanTrim Slim wrote. Use it like Load Diffusion "
                "Model; LoRAs made for the full model apply."
            ),
            search_aliases=["PARE", "load slim wan", "pruned model"],
            inputs=[
                io.Combo.Input(
                    "slim_model",
                    options=list_files(FOLDER),
                    tooltip="A file in models/wantrim/slim, or the student that comes with the pack.",
                ),
                inputs.choice(
                    "weight_dtype",
                    DTYPES,
                    "Number format of the weights in memory; fp8 takes half of bf16.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(tooltip="The slim model.")],
        )

    @classmethod
    def fingerprint_inputs(cls, slim_model: str, weight_dtype: str = "default") -> str:
        # WanTrim Slim can replace a file
        path = find_file(FOLDER, slim_model)
        return "" if path is None else str(path.stat().st_mtime_ns)

    @classmethod
    def execute(cls, slim_model: str, weight_dtype: str = "default") -> io.NodeOutput:
        check_choice(LOAD, "weight_dtype", weight_dtype, list(DTYPES))
        path = find_file(FOLDER, slim_model)
        if path is None:
            raise ValueError(
                f"{LOAD}: slim_model: there is no file {slim_model!r:.120} in models/wantrim/slim. "
                "Choose one of the list, or make one with WanTrim Slim."
            )
        try:
            return io.NodeOutput(load_slim(str(path), weight_dtype))
        except ValueError as error:
            raise ValueError(f"{LOAD}: slim_model: {error}") from error


NODES = [WanTrimSlim, WanTrimLoadSlim]
