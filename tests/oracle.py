"""What a program means: a naive engine in plain torch, full length, with no fast path.

It runs diffusers' own weights block by block. Left out tokens are computed too, and thrown away;
keys that must not be seen are masked.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from wantrim.methods.grid import TokenGrid
from wantrim.methods.importance import attention_received
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


class Oracle:
    """Runs a list of programs over the same model, remembering what they need."""

    def __init__(self, model, plan, grid: TokenGrid):
        self.model, self.plan, self.grid = model, plan, grid
        self.keys: dict[int, tuple] = {}
        self.velocity = self.change = self.age = None

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
        if row.heads:
            seen = seen & torch.stack([head_mask(name, self.grid) for name in patterns])
        # a query that sees nothing gives zeros, as a head that is off does
        bias = torch.zeros(seen.shape).masked_fill(~seen, -1e30)
        out = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias)
        out = torch.where(seen.any(-1, keepdim=True), out, 0.0).transpose(1, 2).flatten(2)
        new = hidden + a.to_out[0](out) * gate
        new = new + block.attn2(block.norm2(new), text, None, None)
        new = new + block.ffn(block.norm3(new) * (1 + cscale) + cshift) * cgate
        return (new if kept is None else torch.where(kept[..., None], new, hidden)), q, k

    @torch.no_grad()
    def step(self, program, x, timestep, text) -> torch.Tensor:
        """The velocity [b, c, f, h, w] of a step; the first half of the batch decides."""
        if program.repeats:
            self.age = None if self.age is None else self.age + 1
            return self.velocity
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
        return self._remember(out, kept if program.partial else None)

    def _mask(self, selection) -> torch.Tensor:
        kept = torch.ones(len(selection.index), selection.length, dtype=torch.bool)
        return kept.scatter_(1, selection.dropped, False).repeat(2, 1)

    def _remember(self, out, kept) -> torch.Tensor:
        half = len(out) // 2
        if kept is not None:
            out = torch.where(latent_mask(kept, self.grid, out.shape[2:]), out, self.velocity)
        if self.velocity is not None:
            change = token_change(out[:half] - self.velocity[:half], self.grid)
            fresh = torch.ones_like(change, dtype=torch.bool) if kept is None else kept[:half]
            first = self.change is None
            self.age = torch.zeros_like(change) if first else torch.where(fresh, 0, self.age + 1)
            self.change = change if first else torch.where(fresh, change, self.change)
        self.velocity = out
        return out
