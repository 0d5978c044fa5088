"""A plan that trims nothing is bit-exact, on every kind of Wan."""

import pytest
import torch

import comfy.sd
from wantrim.engine import call
from wantrim.methods.tokens import Selection
from wantrim.report.words import record_text
from wantrim.tests.comfyui import tiny

PLANS = {
    "dropping starts where it ends": {"start": 0.37, "end": 0.37},
    "every block chooses anew": {"reselect_every": 1},
    "a budget that rounds to all tokens": {"keep": 0.99, "direction": "constant"},
}
# what a plan of shares, which is not neutral, does at 3 steps that it leaves whole
SHARES = {
    "the first step is whole whatever is planned": {"values": (0.4, 1, 1)},
    "a partial step that never comes": {"values": (1, 1, 1, 0.4), "sigmas": (1, 0.94, 0.8, 0.01)},
    "a share that rounds to all tokens": {"values": (1, 1, 0.98)},
    "a part of the tokens without room for the others": {"values": (1, 1, 0.4), "context": False},
}
SIZES = {
    "odd height and width": {"height": 9, "width": 7},
    "one latent frame": {"frames": 1},
    "batch of two": {"batch": 2},
    "one token per latent frame": {"height": 2, "width": 2},
}
# what a checkpoint can be stored and computed in; fp8 is cast for every layer
DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


class NotEmpty(torch.Tensor):
    """No positions at all, but taken for some."""

    def numel(self) -> int:
        return 1


def keep_everything(scores, grid, length, budget, *, alpha=1.0, anchored=None) -> Selection:
    """A choice of all tokens that still goes through gathering and scattering."""
    whole = torch.arange(length).expand(len(scores), -1).contiguous()
    chosen = Selection(whole, length, (grid.per_frame,) * grid.frames)
    chosen.dropped = chosen.dropped.as_subclass(NotEmpty)
    return chosen


@pytest.mark.parametrize("name", ["auto", "paper", "custom"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_prune_ratio_zero_at_the_node_equals_the_untouched_model(kind, name):
    model, given = tiny.base_model(kind), tiny.case(kind)
    patched = tiny.at_node(model, name, prune_ratio=0.0)
    assert torch.equal(tiny.ksampler(patched, given), tiny.ksampler(model, given))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_plan_without_effect_equals_the_untouched_model(kind, plan):
    model, given = tiny.base_model(kind), tiny.case(kind)
    patched = tiny.trimmed(model, **plan)
    assert torch.equal(tiny.sample(patched, given), tiny.sample(model, given))
    assert tiny.report_of(patched).kept_share == 1.0


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_shares_of_one_are_no_plan(kind):
    model, given = tiny.base_model(kind), tiny.case(kind)
    patched = tiny.shared(model, 1, 1, 1)
    assert torch.equal(tiny.sample(patched, given), tiny.sample(model, given))
    assert tiny.report_of(patched).planned == "nothing trimmed"


@pytest.mark.parametrize("plan", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_shares_without_effect_equal_the_untouched_model(kind, plan):
    """Remembering keys, values and velocities changes nothing."""
    model, given = tiny.base_model(kind), tiny.case(kind)
    options = {name: value for name, value in plan.items() if name != "values"}
    patched = tiny.shared(model, *plan["values"], **options)
    assert torch.equal(tiny.sample(patched, given), tiny.sample(model, given))
    assert tiny.report_of(patched).kept_share == 1.0 and not tiny.report_of(patched).plan.neutral


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gathering_and_scattering_all_tokens_equals_the_untouched_model(kind, monkeypatch):
    monkeypatch.setattr(call, "select_tokens", keep_everything)
    model, given = tiny.base_model(kind), tiny.case(kind)
    patched = tiny.trimmed(model)
    calls = tiny.watch(patched)
    assert torch.equal(tiny.sample(patched, given), tiny.sample(model, given))
    assert calls and all(set(call.kept) == {0, 3} for call in calls)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_part_that_is_all_tokens_equals_the_untouched_model(kind, monkeypatch):
    monkeypatch.setattr(call, "select_tokens", keep_everything)
    model, given = tiny.base_model(kind), tiny.case(kind)
    patched = tiny.shared(model, 1, 1, 0.4, 0.4)
    calls = tiny.watch(patched)
    assert torch.equal(tiny.sample(patched, given, steps=4), tiny.sample(model, given, steps=4))
    assert [set(call.kept) for call in calls] == [set(), set(), {0}, {0}]


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_sizes_and_cfg_are_neutral_too(kind, size, cfg):
    model, given = tiny.base_model(kind), tiny.case(kind, **size)
    patched = tiny.trimmed(model, reselect_every=1)
    expected = tiny.sample(model, given, cfg=cfg)
    assert torch.equal(tiny.sample(patched, given, cfg=cfg), expected)
    remembers = tiny.shared(model, 1, 1, 0.98)
    assert torch.equal(tiny.sample(remembers, given, cfg=cfg), expected)


def test_one_given_latent_frame_leaves_nothing_to_drop():
    model, given = tiny.base_model("i2v"), tiny.case("i2v", frames=1)
    patched = tiny.trimmed(model)
    assert torch.equal(tiny.sample(patched, given), tiny.sample(model, given))
    assert any("given" in note for note in tiny.report_of(patched).notes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_weight_types_are_neutral_and_can_be_trimmed(dtype, monkeypatch):
    weights, metadata = tiny.state_dict("ti2v")
    model = comfy.sd.load_diffusion_model_state_dict(weights, {"dtype": dtype}, metadata)
    assert model.model.get_dtype() == dtype
    given = tiny.case("ti2v")
    expected = tiny.sample(model, given)
    out = tiny.sample(tiny.trimmed(model), given)
    assert torch.isfinite(out).all() and not torch.equal(out, expected)
    whole = tiny.sample(model, given, steps=4)
    partial = tiny.shared(model, 1, 1, 0.4, 0)
    out = tiny.sample(partial, given, steps=4)
    assert torch.isfinite(out).all() and not torch.equal(out, whole)
    assert tiny.shares(partial) == pytest.approx([1, 1, 0.4, 0])
    monkeypatch.setattr(call, "select_tokens", keep_everything)
    assert torch.equal(tiny.sample(tiny.trimmed(model), given), expected)
    all_kept = tiny.shared(model, 1, 1, 0.4, 0.4)
    assert torch.equal(tiny.sample(all_kept, given, steps=4), whole)


def test_several_prompts_with_areas_and_ranges_are_neutral():
    given = tiny.case()
    left = given.positive[0]
    right = tiny.text(8)[0]
    right[1].update(area=(tiny.FRAMES, 8, 6, 0, 0, 2), strength=1.0)
    early = tiny.text(9)[0]
    early[1].update(start_percent=0.0, end_percent=0.3)
    given.positive = [left, right, early]
    expected = tiny.sample(tiny.base_model(), given)
    for neutral in (
        tiny.trimmed(tiny.base_model(), reselect_every=1),
        tiny.shared(tiny.base_model(), 1, 1, 0.98),
    ):
        assert torch.equal(tiny.sample(neutral, given), expected)
    for patched in (tiny.trimmed(tiny.base_model()), tiny.shared(tiny.base_model(), 1, 1, 0)):
        out = tiny.sample(patched, given)
        assert torch.isfinite(out).all() and not torch.equal(out, expected)


def test_report_of_a_neutral_run_says_that_it_ran():
    patched = tiny.trimmed(tiny.base_model(), keep=1.0)
    tiny.sample(patched)
    report = tiny.report_of(patched)
    assert report.finished
    assert "nothing trimmed" in record_text(report)
