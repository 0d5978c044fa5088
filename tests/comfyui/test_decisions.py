"""One decision per step, shared by cond and uncond, as a function of sigma."""

import pytest
import torch

import comfy.sample
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from wantrim.tests.comfyui import tiny

BATCHED, SPLIT = [[1, 0]], [[0], [1]]
# model calls of 3 steps per prompt batch: heun calls twice but at the end
EVALUATIONS = {"euler": 3, "heun": 5, "uni_pc": 3, "dpmpp_2m": 3}


@pytest.fixture
def no_free_memory(monkeypatch):
    """The host then runs cond and uncond in two calls."""
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)


def watched(given, model=None, **options):
    model = tiny.trimmed(model or tiny.base_model())
    calls = tiny.watch(model)
    out = tiny.sample(model, given, **options)
    return out, calls, tiny.report_of(model)


def kept(calls) -> dict[int, dict[int, list]]:
    """Decision -> reselecting block -> kept positions."""
    return {c.decision: {b: i.tolist() for b, i in c.kept.items()} for c in calls}


def kept_in_each_call(calls, decision: int) -> list[dict[int, list]]:
    same = [c for c in calls if c.decision == decision]
    return [{b: i.tolist() for b, i in c.kept.items()} for c in same]


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("t2v", {}),
        ("t2v", {"batch": 2}),
        ("t2v", {"height": 9, "width": 7}),
        ("i2v", {}),
        ("i2v", {"height": 9, "width": 7}),
        ("i2v_clip", {}),
        ("ti2v", {"batch": 2}),
        ("vace", {}),
        ("camera", {}),
        ("fun", {}),
    ],
    ids=str,
)
def test_batched_and_split_are_the_same_run(kind, size, monkeypatch):
    model, given = tiny.base_model(kind), tiny.case(kind, **size)
    together, calls, _ = watched(given, model)
    assert [c.cond_or_uncond for c in calls] == 3 * BATCHED
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    apart, split_calls, report = watched(given, model)
    # short of memory, the host itself would run the uncond first
    assert sorted(c.cond_or_uncond for c in split_calls) == sorted(3 * SPLIT)
    assert kept(calls) == kept(split_calls)
    assert [c.decision for c in split_calls] == [0, 0, 1, 1, 2, 2]
    assert len(report.steps) == 3 and {step.calls for step in report.steps} == {2}
    # the untouched model itself differs by about a tenth of this between the two
    assert (apart - together).abs().max() <= 1e-5 * together.abs().max()


def test_prompts_of_different_length_share_the_choice():
    _, calls, report = watched(tiny.case(tokens=(7, 11)))
    assert [c.cond_or_uncond for c in calls] == 3 * SPLIT
    assert [c.decision for c in calls] == [0, 0, 1, 1, 2, 2]
    for decision in range(3):
        first, second = kept_in_each_call(calls, decision)
        assert first == second and set(first) == {0, 3}
    assert not report.notes


def test_cond_decides():
    _, with_uncond, _ = watched(tiny.case(), cfg=5.0, steps=1)
    _, cond_only, _ = watched(tiny.case(), cfg=1.0, steps=1)
    assert cond_only[0].cond_or_uncond == [0]
    assert kept(with_uncond) == kept(cond_only)


def test_of_several_positive_prompts_the_same_one_decides_batched_and_split(monkeypatch):
    """The host takes its list from the end: the last one comes first, in a batch and call by call."""
    given = tiny.case()
    given.positive = [*given.positive, *tiny.text(8), *tiny.text(9)]
    alone = []
    for prompt in given.positive:
        _, calls, _ = watched(tiny.Case([prompt], given.negative, given.latent), steps=1)
        alone.append(kept(calls))
    assert alone[2] != alone[0] and alone[2] != alone[1]
    _, together, _ = watched(given, steps=1)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    _, apart, _ = watched(given, steps=1)
    assert [call.cond_or_uncond for call in together] == [[1, 0, 0, 0]]
    assert [call.cond_or_uncond for call in apart] == [[0], [0], [0], [1]]
    assert kept(together) == kept(apart) == alone[2]


