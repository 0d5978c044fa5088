"""ComfyUI's split of a step over several GPUs; here both are the CPU."""

import threading

import torch

import comfy.sd
import comfy.utils
from comfy.multigpu import MultiGPUThreadPool
from comfy.patcher_extension import WrappersMP
from wantrim.hosts.comfyui.attach import attachment_of
from wantrim.tests.comfyui import neighbours, tiny
from wantrim.tests.comfyui.test_chaining import trims


@trims
def test_several_gpus_compute_everything_and_say_so(trim):
    tiny.needs("0.23.0", "sampling on several GPUs")
    dense = tiny.base_model()
    model = neighbours.two_gpus(trim(dense))
    expected = tiny.sample(neighbours.two_gpus(dense), steps=6)
    assert torch.equal(tiny.sample(model, steps=6), expected)
    assert any("several GPUs" in note for note in tiny.report_of(model).notes)


def test_on_several_gpus_no_prompt_waits_for_the_other():
    """Whichever of them comes first, each device is asked once in a step."""
    asked, uncond_was_there = [], threading.Event()

    def cond_last(executor, *args, **kwargs):
        roles = kwargs.get("transformer_options", args[-1])["cond_or_uncond"]
        asked.append(roles)
        if roles == [0]:
            uncond_was_there.wait(20)
        try:
            return executor(*args, **kwargs)
        finally:
            uncond_was_there.set()

    model = neighbours.two_gpus(tiny.trimmed(tiny.base_model()))
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "last", cond_last)
    pool = MultiGPUThreadPool(neighbours.DEVICES)
    model.model_options["multigpu_thread_pool"] = pool
    try:
        out = tiny.sample(model, steps=2)
    finally:
        pool.shutdown()
    assert sorted(asked) == [[0], [0], [1], [1]]
    assert torch.equal(out, tiny.sample(neighbours.two_gpus(tiny.base_model()), steps=2))


def test_threads_that_overlap_leave_torch_compile_as_it_was():
    """It is one switch for all threads: A in, B in, A out, B out would leave it off for good."""
    inside, after = [threading.Event(), threading.Event()], threading.Event()

    def role_of(args, kwargs) -> int:
        [role] = kwargs.get("transformer_options", args[-1])["cond_or_uncond"]
        return role

    def enter(executor, *args, **kwargs):
        if role_of(args, kwargs) == 1:
            inside[0].wait(20)
        try:
            return executor(*args, **kwargs)
        finally:
            if role_of(args, kwargs) == 0:
                after.set()

    def stay(executor, *args, **kwargs):
        role = role_of(args, kwargs)
        inside[role].set()
        (inside[1] if role == 0 else after).wait(20)
        return executor(*args, **kwargs)

    model = tiny.base_model().clone()
    # in front of ours
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "enter", enter)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "stay", stay)
    model = neighbours.two_gpus(tiny.trimmed(model))
    pool = MultiGPUThreadPool(neighbours.DEVICES)
    model.model_options["multigpu_thread_pool"] = pool
    try:
        tiny.sample(model, steps=1)
    finally:
        pool.shutdown()
    stance = torch._dynamo.eval_frame._stance.stance
    torch.compiler.set_stance("default")
    assert stance == "default"


def test_the_model_of_another_gpu_has_the_same_plan(tmp_path):
    """What ComfyUI makes of a MODEL for each further device, here the CPU again."""
    weights, metadata = tiny.state_dict("t2v")
    comfy.utils.save_torch_file(weights, tmp_path / "wan.safetensors", metadata)
    model = tiny.trimmed(comfy.sd.load_diffusion_model(str(tmp_path / "wan.safetensors")))
    other = model.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert other.model is not model.model
    assert attachment_of(other) is attachment_of(model)
    assert other.wrappers == model.wrappers
    assert torch.equal(tiny.sample(other), tiny.sample(model))
