"""What each preset of WanTrim Tokens does, through ComfyUI's own sampler nodes."""

import pytest
import torch

from comfy_extras import nodes_wan
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import attach, attachment_of
from wantrim.methods.importance import NEEDS_BLOCK, parts
from wantrim.methods.presets import AUTO, AUTO_GIVEN, preset_plan
from wantrim.methods.restore import FROM_LAST_STEP, RESTORE
from wantrim.methods.schedule import Schedule
from wantrim.methods.tokens import TokenPlan
from wantrim.nodes import demo
from wantrim.nodes.tokens import CUSTOM_INPUTS
from wantrim.nodes.wantrim import WanTrim
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.passes import record

PRESETS = ["auto", "refresh", "paper", "custom"]
IMPORTANCES = next(given.options for given in CUSTOM_INPUTS if given.id == "importance")
# the paper's values, one by one
AS_PAPER = {
    "schedule": "falling",
    "importance": "attention",
    "alpha": 0.5,
    "dropped_tokens_get": "identity",
    "reselect_every": 10,
    "trim_choosing_block": False,
    "dropped_keys_values": "leave out",
    "anchor_given_frames": True,
}


def tiny_wan_case() -> tuple:
    """The shipped tiny Wan with 16 blocks and a prompt of its world."""
    model = demo.WanTrimDemoModel.execute().result[0]
    prompts = [demo.WanTrimDemoPrompt.execute(text).result[0] for text in (demo.PROMPT, "")]
    return model, tiny.Case(*prompts, tiny.empty_latent(5, 12, 12))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", ["t2v", "i2v", "vace"])
def test_preset_changes_the_video_the_same_way_each_time(kind, name):
    model, given = tiny.base_model(kind), tiny.case(kind)
    patched = tiny.at_node(model, name)
    out = tiny.ksampler(patched, given)
    report = tiny.report_of(patched)
    assert torch.isfinite(out).all() and report.finished and not report.notes
    assert len(report.steps) == 4 and report.kept_share < 0.9
    assert not torch.allclose(out, tiny.ksampler(model, given), atol=1e-3)
    # queued once more, and after the graph was loaded anew
    assert torch.equal(tiny.ksampler(patched, given), out)
    assert torch.equal(tiny.ksampler(tiny.at_node(model, name), given), out)


def test_presets_differ():
    outs = [tiny.ksampler(tiny.at_node(tiny.base_model(), name)) for name in ("refresh", "paper")]
    assert not torch.allclose(*outs, atol=1e-2)


def test_custom_begins_as_refresh_and_can_be_the_paper():
    model = tiny.base_model()
    assert torch.equal(
        tiny.ksampler(tiny.at_node(model, "custom")), tiny.ksampler(tiny.at_node(model, "refresh"))
    )
    by_hand, paper = tiny.at_node(model, "custom", **AS_PAPER), tiny.at_node(model, "paper")
    assert attachment_of(by_hand).plan == attachment_of(paper).plan
    assert torch.equal(tiny.ksampler(by_hand), tiny.ksampler(paper))


@pytest.mark.parametrize(
    ("restore", "choosing"),
    # the last one needs to choose before any block ran
    [(restore, on) for restore in RESTORE for on in (True, False) if on or restore != RESTORE[-1]],
)
def test_each_treatment_of_dropped_tokens_is_the_same_each_time(restore, choosing):
    inputs = {"dropped_tokens_get": restore, "trim_choosing_block": choosing, "reselect_every": 3}
    model = tiny.base_model()
    patched = tiny.at_node(model, "custom", **inputs)
    out = tiny.ksampler(patched)
    assert torch.isfinite(out).all()
    assert not tiny.report_of(patched).notes
    assert torch.equal(tiny.ksampler(patched), out)
    assert torch.equal(tiny.ksampler(tiny.at_node(model, "custom", **inputs)), out)
    # blocks 0 and 3 of 6 choose
    later = 0.7 if choosing else (2 + 4 * 0.7) / 6
    first = 1.0 if restore in FROM_LAST_STEP else later
    assert tiny.shares(patched) == pytest.approx([first, later, later, later])


def test_dropped_keys_and_values_can_be_kept():
    outs = {}
    for choice, word in (("leave out", "leave"), ("keep", "keep")):
        patched = tiny.at_node(tiny.base_model(), "custom", dropped_keys_values=choice)
        assert attachment_of(patched).plan.tokens.dropped_kv == word
        outs[word] = tiny.ksampler(patched)
    assert not torch.allclose(outs["keep"], outs["leave"], atol=1e-3)


