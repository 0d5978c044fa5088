"""Records a profile of a ComfyUI MODEL while it is sampled, and leaves nothing behind.

Two keyed wrappers: OUTER_SAMPLE makes the recorder of a run; DIFFUSION_MODEL, in the run's own copy
of the options and behind all others, watches the blocks of each call. Other plans and other nodes'
patches run inside of it, so that the model is recorded as it runs.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass, field, replace

import torch

from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ...engine.compiled import paused
from ...engine.engine import check_latent
from ...profiles.calibration import calibration_bytes
from ...profiles.fingerprint import WHOLE, Fingerprint, sample_modulation, width_digest
from ...profiles.profile import Profile
from ...profiles.recorder import Projections, Recorder
from ...profiles.recording import BlockWatch, CallRecord
from ...solve.tuned import Tuned, Way
from .attach import attachment_of
from .blocks import OVERRIDE, AttentionTap, with_replacements
from .given import (
    Kept,
    ModelCall,
    as_dict,
    attached,
    options_in,
    options_of,
    own_options,
    prompts_of,
    watch_velocity,
)
from .live import running_prompt
from .slim import slim_header
from .variants import RUN_KEY, anchored_frames, starts_given, token_grid

log = logging.getLogger(__name__)

KEY = "wantrim_profile"
# the key under which ComfyUI's compile nodes wrap the model
COMPILE_KEY = "torch.compile"
ONE_OF_SEVERAL = (
    "another sampler used this model before in this run of the workflow: what it did is not in here"
)
NOT_WHOLE = (
    "WanTrim cannot be solved by this run: that takes two steps or more, each one call that computes "
    "all (no other WanTrim node, step cache or context windows; a sampler with one call a step)"
)


@dataclass(eq=False)
class ProfileAttachment(Kept):
    """A recorder as it sits on a MODEL, with what the last run showed.

    Args:
        calibrate: name in `profiles.calibration.CALIBRATE`.
        recorder: of the last run, if there is something in it.
        reason: why there is none.
        prompt: id of the queue entry of the last run, or None.
    """

    calibrate: str
    recorder: Recorder | None = None
    reason: str = "the model was not sampled yet"
    prompt: str | None = None


def profile_of(model) -> ProfileAttachment | None:
    """The recorder that sits on a MODEL, or None."""
    return options_of(model).get(KEY)


def attach_profile(model, calibrate: str = "none"):
    """A clone of a MODEL that records a profile whenever it is sampled."""
    patched = detach_profile(model)
    patched.model_options["transformer_options"][KEY] = ProfileAttachment(calibrate)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    return patched


def detach_profile(model):
    """A clone of a MODEL that does not record."""
    clean = model.clone()
    clean.model_options["transformer_options"].pop(KEY, None)
    clean.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    return clean


def model_fingerprint(network) -> Fingerprint:
    """Sizes of a Wan network (the diffusion_model of a MODEL), and its modulation's sample."""
    tables = [block.modulation for block in network.blocks]
    return Fingerprint(
        dim=network.dim,
        ffn_dim=network.ffn_dim,
        num_blocks=len(network.blocks),
        num_heads=network.num_heads,
        in_channels=network.in_dim,
        out_channels=network.out_dim,
        sample=sample_modulation([*tables, network.head.modulation]),
    )


def fingerprint_of(model) -> Fingerprint:
    """Of a MODEL, which may be a slim one."""
    header = slim_header(model)
    width = WHOLE if header is None else width_digest(header.model, header.width)
    return replace(model_fingerprint(model.model.diffusion_model), width=width)


def check_profile(model, profile: Profile, node: str, given: str = "profile") -> None:
    """Refuse a profile of another model than this MODEL, which came by the input `given`."""
    reason = fingerprint_of(model).differs(profile.model)
    if reason is not None:
        raise ValueError(
            f"{node}: {given}: it was recorded with another model than the one at 'model': "
            f"{reason}. Load the profile that belongs to this model, or record one with WanTrim "
            "Profile."
        )


