"""Every model call of a run: what it was asked, what each block computed, and what the host got."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakSet

import torch

from comfy.patcher_extension import WrappersMP
from wantrim.hosts.comfyui import blocks


@dataclass
class Pass:
    """One model call.

    Args:
        roles: 0 is positive, 1 negative, of each chunk of the batch.
        prompts: the host's names of the chunks' prompts.
        latent, velocity: [b, c, f, h, w], what the host gave and got.
        tokens: that each block computed, of those that ran.
        before, after: hidden states [b, s, c] around the blocks that WanTrim ran.
        dropped: bool [b, s], what no block behind the choice computed.
    """

    sigma: float
    roles: list[int]
    prompts: list
    latent: torch.Tensor
    velocity: torch.Tensor | None = None
    tokens: dict[int, int] = field(default_factory=dict)
    before: dict[int, torch.Tensor] = field(default_factory=dict)
    after: dict[int, torch.Tensor] = field(default_factory=dict)
    dropped: torch.Tensor | None = None

    @property
    def each(self) -> dict:
        """The velocity of each prompt, by its role and name; the last chunk of two alike."""
        parts = self.velocity.chunk(len(self.roles))
        return dict(zip(zip(self.roles, self.prompts, strict=True), parts, strict=True))


# the calls that run now, the innermost last
_running: list[Pass] = []
_hooked: WeakSet = WeakSet()


def observed(model) -> tuple[object, list[Pass]]:
    """A clone of a MODEL whose calls are noted, in front of all that is put on it later."""
    network = model.model.diffusion_model
    if network not in _hooked:
        _hooked.add(network)
        for index, block in enumerate(network.blocks):
            block.ffn.register_forward_pre_hook(lambda m, args, i=index: _computed(i, args[0]))
    passes: list[Pass] = []

    def note(executor, x, *args, **kwargs):
        options = args[-1]
        sigma, roles = float(options["sigmas"].max()), list(options["cond_or_uncond"])
        latent = x[:, : network.out_dim].clone()
        passes.append(Pass(sigma, roles, list(options["uuids"]), latent))
        _running.append(passes[-1])
        try:
            out = executor(x, *args, **kwargs)
        finally:
            _running.pop()
        passes[-1].velocity = out.clone()
        return out

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "observed", note)
    return clone, passes


def _computed(index: int, hidden: torch.Tensor) -> None:
    if _running:
        _running[-1].tokens[index] = hidden.shape[1]


def look_inside(monkeypatch) -> None:
    """Notes in observed calls the hidden states too, where WanTrim runs the blocks."""
    run = blocks.BlockReplacement.__call__

    def noted(self, args, extra):
        seen = _running[-1]
        seen.before[self.index] = args["img"].clone()
        out = run(self, args, extra)
        seen.after[self.index] = out["img"].clone()
        current = self.call.current
        if current is not None:
            lost = torch.zeros(len(current.index), current.length, dtype=torch.bool)
            lost.scatter_(1, current.dropped, True)
            seen.dropped = lost.repeat(len(self.call.keys), 1)
        return out

    monkeypatch.setattr(blocks.BlockReplacement, "__call__", noted)


def full_length(model):
    """A clone of a MODEL with a patch behind the blocks that does nothing but look."""
    clone = model.clone()
    clone.set_model_double_block_patch(lambda args: args)
    return clone


def lost_places(seen: Pass, start: int = 0) -> torch.Tensor:
    """Where a call computed nothing, bool [b, 1, f, h, w] of the latent.

    Args:
        start: tokens in front of the video.
    """
    frames, height, width = seen.latent.shape[2:]
    video = seen.dropped[:, start : start + frames * height * width // 4]
    places = video.view(-1, frames, height // 2, width // 2)
    return places.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None]
