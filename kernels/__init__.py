"""Kernels and their torch references under the same names; they know tensors, nothing else."""

from .dispatch import frame_mass, rms_rope, smooth_select, token_mass

__all__ = ["frame_mass", "rms_rope", "smooth_select", "token_mass"]
