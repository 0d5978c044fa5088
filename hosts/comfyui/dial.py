"""A dial's plan, made at a run's first model call: only there everything that it costs is known."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import torch

import comfy.model_management

from ...engine.context import AHEAD, Room, context_bytes
from ...engine.engine import Engine
from ...engine.plan import TrimPlan
from ...engine.record import Record
from ...methods.cost import Width
from ...methods.grid import TokenGrid
from ...methods.shares import place_of
from ...solve.course import Course, run_before
from ...solve.dial import Dial, Run, Solved, flops
from ...solve.floor import device_rates
from .given import ModelCall, prompts_of
from .shape import clip_tokens, device_name, full_shape
from .slim import slim_header
from .variants import is_class, starts_given

# where keys and values of left out tokens may be kept, in an artist's words
PLACES = ("auto", "cpu", "off")
# share of the free memory that they may take: others' needs come and go
SPARE = 0.7
# the host runs both prompts in one call where so many times what that takes is free
BATCHED = 1.5


def free_memory(patcher, device: torch.device) -> float:
    """Bytes that can be had: of the model's own device as the host asks, which gives back weights."""
    ask = getattr(patcher, "get_free_memory", None)
    if callable(ask) and device == getattr(patcher, "load_device", None):
        return ask(device)
    return comfy.model_management.get_free_memory(device)


def find_room(
    place: str,
    device: torch.device,
    needed: Callable[[int], int],
    blocks: int,
    own: float = 0.0,
    patcher=None,
) -> Room | None:
    """Where the keys and values of so many blocks fit; None is nowhere.

    Args:
        place: name in `PLACES`.
        needed: bytes by bits of a number.
        own: bytes that a forward of the model takes on the device.
        patcher: the model.
    """
    # a room is kept on the model that it is of
    model = (lambda: None) if patcher is None else weakref.ref(patcher)

    def fits(where: torch.device, count: float, own: float = 0.0) -> bool:
        free = free_memory(model(), where)
        return count <= min(SPARE * free, free - own)

    ram = torch.device("cpu")
    if place == "off":
        return None
    if place == "auto" or device.type == "cpu":
        for bits in (8, 4):
            if fits(device, needed(bits), BATCHED * own):
                return Room(None, bits, partial(fits, device, needed(bits), BATCHED * own))
    # copies beside the computing are what CUDA has (and ROCm under its name)
    if device.type == "cpu" or (place == "auto" and device.type != "cuda"):
        return None
    for bits in (8, 4):
        if fits(ram, needed(bits)) and fits(device, AHEAD * needed(bits) / blocks, own):
            return Room(ram, bits, partial(fits, ram, needed(bits)))
    return None


