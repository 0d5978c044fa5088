"""A width: which heads and FFN channels a slim model keeps, by PARE's rules or by one budget (ours).

PARE (arXiv 2605.27336, section 3.2, eq. 3 to 7) keeps equally many in every block. A budget for the
whole model is spent where the profile says that it buys most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..methods.cost import Width
from ..methods.heads import TEMPORAL
from ..methods.knapsack import BudgetTooSmall, Option, choose
from ..profiles.fingerprint import Fingerprint
from ..profiles.profile import PER_BIN, Profile

# PARE's smallest number of heads, of how many
MINIMUM, PAPER_HEADS = 8, 40
# FFN widths are multiples of this; in an FFN of less than SMALL channels, of the second
MULTIPLE, SMALL_MULTIPLE, SMALL = 128, 16, 1024
# cosine from which two channels are alike, and how it is relaxed; not stated in the paper
TAU, RELAX = 0.9, 0.02
# of a block's FFN against one of its attentions: least squares gives back most of what dropped
# channels added, and little of what dropped heads did (benchmarks/results/old/width.csv)
FFN_WORTH = 0.5
# channels compared at once: 2 x 1024 signatures of a 14B in fp32 are 84 MB
CHUNK = 1024

# measurements that a recording may lack
WHAT = {"cross_output": "the cross-attention heads", "channel_energy": "the FFN channels"}

# [c, 2 * dim] of a block: rows of W_up beside columns of W_down
Signature = Callable[[int], torch.Tensor]


def check_ratio(prune_ratio: float) -> None:
    """Refuse a share that is not one."""
    if not 0.0 <= prune_ratio < 1.0:
        raise ValueError(f"prune_ratio: expected 0 to less than 1, got {prune_ratio}")


def check_recorded(profile: Profile, *needed: str) -> None:
    """Refuse a profile in which nothing was measured, or not what is needed.

    Args:
        needed: of "cross_output" and "channel_energy", which a recording may lack.
    """
    if not profile.calls:
        raise ValueError(
            "profile: expected one with at least one recorded step, got an empty one. Sample a "
            "video with WanTrim Profile on the model first."
        )
    for name in needed:
        total = profile.tensors[name]
        total = total.sum(0) if name in PER_BIN else total
        missing = [block for block, one in enumerate(total) if not one.any()]
        if missing:
            raise ValueError(
                f"profile: {WHAT[name]} of {len(missing)} of {len(total)} blocks (first: block "
                f"{missing[0]}) could not be recorded, so nothing is known of them. Record the "
                "profile again without the node or the weight format that its notes name."
            )


def kept_count(num_heads: int, prune_ratio: float) -> int:
    """K = max(8, ceil(H(1-p))); the 8 is of 40 heads, so a model with fewer heads keeps its share."""
    check_ratio(prune_ratio)
    least = min(MINIMUM, math.ceil(MINIMUM * num_heads / PAPER_HEADS))
    return max(least, _ceil(num_heads * (1 - prune_ratio)))


def ffn_multiple(ffn_dim: int) -> int:
    """What an FFN's width is a multiple of: 128, or 16 in a model too small for that."""
    return MULTIPLE if ffn_dim >= SMALL else SMALL_MULTIPLE


def ffn_count(ffn_dim: int, prune_ratio: float) -> int:
    """FFN channels that stay: rounded up to a multiple, never more than there are."""
    check_ratio(prune_ratio)
    multiple = ffn_multiple(ffn_dim)
    return min(ffn_dim, multiple * _ceil(ffn_dim * (1 - prune_ratio) / multiple))


def _ceil(value: float) -> int:
    # 40 * (1 - 0.7) is a little more than 12
    return math.ceil(value - 1e-9)


