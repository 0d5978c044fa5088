"""Where the dial keeps keys and values of left out tokens, and what it does without."""

import pytest
import torch

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.sample
import comfy.samplers
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from wantrim.engine.context import Room
from wantrim.engine.memory import Part
from wantrim.engine.program import READ, UPDATE, WRITE
from wantrim.hosts.comfyui import dial
from wantrim.report.words import record_text
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.put import (
    asked,
    dialled,
    notes,
)
from wantrim.tests.comfyui.test_heads import heads
from wantrim.tests.comfyui.test_memory import windows

# bytes that a prompt's keys and values take: of each block and head 12 numbers and a scale
PROMPT = 2 * tiny.LAYERS * tiny.FRAMES * tiny.PER_FRAME * tiny.HEADS * (tiny.DIM // tiny.HEADS + 2)
GPU, RAM, MPS = torch.device("cuda", 0), torch.device("cpu"), torch.device("mps")


def rows(model) -> list[set[str]]:
    """What each step did with remembered keys and values."""
    return [{row.context for row in step.rows} for step in tiny.report_of(model).steps]


@pytest.mark.parametrize("steps", [4, 12])
def test_without_context_steps_are_whole_or_repeated(steps):
    patched = dialled(tiny.base_model(), speedup=1.9, context="off")
    out = tiny.ksampler(patched, steps=steps)
    assert set(asked(patched)) == {0.0, 1.0} and rows(patched) == [{""}] * steps
    assert tiny.report_of(patched).context is None and torch.isfinite(out).all()
    assert not any("were not free" in note for note in notes(patched))


def partly(model, **inputs):
    """A dial whose run of 6 steps has partial ones."""
    patched = dialled(model, speedup=1.3, **inputs)
    tiny.ksampler(patched, steps=6)
    return patched


def test_the_record_says_where_the_context_lives(monkeypatch):
    patched = partly(tiny.base_model())
    size = 2 * PROMPT
    said = "keys and values of left out tokens, {:.2g} GB in RAM ({} bit)"
    assert tiny.report_of(patched).held == said.format(size / 1e9, 8)
    assert f"Context: {said.format(size / 1e9, 8)}." in record_text(tiny.report_of(patched))
    seen = set().union(*rows(patched))
    assert WRITE in seen and seen & {READ, UPDATE}
    expected = asked(patched)
    # there is no other memory than the CPU's here
    assert asked(partly(tiny.base_model(), context="auto")) == expected
    free = {8: size / dial.SPARE, 4: size * 8 / 14 / dial.SPARE}
    # what a forward takes is looked at below
    monkeypatch.setattr(BaseModel, "memory_required", lambda *_, **__: 0.0)
    for bits, share in ((8, 1.0), (4, 1.0), (None, 0.9)):
        given = share * free[bits or 4]
        monkeypatch.setattr(
            comfy.model_management, "get_free_memory", lambda *_, given=given, **__: given
        )
        patched = partly(tiny.base_model())
        if bits:
            gigabytes = size * (1 if bits == 8 else 8 / 14) / 1e9
            assert tiny.report_of(patched).held == said.format(gigabytes, bits)
            assert asked(patched) == expected
        else:
            assert tiny.report_of(patched).context is None
            assert set(asked(patched)) == {0.0, 1.0}
            assert any(
                "were not free: every step is whole or repeated" in n for n in notes(patched)
            )


def test_weights_that_the_host_gives_back_are_room(monkeypatch):
    """As it counts them when it decides what it batches: a second run finds its own weights there."""
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 0)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 1e12)
    patched = partly(tiny.base_model(), context="auto")
    assert tiny.report_of(patched).context is not None


@pytest.mark.parametrize(
    ("place", "device", "free", "found"),
    [
        ("auto", GPU, (9, 9), (None, 8)),
        ("auto", GPU, (5, 9), (None, 4)),
        ("auto", GPU, (2, 9), (RAM, 8)),
        ("auto", GPU, (2, 5), (RAM, 4)),
        ("auto", GPU, (1, 1), None),
        # the block that computes and the next one are on the GPU
        ("auto", GPU, (0.7, 9), (RAM, 4)),
        ("auto", GPU, (0.3, 9), None),
        ("auto", MPS, (1, 9), None),
        ("cpu", MPS, (2, 9), (RAM, 8)),
        ("cpu", GPU, (9, 9), (RAM, 8)),
        ("cpu", GPU, (9, 1), None),
        ("off", GPU, (9, 9), None),
        ("auto", RAM, (0, 9), (None, 8)),
        ("auto", RAM, (0, 1), None),
    ],
)
def test_where_there_is_room(place, device, free, found, monkeypatch):
    """Free memory of GPU and RAM in thousands of bytes; 8 bits need 4,000, 4 bits 2,000."""
    by = {"cuda": 1000 * free[0], "mps": 1000 * free[0], "cpu": 1000 * free[1]}
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda d, **_: by[d.type])
    room = dial.find_room(place, device, lambda bits: 500 * bits, 10)
    assert (room and (room.device, room.bits)) == found
    if room is not None:
        assert room.more()
        by |= dict.fromkeys(by, 1000)
        # what others took meanwhile
        assert not room.more()


