"""Slim checkpoints in ComfyUI: the host's own Wan classes, narrower, and LoRAs made for the full model.

The host builds its Wan with linears and norms of ours, whose sizes are the file's. LoRAs reach the
MODEL through the host's own nodes; before it is loaded for sampling, their rows and columns are cut
as those of the weights were.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import torch

import comfy.ops
import comfy.sd
import comfy.utils
from comfy.patcher_extension import CallbacksMP
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase

from ...slim.cut import Cut, find_cut, take
from ...slim.file import PREFIX, SlimHeader, read_header

KEY = "wantrim_slim"
MODEL_PREFIX = "diffusion_model."
BYPASS = "bypass_lora"
DTYPES = {"default": None, "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def load_slim(path: str, weight_dtype: str = "default", disable_dynamic: bool = False):
    """The MODEL of a slim file.

    Args:
        weight_dtype: name in `DTYPES`.
    """
    header = read_header(Path(path))
    loaded = comfy.utils.load_torch_file(path)
    kept = set(header.kept())
    weights = {
        name.removeprefix(PREFIX): loaded.pop(name) for name in list(loaded) if name not in kept
    }
    options = {"custom_operations": operations(header)}
    if DTYPES[weight_dtype] is not None:
        options["dtype"] = DTYPES[weight_dtype]
    metadata = {"config": json.dumps({"transformer": header.transformer})}
    given, name = set(weights), Path(path).name
    again = "damaged file. Make it again with WanTrim Slim."
    try:
        model = comfy.sd.load_diffusion_model_state_dict(
            weights, model_options=options, metadata=metadata, disable_dynamic=disable_dynamic
        )
    except torch.OutOfMemoryError:
        raise
    # what the host makes of weights that do not go together
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        said = f"its weights do not fit together ({str(error):.300})"
        raise ValueError(f"{name}: {said}: {again}") from error
    if model is None:
        raise ValueError(
            f"{name}: this ComfyUI knows no Wan model with these weights. Update ComfyUI."
        )
    # the host goes on without them, with whatever is in memory
    missing = sorted(model.model.diffusion_model.state_dict().keys() - given)
    if missing:
        raise ValueError(f"{name}: {', '.join(missing)[:200]}: missing: {again}")
    # several GPUs and torch.compile build the model anew
    model.cached_patcher_init = (load_slim, (path, weight_dtype))
    for index, block in enumerate(model.model.diffusion_model.blocks):
        block.self_attn.num_heads = len(header.width.self_heads[index])
        block.cross_attn.num_heads = len(header.width.cross_heads[index])
    model.set_attachments(KEY, header)
    model.add_callback_with_key(CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES, KEY, _before_loading)
    return model


def slim_header(model) -> SlimHeader | None:
    """What a MODEL's slim file said, or None when it is no slim model."""
    return model.get_attachment(KEY)


def refuse_slim(model, node: str) -> None:
    """Refuse a slim MODEL at a node that needs every head."""
    if slim_header(model) is not None:
        raise ValueError(
            f"{node}: the input 'model' expects a full Wan model, but got a slim one, whose heads "
            "are cut already. Use this node on the full model, or remove it."
        )


