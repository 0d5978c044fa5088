"""Other nodes and packs, as they put themselves on a MODEL: the columns of the matrix."""

from __future__ import annotations

import json
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F

import comfy.ops
import comfy.sd
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT, SkipLayerGuidanceDiTSimple
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from wantrim.hosts.comfyui.blocks import OVERRIDE

# of a block-sparse attention, in tokens
BLOCK = 8
# few: on a CPU quantised layers are slow. WanDancer's cross-attention has a picture of no tokens
PACKED = ("blocks.1.self_attn.", "blocks.1.ffn.", "blocks.3.self_attn.", "blocks.3.ffn.")
DEVICES = [torch.device("cpu", 0), torch.device("cpu", 1)]


def slg(model, layers="2"):
    return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, double_layers=layers).result[0]


def slg_simple(model, layers="2"):
    return SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, double_layers=layers).result[0]


def easycache(model, threshold=3.0):
    return EasyCacheNode.execute(model, threshold, 0.15, 0.95, False).result[0]


def lazycache(model, threshold=3.0):
    return LazyCacheNode.execute(model, threshold, 0.15, 0.95, False).result[0]


def shifted(model):
    return ModelSamplingSD3().patch(model, 3.0)[0]


def lora_weights(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    weights = {}
    for name in ("blocks.1.self_attn.q", "blocks.2.ffn.0", "blocks.4.cross_attn.v"):
        rows, columns = model.model.get_submodule(f"diffusion_model.{name}").weight.shape
        stem = f"diffusion_model.{name}"
        weights[f"{stem}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
        weights[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    return weights


def lora(model):
    return comfy.sd.load_lora_for_models(model, None, lora_weights(model), 1.0, 0.0)[0]


def lora_bypass(model):
    return comfy.sd.load_bypass_lora_for_models(model, None, lora_weights(model), 1.0, 0.0)[0]


def nag(model):
    return NAGuidance.execute(model, 5.0, 0.5, 1.5).result[0]


def windows(model):
    """Two windows of two latent frames, of three."""
    return WanContextWindowsManualNode.execute(
        model, 5, 4, "standard_static", 1, False, "pyramid", freenoise=True
    ).result[0]


def overriding(model, attention):
    patched = model.clone()
    patched.model_options["transformer_options"][OVERRIDE] = attention
    return patched


def sage(model):
    """A quantised attention, as KJNodes' node sets it: over whatever was there."""

    def attention(func, q, k, v, *args, **kwargs):
        # WanDancer attends to a picture of no tokens where it is given none
        if k.numel():
            scale = k.abs().amax().clamp(min=1e-6) / 127
            k = (k / scale).round() * scale
        return func(q, k, v, *args, **kwargs)

    return overriding(model, attention)


def sparse(model):
    """A block-sparse attention, as core's Model Sparse Attention keeps its own on top in every step."""
    installed = set()

    def over(previous):
        def attention(func, q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
            if mask is not None or skip_reshape or q.shape != k.shape or k.shape[1] < 4 * BLOCK:
                host = func if previous is None else partial(previous, func)
                return host(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, **kwargs)
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
            tail = -k.shape[2] % BLOCK
            means = F.pad(k, (0, 0, 0, tail)).unflatten(2, (-1, BLOCK)).mean(3)
            scores = F.pad(q, (0, 0, 0, tail)).unflatten(2, (-1, BLOCK)).mean(3) @ means.mT
            kept = torch.zeros_like(scores, dtype=torch.bool)
            # half of the key blocks, for every block of queries
            kept.scatter_(-1, scores.topk(-(-scores.shape[-1] // 2)).indices, True)
            mask = kept.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
            mask = mask[:, :, : q.shape[2], : k.shape[2]]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return out.transpose(1, 2).flatten(2)

        return attention

    def install(patcher, timestep, model_options, *args):
        options = model_options["transformer_options"]
        if options.get(OVERRIDE) not in installed:
            options[OVERRIDE] = over(options.get(OVERRIDE))
            installed.add(options[OVERRIDE])

    patched = model.clone()
    install(patched, None, patched.model_options)
    patched.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "sparse", install)
    return patched


def backend(model):
    """An attention function as core's Model Attention Backend sets it."""

    def rounded(q, k, v, heads, **kwargs):
        out = attention_pytorch(q.half().to(q), k.half().to(k), v.half().to(v), heads, **kwargs)
        return out * 0.9

    patched = model.clone()
    if hasattr(patched, "set_model_optimized_attention"):
        patched.set_model_optimized_attention(rounded)
        return patched
    return overriding(model, lambda func, *args, **kwargs: rounded(*args, **kwargs))


def compiled(model, keys=("diffusion_model",)):
    """As ComfyUI's own compile node does it: no guard sees a change of the options."""
    patched = model.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(patched, backend="eager", options=options, keys=list(keys))
    return patched


def compiled_blocks(model):
    """As KJNodes does it: every block by itself."""
    count = len(model.model.diffusion_model.blocks)
    return compiled(model, [f"diffusion_model.blocks.{i}" for i in range(count)])


def block_replaced(model):
    """Another pack's replacement of two blocks."""

    def replacement(args, extra):
        return {"img": extra["original_block"](args)["img"] * 1.5}

    patched = model.clone()
    for block in (0, 1):
        patched.set_model_patch_replace(replacement, "dit", "double_block", block)
    return patched


def residual(model):
    """A ControlNet's way: adds something of the video's length behind every second block."""

    def add(args):
        if args["block_index"] % 2 == 0:
            img = args["img"]
            places = torch.arange(img.shape[1] * img.shape[2]).view(1, *img.shape[1:])
            args["img"] = img + 0.2 * places.sin() * args["x"].std()
        return args

    patched = model.clone()
    patched.set_model_double_block_patch(add)
    return patched


def attention_patched(model):
    """InfiniteTalk's way: reshapes what the attention gives by latent frames."""

    def frames(args):
        x, grid = args["x"], args["transformer_options"].get("grid_sizes")
        if grid is None:
            # not every class of the host says it
            return x * 1.1
        size = grid[0] * grid[1] * grid[2]
        video = x[:, -size:].unflatten(1, tuple(grid))
        return torch.cat([x[:, :-size], (video * 1.1).flatten(1, 3)], 1)

    patched = model.clone()
    patched.set_model_patch(frames, "attn1_patch")
    return patched


def module_patched(model, part: str, forward):
    """A clone with another forward in a part of every block, as KJNodes' nodes put it there."""
    patched = model.clone()
    for index, block in enumerate(model.model.diffusion_model.blocks):
        method = MethodType(forward, getattr(block, part))
        patched.add_object_patch(f"diffusion_model.blocks.{index}.{part}.forward", method)
    return patched


def enhanced(model):
    """Enhance-A-Video: self-attention grows with what it sees along time."""

    def forward(self, x, freqs, *args, **kwargs):
        out = type(self).forward(self, x, freqs, *args, **kwargs)
        return out * (1 + 0.1 * self.q(x).std(1).mean())

    return module_patched(model, "self_attn", forward)


def nag_of_cross_attention(model):
    """Normalised attention guidance: cross-attention once more, with another prompt."""

    def forward(self, x, context, *args, **kwargs):
        wanted = type(self).forward(self, x, context, *args, **kwargs)
        unwanted = type(self).forward(self, x, context.flip(1) * 0.5, *args, **kwargs)
        return wanted * 1.5 - unwanted * 0.5

    return module_patched(model, "cross_attn", forward)


def chunked(model):
    """The feed-forward part in pieces along the tokens."""

    def forward(self, x):
        return torch.cat([type(self).forward(self, part) for part in x.chunk(2, 1)], 1)

    return module_patched(model, "ffn", forward)


def low_vram(model):
    """A LoRA on weights that stay in system memory and are moved for each use."""

    def little(executor, *args, **kwargs):
        patcher = args[0].model_patcher
        patcher.detach()
        patcher.patch_model(patcher.load_device, lowvram_model_memory=1)
        assert patcher.lowvram_patch_counter() >= 3
        try:
            return executor(*args, **kwargs)
        finally:
            patcher.detach()

    patched = lora(model)
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "low vram", little)
    return patched


class Packed(comfy.ops.manual_cast):
    """Weights as GGUF's: blocks of 8-bit numbers, made whole in every forward."""

    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *others):
            super()._load_from_state_dict(state_dict, prefix, *others)
            if self.in_features % 32 == 0:
                blocks = state_dict[prefix + "weight"].float().reshape(-1, 32)
                scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
                packed = (blocks / scale).round().to(torch.int8)
                self.register_buffer("scale", scale, persistent=False)
                self.weight = torch.nn.Parameter(packed, requires_grad=False)

        def forward(self, x):
            weight = self.weight
            if weight.dtype == torch.int8:
                weight = (weight * self.scale).view(self.out_features, self.in_features)
            return F.linear(x, weight.to(x), None if self.bias is None else self.bias.to(x))


def quantised(form: str) -> type:
    """The host's own layers for quantised files, which this makes of any file, some blocks of it.

    Args:
        form: as files name it; inputs are quantised, too.
    """
    operations = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32)
    said = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)

    class Linear(operations.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *others):
            if prefix.startswith(PACKED):
                name = f"{prefix}weight"
                weight, layout = state_dict.pop(name), QUANT_ALGOS[form]["comfy_tensor_layout"]
                packed = QuantizedTensor.from_float(weight, layout, scale="recalculate")
                state_dict |= packed.state_dict(name) | {f"{prefix}comfy_quant": said}
            super()._load_from_state_dict(state_dict, prefix, *others)

        def _forward(self, x, weight, bias):
            if form == "nvfp4" and isinstance(weight, QuantizedTensor):
                # a CPU multiplies no such numbers
                x, weight = x.dequantize(), weight.dequantize()
            return super()._forward(x, weight, bias)

    return type("Quantised", (operations,), {"Linear": Linear})


def two_gpus(model):
    """ComfyUI's split of a step's prompts over two devices; here both are the CPU."""
    patched = model.clone()
    other = patched.clone()
    other.load_device = DEVICES[1]

    def split(executor, model, conds, x_in, timestep, model_options):
        clones = dict(zip(DEVICES, (patched, other), strict=True))
        return executor(model, conds, x_in, timestep, {**model_options, "multigpu_clones": clones})

    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "gpus", split)
    return patched


# key of `matrix.NEIGHBOURS` -> what puts it on a MODEL
PUT = {
    "lora": lora,
    "lora_bypass": lora_bypass,
    "easycache": easycache,
    "lazycache": lazycache,
    "slg": slg,
    "slg_simple": slg_simple,
    "nag": nag,
    "nag_cross": nag_of_cross_attention,
    "chunked": chunked,
    "sage": sage,
    "sparse": sparse,
    "backend": backend,
    "compiled": compiled,
    "compiled_blocks": compiled_blocks,
    "windows": windows,
    "shift": shifted,
    "block": block_replaced,
    "residual": residual,
    "attention": attention_patched,
    "enhanced": enhanced,
    "low_vram": low_vram,
    "gpus": two_gpus,
}
# the others are ways to load a model -> options of the host's loader
LOADED = {
    "fp8": {"dtype": torch.float8_e4m3fn},
    "gguf": {"custom_operations": Packed},
    "int8": {"custom_operations": quantised("int8_tensorwise")},
    "nvfp4": {"custom_operations": quantised("nvfp4")},
}
