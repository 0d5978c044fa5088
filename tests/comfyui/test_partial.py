"""Steps on a part of the tokens: which ones, on which keys and values, and what the others get."""

import gc
import weakref

import pytest
import torch

import comfy.model_management
from wantrim.engine import memory
from wantrim.hosts.comfyui.attach import SESSION_KEY
from wantrim.hosts.comfyui.blocks import OVERRIDE
from wantrim.kernels import reference
from wantrim.kernels.reference import pack_rows, unpack_rows
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.passes import look_inside, lost_places, observed

# of 20 tokens of a latent frame
FEW = 8


def watched(given, *values, model=None, **options):
    base, passes = observed(model or tiny.base_model())
    patched = tiny.shared(base, *values)
    out = tiny.sample(patched, given, steps=len(values), **options)
    assert torch.isfinite(out).all()
    return out, passes, tiny.report_of(patched)


def contexts(model) -> list[int]:
    """Blocks whose keys and values are held after each model call from now on, of all prompts."""
    held = []

    def note(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        parts = args[-1][SESSION_KEY].engine.memory.parts.values()
        held.append([len(p.blocks) for part in parts for p in part.prompts.values()])
        return out

    model.add_wrapper_with_key("diffusion_model", "contexts", note)
    return held


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_left_out_tokens_repeat_their_velocity_and_the_others_are_computed(
    kind, batch, monkeypatch
):
    look_inside(monkeypatch)
    given, values = tiny.case(kind, batch=batch), (1, 1, 0.4, 0.4, 1)
    _, passes, report = watched(given, *values, model=tiny.base_model(kind))
    reference = tiny.PER_FRAME if kind == "fun" else 0
    counts = [{60 + reference}, {60 + reference}, *2 * [{3 * FEW + reference}], {60 + reference}]
    assert [set(seen.tokens.values()) for seen in passes] == counts
    for before, seen in zip(passes[1:3], passes[2:4], strict=True):
        lost = lost_places(seen, reference)
        assert lost.sum() == 2 * batch * 3 * (20 - FEW) * 4
        same = (seen.velocity == before.velocity).all(1, keepdim=True)
        assert torch.equal(same, lost)
    assert not torch.equal(passes[2].dropped, passes[3].dropped)
    assert [step.kept_share for step in report.steps] == pytest.approx(values)
    assert not report.notes


@pytest.mark.parametrize("kind", ["t2v", "i2v", "vace"])
def test_computed_are_the_tokens_that_changed_most_or_waited_longest(kind, monkeypatch):
    look_inside(monkeypatch)
    _, passes, _ = watched(tiny.case(kind), 1, 1, 0.4, 0, 0.4, model=tiny.base_model(kind))

    def change(new: int, old: int) -> torch.Tensor:
        # of the positive prompt, mean over channels and the four latent points of a token
        positive = [passes[i].velocity.chunk(2)[1] for i in (new, old)]
        square = (positive[0] - positive[1]).square().mean(1)
        return square.unflatten(2, (4, 2)).unflatten(4, (5, 2)).mean((3, 5)).view(3, 20)

    def kept(seen) -> torch.Tensor:
        return ~seen.dropped[0].view(3, 20)

    known, age = change(1, 0), torch.zeros(3, 20)
    for number in (2, 4):
        best = torch.zeros(3, 20, dtype=torch.bool)
        worth = known * (1 + age) ** 2
        best.scatter_(1, worth.topk(FEW).indices, True)
        assert torch.equal(kept(passes[number]), best)
        known = torch.where(best, change(number, number - 1), known)
        # the repeated step behind counts too
        age = torch.where(best, 0.0, 1.0) + 1
    assert not torch.equal(passes[2].dropped, passes[4].dropped)


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
def test_keys_and_values_of_the_others_are_those_of_when_they_were_last_computed(
    bits, levels, monkeypatch
):
    look_inside(monkeypatch)
    real = memory.Room
    monkeypatch.setattr(memory, "Room", lambda: real(None, bits))
    seen_by = []

    def look(func, q, k, v, *args, **kwargs):
        if k.shape[1] == 60:
            seen_by.append((q.shape[1], k.clone(), v.clone()))
        return func(q, k, v, *args, **kwargs)

    model = tiny.base_model().clone()
    model.model_options["transformer_options"][OVERRIDE] = look
    _, passes, _ = watched(tiny.case(), 1, 1, 0.4, 0.4, model=model)
    assert [q for q, *_ in seen_by] == [q for q in (60, 60, 24, 24) for _ in range(tiny.LAYERS)]
    for block in range(tiny.LAYERS):
        for part in (1, 2):
            whole = seen_by[tiny.LAYERS + block][part]
            known, scale = whole.clone(), 0.0
            for step in (2, 3):
                came = seen_by[step * tiny.LAYERS + block][part]
                for row, dropped in enumerate(passes[step].dropped):
                    old, new = known[row, dropped], came[row, 24:]
                    rows = old.unflatten(-1, (tiny.HEADS, -1))
                    # half a level of each row of a head
                    most = rows.abs().amax(-1, keepdim=True) / levels * 0.51 + 1e-3
                    apart = (new.unflatten(-1, (tiny.HEADS, -1)) - rows).abs()
                    assert (apart <= most).all()
                    scale = max(scale, float(apart.max()))
                    # those that were computed are remembered from here on
                    known[row, ~dropped] = came[row, :24]
            assert scale > 0
            assert not torch.allclose(known, whole, atol=0.1)


def test_four_bits_are_nearer_to_exact_than_nothing_and_eight_are_nearer_still(monkeypatch):
    values, outs, real = (1, 1, 0.4, 0.4), {}, memory.Room
    for bits in (8, 4):
        monkeypatch.setattr(memory, "Room", lambda bits=bits: real(None, bits))
        outs[bits], _, report = watched(tiny.case(), *values)
        assert not report.notes
    monkeypatch.setattr(reference, "pack_rows", lambda x, bits: (x.clone(), x[..., :1].clone()))
    monkeypatch.setattr(reference, "unpack_rows", lambda codes, scales, bits: codes)
    exact, _, _ = watched(tiny.case(), *values)
    # with nothing remembered the others would not be seen
    monkeypatch.setattr(reference, "unpack_rows", lambda codes, scales, bits: codes * 0)
    outs[0], _, _ = watched(tiny.case(), *values)
    errors = {bits: float((out - exact).square().mean()) for bits, out in outs.items()}
    assert 0 < errors[8] < 0.1 * errors[4] < 0.1 * errors[0]


def test_rows_in_ram_give_the_same_video(monkeypatch):
    expected, _, _ = watched(tiny.case(), 1, 1, 0.4, 0, 0.4)
    real, moved = memory.Room, []
    ram = torch.device("cpu")
    monkeypatch.setattr(memory, "Room", lambda: moved.append(1) or real(ram, 8))
    out, _, report = watched(tiny.case(), 1, 1, 0.4, 0, 0.4)
    assert moved and torch.equal(out, expected) and not report.notes


@pytest.mark.parametrize(
    ("values", "held"),
    [
        ((1, 1, 0.4, 0.4, 1, 1), [0, 6, 6, 6, 0, 0]),
        ((1, 1, 0, 0.4, 0, 1), [0, 6, 6, 6, 0, 0]),
        ((1, 0.4, 1, 1, 0.4, 1), [6, 0, 0, 6, 6, 0]),
        ((1, 1, 0, 1, 0, 1), [0, 0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_keys_and_values_are_held_for_as_long_as_a_later_step_needs_them(values, held):
    base = tiny.base_model().clone()
    seen = contexts(base)
    patched = tiny.shared(base, *values)
    tiny.sample(patched, steps=6)
    # by both prompts
    assert seen == [[count] * 2 for count in held]


class Broken(Exception):
    pass


def cancel():
    raise comfy.model_management.InterruptProcessingException


def fail():
    raise Broken("in the middle of a block")


@pytest.mark.parametrize("stop", [None, cancel, fail], ids=["whole", "cancelled", "failed"])
def test_nothing_is_held_after_the_run(stop, monkeypatch):
    """Not a row of keys and values, not a velocity, not a latent."""
    tensors, blocks, engines = [], [], []
    base = tiny.base_model().clone()

    def note(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        engine = args[-1][SESSION_KEY].engine
        engines.append(engine)
        for part in engine.memory.parts.values():
            for prompt in part.prompts.values():
                held = [prompt.velocity, prompt.clean, *sum(prompt.blocks.values(), ())]
                tensors.extend(weakref.ref(t) for t in held)
        return out

    base.add_wrapper_with_key("diffusion_model", "note", note)
    patched = tiny.shared(base, 1, 1, 0.4, 0.4)
    whole = tiny.sample(patched, steps=4)
    tensors.clear(), engines.clear()

    def look(args):
        blocks.append(1)
        # in a partial step
        if stop is not None and len(blocks) == 3 * tiny.LAYERS + 3:
            stop()
        return args

    stopped = patched.clone()
    stopped.set_model_double_block_patch(look)
    if stop is None:
        tiny.sample(stopped, steps=4)
    else:
        with pytest.raises((comfy.model_management.InterruptProcessingException, Broken)):
            tiny.sample(stopped, steps=4)
    # two prompts, of six blocks four tensors each
    assert len(tensors) > 2 * (2 + 6 * 4)
    [engine] = {id(one): one for one in engines}.values()
    assert engine.memory.parts == {} and engine.now is None
    gc.collect()
    assert not any(ref() is not None for ref in tensors)
    assert torch.equal(tiny.sample(patched, steps=4), whole)


@pytest.mark.parametrize("at", [1, 8], ids=["first", "in the middle"])
def test_memory_that_runs_out_leaves_a_finished_run_and_a_remark(at, monkeypatch):
    calls = []

    def short(x, bits):
        calls.append(1)
        # two prompts, keys and values
        if len(calls) == at:
            raise torch.OutOfMemoryError("no room")
        return pack_rows(x, bits)

    monkeypatch.setattr(reference, "pack_rows", short)
    base = tiny.base_model().clone()
    held = contexts(base)
    patched = tiny.shared(base, 1, 1, 0.4, 0.4, 0, 0.4)
    out = tiny.sample(patched, steps=6)
    assert torch.isfinite(out).all()
    report = tiny.report_of(patched)
    assert report.finished and len(calls) == at
    assert any("not enough memory for the keys and values" in note for note in report.notes)
    whole = [1, 1, 1, 1, 0, 1]
    assert tiny.shares(patched) == whole
    assert all(set(each) == {0} for each in held[2:])
    monkeypatch.undo()
    # what ran is what was right: whole and repeated steps
    assert torch.equal(out, tiny.sample(tiny.shared(tiny.base_model(), *whole), steps=6))


def test_memory_that_runs_out_in_a_partial_step_still_gives_that_step(monkeypatch):
    calls = []

    def short(x, bits):
        calls.append(1)
        # behind the whole step's 6 blocks of 2 prompts
        if len(calls) == 2 * 2 * tiny.LAYERS + 5:
            raise torch.OutOfMemoryError("no room")
        return pack_rows(x, bits)

    monkeypatch.setattr(reference, "pack_rows", short)
    patched = tiny.shared(tiny.base_model(), 1, 1, 0.4, 0.4, 0.4)
    out = tiny.sample(patched, steps=5)
    assert torch.isfinite(out).all() and tiny.report_of(patched).finished
    assert any("not enough memory" in note for note in tiny.report_of(patched).notes)
    assert tiny.shares(patched) == pytest.approx([1, 1, 0.4, 1, 1])


def test_how_tokens_change_is_known_from_the_second_step():
    """Asked for earlier, the step is whole."""
    _, _, report = watched(tiny.case(), 1, 0.4, 0.4, 0)
    assert [step.kept_share for step in report.steps] == pytest.approx([1, 1, 0.4, 0])


def test_the_rows_of_a_test_are_real():
    x = torch.randn(2, 5, 3, 12)
    for bits, levels in ((8, 127), (4, 7)):
        apart = (unpack_rows(*pack_rows(x, bits), bits) - x).abs()
        assert (apart <= x.abs().amax(-1, keepdim=True) / levels * 0.51 + 1e-3).all()
