"""The matrix of models, trims and neighbours: every promise of `matrix.py`, run."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import attach, attachment_of
from wantrim.methods.depth import BlockPlan
from wantrim.methods.heads import FULL, HeadPlan
from wantrim.methods.presets import preset_plan
from wantrim.methods.routers import FixedRouter
from wantrim.nodes.heads import WanTrimHeads
from wantrim.tests.comfyui import test_blocks, tiny
from wantrim.tests.comfyui.matrix import DEEP, KINDS, NEIGHBOURS, SAYS, TRIMS, cells, outcome
from wantrim.tests.comfyui.neighbours import LOADED, PUT
from wantrim.tests.comfyui.variants import VARIANTS, load

SKIPPED = 2
# how the tokens of a run of two steps were chosen is said, and is no neighbour's doing
FEW_STEPS = "from the third step of a run on"
HALF = tiny.HEADS // 2


def with_parts(model, **parts):
    """A clone with these parts of a plan, as the nodes join them with what is there."""
    present = attachment_of(model)
    return attach(model, replace(present.plan if present else TrimPlan(), **parts))


def some_heads(model, **window) -> HeadPlan:
    count = len(model.model.diffusion_model.blocks)
    own = ("frame",) * HALF + (FULL,) * (tiny.HEADS - HALF)
    cross = ("off",) + (FULL,) * (tiny.HEADS - 1)
    return HeadPlan((own,) * count, (cross,) * count, **window)


def heads(model):
    return with_parts(model, heads=some_heads(model))


def blocks(model):
    return test_blocks.at_node(model, "fixed", blocks=str(SKIPPED))[0]


PUT_ON = {
    "refresh": tiny.at_node,
    "paper": lambda model: tiny.at_node(model, "paper"),
    "heads": heads,
    "blocks": blocks,
    "all": lambda model: blocks(heads(tiny.at_node(model))),
}
# the same through the session, and nothing is trimmed
LATE = {"start": 0.9999, "end": 1.0}
WITHOUT_EFFECT = {
    "refresh": lambda m: with_parts(m, tokens=preset_plan("refresh", 0.7, start=0.37, end=0.37)),
    "paper": lambda m: with_parts(m, tokens=tiny.token_plan(reselect_every=1)),
    "heads": lambda m: with_parts(m, heads=some_heads(m, **LATE)),
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
        self.reports = [one.report for one in attached if one is not None]

    @property
    def notes(self) -> list[str]:
        return [note for report in self.reports for note in report.notes]


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
    assert torch.equal(Run(kind, WITHOUT_EFFECT[trim]).video, dense(kind))
    run = Run(kind, PUT_ON[trim])
    assert torch.isfinite(run.video).all() and differs(run.video, dense(kind))
    for report in run.reports:
        assert report.finished and not report.notes
        assert f"on {KINDS[kind].cls}:" in report.text()
        assert "everything ran as planned" in report.text()
        for step in report.steps:
            assert step.kept_share == pytest.approx(step.planned_share)
            left = set(range(step.num_blocks)) - ({SKIPPED} if trim in ("blocks", "all") else set())
            assert step.blocks_run == len(left)
            assert step.patterned == (left if trim in ("heads", "all") else set())
        assert (report.steps[-1].kept_share < 0.95) == (trim != "heads")


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
    if trim != "all":
        return None if trim in lost else trim
    return trim if not lost else ("blocks" if "blocks" not in lost else None)


def steps_of(kind: str, other: str) -> int:
    return NEIGHBOURS[other].steps or (3 if kind in DEEP else 2)


def check_cell(kind: str, other: str, trim: str) -> None:
    """Without effect and trimmed, WanTrim in front and behind."""
    neighbour, put = NEIGHBOURS[other], PUT.get(other)
    loaded = other if put is None else None
    front, behind = PUT_ON[trim], PUT_ON[trim]
    if put is not None:
        front, behind = (lambda m: put(PUT_ON[trim](m))), (lambda m: PUT_ON[trim](put(m)))
    alone = alone_with(kind, other)

    def run(way) -> Run:
        return Run(kind, way, loaded, steps_of(kind, other))

    neutral = WITHOUT_EFFECT[trim]
    assert torch.equal(run(lambda m: neutral(put(m) if put else m)).video, alone)
    if kind in DEEP and trim == "all" and put is not None:
        assert torch.equal(run(lambda m: put(neutral(m))).video, alone)
    runs = [run(front)] + ([run(behind)] if put else [])
    left = left_of(trim, neighbour.lost)
    if left != trim:
        # no more than a run of what is left
        way = PUT_ON[left] if left else lambda m: m
        less = run(lambda m: way(put(m) if put else m)).video
        assert torch.equal(runs[0].video, less)
    for one in runs:
        assert torch.isfinite(one.video).all()
        assert differs(one.video, alone) == (left is not None)
    if not neighbour.order_matters:
        assert torch.equal(runs[0].video, runs[-1].video)
    notes = {note for one in runs for note in one.notes if FEW_STEPS not in note}
    if outcome(kind, other, trim) == SAYS:
        assert [note for note in notes if neighbour.says in note] == list(notes) != []
    else:
        assert not notes


@cache
def alone_with(kind: str, other: str) -> torch.Tensor:
    """The video of a row with a neighbour and without WanTrim."""
    neighbour, put = NEIGHBOURS[other], PUT.get(other)
    whole = dense(kind, steps_of(kind, other))
    if other.startswith("compiled") and kind not in DEEP:
        # tracing takes seconds
        return whole
    video = Run(kind, put, other if put is None else None, steps_of(kind, other)).video
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
    check_cell(kind, other, KINDS[kind].trims[-1])
