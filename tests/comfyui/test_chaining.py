"""Other nodes on the same MODEL, in front of WanTrim and behind it."""

import copy

import pytest
import torch

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from wantrim.hosts.comfyui.blocks import OVERRIDE
from wantrim.tests.comfyui import neighbours, tiny
from wantrim.tests.comfyui.neighbours import easycache, lazycache, lora, shifted, slg, slg_simple

ATTENTIONS_PER_BLOCK = 2
ORDERS = ["in front", "behind"]


# those of the matrix, and beside them what takes a block away that chooses
NEIGHBOURS = {
    "slg": slg,
    "slg of a choosing block": lambda m: slg(m, "0, 3"),
    "slg simple": slg_simple,
    "slg simple of a choosing block": lambda m: slg_simple(m, "0"),
    "easycache": easycache,
    "lazycache": lazycache,
    "shift": shifted,
    "lora": lora,
}
CHOOSING = {name: put for name, put in NEIGHBOURS.items() if "choosing" in name}


def with_tokens(model):
    return tiny.trimmed(model)


def with_shares(model):
    """Six steps: one of them is repeated, two compute a part of their tokens."""
    return tiny.shared(model, 1, 1, 0.4, 1, 0, 0.3)


trims = pytest.mark.parametrize("trim", [with_tokens, with_shares])


def both(order: str, neighbour, trim):
    """A model with both on it, in the order asked for."""
    if order == "in front":
        return trim(neighbour(tiny.base_model()))
    return neighbour(trim(tiny.base_model()))


