"""Whatever goes wrong while a trimmed model samples, the next run knows nothing of it."""

import gc
from collections import Counter
from functools import cache

import pytest
import torch
from torch._subclasses import FakeTensor

import comfy.model_management
from comfy.model_management import InterruptProcessingException
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from wantrim.benchmarks.peers.random_router import RandomRouter
from wantrim.engine import block, call, engine, memory
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui import blocks as host_blocks
from wantrim.hosts.comfyui import dial as host_dial
from wantrim.hosts.comfyui import run as host_run
from wantrim.hosts.comfyui.attach import attach
from wantrim.hosts.comfyui.blocks import OVERRIDE
from wantrim.hosts.comfyui.profiling import model_fingerprint
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.routers import RouterMLP
from wantrim.slim.router import TrainedRouter
from wantrim.tests.comfyui import put, test_heads, tiny

STEPS = 4
PLANS = {
    "tokens": tiny.at_node,
    "heads": test_heads.trimmed,
    "blocks": put.routed,
    "dial": put.dialled,
    # remembered keys and values: written, read and made anew, read
    "shares": lambda model: tiny.shared(model, 1.0, 1.0, 0.5, 0.3, heads=test_heads.heads()),
    "all": lambda model: tiny.shared(
        model, 1.0, 0.0, 1.0, 1.0,
        tokens=tiny.token_plan(),
        heads=test_heads.heads(),
        blocks=BlockPlan(RandomRouter(), BlockBudget(0.5, 0.8)),
    ),
}  # fmt: skip
plans = pytest.mark.parametrize("plan", PLANS)
# of one run, none of which may outlive it
OURS = (
    host_run.SamplingRun,
    host_dial.Wish,
    host_blocks.BlockReplacement,
    host_blocks.AttentionTap,
    block.Attend,
    call.Call,
    block.Places,
    call.StepState,
    engine.Engine,
    memory.Memory,
    memory.Part,
    memory.Prompt,
)


def run(model, given=None, **options):
    return tiny.sample(model, given, **{"steps": STEPS} | options)


@pytest.fixture(autouse=True)
def no_collector():
    """What a run holds goes with it, and not when Python next looks for circles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def ours() -> Counter:
    """Objects of ours that belong to a run, by name."""
    return Counter(type(one).__name__ for one in gc.get_objects() if issubclass(type(one), OURS))


def alive() -> Counter:
    """Tensors in memory by shape, and objects of ours that belong to a run."""
    gc.collect()
    found = Counter()
    for one in gc.get_objects():
        # isinstance would wake up what only pretends to be of a class
        kind = type(one)
        if issubclass(kind, OURS):
            found[kind.__name__] += 1
        # a compiler's own, of other tests, hold nothing
        elif issubclass(kind, torch.Tensor) and not issubclass(kind, FakeTensor):
            found[tuple(one.shape)] += 1
    return found


def bare(model) -> dict:
    """Everything by which a MODEL can carry something into a run."""
    network = model.model.diffusion_model
    hooks = [m for m in network.modules() if m._forward_hooks or m._forward_pre_hooks]
    own = {name for m in network.modules() for name in vars(m) if name == "forward"}
    return {
        "options": repr(model.model_options),
        "wrappers": repr(model.wrappers),
        "callbacks": repr(model.callbacks),
        "patches": repr(sorted(model.patches)),
        "objects": repr(sorted(model.object_patches)),
        "additional": repr(model.additional_models),
        "attachments": repr(model.attachments),
        "hooks": repr(hooks),
        "forwards": repr(own),
    }


class Untouched:
    """The base model, and what a plan's run makes of it, before the accident."""

    def __init__(self, plan: str):
        self.base = tiny.base_model()
        self.before, self.bare = run(self.base), bare(self.base)
        self.patched = PLANS[plan](self.base)
        self.carried = bare(self.patched)
        self.trimmed = run(self.patched)
        assert not torch.equal(self.before, self.trimmed)

    def before_accident(self) -> None:
        # of the size that all runs have; what it leaves in the host's own caches may stay
        run(self.patched)
        self.alive = alive()

    def check(self) -> None:
        run(self.patched)
        left = alive() - self.alive
        assert not left, f"still in memory: {left}"
        assert bare(self.base) == self.bare
        assert bare(self.patched) == self.carried
        assert torch.equal(run(self.base), self.before)
        assert torch.equal(run(self.patched), self.trimmed)


