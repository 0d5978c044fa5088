"""Kernels and their torch references under the same names; they know tensors, nothing else."""

from .dispatch import frame_mass, smooth_select, token_mass
from .reference import pack_rows, unpack_rows

__all__ = ["frame_mass", "pack_rows", "smooth_select", "token_mass", "unpack_rows"]
