"""A model call waits for the device once, and holds little more memory than the model alone."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wantrim.benchmarks.speed_models import Runner, build
from wantrim.benchmarks.speed_plans import Size, plans
from wantrim.benchmarks.speed_probes import peak_bytes
from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.weights import new_transformer
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.fingerprint import Fingerprint
from wantrim.methods.presets import preset_plan
from wantrim.methods.profile import Profile
from wantrim.methods.routers import OnlineRouter

SIZE = Size("small", 48, 4, 64, 6, (3, 8, 8))
SIGMAS = tuple(0.59 - 0.01 * step for step in range(8))
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


def online() -> TrimPlan:
    profile = Profile.empty(Fingerprint(48, 64, SIZE.blocks, SIZE.heads, 16, 16))
    for name in ("count", "hidden", "residual"):
        profile.tensors[name] += 1
    budget = BlockBudget(0.75, 0.75, "constant")
    return TrimPlan(blocks=BlockPlan(OnlineRouter(profile), budget, "reuse"))


PLANS = plans(SIZE) | {
    "online": online(),
    "paper, keys kept": TrimPlan(preset_plan("paper", 0.6, dropped_kv="keep", reselect_every=2)),
    "demoted, chosen anew": TrimPlan(
        preset_plan("paper", 0.6, reselect_every=2), plans(SIZE)["heads 0.7, others demoted"].heads
    ),
    "frame mean": TrimPlan(preset_plan("refresh", 0.6, restore="frame_mean")),
    "auto": TrimPlan(preset_plan("auto", 0.7)),
    "computes all": TrimPlan(preset_plan("refresh", 0.7, start=0.9)),
}


def new_model(given: bool):
    torch.manual_seed(0)
    return new_transformer(
        dim=48,
        num_heads=SIZE.heads,
        num_layers=SIZE.blocks,
        ffn_dim=64,
        in_dim=36 if given else 16,
        out_dim=16,
        text_dim=24,
    ).requires_grad_(False)


def waits_per_call(model, plan: TrimPlan | None, given: bool, how: str) -> list[list[str]]:
    """What each model call waited for, after two steps that get it going."""
    roles = (COND, UNCOND) if how == "batch" else (COND,)
    draw = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 36 if given else 16, *SIZE.latent, generator=draw)
    latent[:, 16:20] = 0
    latent[:, 16:20, :1] = 1
    text = torch.randn(2, 7, 24, generator=draw)
    put(*model.parameters(), *model.buffers())
    found = []
    attachment = attach(model, plan or TrimPlan(), cond_or_uncond=roles, sigmas=SIGMAS)
    with attachment, torch.no_grad():
        for index, sigma in enumerate(SIGMAS[:5]):
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
    some = waits_per_call(model, PLANS["tokens 0.7, refresh"], False, "cond")
    assert [len(after) - len(before) for before, after in zip(alone, some, strict=True)] == [1] * 3


# wide enough that the latents count for little beside the hidden state, as in a real Wan
WIDE = Size("wide", 512, 4, 2048, 4, (3, 16, 16))
# hidden states above the model alone: what is repeated has to be held; three latents are 3/8
HELD = {"tokens 0.7, refresh": 1, "blocks 0.75, reuse": 2, "all together": 3}


@pytest.fixture(scope="module")
def wide():
    return build(WIDE)


@pytest.mark.parametrize("name", plans(WIDE))
def test_a_plan_holds_what_it_repeats_and_less_than_a_hidden_state_more(wide, name):
    def peak(plan) -> int:
        runner = Runner(wide, WIDE, plan)
        try:
            return peak_bytes(lambda: [runner.step() for _ in range(3)])
        finally:
            runner.close()

    state = 4 * WIDE.grid.tokens * WIDE.dim
    extra = (peak(plans(WIDE)[name]) - peak(None)) / state
    assert extra < HELD.get(name, 0) + 1