known = cache(Untouched)


@pytest.fixture
def untouched(plan):
    known(plan).before_accident()
    yield known(plan)
    known(plan).check()


def stopped(model, error: Exception, **options) -> None:
    """Sample until the error; nothing of its traceback is held on to."""
    reached = False
    try:
        run(model, **options)
    except type(error) as found:
        reached = found is error
        error.__traceback__ = found.__traceback__ = None
    assert reached
    assert not tiny.report_of(model).finished


@plans
def test_cancelled_at_every_step(plan, untouched):
    for step in range(STEPS):
        error = InterruptProcessingException()

        def callback(index, *_, step=step, error=error):
            if index == step:
                raise error

        stopped(untouched.patched, error, callback=callback)
        gone(untouched)


def gone(untouched: Untouched) -> None:
    """What belonged to the run is gone as soon as it has stopped."""
    assert not ours()


@plans
def test_a_run_leaves_nothing_for_the_collector(plan):
    model = known(plan).patched
    held = []
    run(model, callback=lambda *_: held.append(ours()["Call"]))
    # each call goes before the next one comes
    assert len(held) == STEPS and max(held) <= 1
    assert not ours()


def breaking(model, error: Exception, at: int):
    """A clone whose `at`-th attention from now on raises: inside a block."""
    broken, calls = model.clone(), []

    def override(func, *args, **kwargs):
        calls.append(1)
        if len(calls) > at:
            raise error
        return func(*args, **kwargs)

    broken.model_options["transformer_options"][OVERRIDE] = override
    return broken


@plans
@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_an_error_inside_a_block(plan, kind, untouched):
    """In the first block, in a later one, and in the middle of a later step."""
    # in the third and the last step of the shares, which compute a part
    later = (31, 43) if plan == "shares" else ()
    for at in (0, 3, 19, *later):
        error = kind("in the middle of a block")
        stopped(breaking(untouched.patched, error, at), error)
        gone(untouched)


@plans
def test_unloaded_between_runs_and_between_steps(plan, untouched):
    comfy.model_management.unload_all_models()
    assert torch.equal(run(untouched.patched), untouched.trimmed)

    def callback(index, *_):
        if index == 1:
            comfy.model_management.unload_all_models()

    assert torch.equal(run(untouched.patched, callback=callback), untouched.trimmed)
    comfy.model_management.unload_all_models()


@plans
def test_two_queued_runs_with_different_plans(plan, untouched):
    other = "blocks" if plan == "tokens" else "tokens"
    second = PLANS[other](untouched.base)
    expected = run(second)
    # and one plan in place of the other on the same branch
    third = PLANS[plan](untouched.patched)
    for _ in range(2):
        assert torch.equal(run(untouched.patched), untouched.trimmed)
        assert torch.equal(run(second), expected)
        assert torch.equal(run(untouched.base), untouched.before)
        assert torch.equal(run(third), untouched.trimmed)


@plans
def test_latents_that_are_no_numbers(plan, untouched):
    noise = torch.randn(tiny.case().latent.shape, generator=torch.Generator().manual_seed(1))
    for bad in (float("nan"), float("inf"), -float("inf")):
        for where in (slice(None), slice(0, 1)):
            given = noise.clone()
            given.view(-1)[where] = bad
            out = run(untouched.patched, noise=given)
            assert out.shape == noise.shape
            # as the untouched model: it is not made to look right
            assert not torch.isfinite(out).all()
            assert tiny.report_of(untouched.patched).finished


# in no order that a sampler makes of them
SIGMAS = {
    "rising": [0.2, 0.5, 0.9],
    "up and down": [0.5, 1.0, 0.2, 0.7, 0.0],
    "the same": [0.6, 0.6, 0.6, 0.0],
    "above one": [3.0, 2.0, 1.0, 0.0],
    "tiny": [1e-6, 1e-7, 0.0],
    # of the schedulers of other models
    "far above one": [14.6, 3.1, 1.2, 0.7, 0.0],
    "below nothing": [1.0, 0.5, -0.5],
    "no number": [1.0, float("nan"), 0.5, 0.0],
    "no number at all": [float("nan")] * 3,
    "endless": [float("inf"), 1.0, 0.0],
}


