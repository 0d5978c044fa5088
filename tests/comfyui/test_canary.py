"""What we use of ComfyUI, as it was when the pack was written: names precisely what moved.

A failure here is no fault of the pack yet. It says which of the host's promises to look at first.
"""

import ast
import importlib
import inspect
from collections.abc import Callable

import pytest
import torch

import comfy.patcher_extension
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.latest import io
from wantrim.tests.comfyui import tiny

# what a host function of ours is called with, or what it hands to us: its parameters in order, as
# far as we use them; "=" has a default, "**" takes any keyword
SIGNATURES = {
    # wrapped: the next one in line gets these
    "comfy.samplers:CFGGuider.outer_sample": (
        "self noise latent_image sampler sigmas denoise_mask= callback= disable_pbar= seed="
    ),
    "comfy.samplers:_calc_cond_batch": "model conds x_in timestep model_options",
    "comfy.model_base:BaseModel._apply_model": (
        "self x t c_concat= c_crossattn= control= transformer_options= **"
    ),
    "comfy.ldm.wan.model:WanModel._forward": (
        "self x timestep context clip_fea= time_dim_concat= transformer_options= **"
    ),
    "comfy.ldm.wan.model:VaceWanModel._forward": (
        "self x timestep context clip_fea= time_dim_concat= transformer_options= **"
    ),
    "comfy.ldm.wan.model:CameraWanModel._forward": (
        "self x timestep context clip_fea= time_dim_concat= transformer_options= **"
    ),
    # called, or run around our replacements
    "comfy.model_base:BaseModel.apply_model": (
        "self x t c_concat= c_crossattn= control= transformer_options= **"
    ),
    "comfy.ldm.wan.model:WanModel.forward": (
        "self x timestep context clip_fea= time_dim_concat= transformer_options= **"
    ),
    "comfy.ldm.wan.model:WanModel.forward_orig": (
        "self x t context clip_fea= freqs= transformer_options= **"
    ),
    "comfy.ldm.wan.model:WanAttentionBlock.forward": (
        "self x e freqs context context_img_len= transformer_options="
    ),
    "comfy.ldm.wan.model:WanSelfAttention.forward": "self x freqs transformer_options=",
    "comfy.model_patcher:CoreModelPatcher.__init__": "self model load_device offload_device size=",
    "comfy.model_patcher:ModelPatcher.clone": "self",
    "comfy.model_patcher:ModelPatcher.add_wrapper_with_key": "self wrapper_type key wrapper",
    "comfy.model_patcher:ModelPatcher.remove_wrappers_with_key": "self wrapper_type key",
    "comfy.model_patcher:ModelPatcher.set_additional_models": "self key models",
    "comfy.model_patcher:ModelPatcher.remove_additional_models": "self key",
    "comfy.model_patcher:ModelPatcher.get_model_object": "self name",
    "comfy.model_patcher:ModelPatcher.set_attachments": "self key attachment",
    "comfy.model_patcher:ModelPatcher.get_attachment": "self key",
    "comfy.model_patcher:ModelPatcher.add_callback_with_key": "self call_type key callback",
    "comfy.model_patcher:create_model_options_clone": "orig_model_options",
    "comfy.patcher_extension:add_wrapper_with_key": (
        "wrapper_type key wrapper transformer_options is_model_options="
    ),
    "comfy.sd:load_diffusion_model_state_dict": "sd model_options= metadata= disable_dynamic=",
    "comfy.sd:load_diffusion_model": "unet_path model_options=",
    "comfy.utils:load_torch_file": "ckpt",
    "comfy.utils:ProgressBar.update_absolute": "self value total=",
    "comfy.model_management:load_models_gpu": "models",
    "comfy.model_management:get_torch_device": "",
    "comfy.model_management:unet_offload_device": "",
    "comfy.model_management:throw_exception_if_processing_interrupted": "",
    "comfy.samplers:calculate_sigmas": "model_sampling scheduler_name steps",
    "comfy.weight_adapter:LoRAAdapter.__init__": "self loaded_keys weights",
    "comfy_extras.nodes_model_advanced:ModelSamplingSD3.patch": "self model shift",
    "comfy_execution.utils:get_executing_context": "",
    "folder_paths:add_model_folder_path": "folder_name full_folder_path is_default=",
    "folder_paths:get_full_path": "folder_name filename",
    "folder_paths:get_filename_list": "folder_name",
    "folder_paths:get_folder_paths": "folder_name",
}
CONSTANTS = {
    "comfy.patcher_extension:WrappersMP.OUTER_SAMPLE": "outer_sample",
    "comfy.patcher_extension:WrappersMP.CALC_COND_BATCH": "calc_cond_batch",
    "comfy.patcher_extension:WrappersMP.APPLY_MODEL": "apply_model",
    "comfy.patcher_extension:WrappersMP.DIFFUSION_MODEL": "diffusion_model",
    "comfy.patcher_extension:CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES": (
        "on_register_all_hook_patches"
    ),
}
# attributes that we read, by where they are
NETWORK = (
    "blocks dim ffn_dim num_heads in_dim out_dim text_dim freq_dim patch_size img_emb ref_conv head"
)
BLOCK = "self_attn cross_attn ffn modulation"
ATTENTION = "q k v o norm_q norm_k num_heads head_dim"
PATCHER = (
    "model model_options load_device object_patches patches patches_uuid hook_patches injections"
)


