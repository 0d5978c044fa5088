"""What would wait for a GPU, counted on a CPU."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Stream:
    """Of a GPU, or an event of it: only what the program waits for is counted."""

    def __init__(self, seen: list[str]):
        self.seen = seen

    def record_event(self):
        return self

    def wait_event(self, event):
        pass

    wait_stream = wait_event

    def synchronize(self):
        self.seen.append("synchronize")


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
            if name == "copy_" and blocking and any(getattr(t, "in_ram", False) for t in args[:2]):
                self.seen.append("copy")
            down = name == "cpu"
            if down and on_device(args[0]):
                self.seen.append(name)
                out = func(*args, **kwargs).clone()
                del out.on_device
                return out
            if name == "to" and moves and blocking and not on_device(args[0]):
                self.seen.append("upload")
        return func(*args, **kwargs)
