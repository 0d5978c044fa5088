"""What ComfyUI or another pack hands over otherwise than ComfyUI 0.33 does."""

import pytest
import torch

from comfy.patcher_extension import WrappersMP
from wantrim.hosts.comfyui import live
from wantrim.nodes.wantrim import WanTrim
from wantrim.tests.comfyui import tiny

TRIMS = {
    "tokens": tiny.trimmed,
    "shares": lambda m: tiny.shared(m, 1, 1, 0, 0.4),
    "dial": lambda m: WanTrim.execute(m, 1.5, "draft", 1, 0).result[0],
}
trims = pytest.mark.parametrize("trim", TRIMS.values(), ids=TRIMS)


def fronted(kind, wrapper, trim):
    """A trimmed MODEL with another pack's wrapper in front of ours."""
    model = tiny.base_model().clone()
    model.add_wrapper_with_key(kind, "another pack", wrapper)
    return trim(model)


@trims
def test_sigmas_by_keyword(trim):
    def by_keyword(executor, noise, latent, sampler, sigmas, *rest, **kwargs):
        names = ("denoise_mask", "callback", "disable_pbar", "seed", "latent_shapes")
        given = dict(zip(names, rest, strict=False)) | kwargs
        return executor(noise, latent, sampler=sampler, sigmas=sigmas, **given)

    model = fronted(WrappersMP.OUTER_SAMPLE, by_keyword, trim)
    assert torch.equal(tiny.sample(model, steps=4), tiny.sample(trim(tiny.base_model()), steps=4))
    assert tiny.report_of(model).kept_share < 0.95


def without(*names):
    def drop(executor, *args, **kwargs):
        options = {k: v for k, v in args[-1].items() if k not in names}
        return executor(*args[:-1], options, **kwargs)

    return drop


@pytest.mark.parametrize("name", ["tokens", "shares"])
def test_sigmas_that_were_not_announced_are_no_matter_to_a_plan(name):
    trim = TRIMS[name]
    model = fronted(WrappersMP.DIFFUSION_MODEL, without("sample_sigmas"), trim)
    assert torch.equal(tiny.sample(model, steps=4), tiny.sample(trim(tiny.base_model()), steps=4))


@pytest.mark.parametrize("name", ["tokens", "shares"])
def test_prompts_without_names_and_levels_without_sigmas(name):
    """Options of other packs' samplers: names of prompts are missing, or the noise level is."""
    trim, expected = TRIMS[name], tiny.sample(TRIMS[name](tiny.base_model()), steps=4)
    for names in (("uuids",), ("sigmas",), ("uuids", "sigmas")):
        model = fronted(WrappersMP.DIFFUSION_MODEL, without(*names), trim)
        out = tiny.sample(model, steps=4)
        report = tiny.report_of(model)
        assert report.finished and report.kept_share < 0.95
        # a timestep is a sigma in thousandths, rounded on its way
        assert (out - expected).abs().max() <= 1e-3 * expected.abs().max()


@trims
def test_figures_that_cannot_be_worked_out_do_not_end_the_run(trim, monkeypatch, caplog):
    expected = tiny.sample(trim(tiny.base_model()), steps=4)

    def broken(*args):
        raise ZeroDivisionError("in the cost model")

    class Server:
        client_id, sent = "page", []

        def send_sync(self, event, what, client):
            self.sent.append(what)

    monkeypatch.setattr(live, "_server", Server)
    monkeypatch.setattr(live, "step_work", broken)
    monkeypatch.setattr("wantrim.hosts.comfyui.attach.running_node", lambda: "3")
    model = trim(tiny.base_model())
    assert torch.equal(tiny.sample(model, steps=4), expected)
    # the end is told all the same
    assert [what.get("done") for what in Server.sent] == [True]
    assert any("could not be told of a step" in record.getMessage() for record in caplog.records)
