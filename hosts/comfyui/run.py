"""One sampling run: what is known of it while it lasts, and what is said when it is over."""

from __future__ import annotations

import logging
from collections.abc import Hashable

import torch

from ...engine.call import Call
from ...engine.engine import Engine
from ...report.figures import expected_speedup
from ...solve.course import Course
from ...solve.solver import TOLERANCE
from .compiled import Compiled
from .dense_step import Unmeasurable, call_sizes
from .dial import Wish
from .given import Kept, as_dict
from .runs import Ran

log = logging.getLogger(__name__)
SESSION_KEY = "wantrim_session"
# the host's patches that see the hidden state between two blocks
BETWEEN = "double_block"


class SamplingRun(Kept):
    """The engine of one sampling run and the model's way from sigma to progress.

    Args:
        ran: what a report will need of it.
    """

    def __init__(self, engine: Engine, shift: float, model_options: dict, ran: Ran):
        self.engine, self.shift, self.model_options = engine, shift, model_options
        self.ran = ran
        # whether anything is to be left out
        self.wanted = False
        # why this run computes everything
        self.dense: str | None = None
        # why this run looks into no block
        self.patched: str | None = None
        # the host runs cond and uncond in two calls, uncond first
        self.split = False
        self.awaits_cond = False
        # what a step is going to run, whichever call of it this is
        self.due: list[tuple[Hashable, int]] = []
        # of the call that runs, before the host rounds it to the model's dtype
        self.latent: torch.Tensor | None = None
        # and of the LoRAs that the host switches on and off while it samples
        self.strengths: tuple[float, ...] = ()
        # that the run is of; a guider may have another one for one of its prompts
        self.network: torch.nn.Module | None = None
        # of the call that runs: what a compile node made of the model
        self.compiled: Compiled | None = None
        # and the network's own forward was entered
        self.reached = False
        # the block replacements that were made for it
        self.call: Call | None = None
        self.replaced: dict | None = None
        # a dial's, until the first model call; from then on its plan
        self.wish: Wish | None = None
        self.course: Course | None = None

    def note_call(self, arguments: dict) -> None:
        """Keep the sizes of a model call that was made, if it is of the first step."""
        if len(self.engine.record.steps) != 1 or self.ran.unmeasurable is not None:
            return
        try:
            self.ran.calls.append(call_sizes(arguments))
        except Unmeasurable as error:
            self.ran.unmeasurable = str(error)

    def close(self, completed: bool, levels: int) -> None:
        """The run is over: let go of what it held, and say what became of it.

        Args:
            levels: sigmas that the sampler was given.
        """
        try:
            self.engine.finish(completed)
            if self.course is not None:
                self.ran.solved, self.ran.came = self.course.solved, self.course.ran
            if completed and self.wanted and self.dense is None:
                compare_run(self, levels)
        except Exception:
            # a finished video is worth more than its report
            log.exception("WanTrim: what this run did could not be told")
            self.engine.memory.clear()


def hook_strengths(model) -> tuple[float, ...]:
    """Of the LoRAs that the host switches on and off while it samples, as they are in this call."""
    hooks = getattr(getattr(model, "current_patcher", None), "current_hooks", None)
    return tuple(getattr(hook, "strength", 1.0) for hook in getattr(hooks, "hooks", ()))


def compare_run(run: SamplingRun, levels: int) -> None:
    """Say where a finished run is not what the dial expected, or was never seen."""
    record = run.engine.record
    if not record.steps:
        if levels > 1:
            record.note(
                "the model was never called through ComfyUI's hooks: another node put a forward or "
                "a sampler of its own in its place, and nothing was trimmed"
            )
        return
    if run.course is None:
        return
    solved, ended = run.course.solved, run.course.ended
    if ended is not None and ended.why is None:
        # it came of the steps that came, whatever was expected
        solved, record.missed = ended, False
    if solved.why is not None:
        met = f"{solved.reached:.2f}x is expected"
        if solved.together is not None:
            both, own = ("both experts", "expert") if record.both else ("the video", "sampler")
            own = f"{solved.reached:.2f}x of this {own}'s own steps"
            met = f"{solved.together:.2f}x is expected of {both} ({own})"
        record.note(f"{solved.wanted:.2f}x was asked for and {met}: {solved.why}")
    expected, done = solved.reached, expected_speedup(record)
    if done and abs(done / expected - 1) > TOLERANCE:
        record.note(
            f"{expected:.2f}x was expected and {done:.2f}x was done: the steps that came, or what "
            "was done in them, are not those that the sampler announced"
        )


@torch.compiler.disable
def mark_network(executor, *args, **kwargs):
    """The innermost wrapper: what comes by is answered by the network itself."""
    given = (*args, *kwargs.values())
    options = next((one for one in given if isinstance(one, dict) and SESSION_KEY in one), {})
    if options:
        run: SamplingRun = options[SESSION_KEY]
        run.reached = True
        own = as_dict(options.get("patches_replace")).get("dit") is run.replaced
        if run.call is not None and not (own and not as_dict(options.get("patches")).get(BETWEEN)):
            # a wrapper behind ours put something between the blocks
            run.call.watched_between()
    return executor(*args, **kwargs)