def test_treatments_of_dropped_tokens_differ():
    outs = []
    for restore in RESTORE:
        patched = tiny.at_node(tiny.base_model(), "custom", dropped_tokens_get=restore)
        outs.append(tiny.ksampler(patched))
    for i, out in enumerate(outs):
        assert not any(torch.allclose(out, other, atol=1e-3) for other in outs[:i])


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_of_the_node_keeps_the_asked_number_of_tokens(importance):
    after = bool(NEEDS_BLOCK.intersection(parts(importance)))
    inputs = {"importance": importance, "trim_choosing_block": not after}
    patched = tiny.at_node(tiny.base_model(), "custom", **inputs)
    calls = tiny.watch(patched)
    state = torch.get_rng_state()
    out = tiny.sample(patched, steps=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.isfinite(out).all()
    for call in calls:
        frames = call.kept[0][0] // tiny.PER_FRAME
        assert frames.bincount().tolist() == [14, 14, 14]


def test_paper_runs_blocks_0_and_10_whole_and_prunes_most_at_the_start():
    model, given = tiny_wan_case()
    patched = tiny.at_node(model, "paper")
    tiny.ksampler(patched, given, steps=5)
    per_frame = 36
    for step, keep in zip(tiny.report_of(patched).steps, [0.6, 0.65, 0.7, 0.75, 0.8], strict=True):
        few = 5 * round(keep * per_frame)
        assert step.keep_ratio == pytest.approx(keep)
        assert step.kept_per_block == [5 * per_frame, *9 * [few], 5 * per_frame, *5 * [few]]


def test_paper_gives_a_dropped_token_nothing(monkeypatch):
    passes = record(monkeypatch)
    tiny.ksampler(tiny.at_node(tiny.base_model(), "paper"))
    for seen in passes:
        for block in range(1, tiny.LAYERS):
            same = (seen.after[block] == seen.before[block]).all(-1)
            assert torch.equal(same, seen.dropped) and same.any()


def test_refresh_computes_all_in_the_first_step_and_then_trims_every_block():
    model, given = tiny_wan_case()
    patched = tiny.at_node(model, "refresh")
    tiny.ksampler(patched, given)
    steps = tiny.report_of(patched).steps
    few = 5 * round(0.7 * 36)
    assert [step.kept_per_block for step in steps] == [16 * [180], *3 * [16 * [few]]]
    assert {step.keep_ratio for step in steps} == {0.7}
    # what was left out in a step is seen in the report's picture
    assert steps[0].coverage.min() == 1 and steps[1].coverage.min() == 0


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_auto_spares_the_steps_that_count_for_how_the_video_begins(kind):
    patched = tiny.at_node(tiny.base_model(kind), "auto")
    tiny.ksampler(patched, tiny.case(kind), steps=20)
    report = tiny.report_of(patched)
    whole = [step.kept_share == 1.0 for step in report.steps]
    if kind in ("t2v", "fun", "vace"):
        assert whole == [True] * 5 + [False] * 15
        plan, words = AUTO, "after the first 25% of the run"
    else:
        assert whole == [True] + [False] * 16 + [True] * 3
        plan, words = AUTO_GIVEN, "after a first step"
    assert words in report.planned and "begins with a given picture" not in report.planned
    assert "begins with a given picture" in attachment_of(patched).plan.describe()
    options = {name: value for name, value in plan.items() if name != "schedule"}
    by_hand = TokenPlan(Schedule(0.7, plan["schedule"]), **options)
    assert attachment_of(patched).plan.tokens.settled(plan is AUTO_GIVEN) == by_hand
    out = tiny.ksampler(attach(tiny.base_model(kind), TrimPlan(by_hand)), tiny.case(kind), steps=20)
    assert torch.equal(tiny.ksampler(patched, tiny.case(kind), steps=20), out)


def test_a_reference_in_vace_is_no_start():
    """VACE puts it where the first latent frame is, and says that it is given."""
    size = (tiny.WIDTH * 8, tiny.HEIGHT * 8, 4 * (tiny.FRAMES - 1) + 1, 1)
    prompts = tiny.text(1, 7), tiny.text(2, 7)
    reference = tiny.picture(3, tiny.HEIGHT * 8, tiny.WIDTH * 8)
    made = nodes_wan.WanVaceToVideo.execute(
        *prompts, tiny.StubVAE(), *size, strength=1.0, reference_image=reference
    ).result
    case = tiny.Case(made[0], made[1], made[2]["samples"])
    tokens = tiny.at_node(tiny.base_model("vace"), "auto")
    dial = WanTrim.execute(tiny.base_model("vace"), 1.1, "auto", "draft", 1, 0).result[0]
    for patched in (tokens, dial):
        tiny.ksampler(patched, case, steps=20)
    assert "after the first 25% of the run" in tiny.report_of(tokens).planned
    assert "priority auto (motion)" in tiny.report_of(dial).planned
    assert all((tiny.report_of(m).coverage()[0] == 1).all() for m in (tokens, dial))


def test_auto_at_the_dial_is_what_the_run_makes_of_it():
    refined = tiny.at_node(tiny.base_model("i2v"), "auto", prune_ratio=0.1)
    dialled = WanTrim.execute(refined, 1.2, "auto", "draft", 1, 0).result[0]
    tiny.ksampler(dialled, tiny.case("i2v"), steps=8)
    tokens = attachment_of(dialled).solved.parts.tokens
    assert tokens == preset_plan("auto", 0.9).settled(True)


def test_refresh_chooses_once_a_step_for_both_prompts():
    patched = tiny.at_node(tiny.base_model(), "refresh")
    calls = tiny.watch(patched)
    tiny.ksampler(patched, tiny.case(tokens=(7, 11)))
    assert [call.cond_or_uncond for call in calls] == 4 * [[0], [1]]
    for cond, uncond in zip(calls[::2], calls[1::2], strict=True):
        assert set(cond.kept) == {0}
        assert torch.equal(cond.kept[0], uncond.kept[0])


def test_rotation_computes_every_token_within_two_steps():
    options = {"importance": "rotation", "alpha": 1.0, "prune_ratio": 0.4}
    patched = tiny.at_node(tiny.base_model(), "custom", **options)
    calls = tiny.watch(patched)
    tiny.ksampler(patched, steps=6)
    first, *kept = [set(call.kept[0][0].tolist()) for call in calls]
    # the first step computed everything, so nothing had to wait for the second
    assert kept[0] == first
    assert len(kept) == 5 and all(len(positions) == 36 for positions in kept)
    for before, after in zip(kept, kept[1:], strict=False):
        assert before | after == set(range(60)) and before != after


def test_velocity_change_computes_what_moves():
    """With the noise of one half of the picture held still, the other half is computed."""
    patched = tiny.at_node(
        tiny.base_model(), "custom", importance="velocity_change", prune_ratio=0.5
    )
    calls = tiny.watch(patched)
    still = torch.zeros(1, 16, tiny.FRAMES, tiny.HEIGHT, tiny.WIDTH)
    still[..., : tiny.HEIGHT // 2, :] = 1

    def hold(args):
        # the model's answer is left out of the upper half, whose path is then a straight line
        return args["denoised"] * (1 - still)

    patched.set_model_sampler_post_cfg_function(hold)
    tiny.ksampler(patched)
    for call in calls[3:]:
        rows = call.kept[0][0] % tiny.PER_FRAME // 5
        assert set(rows.tolist()) == {2, 3}


@pytest.mark.parametrize("name", ["auto", "refresh", "paper"])
def test_given_frames_are_computed_in_every_step(name):
    patched = tiny.at_node(tiny.base_model("i2v"), name)
    tiny.ksampler(patched, tiny.case("i2v"))
    coverage = tiny.report_of(patched).coverage()
    assert (coverage[0] == 1).all()
    assert (coverage[1:] < 1).any()


def test_given_frames_can_be_dropped_too():
    patched = tiny.at_node(tiny.base_model("i2v"), "custom", anchor_given_frames=False)
    tiny.ksampler(patched, tiny.case("i2v"))
    assert (tiny.report_of(patched).coverage()[0] < 1).any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", [1, 1, 1, 0.7, 0.65, 0.6]),
        ("refresh", [1, 1, 1, 0.7, 0.7, 0.7]),
        ("paper", [1, 1, 0.7083, 0.75, 0.7917, 0.8333]),
    ],
)
def test_trimming_can_start_later(name, expected):
    """The first trimmed step of refresh still has to see every token once."""
    patched = tiny.at_node(tiny.base_model(), name, start=0.3)
    tiny.ksampler(patched, steps=6)
    assert tiny.shares(patched) == pytest.approx(expected, abs=1e-3)
