"""PARE's four losses (arXiv 2605.27336, section 3.4), one number per sample.

A batch is averaged afterwards, so that the loss of a batch is the same on one process as on
several that share it.
"""

from __future__ import annotations

import math

import torch

# a token is an outlier beyond this many standard deviations
OUTLIER = 3.0


def inlier_tokens(feature: torch.Tensor) -> torch.Tensor:
    """Tokens of a hidden state [b, s, c] whose size is no outlier among its sample's: bool [b, s].

    Wan's hidden states have a few tokens many times as large as the others; a squared error would
    see nothing else.
    """
    size = feature.float().norm(dim=2)
    mean, deviation = size.mean(1, keepdim=True), size.std(1, keepdim=True, correction=0)
    return (size - mean).abs() <= OUTLIER * deviation


def feature_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error of a hidden state [b, s, c] against the teacher's, without outliers: [b].

    Relative to the teacher's mean square, so that a block's weight does not depend on how large its
    hidden state is (ours). The paper's projection P is the identity: the residual width is never
    cut, so both speak the same space, and a learned P would let them drift apart.
    """
    teacher = teacher.detach().float()
    inside = inlier_tokens(teacher)[..., None].float()
    error = ((student.float() - teacher).square() * inside).sum((1, 2))
    return error / (teacher.square() * inside).sum((1, 2)).clamp(min=1e-12)


def velocity_loss(velocity: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared error of a velocity [b, c, f, h, w]: [b]."""
    return (velocity.float() - wanted.detach().float()).square().flatten(1).mean(1)


def temporal_loss(velocity: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the differences between neighbouring latent frames: [b].

    0 for a single latent frame.
    """
    if velocity.shape[2] == 1:
        return velocity.new_zeros(len(velocity), dtype=torch.float32)
    error = velocity.float() - wanted.detach().float()
    return error.diff(dim=2).square().flatten(1).mean(1)


def timestep_weights(sigma: torch.Tensor) -> torch.Tensor:
    """w(t) = log(1 + t/T) for t/T = sigma [b], over its mean for evenly spread sigmas: [b].

    Ours: the paper weighs timesteps so where it scores heads (eq. 3), and no loss. The mean of 1
    leaves learning rates as they are.
    """
    return torch.log1p(sigma.float()) / (2 * math.log(2) - 1)
