"""Every hidden state of a trimmed run, as the session's blocks take and give it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from wantrim.engine.call import Call
from wantrim.hosts.comfyui import blocks
from wantrim.tests.comfyui import tiny


@dataclass
class Pass:
    """One model call: hidden states [b, s, c] around each block, and what the call kept."""

    call: ModelCall
    # its prompts, as the blocks see them
    text: torch.Tensor
    before: dict[int, torch.Tensor] = field(default_factory=dict)
    after: dict[int, torch.Tensor] = field(default_factory=dict)
    # [b, s], the tokens that no block of the call should compute
    dropped: torch.Tensor | None = None

    @property
    def own(self) -> torch.Tensor:
        """What all blocks together did to each token, without what came in between them."""
        return sum(self.after[block] - self.before[block] for block in self.before)

    @property
    def between(self) -> torch.Tensor:
        """What the host added between the blocks."""
        pairs = range(1, len(self.before))
        return sum(self.before[block] - self.after[block - 1] for block in pairs)


def record(monkeypatch) -> list[Pass]:
    """Notes every trimmed model call from now on, in order."""
    passes: list[Pass] = []
    run = blocks.BlockReplacement.__call__

    def noted(self, args, extra):
        if not passes or passes[-1].call is not self.call:
            passes.append(Pass(self.call, args["txt"]))
        seen = passes[-1]
        seen.before[self.index] = args["img"].clone()
        out = run(self, args, extra)
        seen.after[self.index] = out["img"].clone()
        if self.call.current is not None:
            length = args["img"].shape[1]
            lost = torch.zeros(len(args["img"]), length, dtype=torch.bool)
            seen.dropped = lost.scatter_(1, self.call.current.dropped_rows(self.call.chunks), True)
        return out

    monkeypatch.setattr(blocks.BlockReplacement, "__call__", noted)
    return passes


def check_updates(passes: list[Pass], per_step: int, atol: float = 1e-4) -> None:
    """Each dropped token must get its own last update, the computed ones new updates.

    Args:
        per_step: model calls of a step; each has a memory of its own.
    """
    assert len(passes) % per_step == 0 and len(passes) >= 3 * per_step
    known: dict[int, torch.Tensor] = {}
    for number, seen in enumerate(passes):
        assert sorted(seen.before) == list(range(tiny.LAYERS))
        own, part = seen.own, number % per_step
        if part in known:
            # a quarter of the tokens at least, or the rest says little
            assert seen.dropped.float().mean() > 0.15
            assert torch.allclose(own[seen.dropped], known[part][seen.dropped], atol=atol)
            moved = (own - known[part])[~seen.dropped].abs().amax(-1)
            assert moved.median() > 100 * atol
            # nothing happens to a dropped token until the last block
            for block in range(tiny.LAYERS - 1):
                same = seen.after[block][seen.dropped] == seen.before[block][seen.dropped]
                assert same.all()
        known[part] = own
