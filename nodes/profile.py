"""The nodes that record, save and load what was measured about a model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError

import folder_paths
from comfy_api.latest import io

from ..hosts.comfyui.profiling import attach_profile, profile_of
from ..hosts.comfyui.slim import refuse_slim
from ..hosts.comfyui.variants import check_variant
from ..profiles.calibration import CALIBRATE
from ..profiles.picture import draw_profile, summary
from ..profiles.profile import load_profile
from ..profiles.recorder import (
    CALIBRATION_ENDING,
    NotFinite,
    ProfileFile,
    calibration_path,
    open_profile,
    save_profile,
)
from ..toy import PROFILE
from . import inputs
from .files import SUFFIX, add_folder, cannot_write, find_file, plain_name, valid_name
from .inputs import check_choice, image_output, model_input, shown, text_output

CATEGORY = "model/patch/wan"
FOLDER = "wantrim_profiles"
RECORD, SAVE, LOAD = "WanTrim Profile", "WanTrim Save Profile", "WanTrim Load Profile"
# shown in the list; comes with the pack
DEMO, DEMO_FILE = "tiny Wan (demo)", PROFILE

ProfileSocket = io.Custom("WANTRIM_PROFILE")

add_folder(FOLDER, "profiles")


class WanTrimProfile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimProfile",
            display_name=RECORD,
            category=CATEGORY,
            description=(
                "Records what each attention head and FFN channel of a Wan model does, and how far the "
                "video changes from step to step, while you sample as usual: your prompts, LoRAs and "
                "size, 4 steps or 50. The video stays the same, bit for bit. Place it after the LoRA "
                "and before ModelSamplingSD3, and save with WanTrim Save Profile."
            ),
            search_aliases=["PARE", "head roles", "calibrate wan", "record profile"],
            inputs=[
                model_input(),
                inputs.choice(
                    "calibrate",
                    CALIBRATE,
                    "What to record for the least-squares refit of a slim model, beside the "
                    "profile. It needs memory: on 14B 'attention' 8.4 GB and 'all' 39 GB of RAM, "
                    "and as much on disk.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model; it records whenever it is sampled.")],
        )

    @classmethod
    def execute(cls, model, calibrate: str) -> io.NodeOutput:
        check_variant(model, RECORD, "record")
        refuse_slim(model, RECORD)
        check_choice(RECORD, "calibrate", calibrate, list(CALIBRATE))
        return io.NodeOutput(attach_profile(model, calibrate))


class WanTrimSaveProfile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimSaveProfile",
            display_name=SAVE,
            category=CATEGORY,
            description=(
                "Saves what WanTrim Profile recorded in the run that made these images into "
                "models/wantrim/profiles, and draws it: head roles, importance, and how much "
                "attention stays in its own latent frame."
            ),
            search_aliases=["PARE", "head roles", "save profile"],
            is_output_node=True,
            # what a run showed is not a function of the inputs
            not_idempotent=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that was sampled, with WanTrim Profile on it."
                ),
                io.Image.Input(
                    "images",
                    tooltip="The decoded video of that run; it only says that sampling comes first.",
                ),
                io.String.Input(
                    "filename",
                    default="my_wan",
                    tooltip=(
                        "Name of the file, without a folder. One file for each model; on Wan 2.2 one "
                        "for each expert."
                    ),
                ),
                inputs.switch(
                    "merge",
                    True,
                    "On: add the run to the file, if there is one of the same model. Off: "
                    "replace the file.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = None) -> bool | str:
        return valid_name(SAVE, filename, "wan_14b_t2v")

    @classmethod
    def execute(cls, model, images: torch.Tensor, filename: str, merge: bool) -> io.NodeOutput:
        name = plain_name(SAVE, filename, "wan_14b_t2v")
        path = Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{name}{SUFFIX}"
        attachment = profile_of(model)
        if attachment is None:
            raise ValueError(
                f"{SAVE}: the input 'model' has no WanTrim Profile on it. Connect the output of "
                "WanTrim Profile, or of a node behind it, and take off its bypass."
            )
        recorder = attachment.recorder
        if recorder is None or not recorder.calls:
            reasons = [attachment.reason] if recorder is None else recorder.notes
            raise ValueError(
                f"{SAVE}: nothing was recorded: {'; '.join(reasons) or 'no positive prompt was run'}. "
                "Connect 'images' to the VAE Decode of the sampler that uses this model."
            )
        try:
            saved = save_profile(recorder, path, merge)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{SAVE}: {cannot_write(path, error)}") from error
        except NotFinite as error:
            raise ValueError(f"{SAVE}: {error}.") from error
        except ValueError as error:
            raise ValueError(
                f"{SAVE}: the run cannot be added to {path.name}: {error}. Choose another filename, "
                "or turn merge off to replace that file."
            ) from error
        return _show(cls, saved, path.stem, f"Saved as {path.name}.")


class WanTrimLoadProfile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimLoadProfile",
            display_name=LOAD,
            category=CATEGORY,
            description=(
                "Loads what was measured about a Wan model from models/wantrim/profiles, for WanTrim "
                "Heads and WanTrim Slim, and, where a whole run is in it, for WanTrim and WanTrim "
                "Pair; and draws it. A profile of the demo's tiny Wan comes with the pack, without "
                "such a run."
            ),
            search_aliases=["PARE", "head roles", "load profile"],
            # so that a profile can be looked at alone
            is_output_node=True,
            inputs=[
                inputs.choice(
                    "filename",
                    [DEMO, *saved_profiles()],
                    "A file that WanTrim Save Profile or WanTrim Verdict wrote. One for each model.",
                )
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, filename: str) -> str:
        """Load again when the file was written again."""
        path = _find(filename)
        if path is None:
            return ""
        files = [file for file in (path, calibration_path(path)) if file.is_file()]
        return repr([(str(file), file.stat().st_mtime_ns) for file in files])

    @classmethod
    def execute(cls, filename: str) -> io.NodeOutput:
        path = _find(filename)
        if path is None:
            raise ValueError(
                f"{LOAD}: filename: there is no profile {filename!r:.120} in models/wantrim/profiles. "
                "Choose one of the list, or record one with WanTrim Profile."
            )
        try:
            opened = ProfileFile(load_profile(path)) if path == DEMO_FILE else open_profile(path)
        except ValueError as error:
            raise ValueError(f"{LOAD}: {error}") from error
        return _show(cls, opened, path.stem, f"Loaded from {path.name}.")


def saved_profiles() -> list[str]:
    """Files in the profile folders, without the calibrations beside them."""
    return [
        name
        for name in folder_paths.get_filename_list(FOLDER)
        if name.endswith(SUFFIX) and not name.endswith(CALIBRATION_ENDING)
    ]


def _find(filename: str) -> Path | None:
    return DEMO_FILE if filename == DEMO else find_file(FOLDER, filename)


def _outputs() -> list:
    return [
        ProfileSocket.Output(
            "profile",
            display_name="profile",
            tooltip="For WanTrim Heads and Slim; with a whole run in it for WanTrim and WanTrim Pair.",
        ),
        image_output("picture", "The profile as a picture."),
        text_output("The profile in words."),
    ]


def _show(cls, opened: ProfileFile, name: str, said: str) -> io.NodeOutput:
    text = f"{said}\n{summary(opened.profile)}"
    if opened.calibration is not None:
        text += f"\nCalibration for WanTrim Slim: {opened.calibration.name}"
    picture, told = shown(cls, draw_profile(opened.profile, name), text)
    return io.NodeOutput(opened, picture, text, ui=told)


NODES = [WanTrimProfile, WanTrimSaveProfile, WanTrimLoadProfile]
