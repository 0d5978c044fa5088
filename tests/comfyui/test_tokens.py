"""What a block computes for the kept tokens, against the host's block on all of them.

Two identities hold for any block, whatever its weights: with the keys and values of the others given
to it, a kept token comes out as from the full block; without them, as from the full block with the
dropped keys masked. They fail when rotary tables, modulation, reference tokens or rows of the batch
are gathered wrongly.
"""

import pytest
import torch

from wantrim.benchmarks.speed.traffic import peak_bytes
from wantrim.engine.block import Attend, Places
from wantrim.engine.plan import TrimPlan
from wantrim.engine.program import Facts, compile_step
from wantrim.hosts.comfyui.blocks import OVERRIDE, _Block
from wantrim.methods.grid import TokenGrid
from wantrim.methods.tokens import Selection
from wantrim.tests.comfyui import tiny

BLOCK = 2
# kept of each latent frame's 20 or 25 tokens; the host's own spreading fits the first
COUNTS = {"groups of two": (8, 14, 18), "no common group": (7, 13, 18)}


def some_tokens(batch: int, length: int, counts=COUNTS["groups of two"]) -> Places:
    """Each latent frame keeps another number of tokens, each sample others; all behind them."""
    generator = torch.Generator().manual_seed(4)
    per_frame = length // len(counts)
    rows = []
    for _ in range(batch):
        kept = []
        for frame, count in enumerate(counts):
            order = torch.randperm(per_frame, generator=generator)[:count].sort().values
            kept.append(order + frame * per_frame)
        kept.append(torch.arange(len(counts) * per_frame, length))
        rows.append(torch.cat(kept))
    return Places(Selection(torch.stack(rows), length, counts), 1)


def run(args, extra, places: Places | None, attend: Attend | None = None) -> torch.Tensor:
    """The block on the kept tokens, or on all, as the engine runs it."""
    block, hidden = _Block(args, extra, None, args["transformer_options"]), args["img"]
    return block.run(hidden if places is None else rows(hidden, places.index), places, attend)


def keys_of_the_others(args, extra, places: Places) -> Attend:
    """Gives the block the full block's own keys and values of what it is not given."""
    seen = []

    def look(q, k, v):
        seen.extend((rows(k, places.dropped), rows(v, places.dropped)))

    whole = _Block(args, extra, None, args["transformer_options"])
    whole.run(args["img"], None, Attend(look))

    def join(k, v):
        return torch.cat([k, seen[0]], 1), torch.cat([v, seen[1]], 1)

    return Attend(join=join)


def mask_keys(dropped: torch.Tensor):
    """An attention override in which no self-attention sees the dropped keys."""

    def override(func, q, k, v, *args, **kwargs):
        if q.shape[1] == k.shape[1]:
            mask = torch.ones(len(dropped), 1, 1, k.shape[1], dtype=torch.bool)
            mask.scatter_(-1, dropped[:, None, None], False)
            kwargs["mask"] = mask
        return func(q, k, v, *args, **kwargs)

    return override


def rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return torch.stack([t[i] for t, i in zip(tensor, index, strict=True)])


def compare_in_a_block(model, given, compare) -> None:
    """Calls `compare` with the arguments of one real block call."""
    seen = []

    def probe(args, extra):
        seen.append(args["vec"].shape)
        compare(args, extra)
        return extra["original_block"](args)

    model = model.clone()
    model.set_model_patch_replace(probe, "dit", "double_block", BLOCK)
    tiny.sample(model, given, steps=1)
    assert len(seen) == 1


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_kept_tokens_with_all_keys_come_out_as_from_the_full_block(kind, batch, counts):
    def compare(args, extra):
        hidden = args["img"]
        places = some_tokens(*hidden.shape[:2], counts)
        full = extra["original_block"](args)["img"]
        some = run(args, extra, places, keys_of_the_others(args, extra, places))
        assert torch.allclose(some, rows(full, places.index), atol=1e-4)
        assert not torch.allclose(run(args, extra, places), some, atol=1e-2)

    compare_in_a_block(tiny.base_model(kind), tiny.case(kind, batch=batch), compare)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_kept_tokens_alone_come_out_as_with_the_others_masked(kind, batch, counts):
    def compare(args, extra):
        places = some_tokens(*args["img"].shape[:2], counts)
        options = {**args["transformer_options"], OVERRIDE: mask_keys(places.dropped)}
        masked = extra["original_block"]({**args, "transformer_options": options})["img"]
        some = run(args, extra, places)
        assert torch.allclose(some, rows(masked, places.index), atol=1e-4)

    compare_in_a_block(tiny.base_model(kind), tiny.case(kind, batch=batch), compare)