@pytest.mark.parametrize(
    ("own", "found"),
    [
        (0, (None, 8)), (3300, (None, 8)), (3400, (None, 4)), (4600, (None, 4)), (4700, (RAM, 8)),
        # two blocks of it are on the GPU
        (8100, (RAM, 8)), (8300, (RAM, 4)), (8700, None),
    ],
)  # fmt: skip
def test_what_the_models_forward_takes_is_left_to_it(own, found, monkeypatch):
    """Of 9,000 bytes, a half more than that for a forward of both prompts; 8 bits need 4,000."""
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda d, **_: 9000)
    room = dial.find_room("auto", GPU, lambda bits: 500 * bits, 10, own)
    assert (room and (room.device, room.bits)) == found


@pytest.mark.parametrize("batch", [1, 2])
def test_room_is_found_for_every_prompt_of_every_video(batch, monkeypatch):
    """However the host splits them: short of memory it runs each prompt by itself."""
    asked_for, own = [], []

    def noted(place, device, needed, blocks, taken, patcher):
        asked_for.append(needed(8))
        own.append(taken)
        return find_room(place, device, needed, blocks, taken, patcher)

    find_room = dial.find_room
    monkeypatch.setattr(dial, "find_room", noted)
    for split in (False, True):
        if split:
            monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
        tiny.ksampler(dialled(tiny.base_model(), speedup=1.3), tiny.case(batch=batch), steps=6)
    assert asked_for == [2 * batch * PROMPT] * 2
    shape = (2 * batch, *tiny.empty_latent(batch=batch).shape[1:])
    assert own == [tiny.base_model().model.memory_required(shape)] * 2 and own[0] > 0


def test_a_run_that_comes_again_keeps_its_context_where_it_was(monkeypatch):
    patched = partly(tiny.base_model())
    first, seen = tiny.report_of(patched).context, []
    # more would fit now, or less, and what was chosen still does
    monkeypatch.setattr(dial, "find_room", lambda *_: seen.append(1) or Room(bits=4))
    tiny.ksampler(patched, steps=6)
    assert tiny.report_of(patched).context == first and not seen
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 0)
    tiny.ksampler(patched, steps=6)
    assert seen and "(4 bit)" in tiny.report_of(patched).context


@pytest.mark.parametrize("fits", [True, False])
def test_a_further_window_remembers_where_there_is_room(fits, monkeypatch):
    monkeypatch.setattr(dial, "find_room", lambda *_: Room(None, 8, lambda: fits))
    patched = windows(dialled(tiny.base_model(), speedup=1.3))
    out = tiny.sample(patched, tiny.case(frames=7), steps=6)
    assert torch.isfinite(out).all()
    said = any("not enough memory for the keys and values" in note for note in notes(patched))
    assert said is not fits
    parts = [step.program.partial for step in tiny.report_of(patched).steps]
    assert any(parts) is fits


def test_the_cpu_as_place_of_the_context_is_the_cpu():
    """Where the model computes on it, it is the same place."""
    patched = partly(tiny.base_model(), context="cpu")
    near = partly(tiny.base_model())
    assert asked(patched) == asked(near) and len(set(asked(patched)) - {0.0, 1.0}) > 0
    assert tiny.report_of(patched).context == tiny.report_of(near).context
    assert torch.equal(tiny.ksampler(patched, steps=6), tiny.ksampler(near, steps=6))


def turns(*spans: tuple[float, float]) -> list:
    """Prompts that are combined, each for a part of the run."""
    return [
        [words, {"start_percent": start, "end_percent": end}]
        for number, (start, end) in enumerate(spans)
        for words, _ in tiny.text(20 + number)
    ]


@pytest.mark.parametrize("split", [False, True], ids=["batched", "split"])
@pytest.mark.parametrize(
    ("spans", "prompts"),
    [(((0.0, 1.0),) * 3, 4), (((0.0, 0.5), (0.5, 1.0)), 2), (((0.0, 0.6), (0.5, 1.0)), 3)],
    ids=["combined", "in turn", "overlapping"],
)
def test_room_is_looked_for_for_all_prompts_at_a_time(monkeypatch, split, spans, prompts):
    asked_for, given = [], tiny.case()
    monkeypatch.setattr(given, "positive", turns(*spans))

    def noted(place, device, needed, *_):
        asked_for.append(needed(8))
        return Room(None, 8)

    monkeypatch.setattr(dial, "find_room", noted)
    if split:
        monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    patched = dialled(tiny.base_model(), speedup=1.3)
    tiny.ksampler(patched, given, steps=6)
    assert asked_for == [prompts * PROMPT]
    if spans[0] == (0.0, 1.0):
        # and so many were there
        assert tiny.report_of(patched).context_bytes == asked_for[0]


