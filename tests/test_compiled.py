"""A model whose blocks are compiled follows each step's own decision, and keeps its graphs."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from wantrim.benchmarks.peers.random_router import RandomRouter
from wantrim.engine.compiled import outside_graphs
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.profiling import profile_run
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.heads import FRAME, FULL, OFF, HeadPlan
from wantrim.methods.shares import Shares
from wantrim.methods.tokens import paper_plan
from wantrim.tests.small_wan import noise, random_wan, words

BLOCKS, HEADS = 4, 4
SIGMAS = (0.95, 0.8, 0.7, 0.5, 0.3)
HALF = BlockBudget(0.5, 0.8)
WHOLE = ((FULL,) * HEADS,) * BLOCKS
SHARES = Shares(SIGMAS, (1, 1, 0.4, 0, 0.3))
PLANS = {
    # dense at first: what a graph of the first step would repeat
    "shares": TrimPlan(shares=SHARES),
    "tape": TrimPlan(paper_plan(0.6, reselect_every=2)),
    "blocks": TrimPlan(blocks=BlockPlan(RandomRouter(), HALF)),
    "heads and shares": TrimPlan(
        heads=HeadPlan((WHOLE[0], (OFF, FRAME, FULL, FULL), *WHOLE[2:]), WHOLE), shares=SHARES
    ),
    "all": TrimPlan(
        paper_plan(0.6, reselect_every=2),
        HeadPlan((WHOLE[0], (OFF, FRAME, FULL, FULL), *WHOLE[2:]), WHOLE),
        BlockPlan(RandomRouter(), HALF),
        Shares(SIGMAS, (1, 0, 1, 1, 0)),
    ),
}
# of a block: whole sequences and kept tokens of any number, each with attention as it is and decided
# outside, where a plan has them
GRAPHS = {"blocks": 1, "tape": 3, "shares": 3, "heads and shares": 3, "all": 4}


def new_model():
    return random_wan(BLOCKS, heads=HEADS)


@torch.no_grad()
def steps(model, plan: TrimPlan) -> list[torch.Tensor]:
    latent, made = noise(1, 16, 3, 8, 8), []
    with attach(model, plan):
        for index, sigma in enumerate(SIGMAS):
            timestep = torch.tensor([1000 * sigma])
            made.append(model(latent * (1 - 0.05 * index), timestep, words(), return_dict=False)[0])
    return made


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("unsafe", [False, True], ids=["guards", "tensor guards alone"])
@pytest.mark.parametrize("name", PLANS)
def test_compiled_blocks_follow_each_steps_decision(name, unsafe):
    """With the guards on Python's values filtered out, only what is outside of graphs can change."""
    expected = steps(new_model(), PLANS[name])
    counter, options = CompileCounter(), {}
    if unsafe:
        options["options"] = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    model = new_model()
    model.compile_repeated_blocks(backend=counter, **options)
    for got, wanted in zip(steps(model, PLANS[name]), expected, strict=True):
        assert torch.equal(got, wanted)
    # and the blocks stay whole graphs, few of them: decisions that are traced make many
    assert counter.frame_count == GRAPHS[name]


def test_blocks_that_learn_keep_their_gradients():
    """The operation that stands for attention in a graph has none."""
    grads = []
    for backend in (None, CompileCounter()):
        model = new_model().requires_grad_(True)
        if backend:
            model.compile_repeated_blocks(backend=backend)
        with attach(model, TrimPlan(heads=PLANS["all"].heads)):
            out = model(noise(1, 16, 3, 8, 8), torch.tensor([800.0]), words(), return_dict=False)[0]
        out.square().mean().backward()
        grads.append(model.blocks[1].attn1.to_v.weight.grad)
    assert torch.equal(*grads) and grads[0].abs().max() > 0


def test_an_attached_plan_can_be_compiled_afterwards_and_taken_off():
    dense, plan = steps(new_model(), TrimPlan()), PLANS["shares"]
    expected = steps(new_model(), plan)
    model = new_model()
    with attach(model, plan):
        model.compile_repeated_blocks(backend="eager")
    for got, wanted in zip(steps(model, plan), expected, strict=True):
        assert torch.equal(got, wanted)
    for got, wanted in zip(steps(model, TrimPlan()), dense, strict=True):
        assert torch.equal(got, wanted)


def test_only_our_own_frames_stay_outside():
    """The decorator proves what the test above relies on: traced without it, frozen; with it, not."""

    class Decision:
        on = True

        def apply(self, inner, x):
            return inner(x) if self.on else x

    def frozen(cls) -> list[float]:
        torch._dynamo.reset()
        decision = cls()

        def outer(x):
            return decision.apply(torch.sin, x)

        skip_all = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
        compiled = torch.compile(outer, backend="eager", options=skip_all)
        first = compiled(torch.ones(1)).item()
        decision.on = False
        return [first, compiled(torch.ones(1)).item()]

    plain = type("Plain", (Decision,), dict(vars(Decision)))
    ours = outside_graphs(type("Ours", (Decision,), dict(vars(Decision))))
    assert frozen(plain)[0] == frozen(plain)[1] != 1.0
    assert frozen(ours)[0] != frozen(ours)[1] == 1.0


def test_a_compiled_model_is_profiled_as_it_is_without():
    model, options = random_wan(BLOCKS), {"return_dict": False}
    given = noise(1, 16, 3, 8, 8), torch.full((1,), 700.0), words()
    expected = model(*given, **options)[0]
    model.compile_repeated_blocks(backend="eager")
    with profile_run(model) as recorder:
        out = model(*given, **options)[0]
    assert torch.equal(out, expected)
    assert recorder.profile().calls == 1
