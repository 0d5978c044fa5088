"""A model whose blocks are compiled follows each step's own decision, and keeps its graphs."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from wantrim.engine.compiled import outside_graphs
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.weights import new_transformer
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.heads import FRAME, FULL, OFF, HeadPlan
from wantrim.methods.presets import preset_plan
from wantrim.methods.routers import RandomRouter

BLOCKS, HEADS = 4, 4
SIGMAS = (0.95, 0.8, 0.7, 0.5, 0.3)
HALF = BlockBudget(0.5, 0.8)
WHOLE = ((FULL,) * HEADS,) * BLOCKS
PLANS = {
    # dense at first: what a graph of the first step would repeat
    "refresh": TrimPlan(preset_plan("refresh", 0.6)),
    "auto": TrimPlan(preset_plan("auto", 0.6)),
    "paper": TrimPlan(preset_plan("paper", 0.6, reselect_every=2)),
    "some steps": TrimPlan(preset_plan("refresh", 0.6, start=0.25, end=0.6)),
    "blocks": TrimPlan(blocks=BlockPlan(RandomRouter(), HALF)),
    "reuse": TrimPlan(blocks=BlockPlan(RandomRouter(), HALF, "reuse")),
    "heads": TrimPlan(heads=HeadPlan(((OFF, FRAME, "tile2", FULL),) * BLOCKS, WHOLE)),
    "all": TrimPlan(
        preset_plan("refresh", 0.6),
        HeadPlan((WHOLE[0], (OFF, FRAME, FULL, FULL), *WHOLE[2:]), WHOLE),
        BlockPlan(RandomRouter(), HALF, "reuse"),
    ),
}
# whole and trimmed sequence; blocks under a tap are not compiled
GRAPHS = {"blocks": 1, "reuse": 1, "heads": 0}


def new_model():
    torch.manual_seed(0)
    model = new_transformer(
        dim=48, num_heads=HEADS, num_layers=BLOCKS, ffn_dim=64, in_dim=16, out_dim=16, text_dim=24
    )
    for block in model.blocks:
        torch.nn.init.normal_(block.scale_shift_table, std=0.5)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def steps(model, plan: TrimPlan) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    latent = torch.randn(1, 16, 3, 8, 8, generator=draw)
    text = torch.randn(1, 7, 24, generator=draw)
    made = []
    with attach(model, plan, sigmas=SIGMAS):
        for index, sigma in enumerate(SIGMAS):
            timestep = torch.tensor([1000 * sigma])
            made.append(model(latent * (1 - 0.05 * index), timestep, text, return_dict=False)[0])
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
    assert counter.frame_count == GRAPHS.get(name, 2)


def test_an_attached_plan_can_be_compiled_afterwards_and_taken_off():
    dense, plan = steps(new_model(), TrimPlan()), PLANS["refresh"]
    expected = steps(new_model(), plan)
    model = new_model()
    with attach(model, plan, sigmas=SIGMAS):
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
