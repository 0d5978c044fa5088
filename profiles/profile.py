"""What was measured about a model while it sampled (PARE, arXiv 2605.27336, section 3.2).

Sums over model calls, so that runs can be merged by adding them. A call is one sample of the
conditional prompt at one sigma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..methods.schedule import BINS
from ..solve.tuned import Tuned
from .artifact import Kind, open_artifact, save_artifact
from .fingerprint import Fingerprint

KIND = Kind("profile", "Choose a file that WanTrim Save Profile wrote.", version=2)
# fp32 counts no further
MOST_CALLS = 1 << 24
# measurements that are kept per sigma bin
PER_BIN = ("ratio", "self_output", "cross_output")


def timestep_weight(sigma: float) -> float:
    """w(t) of eq. 3, for t/T = sigma."""
    return math.log1p(sigma)


def layout(model: Fingerprint) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a profile.

    t sigma bins, l blocks, n heads, d head_dim, c FFN channels.

    count [t]: calls. ratio [t, l, n]: intra-slice ratio, the attention mass within the query's own
    latent frame (eq. 4). self_output, cross_output [t, l, n]: w(t) times the root mean
    square of a head's output (eq. 3, before the output projection's norm). self_mean, cross_mean
    [l, n, d]: a head's mean output. q_share, k_share, cross_q_share, cross_k_share [l, n, n]: second
    moments of the heads' shares in a token's energy before the norm over all heads, and k_img_share
    likewise. channel_energy [l, c]: mean square of each FFN channel after its activation.

    Of the weights, not summed: self_o_norm, cross_o_norm [l, n]: norm of the output projection's
    columns of a head (eq. 3). channel_norm [l, c]: FFN score (eq. 6). down_norm [l, c]: norm of the
    FFN down projection's column of each channel, its second factor.
    """
    t, l, n, c = BINS, model.num_blocks, model.num_heads, model.ffn_dim
    d = model.head_dim
    shares = ("q_share", "k_share", "cross_q_share", "cross_k_share", "k_img_share")
    return {
        "count": (t,),
        "ratio": (t, l, n),
        "self_output": (t, l, n),
        "cross_output": (t, l, n),
        "self_mean": (l, n, d),
        "cross_mean": (l, n, d),
        **dict.fromkeys(shares, (l, n, n)),
        "channel_energy": (l, c),
        **of_weights(model),
    }


def of_weights(model: Fingerprint) -> dict[str, tuple[int, ...]]:
    """The part of the layout that only depends on the weights."""
    l, n, c = model.num_blocks, model.num_heads, model.ffn_dim
    channels = ("channel_norm", "down_norm")
    return {"self_o_norm": (l, n), "cross_o_norm": (l, n), **dict.fromkeys(channels, (l, c))}


@dataclass
class Profile:
    """Sums of the measurements in `layout`, fp32 on the CPU.

    Args:
        runs: what was sampled: grid (f, h, w), context_tokens (keys of cross-attention), sigmas and
            calls of every run.
        tuned: what trials found and whole runs showed, as plain data (solve/tuned.py).
    """

    model: Fingerprint
    tensors: dict[str, torch.Tensor]
    runs: list[dict] = field(default_factory=list)
    tuned: list[dict] = field(default_factory=list)

    @classmethod
    def empty(cls, model: Fingerprint) -> Profile:
        return cls(model, {name: torch.zeros(shape) for name, shape in layout(model).items()})

    @property
    def calls(self) -> int:
        return round(float(self.tensors["count"].sum()))

    @property
    def finite(self) -> bool:
        """Whether all of it are numbers: not so after a run that came out black."""
        return all(bool(torch.isfinite(value).all()) for value in self.tensors.values())

    def mean(self, name: str) -> torch.Tensor:
        """A measurement per call; per sigma bin [t, ...] where the layout has bins."""
        total = self.tensors[name]
        if name in PER_BIN:
            count = self.tensors["count"].view(-1, *[1] * (total.ndim - 1))
            return total / count.clamp(min=1)
        return total / max(1, self.calls)

    def ratio(self) -> torch.Tensor:
        """Intra-slice ratio of each head (eq. 4), mean over all calls [l, n]."""
        return self.tensors["ratio"].sum(0) / max(1, self.calls)

    def importance(self, kind: str = "self") -> torch.Tensor:
        """Head importance (eq. 3) of "self" or "cross" attention [l, n].

        The mean over the noise levels that were seen: the paper sums over ten bins of equally many
        samples, and a sampler's own sigmas are nearly all in the highest of them.
        """
        seen = self.tensors["count"] > 0
        output = self.mean(f"{kind}_output")[seen].sum(0) / max(1, int(seen.sum()))
        return output * self.tensors[f"{kind}_o_norm"]

    def merged(self, other: Profile) -> Profile:
        """Both together, the other one's newer."""
        reason = self.model.differs(other.model)
        if reason is not None:
            raise ValueError(f"profile: cannot merge profiles of two models: {reason}")
        fixed = of_weights(self.model)
        tensors = {
            name: other.tensors[name] if name in fixed else value + other.tensors[name]
            for name, value in self.tensors.items()
        }
        both = Profile(self.model, tensors, self.runs + other.runs, self.tuned)
        for one in other.tuned:
            both = both.with_tuned(one)
        return both

    def with_tuned(self, new: dict) -> Profile:
        """With what a trial or a recorded run found; an older one of its kind and run gives way."""
        return replace(self, tuned=[*(old for old in self.tuned if not _newer(new, old)), new])

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        header = {"runs": self.runs, "tuned": self.tuned}
        tensors = {name: value.contiguous() for name, value in self.tensors.items()}
        save_artifact(path, KIND, self.model, header, tensors)


def _newer(new: dict, old: dict) -> bool:
    try:
        one, other = Tuned.from_json(new), Tuned.from_json(old)
    except ValueError:
        # of a later version, or damaged: not ours to judge
        return False
    return one.recorded == other.recorded and one.resembles(*other.facts)


def load_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
        ValueError: the file is damaged or something else, in an artist's words.
    """
    with open_artifact(path, KIND) as (header, model, file):
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if "ratio" not in tensors and tensors.get("mass", torch.empty(0)).ndim == 4:
        # the first version's: what other patterns keep lies behind it
        tensors["ratio"] = tensors.pop("mass")[..., 0]
    for name, shape in layout(model).items():
        came = tuple(tensors[name].shape) if name in tensors else "nothing"
        if came != shape or tensors[name].dtype != torch.float32:
            raise ValueError(f"{path.name}: {name}: expected {shape}, got {came}: damaged file")
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{path.name}: {name} holds values that are not finite: damaged file")
    count = tensors["count"]
    # calls are counted in whole videos, and what is not read as a number cannot be shown
    if not (count >= 0).all() or float(count.sum()) > MOST_CALLS:
        raise ValueError(f"{path.name}: count holds no numbers of calls: damaged file")
    lists = [said if isinstance(said := header.get(n), list) else [] for n in ("runs", "tuned")]
    runs, tuned = ([one for one in said if isinstance(one, dict)] for said in lists)
    # a file that is mapped cannot be replaced on Windows, and this one is when it is added to
    own = {name: tensors[name].clone() for name in layout(model)}
    return Profile(model, own, runs, tuned)
