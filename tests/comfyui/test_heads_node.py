"""The node WanTrim Heads on the shipped tiny Wan with its shipped profile."""

from dataclasses import replace

import pytest
import torch

from wantrim.hosts.comfyui.attach import attachment_of
from wantrim.hosts.comfyui.slim import load_slim
from wantrim.methods.heads import FULL, OFF
from wantrim.nodes import demo
from wantrim.nodes.heads import METHODS, WanTrimHeads
from wantrim.nodes.profile import DEMO, WanTrimLoadProfile, WanTrimProfile
from wantrim.nodes.tokens import WanTrimTokens
from wantrim.nodes.wantrim import WanTrim
from wantrim.profiles.recorder import ProfileFile
from wantrim.report.figures import attention_left, expected_speedup
from wantrim.slim.export import export_slim
from wantrim.slim.source import open_source
from wantrim.tests.comfyui import tiny
from wantrim.tests.whole_width import whole_width
from wantrim.toy import CHECKPOINT


@pytest.fixture(scope="module")
def model():
    return demo.WanTrimDemoModel.execute().result[0]


@pytest.fixture(scope="module")
def profile() -> ProfileFile:
    return WanTrimLoadProfile.execute(DEMO).result[0]


def heads(model, profile, prune_ratio=0.3, method="demote"):
    return WanTrimHeads.execute(model, profile, prune_ratio, method).result


def sample(model) -> torch.Tensor:
    prompts = [demo.WanTrimDemoPrompt.execute(text).result[0] for text in (demo.PROMPT, "")]
    return tiny.ksampler(model, tiny.Case(*prompts, tiny.empty_latent(5, 12, 12)), steps=2)


def long(model) -> torch.Tensor:
    prompts = [demo.WanTrimDemoPrompt.execute(text).result[0] for text in (demo.PROMPT, "")]
    return tiny.ksampler(model, tiny.Case(*prompts, tiny.empty_latent(5, 12, 12)), steps=10)


@pytest.mark.parametrize("method", METHODS)
def test_prune_ratio_zero_is_exact(model, profile, method):
    patched = heads(model, profile, 0.0, method)[0]
    assert torch.equal(sample(patched), sample(model))


def test_the_papers_rule_drops_as_many_heads_in_every_block(model, profile):
    patched, text = heads(model, profile, 0.4, "paper")
    out = sample(patched)
    assert torch.isfinite(out).all() and not torch.allclose(out, sample(model), atol=1e-2)
    plan, report = attachment_of(patched).plan.heads, attachment_of(patched).record
    assert plan.num_blocks == 16 and not report.notes and not plan.corrected
    # ceil(8 * 0.6) of 8 heads in every block
    assert {block.count(FULL) for block in plan.self_attention} == {5}
    assert {block.count(OFF) for block in plan.cross_attention} == {3}
    assert {name for block in plan.self_attention for name in block} == {FULL, OFF}
    shown = float(text.split(":")[1].split("%")[0]) / 100
    assert shown == pytest.approx(5 / 8, abs=0.001)
    assert text.endswith("block 15: 3, 3")


def test_a_profile_changes_nothing_where_the_run_measures(model, profile):
    with_it, text = heads(model, profile, 0.4)
    without, plain = heads(model, None, 0.4)
    assert torch.equal(sample(with_it), sample(without))
    assert text == f"{plain} The profile is not used: only method 'paper' needs it."


