"""Tokens of given latent frames and references are never dropped."""

import pytest
import torch

from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_wan
from wantrim.hosts.comfyui import attach, variants
from wantrim.hosts.comfyui.blocks import OVERRIDE
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.passes import full_length, look_inside, lost_places, observed
from wantrim.tests.comfyui.put import dialled
from wantrim.tests.comfyui.variants import bernini, first_and_last, made, phantom, picture

SIZE = (tiny.WIDTH * 8, tiny.HEIGHT * 8, 4 * (tiny.FRAMES - 1) + 1, 1)


def last_only() -> tiny.Case:
    return made(nodes_wan.WanFirstLastFrameToVideo, end_image=picture(4))


def no_image() -> tiny.Case:
    return tiny.case("t2v")


def vace_reference() -> tiny.Case:
    node = nodes_wan.WanVaceToVideo
    return made(node, 1.0, control_video=picture(4, SIZE[2]), reference_image=picture(5))


def fun_control_start() -> tiny.Case:
    return made(nodes_wan.Wan22FunControlToVideo, start_image=picture(3))


def ti2v_last() -> tiny.Case:
    given = tiny.case("ti2v")
    return tiny.Case(given.positive, given.negative, given.latent, given.noise_mask.flip(2))


# kind of model, what is given, latent frames that must keep all tokens, latent frames in the grid
GIVEN = {
    "start image": ("i2v", lambda: tiny.case("i2v"), [0], 3),
    "start image with CLIP": ("i2v_clip", lambda: tiny.case("i2v_clip"), [0], 3),
    "first and last": ("i2v", first_and_last, [0, 2], 3),
    "last only": ("i2v_clip", last_only, [2], 3),
    "image model without an image": ("i2v", no_image, [], 3),
    "start image of TI2V": ("ti2v", lambda: tiny.case("ti2v"), [0], 3),
    "end image of TI2V": ("ti2v", ti2v_last, [2], 3),
    "given frames of VACE": ("vace", lambda: tiny.case("vace"), [0], 3),
    "reference of VACE": ("vace", vace_reference, [0], 4),
    "subjects of Phantom": ("t2v", phantom, [3, 4], 5),
    "start image of Fun Camera": ("camera", lambda: tiny.case("camera"), [0], 3),
    "start image of Fun Control": ("fun", fun_control_start, [0], 3),
}


def kept_per_frame(call, frames: int, start: int = 0) -> dict[int, list[int]]:
    found = {}
    for block, index in call.kept.items():
        frame = (index[0] - start) // tiny.PER_FRAME
        found[block] = [int((frame == f).sum()) for f in range(frames)]
    return found


@pytest.mark.parametrize(("kind", "given", "anchored", "frames"), GIVEN.values(), ids=GIVEN)
def test_given_frames_keep_their_tokens(kind, given, anchored, frames):
    patched = tiny.trimmed(tiny.base_model(kind))
    calls = tiny.watch(patched)
    tiny.sample(patched, given())
    for call in calls:
        assert call.length == frames * tiny.PER_FRAME
        expected = [tiny.PER_FRAME if f in anchored else call.budget for f in range(frames)]
        assert kept_per_frame(call, frames) == {0: expected, 3: expected}
    report = tiny.report_of(patched)
    [coverage] = report.coverage()
    assert coverage.shape[0] == frames
    whole = [f for f in range(frames) if bool((coverage[f] == 1).all())]
    assert whole == anchored


@pytest.mark.parametrize("tokens", [(7, 7), (7, 9)], ids=["batched", "split"])
@pytest.mark.parametrize(
    ("kind", "where", "name"),
    [
        ("t2v", attach, "anchored_frames"),
        ("i2v", variants, "masked_as_given"),
        ("ti2v", variants, "timed_as_given"),
    ],
)
def test_a_model_call_asks_once_which_frames_are_given(kind, where, name, tokens, monkeypatch):
    """It reads the whole input; a dial, and a step that repeats, have it from there."""
    ask, seen = getattr(where, name), []
    monkeypatch.setattr(where, name, lambda *given: seen.append("ask") or ask(*given))

    def called(executor, *args, **kwargs):
        seen.append("call")
        return executor(*args, **kwargs)

    base = tiny.base_model(kind).clone()
    base.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "seen", called)
    for patched in (tiny.trimmed(base), tiny.shared(base, 1, 1, 0.4, 0), dialled(base)):
        seen.clear()
        tiny.sample(patched, tiny.case(kind, tokens=tokens), steps=4)
        calls = sum(step.calls for step in tiny.report_of(patched).steps)
        assert calls == 4 * (1 + (tokens == (7, 9)))
        assert seen == ["call", "ask"] * calls


