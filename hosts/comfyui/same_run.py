"""What a sampling is made of besides its MODEL, so that the same one is known again."""

from __future__ import annotations

import hashlib

import torch


def sampler_name(sampler) -> str:
    """Of a stock sampler, such as "euler"; empty for others."""
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    return name.removeprefix("sample_")


def sampling_key(guider, given: dict) -> str:
    """What a sampling is made of besides the MODEL: noise, latent, steps, sampler, prompts."""
    sampler = given.get("sampler")
    parts = [given.get(name) for name in ("noise", "latent_image", "sigmas", "denoise_mask")]
    parts += [given.get("seed"), getattr(guider, "cfg", None), type(guider).__name__]
    parts += [sampler_name(sampler), getattr(sampler, "extra_options", None)]
    parts += [getattr(guider, "original_conds", None)]
    found = hashlib.blake2b(digest_size=16)
    _digest(parts, found)
    return found.hexdigest()


def _digest(value, into) -> None:
    if isinstance(value, torch.Tensor):
        into.update(f"{value.dtype}{tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous().flatten()
        into.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            # new in every run
            if name != "uuid":
                into.update(str(name).encode())
                _digest(value[name], into)
    elif isinstance(value, list | tuple):
        into.update(b"[")
        for one in value:
            _digest(one, into)
        into.update(b"]")
    elif value is None or isinstance(value, str | int | float | bool):
        into.update(repr(value).encode())
    else:
        # a control net, a hook: the same object or another
        into.update(str(id(value)).encode())
