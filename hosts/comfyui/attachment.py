"""What sits on a ComfyUI MODEL: a plan, and what came of it."""

from __future__ import annotations

from ...engine.context import Room
from ...engine.plan import TrimPlan
from ...engine.record import Record
from ...solve.dial import Dial, Solved
from .given import Kept, options_of
from .runs import Ran

KEY = "wantrim"


class Attachment(Kept):
    """A plan as it sits on a MODEL, with what came of it in the runs that used it.

    Args:
        dial: decides the shares when a run begins, or None.
        place: where keys and values of left out tokens may be kept.
        nodes: ids of the nodes that made the plan, where a node did.
        replaced: what earlier nodes wanted and this one changed, in words.
        video: the runs of both experts, where one node put its wish on both; None is those of this
            MODEL.
    """

    def __init__(
        self,
        plan: TrimPlan,
        dial: Dial | None = None,
        place: str = "auto",
        nodes: tuple[str, ...] = (),
        replaced: tuple[str, ...] = (),
        video: list[Ran] | None = None,
    ):
        self.plan, self.dial, self.place, self.nodes = plan, dial, place, nodes
        self.replaced = replaced
        # the last ones of each node that sampled the MODEL
        self.runs: list[Ran] = []
        self.video = self.runs if video is None else video
        # of keys and values, in earlier runs
        self.rooms: dict[int, Room] = {}

    @property
    def record(self) -> Record | None:
        """Of the last run."""
        return self.runs[-1].record if self.runs else None

    @property
    def solved(self) -> Solved | None:
        """What the dial decided in the last run, if there is one."""
        return self.runs[-1].solved if self.runs else None

    @property
    def neutral(self) -> bool:
        """Whether the model runs as if nothing sat on it."""
        if self.dial is not None and self.dial.final:
            return True
        return self.plan.neutral and (self.dial is None or self.dial.off)

    def describe(self) -> str:
        if self.dial is not None and self.dial.final:
            return "final render, nothing trimmed"
        parts = [] if self.dial is None or self.dial.off else [self.dial.describe()]
        if not parts or not self.plan.neutral:
            parts.append(self.plan.describe())
        return "; ".join(parts)


def attachment_of(model) -> Attachment | None:
    """The plan that sits on a MODEL, or None."""
    return options_of(model).get(KEY)


def replaced_by(present: Attachment | None, plan: TrimPlan, dial: Dial | None) -> tuple[str, ...]:
    """What a plan that sits on a MODEL loses by another one, in words."""
    if present is None:
        return ()
    said = list(present.replaced)
    was = present.dial
    if was is not None and not was.off and was is not dial:
        now = "nothing" if dial is None else f"{dial.speedup:.2f}x"
        said.append(
            f"two nodes on this model ask for a speed-up: the last one counts ({now}), and not "
            f"{was.speedup:.2f}x"
        )
    for part in ("tokens", "heads", "blocks"):
        earlier = getattr(present.plan, part)
        trims = not TrimPlan(**{part: earlier}).neutral
        if trims and earlier is not getattr(plan, part):
            said.append(f"two WanTrim {part.title()} nodes are on this model: the last one counts")
    return tuple(said)
