"""What of a run runs compiled, where a compile node stands in front of the model or its blocks.

A compile node's graphs may have been made with their guards on `transformer_options` left out, so
that nothing in them notices a plan. A step that computes all runs the host's graphs with options
that have nothing of ours. Other steps run the model as it is written, and its blocks compiled apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from comfy.patcher_extension import WrappersMP

from ...engine.apart import RECORDING, Apart, Tap
from ...engine.compiled import CAN_PAUSE, is_compiled, paused
from ...engine.record import Record

# where the host keeps how a model was compiled
ARGUMENTS = "torch_compile_kwargs"
TAKEN = ("backend", "mode", "options", "dynamic")
CANNOT_PAUSE = (
    "torch.compile: this version of PyTorch cannot leave it out of a run, and a compiled model may "
    "repeat an earlier run. Take off the compile node, or use PyTorch 2.6 or newer"
)
RECORDS = (
    "torch.compile: steps that leave something out were not compiled, because the backend "
    "'cudagraphs' would replay an earlier choice of tokens or blocks. Choose 'inductor' in the "
    "compile node"
)
NOT_ONE_GRAPH = (
    "torch.compile: blocks that leave something out or are looked into were not compiled, because "
    "PyTorch could not make one graph of them ({}). Compile the whole model instead of its blocks"
)
# by what it is for, the last used behind: a graph outlives the run that it was made in
MOST_APART = 4
_APART: dict[tuple, Apart] = {}


class Compiled:
    """The compiled model of a run.

    Attributes:
        whole: the host's compiled model; None when its blocks are compiled one by one.
    """

    def __init__(self, whole: torch.nn.Module | None, apart: Apart | None, record: Record):
        self.whole, self._apart, self._record = whole, apart, record

    def block(self, original: Callable, short: bool, tap: Tap | None) -> Callable:
        """The host's block as it is to run.

        Args:
            original: the host's closure around it.
            short: it gets a part of the tokens.
            tap: of its attention calls.
        """
        if self.whole is None and not short and tap is None:
            # compiled by the host, and run as it is
            return original
        apart = self._apart

        def run(args: dict) -> dict:
            if apart is None:
                with paused():
                    return original(args)
            # the first block is handed a view, which would need a graph of its own
            args = {**args, "img": args["img"].contiguous()}
            lengths = (args["img"], args["pe"]) if short else ()
            closed = self.whole is None and tap is not None
            out = apart(original, args, lengths=lengths, tap=tap, closed=closed)
            if closed and apart.broken is not None:
                self._record.note(NOT_ONE_GRAPH.format(apart.broken))
            return out

        return run


def compiled_of(
    dm: torch.nn.Module, latent: torch.Tensor, model_options: dict, record: Record
) -> Compiled | None:
    """What a model's compile node made of it, for videos like `latent`; None when there is none."""
    whole = is_compiled(dm)
    if not whole and not any(map(is_compiled, dm.blocks)):
        return None
    if not CAN_PAUSE:
        record.note(CANNOT_PAUSE)
        return None
    given = model_options.get(ARGUMENTS)
    given = {name: given[name] for name in TAKEN if name in given} if given else {}
    apart = None
    if given.get("backend") == RECORDING:
        record.note(RECORDS)
    else:
        key = (type(dm.blocks[0]), latent.shape[1:], *map(repr, given.items()))
        apart = _APART.pop(key, None) or Apart(**given)
        _APART[key] = apart
        while len(_APART) > MOST_APART:
            del _APART[next(iter(_APART))]
    return Compiled(dm if whole else None, apart, record)


def bare(options: dict, keys: tuple[str, ...]) -> dict | None:
    """The options as the untouched model gets them; None where another node wraps the model too."""
    wrappers = {
        kind: {key: given for key, given in around.items() if key not in keys and given}
        for kind, around in options.get("wrappers", {}).items()
    }
    if wrappers.get(WrappersMP.DIFFUSION_MODEL):
        return None
    own = {name: value for name, value in options.items() if name not in keys}
    return {**own, "wrappers": {kind: around for kind, around in wrappers.items() if around}}
