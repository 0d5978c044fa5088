"""What a sampling run remembers of its earlier steps, by part of the video and by prompt.

By prompt and never by how the host happened to batch: batched to split in mid-run changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from ..kernels import join_rows
from ..methods.carry import carried, explain, persistence
from ..methods.grid import TokenGrid
from ..methods.shares import expected_error, held_by_most, token_change
from .compiled import outside_graphs
from .context import Context, ContextInRam, Lane, Room

# share of a path's square that guidance and multi-step samplers do not explain: above it there was
# noise added
STRAYED = 0.5
# sigmas that differ by less are one, rounded twice
ROUNDING = 1e-5


@dataclass
class Prompt:
    """What one prompt got last.

    Args:
        velocity: [b, c, f, h, w], each token's when it was last computed.
        clean: the video that it pointed at [b, c, f, h, w].
        sigma: at which something was last computed.
        since: sigma at which each token was, [b, 1, f, h, w] or of less sizes.
        turn: how each token's velocity changed then, fp32 [b, c, f, h, w]; None is not known.
        gap: from how far above `since`, like it.
        foretold: what `turn` would be, had the one before it gone on, where the last call computed;
            None is nothing to learn from.
        context: keys and values of every block, of all tokens; None is of none.
    """

    velocity: torch.Tensor | None = None
    clean: torch.Tensor | None = None
    sigma: float = math.inf
    since: torch.Tensor | None = None
    turn: torch.Tensor | None = None
    gap: torch.Tensor | None = None
    foretold: torch.Tensor | None = None
    context: Context | ContextInRam | None = None

    def at(self, sigma: float, persistence: torch.Tensor | None) -> torch.Tensor:
        """The velocity at a sigma where it is not computed [b, c, f, h, w]."""
        if self.turn is None or persistence is None:
            return self.velocity
        reach = carried(persistence, (self.since - sigma) / self.gap)
        return torch.addcmul(self.velocity.float(), self.turn, reach).to(self.velocity.dtype)

    def take(self, velocity: torch.Tensor, sigma: float, mask: torch.Tensor | None) -> None:
        """Take in a velocity [b, c, f, h, w] that was computed where `mask` [b, 1, f, h, w] is set."""
        before, self.sigma = self.sigma, sigma
        since = velocity.new_full((len(velocity), 1, 1, 1, 1), sigma, dtype=torch.float32)
        if mask is not None:
            velocity = torch.where(mask, velocity, self.velocity)
            since = torch.where(mask, since, self.since)
        old, self.velocity = self.velocity, velocity
        self.foretold = None
        if old is None or sigma > before:
            # the sampler went back: another path
            self.turn = None
        elif sigma < before:
            self._turned(velocity.float() - old.float(), self.since - since, mask)
        self.since = since

    def _turned(self, turn: torch.Tensor, gap: torch.Tensor, mask: torch.Tensor | None) -> None:
        if self.turn is not None:
            self.foretold = self.turn * (gap / self.gap)
        if mask is not None:
            known = self.turn is not None
            turn = torch.where(mask, turn, self.turn if known else 0.0)
            gap = torch.where(mask, gap, self.gap if known else 1.0)
        self.turn, self.gap = turn, gap

    @property
    def blocks(self) -> dict[int, object]:
        """Keys and values, by block."""
        return {} if self.context is None else self.context.blocks

    def forget_context(self) -> None:
        if self.context is not None:
            self.context.clear()
            self.context = None


@outside_graphs
class Part:
    """A part of the video that is sampled apart: all of it, or a context window.

    Args:
        lane: of all parts of a run; None makes one.

    Attributes:
        sigma, latent: of the last step that used it.
        seen: steps that computed something.
        change: squared change of each token's velocity when last seen [b, tokens], or None.
        age: steps in a row that each token was left out [b, tokens], or None.
        all_seen: whether the last step that computed anything computed all.
        noisy: whether the sampler adds noise between steps.
        persistence: how far changes of the velocity go on [b, 1, 1, 1, 1]; None is not known.
    """

    def __init__(self, room: Room, lane: Lane | None = None):
        self.room, self.lane = room, lane or Lane()
        self.prompts: dict[Hashable, Prompt] = {}
        self.sigma: float | None = None
        self.latent: torch.Tensor | None = None
        self.seen = 0
        self.change: torch.Tensor | None = None
        self.age: torch.Tensor | None = None
        self.all_seen = False
        self.noisy = False
        self.persistence: torch.Tensor | None = None
        # prompts of the last step
        self._last: list[Hashable] = []
        # of what each prompt gave, how much the sampler went along
        self._mix: dict[Hashable, torch.Tensor] = {}
        # squared way of the latent in the last step
        self._moved: torch.Tensor | None = None
        # these, and the persistence, as a call found them: they count when it begins a step
        self._found: tuple[dict, torch.Tensor | None, torch.Tensor | None] = ({}, None, None)

    def fits(self, latent: torch.Tensor) -> bool:
        """Whether what is remembered is of a latent like this one [b, c, f, h, w]."""
        last = self.latent
        return last is None or (last.shape == latent.shape and last.device == latent.device)

    def look(
        self, sigma: torch.Tensor, latent: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What a call at this sigma, with this latent [b, c, f, h, w], tells of the step before.

        Between two steps a sampler goes along a mix of its prompts' velocities, as
        v_uncond + g * (v_cond - v_uncond) for some g, and of how these changed where it looks back
        at earlier steps, or adds noise. Changes are seen in that mix: guidance makes more of what the
        prompts do not share, and that goes on less.

        Returns:
            Share of the squared path that no mix explains; while sigma is that of the last step, how
            much the latent moved, of how much it did in that one. And the persistence of changes,
            where the step computed something that tells. Nothing counts before `begin`.
        """
        self._found = {}, None, self._moved
        if self.latent is None or not self._last or not self.known(self._last):
            return None, None
        last = [self.prompts[key] for key in self._last]
        first, *others = (one.at(self.sigma, self.persistence).float() for one in last)
        moved = latent.float() - self.latent.float()
        again = (sigma - self.sigma).abs() < ROUNDING
        # what the sampler holds still says nothing of where it goes
        went = moved != 0
        path = moved / torch.where(again, torch.nan, sigma - self.sigma)
        ways = [other - first for other in others]
        ways += [one.turn for one in last if one.turn is not None]
        parts, rest = explain((path - first) * went, [way * went for way in ways])
        mix = self._mixed(parts[: len(others)], path, went.any())
        told = None
        if all(one.foretold is not None for one in last):
            pairs = list(zip(last, mix.values(), strict=True))
            foretold = sum(one.foretold * by for one, by in pairs)
            told = persistence(foretold, sum(one.turn * by for one, by in pairs))
        size = moved.square().sum()
        strayed = rest.square().sum() / path.square().sum().clamp(min=1e-12)
        before = size.new_full((), torch.nan) if self._moved is None else self._moved
        self._found = mix, told, torch.where(again, before, size)
        return torch.where(again, size / before.clamp(min=1e-12), strayed), told

    def _mixed(self, parts: list[torch.Tensor], path, went) -> dict[Hashable, torch.Tensor]:
        """How much of each prompt of the last step there is in a path, from those of all but the first."""
        if not parts:
            return {self._last[0]: path.new_ones(())}
        # two calls at one sigma, as heun makes them, tell nothing of it
        known = torch.stack(parts).isfinite().all() & went
        mix = zip(self._last, (1.0 - sum(parts), *parts), strict=True)
        return {key: torch.where(known, by, self._mix.get(key, by)) for key, by in mix}

    def begin(self, sigma: float, latent: torch.Tensor) -> None:
        """A step begins, or goes on, at this sigma with this latent [b, c, f, h, w]."""
        mix, told, self._moved = self._found
        self._mix |= mix
        if told is not None:
            self.persistence = told
            for key in self._last:
                self.prompts[key].foretold = None
        self._found = {}, None, self._moved
        if self.sigma != sigma:
            self._last = []
        self.sigma, self.latent = sigma, latent

    def known(self, keys) -> bool:
        """Whether every prompt has a velocity to repeat."""
        return all(key in self.prompts and self.prompts[key].velocity is not None for key in keys)

    def has_context(self, keys, block: int | None = None) -> bool:
        """Whether every prompt has keys and values of a block; None is of any at all."""
        held = [self.prompts[key].blocks if key in self.prompts else {} for key in keys]
        return all(bool(blocks) if block is None else block in blocks for blocks in held)

    def repeat(self, key: Hashable, sigma: float, latent: torch.Tensor) -> torch.Tensor:
        """The velocity of a prompt that is not computed at this sigma, for this latent.

        It goes on as it changed last (methods/carry.py). Where the sampler adds noise the velocity
        points at another noise every time; there the video that it pointed at is repeated, which is the same thing on a straight path.
        """
        prompt = self.prompts[key]
        self._came(key)
        if not self.noisy:
            return prompt.at(sigma, self.persistence)
        away = (latent.float() - prompt.clean.float()) / max(sigma, 1e-6)
        return away.to(prompt.velocity.dtype)

    def remember(
        self,
        key: Hashable,
        velocity: torch.Tensor,
        sigma: float,
        latent: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Take in what a prompt got; returns it with the repeated velocity where it is not computed.

        Args:
            velocity, latent: [b, c, f, h, w].
            mask: bool [b, 1, f, h, w], where it was computed; None is everywhere.
        """
        prompt = self.prompts.setdefault(key, Prompt())
        clean = latent.to(velocity) - sigma * velocity
        if mask is None:
            self._came(key)
            # the host may go on in place
            said = velocity = velocity.clone()
        else:
            said = torch.where(mask, velocity, self.repeat(key, sigma, latent))
            clean = torch.where(mask, clean, prompt.clean)
        prompt.clean = clean
        prompt.take(velocity, sigma, mask)
        return said

    def _came(self, key: Hashable) -> None:
        if key not in self._last:
            self._last.append(key)

    def saw(self, change: torch.Tensor | None, kept: torch.Tensor | None) -> None:
        """Take in how the deciding prompt's velocity changed.

        Args:
            change: squared change of each token [b, tokens]; None while there is nothing to compare.
            kept: bool [b, tokens], the tokens that were computed; None is all.
        """
        self.seen += 1
        self.all_seen = kept is None
        if change is None:
            return
        if kept is None or self.change is None or self.change.shape != change.shape:
            self.change, self.age = change, torch.zeros_like(change)
        else:
            self.change = torch.where(kept, change, self.change)
            self.age = torch.where(kept, 0.0, self.age + 1)

    def skipped(self) -> None:
        """A step repeated everything."""
        if self.age is not None:
            self.age = self.age + 1

    def held(self) -> torch.Tensor | None:
        """Share of the change that a whole step saw in each of TRIED of the tokens, or None."""
        return held_by_most(self.change) if self.all_seen and self.change is not None else None

    def worth(self, grid: TokenGrid) -> torch.Tensor | None:
        """What computing each token is expected to save [b, tokens], or None."""
        if self.change is None or self.change.shape[1] != grid.tokens:
            return None
        return expected_error(self.change, self.age)

    def write(self, keys, block: int, k, v, index: torch.Tensor | None) -> None:
        """Remember keys and values [b, s, n, d] of the rows of `keys`, or of some tokens anew.

        Args:
            index: int64 [b, s], the tokens' positions; None is all.
        """
        self.lane.expect(len(keys))
        places = [None] * len(keys) if index is None else index.chunk(len(keys))
        chunks = k.chunk(len(keys)), v.chunk(len(keys)), places
        for key, own_k, own_v, at in zip(keys, *chunks, strict=True):
            prompt = self.prompts.setdefault(key, Prompt())
            if prompt.context is None:
                near, bits = self.room.device is None, self.room.bits
                prompt.context = Context(bits) if near else ContextInRam(bits, self.lane)
            prompt.context.write(block, own_k, own_v, at)

    def join(
        self, keys, block: int, k, v, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [b, s, n, d], and behind them the remembered ones of tokens `index` [b, m]."""
        self.lane.expect(len(keys))
        size = (len(k), k.shape[1] + index.shape[1], *k.shape[2:])
        out = k.new_empty(size), v.new_empty(size)
        chunks = (t.chunk(len(keys)) for t in (k, v, index, *out))
        for key, own_k, own_v, at, out_k, out_v in zip(keys, *chunks, strict=True):
            held = self.prompts[key].context.read(block)
            join_rows(own_k, own_v, held, at, self.room.bits, (out_k, out_v))
        return out

    @property
    def holds_context(self) -> bool:
        """Whether keys and values of any block are there."""
        return any(prompt.blocks for prompt in self.prompts.values())

    def forget_context(self) -> None:
        """Let go of all keys and values."""
        for prompt in self.prompts.values():
            prompt.forget_context()

    def clear(self) -> None:
        """Let go of everything."""
        self.forget_context()
        self.prompts.clear()
        self.change = self.age = self.persistence = self.latent = self._moved = None
        self.all_seen = False
        self._last, self._mix, self._found, self.seen = [], {}, ({}, None, None), 0


class Memory:
    """All parts of a run's video."""

    def __init__(self):
        self.parts: dict[Hashable, Part] = {}
        self.room, self._lane = Room(), Lane()
        # there was no room for keys and values
        self.lost = False

    def part(self, window: Hashable, last: float | None, sigma: float) -> Part:
        """The part of a window; parts that this step and the last one left alone go."""
        if last != sigma:
            recent = {last, sigma}
            for key in [k for k, part in self.parts.items() if part.sigma not in recent]:
                self.parts.pop(key).clear()
        part = self.parts.setdefault(window, Part(self.room, self._lane))
        if not (self.lost or part.holds_context) and self._is_full:
            # room was found for one: first goes what may be over, a prompt's or a window's
            for other in self.parts.values():
                if other.sigma != sigma:
                    other.forget_context()
            if self._is_full:
                self.lose_context()
        return part

    @property
    def _is_full(self) -> bool:
        return self.holds_context and not self.room.more()

    @property
    def holds_context(self) -> bool:
        """Whether keys and values of any block are there."""
        return any(part.holds_context for part in self.parts.values())

    @property
    def context_bytes(self) -> int:
        """What all keys and values take."""
        prompts = (prompt for part in self.parts.values() for prompt in part.prompts.values())
        return sum(prompt.context.bytes for prompt in prompts if prompt.context is not None)

    def lose_context(self, held: bool = False) -> None:
        """Do without keys and values from here on.

        Args:
            held: those that are there are still read in this step.
        """
        self.lost = True
        for part in () if held else self.parts.values():
            part.forget_context()

    def clear(self) -> None:
        for part in self.parts.values():
            part.clear()
        self.parts.clear()
        self._lane.close()


def change_between(new: torch.Tensor, old: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Squared change of a velocity at each token [b, tokens]."""
    return token_change(new.float() - old.float(), grid)