def test_uncond_alone_would_choose_otherwise():
    given = tiny.case()
    swapped = tiny.Case(given.negative, given.positive, given.latent)
    _, calls, _ = watched(given, steps=1)
    _, other, _ = watched(swapped, steps=1)
    assert kept(calls) != kept(other)


def test_blocks_of_a_split_call_run_on_the_shared_tokens(no_free_memory):
    model = tiny.trimmed(tiny.base_model())
    hidden = []
    model.set_model_double_block_patch(lambda a: hidden.append(a["img"].clone()) or a)
    tiny.sample(model, steps=1)
    cond, uncond = hidden[: tiny.LAYERS], hidden[tiny.LAYERS :]
    for block in (1, 2, 4, 5):
        waits = [(h[block] == h[block - 1]).all(-1) for h in (cond, uncond)]
        assert waits[0].any() and torch.equal(*waits)


def test_each_sample_of_a_batch_has_its_own_choice():
    given = tiny.case(batch=2)
    noise = comfy.sample.prepare_noise(given.latent, 3)
    out, calls, _ = watched(given, noise=noise)
    assert calls[0].kept[0].shape[0] == 2
    for row in range(2):
        alone, single, _ = watched(tiny.case(), noise=noise[row : row + 1])
        for call, lone in zip(calls, single, strict=True):
            assert torch.equal(call.kept[0][row], lone.kept[0][0])
        assert torch.allclose(out[row : row + 1], alone, atol=1e-3)
    assert not torch.equal(calls[0].kept[0][0], calls[0].kept[0][1])


@pytest.mark.parametrize("sampler", EVALUATIONS)
def test_samplers_that_call_more_than_once_get_one_decision_per_evaluation(sampler, no_free_memory):
    _, calls, report = watched(tiny.case(), sampler=sampler)
    evaluations = EVALUATIONS[sampler]
    assert len(report.steps) == evaluations and {s.calls for s in report.steps} == {2}
    assert [c.decision for c in calls] == [i // 2 for i in range(2 * evaluations)]
    budgets = {c.sigma: set() for c in calls}
    for call in calls:
        budgets[call.sigma].add(call.budget)
    assert all(len(found) == 1 for found in budgets.values())


def test_heun_keeps_at_a_sigma_what_euler_keeps_there():
    _, _, euler = watched(tiny.case(), steps=6)
    _, _, heun = watched(tiny.case(), steps=6, sampler="heun")
    ratios = {step.sigma: step.program.budget for step in euler.steps}
    assert len(set(ratios.values())) > 2
    assert {step.sigma: step.program.budget for step in heun.steps} == ratios


def test_two_experts_keep_at_a_sigma_what_one_run_keeps_there():
    shifted = ModelSamplingSD3().patch(tiny.base_model(), 5.0)[0]
    whole, _, report = watched(tiny.case(), shifted, steps=4)
    high, low = tiny.trimmed(shifted), tiny.trimmed(shifted)
    half = tiny.sample(high, steps=4, start_step=0, last_step=2, force_full_denoise=False)
    given = tiny.case()
    given.latent = half
    zero = torch.zeros_like(half)
    out = tiny.sample(low, given, steps=4, start_step=2, last_step=100, noise=zero)
    pair = tiny.report_of(high).steps + tiny.report_of(low).steps
    assert [(s.sigma, s.program.budget) for s in pair] == [
        (s.sigma, s.program.budget) for s in report.steps
    ]
    assert len({s.program.budget for s in pair}) > 2
    assert torch.allclose(out, whole, atol=1e-3)


def test_a_budget_is_rounded_to_the_nearest_number_of_tokens():
    # of 20 tokens: 13.4, 13.6 and at least one
    for keep, budget in ((0.67, 13), (0.68, 14), (0.004, 1)):
        patched = tiny.trimmed(tiny.base_model(), keep, direction="constant")
        tiny.sample(patched, steps=1)
        [step] = tiny.report_of(patched).steps
        few = 3 * budget
        assert step.tokens_per_block == [60, few, few, 60, few, few]


@pytest.mark.parametrize("shift", [1.0, 8.0])
def test_progress_follows_the_shift_of_a_node_behind(shift):
    patched = ModelSamplingSD3().patch(tiny.trimmed(tiny.base_model()), shift)[0]
    tiny.sample(patched, steps=5)
    progress = [step.progress for step in tiny.report_of(patched).steps]
    assert progress == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8], abs=2e-3)


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("falling", [0.6, 0.65, 0.7, 0.75, 0.8]),
        ("rising", [0.8, 0.75, 0.7, 0.65, 0.6]),
        ("constant", [0.7] * 5),
    ],
)
def test_tokens_kept_per_step(direction, expected):
    patched = tiny.trimmed(tiny.base_model(), direction=direction)
    tiny.sample(patched, steps=5)
    steps = tiny.report_of(patched).steps
    assert [step.program.budget / tiny.PER_FRAME for step in steps] == pytest.approx(expected)
    for step in steps:
        few = 3 * step.program.budget
        assert step.tokens_per_block == [60, few, few, 60, few, few]


