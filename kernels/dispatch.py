"""Each kernel under its name: Triton's where it can run and agrees, else the torch reference.

`backend` is "auto" (Triton on a GPU that it was made for, else torch, and the log says why),
"torch", or "triton", which raises where it cannot run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache, partial, wraps
from importlib.util import find_spec

import torch

from . import reference
from .config import AMD, INTERPRETED, LEAST_CAPABILITY, Config, config_of

log = logging.getLogger(__name__)
BACKENDS = ("auto", "torch", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_HEAD_DIM = 128
# kernels whose tiles depend on the GPU
ATTENTION = ("token_mass", "frame_mass")
# what a kernel may differ from its reference by, as a share of the largest value
CLOSE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# why a kernel declined or was dropped, by what was asked of it; None where it agreed
_checked: dict[tuple, str | None] = {}
_said: set[tuple[str, str]] = set()


def _dispatched(name: str) -> Callable:
    """The function of this name that takes `backend` too; the kernel is chosen by its first tensor."""

    @wraps(getattr(reference, name))
    def run(tensor: torch.Tensor, *args, backend: str = "auto", **options):
        return _choose(name, backend, tensor)(tensor, *args, **options)

    return run


token_mass, frame_mass = _dispatched("token_mass"), _dispatched("frame_mass")
store_rows, join_rows = _dispatched("store_rows"), _dispatched("join_rows")


def why_not(name: str, tensor: torch.Tensor) -> str | None:
    """Why Triton's kernel `name` cannot take this tensor, or None."""
    # channels of a head
    size = tensor.shape[-1]
    if not installed():
        return "Triton is not installed"
    arch = _architecture(tensor.device)
    if arch is None:
        return f"the tensors are on {tensor.device.type}, which Triton has no compiler for"
    known = arch in AMD if isinstance(arch, str) else arch >= LEAST_CAPABILITY
    if not known:
        return f"no tiles are known for this GPU ({arch})"
    if tensor.dtype not in DTYPES:
        return f"{tensor.dtype} is none of bfloat16, float16, float32"
    if size > MOST_HEAD_DIM or size % 2:
        return f"heads of {size} channels are not even, or more than {MOST_HEAD_DIM}"
    if name in ATTENTION and config_of(arch, tensor.dtype) is None:
        return f"no tiles are known for {tensor.dtype} on this GPU ({arch})"
    return _check(name, tensor, size)


def _choose(name: str, backend: str, tensor: torch.Tensor) -> Callable:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch":
        return getattr(reference, name)
    interpreted = backend == "triton" and _interpreted()
    if backend == "auto" and tensor.device.type == "cpu":
        why = "the tensors are on the CPU"
    else:
        why = None if interpreted else why_not(name, tensor)
    if why is None:
        return _kernel(name, tensor)
    if backend == "triton":
        raise RuntimeError(
            f"{name}: backend 'triton' cannot run here: {why}; use 'auto' or 'torch'"
        )
    if (name, why) not in _said:
        _said.add((name, why))
        # no news on a computer without a GPU
        level = logging.DEBUG if tensor.device.type == "cpu" else logging.INFO
        log.log(level, "WanTrim: %s runs in torch: %s", name, why)
    return getattr(reference, name)


@cache
def installed() -> bool:
    """Whether Triton can be imported; another pack's stand-in for it is none."""
    try:
        return find_spec("triton") is not None
    except ValueError:
        return False


def _interpreted() -> bool:
    if not installed():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _architecture(device: torch.device) -> int | str | None:
    """Compute capability, such as 90, an AMD architecture's name, or None."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _kernel(name: str, tensor: torch.Tensor) -> Callable:
    """Triton's function of this name, with its tiles, for tensors where this one is."""
    # Triton has no wheels for Windows and macOS, and takes a while to import
    from . import attention, context

    if name not in ATTENTION:
        return _launched_on(tensor.device, getattr(context, name))
    arch = _architecture(tensor.device)
    config: Config = INTERPRETED if arch is None else config_of(arch, tensor.dtype)
    return _launched_on(tensor.device, partial(getattr(attention, name), config=config))


def _launched_on(device: torch.device, run: Callable) -> Callable:
    """A function whose kernels start on this GPU: Triton's start on the current one."""
    if device.type != "cuda":
        return run

    def there(*args, **options):
        with torch.cuda.device(device):
            return run(*args, **options)

    return there


def _check(name: str, tensor: torch.Tensor, size: int) -> str | None:
    """Compare the kernel with its reference once on a small input; why it is dropped, or None."""
    asked = (name, tensor.device, tensor.dtype, size)
    if asked in _checked:
        return _checked[asked]
    want = _try(getattr(reference, name), name, tensor, size)
    try:
        got = _try(_kernel(name, tensor), name, tensor, size)
        _checked[asked] = _difference(got, want, tensor.dtype)
    except Exception as error:
        # whatever a compiler or a driver raises, the reference can do the work
        _checked[asked] = f"it failed: {type(error).__name__}: {error}"
    if _checked[asked]:
        log.warning("WanTrim: Triton's kernel of %s is not used: %s", name, _checked[asked])
    return _checked[asked]


def _try(run: Callable, name: str, tensor: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """What a kernel or its reference makes of small inputs."""
    found = []
    for arguments, options in _small(name, tensor.device, tensor.dtype, size):
        result = run(*arguments, **options)
        # what is joined is put into the last argument
        result = arguments[-1] if name == "join_rows" else result
        found += result if isinstance(result, tuple) else (result,)
    return tuple(found)


def _small(name: str, device: torch.device, dtype: torch.dtype, size: int) -> list[tuple]:
    """Arguments and options to try a kernel with, small and awkward, the same every time."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    if name in ("store_rows", "join_rows"):
        return [_small_rows(name, draw, size, bits) for bits in (8, 4)]
    grid = (3, 7, 11)
    tokens = math.prod(grid)
    index = torch.arange(0, tokens, 3, device=device)
    options = {"exclude_radius": 1} if name == "token_mass" else {}
    q, k = draw(2, tokens + 5, 2, size), draw(2, tokens + 5, 2, size)
    return [((q, k, grid, index), {"start": 2, **options})]


def _small_rows(name: str, draw: Callable, size: int, bits: int) -> tuple:
    k, v = draw(2, 19, 3, size), draw(2, 19, 3, size)
    held = reference.store_rows(draw(2, 40, 3, size), draw(2, 40, 3, size), bits)
    index = torch.arange(0, 38, 2)
    index = torch.stack([index, index.flip(0) + 1]).to(k.device)
    if name == "store_rows":
        return (k, v, bits, held, index), {}
    return (k, v, held, index, bits, (draw(2, 38, 3, size), draw(2, 38, 3, size))), {}


def _difference(got, want, dtype: torch.dtype) -> str | None:
    """Why two results are not alike, or None."""
    for one, other in zip(got, want, strict=True):
        if not one.is_floating_point():
            if not torch.equal(one, other):
                return "its whole numbers are not those of the torch reference on a small input"
            continue
        off = (one.double() - other.double()).abs().max() / other.double().abs().max()
        # also true for NaN
        if not off <= CLOSE[dtype]:
            return (
                f"it differs from the torch reference by {float(off):.1e} of the largest value on "
                f"a small input, more than {CLOSE[dtype]:.0e}"
            )
    return None
