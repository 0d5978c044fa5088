"""The dial in runs of every sampler, guider and model, and beside other nodes."""

from types import SimpleNamespace

import pytest
import torch

import comfy.model_management
import comfy.sample
import comfy.samplers
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from wantrim.benchmarks.flops import count_flops
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui import dial
from wantrim.hosts.comfyui.slim import load_slim
from wantrim.report.words import record_text
from wantrim.slim.export import export_slim
from wantrim.slim.source import open_source
from wantrim.solve.dial import Dial
from wantrim.tests.comfyui import test_chaining, tiny
from wantrim.tests.comfyui.neighbours import attention_patched, easycache, lora, shifted, slg
from wantrim.tests.comfyui.put import (
    asked,
    demo_sample,
    dialled,
    done,
    notes,
    solved,
)
from wantrim.tests.whole_width import whole_width
from wantrim.toy import CHECKPOINT


@pytest.mark.parametrize("sampler", ["uni_pc", "dpmpp_2m", "euler_ancestral", "lcm"])
def test_other_samplers(sampler):
    """Multi-step ones, and those that add noise between the steps."""
    patched = dialled(tiny.base_model())
    out = tiny.ksampler(patched, steps=6, sampler=sampler)
    assert torch.isfinite(out).all() and done(patched) == pytest.approx(1.5, rel=0.03)
    assert torch.equal(tiny.ksampler(patched, steps=6, sampler=sampler), out)


# these go their own way: no number of steps holds
OWN_WAY = {"dpm_fast", "dpm_adaptive", "ar_video"}


@pytest.mark.parametrize("name", sorted(set(comfy.samplers.KSampler.SAMPLERS) - OWN_WAY))
def test_every_stock_sampler_does_what_was_asked_for(name):
    """Of one call a step, of two or three, which nobody announces."""
    patched = dialled(tiny.base_model())
    tiny.sample(patched, steps=8, cfg=1.0, sampler=name)
    assert done(patched) == pytest.approx(1.5, rel=0.03)
    assert not notes(patched)


CALLED_TWICE = ["heun", "heunpp2", "exp_heun_2_x0", "dpm_2_ancestral", "sa_solver_pece"]


@pytest.mark.parametrize("name", CALLED_TWICE)
@pytest.mark.parametrize("context", ["auto", "off"])
def test_calls_of_a_step_that_did_different_work_are_counted_as_they_ran(name, context):
    """One whole and one repeated come to half of a step, not to a step on half of the tokens."""
    patched = dialled(tiny.base_model(), context=context)
    tiny.sample(patched, steps=2, sampler=name)
    record = tiny.report_of(patched)
    assert record.expected == pytest.approx(done(patched), rel=0.03)
    met = done(patched) == pytest.approx(1.5, rel=0.03)
    assert record.missed != met and (not record.notes or not met)


# of a restart, of a sampler's own, of one that adds noise to a video
RISING = [
    [1.0, 0.9, 0.8, 0.6, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0],
    [1.0, 0.95, 0.9, 0.8, 0.85, 0.7, 0.5, 0.3, 0.0],
    [1.0, 0.5, 0.0, 0.5, 0.25, 0.0],
    [0.0, 0.3, 0.6, 1.0],
]


@pytest.mark.parametrize("speedup", [1.25, 3.0])
@pytest.mark.parametrize("values", RISING)
def test_noise_levels_that_go_up_are_sampled_untouched_and_said(values, speedup):
    model, sigmas = tiny.base_model(), torch.tensor(values)
    patched = dialled(model, speedup=speedup)
    out = tiny.sample(patched, sigmas=sigmas)
    # at no noise at all the untouched model's are no numbers either
    assert out.allclose(tiny.sample(model, sigmas=sigmas), rtol=0, atol=0, equal_nan=True)
    (note,) = notes(patched)
    assert "noise levels go up on the way" in note and "nothing was left out" in note


def without(patched, key: str):
    """A clone whose sampler keeps something for itself."""
    changed = patched.clone()

    def apply(executor, x, t, *args, **kwargs):
        options = kwargs.get("transformer_options", args[-1] if args else {})
        options.pop(key, None)
        return executor(x, t, *args, **kwargs)

    changed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "changes", apply)
    return changed


def test_a_sampler_that_does_not_say_its_steps_trims_nothing_and_says_so():
    patched = dialled(tiny.base_model())
    silent = without(patched, "sample_sigmas")
    assert torch.equal(tiny.ksampler(silent), tiny.ksampler(tiny.base_model()))
    assert any("the sampler did not say which steps it will do" in note for note in notes(silent))
    assert solved(silent) is None
    assert "everything ran as planned" not in record_text(tiny.report_of(silent))


class Listed(comfy.samplers.CFGGuider):
    """As packs give one number for each step."""

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
        prompts = (self.conds["negative"], self.conds["positive"])
        scale = self.cfg[0] if isinstance(self.cfg, list) else self.cfg
        options = {"model_options": model_options, "seed": seed}
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, *prompts, scale, **options
        )


