"""Reads what ComfyUI and other packs hand to our hooks.

Packs bring samplers, guiders and forwards of their own, so that everything may be missing or of
another kind: each reading has a fallback.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ...engine.engine import COND

log = logging.getLogger(__name__)


def options_of(model) -> dict:
    """The transformer_options of a MODEL, or of nothing that came in its place."""
    return options_in(getattr(model, "model_options", None))


def options_in(model_options) -> dict:
    """The transformer_options among those of a MODEL or a guider."""
    return as_dict(as_dict(model_options).get("transformer_options"))


def attached(model_options, key: str, lost: str):
    """What a node put under `key` among a guider's options, by which our wrappers go.

    None where another node put options of its own in their place; then it is logged what is `lost`.
    """
    found = options_in(model_options).get(key)
    if found is None:
        log.warning("WanTrim: another node put options of its own in the place of ours: %s", lost)
    return found


@contextmanager
def own_options(guider) -> Iterator[dict]:
    """Within the context a guider goes by a copy of its options, which is yielded."""
    original = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(original)
    try:
        yield guider.model_options
    finally:
        guider.model_options = original


def watch_velocity(options: dict, key: str, see: Callable[[float, torch.Tensor], None]) -> None:
    """Show a run, by its own options, each sigma and velocity [b, c, f, h, w], guidance included."""

    def predict_noise(executor, x, timestep, *args, **kwargs):
        out = executor(x, timestep, *args, **kwargs)
        if isinstance(out, torch.Tensor) and out.shape == x.shape:
            sigma = float(timestep.flatten()[0])
            see(sigma, (x.float() - out.float()) / max(sigma, 1e-6))
        return out

    # last: what other nodes give in place of a call is none
    add_wrapper_with_key(
        WrappersMP.PREDICT_NOISE, key, predict_noise, options, is_model_options=True
    )


def as_dict(value) -> dict:
    """A dict, or an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


class Kept:
    """Travels in a MODEL's options, and stays itself: older hosts deep-copy them with every clone."""

    def __deepcopy__(self, memo):
        return self


@dataclass
class ModelCall:
    """The arguments of one call of the network, as the wrapper got them."""

    x: torch.Tensor
    timestep: torch.Tensor
    context: torch.Tensor | None
    clip_fea: torch.Tensor | None
    time_dim_concat: torch.Tensor | None
    options: dict
    extra: dict

    @classmethod
    def of(
        cls,
        x,
        timestep,
        context,
        clip_fea=None,
        time_dim_concat=None,
        transformer_options=None,
        **extra,
    ) -> ModelCall:
        """As the host calls its network."""
        options = as_dict(transformer_options)
        return cls(x, timestep, context, clip_fea, time_dim_concat, options, extra)

    def run(self, network, options: dict):
        """What a network, or what wraps it, gives with these options."""
        # positional, because other packs' wrappers read the options as the last argument
        own = (self.x, self.timestep, self.context, self.clip_fea, self.time_dim_concat)
        return network(*own, options, **self.extra)

    @property
    def unreadable(self) -> str | None:
        """What is in the way of reading this call, in an artist's words, or None."""
        if isinstance(self.x, torch.Tensor) and self.x.ndim == 5:
            return None
        return (
            "another node called the model with something else than the latent of a video: nothing "
            "was left out there"
        )

    @property
    def levels(self) -> torch.Tensor:
        """Noise levels, of any shape."""
        sigmas = self.options.get("sigmas")
        if isinstance(sigmas, torch.Tensor) and sigmas.numel():
            return sigmas
        return torch.as_tensor(self.timestep, dtype=torch.float32) / 1000

    @property
    def by_frame(self) -> bool:
        """Whether each latent frame has a timestep of its own."""
        return isinstance(self.timestep, torch.Tensor) and self.timestep.ndim > 1

    def read(self, anchored: torch.Tensor) -> tuple[list[float], float, tuple[bool, ...]]:
        """What a dial asks of a run's first call, in one wait for the device.

        Returns:
            The sampler's noise levels, the last included, and none where it does not say; the
            largest of this call; which latent frames are `anchored`.
        """
        sigmas, frames = self.options.get("sample_sigmas"), anchored.float()
        row = isinstance(sigmas, torch.Tensor) and sigmas.ndim == 1
        rest = [self.levels.max().reshape(1), *([sigmas] if row else [])]
        told = torch.cat([frames, *(one.to(frames) for one in rest)]).tolist()
        count = len(frames)
        announced = told[count + 1 :] if row else levels_of(sigmas)
        return announced, told[count], tuple(value > 0 for value in told[:count])

    @property
    def roles(self) -> list[int]:
        """COND or UNCOND for each chunk of the batch; one for all where they do not fit it."""
        roles = self.options.get("cond_or_uncond")
        fits = isinstance(roles, list | tuple) and roles and len(self.x) % len(roles) == 0
        return list(roles) if fits else [COND]

    @property
    def prompts(self) -> tuple:
        """Names of the chunks' prompts, where the host has some."""
        names = self.options.get("uuids")
        return tuple(names) if isinstance(names, list | tuple) else ()

    @property
    def window(self) -> tuple | None:
        """Latent frames of the context window that is being sampled, or None."""
        frames = getattr(self.options.get("context_window"), "index_list", None)
        return None if frames is None else tuple(frames)

    @property
    def text_tokens(self) -> int:
        context = self.context
        return context.shape[1] if isinstance(context, torch.Tensor) and context.ndim == 3 else 0