def find(name: str):
    """What stands at "module:attribute.attribute"."""
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def moved_signature(expected: str, function: Callable) -> str | None:
    """How a function's parameters differ from what we use of them, or None."""
    found = list(inspect.signature(function).parameters.values())
    open_ended = any(p.kind is p.VAR_KEYWORD for p in found)
    ordered = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    wanted = expected.split()
    if "**" in wanted:
        wanted.remove("**")
        if not open_ended:
            return "takes no further keywords any more"
    for place, word in enumerate(wanted):
        name, optional = word.removesuffix("="), word.endswith("=")
        if place >= len(ordered) or ordered[place].name != name:
            came = ordered[place].name if place < len(ordered) else "nothing"
            return f"parameter {place} was {name!r} and is {came!r}"
        if optional and ordered[place].default is inspect.Parameter.empty:
            return f"parameter {name!r} has no default any more"
    needed = [p.name for p in ordered[len(wanted) :] if p.default is inspect.Parameter.empty]
    needed += [p.name for p in found if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    return f"needs {', '.join(needed)} too" if needed else None


def moved_signatures(expected: dict[str, str]) -> list[str]:
    moved = []
    for name, words in expected.items():
        try:
            reason = moved_signature(words, find(name))
        except (AttributeError, ImportError) as error:
            reason = f"is gone ({error})"
        if reason is not None:
            moved.append(f"{name} {reason}")
    return moved


def missing(what: str, found: object, names: str) -> list[str]:
    return [f"{what}.{name} is gone" for name in names.split() if not hasattr(found, name)]


def report(moved: list[str]) -> None:
    version = importlib.import_module("comfyui_version").__version__
    assert not moved, "\n".join([f"moved in ComfyUI {version}:", *moved])


def test_functions_of_the_host_take_what_they_took():
    report(moved_signatures(SIGNATURES))


def test_names_of_the_hosts_hooks():
    moved = []
    for name, expected in CONSTANTS.items():
        try:
            found = find(name)
        except AttributeError as error:
            found = error
        if found != expected:
            moved.append(f"{name} was {expected!r} and is {found!r}")
    report(moved)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_attributes_of_the_hosts_models(kind):
    model = tiny.base_model(kind)
    network = model.model.diffusion_model
    optional = [] if kind != "vace" else ["ref_conv"]
    moved = missing("MODEL", model, PATCHER) + [
        text for text in missing(type(network).__name__, network, NETWORK)
        if not any(name in text for name in optional)
    ]  # fmt: skip
    block = network.blocks[0]
    moved += missing("block", block, BLOCK)
    moved += missing("self_attn", block.self_attn, ATTENTION)
    moved += missing("cross_attn", block.cross_attn, ATTENTION)
    if kind == "i2v_clip":
        moved += missing("cross_attn", block.cross_attn, "k_img v_img norm_k_img")
    moved += missing("model_sampling", model.get_model_object("model_sampling"), "shift")
    for index in (0, 2):
        if not isinstance(block.ffn[index], torch.nn.Module):
            moved.append(f"block.ffn[{index}] is gone")
    if set(model.model_options) < {"transformer_options"}:
        moved.append("MODEL.model_options['transformer_options'] is gone")
    report(moved)


# what nodes/inputs.py makes for the nodes, and the words that it adds to theirs
MADE = {
    "number": ("io.Float.Input", "default min max step tooltip display_mode"),
    "choice": ("io.Combo.Input", "options default tooltip"),
    "switch": ("io.Boolean.Input", "default tooltip"),
}


# our calls of the host's V3 schema, read from our own source
def schema_calls(root) -> list[tuple[str, str, set[str]]]:
    found = []
    for file in sorted((root / "nodes").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, where = ast.unparse(node.func), f"{file.name}:{node.lineno}"
            words = {k.arg for k in node.keywords if k.arg is not None}
            if name.startswith("io."):
                found.append((where, name, words))
            kind, added = MADE.get(name.removeprefix("inputs."), (None, ""))
            if name.endswith("number") and type(getattr(node.args[1], "value", None)) is int:
                kind = "io.Int.Input"
            if kind is not None:
                # a slider is said in the host's word
                found.append((where, kind, words - {"slider"} | {*added.split()}))
    return found


def test_schema_takes_the_words_that_the_nodes_use(root):
    calls, moved = schema_calls(root), []
    assert len(calls) > 100
    for where, name, words in calls:
        try:
            target = find("comfy_api.latest:" + name)
        except AttributeError as error:
            moved.append(f"{where}: {name} is gone ({error})")
            continue
        taken = inspect.signature(target).parameters
        if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            continue
        moved += [f"{where}: {name} takes no {word!r} any more" for word in words - taken.keys()]
    assert hasattr(io.NumberDisplay, "slider")
    report(moved)


def test_the_executing_context_says_what_the_page_is_told():
    context = find("comfy_execution.utils:ExecutionContext")
    report(missing("ExecutionContext", context("p", "n", None), "prompt_id node_id"))


def spied(model, seen: dict):
    """A clone that notes what the host hands to each of the hooks, and to its attention override."""
    patched = model.clone()

    def note(kind):
        def wrapper(executor, *args, **kwargs):
            seen.setdefault(kind, (executor, args, kwargs))
            if kind == "OUTER_SAMPLE":
                # the guider has them during the run only
                seen["conds"] = set(executor.class_obj.conds)
            return executor(*args, **kwargs)

        return wrapper

    for kind in ("OUTER_SAMPLE", "CALC_COND_BATCH", "APPLY_MODEL", "DIFFUSION_MODEL"):
        patched.add_wrapper_with_key(getattr(WrappersMP, kind), "canary", note(kind))

    def override(func, *args, **kwargs):
        seen.setdefault("attention", []).append((args, dict(kwargs)))
        return func(*args, **kwargs)

    def block(args, extra):
        seen.setdefault("block", (dict(args), dict(extra)))
        return extra["original_block"](args)

    options = patched.model_options["transformer_options"]
    options["optimized_attention_override"] = override
    patched.set_model_patch_replace(block, "dit", "double_block", 1)
    return patched


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_what_the_host_hands_to_our_hooks(kind):
    """The calls themselves, on a real run: places of arguments, keys of dicts, shapes."""
    seen: dict = {}
    tiny.sample(spied(tiny.base_model(kind), seen), tiny.case(kind), steps=1)
    moved = [f"{hook} is not called" for hook in ("OUTER_SAMPLE", "CALC_COND_BATCH", "APPLY_MODEL",
             "DIFFUSION_MODEL", "attention", "block") if hook not in seen]  # fmt: skip
    report(moved)

    def expect(what: str, truth: bool) -> None:
        if not truth:
            moved.append(what)

    executor, args, _ = seen["OUTER_SAMPLE"]
    guider = executor.class_obj
    expect("OUTER_SAMPLE: class_obj is no CFGGuider", hasattr(guider, "model_patcher"))
    expect("OUTER_SAMPLE: guider.conds", seen["conds"] == {"positive", "negative"})
    expect("OUTER_SAMPLE: guider.model_options", isinstance(guider.model_options, dict))
    expect("OUTER_SAMPLE: argument 3 are not the sigmas", len(args) > 3 and args[3].shape == (2,))

    _, args, kwargs = seen["CALC_COND_BATCH"]
    expect("CALC_COND_BATCH: not 5 places", len(args) == 5 and not kwargs)
    expect("CALC_COND_BATCH: conds are not [cond, uncond]", len(args[1]) == 2)
    expect("CALC_COND_BATCH: the last are not the options", "transformer_options" in args[4])

    executor, args, kwargs = seen["APPLY_MODEL"]
    expect("APPLY_MODEL: class_obj has no network", hasattr(executor.class_obj, "diffusion_model"))
    known = {"c_concat", "c_crossattn", "control", "transformer_options"}
    expect("APPLY_MODEL: x, t and at most 4 more are not in places", 2 <= len(args) <= 6)
    options = kwargs.get("transformer_options", args[5] if len(args) > 5 else None)
    expect("APPLY_MODEL: no transformer_options", isinstance(options, dict))
    expect("APPLY_MODEL: no conditioning", len(args) > 3 or bool(known & set(kwargs)))

    executor, args, kwargs = seen["DIFFUSION_MODEL"]
    expect("DIFFUSION_MODEL: not 6 places", len(args) == 6)
    expect("DIFFUSION_MODEL: class_obj is not the network", hasattr(executor.class_obj, "blocks"))
    expect("DIFFUSION_MODEL: latent is not [b, c, f, h, w]", args[0].ndim == 5)
    expect("DIFFUSION_MODEL: text is not [b, s, c]", args[2].ndim == 3)
    options = args[-1] if isinstance(args[-1], dict) else {}
    for key in ("sigmas", "sample_sigmas", "cond_or_uncond", "uuids", "wrappers"):
        expect(f"DIFFUSION_MODEL: transformer_options[{key!r}] is gone", key in options)
    expect("DIFFUSION_MODEL: timestep is not 1000 sigma", bool(
        torch.isclose(args[1].max(), 1000 * options["sigmas"].max().float(), rtol=1e-3)))  # fmt: skip
    if kind == "fun":
        expect("DIFFUSION_MODEL: reference_latent", "reference_latent" in kwargs)
    if kind == "vace":
        expect("DIFFUSION_MODEL: vace_context", "vace_context" in kwargs)

    args, extra = seen["block"]
    expect(
        "block: keys of its argument",
        set(args) >= {"img", "txt", "vec", "pe", "transformer_options"},
    )
    expect("block: original_block", callable(extra.get("original_block")))
    tokens = args["img"].shape[1]
    expect("block: pe is not [1, s, ...]", args["pe"].ndim == 6 and args["pe"].shape[1] == tokens)
    expect("block: vec is not [b, (f,) 6, c]", args["vec"].shape[-2:] == (6, tiny.DIM))

    args, kwargs = seen["attention"][0]
    expect("attention: q, k, v are not in places 1 to 3", len(args) >= 3)
    expect("attention: heads is no keyword", "heads" in kwargs or len(args) > 3)
    expect("attention: q is not [b, s, n * d]", args[0].shape[1:] == (tokens, tiny.DIM))
    expect("attention: self-attention is not the first", args[0].shape == args[1].shape)
    expect("attention: no transformer_options", "transformer_options" in kwargs)
    report(moved)


@pytest.mark.parametrize(
    ("words", "function", "said"),
    [
        ("a b", lambda a, c: 0, "parameter 1 was 'b' and is 'c'"),
        ("a b", lambda b, a: 0, "parameter 0 was 'a' and is 'b'"),
        ("a b", lambda a: 0, "parameter 1 was 'b' and is 'nothing'"),
        ("a b=", lambda a, b: 0, "parameter 'b' has no default any more"),
        ("a", lambda a, b: 0, "needs b too"),
        ("a", lambda a, *, b: 0, "needs b too"),
        ("a **", lambda a: 0, "takes no further keywords any more"),
        ("a", lambda a, b=1, *c, d=2, **e: 0, None),
        ("a **", lambda a, **k: 0, None),
    ],
)
def test_the_canary_names_what_moved(words, function, said):
    assert moved_signature(words, function) == said


def test_the_canary_sings(monkeypatch):
    """A host in which hooks were renamed, moved or lost is told apart by name."""
    patcher = find("comfy.model_patcher:ModelPatcher")
    monkeypatch.delattr(patcher, "set_additional_models")
    monkeypatch.setattr("comfy.samplers._calc_cond_batch", lambda model, x_in, conds: 0)
    moved = moved_signatures(SIGNATURES)
    assert len(moved) == 2
    assert any("set_additional_models is gone" in text for text in moved)
    assert any("_calc_cond_batch parameter 1 was 'conds' and is 'x_in'" in text for text in moved)
    monkeypatch.setattr(comfy.patcher_extension.WrappersMP, "APPLY_MODEL", "apply")
    with pytest.raises(AssertionError, match="APPLY_MODEL was 'apply_model' and is 'apply'"):
        test_names_of_the_hosts_hooks()
    assert CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES
