"""Kernels and their torch references under the same names; they know tensors, nothing else."""