def levels_of(sigmas) -> list[float]:
    """The noise levels that a guider was given; none of what is no list of numbers."""
    try:
        # in one wait for the device
        return list(map(float, sigmas.tolist() if isinstance(sigmas, torch.Tensor) else sigmas))
    except (TypeError, ValueError):
        return []


def prompts_due(conds, timestep) -> list[tuple[Hashable, int]]:
    """(name, kind) of the prompts with a part of the run of their own that come in a step; none beside
    areas, which are parts of the video, and hooks, by which prompts have other names.

    Args:
        conds: for each kind of prompt its entries, as the host goes through them.
        timestep: [b], as the host compares it.
    """
    kinds = enumerate(conds or ())
    given = [(as_dict(one), kind) for kind, entries in kinds for one in entries or ()]
    if any(one.get(name) is not None for one, _ in given for name in ("area", "default", "hooks")):
        return []
    ranged = [(one, kind) for one, kind in given if {"uuid", "timestep_start"} <= one.keys()]
    if not ranged:
        return []
    # one wait for the device, where the host has one for each; compared as the host does, in fp32
    (at,) = timestep[:1].cpu()
    return [
        (one["uuid"], kind)
        for one, kind in ranged
        if at <= one["timestep_start"] and not ("timestep_end" in one and at < one["timestep_end"])
    ]


def conds_of(guider) -> dict:
    """A guider's prompts by name; empty where it has none or keeps them in its own way."""
    return as_dict(getattr(guider, "conds", None))


def orders_prompts(guider) -> bool:
    """Whether a guider has other prompts than a positive and a negative one."""
    return not {"positive", "negative"}.issuperset(conds_of(guider))


def guidance_of(guider) -> float | None:
    """A guider's guidance (cfg), where one number says it."""
    cfg = getattr(guider, "cfg", None)
    # some packs give a list of numbers, one for each step; a guider of more prompts has others
    known = isinstance(cfg, int | float) and not orders_prompts(guider)
    return float(cfg) if known else None


def prompts_of(guider) -> list[int]:
    """Of the prompts that each step runs, positive and negative or one, how many there are at once."""
    skips_negative = not guider.model_options.get("disable_cfg1_optimization", False)
    conds, cfg = conds_of(guider), guidance_of(guider)
    found = [_at_once(one) for one in conds.values() if one is not None and len(one) > 0]
    if skips_negative and cfg is not None and math.isclose(cfg, 1.0):
        found = found[:1]
    return found or [1]


def _at_once(entries) -> int:
    """Combined prompts, of areas or of one picture; those of different parts of the run take turns."""
    given = [as_dict(one) for one in entries]
    spans = [(one.get("start_percent", 0.0), one.get("end_percent", 1.0)) for one in given]
    return max(1, max(sum(one <= at < end for one, end in spans) for at, _ in spans))