def head_scores(profile: Profile, kind: str, protection: float = 1.5) -> torch.Tensor:
    """Score of each head of "self" or "cross" attention [l, n] (eq. 3 and 5).

    Args:
        protection: factor on the score of temporal self-attention heads.
    """
    scores = profile.importance(kind)
    if kind == "self":
        scores = scores * torch.where(profile.ratio() < TEMPORAL, protection, 1.0)
    return scores


def top(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """Ascending positions of the `count` highest of `scores` [n]; of equals the first."""
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))


def pare_heads(
    profile: Profile, prune_ratio: float = 0.3, protection: float = 1.5, *, kind: str = "self"
) -> tuple[tuple[int, ...], ...]:
    """Heads that each block keeps (section 3.2): equally many in every block, each its own best.

    Args:
        kind, protection: see `head_scores`.
    """
    check_recorded(profile, *(["cross_output"] if kind == "cross" else []))
    count = kept_count(profile.model.num_heads, prune_ratio)
    return tuple(top(block, count) for block in head_scores(profile, kind, protection))


def ffn_channels(score: torch.Tensor, signature: torch.Tensor | None, keep: int) -> tuple[int, ...]:
    """FFN channels that a block keeps (eq. 7), ascending.

    Greedy from the highest score down; a channel is skipped when it is too much like a kept one.
    Where that leaves fewer than `keep`, `tau` is relaxed and the skipped channels are looked at
    again; what was kept stays.

    Args:
        score: [c].
        signature: [c, 2 * dim], any float type and device; None keeps the highest scores.
    """
    order = score.argsort(descending=True, stable=True)
    if signature is None or keep >= len(score):
        return tuple(sorted(order[:keep].tolist()))
    skipped, tau = order.to(signature.device), TAU
    kept = skipped[:0]
    while len(kept) < keep and tau < 1:
        kept, skipped = _unlike(signature, kept, skipped, keep, tau)
        tau += RELAX
    # nothing is alike any more
    return tuple(sorted([*kept.tolist(), *skipped[: keep - len(kept)].tolist()]))


