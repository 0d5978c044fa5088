"""What a program means: a naive engine in plain torch, full length, with no fast path.

It runs diffusers' own weights block by block. Left out tokens are computed too, and thrown away;
keys that must not be seen are masked.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from wantrim.methods.grid import TokenGrid
from wantrim.methods.importance import attention_received, spread
from wantrim.methods.shares import expected_error, latent_mask, token_change
from wantrim.methods.tokens import select_tokens


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


def head_mask(name: str, grid: TokenGrid) -> torch.Tensor:
    """Which grid tokens see each other in a pattern; tiles that divide the picture only."""
    at = torch.arange(grid.tokens)
    if name in ("full", "off"):
        return torch.full((grid.tokens, grid.tokens), name == "full")
    if name == "frame":
        place = at // grid.per_frame
    else:
        side, inside = int(name.removeprefix("tile")), at % grid.per_frame
        place = inside // grid.width * side // grid.height * side
        place = place + inside % grid.width * side // grid.width
    return place[:, None] == place


def attend(q, k, v, seen) -> torch.Tensor:
    """[b, s, n, d]; a query that sees nothing gives zeros, as a head that is off does."""
    bias = torch.zeros(seen.shape).masked_fill(~seen, -1e30)
    out = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias)
    return torch.where(seen.any(-1, keepdim=True), out, 0.0).transpose(1, 2)


class Oracle:
    """Runs a list of programs over the same model, remembering what they need.

    Args:
        guidance: of the sampler, that goes along v_uncond + guidance * (v_cond - v_uncond).
    """

    def __init__(self, model, plan, grid: TokenGrid, guidance: float):
        self.model, self.plan, self.grid, self.guidance = model, plan, grid, guidance
        self.keys: dict[int, tuple] = {}
        self.change = self.age = None
        # of every element of the latent its last three velocities, the newest first, and their sigmas
        self.said: torch.Tensor | None = None
        self.at: torch.Tensor | None = None
        self.goes_on = 0.0

    def block(self, block, hidden, text, temb, rotary, row, kept, patterns, index):
        shift, scale, gate, cshift, cscale, cgate = (block.scale_shift_table + temb).chunk(6, 1)
        n = block.norm1(hidden) * (1 + scale) + shift
        a = block.attn1
        q, k, v = a.norm_q(a.to_q(n)), a.norm_k(a.to_k(n)), a.to_v(n)
        q, k, v = (t.unflatten(2, (a.heads, -1)) for t in (q, k, v))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        seen = torch.ones(len(hidden), a.heads, *[hidden.shape[1]] * 2, dtype=torch.bool)
        if row.run == "kept" and row.context:
            old_k, old_v = self.keys[index]
            k = torch.where(kept[..., None, None], k, old_k)
            v = torch.where(kept[..., None, None], v, old_v)
        elif row.run == "kept":
            seen &= kept[:, None, None, :]
        if row.context in ("write", "update"):
            self.keys[index] = k, v
        out = attend(q, k, v, seen)
        if row.heads:
            exact = out
            out = attend(q, k, v, seen & torch.stack([head_mask(n, self.grid) for n in patterns]))
            if self.plan.heads.corrected:
                out = out + self.lacking(exact - out, kept)
        out = out.flatten(2)
        new = hidden + a.to_out[0](out) * gate
        new = new + block.attn2(block.norm2(new), text, None, None)
        new = new + block.ffn(block.norm3(new) * (1 + cscale) + cshift) * cgate
        return (new if kept is None else torch.where(kept[..., None], new, hidden)), q, k

    def lacking(self, difference, kept) -> torch.Tensor:
        """Of each latent frame the mean over eight of its tokens that run [b, s, n, d]."""
        found, frames = torch.zeros_like(difference), self.grid.frames
        for b in range(len(found)):
            own = torch.arange(self.grid.tokens) if kept is None else kept[b].nonzero()[:, 0]
            counts = (own // self.grid.per_frame).bincount(minlength=frames).tolist()
            some = own[spread(counts, min(8, *counts))].view(frames, -1)
            means = difference[b, some].mean(1)
            found[b] = means.repeat_interleave(self.grid.per_frame, 0)
        return found

    @torch.no_grad()
    def step(self, program, x, timestep, text) -> torch.Tensor:
        """The velocity [b, c, f, h, w] of a step; the first half of the batch decides."""
        sigma = float(timestep[0]) / 1000
        if program.repeats:
            self.age = None if self.age is None else self.age + 1
            return self.forecast(sigma)
        m, grid, half = self.model, self.grid, len(x) // 2
        rotary = m.rope(x)
        hidden = m.patch_embedding(x).flatten(2).transpose(1, 2)
        temb, modulation, text, _ = m.condition_embedder(timestep, text, None)
        modulation, kept = modulation.unflatten(1, (6, -1)), None
        if program.partial:
            worth = expected_error(self.change, self.age)
            kept = self._mask(select_tokens(worth, grid, grid.tokens, program.budget))
        for index, (block, row) in enumerate(zip(m.blocks, program.rows, strict=True)):
            if row.run == "skip":
                continue
            patterns = self.plan.heads.self_attention[index] if row.heads else None
            mask = kept if row.run == "kept" else None
            given = (hidden, text, modulation, rotary, row, mask, patterns, index)
            hidden, q, k = self.block(block, *given)
            if row.choose:
                p = self.plan.tokens
                scores = attention_received(grid, q[:half], k[:half])
                chosen = select_tokens(scores, grid, grid.tokens, program.budget, alpha=p.alpha)
                kept = self._mask(chosen)
        shift, scale = (m.scale_shift_table + temb.unsqueeze(1)).chunk(2, 1)
        out = m.proj_out(m.norm_out(hidden) * (1 + scale) + shift)
        out = out.unflatten(1, (grid.frames, grid.height, grid.width)).unflatten(-1, (1, 2, 2, -1))
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return self._remember(out, sigma, kept if program.partial else None)

    def _mask(self, selection) -> torch.Tensor:
        kept = torch.ones(len(selection.index), selection.length, dtype=torch.bool)
        return kept.scatter_(1, selection.dropped, False).repeat(2, 1)

    def guided(self, rows: torch.Tensor) -> torch.Tensor:
        cond, uncond = rows.chunk(2)
        return uncond + self.guidance * (cond - uncond)

    def forecast(self, sigma: float) -> torch.Tensor:
        """Every change is `goes_on` times the one before, in lengths of the last one."""
        new, old = self.said[:2]
        ahead = (self.at[0] - sigma) / (self.at[1] - self.at[0])
        p = self.goes_on
        sum_of_powers = p * (1 - p**ahead) / (1 - p)
        return torch.where(self.at[1].isnan(), new, new + sum_of_powers * (new - old))

    def _remember(self, out, sigma: float, kept) -> torch.Tensor:
        half, every = len(out) // 2, torch.ones(out.shape, dtype=torch.bool)
        mask = every if kept is None else latent_mask(kept, self.grid, out.shape[2:]) & every
        given = out
        if self.said is None:
            self.said, self.at = torch.full((2, 3, *out.shape), torch.nan)
        else:
            given = torch.where(mask, out, self.forecast(sigma))
            last = torch.where(mask, out, self.said[0])
            change = token_change(last[:half] - self.said[0][:half], self.grid)
            fresh = torch.ones_like(change, dtype=torch.bool) if kept is None else kept[:half]
            first = self.change is None
            self.age = torch.zeros_like(change) if first else torch.where(fresh, 0, self.age + 1)
            self.change = change if first else torch.where(fresh, change, self.change)
        for held, new in ((self.said, out), (self.at, torch.full(out.shape, sigma))):
            held[1:] = torch.where(mask, held[:-1], held[1:])
            held[0] = torch.where(mask, new, held[0])
        new, old, oldest = self.said
        foretold = (old - oldest) * (self.at[1] - self.at[0]) / (self.at[2] - self.at[1])
        known = (mask & ~foretold.isnan())[:half]
        if known.any():
            samples = range(half)
            told, came = self.guided(foretold), self.guided(new - old)
            fits = [
                float((told[i] * came[i])[known[i]].sum() / told[i][known[i]].square().sum())
                for i in samples
            ]
            fits = torch.tensor(fits).clamp(0.0, 0.98).repeat(2)
            self.goes_on = fits.view(-1, 1, 1, 1, 1)
        return given