@dataclass
class Wish:
    """A dial that waits for the first model call.

    Args:
        plan: what other nodes decided.
        place: where keys and values may be kept, name in `PLACES`.
        prompts: of each kind that a step runs, how many there are: two kinds with guidance.
        width: of a slim model.
        earlier: what was sampled of the same video before, in order.
        patcher: the model; None is not known.
        rooms: where keys and values were kept in earlier runs, by what they take: a run that comes
            again goes the same way, whatever else is in memory, while it can.
    """

    dial: Dial
    plan: TrimPlan
    place: str
    shift: float
    prompts: list[int]
    width: Width | None = None
    earlier: Sequence[Run] = ()
    patcher: object = None
    rooms: dict[int, Room] = field(default_factory=dict)

    @classmethod
    def of(
        cls, dial: Dial, plan: TrimPlan, place: str, rooms: dict[int, Room], guider, shift: float
    ) -> Wish:
        """What a guider tells about the run before it begins."""
        header = slim_header(guider.model_patcher)
        width = None if header is None else header.width
        known = {"patcher": guider.model_patcher, "rooms": rooms}
        return cls(dial, plan, place, shift, prompts_of(guider), width, **known)

    def solve(
        self,
        dm,
        given: ModelCall,
        grid: TokenGrid,
        anchored: torch.Tensor,
        engine: Engine,
        inside: str | None = None,
        alone: bool = True,
    ) -> Course | None:
        """Give an engine its plan, now and whenever other steps come; its record takes in what is in
        the way.

        Args:
            inside: why no block may be looked into, or None.
            alone: nobody else looks between the blocks.
        """
        record = engine.record
        announced, level, frames = given.read(anchored)
        if len(announced) < 2:
            record.note(
                "the sampler did not say which steps it will do, so the speed-up could not be "
                "solved: nothing was left out"
            )
            return None
        if any(later > earlier for earlier, later in pairwise(announced)):
            record.note(
                "the sampler's noise levels go up on the way, so the speed-up could not be "
                "solved: nothing was left out"
            )
            return None
        device = given.x.device
        # a sampler may begin later in its schedule: the steps before are another model's, or done
        announced = tuple(announced[place_of(announced[:-1], level) :])
        shape = full_shape(dm, given.text_tokens, clip_tokens(dm, given.clip_fea))
        # of a batch of videos, and all prompts, however the host splits them
        rows = max(len(given.x), len(given.x) // max(1, len(given.roles)) * sum(self.prompts))
        heads = shape.dim // shape.head_dim
        sizes = shape.num_blocks, grid.start + grid.tokens, heads, shape.head_dim

        def needed(bits: int) -> int:
            return rows * context_bytes(*sizes, bits)

        room = self.rooms.get(needed(8))
        if room is None or not room.more():
            # not every host can tell what a forward takes
            needs = getattr(getattr(self.patcher, "model", None), "memory_required", None)
            own = needs([rows, *given.x.shape[1:]]) if callable(needs) else 0.0
            room = find_room(self.place, device, needed, shape.num_blocks, own, self.patcher)
        if room is not None:
            self.rooms[needed(8)] = room
        run = Run(
            shape, grid, announced, self.shift, len(self.prompts),
            frames if any(frames) else None, starts_given(dm, frames), self.width,
            partial=room is not None and inside is None, alone=alone,
            bits=8 if room is None else room.bits,
        )  # fmt: skip
        run = replace(run, before=run_before(run, self.earlier))
        name = device_name(device)
        rates = device_rates(name)
        cost = flops if rates is None else rates.seconds
        measure = "in FLOPs" if rates is None else f"by the rates of {name}"
        context = None
        if room is not None:
            # also for parts that are solved for on the way
            engine.memory.room = room
            where = "in RAM" if (room.device or device).type == "cpu" else "on the GPU"
            context = f"{where} ({room.bits} bit)"

        def told(solved: Solved) -> None:
            whose = "sampler" if self.dial.expert is None else "expert"
            own = "" if solved.together is None else f" of this {whose}'s own steps"
            record.planned = (
                f"{self.dial.describe()}: {solved.plan.describe()}; expected {solved.reached:.2f}x"
                f"{own} {measure}"
            )
            record.planned += "" if solved.tuned is None else f"; {solved.tuned}"
            record.planned += "; solved anew by what came" if solved.run.done else ""
            parts = solved.plan.shares.partial or any(one.program.partial for one in record.steps)
            record.context = context if parts else None
            record.asked, record.expected = solved.wanted, solved.reached
            record.missed, record.both = solved.why is not None, self.dial.expert is not None

        course = Course(self.dial, run, self.plan, cost, engine, told)
        self._say_tuned(run, record)
        if is_class(dm, "VaceWanModel"):
            record.note("VACE's control branch runs in full, and what is expected leaves it out")
        if inside is not None:
            record.note(f"{inside}; every step is whole or repeated")
        elif room is None and self.place != "off":
            record.note(
                f"{needed(4) / 1e9:.2g} GB for the keys and values of left out tokens were not "
                "free: every step is whole or repeated"
            )
        return course

    def _say_tuned(self, run: Run, record: Record) -> None:
        """What of the profile cannot be gone by."""
        trial = self.dial.trial_of(run)
        if self.dial.tuned and trial is None:
            record.note(
                "the profile holds no run like this one, recorded or tried (steps, scheduler, shift, "
                "guidance, start image, size): the curves that ship were used"
            )
        if trial is None or trial.recorded:
            return
        if trial.shares is None:
            record.note(
                f"your trial at {trial.speedup:g}x chose {trial.chosen}, which this node cannot do"
            )
        elif trial.heads not in (None, self.plan.roles_left):
            record.note(
                f"your trial at {trial.speedup:g}x chose {trial.chosen}: put WanTrim Heads with a "
                f"prune ratio of {1 - trial.heads:.2f} on this model for that"
            )