def test_without_a_profile_the_first_step_measures_and_the_others_are_trimmed(model):
    patched, text = heads(model, None, 0.4)
    assert "first step" in text and "60%" in text
    dense, out = sample(model), sample(patched)
    assert torch.isfinite(out).all() and not torch.allclose(out, dense, atol=1e-2)
    report = attachment_of(patched).record
    assert [step.whole for step in report.steps] == [True, False] and not report.notes
    assert 0.5 < attention_left(report) <= 0.6
    names = {n for block in report.steps[1].program.heads.self_attention for n in block}
    assert {FULL, OFF} < names
    # beside a dial's repeated and partial steps, in any order
    one = WanTrim.execute(patched, 1.6, "draft", 0, 0).result[0]
    other = heads(WanTrim.execute(model, 1.6, "draft", 0, 0).result[0], None, 0.4)[0]
    assert torch.equal(*(long(m) for m in (one, other)))
    report = attachment_of(one).record
    assert not report.notes and attention_left(report) <= 0.6
    assert 0.97 < expected_speedup(report) / 1.6 < 1.03
    assert torch.equal(sample(heads(model, None, 0.0)[0]), dense)


def test_the_papers_rule_needs_a_profile(model):
    with pytest.raises(ValueError, match="WanTrim Heads: method 'paper' .*or choose 'demote'"):
        heads(model, None, 0.3, "paper")


@pytest.mark.parametrize("method", METHODS)
def test_tokens_and_heads_nodes_in_both_orders(model, profile, method):
    def tokens(m):
        return WanTrimTokens.execute(m, 0.3, 0.0, 1.0, {"preset": "paper"}).result[0]

    one = heads(tokens(model), profile, 0.3, method)[0]
    other = tokens(heads(model, profile, 0.3, method)[0])
    assert torch.equal(sample(one), sample(other))
    assert attachment_of(one).plan == attachment_of(other).plan


def test_a_profile_of_another_model_is_refused(profile):
    with pytest.raises(ValueError, match="WanTrim Heads: profile: .*another model.*6 blocks"):
        heads(tiny.base_model(), profile)


def test_a_profile_of_other_weights_is_refused(model, profile):
    other = replace(
        profile.profile.model, sample=tuple(1.5 * x for x in profile.profile.model.sample)
    )
    with pytest.raises(ValueError, match="WanTrim Heads: profile: .*weights are not"):
        heads(model, ProfileFile(replace(profile.profile, model=other)))


def test_a_profile_that_lacks_what_the_papers_rule_needs_is_refused(model, profile):
    tensors = dict(profile.profile.tensors)
    tensors["cross_output"] = torch.zeros_like(tensors["cross_output"])
    with pytest.raises(ValueError, match="WanTrim Heads: profile: the cross-attention heads"):
        heads(model, ProfileFile(replace(profile.profile, tensors=tensors)), 0.3, "paper")


@pytest.mark.parametrize("grid", [None, [5, 6], ["5", "6", "6"], [5, 6, 0], "abc"])
def test_a_profile_that_does_not_say_its_size_is_refused(model, profile, grid):
    hostile = replace(profile.profile, runs=[{"grid": grid, "context_tokens": 24}])
    with pytest.raises(
        ValueError, match="WanTrim Heads: profile: expected one that says how large"
    ):
        heads(model, ProfileFile(hostile), 0.3, "paper")


@pytest.mark.parametrize("ratio", [-0.1, 0.95, float("nan")])
def test_a_linked_ratio_out_of_range_is_refused(model, profile, ratio):
    with pytest.raises(ValueError, match="WanTrim Heads: prune_ratio: expected 0 to 0.9"):
        heads(model, profile, ratio)


def test_an_unknown_method_is_refused(model, profile):
    with pytest.raises(ValueError, match="WanTrim Heads: method: expected one of demote"):
        heads(model, profile, 0.3, "best")


@pytest.mark.parametrize("node", ["heads", "profile"])
def test_a_slim_model_is_refused(profile, tmp_path, node):
    source = open_source(CHECKPOINT)
    export_slim(source, tmp_path / "slim.safetensors", whole_width(source.model))
    slim = load_slim(str(tmp_path / "slim.safetensors"))
    with pytest.raises(ValueError, match="expects a full Wan model, but got a slim one"):
        heads(slim, profile) if node == "heads" else WanTrimProfile.execute(slim, "none")