def test_a_block_that_is_modulated_by_frame_holds_no_more_than_the_whole_one():
    """With the counts that a program has beside a given frame; by token the rows would not fit."""
    grid = TokenGrid(tiny.FRAMES, 16, 20)
    facts = Facts(0.5, 0.5, grid, tiny.LAYERS, (True, False, False), by_frame=True)
    budget = compile_step(TrimPlan(tiny.token_plan(0.55)), facts).budget
    peaks = {}

    def compare(args, extra):
        peaks["whole"] = peak_bytes(lambda: run(args, extra, None))
        for free in (budget, budget - 1):
            places = some_tokens(*args["img"].shape[:2], (grid.per_frame, free, free))
            # what is gathered once a choice counts too
            peaks[free] = peak_bytes(lambda places=places: run(args, extra, places))

    given = tiny.case("ti2v", height=32, width=40)
    compare_in_a_block(tiny.base_model("ti2v"), given, compare)
    assert peaks[budget] <= peaks["whole"] < peaks[budget - 1]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_modulation_per_latent_frame_goes_with_its_tokens(counts):
    def compare(args, extra):
        vec, hidden = args["vec"], args["img"]
        assert vec.shape[1] == tiny.FRAMES
        # the given frame is at another timestep
        assert (vec[:, 0] - vec[:, 1]).abs().max() > 0.1
        kept = some_tokens(*hidden.shape[:2], counts).index
        frame = kept // tiny.PER_FRAME
        by_hand = {
            **args,
            "img": rows(hidden, kept),
            "pe": torch.cat([args["pe"][:, i] for i in kept]),
            "vec": rows(vec, frame),
        }
        expected = extra["original_block"](by_hand)["img"]
        some = run(args, extra, some_tokens(*hidden.shape[:2], counts))
        assert torch.allclose(some, expected, atol=1e-5)
        # the host would spread the rows evenly
        evenly = torch.arange(kept.shape[1]) * tiny.FRAMES // kept.shape[1]
        spread = extra["original_block"]({**by_hand, "vec": vec[:, evenly]})["img"]
        assert not torch.allclose(spread, expected, atol=1e-2)

    compare_in_a_block(tiny.base_model("ti2v"), tiny.case("ti2v"), compare)


@pytest.mark.parametrize("height", [9, 8])
def test_modulation_that_does_not_divide_the_tokens_is_spread_as_the_host_does(height):
    # 3 latent frames and one token too many, as with tokens outside the grid
    def compare(args, extra):
        hidden = torch.cat([args["img"], args["img"][:, :1]], 1)
        pe = torch.cat([args["pe"], args["pe"][:, :1]], 1)
        args = {**args, "img": hidden, "pe": pe}
        places = some_tokens(*hidden.shape[:2])
        full = extra["original_block"](args)["img"]
        some = run(args, extra, places, keys_of_the_others(args, extra, places))
        assert torch.allclose(some, rows(full, places.index), atol=1e-4)

    compare_in_a_block(tiny.base_model("ti2v"), tiny.case("ti2v", height=height), compare)


def test_what_is_the_same_in_every_block_is_gathered_once():
    taken = []
    places = some_tokens(2, 60)
    tables = torch.randn(1, 60, 5), torch.randn(1, 60, 5)

    def make(tensor):
        taken.append(1)
        return tensor * 2

    for _ in range(3):
        assert torch.equal(places.once(tables[0], make), tables[0] * 2)
        assert places.take(tables[1]) is places.take(tables[1])
    assert taken == [1]
    expected = rows(tables[1].expand(2, -1, -1), places.index)
    assert torch.equal(places.take(tables[1]), expected)
