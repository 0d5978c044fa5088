"""Plans whose records were pinned before the core was rebuilt, and how to run one.

tests/data/records.json was written by the sessions of commit 44afad7 on the same small Wan; the latents of
"everything" by the rebuilt engine, which gave theirs with tiles of a ninth as long as there were any.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

BLOCKS, HEADS, SIZE = 6, 4, (3, 8, 6)
# name -> parts of the plan, and how it is sampled
CASES = {
    "paper": {"tokens": {"keep": 0.7, "direction": "falling"}},
    "every block": {"tokens": {"keep": 0.5, "reselect_every": 1}},
    "every second": {"tokens": {"keep": 0.5, "reselect_every": 2}},
    "every third, rising": {"tokens": {"keep": 0.6, "reselect_every": 3, "direction": "rising"}},
    "more than there are": {"tokens": {"keep": 0.4, "reselect_every": 9}},
    "not smoothed": {"tokens": {"keep": 0.5, "reselect_every": 3, "alpha": 1.0}},
    "smoothed": {"tokens": {"keep": 0.5, "reselect_every": 3, "alpha": 0.3}},
    "window": {"tokens": {"keep": 0.5, "reselect_every": 2, "start": 0.3, "end": 0.8}, "steps": 5},
    "few tokens": {"tokens": {"keep": 0.03, "reselect_every": 4}},
    "first given": {"tokens": {"keep": 0.5, "reselect_every": 3}, "given": [0]},
    "ends given": {"tokens": {"keep": 0.6, "reselect_every": 3}, "given": [0, 2]},
    "all given": {"tokens": {"keep": 0.6, "reselect_every": 3}, "given": [0, 1, 2]},
    "given, not anchored": {
        "tokens": {"keep": 0.5, "reselect_every": 3, "anchor": False},
        "given": [0],
    },
    "batch of two": {"tokens": {"keep": 0.5, "reselect_every": 3}, "batch": 2},
    "no guidance": {"tokens": {"keep": 0.5, "reselect_every": 3}, "guidance": 1},
    "blocks": {"blocks": {"skipped": [1, 3]}},
    "blocks by budget": {"blocks": {"k_min": 0.5, "k_max": 0.9, "seed": 3}, "steps": 5},
    "blocks rising, window": {
        "blocks": {"k_min": 0.5, "k_max": 0.9, "shape": "rising", "seed": 4, "start": 0.3},
        "steps": 5,
    },
    "choosing block skipped": {
        "tokens": {"keep": 0.5, "reselect_every": 3},
        "blocks": {"skipped": [3]},
    },
    "block behind it skipped": {
        "tokens": {"keep": 0.5, "reselect_every": 3},
        "blocks": {"skipped": [1, 4]},
    },
    "tokens and blocks by budget": {
        "tokens": {"keep": 0.6, "reselect_every": 2},
        "blocks": {"k_min": 0.4, "k_max": 0.8, "seed": 7},
        "steps": 4,
    },
    "heads": {"heads": {"cycle": ["full", "frame", "tile2", "off"]}},
    "tokens and heads": {
        "tokens": {"keep": 0.5, "reselect_every": 3},
        "heads": {"cycle": ["full", "tile2", "frame"]},
    },
    "everything": {
        "tokens": {"keep": 0.6, "reselect_every": 3},
        "heads": {"cycle": ["full", "tile2", "frame", "off"]},
        "blocks": {"skipped": [2]},
        "given": [0],
        "batch": 2,
    },
    # each expert has the plan
    "pair": {
        "tokens": {"keep": 0.6, "direction": "falling", "reselect_every": 3},
        "heads": {"cycle": ["full", "tile2", "frame"]},
        "steps": 5,
        "low_from": 2,
    },
}


def small_wan(in_dim: int, seed: int = 21):
    """A small Wan whose gates are open, always the same."""
    from wantrim.hosts.diffusers.weights import new_transformer

    torch.manual_seed(seed)
    model = new_transformer(
        dim=48, num_heads=HEADS, num_layers=BLOCKS, ffn_dim=64, in_dim=in_dim, out_dim=16,
        text_dim=24,
    )  # fmt: skip
    for block in model.blocks:
        torch.nn.init.normal_(block.scale_shift_table, std=0.5)
    return model.eval()


def plan_of(case: dict):
    """The case's plan."""
    from wantrim.benchmarks.peers.random_router import RandomRouter
    from wantrim.engine.plan import TrimPlan
    from wantrim.methods.depth import BlockBudget, BlockPlan
    from wantrim.methods.heads import HeadPlan
    from wantrim.methods.routers import FixedRouter
    from wantrim.methods.schedule import Schedule
    from wantrim.methods.tokens import TokenPlan

    parts = {}
    if "tokens" in case:
        given = dict(case["tokens"])
        schedule = Schedule(given.pop("keep"), given.pop("direction", "constant"))
        parts["tokens"] = TokenPlan(schedule, **given)
    if "blocks" in case:
        given = dict(case["blocks"])
        window = {name: given.pop(name) for name in ("start", "end") if name in given}
        if "skipped" in given:
            parts["blocks"] = BlockPlan(FixedRouter(tuple(given["skipped"])), **window)
        else:
            router = RandomRouter(given.pop("seed"))
            parts["blocks"] = BlockPlan(router, BlockBudget(**given), **window)
    if "heads" in case:
        cycle = case["heads"]["cycle"]
        own = tuple(
            tuple(cycle[(block + head) % len(cycle)] for head in range(HEADS))
            for block in range(BLOCKS)
        )
        cross = tuple(
            tuple("off" if name == "off" else "full" for name in heads[::-1]) for heads in own
        )
        parts["heads"] = HeadPlan(own, cross)
    return TrimPlan(**parts)


class Pair:
    """A high and a low noise expert, as one model to the sampler."""

    def __init__(self, high, low, below: float):
        self.high, self.low, self.below = high, low, below
        self.config, self.parameters = high.config, high.parameters

    def cache_context(self, *_, **__):
        return nullcontext()

    def __call__(self, latent, timestep, *given, **named):
        model = self.low if timestep.max() < 1000 * self.below else self.high
        return model(latent, timestep, *given, **named)


def sample_case(case: dict, attached):
    """The latents of a case; `attached(model, plan, both)` is a context around sampling."""
    from wantrim.hosts.diffusers.sample import sample, sigmas_for

    batch, given = case.get("batch", 1), case.get("given")
    model = small_wan(16 if given is None else 36)
    low = small_wan(16, seed=22) if "low_from" in case else None
    condition = None
    if given is not None:
        condition = torch.randn(batch, 20, *SIZE, generator=torch.Generator().manual_seed(8))
        condition[:, :4] = 0
        condition[:, :4, given] = 1
    text = torch.randn(batch, 7, 24, generator=torch.Generator().manual_seed(9))
    guidance = case.get("guidance", 4.0)
    steps, both = case.get("steps", 3), (0,) if guidance == 1 else (0, 1)
    options = {"steps": steps, "guidance": guidance, "condition": condition}
    with attached(model, plan_of(case), both):
        if low is None:
            return sample(model, text, SIZE, **options)
        before, first = sigmas_for(steps, 3.0)[case["low_from"] - 1 :][:2].tolist()
        with attached(low, plan_of(case), both):
            return sample(Pair(model, low, (before + first) / 2), text, SIZE, **options)


def fingerprint(latents: torch.Tensor) -> list[float]:
    """Twelve numbers that change when the latents do."""
    ways = torch.randn(12, latents.numel(), generator=torch.Generator().manual_seed(5))
    return (ways @ latents.flatten() / latents.numel() ** 0.5).tolist()