@pytest.mark.parametrize("name", ["start image", "start image of TI2V", "given frames of VACE"])
def test_anchoring_can_be_turned_off(name):
    kind, given, _, frames = GIVEN[name]
    patched = tiny.trimmed(tiny.base_model(kind), anchor=False)
    calls = tiny.watch(patched)
    tiny.sample(patched, given())
    for call in calls:
        assert kept_per_frame(call, frames)[0] == [call.budget] * frames


def test_reference_in_front_of_the_grid_is_kept_and_the_grid_starts_behind_it():
    patched = tiny.trimmed(tiny.base_model("fun"))
    calls = tiny.watch(patched)
    tiny.sample(patched, tiny.case("fun"))
    grid = tiny.report_of(patched).steps[0].grid
    assert (grid.start, grid.frames, grid.height, grid.width) == (20, 3, 4, 5)
    for call in calls:
        assert call.length == 80
        for index in call.kept.values():
            assert index[0, :20].tolist() == list(range(20))
        expected = [call.budget] * 3
        assert list(kept_per_frame_behind(call, 20).values()) == [expected, expected]


def kept_per_frame_behind(call, start: int) -> dict[int, list[int]]:
    kept = {block: index[:, start:] for block, index in call.kept.items()}
    shifted = tiny.Call(
        call.sigma, call.cond_or_uncond, call.frames, call.decision, call.budget, kept
    )
    return kept_per_frame(shifted, 3, start)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_importance_is_read_from_the_grid_behind_the_reference(alpha):
    """By hand: attention received, smoothed over the video's own latent frames."""
    patched = tiny.trimmed(tiny.base_model("fun"), alpha=alpha)
    calls, received = tiny.watch(patched), []

    def look(func, q, k, v, heads, *args, **kwargs):
        # of the first choosing block's self-attention; all queries are taken on so small a grid
        if not received and q.shape[1] == k.shape[1]:
            parts = (t.unflatten(-1, (heads, -1)).transpose(1, 2).float() for t in (q, k))
            queries, keys = parts
            scores = queries[:, :, 20:] @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
            received.append(scores.softmax(-1).mean((1, 2))[0, 20:].view(3, 20))
        return func(q, k, v, heads, *args, **kwargs)

    patched.model_options["transformer_options"][OVERRIDE] = look
    tiny.sample(patched, tiny.case("fun"), steps=1, cfg=1.0)
    kept = calls[0].kept[0][0] - 20
    for frame, own in enumerate(received[0]):
        smooth = own if frame == 0 else alpha * own + (1 - alpha) * received[0][frame - 1]
        best = smooth.topk(calls[0].budget).indices + 20 * frame
        assert set(best.tolist()) == set(kept[kept // 20 == frame].tolist())


@pytest.mark.parametrize("has_it", ["positive", "negative"])
@pytest.mark.parametrize(
    ("kind", "given"),
    [("t2v", phantom), ("fun", lambda: tiny.case("fun")), ("t2v", bernini)],
    ids=["subjects", "reference", "context latents"],
)
def test_only_one_prompt_with_a_reference(kind, given, has_it):
    """The sequences differ in length: the same places of the video are dropped in both."""
    given, model = given(), tiny.base_model(kind)
    if has_it == "positive":
        given.negative = tiny.text(2)
    else:
        given.positive = tiny.text(1)
    neutral = tiny.trimmed(model, reselect_every=1)
    assert torch.equal(tiny.sample(neutral, given), tiny.sample(model, given))
    patched = tiny.trimmed(model)
    hidden = []
    patched.set_model_double_block_patch(lambda a: hidden.append(a["img"].clone()) or a)
    tiny.sample(patched, given, steps=1)
    calls = [hidden[: tiny.LAYERS], hidden[tiny.LAYERS :]]
    short, long = sorted(calls, key=lambda states: states[0].shape[1])
    grid = tiny.FRAMES * tiny.PER_FRAME
    start = tiny.PER_FRAME if kind == "fun" else 0
    for block in (1, 2, 4, 5):
        without, with_it = (
            (states[block] == states[block - 1]).all(-1)[0] for states in (short, long)
        )
        assert len(without) == grid < len(with_it)
        assert without.any()
        assert torch.equal(with_it[start : start + grid], without)
        assert with_it.sum() == without.sum()


def test_context_latents_behind_the_grid_are_kept():
    tiny.needs("0.25.0", "context latents")
    given = bernini()
    patched = tiny.trimmed(tiny.base_model())
    calls = tiny.watch(patched)
    tiny.sample(patched, given)
    for call in calls:
        assert call.length == 80
        kept = call.kept[0][0]
        assert kept[kept >= 60].tolist() == list(range(60, 80))
        assert (kept < 60).sum() == 3 * call.budget


@pytest.mark.parametrize(("kind", "given", "anchored", "frames"), GIVEN.values(), ids=GIVEN)
def test_a_partial_step_computes_equally_much_of_every_frame_given_or_not(
    kind, given, anchored, frames
):
    """Left out, a given latent frame repeats its velocity; its keys and values are still seen."""
    patched = tiny.shared(tiny.base_model(kind), 1, 1, 0.4)
    calls = tiny.watch(patched)
    out = tiny.sample(patched, given())
    assert torch.isfinite(out).all() and not tiny.report_of(patched).notes
    assert [call.budget for call in calls] == [20, 20, 8]
    assert kept_per_frame(calls[2], frames) == {0: [8] * frames}
    assert calls[2].length == frames * tiny.PER_FRAME


@pytest.mark.parametrize(
    ("kind", "given", "outside"),
    [("fun", lambda: tiny.case("fun"), range(20)), ("t2v", bernini, range(60, 80))],
    ids=["reference", "context latents"],
)
def test_tokens_outside_of_the_video_are_computed_in_a_partial_step(kind, given, outside):
    patched = tiny.shared(tiny.base_model(kind), 1, 1, 0.4)
    calls = tiny.watch(patched)
    tiny.sample(patched, given())
    kept = calls[2].kept[0]
    assert calls[2].length == 80 and kept.shape[1] == 20 + 3 * 8
    assert set(outside) <= set(kept[0].tolist())


@pytest.mark.parametrize("has_it", ["positive", "negative"])
@pytest.mark.parametrize(
    ("kind", "given"),
    [("t2v", phantom), ("fun", lambda: tiny.case("fun")), ("t2v", bernini)],
    ids=["subjects", "reference", "context latents"],
)
def test_a_partial_step_with_a_reference_in_one_prompt_only(kind, given, has_it, monkeypatch):
    """The same places of the video repeat their velocity in both prompts."""
    look_inside(monkeypatch)
    given = given()
    if has_it == "positive":
        given.negative = tiny.text(2)
    else:
        given.positive = tiny.text(1)
    base, passes = observed(full_length(tiny.base_model(kind)))
    patched = tiny.shared(base, 1, 1, 0.4)
    out = tiny.sample(patched, given)
    assert torch.isfinite(out).all() and not tiny.report_of(patched).notes
    assert [seen.roles for seen in passes] == 3 * [[0], [1]]
    places = []
    for before, seen in zip(passes[2:4], passes[4:], strict=True):
        length = seen.before[0].shape[1]
        lost = lost_places(seen, length - 60 if kind == "fun" else 0)
        assert lost.sum() == 4 * 36
        assert set(seen.tokens.values()) == {int((~seen.dropped).sum())}
        same = (seen.velocity == before.velocity).all(1, keepdim=True)
        assert torch.equal(same, lost)
        places.append(lost)
    assert torch.equal(*places)