@plans
def test_sigmas_out_of_order(plan, untouched):
    for name, values in SIGMAS.items():
        sigmas = torch.tensor(values)
        # what the untouched model makes of them may be no numbers
        alike = torch.isfinite(run(untouched.base, sigmas=sigmas))
        out = run(untouched.patched, sigmas=sigmas)
        assert torch.equal(torch.isfinite(out), alike), name
        assert tiny.report_of(untouched.patched).finished
        again = run(untouched.patched, sigmas=sigmas)
        assert torch.equal(again.nan_to_num(), out.nan_to_num()), name


def test_sigmas_where_the_flow_shift_has_no_inverse():
    """shift / (shift - 1): a model with shift 2 sampled with another model's sigmas."""
    for name, plan in PLANS.items():
        for shift, values in ((2.0, [3.0, 2.0, 1.0, 0.5, 0.0]), (5.0, [1.25, 0.9, 0.5, 0.0])):
            model = plan(ModelSamplingSD3().patch(tiny.base_model(), shift)[0])
            out = run(model, sigmas=torch.tensor(values))
            steps = tiny.report_of(model).steps
            assert torch.isfinite(out).all() and len(steps) == len(values) - 1, name
            # as if they were the first of the run, and not the last
            assert [step.progress for step in steps if step.sigma >= 1] == [0.0] * sum(
                value >= 1 for value in values
            )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_router_that_knows_no_more_runs_the_first_and_the_last_block(bad):
    model = tiny.base_model()
    torch.manual_seed(1)
    mlp = RouterMLP(tiny.LAYERS, 4 * 16, hidden=8, time_dim=8).requires_grad_(False)
    router = TrainedRouter(mlp, "latent", model_fingerprint(model.model.diffusion_model))
    plan = BlockPlan(router, BlockBudget(0.5, 0.5))
    entered = []
    patched = attach(model, TrimPlan(blocks=plan))
    options = patched.model_options["transformer_options"]

    def note(func, *args, **kwargs):
        entered.append(kwargs["transformer_options"]["block_index"])
        return func(*args, **kwargs)

    options[OVERRIDE] = note
    noise = torch.full(tiny.case().latent.shape, bad)
    run(patched, noise=noise, steps=1, cfg=1.0)
    assert {0, tiny.LAYERS - 1} <= set(entered) and len(set(entered)) == tiny.LAYERS // 2


@plans
def test_another_size_after_a_cancelled_run(plan, untouched):
    """What the cancelled run knew of its tokens fits nothing any more."""
    given = tiny.case(frames=2, height=6, width=8, batch=2)
    expected = run(PLANS[plan](untouched.base), given)
    error = InterruptProcessingException()

    def callback(index, *_):
        if index == STEPS - 2:
            raise error

    stopped(untouched.patched, error, callback=callback)
    assert torch.equal(run(untouched.patched, given), expected)


@plans
@pytest.mark.parametrize("sigmas", [[], [1.0], [0.0]])
def test_a_run_without_a_step(plan, sigmas, untouched):
    given = torch.tensor(sigmas)
    assert torch.equal(run(untouched.patched, sigmas=given), run(untouched.base, sigmas=given))


@plans
@pytest.mark.parametrize("size", [(1, 8, 10, 1), (1, 7, 9, 2), (2, 9, 7, 3), (5, 3, 1, 4)])
def test_sizes_that_few_people_ask_for(plan, size, untouched):
    """Latent frames, rows, columns, batch."""
    frames, height, width, batch = size
    given = tiny.case(frames=frames, height=height, width=width, batch=batch)
    out = run(untouched.patched, given)
    assert out.shape == given.latent.shape and torch.isfinite(out).all()
    assert torch.equal(run(untouched.patched, given), out)
    assert not torch.equal(run(untouched.base, given), out)
