"""Gaussians as location and lower-triangular scale; Cholesky factors that bear bad scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "DensityAndGrad",
    "Gaussian",
    "antithetic",
    "average",
    "lower_factor",
    "robust_cholesky",
]

DensityAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Points ``(num_points, dim)`` to guarded log-densities ``(num_points,)`` and gradients."""


@dataclass(frozen=True)
class Gaussian:
    """A normal law with mean ``loc`` ``(dim,)`` and covariance ``scale_tril @ scale_tril.T``."""

    loc: Tensor
    scale_tril: Tensor

    @property
    def is_finite(self) -> bool:
        """Whether mean and scale are finite and the scale is not singular."""
        finite = torch.isfinite(self.loc).all() & torch.isfinite(self.scale_tril).all()
        return bool(finite & (self.scale_tril.diagonal() > 0).all())

    @property
    def log_det(self) -> Tensor:
        """Log-determinant of the scale."""
        return self.scale_tril.diagonal().log().sum()

    def at(self, eps: Tensor) -> Tensor:
        """Draws made from standard normal ``eps`` ``(num_draws, dim)``."""
        return self.loc + eps @ self.scale_tril.T

    def log_prob_of_noise(self, eps: Tensor) -> Tensor:
        """Log-density at the draws made from ``eps``, in nats."""
        constant = 0.5 * eps.shape[-1] * math.log(2 * math.pi)
        return -0.5 * (eps**2).sum(-1) - self.log_det - constant

    def distance(self, z: Tensor) -> Tensor:
        """Mahalanobis distance of ``z`` ``(num_points, dim)`` from the mean."""
        white = torch.linalg.solve_triangular(self.scale_tril, (z - self.loc).T, upper=False)
        return white.norm(dim=0)


def antithetic(num_draws: int, dim: int, generator: torch.Generator) -> Tensor:
    """Standard normal float64 draws in opposite pairs, ``(num_draws, dim)``."""
    half = torch.randn((num_draws + 1) // 2, dim, generator=generator, dtype=torch.float64)
    return torch.cat([half, -half])[:num_draws]


def average(gaussians: Sequence[Gaussian]) -> Gaussian:
    """The Gaussian with the mean location and the mean covariance."""
    factors = torch.cat([gaussian.scale_tril for gaussian in gaussians], -1)
    loc = torch.stack([gaussian.loc for gaussian in gaussians]).mean(0)
    return Gaussian(loc, lower_factor(factors / len(gaussians) ** 0.5))


def lower_factor(factor: Tensor) -> Tensor:
    """Lower-triangular ``L`` with positive diagonal and ``L L^T = factor factor^T``.

    By QR of the transpose, so that the product, with its squared condition, is never formed.
    """
    upper = torch.linalg.qr(factor.T, mode="r")[1]
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(upper)
    return upper.T * signs


def robust_cholesky(matrix: Tensor, floor: float = 1e-11) -> Tensor:
    """Cholesky factor of a symmetric matrix, eigenvalues floored after scaling to unit diagonal.

    Scales that differ by many orders of magnitude survive; only correlations are floored.

    Args:
        matrix: symmetric ``(dim, dim)`` with a positive diagonal.
        floor: least eigenvalue of the scaled matrix, relative to its largest.
    """
    scale = matrix.diagonal().clamp(min=1e-300).sqrt()
    scaled = matrix / scale[:, None] / scale
    values, vectors = torch.linalg.eigh(0.5 * (scaled + scaled.T))
    values = values.clamp(min=floor * values.max())
    return lower_factor(scale[:, None] * vectors * values.sqrt())