def _unlike(
    signature: torch.Tensor, kept: torch.Tensor, candidates: torch.Tensor, keep: int, tau: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kept` with those `candidates` that have no cosine above `tau` with one of them; and the rest.

    Candidates are looked at in their order, until `keep` are kept.
    """

    def unit(channels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(signature[channels].float(), dim=1)

    rest = []
    for some in candidates.split(CHUNK):
        mine = unit(some)
        alike = torch.zeros(len(some), dtype=torch.bool, device=some.device)
        for others in kept.split(CHUNK):
            alike |= (mine @ unit(others).T > tau).any(1)
        conflicts = (mine @ mine.T > tau).triu(1).cpu()
        skipped, busy = alike.cpu(), conflicts.any(1).tolist()
        for i, has in enumerate(busy):
            if has and not skipped[i]:
                skipped |= conflicts[i]
        skipped = skipped.to(some.device)
        rest.append(some[skipped])
        kept = torch.cat([kept, some[~skipped]])[:keep]
        if len(kept) == keep:
            break
    return kept, torch.cat(rest) if rest else candidates


def channel_sizes(profile: Profile) -> torch.Tensor:
    """What each FFN channel adds to the hidden state while the model samples, rms [l, c] (ours)."""
    check_recorded(profile, "channel_energy")
    return profile.mean("channel_energy").sqrt() * profile.tensors["down_norm"]


def pare_width(
    profile: Profile, prune_ratio: float = 0.3, signature: Signature | None = None
) -> Width:
    """PARE's width: heads by `pare_heads`, channels by `ffn_channels`, alike in every block.

    Channels are scored by the weights alone (eq. 6).

    Args:
        signature: makes a block's signatures, called once a block; None does not look for
            channels that are alike.
    """
    keep = ffn_count(profile.model.ffn_dim, prune_ratio)
    return Width(
        pare_heads(profile, prune_ratio),
        pare_heads(profile, prune_ratio, kind="cross"),
        channels(profile.tensors["channel_norm"], [keep] * profile.model.num_blocks, signature),
    )


def channels(
    scores: torch.Tensor, counts: Sequence[int], signature: Signature | None
) -> tuple[tuple[int, ...], ...]:
    """`ffn_channels` of every block: scores [l, c], channels to keep per block."""
    return tuple(
        ffn_channels(scores[block], signature and signature(block), keep)
        for block, keep in enumerate(counts)
    )


def solve_width(profile: Profile, budget: float, signature: Signature | None = None) -> Width:
    """Heads and channels of every block, for the most importance within a budget.

    A head is worth its share in its block's importance (eq. 3), a channel its share in what the
    channels of its block add to the hidden state (`channel_sizes`), times FFN_WORTH. Every block
    keeps at least one head of each attention and one group of channels.

    Args:
        budget: share of the parameters of heads and FFN channels that stays.
        signature: as for `pare_width`; tells channels that are alike.

    Raises:
        ValueError: not a share, too small for what every block keeps, or the profile lacks a
            measurement.
    """
    check_recorded(profile, "cross_output", "channel_energy")
    model = profile.model
    blocks, n, multiple = model.num_blocks, model.num_heads, ffn_multiple(model.ffn_dim)
    head, channel = unit_parameters(model)
    scores = channel_sizes(profile)
    groups: list[list[Option]] = []
    for kind in ("self", "cross"):
        shares = share_in_block(profile.importance(kind)).flatten().tolist()
        groups += [[(0, 0.0), (head, one)] for one in shares]
    steps = [*range(0, model.ffn_dim, multiple), model.ffn_dim]
    for block in share_in_block(scores) * FFN_WORTH:
        total = block.sort(descending=True).values.cumsum(0).tolist()
        groups.append([(0, 0.0), *((at * channel, total[at - 1]) for at in steps[1:])])
    needed = [range(at * n, (at + 1) * n) for at in range(2 * blocks)]
    needed += [[2 * blocks * n + block] for block in range(blocks)]
    chosen = spend(groups, budget, needed)
    taken = [chosen[at * n : (at + 1) * n] for at in range(2 * blocks)]
    heads = [tuple(h for h, option in enumerate(options) if option) for options in taken]
    counts = [steps[option] for option in chosen[2 * blocks * n :]]
    return Width(tuple(heads[:blocks]), tuple(heads[blocks:]), channels(scores, counts, signature))


def unit_parameters(model: Fingerprint) -> tuple[int, int]:
    """Numbers that a head of either attention and an FFN channel of a block store."""
    # rows of q, k and v with their biases, their part of two norms, columns of o
    return model.head_dim * (4 * model.dim + 5), 2 * model.dim + 1


def share_in_block(contribution: torch.Tensor) -> torch.Tensor:
    """Each one's part in the sum of its block [l, n]."""
    # never quite nothing: a budget of all keeps all
    least = 1e-6 * contribution.amax(1, keepdim=True)
    least = least.clamp(min=torch.finfo(torch.float32).tiny)
    contribution = torch.maximum(contribution, least).double()
    return contribution / contribution.sum(1, keepdim=True)


def spend(groups: list[list[Option]], budget: float, needed: Sequence[Sequence[int]]) -> list[int]:
    """Option of each group for the most value, at this share of what the dearest of all cost.

    Args:
        needed: groups of which at least one is not its first option.
    """
    if not 0.0 < budget <= 1.0:
        raise ValueError(
            f"budget: expected more than 0 (nothing left) to 1 (all of it), got {budget}"
        )
    whole = sum(max(cost for cost, _ in options) for options in groups)
    try:
        return choose(groups, math.floor(budget * whole + 1e-6), needed)
    except BudgetTooSmall as error:
        least = math.ceil(100 * error.least / whole) / 100
        raise ValueError(
            f"budget: expected at least {least} here, so that every block keeps something; got "
            f"{budget}"
        ) from error
