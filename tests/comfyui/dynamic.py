"""The host's own dynamic VRAM on a CPU: all but its device and its native library, stood in for.

Weights stay where they were loaded. A layer's own forward brings them into a page of memory that is
anybody's, and is overwritten, once the forward is done.
"""

from __future__ import annotations

import random
from contextlib import contextmanager

import comfy_aimdo.host_buffer
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import pytest
import torch
from safetensors import safe_open

import comfy.cli_args
import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.utils
from wantrim.nodes.blocks import _load

GPU, RAM = torch.device("cpu", 0), torch.device("cpu", 1)
# bytes of which no float is a number
OVERWRITTEN = 0xFF


class Stored(torch.nn.Parameter):
    """A weight that is not on the GPU: it can be copied there, and not be computed with."""

    device = property(lambda self: RAM)

    def detach(self):
        return Stored(self.data, requires_grad=False)

    def to(self, *args, device=None, **kwargs):
        moved = self.data.to(*args, **kwargs)
        return moved.clone() if device == GPU else Stored(moved, requires_grad=False)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            beside = any(type(given) is torch.Tensor and given.ndim for given in args)
            if beside and func is not torch.Tensor.copy_:
                raise RuntimeError(f"{func.__name__}: expected all tensors to be on one device")
            return func(*args, **(kwargs or {}))


class Pages:
    """The native library's memory of a model: what is in it may be gone at the next fault.

    Attributes:
        met: what faults came to, by name.
        pins: places that are in use right now.
    """

    def __init__(self, size: int, device):
        self.bytes = torch.full((size,), OVERWRITTEN, dtype=torch.uint8)
        self.met = {"fetched": 0, "resident": 0, "no room": 0}
        self.pins: list[int] = []
        self._sizes: dict[int, int] = {}
        # signatures of what is there, by place
        self._came: dict[int, bytes] = {}
        self._chance = random.Random(4)

    def alloc(self, size: int) -> tuple:
        place = sum(self._sizes.values())
        self._sizes[place] = size
        return self, place, size

    def prioritize(self) -> None:
        pass

    def loaded_size(self) -> int:
        return sum(self._sizes[place] for place in self._came)

    def free_memory(self, size: float) -> int:
        freed = self.loaded_size()
        for place in list(self._came):
            self._lose(place)
        return freed

    def fault(self, place: int) -> bytes | None:
        found = "resident" if place in self._came else "fetched"
        if found == "fetched" and self._chance.random() < 0.2:
            found = "no room"
        self.met[found] += 1
        if found == "no room":
            return None
        if found == "fetched":
            self._came[place] = self.met["fetched"].to_bytes(8, "little")
        self.pins.append(place)
        return self._came[place]

    def unpin(self, place: int) -> None:
        self.pins.remove(place)
        if place not in self.pins and self._chance.random() < 0.6:
            self._lose(place)

    def _lose(self, place: int) -> None:
        del self._came[place]
        self.bytes[place : place + self._sizes[place]] = OVERWRITTEN


class NoBuffer:
    """Pinned RAM that there is none of."""

    size = 0

    def __init__(self, *sizes):
        pass

    def truncate(self, size: int, **options) -> None:
        pass


def fault(place: tuple) -> bytes | None:
    return place[0].fault(place[1])


def unpin(place: tuple | None) -> None:
    if place is not None:
        place[0].unpin(place[1])


def as_tensor(place: tuple, device: torch.device) -> torch.Tensor:
    pages, first, size = place
    return pages.bytes[first : first + size]


@contextmanager
def dynamic_vram():
    """ComfyUI as it starts where dynamic VRAM is on; ends with nothing loaded."""
    library, management = comfy_aimdo.model_vbar, comfy.model_management
    management.unload_all_models()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.memory_management, "aimdo_enabled", True)
        patch.setattr(
            comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic
        )
        patch.setattr(comfy.cli_args.args, "disable_pinned_memory", True)
        patch.setattr(management, "is_device_cpu", lambda device: device == RAM)
        patch.setattr(management, "get_torch_device", lambda: GPU)
        patch.setattr(library, "ModelVBAR", Pages)
        patch.setattr(library, "vbar_fault", fault)
        patch.setattr(library, "vbar_unpin", unpin)
        patch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", as_tensor)
        patch.setattr(comfy_aimdo.host_buffer, "HostBuffer", NoBuffer)
        patch.setattr(comfy.utils, "load_safetensors", read)
        # a router read before is the ordinary patcher's
        _load.cache_clear()
        try:
            yield
        finally:
            management.unload_all_models()
            _load.cache_clear()


def read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def keep_apart(model):
    """A MODEL whose weights are where a GPU's forward cannot reach them by itself."""
    for module in model.model.modules():
        if hasattr(module, "comfy_cast_weights"):
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = Stored(weight.data, requires_grad=False)
    return model


def pages_of(model) -> Pages:
    """What became of a MODEL's weights so far."""
    return model.model.dynamic_vbars[GPU]
