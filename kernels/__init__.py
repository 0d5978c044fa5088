"""Kernels and their torch references under the same names; they know tensors, nothing else."""

from .dispatch import frame_mass, join_rows, store_rows, token_mass
from .reference import Packed

__all__ = ["Packed", "frame_mass", "join_rows", "store_rows", "token_mass"]
