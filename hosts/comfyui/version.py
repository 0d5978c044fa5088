"""Which ComfyUI the pack runs in; docs/versions.md says how that is known."""

from __future__ import annotations

import re

# as requires-comfyui in pyproject.toml
OLDEST = "0.16.0"


class TooOld(RuntimeError):
    """This ComfyUI lacks what the pack needs; the message is for the artist."""


def check_comfyui() -> None:
    """Refuse a ComfyUI that is too old, before anything of it fails in words of its own.

    One that says no number is taken to be new.
    """
    version = comfyui_version()
    came = _numbers(version)
    if came and came < _numbers(OLDEST):
        raise TooOld(
            f"WanTrim needs ComfyUI {OLDEST} or newer, and this is ComfyUI {version}. Update "
            "ComfyUI; until then the nodes of WanTrim are missing."
        )


def comfyui_version() -> str:
    """As ComfyUI says it; empty where it does not."""
    try:
        from comfyui_version import __version__
    except ImportError:
        # a fork, or one from before 2025
        return ""
    return __version__


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 16, 0) of "0.16.0" and of "v0.16.0-dev"; nothing where there is no number."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in found[1].split(".")) if found else ()
