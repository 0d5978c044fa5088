"""What a sampling run remembers of its earlier steps."""

from __future__ import annotations

from collections.abc import Collection, Hashable

import torch

from ..methods.grid import TokenGrid
from ..methods.tokens import Selection
from .compiled import outside_graphs

# which call of its step it is, and the block or blocks of a stretch
Key = tuple[Hashable, Hashable]


@outside_graphs
class Past:
    """Velocities, ages and updates of the tokens in one part of a sampling run.

    Attributes:
        ages: per choosing block, choices in a row that left each token out, int64 [b, tokens].
        sigma: of the last step that used it.
        knew_change: whether the change of the velocity was ever known.
        lasting: whether any step so far left something for later ones to repeat.
    """

    def __init__(self):
        self.ages: dict[int, torch.Tensor] = {}
        self.sigma: float | None = None
        self.knew_change = False
        self.lasting = False
        self._kept: dict[Key, torch.Tensor] = {}
        self._used: set[Key] = set()
        self._point: tuple[float, torch.Tensor] | None = None
        self._velocity: torch.Tensor | None = None

    def see(
        self, sigma: float, latent: torch.Tensor, grid: TokenGrid, patch_frames: int, trimmed: bool
    ) -> torch.Tensor | None:
        """Take in a new step's latent [b, c, f, h, w].

        The path between two steps is taken for a straight line. Samplers that add noise on the way
        (LCM, SDE) give the change of that noise as well.

        Args:
            patch_frames: latent frames in a token.

        Returns:
            How much the velocity changed between the last two steps, as mean size per token
            [b, tokens]; None while fewer than three steps of one size were seen.
        """
        self.sigma = sigma
        # what the last step had no use for belongs to prompts or a layout that are gone; in a step
        # that another node's cache answered nothing was of use
        if self._used:
            self._kept = {key: value for key, value in self._kept.items() if key in self._used}
            self._used.clear()
        if not trimmed:
            self.ages.clear()
        last, old = self._point, self._velocity
        if last is not None and last[0] == sigma:
            # a two-call sampler comes back to a sigma with another latent
            return None
        self._point, self._velocity = (sigma, latent), None
        if last is None or last[1].shape != latent.shape:
            return None
        self._velocity = (latent.float() - last[1].float()) / (sigma - last[0])
        if old is None:
            return None
        self.knew_change = True
        change = (self._velocity - old).abs().mean(1)
        frames = -(-change.shape[1] // patch_frames)
        size = (min(frames, grid.frames), grid.height, grid.width)
        tokens = torch.nn.functional.adaptive_avg_pool3d(change, size).flatten(1)
        # reference frames behind the video never change
        return torch.nn.functional.pad(tokens, (0, grid.tokens - tokens.shape[1]))

    def chose(self, block_index: int, selection: Selection, grid: TokenGrid) -> None:
        """Count how long each token has been left out after the choices of this block."""
        age = self.ages.get(block_index)
        if age is None or age.shape != (len(selection.index), grid.tokens):
            age = torch.zeros(
                len(selection.index), grid.tokens, dtype=torch.int64, device=selection.index.device
            )
        dropped = torch.zeros_like(age, dtype=torch.bool)
        dropped.scatter_(1, selection.dropped - grid.start, True)
        self.ages[block_index] = torch.where(dropped, age + 1, 0)

    def recall(self, key: Key, like: torch.Tensor) -> torch.Tensor | None:
        """What was remembered under `key`, unless the call's layout changed since."""
        self._used.add(key)
        known = self._kept.get(key)
        same = known is not None and known.shape == like.shape and known.device == like.device
        return known if same else None

    def retain(self, identity: Hashable, pieces: Collection[tuple[int, int]]) -> None:
        """Of the stretches of blocks of one call, let go of all but `pieces`, and keep those."""
        self._used.update((identity, piece) for piece in pieces)
        for key in [k for k in self._kept if k[0] == identity and isinstance(k[1], tuple)]:
            if key[1] not in pieces:
                del self._kept[key]

    def remember(self, key: Key, value: torch.Tensor) -> None:
        """Keep a full-length tensor for the step that follows."""
        self._used.add(key)
        self._kept[key] = value

    def forget(self, key: Key) -> None:
        """Let go of what was remembered under `key`."""
        self._kept.pop(key, None)

    def clear(self) -> None:
        """Let go of everything."""
        self.ages.clear()
        self._kept.clear()
        self._point = self._velocity = None
