"""What is seen of a model call and of its blocks, while a profile is recorded. Knows no host."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

from ..kernels import frame_mass
from ..methods.attend import Attention
from ..methods.grid import TokenGrid
from ..methods.importance import sample_queries
from .profile import timestep_weight

# tokens that everything but the intra-slice ratio is measured on, and those of the calibration
SAMPLED, CALIBRATED = 2048, 1024
# share of the tokens that are queries of that ratio, and how many at least
QUERY_RATIO, MIN_QUERIES = 1 / 256, 64
# norms over all heads in the order in which a block calls them
NORMS = ("q_share", "k_share", "cross_q_share", "cross_k_share", "k_img_share")


class CallRecord:
    """One model call as it is recorded; nothing of it counts before `finish`.

    Args:
        recorder: the `Recorder` that it is for.

    Attributes:
        found: measurements per block, summed over its rows.
    """

    def __init__(self, recorder, sigma: float, grid: TokenGrid, rows: list[slice], samples: int):
        self.recorder, self.sigma, self.grid = recorder, sigma, grid
        self.rows, self.samples = rows, samples
        self.found: dict[int, dict[str, torch.Tensor]] = {}
        # hidden state of the first block, for its dtype and device
        self.like: torch.Tensor | None = None
        self.partly = False
        self.context = 0
        share = min(1.0, SAMPLED / grid.tokens)
        self.tokens = sample_queries(grid, share, 0) + grid.start
        self.queries = sample_queries(grid, QUERY_RATIO, MIN_QUERIES)
        self._placed: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def block(self, index: int, hidden: torch.Tensor, length: int) -> BlockRecord | None:
        """Watch a block that is about to run on `hidden` [b, s, c].

        Args:
            length: tokens in the whole sequence. None is returned when not all of them run.
        """
        if self.like is None:
            self.like = hidden.new_empty(0)
        if hidden.shape[1] != length:
            self.partly = True
            return None
        return BlockRecord(self, index, hidden)

    def finish(self) -> None:
        """Count the call, if everything was seen."""
        recorder = self.recorder
        if self.partly:
            recorder.note(
                "steps in which tokens were left out were not recorded: bypass WanTrim Tokens to "
                "record all of them"
            )
        elif len(self.found) < recorder.model.num_blocks:
            recorder.note(
                "calls in which another node skipped blocks, or ran them its own way, were not "
                "recorded"
            )
        else:
            recorder.take(self)

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The conditional rows."""
        parts = [tensor.detach()[rows] for rows in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Sampled tokens as positions in the sequence, and queries as positions in the grid."""
        if device not in self._placed:
            self._placed[device] = self.tokens.to(device), self.queries.to(device)
        return self._placed[device]


class BlockRecord:
    """What is seen of one block while it runs. Tensors come in the order of the calls."""

    def __init__(self, call: CallRecord, index: int, hidden: torch.Tensor):
        self.call, self.index = call, index
        self.model, self.image = call.recorder.model, call.recorder.image
        self.length = hidden.shape[1]
        self.found: dict[str, torch.Tensor] = {}
        self.shares: list[torch.Tensor] = []
        self.cross: list[torch.Tensor] = []
        self.attended = self.activated = 0
        # keys of cross-attention: text and image
        self.context = 0
        self.channels: list[torch.Tensor] = []
        # why the block's self-attention cannot be measured
        self.strange = False

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """Run an attention call, all [b, s, n, d], and look at it; self-attention's comes first."""
        out = attention(q, k, v)
        self.attended += 1
        heads = (self.model.num_heads, self.model.head_dim)
        if q.shape[1] != self.length or q.shape[2:] != heads or out.shape != q.shape:
            self.strange = True
        elif self.attended > 1:
            self.context += k.shape[1]
            self.cross.append(self._sampled(out).float())
        elif k.shape != q.shape:
            self.strange = True
        else:
            call, grid = self.call, self.call.grid
            where = (grid.frames, grid.height, grid.width), call.on(q.device)[1]
            own = call.own(q), call.own(k)
            self.found["ratio"] = frame_mass(*own, *where, start=grid.start).sum(0)
            self._measure("self", [self._sampled(out).float()])
        return out

    def norm(self, x: torch.Tensor) -> None:
        """The input [b, s, dim] of a norm over all heads."""
        if x.ndim != 3 or x.shape[-1] != self.model.dim:
            return
        # self-attention's and the queries are the video's; the rest are prompts, which are short
        x = self._sampled(x) if x.shape[1] == self.length else self.call.own(x[:, :SAMPLED])
        energy = x.float().unflatten(-1, (self.model.num_heads, -1)).square().sum(-1)
        share = energy / energy.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        self.shares.append((share.mT @ share).sum(0) / share.shape[1])

    def activation(self, hidden: torch.Tensor) -> None:
        """The FFN's hidden state after its activation [b, s, c], whole or in parts of the tokens."""
        if hidden.ndim != 3 or hidden.shape[-1] != self.model.ffn_dim:
            return
        first, self.activated = self.activated, self.activated + hidden.shape[1]
        tokens = self.call.tokens
        here = tokens[(tokens >= first) & (tokens < self.activated)] - first
        if len(here):
            self.channels.append(self.call.own(hidden[:, here.to(hidden.device)]).float())

    def done(self) -> None:
        """The block has run: what it showed counts only now."""
        note = self.call.recorder.note
        if self.strange or not self.attended:
            note("a node changes the attention itself, so that it could not be seen: not recorded")
            return
        if len(self.cross) == 1 + self.image:
            self._measure("cross", self.cross)
        else:
            note("a node changes the cross-attention: its heads were not recorded")
        if len(self.shares) == len(NORMS) - 1 + self.image:
            self.found.update(zip(NORMS, self.shares, strict=False))
        else:
            note("the norms of q and k were not seen: the heads' shares were not recorded")
        if self.activated == self.length:
            hidden = torch.cat(self.channels, 1)
            self.found["channel_energy"] = hidden.square().mean(1).sum(0)
            self._calibrate("ffn", hidden)
        else:
            note(
                "the FFN's hidden state was not seen in all blocks (int8 weights compute it in one "
                "piece): its channels were not recorded there"
            )
        self.call.context = self.context
        self.call.found[self.index] = self.found

    def _measure(self, kind: str, outputs: list[torch.Tensor]) -> None:
        """Eq. 3 of head outputs [r, m, n, d]; text and image part are added (arXiv 2605.27336)."""
        weight = timestep_weight(self.call.sigma)
        # [r, n], a norm for each sample
        sizes = [out.square().mean((1, 3)).sqrt().sum(0) for out in outputs]
        together = sum(outputs)
        self.found[f"{kind}_output"] = weight * sum(sizes)
        self.found[f"{kind}_mean"] = together.mean(1).sum(0)
        self._calibrate(kind, together.flatten(2))

    def _calibrate(self, kind: str, inputs: torch.Tensor) -> None:
        calibration = self.call.recorder.calibration
        if kind in calibration.kinds:
            some = inputs[:, :: -(-inputs.shape[1] // CALIBRATED)]
            calibration.add(kind, self.index, some.flatten(0, 1))

    def _sampled(self, tensor: torch.Tensor) -> torch.Tensor:
        """Conditional rows and sampled tokens of [b, s, ...]."""
        return self.call.own(tensor.index_select(1, self.call.on(tensor.device)[0]))


class BlockWatch(TorchFunctionMode):
    """Shows the norms and the activation of a block that runs within it to its record."""

    def __init__(self, record: BlockRecord):
        super().__init__()
        self.record = record

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.nn.functional.rms_norm, torch.rms_norm):
            self.record.norm(args[0] if args else kwargs["input"])
        out = func(*args, **kwargs)
        if func is torch.nn.functional.gelu:
            self.record.activation(out)
        return out