def test_the_record_says_what_all_windows_held():
    patched = windows(dialled(tiny.base_model(), speedup=1.3))
    tiny.sample(patched, tiny.case(frames=7), steps=6)
    record = tiny.report_of(patched)
    assert record.context and any(step.program.partial for step in record.steps)
    # of all windows, two prompts each
    frames = sum(step.grid.frames for step in record.steps if step.sigma == record.steps[0].sigma)
    assert frames > 7 and record.context_bytes == 2 * PROMPT * frames // tiny.FRAMES
    assert f"{record.context_bytes / 1e9:.2g} GB" in record_text(record)


def test_a_prompt_whose_turn_is_over_makes_room_for_the_next(monkeypatch):
    monkeypatch.setattr(dial, "find_room", lambda *_: Room(None, 8, lambda: False))
    given = tiny.case()
    monkeypatch.setattr(given, "positive", turns((0.0, 0.45), (0.45, 1.0)))
    patched = dialled(tiny.base_model(), speedup=1.15, dense_first_steps=1)
    tiny.ksampler(patched, given, steps=10)
    assert not any("not enough memory" in note for note in notes(patched))
    assert tiny.report_of(patched).context_bytes == 2 * PROMPT
    parts = [step.program.partial for step in tiny.report_of(patched).steps]
    assert any(parts)


@pytest.mark.parametrize("partial", [False, True], ids=["whole step", "partial step"])
@pytest.mark.parametrize("put_heads", [False, True], ids=["", "heads"])
def test_out_of_memory_while_remembering_costs_the_context_alone(monkeypatch, partial, put_heads):
    write, seen = Part.write, []

    def full(self, keys, block, k, v, index):
        if (index is not None) == partial and block == 3 and not seen:
            seen.append(block)
            raise torch.OutOfMemoryError
        return write(self, keys, block, k, v, index)

    monkeypatch.setattr(Part, "write", full)
    shares = (1.0, 1.0, 0.4, 0.3, 0.0, 1.0)
    parts = {"heads": heads()} if put_heads else {}
    patched = tiny.shared(tiny.base_model(), *shares, **parts)
    out = tiny.ksampler(patched, steps=6)
    assert tiny.report_of(patched).finished and seen == [3] and torch.isfinite(out).all()
    assert any("not enough memory for the keys and values" in note for note in notes(patched))
    assert "everything ran as planned" not in record_text(tiny.report_of(patched))
    # from there on what was to be computed in part is computed whole
    assert asked(patched) == ((1.0, 1.0, 0.4, 1.0, 0.0, 1.0) if partial else (1, 1, 1, 1, 0, 1))
    monkeypatch.undo()
    again = tiny.ksampler(patched, steps=6)
    assert asked(patched) == shares and not torch.equal(again, out)


@pytest.mark.parametrize("split", [False, True], ids=["batched", "split"])
@pytest.mark.parametrize("where", ["join", "ffn"])
def test_out_of_memory_beside_the_context_costs_the_context_alone(monkeypatch, split, where):
    """The call that failed runs again whole; what ran before in its step stays."""
    shares, whole = (1.0, 1.0, 0.4, 0.3, 0.0, 1.0), (1.0, 1.0, 1.0, 1.0, 0.0, 1.0)
    if split:
        monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    right = tiny.ksampler(tiny.shared(tiny.base_model(), *whole), steps=6)
    base, seen = tiny.base_model(), []

    def short(partial) -> None:
        if partial and not seen:
            seen.append(1)
            raise torch.OutOfMemoryError("planted")

    if where == "join":
        join = Part.join

        def joined(self, keys, block, *args):
            short(block == 3)
            return join(self, keys, block, *args)

        monkeypatch.setattr(Part, "join", joined)
    else:
        ffn = base.model.diffusion_model.blocks[3].ffn
        forward = ffn.forward

        def planted(hidden):
            short(hidden.shape[1] < tiny.FRAMES * tiny.PER_FRAME)
            return forward(hidden)

        monkeypatch.setattr(ffn, "forward", planted)
    patched = tiny.shared(base, *shares)
    out = tiny.ksampler(patched, steps=6)
    assert seen and asked(patched) == whole and torch.equal(out, right)
    record = tiny.report_of(patched)
    assert record.finished and all(step.as_planned for step in record.steps)
    assert any("not enough memory for the keys and values" in note for note in notes(patched))
    assert not any("another node" in note for note in notes(patched))