@dataclass(eq=False)
class _Run(Kept):
    """The recorder of one sampling run; it is made when the network is seen.

    Args:
        prompts: of each step.
        whole: whether every step so far computed all of the video at once.
        known: noise levels that were announced, whether the start is given, and the tokens.
        sizes: [f, h, w] of what the model was called with.
        steps, counted: that came, and calls that were recorded in them.
    """

    calibrate: str
    about: dict
    prompts: int
    whole: bool
    recorder: Recorder | None = None
    known: tuple[tuple[float, ...], bool, int] = ((), False, 0)
    way: Way = field(default_factory=Way)
    sizes: set[torch.Size] = field(default_factory=set)
    steps: int = 0
    counted: int = 0
    notes: list[str] = field(default_factory=list)
    # why nothing of this run can be recorded
    off: str | None = None

    def begin(self, network, given: ModelCall) -> CallRecord | None:
        check_latent(given.x)
        grid = token_grid(network, given.x, given.time_dim_concat, given.extra)
        self.sizes.add(given.x.shape[2:])
        if self.recorder is not None:
            level = float(given.levels.max())
        else:
            anchored = anchored_frames(network, given.x, given.timestep, grid, given.extra)
            announced, level, frames = given.read(anchored)
            self.known = tuple(announced), starts_given(network, frames), grid.tokens
            # a slim one is refused at the node
            model = replace(model_fingerprint(network), width=WHOLE)
            image = hasattr(network.blocks[0].cross_attn, "k_img")
            self.recorder = Recorder(model, image=image, calibrate=self.calibrate, about=self.about)
            if self.calibrate != "none":
                needed = calibration_bytes(model, self.calibrate) / 1e9
                log.info("WanTrim Profile: the calibration needs %.1f GB of RAM", needed)
            for note in self.notes:
                self.recorder.note(note)
        return self.recorder.begin(
            sigma=level, grid=grid, cond_or_uncond=given.roles, batch=len(given.x)
        )

    def finish(self, network, call: CallRecord) -> None:
        call.finish()
        if self.recorder.calls:
            # now that all weights are where the model needs them
            layers = [
                Projections(block.self_attn.o, block.cross_attn.o, block.ffn[0], block.ffn[2])
                for block in network.blocks
            ]
            self.recorder.measure_weights(layers, call.like)

    def see(self, sigma: float, velocity: torch.Tensor) -> None:
        """The velocity of a step, guidance included."""
        calls = 0 if self.recorder is None else self.recorder.calls
        self.whole &= calls > self.counted and self.sizes == {velocity.shape[2:]}
        self.steps, self.counted = self.steps + 1, calls
        self.way.see(sigma, velocity)

    def end(self) -> None:
        """All steps were done: how far the velocity went is told, if a dial may go by it."""
        travel, (sigmas, given, tokens) = self.way.ended(), self.known
        if not self.counted:
            return
        pairs = zip(() if travel is None else travel.sigmas, sigmas, strict=False)
        off = [abs(came - min(1.0, announced)) for came, announced in pairs]
        # samplers of several calls a step have more, others a schedule of their own
        if self.whole and self.steps == len(off) == len(sigmas) - 1 and max(off) < 1e-3:
            told = Tuned(sigmas, self.prompts, given, tokens, 1.0, None, None, travel)
            self.recorder.whole_run = told
        else:
            self.recorder.note(NOT_WHOLE)


def _outer_sample(executor, *args, **kwargs):
    guider = executor.class_obj
    attachment: ProfileAttachment | None = attached(
        guider.model_options, KEY, "nothing is recorded"
    )
    if attachment is None:
        return executor(*args, **kwargs)
    prompt = running_prompt()
    again = attachment.recorder is not None and prompt is not None and attachment.prompt == prompt
    attachment.prompt = prompt
    # a run that was not saved lets go of what it held before the next one holds as much
    attachment.recorder, attachment.reason = None, "the last run was cancelled or failed"
    sampling = guider.model_patcher.get_model_object("model_sampling")
    about = {"id": uuid.uuid4().hex}
    shift = getattr(sampling, "shift", None)
    if shift is not None:
        about["shift"] = float(shift)
    plan = attachment_of(guider.model_patcher)
    if plan is not None and not plan.neutral:
        about["plan"] = plan.describe()
    run = _Run(attachment.calibrate, about, len(prompts_of(guider)), "plan" not in about)
    if again:
        run.notes.append(ONE_OF_SEVERAL)
    wrappers = options_in(guider.model_options).get("wrappers", {})
    if COMPILE_KEY in wrappers.get(WrappersMP.APPLY_MODEL, {}):
        run.notes.append("torch.compile: the recorded run was not compiled")
    try:
        # a compiled model would repeat an earlier run, in which nobody watched
        with own_options(guider) as options, paused():
            options["transformer_options"][RUN_KEY] = run
            # last, so that what other packs do to a call happens inside the blocks that are watched
            add_wrapper_with_key(
                WrappersMP.DIFFUSION_MODEL, KEY, _diffusion_model, options, is_model_options=True
            )
            watch_velocity(options, KEY, run.see)
            result = executor(*args, **kwargs)
        run.end()
        attachment.recorder = run.recorder
        attachment.reason = run.off or "the last run never called the model"
        return result
    finally:
        if run.recorder is not None:
            log.info("WanTrim Profile: %d calls recorded", run.recorder.calls)


@torch.compiler.disable
def _diffusion_model(executor, *args, **kwargs):
    given, network = ModelCall.of(*args, **kwargs), executor.class_obj
    run: _Run | None = given.options.get(RUN_KEY)
    if run is not None and "multigpu_thread_device" in given.options:
        run.off = "several GPUs share a step, and each sees a part of it"
    if run is None or run.off is not None or given.unreadable is not None:
        return given.run(executor, given.options)
    call, options = run.begin(network, given), given.options
    if call is None:
        return given.run(executor, options)
    patches = as_dict(options.get("patches"))
    if patches.get("attn1_patch") or patches.get("attn2_patch"):
        run.recorder.note("another node patches the attention: what it adds was not recorded")

    def watch(index: int, previous) -> _WatchedBlock:
        return _WatchedBlock(call, index, previous, options)

    out = given.run(executor, with_replacements(options, len(network.blocks), watch))
    run.finish(network, call)
    return out


class _WatchedBlock:
    """The ("double_block", i) replacement of one call; an earlier replacement runs inside of it."""

    def __init__(self, call: CallRecord, index: int, previous, options: dict):
        self.call, self.index, self.previous = call, index, previous
        # for a forward of another pack that hands none to its blocks
        self.options = options

    def __call__(self, args: dict, extra: dict) -> dict:
        original, length = extra["original_block"], args["img"].shape[1]

        def watched(args: dict) -> dict:
            record = self.call.block(self.index, args["img"], length)
            if record is None:
                return original(args)
            options = dict(as_dict(args.get("transformer_options")) or self.options)
            # the outermost
            options[OVERRIDE] = AttentionTap(record.attention, options.get(OVERRIDE), options)
            with BlockWatch(record):
                out = original({**args, "transformer_options": options})
            record.done()
            return out

        if self.previous is None:
            return watched(args)
        return self.previous(args, {**extra, "original_block": watched})