def counting(model) -> list:
    """Counts attentions through an override that is there before us."""
    seen = []

    def override(func, q, k, v, *args, **kwargs):
        seen.append((q.shape[1], k.shape[1]))
        return func(q, k, v, *args, **kwargs)

    model.model_options["transformer_options"][OVERRIDE] = override
    return seen


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("neighbour", CHOOSING.values(), ids=CHOOSING)
def test_neighbour_alone_equals_neighbour_with_a_plan_without_effect(neighbour, order):
    expected = tiny.sample(neighbour(tiny.base_model()), steps=6)
    model = both(order, neighbour, lambda m: tiny.trimmed(m, reselect_every=1))
    assert torch.equal(tiny.sample(model, steps=6), expected)
    untouched = tiny.sample(tiny.base_model(), steps=6)
    assert not torch.allclose(expected, untouched, atol=1e-3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbour_alone_equals_neighbour_with_shares_without_effect(neighbour, order):
    """Keys, values and velocities are remembered for nobody."""
    expected = tiny.sample(neighbour(tiny.base_model()), steps=6)
    model = both(order, neighbour, lambda m: tiny.shared(m, 1, 1, 1, 1, 1, 0.98))
    assert torch.equal(tiny.sample(model, steps=6), expected)


@trims
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_both_act_together(neighbour, order, trim):
    model = both(order, neighbour, trim)
    out = tiny.sample(model, steps=6)
    assert torch.isfinite(out).all()
    report = tiny.report_of(model)
    assert report.finished and report.kept_share < 0.95
    # once more: the neighbour's state and ours are those of one run
    assert torch.equal(tiny.sample(model, steps=6), out)
    for alone in (neighbour, trim):
        assert not torch.allclose(out, tiny.sample(alone(tiny.base_model()), steps=6), atol=1e-3)


def test_earlier_attention_override_is_called_in_every_attention():
    untouched = tiny.base_model().clone()
    everywhere = counting(untouched)
    tiny.sample(untouched)
    model = tiny.base_model().clone()
    seen = counting(model)
    tiny.sample(with_tokens(model))
    assert len(everywhere) == 3 * tiny.LAYERS * ATTENTIONS_PER_BLOCK
    assert len(seen) == len(everywhere)
    assert {q for q, _ in seen} == {36, 39, 45, 60}
    assert {k for q, k in seen if q == 36} == {36, 7}


def test_earlier_attention_override_sees_the_remembered_keys_too():
    model = tiny.base_model().clone()
    seen = counting(model)
    tiny.sample(with_shares(model), steps=6)
    # a repeated step runs no attention
    assert len(seen) == 5 * tiny.LAYERS * ATTENTIONS_PER_BLOCK
    own = [(q, k) for q, k in seen if k != 7]
    assert own == [(q, 60) for q in (60, 60, 24, 60, 18) for _ in range(tiny.LAYERS)]


@trims
def test_override_set_after_us_is_called_too(trim):
    model = trim(tiny.base_model())
    seen = counting(model)
    out = tiny.sample(model, steps=6)
    ran = 6 if trim is with_tokens else 5
    assert len(seen) == ran * tiny.LAYERS * ATTENTIONS_PER_BLOCK
    assert torch.equal(out, tiny.sample(trim(tiny.base_model()), steps=6))


@trims
@pytest.mark.parametrize("order", ORDERS)
def test_earlier_block_replacement_is_called_inside_ours(order, trim):
    counts = dict.fromkeys((0, 1), 0)

    def replaced(model):
        model = model.clone()
        for block in counts:

            def replacement(args, extra, block=block):
                counts[block] += 1
                out = extra["original_block"](args)
                return {"img": out["img"] * 1.5}

            model.set_model_patch_replace(replacement, "dit", "double_block", block)
        return model

    model = both(order, replaced, trim)
    tiny.sample(model, steps=6)
    assert counts == dict.fromkeys((0, 1), 6 if trim is with_tokens else 5)
    expected = tiny.sample(replaced(tiny.base_model()))
    for without_effect in (
        lambda m: tiny.trimmed(m, reselect_every=1),
        lambda m: tiny.shared(m, 1, 1, 0.98),
    ):
        neutral = both(order, replaced, without_effect)
        assert torch.equal(tiny.sample(neutral), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_replacement_sees_what_the_block_sees(order):
    """The kept tokens with their own place and modulation: doing nothing, it changes nothing."""
    lengths = []

    def replaced(model):
        model = model.clone()

        def replacement(args, extra):
            lengths.append((args["img"].shape[1], args["pe"].shape[1]))
            return extra["original_block"](args)

        model.set_model_patch_replace(replacement, "dit", "double_block", 2)
        return model

    out = tiny.sample(both(order, replaced, with_shares), steps=6)
    assert lengths == [(n, n) for n in (60, 60, 24, 60, 18)]
    alone = tiny.sample(with_shares(tiny.base_model()), steps=6)
    assert (out - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_choosing_block_that_another_node_skips_is_reported():
    model = tiny.base_model().clone()
    model.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 0)
    patched = tiny.trimmed(model)
    tiny.sample(patched)
    report = tiny.report_of(patched)
    assert any("block 0" in note and "self-attention" in note for note in report.notes)
    # nobody chose for blocks 1 and 2
    assert report.steps[0].tokens_per_block == [60, 60, 60, 60, 36, 36]


@trims
def test_blocks_of_slg_cost_no_new_choice(trim):
    model = trim(slg(tiny.base_model()))
    calls = tiny.watch(model)
    tiny.sample(model, steps=6)
    # what is repeated never gets as far
    ran = range(6) if trim is with_tokens else range(5)
    assert [c.cond_or_uncond for c in calls] == [roles for _ in ran for roles in ([1, 0], [0])]
    assert [c.decision for c in calls] == [step for step in ran for _ in range(2)]
    assert [step.calls for step in tiny.report_of(model).steps] == [2] * 6


@trims
@pytest.mark.parametrize("order", ORDERS)
def test_steps_that_a_cache_answers_are_not_reported_as_computed(order, trim):
    model = both(order, easycache, trim)
    blocks = []
    model.set_model_double_block_patch(lambda args: blocks.append(1) or args)
    tiny.sample(model, steps=6)
    computed = len(blocks) // tiny.LAYERS
    assert 0 < computed < 6
    report = tiny.report_of(model)
    shares = [step.kept_share for step in report.steps]
    done = [share for share in shares if share]
    assert len(done) == computed and min(done) < 1.0
    assert any(step.answered for step in report.steps) == (order == "behind")
    # in front, it is seen only where there was a share for every step
    seen = order == "behind" or trim is with_shares
    assert any("another node's cache" in note for note in report.notes) == seen


@trims
@pytest.mark.parametrize("order", ORDERS)
def test_easycache_skips_cond_and_uncond_together_also_in_two_calls(order, trim, monkeypatch):
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    model = both(order, easycache, trim)
    computed = {0: set(), 1: set()}

    def note(args):
        options = args["transformer_options"]
        computed[options["cond_or_uncond"][0]].add(float(options["sigmas"]))
        return args

    model.set_model_double_block_patch(note)
    tiny.sample(model, steps=6)
    assert computed[0] == computed[1] and 0 < len(computed[0]) < 6


@trims
def test_lora_of_a_trimmed_model_leaves_the_base_alone(trim):
    expected = tiny.sample(tiny.base_model())
    tiny.sample(lora(trim(tiny.base_model())))
    assert torch.equal(tiny.sample(tiny.base_model()), expected)


@pytest.mark.parametrize(
    "trim", [with_tokens, lambda m: tiny.shared(m, 1, 1, 0.4)], ids=["tokens", "shares"]
)
@pytest.mark.parametrize("patch", ["attn1_patch", "attn2_patch"])
def test_patches_that_need_every_token_turn_dropping_off_and_are_reported(patch, trim):
    model = tiny.base_model().clone()
    model.set_model_patch(lambda args: args["x"], patch)
    expected = tiny.sample(model)
    patched = trim(model)
    assert torch.equal(tiny.sample(patched), expected)
    report = tiny.report_of(patched)
    assert len(report.notes) == 1 and patch in report.notes[0]
    assert report.finished


def test_a_step_is_repeated_whatever_patches_the_attention():
    model = tiny.base_model().clone()
    model.set_model_patch(lambda args: args["x"], "attn1_patch")
    patched = tiny.shared(model, 1, 0, 1)
    tiny.sample(patched)
    assert tiny.shares(patched) == [1, 0, 1] and not tiny.report_of(patched).notes


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield neighbours.compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("keys", ["whole", "blocks"])
def test_what_was_compiled_before_is_not_repeated(keys):
    """No guard sees that the run of before had no plan, or another one."""
    put = {"whole": neighbours.compiled, "blocks": neighbours.compiled_blocks}[keys]
    base = put(tiny.base_model())
    torch._dynamo.reset()
    dense = tiny.sample(base)
    for keep in (0.5, 0.8):
        expected = tiny.sample(tiny.trimmed(tiny.base_model(), keep))
        model = tiny.trimmed(base, keep)
        assert torch.equal(tiny.sample(model), expected)
        assert tiny.report_of(model).kept_share < 0.95
    assert torch.equal(tiny.sample(base), dense)
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ORDERS)
def test_compiled_model_does_not_freeze_the_choice_of_a_step(compiled, order):
    model = both(order, compiled, tiny.trimmed)
    out = tiny.sample(model, steps=5)
    assert torch.equal(out, tiny.sample(tiny.trimmed(tiny.base_model()), steps=5))
    steps = tiny.report_of(model).steps
    assert [s.program.budget / tiny.PER_FRAME for s in steps] == pytest.approx(
        [0.6, 0.65, 0.7, 0.75, 0.8]
    )
    assert [s.tokens_per_block[1] for s in steps] == [36, 39, 42, 45, 48]
    assert not tiny.report_of(model).notes
    again = tiny.sample(model, tiny.case(frames=2), steps=2)
    assert torch.equal(
        again, tiny.sample(tiny.trimmed(tiny.base_model()), tiny.case(frames=2), steps=2)
    )


@pytest.mark.parametrize("order", ORDERS)
def test_compiled_model_remembers_as_an_eager_one(compiled, order):
    model = both(order, compiled, with_shares)
    expected = tiny.sample(with_shares(tiny.base_model()), steps=6)
    assert torch.equal(tiny.sample(model, steps=6), expected)
    assert tiny.shares(model) == pytest.approx([1, 1, 0.4, 1, 0, 0.3])


@pytest.mark.parametrize("order", ORDERS)
def test_compiled_model_is_used_where_steps_are_whole_or_repeated(compiled, order):
    """Nothing of a block is looked at, so that no graph freezes anything."""
    model = both(order, compiled, lambda m: tiny.shared(m, 1, 1, 0, 1, 0, 1))
    out = tiny.sample(model, steps=6)
    eager = tiny.sample(tiny.shared(tiny.base_model(), 1, 1, 0, 1, 0, 1), steps=6)
    assert torch.allclose(out, eager, atol=1e-4)
    assert tiny.shares(model) == [1, 1, 0, 1, 0, 1]


def test_a_block_that_another_node_skips_chooses_for_nobody_and_is_reported():
    # blocks 0 and 3 choose; without self-attention in block 3 the choice of block 0 stays
    skipped = tiny.base_model().clone()
    skipped.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 3)
    model = tiny.trimmed(skipped)
    calls = tiny.watch(model)
    tiny.sample(model, steps=1)
    assert set(calls[0].kept) == {0}
    assert any("block 3 ran no self-attention" in note for note in tiny.report_of(model).notes)


def test_a_guider_with_prompts_of_its_own_is_reported():
    def renamed(executor, *args, **kwargs):
        executor.class_obj.conds["middle"] = []
        try:
            return executor(*args, **kwargs)
        finally:
            del executor.class_obj.conds["middle"]

    model = tiny.base_model().clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "a", renamed)
    model = tiny.trimmed(model)
    tiny.sample(model, steps=1)
    assert any("orders its prompts" in note for note in tiny.report_of(model).notes)


def test_a_sampling_without_flow_shift_is_reported():
    model = tiny.trimmed(tiny.base_model())
    sampling = copy.deepcopy(model.get_model_object("model_sampling"))
    del sampling.shift
    model.add_object_patch("model_sampling", sampling)
    tiny.sample(model, steps=1)
    assert any("no flow shift" in note for note in tiny.report_of(model).notes)