def test_a_guider_with_a_list_as_cfg_is_taken():
    patched, given, outs = dialled(tiny.base_model()), tiny.case(), []
    for cfg in (5.0, [5.0] * 4):
        guider = Listed(patched)
        guider.set_conds(given.positive, given.negative)
        guider.cfg = cfg
        sigmas = torch.tensor([*tiny.simple_sigmas(patched, 4), 0.0])
        noise = comfy.sample.prepare_noise(given.latent, 7)
        sampler = comfy.samplers.sampler_object("euler")
        outs.append(guider.sample(noise, given.latent, sampler, sigmas, disable_pbar=True, seed=7))
        assert done(patched) == pytest.approx(1.5, rel=0.03)
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("changes", "prompts"),
    [
        ({}, 2),
        ({"cfg": 1.0}, 1),
        ({"cfg": 1.0, "model_options": {"disable_cfg1_optimization": True}}, 2),
        ({"cfg": [1.0, 1.0]}, 2),
        ({"cfg": None}, 2),
        ({"cfg": "high"}, 2),
        ({"conds": {"positive": [1]}}, 1),
        ({"conds": {"positive": [1], "middle": [1], "negative": [1]}}, 3),
        # its own guidance is somewhere else
        ({"conds": {"positive": [1], "middle": [1], "negative": [1]}, "cfg": 1.0}, 3),
        ({"conds": None}, 1),
    ],
)
def test_a_guider_may_lack_anything(changes, prompts):
    conds = {"positive": [1], "negative": [1]}
    given = {"conds": conds, "cfg": 5.0, "model_options": {}, "model_patcher": tiny.base_model()}
    guider = SimpleNamespace(**given | changes)
    for one in (
        guider,
        SimpleNamespace(**{k: v for k, v in vars(guider).items() if v is not None}),
    ):
        found = dial.Wish.of(Dial(1.5), TrimPlan(), "auto", {}, one, 3.0)
        assert len(found.prompts) == prompts


def test_context_windows():
    model = ContextWindowsManualNode.execute(
        dialled(tiny.base_model()), 3, 1, "standard_static", 1, False, "pyramid", 2, False
    ).result[0]
    out = tiny.ksampler(model, tiny.case(frames=7), steps=5)
    assert torch.isfinite(out).all()
    assert solved(model).reached == pytest.approx(1.5, rel=0.04)
    assert done(model) == pytest.approx(solved(model).reached, rel=0.02)
    # each window begins with a whole step of its own
    steps, seen = tiny.report_of(model).steps, {}
    for step in steps:
        seen.setdefault(step.sigma, []).append(step.program.share)
    assert len(seen) == 5 and all(len(set(shares)) == 1 for shares in seen.values())
    assert min(map(len, seen.values())) > 1


def test_attention_patches_of_others_leave_whole_and_repeated_steps():
    model = attention_patched(dialled(tiny.base_model(), speedup=1.3))
    bare = attention_patched(tiny.base_model())
    out = tiny.ksampler(model, steps=6)
    assert not torch.equal(out, tiny.ksampler(bare, steps=6))
    assert set(asked(model)) == {0.0, 1.0} and tiny.report_of(model).context is None
    [note] = [note for note in notes(model) if "attn1_patch" in note]
    assert note.endswith("; every step is whole or repeated")
    # no other than with context off
    off = attention_patched(dialled(tiny.base_model(), speedup=1.3, context="off"))
    assert torch.equal(tiny.ksampler(off, steps=6), out)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_a_slim_model(tmp_path, cfg):
    source = open_source(CHECKPOINT)
    kept = whole_width(source.model)
    kept = type(kept)(
        tuple(heads[: 3 + i % 3] for i, heads in enumerate(kept.self_heads)),
        tuple(heads[:5] for heads in kept.cross_heads),
        tuple(channels[::2] for channels in kept.ffn_channels),
    )
    export_slim(source, tmp_path / "slim.safetensors", kept)
    slim = load_slim(str(tmp_path / "slim.safetensors"))
    dense = count_flops(lambda: demo_sample(slim, steps=6, cfg=cfg))
    patched = dialled(slim, speedup=1.6)
    total = count_flops(lambda: demo_sample(patched, steps=6, cfg=cfg))
    assert solved(patched).reached == pytest.approx(1.6, rel=0.03)
    assert dense / total == pytest.approx(1.6, rel=0.04)
    assert any(0 < share < 1 for share in asked(patched))
    assert not notes(patched)


@pytest.mark.parametrize("order", test_chaining.ORDERS)
@pytest.mark.parametrize("neighbour", [slg, easycache, shifted, lora])
def test_neighbours_keep_working(neighbour, order):
    base = tiny.base_model()
    model = dialled(neighbour(base)) if order == "in front" else neighbour(dialled(base))
    out = tiny.ksampler(model, steps=6)
    assert torch.isfinite(out).all()
    assert torch.equal(tiny.ksampler(model, steps=6), out)
    if neighbour is not easycache:
        # of what it answers there may be nothing left to leave out
        assert not torch.allclose(out, tiny.ksampler(neighbour(base), steps=6), atol=1e-3)
