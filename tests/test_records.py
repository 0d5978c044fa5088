"""The rebuilt core does what the sessions before it did, program by program and number by number."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wantrim.engine.program import ALL_GIVEN, SKIP, Program, expected_programs
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import sigmas_for
from wantrim.methods.grid import TokenGrid
from wantrim.tests.records import BLOCKS, CASES, SIZE, fingerprint, plan_of, sample_case

PINNED = json.loads((Path(__file__).parent / "data" / "records.json").read_text("utf-8"))["cases"]


@contextmanager
def recording(records, alone=True):
    @contextmanager
    def attached(model, plan, both):
        hooks = []
        if not alone:
            hooks = [block.register_forward_hook(lambda *_: None) for block in model.blocks]
        with attach(model, plan, cond_or_uncond=both, shift=3.0) as attachment:
            records.append(attachment.engine.record)
            yield
        for hook in hooks:
            hook.remove()

    yield attached


def anchored(program: Program) -> int:
    """Latent frames that were given and keep all their tokens; all of them leave nothing to drop."""
    return program.grid.frames if ALL_GIVEN in program.remarks else program.anchored


def test_every_case_is_pinned():
    assert set(CASES) == set(PINNED)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_same_record_and_same_video(name, alone):
    records = []
    with recording(records, alone) as attached:
        latents = sample_case(CASES[name], attached)
    assert len(records) == (2 if "low_from" in CASES[name] else 1)
    steps = [step for record in records for step in record.steps]
    assert [step.tokens_per_block for step in steps] == [s["tokens"] for s in PINNED[name]["steps"]]
    assert [step.patterned for step in steps] == [s["heads"] for s in PINNED[name]["steps"]]
    assert [round(step.sigma, 6) for step in steps] == [s["sigma"] for s in PINNED[name]["steps"]]
    assert [anchored(step.program) for step in steps] == [
        s["anchored"] for s in PINNED[name]["steps"]
    ]
    assert all(step.as_planned for step in steps)
    torch.testing.assert_close(
        torch.tensor(fingerprint(latents)),
        torch.tensor(PINNED[name]["latents"]),
        atol=2e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", CASES)
def test_expected_programs_count_what_ran(name):
    case = CASES[name]
    given = case.get("given")
    frames = None if given is None else tuple(frame in given for frame in range(SIZE[0]))
    grid = TokenGrid(SIZE[0], SIZE[1] // 2, SIZE[2] // 2)
    sigmas = sigmas_for(case.get("steps", 3), 3.0)[:-1].tolist()
    # attach is told shift 3, as the sampler uses
    plan = plan_of(case)
    programs = expected_programs(plan, sigmas, 3.0, grid, BLOCKS, frames)
    # what was planned then were tokens as if every block ran
    tokens = expected_programs(replace(plan, blocks=None), sigmas, 3.0, grid, BLOCKS, frames)
    assert [
        [sum(row.run != SKIP for row in program.rows), sum(row.tokens for row in full.rows)]
        for program, full in zip(programs, tokens, strict=True)
    ] == [step["planned"] for step in PINNED[name]["steps"]]
    assert [anchored(one) for one in programs] == [s["anchored"] for s in PINNED[name]["steps"]]
    ran = [sum(step["tokens"]) for step in PINNED[name]["steps"]]
    blocks = [sum(kept > 0 for kept in step["tokens"]) for step in PINNED[name]["steps"]]
    assert [sum(row.run != SKIP for row in program.rows) for program in programs] == blocks
    if "blocks" not in case or "tokens" not in case:
        # which blocks a router leaves out decides how many choose
        assert [sum(row.tokens for row in program.rows) for program in programs] == ran
