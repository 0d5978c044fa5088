"""The matrix of models, trims and neighbours: every promise of `matrix.py`, run."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from wantrim.engine.plan import TrimPlan
from wantrim.engine.program import NO_CONTEXT
from wantrim.hosts.comfyui.attach import attach, attach_dials, attachment_of
from wantrim.methods.depth import BlockPlan
from wantrim.methods.heads import FULL, HeadPlan
from wantrim.methods.role_plan import RolePlan
from wantrim.methods.routers import FixedRouter
from wantrim.nodes.heads import WanTrimHeads
from wantrim.report.words import record_text
from wantrim.solve.dial import Dial
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.matrix import (
    DEEP,
    DEFAULT,
    KINDS,
    NEIGHBOURS,
    SAYS,
    TRIMS,
    cells,
    outcome,
)
from wantrim.tests.comfyui.neighbours import LOADED, PUT
from wantrim.tests.comfyui.put import dialled, routed
from wantrim.tests.comfyui.variants import VARIANTS, load

SKIPPED = 2
# no number of whole and repeated steps, of four, is so near that one would do
SPEEDUP = 1.2
# what a wish came to is the dial's own remark, and no neighbour's doing
WISHES = ("x was asked for and", "x was expected and", "VACE's control branch")
HALF = tiny.HEADS // 2


def with_parts(model, **parts):
    """A clone with these parts of a plan, as the nodes join them with what is there."""
    present = attachment_of(model)
    return attach(model, replace(present.plan if present else TrimPlan(), **parts))


def heads(model):
    count = len(model.model.diffusion_model.blocks)
    own = ("frame",) * HALF + (FULL,) * (tiny.HEADS - HALF)
    cross = ("off",) + (FULL,) * (tiny.HEADS - 1)
    return with_parts(model, heads=HeadPlan((own,) * count, (cross,) * count))


def blocks(model):
    return routed(model, "fixed", blocks=str(SKIPPED))


PUT_ON = {
    DEFAULT: lambda model: dialled(model, speedup=SPEEDUP),
    "paper": tiny.at_node,
    "heads": heads,
    "blocks": blocks,
    "all": lambda model: blocks(heads(tiny.at_node(model))),
}
# what is left of the default where no block may be looked into
WHOLE = "whole and repeated"
LEFT = PUT_ON | {WHOLE: lambda model: dialled(model, speedup=SPEEDUP, context="off")}
# the same through the session, and nothing is trimmed
LATE = {"start": 0.9999, "end": 1.0}
WITHOUT_EFFECT = {
    DEFAULT: lambda m: attach_dials([m], [Dial(SPEEDUP, start=0.37, end=0.37)], "auto")[0],
    "paper": lambda m: with_parts(m, tokens=tiny.token_plan(reselect_every=1)),
    # measured, and nothing is worth less
    "heads": lambda m: with_parts(m, heads=RolePlan(1 - 1e-12, tiny.HEADS)),
    "blocks": lambda m: with_parts(m, blocks=BlockPlan(FixedRouter((SKIPPED,)), **LATE)),
}
WITHOUT_EFFECT["all"] = lambda m: WITHOUT_EFFECT["blocks"](
    WITHOUT_EFFECT["heads"](WITHOUT_EFFECT["paper"](m))
)


@cache
def base(kind: str, loaded: str | None = None) -> tuple:
    """The untouched models of a row, in the order in which they sample."""
    return tuple(load(name, **LOADED.get(loaded, {})) for name in VARIANTS[kind].kinds)


@cache
def given(kind: str) -> tiny.Case:
    return VARIANTS[kind].given()


class Run:
    """One video of a row, with `put` on each of its models, and their reports."""

    def __init__(self, kind: str, put=None, loaded: str | None = None, steps: int = 3):
        models = base(kind, loaded)
        models = [put(model) for model in models] if put else models
        if len(models) == 1:
            options = {"steps": steps} | VARIANTS[kind].options
            self.video = tiny.sample(models[0], given(kind), **options)
        else:
            self.video = given(kind).latent
            for place, model in enumerate(models):
                span = (place * steps, (place + 1) * steps)
                self.video = tiny.ksampler_advanced(model, self.video, *span, steps=2 * steps)
        attached = [attachment_of(model) for model in models]
        self.reports = [one.record for one in attached if one is not None]

    @property
    def notes(self) -> list[str]:
        """Of all reports, but what is said of a wish."""
        found = [note for report in self.reports for note in report.notes]
        return [note for note in found if not any(wish in note for wish in WISHES)]


@cache
def dense(kind: str, steps: int = 3) -> torch.Tensor:
    return Run(kind, steps=steps).video


@pytest.fixture(autouse=True, scope="module")
def forget_models():
    yield
    for known in (base, given, dense, alone_with):
        known.cache_clear()


def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not torch.allclose(a, b, atol=1e-3)


def test_the_matrix_names_what_is_here():
    assert set(KINDS) == set(VARIANTS)
    assert set(NEIGHBOURS) == {*PUT, *LOADED}
    assert set(TRIMS) == set(PUT_ON) == set(WITHOUT_EFFECT)
    for name, kind in KINDS.items():
        assert {type(m.model.diffusion_model).__name__ for m in base(name)} == {kind.cls}


@pytest.mark.parametrize("trim", TRIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_trims_of_every_kind(kind, trim):
    if not KINDS[kind].takes(trim):
        check_refused(kind, trim)
        return
    steps = 4 if trim == DEFAULT else 3
    assert torch.equal(Run(kind, WITHOUT_EFFECT[trim], steps=steps).video, dense(kind, steps))
    run = Run(kind, PUT_ON[trim], steps=steps)
    assert torch.isfinite(run.video).all() and differs(run.video, dense(kind, steps))
    assert not run.notes
    for report in run.reports:
        text = record_text(report)
        assert report.finished and f"\n{KINDS[kind].cls}: " in text
        assert ("everything ran as planned" in text) == (not report.notes)
        for step in report.steps:
            assert step.as_planned and not step.answered
            left = set(range(step.num_blocks)) - ({SKIPPED} if trim in ("blocks", "all") else set())
            assert step.blocks_run == (0 if step.repeated else len(left))
            assert step.patterned == (sorted(left) if trim in ("heads", "all") else [])
        least = min(step.kept_share for step in report.steps)
        assert (least < 0.95) == (trim != "heads")
        if trim == DEFAULT:
            # CLIP's tokens cost more than those of so small a video
            partial = any(step.program.partial for step in report.steps)
            assert partial or kind in (
                "i2v_clip",
                "flf2v",
                "fun_control",
                "fun_inpaint",
                "fun_camera",
            )
            assert partial == (report.context is not None)


def check_refused(kind: str, trim: str) -> None:
    model, row = base(kind)[0], KINDS[kind]
    put = PUT_ON[trim]
    if trim == "heads":
        # before it looks at the profile
        put = lambda m: WanTrimHeads.execute(m, None, 0.3, "demote")  # noqa: E731
    with pytest.raises(ValueError, match="^WanTrim") as error:
        put(model)
    reason = row.blocks if trim == "blocks" else row.inside
    for part in (row.cls, reason, "Bypass this node", "Supported: WanModel"):
        assert part in str(error.value)


def left_of(trim: str, lost: tuple[str, ...]) -> str | None:
    """What happens of a trim, by name; None is nothing."""
    if trim == DEFAULT and trim in lost:
        return WHOLE if "blocks" not in lost else None
    if trim != "all":
        return None if trim in lost else trim
    return trim if not lost else ("blocks" if "blocks" not in lost else None)


def steps_of(kind: str, other: str, trim: str) -> int:
    few = 4 if trim == DEFAULT else 3 if kind in DEEP else 2
    return NEIGHBOURS[other].steps or few


def check_cell(kind: str, other: str, trim: str) -> None:
    """Without effect and trimmed, WanTrim in front and, unless tracing takes seconds, behind."""
    neighbour, put = NEIGHBOURS[other], PUT.get(other)
    if other.startswith("compiled"):
        # PyTorch makes eight graphs of a function at most; no artist has so many models
        torch._dynamo.reset()
    loaded = other if put is None else None
    front, behind = PUT_ON[trim], PUT_ON[trim]
    if put is not None:
        front, behind = (lambda m: put(PUT_ON[trim](m))), (lambda m: PUT_ON[trim](put(m)))
    steps = steps_of(kind, other, trim)
    alone = alone_with(kind, other, steps)

    def run(way) -> Run:
        return Run(kind, way, loaded, steps)

    neutral = WITHOUT_EFFECT[trim]
    assert torch.equal(run(lambda m: neutral(put(m) if put else m)).video, alone)
    if kind in DEEP and trim == "all" and put is not None:
        assert torch.equal(run(lambda m: put(neutral(m))).video, alone)
    both = put is not None and (kind in DEEP or not other.startswith("compiled"))
    runs = [run(front)] + ([run(behind)] if both else [])
    left = left_of(trim, neighbour.lost)
    if left != trim:
        # no more than a run of what is left
        way = LEFT[left] if left else lambda m: m
        less = run(lambda m: way(put(m) if put else m)).video
        assert torch.equal(runs[0].video, less)
    for one in runs:
        assert torch.isfinite(one.video).all()
        if not (neighbour.answers and trim == DEFAULT):
            assert differs(one.video, alone) == (left is not None)
    if not neighbour.order_matters:
        assert torch.equal(runs[0].video, runs[-1].video)
    notes = {note for one in runs for note in one.notes}
    if neighbour.answers:
        # of steps that it answered nothing is remembered
        notes -= {NO_CONTEXT}
    if outcome(kind, other, trim) == SAYS:
        assert [note for note in notes if neighbour.says in note] == list(notes) != []
    else:
        assert not notes


@cache
def alone_with(kind: str, other: str, steps: int) -> torch.Tensor:
    """The video of a row with a neighbour and without WanTrim."""
    neighbour, put = NEIGHBOURS[other], PUT.get(other)
    whole = dense(kind, steps)
    if other.startswith("compiled") and kind not in DEEP:
        # tracing takes seconds
        return whole
    video = Run(kind, put, other if put is None else None, steps).video
    # what is compiled now is what a trimmed run must not repeat
    assert differs(video, whole) == neighbour.changes
    return video


@pytest.mark.parametrize("trim", TRIMS)
@pytest.mark.parametrize("other", NEIGHBOURS)
@pytest.mark.parametrize("kind", DEEP)
def test_neighbours_of_each_trim(kind, other, trim):
    check_cell(kind, other, trim)


@pytest.mark.parametrize(("kind", "other"), [cell for cell in cells() if cell[0] not in DEEP])
def test_neighbours_of_every_kind(kind, other):
    check_cell(kind, other, KINDS[kind].main)
