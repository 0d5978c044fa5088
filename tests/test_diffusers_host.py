import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers import attach as host
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import sample, sigmas_for
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.routers import Router
from wantrim.methods.schedule import Schedule
from wantrim.methods.shares import Shares
from wantrim.methods.tokens import TokenPlan
from wantrim.report.words import record_text
from wantrim.tests.small_wan import SIZE, condition, noise, random_wan
from wantrim.tests.small_wan import words as text

BLOCKS = 5
BOTH = (COND, UNCOND)


def wan(in_dim=16) -> WanTransformer3DModel:
    return random_wan(BLOCKS, in_dim)


def tokens(keep=0.5, **options) -> TrimPlan:
    options = {"reselect_every": 2} | options
    return TrimPlan(TokenPlan(Schedule(keep, "constant"), **options))


def run(model, plan=None, cond_or_uncond=BOTH, batch=1, **options):
    options = {"steps": 3, "guidance": 4.0} | options
    if plan is None:
        return sample(model, text(batch), SIZE, **options)
    with attach(model, plan, cond_or_uncond=cond_or_uncond, shift=3.0):
        return sample(model, text(batch), SIZE, **options)


def watch_widths(model) -> list[int]:
    """Tokens seen by each block's self-attention, in order of the calls."""
    widths = []
    for block in model.blocks:
        block.attn1.register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[1]))
    return widths


@pytest.mark.parametrize(("in_dim", "given"), [(16, None), (36, None), (36, (0,)), (36, (0, 2))])
@pytest.mark.parametrize(
    "plan",
    [
        tokens(1.0),
        tokens(0.5, start=1.0),
        tokens(0.5, reselect_every=1),
        TrimPlan(shares=Shares((1.0, 0.5), (1, 1))),
        # no step is near the one that is repeated
        TrimPlan(shares=Shares((1.0, 0.1), (1, 0))),
    ],
)
def test_neutral_is_exact(in_dim, given, plan):
    model = wan(in_dim)
    extra = {"condition": condition(given=given)} if given else {}
    assert torch.equal(run(model, plan, **extra), run(model, **extra))


def test_dropping_changes_the_video_and_leaves_the_model_alone():
    model = wan()
    weights = copy.deepcopy(model.state_dict())
    dense = run(model)
    trimmed = run(model, tokens())
    assert not torch.allclose(trimmed, dense, atol=1e-3)
    assert torch.equal(run(model), dense)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def test_blocks_run_on_kept_tokens():
    model = wan()
    widths = watch_widths(model)
    run(model, tokens(0.5), steps=1)
    # 3 latent frames of 4 x 3 tokens; half of 12 is 6 a frame; blocks 0, 2, 4 see all
    assert widths == [36, 18, 36, 18, 36]


@torch.no_grad()
def test_a_repeated_step_comes_in_the_form_that_was_asked_for():
    model, x, y = wan(), torch.randn(1, 16, *SIZE), torch.randn(1, 16, *SIZE)
    plan = TrimPlan(shares=Shares((0.9, 0.5), (1, 0)))
    t = torch.tensor([900.0]), torch.tensor([500.0])
    for options, first in (({}, "sample"), ({"return_dict": False}, 0)):
        with attach(model, plan):
            one = model(x, t[0], text(), **options)
            other = model(hidden_states=y, timestep=t[1], encoder_hidden_states=text(), **options)
        assert type(one) is type(other) and len(one) == len(other) == 1
        found = [getattr(out, first) if options == {} else out[first] for out in (one, other)]
        assert found[0].shape == x.shape and found[0].dtype == found[1].dtype
        # there was noise in between, so that the video is repeated and not the velocity
        torch.testing.assert_close(y - 0.5 * found[1], x - 0.9 * found[0])


def test_attach_twice_is_attach_once_and_detach_leaves_nothing():
    model = wan()
    dense, once = run(model), run(model, tokens(0.5))
    attach(model, tokens(0.3), cond_or_uncond=BOTH, shift=3.0)
    attachment = attach(model, tokens(0.5), cond_or_uncond=BOTH, shift=3.0)
    assert torch.equal(sample(model, text(), SIZE, steps=3), once)
    attachment.detach()
    assert torch.equal(run(model), dense)
    assert all(not b._diffusers_hook.hooks for b in model.blocks)


