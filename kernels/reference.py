"""Torch references: what every kernel has to compute, on any device."""

from __future__ import annotations

import torch

# scores held at once: queries x keys x heads x batch
CHUNK_SCORES = 1 << 24
HALF_MAX = 65504.0
# tokens whose keys or values are held wide at once, while they are packed and unpacked
AT_ONCE = 4096
# codes and scales of keys, then of values: [b, s, n, d * bits / 8] and [b, s, n], contiguous
Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def token_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: tuple[int, int, int],
    query_index: torch.Tensor,
    *,
    start: int = 0,
    exclude_radius: int = 0,
) -> torch.Tensor:
    """Attention that every grid token receives from sampled queries (arXiv 2605.17837, section 3.1).

    The mean over the sampled queries and all heads of softmax(q k^T / sqrt(d)), streamed over
    chunks of queries: no s x s matrix is ever held.

    Args:
        q, k: [b, s, n, d] after RoPE. The grid's tokens are s[start : start + f*h*w]; other
            tokens take part in the softmax but get no score.
        grid: tokens (f, h, w).
        query_index: int64 [m], positions within the grid of the queries to use.
        exclude_radius: query/key pairs within this many rows and columns of each other, in every
            latent frame, are left out of the mean (a sampled query would otherwise imprint its own
            neighbourhood on the map). 0 leaves nothing out.

    Returns:
        fp32 [b, f*h*w]. A key that no query may score gets 0.
    """
    frames, height, width = grid
    tokens = frames * height * width
    total = torch.zeros(len(k), tokens, device=k.device)
    position = torch.arange(tokens, device=k.device, dtype=torch.int32) % (height * width)
    row, column = position // width, position % width
    queries = None
    for chunk, attention in _attention(q, k, start + query_index):
        mass = attention[..., start : start + tokens].sum(1)
        # the heads of one chunk of queries come one after the other
        if chunk is not queries:
            queries, at = chunk, chunk - start
            far = torch.ones(len(at), tokens, dtype=torch.bool, device=k.device)
            if exclude_radius:
                far = (row[at, None] - row).abs() > exclude_radius
                far |= (column[at, None] - column).abs() > exclude_radius
        total += (mass * far).sum(1)
    return total / (mean_counts(grid, query_index, exclude_radius) * k.shape[2]).clamp(min=1)


def mean_counts(
    grid: tuple[int, int, int], query_index: torch.Tensor, exclude_radius: int
) -> torch.Tensor:
    """How many queries each key's mean of `token_mass` is over, fp32 [f*h*w]."""
    frames, height, width = grid
    at = query_index % (height * width)
    ones = torch.ones(len(at), device=at.device)
    near = ones.new_zeros(height * width).index_add_(0, at, ones).view(1, height, width)
    if exclude_radius:
        # how many queries lie in the square around each place
        side = 2 * exclude_radius + 1
        near = torch.nn.functional.avg_pool2d(
            near, side, 1, padding=exclude_radius, divisor_override=1
        )
    else:
        near = torch.zeros_like(near)
    return (len(at) - near).flatten().repeat(frames)


def _attention(q: torch.Tensor, k: torch.Tensor, index: torch.Tensor):
    """Yield (query positions [m], softmax(q k^T / sqrt(d)) [b, heads, m, s] in fp32) in pieces.

    A piece holds at most about CHUNK_SCORES scores: a part of the queries, and of the heads when
    even that is too much.
    """
    batch, keys, heads, head_dim = k.shape
    queries = min(len(index), max(1, CHUNK_SCORES // (batch * keys)))
    group = max(1, CHUNK_SCORES // (batch * keys * queries))
    for chunk in index.split(queries):
        for first in range(0, heads, group):
            some = slice(first, first + group)
            part_q = q[:, chunk, some].float().transpose(1, 2)
            part_k = k[:, :, some].float().permute(0, 2, 3, 1)
            yield chunk, (part_q @ part_k * head_dim**-0.5).softmax(-1)


def frame_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: tuple[int, int, int],
    query_index: torch.Tensor,
    *,
    start: int = 0,
) -> torch.Tensor:
    """Attention mass of each head on the query's own latent frame (arXiv 2605.27336, eq. 4).

    The mean over the sampled queries, streamed as in `token_mass`.

    Args:
        q, k: [b, s, n, d] after RoPE; grid tokens are s[start : start + f*h*w].
        query_index: int64 [m], positions within the grid.

    Returns:
        fp32 [b, n], 0..1.
    """
    frames, per_frame = grid[0], grid[1] * grid[2]
    total, first = torch.zeros(len(k), k.shape[2], device=k.device), 0
    for chunk, attention in _attention(q, k, start + query_index):
        batch, heads, queries, _ = attention.shape
        video = attention[..., start : start + frames * per_frame]
        by_frame = video.unflatten(-1, (frames, per_frame)).sum(-1)
        own = ((chunk - start) // per_frame)[:, None].expand(batch, heads, queries, 1)
        total[:, first : first + heads] += by_frame.gather(-1, own).sum((-2, -1))
        first = (first + heads) % k.shape[2]
    return total / len(query_index)


def pack_rows(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [..., d] in `bits` bits a number, with a scale of their own; d even.

    Returns:
        codes uint8 [..., d * bits / 8] and scales fp16 [...].
    """
    most = 2 ** (bits - 1) - 1
    wide = x.float().contiguous()
    # what is too large for fp16 is cut off, and spoils no number beside it
    scale = (wide.abs().amax(-1) / most).clamp(1e-7, HALF_MAX / (most + 1)).half()
    codes = (wide / scale.float()[..., None]).round_().clamp_(-most, most) + (most + 1)
    codes = codes.to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return codes, scale


def unpack_rows(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack_rows`, fp16 [..., d]."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return (codes.half() - 2 ** (bits - 1)) * scale[..., None]


def store_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    bits: int,
    held: Packed | None = None,
    index: torch.Tensor | None = None,
) -> Packed:
    """Keys and values [b, s, n, d] in `bits` bits a number, as `pack_rows`; d even.

    Args:
        held: where to put them, in place; None makes it, of these s tokens.
        index: int64 [b, s], their positions there, each once; None is all in order.

    Returns:
        `held`.
    """
    batch, tokens = k.shape[:2]
    sample = torch.arange(batch, device=k.device)[:, None]
    # in fp32 all of them would be several times what they are
    for at in range(0, tokens, AT_ONCE):
        part = slice(at, at + AT_ONCE)
        packed = (*pack_rows(k[:, part], bits), *pack_rows(v[:, part], bits))
        if held is None:
            held = tuple(new.new_empty(batch, tokens, *new.shape[2:]) for new in packed)
        where = (slice(None), part) if index is None else (sample, index[:, part])
        for into, new in zip(held, packed, strict=True):
            into[where] = new
    return held


def join_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    held: Packed,
    index: torch.Tensor,
    bits: int,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Keys and values [b, s, n, d], and behind them remembered ones, into `out` [b, s + m, n, d].

    Args:
        index: int64 [b, m], positions in `held`.
        out: contiguous, in the dtype of k and v.
    """
    own = k.shape[1]
    sample = torch.arange(len(k), device=k.device)[:, None]
    for into, mine, codes, scale in ((out[0], k, *held[:2]), (out[1], v, *held[2:])):
        into[:, :own] = mine
        for at in range(0, index.shape[1], AT_ONCE):
            where = (sample, index[:, at : at + AT_ONCE])
            some = unpack_rows(codes[where], scale[where], bits)
            into[:, own + at : own + at + some.shape[1]] = some
