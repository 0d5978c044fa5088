"""Slim models: the rows and columns of each weight that a width keeps (PARE, arXiv 2605.27336,
section 3.2), and two corrections that need no training (ours).

Keys are Wan's original names. The residual width is never cut.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..methods.cost import Width
from ..profiles.fingerprint import Fingerprint

ROWS = {
    "self_attn": ("q", "k", "v", "norm_q", "norm_k"),
    "cross_attn": ("q", "k", "v", "norm_q", "norm_k", "k_img", "v_img", "norm_k_img"),
    "ffn": ("0",),
}
COLUMNS = {"self_attn": "o", "cross_attn": "o", "ffn": "2"}
# norm over all heads -> its measurement in a profile
SHARES = {
    "self_attn.norm_q": "q_share",
    "self_attn.norm_k": "k_share",
    "cross_attn.norm_q": "cross_q_share",
    "cross_attn.norm_k": "cross_k_share",
    "cross_attn.norm_k_img": "k_img_share",
}
# against the mean of the Gram matrix's diagonal
RIDGE = 0.05
_KEY = re.compile(r"blocks\.(\d+)\.(self_attn|cross_attn|ffn)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class Cut:
    """Where one tensor of a checkpoint is cut.

    Args:
        part: "self_attn", "cross_attn" or "ffn".
        axis: 0 where rows are kept, 1 where columns are.
    """

    block: int
    part: str
    layer: str
    leaf: str
    axis: int

    @property
    def name(self) -> str:
        return f"{self.part}.{self.layer}"

    def units(self, width: Width) -> tuple[int, ...]:
        """The heads or channels that the width keeps here."""
        kept = {
            "self_attn": width.self_heads,
            "cross_attn": width.cross_heads,
            "ffn": width.ffn_channels,
        }
        return kept[self.part][self.block]

    def index(self, width: Width, head_dim: int) -> torch.Tensor:
        """Positions along the axis that the width keeps, int64 [kept]."""
        units = torch.tensor(self.units(width), dtype=torch.int64)
        return units if self.part == "ffn" else expand_heads(units, head_dim)

    def size(self, model: Fingerprint) -> int:
        """Length of the axis in the full model."""
        return model.ffn_dim if self.part == "ffn" else model.dim


def find_cut(key: str) -> Cut | None:
    """Where the tensor of this name is cut, or None when it stays whole."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    block, part, layer, leaf = int(match[1]), match[2], match[3], match[4]
    if layer in ROWS[part]:
        return Cut(block, part, layer, leaf, 0)
    if layer == COLUMNS[part] and leaf == "weight":
        return Cut(block, part, layer, leaf, 1)
    return None


def expand_heads(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Channels of the given heads, int64 [heads * head_dim]."""
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def take(tensor: torch.Tensor, axis: int, index: torch.Tensor) -> torch.Tensor:
    """The positions `index` along an axis; the tensor itself when that is all of it."""
    if len(index) == tensor.shape[axis]:
        return tensor
    return tensor.index_select(axis, index.to(tensor.device))


def check_width(width: Width, model: Fingerprint) -> None:
    """Refuse a width that is not one of this model.

    Raises:
        ValueError: a wrong number of blocks, or a block that keeps nothing, or something that the
            model does not have, or the same twice.
    """
    for kind, most in (
        ("self_heads", model.num_heads),
        ("cross_heads", model.num_heads),
        ("ffn_channels", model.ffn_dim),
    ):
        blocks = getattr(width, kind)
        if len(blocks) != model.num_blocks:
            raise ValueError(f"{kind}: expected {model.num_blocks} blocks, got {len(blocks)}")
        for block, kept in enumerate(blocks):
            ascending = all(a < b for a, b in zip(kept, kept[1:], strict=False))
            if not kept or not ascending or kept[0] < 0 or kept[-1] >= most:
                raise ValueError(
                    f"{kind}: block {block}: expected at least one of 0 to {most - 1}, each once and "
                    f"ascending, got {list(kept)!r:.100}"
                )


def norm_scale(shares: torch.Tensor, kept: tuple[int, ...]) -> float | None:
    """Factor for the weight of a norm over all heads when only some heads are left (ours).

    Wan's norm_q and norm_k divide by the root mean square over all heads. With s the kept heads'
    share in a token's energy, that of the kept heads alone is sqrt(s * n_all / n_kept) times it; the
    mean of this undoes the change best. E[sqrt(s)] to second order around E[s].

    Args:
        shares: second moments of the heads' energy shares [n, n], any scale.

    Returns:
        The factor, or None when there is no measurement.
    """
    moments = shares.double()
    total = float(moments.sum())
    if not total > 0:
        return None
    if len(kept) == len(moments):
        return 1.0
    index = torch.tensor(kept, dtype=torch.int64)
    rows = moments[index] / total
    mean, square = float(rows.sum()), float(rows[:, index].sum())
    if not mean > 0:
        return None
    variance = max(0.0, square - mean**2)
    root = mean**0.5 * (1 - variance / (8 * mean**2))
    # the expansion leaves its ground when the kept heads are nearly silent
    root = max(root, 0.5 * mean**0.5)
    return root * (len(moments) / len(kept)) ** 0.5


def refit(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Columns of an output projection that do best without the others, by least squares (ours).

    W_k + W_d G_dk (G_kk + lambda I)^-1: what the dropped inputs d would have added, as far as the
    kept inputs k foretell it. lambda is RIDGE times the mean of G_kk's diagonal.

    Args:
        weight: [out, in].
        gram: sum of x x^T over inputs x of this projection [in, in], any scale.
        kept: int64 [kept], ascending.

    Returns:
        [out, kept] in fp64, or the weight's own columns where nothing was measured.
    """
    mask = torch.ones(weight.shape[1], dtype=torch.bool)
    mask[kept] = False
    dropped = mask.nonzero().flatten()
    columns = weight[:, kept].double()
    if not len(dropped):
        return columns
    within = gram[kept][:, kept].double()
    level = float(within.diagonal().mean())
    if not level > 0:
        return columns
    within.diagonal().add_(RIDGE * level)
    across = gram[kept][:, dropped].double()
    # [kept, out]: right-hand sides instead of an inverse
    wanted = across @ weight[:, dropped].double().T
    return columns + torch.cholesky_solve(wanted, torch.linalg.cholesky(within)).T