def test_an_exception_inside_sampling_leaves_nothing():
    model = wan()
    dense = run(model)
    handle = model.blocks[3].ffn.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, tokens())
    handle.remove()
    assert torch.equal(run(model), dense)
    assert torch.equal(run(model, tokens()), run(model, tokens()))


def steps_split(model, x, sigma, words):
    """One step's conditional and unconditional velocity, in two calls."""
    t = torch.tensor([1000.0 * sigma] * len(x))
    return [model(x, t, w, return_dict=False)[0] for w in (words, torch.zeros_like(words))]


@pytest.mark.parametrize("named", [False, True])
@torch.no_grad()
def test_a_router_is_given_clips_class_token_of_the_deciding_prompt(named):
    class Asks(Router):
        name = "asks"

        def ask(self, sigma, content):
            told.append(content.clip)
            return torch.arange(3.0)

    told = []
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=24,
        freq_dim=32, ffn_dim=32, num_layers=3, image_dim=20, added_kv_proj_dim=24,
    ).eval()  # fmt: skip
    clip = noise(2, 5, 20, seed=4)
    given = noise(2, 36, *SIZE), torch.full((2,), 700.0), text(2)
    image = {"encoder_hidden_states_image": clip} if named else {}
    plan = TrimPlan(blocks=BlockPlan(Asks(), BlockBudget(0.5, 0.5)))
    with attach(model, plan, cond_or_uncond=(UNCOND, COND)):
        model(*given, *([] if named else [clip]), return_dict=False, **image)
    (seen,) = told
    # the conditional prompt's, the first of the image's tokens
    assert torch.equal(seen, clip[1:, 0])


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_cond_and_uncond_share_the_choice_batched_or_split(batch):
    model, words = wan(), text(batch)
    x = torch.randn(batch, 16, *SIZE, generator=torch.Generator().manual_seed(3))
    plan = tokens()
    both = torch.cat([words, torch.zeros_like(words)])
    t = torch.full((2 * batch,), 700.0)
    with attach(model, plan, cond_or_uncond=BOTH):
        batched = model(x.repeat(2, 1, 1, 1, 1), t, both, return_dict=False)[0].chunk(2)
    with attach(model, plan) as attachment:
        split = steps_split(model, x, 0.7, words)
        report = attachment.finish()
    torch.testing.assert_close(split[0], batched[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(split[1], batched[1], atol=1e-5, rtol=1e-5)
    # one step of two calls, not two steps
    assert [step.calls for step in report.steps] == [2]
    # the unconditional prompt alone would have chosen differently
    with attach(model, plan):
        alone = steps_split(model, x + 1e-6, 0.7, torch.zeros_like(words))[0]
    assert not torch.allclose(alone, split[1], atol=1e-3)


@torch.no_grad()
def test_every_sample_of_a_batch_chooses_for_itself():
    model = wan()
    x = torch.randn(2, 16, *SIZE, generator=torch.Generator().manual_seed(3))
    t, words = torch.tensor([700.0, 700.0]), text(2)
    with attach(model, tokens()):
        together = model(x, t, words, return_dict=False)[0]
        one = model(x[:1], t[:1], words[:1], return_dict=False)[0]
        two = model(x[1:], t[1:], words[1:], return_dict=False)[0]
    torch.testing.assert_close(together, torch.cat([one, two]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", [(0,), (0, 2)])
def test_given_latent_frames_are_never_dropped(given):
    model = wan(36)
    with attach(model, tokens(0.25), cond_or_uncond=BOTH, shift=3.0) as attachment:
        sample(model, text(), SIZE, steps=2, condition=condition(given=given))
        report = attachment.finish()
    [coverage] = report.coverage()
    for frame in range(3):
        assert bool((coverage[frame] == 1).all()) == (frame in given)


@pytest.mark.parametrize("name", ["masked_as_given", "timed_as_given"])
@torch.no_grad()
def test_a_model_call_asks_once_which_frames_are_given(name, monkeypatch):
    """It reads the whole input; a step that repeats asks too."""
    ask, seen = getattr(host, name), []
    monkeypatch.setattr(host, name, lambda *given: seen.append(name) or ask(*given))
    masked = name == "masked_as_given"
    model, x = wan(36 if masked else 16), noise(1, 16, *SIZE)
    inputs = torch.cat([x, condition()], 1) if masked else x
    sigmas = (0.9, 0.7, 0.5, 0.3)
    for plan in (tokens(), TrimPlan(shares=Shares(sigmas, (1, 1, 0.4, 0)))):
        with attach(model, plan) as attachment:
            for sigma in sigmas:
                seen.clear()
                t = torch.full((1,) if masked else (1, 36), 1000 * sigma)
                model(inputs * sigma, t, text(), return_dict=False)
                assert seen == [name]
            shares = [step.program.share for step in attachment.finish().steps]
        assert shares == ([1] * 4 if plan.shares is None else [1, 1, 0.4, 0])


def test_a_mask_over_part_of_the_picture_anchors_no_latent_frame():
    # an inpainting mask: one pixel of every latent frame is given
    model, image = wan(36), condition(given=())
    image[:, :4, :, 0, 0] = 1
    with attach(model, tokens(0.25), cond_or_uncond=BOTH, shift=3.0) as attachment:
        sample(model, text(), SIZE, steps=1, condition=image)
        [coverage] = attachment.finish().coverage()
    assert (coverage.flatten(1).min(1).values < 1).all()


@torch.no_grad()
def test_per_token_modulation_travels_with_its_token():
    # TI2V: every token has a timestep of its own; the given first latent frame is at 0
    model = wan()
    x = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(3))
    t = torch.full((1, 36), 700.0)
    t[:, :12] = 0
    dense = model(x, t, text(), return_dict=False)[0]
    with attach(model, tokens(0.5, reselect_every=10)) as attachment:
        trimmed = model(x, t, text(), return_dict=False)[0]
        selection = attachment.engine.now.selections[0]
        report = attachment.finish()
    assert torch.equal(report.coverage()[0, 0], torch.ones(4, 3))
    # by hand: the blocks after the first on the gathered tokens, modulation and positions
    hidden, temb, rotary, words = _inside(model, x, t)
    index = selection.index[0]
    full = model.blocks[0](hidden, words, temb, rotary)
    part, small = full[:, index], tuple(r[:, index] for r in rotary)
    for block in list(model.blocks)[1:]:
        part = block(part, words, temb[:, index], small)
    full[:, index] = part
    want = _finish(model, full, x, t)
    torch.testing.assert_close(trimmed, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(trimmed, dense, atol=1e-3)


def _inside(model, x, t):
    """The inputs of block 0, as the model itself makes them."""
    seen = {}

    def hook(module, args):
        seen["args"] = args
        raise StopIteration

    handle = model.blocks[0].register_forward_pre_hook(hook)
    with pytest.raises(StopIteration):
        model(x, t, text(), return_dict=False)
    handle.remove()
    hidden, words, temb, rotary = seen["args"]
    return hidden, temb, rotary, words


def _finish(model, hidden, x, t):
    """The model's output with `hidden` as the output of its last block."""
    handle = model.blocks[-1].register_forward_hook(lambda *a: hidden)
    out = model(x, t, text(), return_dict=False)[0]
    handle.remove()
    return out


AWKWARD = {
    "tape": TokenPlan(Schedule(0.6, "constant"), reselect_every=2),
    "shares": Shares((0.9, 0.7, 0.5, 0.3), (1, 1, 0.4, 0)),
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("size", [(1, 8, 6), (2, 2, 2), (3, 6, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_awkward_sizes_run(name, size, dtype):
    model, part = wan().to(dtype), AWKWARD[name]
    plan = TrimPlan(tokens=part) if name == "tape" else TrimPlan(shares=part)
    x = torch.randn(1, 16, *size, dtype=dtype)
    with attach(model, plan) as attachment:
        for sigma in (0.9, 0.7, 0.5, 0.3):
            x = x + 0.2 * model(x, torch.tensor([1000 * sigma]), text().to(dtype))[0]
        record = attachment.finish()
    assert x.shape == (1, 16, *size) and x.isfinite().all() and x.dtype == dtype
    assert all(step.as_planned for step in record.steps)


def test_inside_wan_pipeline_every_step_is_one_decision():
    model = wan()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(None, None, transformer=model, vae=None, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    options = {
        "prompt_embeds": text(),
        "negative_prompt_embeds": torch.zeros(1, 7, 24),
        "height": 64,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": 5,
        "output_type": "latent",
    }

    def video():
        return pipe(**options, generator=torch.Generator().manual_seed(1)).frames

    dense = video()
    falling = TrimPlan(TokenPlan(Schedule(0.6), reselect_every=2))
    with attach(model, falling, shift=3.0) as attachment:
        trimmed = video()
        report = attachment.finish()
        again = video()
    assert torch.equal(trimmed, again)
    assert not torch.allclose(trimmed, dense, atol=1e-3)
    assert torch.equal(video(), dense)
    # conditional and unconditional come in two calls
    assert [step.calls for step in report.steps] == [2] * 5
    kept = [step.program.budget / step.grid.per_frame for step in report.steps]
    assert kept == sorted(kept)
    assert kept[0] == pytest.approx(0.5)


def test_the_report_says_what_ran():
    model = wan()
    with attach(model, tokens(0.5), cond_or_uncond=BOTH, shift=3.0) as attachment:
        sample(model, text(), SIZE, steps=3)
        report = attachment.finish()
    assert report.finished
    assert [s.sigma for s in report.steps] == pytest.approx(sigmas_for(3, 3.0)[:3].tolist())
    # blocks 0, 2, 4 on 36 tokens, 1 and 3 on 18
    assert report.steps[0].tokens_per_block == [36, 18, 36, 18, 36]
    assert report.kept_share == pytest.approx(144 / 180)
    assert report.coverage().mean().item() == pytest.approx(144 / 180)
    assert "80% of the tokens" in record_text(report)
    assert "everything ran as planned" in record_text(report)


def test_a_wrong_model_and_an_empty_latent_are_refused():
    with pytest.raises(ValueError, match="WanTransformer3DModel, got Linear"):
        attach(torch.nn.Linear(2, 2), tokens())
    model = wan()
    one = (torch.zeros(1, 16, *SIZE), torch.tensor([500.0]), text())
    with (
        attach(model, tokens(), cond_or_uncond=BOTH),
        pytest.raises(ValueError, match="cond_or_uncond: expected one entry per chunk .* got 2"),
    ):
        model(*one, return_dict=False)
    with (
        attach(model, tokens()),
        pytest.raises(ValueError, match=r"empty latent of shape \[1, 16, 0, 8, 6\]"),
    ):
        model(torch.zeros(1, 16, 0, 8, 6), torch.tensor([500.0]), text(), return_dict=False)


@torch.no_grad()
def test_when_every_latent_frame_is_given_all_is_computed_and_said():
    model = wan(36)
    with attach(model, tokens(0.25), cond_or_uncond=BOTH, shift=3.0) as attachment:
        trimmed = sample(model, text(), SIZE, steps=1, condition=condition(given=(0, 1, 2)))
        report = attachment.finish()
    assert torch.equal(trimmed, run(model, steps=1, condition=condition(given=(0, 1, 2))))
    assert any("every latent frame is given" in note for note in report.notes)


@torch.no_grad()
def test_an_attention_that_cannot_be_seen_is_refused():
    model = wan()
    for block in model.blocks:
        block.attn1.processor = lambda attn, hidden, *args, **kwargs: hidden
    with (
        attach(model, tokens()),
        pytest.raises(RuntimeError, match="attention backend to 'native'"),
    ):
        model(torch.zeros(1, 16, *SIZE), torch.tensor([500.0]), text(), return_dict=False)