def test_context_windows_decide_once_each(monkeypatch):
    given = tiny.case(frames=7)
    model = ContextWindowsManualNode.execute(
        tiny.base_model(), 3, 1, "standard_static", 1, False, "pyramid", 2, False
    ).result[0]
    outs = []
    for per_window in (1, 2):
        out, calls, report = watched(given, model, steps=2)
        windows = len(calls) // (2 * per_window)
        assert windows >= 3 and len({c.frames for c in calls}) == 2
        assert [c.decision for c in calls] == [i // per_window for i in range(len(calls))]
        assert len(report.steps) == 2 * windows
        outs.append(out)
        # the second time in two calls per window
        monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    assert (outs[0] - outs[1]).abs().max() <= 1e-5 * outs[0].abs().max()
    neutral = tiny.trimmed(model, reselect_every=1)
    assert torch.equal(tiny.sample(neutral, given, steps=2), tiny.sample(model, given, steps=2))


@pytest.mark.parametrize(
    ("kind", "size", "grid"),
    [
        ("t2v", {"height": 9, "width": 7}, (3, 5, 4)),
        ("i2v", {"height": 7, "width": 10}, (3, 4, 5)),
        ("ti2v", {"frames": 1, "height": 5, "width": 5}, (1, 3, 3)),
    ],
    ids=str,
)
def test_grid_covers_what_the_host_pads(kind, size, grid):
    given = tiny.case(kind, **size)
    # a latent frame that is given and alone would be computed in full
    given.noise_mask = None
    _, calls, report = watched(given, tiny.base_model(kind))
    step = report.steps[0]
    assert (step.grid.frames, step.grid.height, step.grid.width) == grid
    assert calls[0].length == step.grid.tokens


@pytest.mark.parametrize(("every", "choosing"), [(tiny.LAYERS - 1, {0}), (1, set())])
def test_no_block_chooses_for_nobody(every, choosing):
    # the last block, and a block before another one that chooses
    patched = tiny.trimmed(tiny.base_model(), reselect_every=every)
    calls = tiny.watch(patched)
    tiny.sample(patched, steps=1)
    assert set(calls[0].kept) == choosing


def test_skipped_calls_do_not_shift_the_schedule():
    given = tiny.case()
    _, _, whole = watched(given, steps=6)
    _, _, tail = watched(given, steps=6, start_step=3)
    assert [(s.sigma, s.program.budget) for s in whole.steps[3:]] == [
        (s.sigma, s.program.budget) for s in tail.steps
    ]
