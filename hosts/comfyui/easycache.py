"""ComfyUI's own EasyCache as a candidate: a threshold for a wanted number of left out steps.

EasyCache (arXiv 2507.02860) leaves out a step when the change that it estimates since the last one
that ran stays below a threshold. What the threshold comes to depends on model, prompt and schedule;
it is looked up in a whole run of the same seed, by the node's own rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .given import options_of

# thresholds that are tried, and the node's own default
LEAST, MOST, TRIED, DEFAULT = 1e-3, 3.0, 240, 0.2
SUBSAMPLE = 8


def easycache_node():
    """The class of the node, or None where this ComfyUI has none that can be imported."""
    try:
        from comfy_extras.nodes_easycache import EasyCacheNode
    except ImportError:
        return None
    return EasyCacheNode


def with_easycache(model):
    """A clone of a MODEL with EasyCache at its defaults."""
    given = {"reuse_threshold": DEFAULT, "start_percent": 0.15, "end_percent": 0.95}
    return easycache_node().execute(model, **given, verbose=False).result[0]


def without_caches(model):
    """A clone of a MODEL without the step caches that ship with ComfyUI; itself where it has none."""
    if "easycache" not in options_of(model):
        return model
    clean = model.clone()
    clean.model_options["transformer_options"].pop("easycache")
    for kind in list(clean.wrappers):
        for key in ("easycache", "lazycache"):
            clean.remove_wrappers_with_key(kind, key)
    return clean


@dataclass
class Probe:
    """What EasyCache would look at in the model calls of a whole run.

    Args:
        first: the prompt whose change it estimates, which is the first of the first call.
        steps: sigma, latent and output of that prompt (every 8th row and column), and mean
            magnitude of the call's output.
    """

    first: object = None
    steps: list[tuple[float, torch.Tensor, torch.Tensor, float]] = field(default_factory=list)

    def see(self, sigma: float, latent: torch.Tensor, output: torch.Tensor, prompts: list) -> None:
        """Take in a model call [b, c, f, h, w]; `prompts` are those of its rows, in order."""
        if not prompts:
            return
        if self.first is None:
            self.first = prompts[0]
        if self.first not in prompts:
            return
        rows = len(latent) // len(prompts)
        own = slice(prompts.index(self.first) * rows, (prompts.index(self.first) + 1) * rows)
        small = (one[own, ..., ::SUBSAMPLE, ::SUBSAMPLE].float().cpu() for one in (latent, output))
        seen = (sigma, *small, float(output.abs().mean()))
        # of context windows of several sizes those of the first one's
        if not self.steps or seen[1].shape == self.steps[0][1].shape:
            self.steps.append(seen)

    def threshold(self, left_out: int, start: float, end: float) -> float:
        """The threshold at which the number of left out steps is nearest to `left_out`.

        Args:
            start, end: sigmas between which it may leave out.
        """
        ratio = (MOST / LEAST) ** (1 / (TRIED - 1))
        tried = [LEAST * ratio**i for i in range(TRIED)]
        off = [abs(self._left_out(one, start, end) - left_out) for one in tried]
        nearest = [one for one, far in zip(tried, off, strict=True) if far == min(off)]
        return nearest[len(nearest) // 2]

    def _left_out(self, threshold: float, start: float, end: float) -> int:
        """Steps that EasyCache leaves out at a threshold (comfy_extras/nodes_easycache.py)."""
        count, change, rate, last = 0, 0.0, None, None
        for sigma, latent, output, size in self.steps:
            if sigma <= end or sigma > start:
                continue
            moved = None if last is None else float((latent - last[0]).abs().mean())
            if moved is not None and rate is not None:
                change += rate * moved / last[2]
                if change < threshold:
                    count += 1
                    continue
                change = 0.0
            if moved:
                rate = float((output - last[1]).abs().mean()) / moved
            last = (latent, output, size)
        return count