def operations(header: SlimHeader) -> type[comfy.ops.manual_cast]:
    """The host's layers with the sizes of a slim file where it is cut."""

    class Sized:
        """A layer that takes its size when it is loaded; until then it has no weights."""

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
            assigned = local_metadata.get("assign_to_params_buffers", False)
            for leaf, full in self.full_sizes().items():
                shape, cut = list(full), find_cut(prefix + leaf)
                if cut is not None:
                    shape[cut.axis] = len(cut.index(header.width, header.model.head_dim))
                empty = getattr(self, leaf)
                device = "meta" if assigned else empty.device
                made = torch.empty(shape, dtype=empty.dtype, device=device)
                setattr(self, leaf, torch.nn.Parameter(made, requires_grad=False))
            self.resize()
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

        def _empty(self, device, dtype) -> torch.nn.Parameter:
            made = torch.empty(0, device=device, dtype=dtype)
            return torch.nn.Parameter(made, requires_grad=False)

    class Linear(Sized, comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            # the base class would allocate the full model first
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.full = (out_features, in_features)
            self.weight = self._empty(device, dtype)
            self.bias = self._empty(device, dtype) if bias else None

        def full_sizes(self) -> dict[str, tuple[int, ...]]:
            sizes = {"weight": self.full, "bias": self.full[:1]}
            return {leaf: size for leaf, size in sizes.items() if getattr(self, leaf) is not None}

        def resize(self) -> None:
            self.out_features, self.in_features = self.weight.shape

    class RMSNorm(Sized, comfy.ops.manual_cast.RMSNorm):
        def full_sizes(self) -> dict[str, tuple[int, ...]]:
            return {} if self.weight is None else {"weight": tuple(self.normalized_shape)}

        def resize(self) -> None:
            if self.weight is not None:
                self.normalized_shape = tuple(self.weight.shape)

    return type("SlimOperations", (comfy.ops.manual_cast,), {"Linear": Linear, "RMSNorm": RMSNorm})


def _before_loading(model, hooks, target_dict, model_options, registered) -> None:
    """Cut what was patched onto the MODEL; every guider asks for it before the model is loaded."""
    header = slim_header(model)
    if header is None:
        return
    if BYPASS in model.injections:
        raise ValueError(
            "WanTrim Load Slim: the node Load LoRA (Bypass) puts a LoRA beside the weights, where it "
            "cannot be cut to a slim model. Use Load LoRA instead."
        )
    problems: list[str] = []
    if _cut_all(model.patches, header, problems):
        # not loaded again otherwise, when it was loaded with the patches as they were; the same
        # patches stay the same on every clone
        model.patches_uuid = uuid.uuid5(model.patches_uuid, KEY)
    for patches in model.hook_patches.values():
        _cut_all(patches, header, problems)
    if problems:
        shown = ", ".join(problems[:4]) + (" ..." if len(problems) > 4 else "")
        raise ValueError(
            f"WanTrim Load Slim: a LoRA on this model cannot be cut to its {len(problems)} narrower "
            f"weights: {shown}. Plain LoRAs (up and down) and weight differences can; put this one "
            "on the full model, or take it off."
        )


def _cut_all(patches: dict[str, list], header: SlimHeader, problems: list[str]) -> bool:
    """Cut the patches of a MODEL in place; says whether any was full-size."""
    changed = False
    for key, entries in patches.items():
        cut = find_cut(key.removeprefix(MODEL_PREFIX))
        if cut is None:
            continue
        narrow = []
        for strength, patch, strength_model, offset, function in entries:
            try:
                if offset is not None:
                    raise _Uncuttable("a part of a weight")
                made = _cut_patch(patch, cut, header)
            except _Uncuttable as reason:
                problems.append(f"{key.removeprefix(MODEL_PREFIX)} ({reason})")
                made = patch
            changed |= made is not patch
            narrow.append((strength, made, strength_model, offset, function))
        patches[key] = narrow
    return changed


class _Uncuttable(Exception):
    """Says what came instead of something that can be cut."""


def _cut_patch(patch, cut: Cut, header: SlimHeader):
    """One patch with the rows or columns that the model keeps; itself when it fits already."""
    index = cut.index(header.width, header.model.head_dim)
    full = cut.size(header.model)
    if len(index) == full:
        return patch

    def narrow(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        if tensor.ndim <= axis or tensor.shape[axis] not in (full, len(index)):
            raise _Uncuttable(
                f"expected {full} of its axis {axis}, got shape {tuple(tensor.shape)}"
            )
        return tensor if tensor.shape[axis] == len(index) else take(tensor, axis, index)

    if isinstance(patch, WeightAdapterBase):
        if type(patch) is not LoRAAdapter:
            raise _Uncuttable(patch.name)
        up, down, alpha, mid, dora_scale, reshape = patch.weights
        if dora_scale is not None or reshape is not None:
            raise _Uncuttable("DoRA" if dora_scale is not None else "a LoRA that changes sizes")
        cut_up, cut_down = (narrow(up, 0), down) if cut.axis == 0 else (up, narrow(down, 1))
        if cut_up is up and cut_down is down:
            return patch
        return LoRAAdapter(patch.loaded_keys, (cut_up, cut_down, alpha, mid, None, None))
    if not isinstance(patch, tuple) or not patch:
        raise _Uncuttable("a merged model")
    kind, values = patch if len(patch) == 2 else ("diff", patch)
    if kind not in ("diff", "set", "model_as_lora"):
        raise _Uncuttable(str(kind))
    if len(values) > 1 and values[1].get("pad_weight"):
        raise _Uncuttable("a LoRA that changes sizes")
    made = narrow(values[0], cut.axis)
    if made is values[0]:
        return patch
    scale = header.scale(cut.name, cut.block) if cut.leaf == "weight" else 1.0
    # a difference of the full model's norm has to follow its rescaling
    made = made if scale == 1.0 else made * scale
    return (kind, (made, *values[1:]))
