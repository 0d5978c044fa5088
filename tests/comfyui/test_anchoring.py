"""Tokens of given latent frames and references are never dropped."""

import pytest
import torch

from comfy_extras import nodes_wan
from wantrim.tests.comfyui import tiny
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


@pytest.mark.parametrize("dropped_kv", ["leave", "keep"])
@pytest.mark.parametrize(("kind", "given", "anchored", "frames"), GIVEN.values(), ids=GIVEN)
def test_given_frames_keep_their_tokens(kind, given, anchored, frames, dropped_kv):
    patched = tiny.trimmed(tiny.base_model(kind), dropped_kv=dropped_kv)
    calls = tiny.watch(patched)
    tiny.sample(patched, given())
    for call in calls:
        assert call.length == frames * tiny.PER_FRAME
        expected = [tiny.PER_FRAME if f in anchored else call.budget for f in range(frames)]
        assert kept_per_frame(call, frames) == {0: expected, 3: expected}
    report = tiny.report_of(patched)
    coverage = report.coverage()
    assert coverage.shape[0] == frames
    whole = [f for f in range(frames) if bool((coverage[f] == 1).all())]
    assert whole == anchored


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


def test_importance_is_read_from_the_grid_behind_the_reference():
    """The reference's own tokens must not be taken for the first latent frame's."""
    model = tiny.base_model("fun")
    chosen = []
    for importance in ("hidden_norm", "attention"):
        patched = tiny.trimmed(model, importance=importance, alpha=1.0)
        calls, hidden = tiny.watch(patched), []
        patched.set_model_double_block_patch(lambda a, h=hidden: h.append(a["img"].clone()) or a)
        tiny.sample(patched, tiny.case("fun"), steps=1, cfg=1.0)
        norm = hidden[0][0].norm(dim=-1)
        chosen.append((calls[0], norm))
    call, norm = chosen[0]
    for frame in range(3):
        first = 20 + frame * 20
        best = norm[first : first + 20].topk(call.budget).indices + first
        kept = call.kept[0][0]
        assert set(best.tolist()) == set(kept[(kept >= first) & (kept < first + 20)].tolist())


@pytest.mark.parametrize("has_it", ["positive", "negative"])
@pytest.mark.parametrize("dropped_kv", ["leave", "keep"])
@pytest.mark.parametrize(
    ("kind", "given"),
    [("t2v", phantom), ("fun", lambda: tiny.case("fun")), ("t2v", bernini)],
    ids=["subjects", "reference", "context latents"],
)
def test_only_one_prompt_with_a_reference(kind, given, dropped_kv, has_it):
    """The sequences differ in length: the same places of the video are dropped in both."""
    given, model = given(), tiny.base_model(kind)
    if has_it == "positive":
        given.negative = tiny.text(2)
    else:
        given.positive = tiny.text(1)
    neutral = tiny.trimmed(model, reselect_every=1)
    assert torch.equal(tiny.sample(neutral, given), tiny.sample(model, given))
    patched = tiny.trimmed(model, dropped_kv=dropped_kv)
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
