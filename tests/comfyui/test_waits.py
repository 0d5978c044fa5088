"""On ComfyUI's own models a model call waits for the device once."""

from collections import Counter

import pytest
import torch

from comfy.patcher_extension import WrappersMP
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.comfyui.attach import attach, attachment_of
from wantrim.methods.heads import FRAME, FULL, OFF, HeadPlan
from wantrim.methods.role_plan import RolePlan
from wantrim.tests.comfyui import tiny
from wantrim.tests.comfyui.put import dialled, routed
from wantrim.tests.waits import Waits, put

STEPS = (1, 1, 0.4, 0, 1, 0.3)
OWN = (OFF, FRAME, "tile2", *[FULL] * (tiny.HEADS - 3))
HEADS = HeadPlan((OWN,) * tiny.LAYERS, ((FULL,) * tiny.HEADS,) * tiny.LAYERS)
ROLES = RolePlan(0.6, tiny.HEADS)
PLANS = {
    "the default": dialled,
    "shares and heads": lambda model: tiny.shared(model, *STEPS, heads=HEADS),
    "shares and online roles": lambda model: tiny.shared(model, *STEPS, heads=ROLES),
    "tape and online roles": lambda model: attach(model, TrimPlan(tiny.token_plan(), ROLES)),
    "a trained router": lambda model: routed(model, "trained"),
}


def put_weights(*modules: torch.nn.Module) -> None:
    for module in modules:
        put(*module.parameters(), *module.buffers())


def waits_per_call(model, **options) -> list[list[str]]:
    """What each model call of a run waited for."""
    found = []

    def count(executor, *args, **kwargs):
        # the host puts them anew where they are
        put_weights(executor.class_obj.diffusion_model)
        told = args[5] if len(args) > 5 else kwargs["transformer_options"]
        given = [*args, *kwargs.values(), told["sigmas"], told["sample_sigmas"]]
        put(*(one for one in given if isinstance(one, torch.Tensor)))
        with Waits() as waited:
            out = executor(*args, **kwargs)
        found.append(waited.seen)
        return out

    counted = model.clone()
    counted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", count)
    # under inference mode torch reads a single number where no counter sees it
    with torch.inference_mode(False), torch.no_grad():
        tiny.sample(counted, steps=len(STEPS), **options)
    return found


# prompts of two lengths come in a call each
@pytest.mark.parametrize(
    ("kind", "tokens"), [("t2v", (7, 7)), ("i2v", (7, 9)), ("ti2v", (7, 7)), ("ti2v", (7, 9))]
)
def test_a_model_call_waits_for_the_device_once(kind, tokens):
    base, given = tiny.base_model(kind), tiny.case(kind, tokens=tokens)
    # what the host makes on the device, and moves there once more, counts as an upload
    alone = waits_per_call(base, given=given)
    for name, attached in PLANS.items():
        model = attached(base)
        plan = attachment_of(model).plan
        if plan.trims_blocks:
            put_weights(plan.blocks.router.mlp)
        trimmed = waits_per_call(model, given=given)
        # of a run's first call a dial reads what it is solved for
        most = [1 + (name == "the default"), *[1] * (len(alone) - 1)]
        more = [
            (Counter(after) - Counter(before)).total()
            for before, after in zip(alone, trimmed, strict=True)
        ]
        assert more == most, (name, trimmed)
