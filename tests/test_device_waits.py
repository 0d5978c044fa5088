"""A model call waits for the device once, and holds little more memory than it has to."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wantrim.benchmarks.random_router import RandomRouter
from wantrim.engine.context import context_bytes
from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.profiling import model_fingerprint
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.heads import FRAME, FULL, OFF, HeadPlan
from wantrim.methods.routers import RouterMLP
from wantrim.methods.shares import Shares
from wantrim.methods.tokens import paper_plan
from wantrim.slim.router import TrainedRouter
from wantrim.tests.small_wan import random_wan

BLOCKS, HEADS, LATENT = 6, 4, (3, 8, 8)
SIGMAS = tuple(0.59 - 0.01 * step for step in range(6))
aten = torch.ops.aten
# on a GPU these cannot return before the device has caught up
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten.is_nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
}


def on_device(tensor) -> bool:
    return isinstance(tensor, torch.Tensor) and getattr(tensor, "on_device", False)


def put(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        tensor.on_device = True


class Waits:
    """Counts what would wait for a GPU, on the CPU: tensors made from marked ones are on it."""

    def __init__(self):
        self.seen: list[str] = []
        self._modes = (_Operations(self.seen), _Calls(self.seen))

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception):
        for mode in reversed(self._modes):
            mode.__exit__(*exception)


class _Operations(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        marked = any(map(on_device, leaves))
        masks = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
        masks = masks and any(
            isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1])
        )
        sized = kwargs.get("output_size") is not None
        if marked and (masks or func in WAITING) and not sized:
            self.seen.append(str(func))
        out = func(*args, **kwargs)
        if marked:
            put(*(t for t in tree_leaves(out) if isinstance(t, torch.Tensor)))
        return out


class _Calls(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        blocking = not kwargs.get("non_blocking", False)
        if func is torch.tensor and kwargs.get("device") is not None:
            self.seen.append("upload by torch.tensor")
        if args and isinstance(args[0], torch.Tensor):
            places = [*args[1:], *kwargs.values()]
            moves = any(isinstance(place, (torch.device, str)) for place in places)
            if name in ("tolist", "numpy") and on_device(args[0]):
                self.seen.append(name)
            down = name == "cpu"
            if down and on_device(args[0]):
                self.seen.append(name)
                out = func(*args, **kwargs).clone()
                del out.on_device
                return out
            if name == "to" and moves and blocking and not on_device(args[0]):
                self.seen.append("upload")
        return func(*args, **kwargs)


def test_the_counter_sees_every_kind_of_wait():
    marked, host = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 2.0])
    put(marked)
    waits = [
        lambda: float(marked.max()),
        lambda: bool((marked * 2).any()),
        lambda: (marked + host).tolist(),
        lambda: marked.sum().item(),
        lambda: torch.equal(marked, host),
        lambda: marked.nonzero(),
        lambda: marked[marked > 0],
        lambda: (marked + 1).cpu(),
        lambda: marked.repeat_interleave(marked.long()),
        lambda: host.to(marked.device),
        lambda: torch.tensor([1.0], device=marked.device),
    ]
    for number, work in enumerate(waits):
        with Waits() as waited:
            work()
        assert len(waited.seen) == 1, (number, waited.seen)
    none = [
        lambda: float(host.max()),
        lambda: (host + 1).tolist(),
        lambda: marked.cumsum(0) + host,
        lambda: host.to(marked.device, non_blocking=True),
        lambda: marked.sort(stable=True).indices[:2],
        lambda: torch.arange(3, device=marked.device),
    ]
    for number, work in enumerate(none):
        with Waits() as waited:
            work()
        assert not waited.seen, (number, waited.seen)


def trained_router() -> TrainedRouter:
    mlp = RouterMLP(BLOCKS, 4 * 16, hidden=8, time_dim=16)
    put(*mlp.parameters(), *mlp.buffers())
    return TrainedRouter(mlp, "latent", model_fingerprint(new_model(False)))


def new_model(given: bool):
    return random_wan(BLOCKS, 36 if given else 16, heads=HEADS)


DEMOTED = HeadPlan(((FRAME, "tile2", OFF, FULL),) * BLOCKS, ((FULL,) * HEADS,) * BLOCKS)
SHARES = Shares(SIGMAS, (1, 1, 0.4, 0, 0.3, 1))
PLANS = {
    "shares": TrimPlan(shares=SHARES),
    "repeats": TrimPlan(shares=Shares(SIGMAS, (1, 0, 1, 0, 0, 1))),
    "tape": TrimPlan(paper_plan(0.6, reselect_every=2)),
    "blocks": TrimPlan(blocks=BlockPlan(RandomRouter(), BlockBudget(0.75, 0.75))),
    "a trained router": TrimPlan(blocks=BlockPlan(trained_router(), BlockBudget(0.75, 0.75))),
    "a trained router, shares": TrimPlan(
        blocks=BlockPlan(trained_router(), BlockBudget(0.75, 0.75)), shares=SHARES
    ),
    "heads": TrimPlan(heads=DEMOTED),
    "heads and shares": TrimPlan(heads=DEMOTED, shares=SHARES),
    "heads and tape": TrimPlan(paper_plan(0.6, reselect_every=2), DEMOTED),
    "computes all": TrimPlan(paper_plan(0.7, start=0.9)),
}


def waits_per_call(model, plan: TrimPlan | None, given: bool, how: str) -> list[list[str]]:
    """What each model call waited for, after two steps that get it going."""
    roles = (COND, UNCOND) if how == "batch" else (COND,)
    draw = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 36 if given else 16, *LATENT, generator=draw)
    latent[:, 16:20] = 0
    latent[:, 16:20, :1] = 1
    text = torch.randn(2, 7, 24, generator=draw)
    put(*model.parameters(), *model.buffers())
    found = []
    attachment = attach(model, plan or TrimPlan(), cond_or_uncond=roles)
    with attachment, torch.no_grad():
        for index, sigma in enumerate(SIGMAS):
            moved = latent * (1 - 0.01 * index)
            calls = [text[:1], text[1:]] if how == "split" else [text[: len(roles)]]
            for words in calls:
                inputs = moved.repeat(len(words), 1, 1, 1, 1)
                timestep = torch.tensor([1000 * sigma]).repeat(len(words))
                words = words.clone()
                put(inputs, timestep, words)
                with Waits() as waited:
                    model(inputs, timestep, words, return_dict=False)
                if index > 1:
                    found.append(waited.seen)
    return found


@pytest.mark.parametrize(("how", "given"), [("cond", False), ("split", True), ("batch", True)])
def test_a_model_call_waits_for_the_device_once(how, given):
    model = new_model(given)
    alone = waits_per_call(model, None, given, how)
    for name, plan in PLANS.items():
        trimmed = waits_per_call(model, plan, given, how)
        for before, after in zip(alone, trimmed, strict=True):
            assert len(after) <= len(before) + 1, (name, after)


def test_the_wait_is_for_all_that_decides():
    """A call that did not wait at all could not have looked at the noise level."""
    model = new_model(False)
    alone = waits_per_call(model, None, False, "cond")
    some = waits_per_call(model, PLANS["shares"], False, "cond")
    # a repeated step is looked at too
    assert [len(after) - len(before) for before, after in zip(alone, some, strict=True)] == [1] * 4


def held_bytes(plan, prompts: int) -> list[int]:
    """What a run holds of its earlier steps, by step."""
    model, found = new_model(False), []
    latent, text = torch.randn(1, 16, *LATENT), torch.randn(prompts, 7, 24)
    roles = (COND, UNCOND)[:prompts]
    with attach(model, plan, cond_or_uncond=roles) as attachment, torch.no_grad():
        for sigma in SIGMAS:
            timestep = torch.full((prompts,), 1000 * sigma)
            model(latent.repeat(prompts, 1, 1, 1, 1) * sigma, timestep, text)
            (part,) = attachment.engine.memory.parts.values()
            known = [
                t
                for p in part.prompts.values()
                for t in (p.velocity, p.clean, p.turn, p.foretold, p.since, p.gap)
            ]
            known += [t for p in part.prompts.values() for c in p.blocks.values() for t in c]
            found.append(sum(t.untyped_storage().nbytes() for t in known if t is not None))
    return found


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_run_holds_four_latents_a_prompt_at_most_and_the_context_it_reads(prompts):
    latents = prompts * 4 * 16 * 3 * 8 * 8
    context = prompts * context_bytes(BLOCKS, 48, HEADS, 12, 8)

    def in_latents(name: str, with_context: range) -> list[float]:
        held = held_bytes(PLANS[name], prompts)
        own = (some - context * (step in with_context) for step, some in enumerate(held))
        return [round(some / latents, 2) for some in own]

    # velocity and video, then how it changed, then how it was to change
    assert in_latents("repeats", range(0)) == [2, 2, 3, 3, 3, 4]
    # a token of a partial step has a sigma of its own: two more channels of 16
    assert in_latents("shares", range(1, 5)) == [2, 3, 4.12, 3.12, 4.12, 4.06]
    # of every number of keys and values a byte, and two of every head's row
    assert context == prompts * 2 * BLOCKS * 48 * (48 + 2 * HEADS)
    assert held_bytes(PLANS["tape"], prompts) == [0] * 6
