"""Normal starts and normal data under a linear coupling: everything in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from flowvi.nn import VectorField


def root(matrix: Tensor) -> Tensor:
    """Symmetric square root."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.sqrt().diag() @ vectors.T


@dataclass(frozen=True)
class LinearCase:
    r"""Data N(0, S), start N(0, I), :math:`q(z_0 \mid z_1) = N(A z_1, V)`, path noise sigma.

    Args:
        data: S, ``(dim, dim)``.
        slope: A.
        noise: V.
        sigma: noise of the Brownian bridge; 0 for straight lines.
    """

    data: Tensor
    slope: Tensor
    noise: Tensor
    sigma: float

    @classmethod
    def independent(cls, data: Tensor, sigma: float) -> LinearCase:
        dim, data = len(data), data.double()
        return cls(data, torch.zeros(dim, dim), torch.eye(dim), sigma)

    @classmethod
    def bridge(cls, data: Tensor, sigma: float) -> LinearCase:
        """The Schroedinger bridge."""
        eye, data = torch.eye(len(data)), data.double()
        cross = (root(4 * data + sigma**4 * eye) - sigma**2 * eye) / 2
        slope = cross @ torch.linalg.inv(data)
        return cls(data, slope, eye - slope @ cross.T, sigma)

    @property
    def dim(self) -> int:
        return len(self.data)

    @property
    def entropy(self) -> float:
        return float(dist.MultivariateNormal(torch.zeros(self.dim), self.data).entropy())

    @property
    def divergence(self) -> float:
        """Mean over the data of KL[q(z_0|z_1) || p_0]."""
        trace = torch.trace(self.slope @ self.data @ self.slope.T + self.noise)
        return float(trace - self.dim - torch.logdet(self.noise)) / 2

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Variances of state and of drift, and their covariance, ``(*times, dim, dim)``.

        The drift is (z_1 - z_t) / (1 - t); with sigma = 0 that is z_1 - z_0.
        """
        t = t[..., None, None]
        cross = self.slope @ self.data
        start = self.slope @ cross.T + self.noise
        both = t * (1 - t) * (cross + cross.T)
        var = (1 - t) ** 2 * start + t**2 * self.data + both
        var = var + self.sigma**2 * t * (1 - t) * torch.eye(self.dim)
        with_end = (1 - t) * cross.T + t * self.data
        lag = (with_end - var) / (1 - t)
        drift = (self.data - with_end - with_end.mT + var) / (1 - t) ** 2
        return var, drift, lag

    def gain(self, t: Tensor) -> Tensor:
        """Matrix K of the best field f = K(t) x."""
        var, _, lag = self.moments(t)
        return torch.linalg.solve(var, lag, left=False)

    def integral(self, values: object) -> float:
        """Integral over time by the Gauss-Legendre rule, of a function of times."""
        from numpy.polynomial.legendre import leggauss

        nodes, weights = (torch.as_tensor(a) for a in leggauss(200))
        return float((values((nodes + 1) / 2) * weights / 2).sum())

    @property
    def residual(self) -> float:
        """Least mean of |z_1 - z_0 - f|^2 over time; sigma = 0."""

        def left(t: Tensor) -> Tensor:
            _, drift, lag = self.moments(t)
            return (drift - self.gain(t) @ lag.mT).diagonal(dim1=-1, dim2=-2).sum(-1)

        return self.integral(left)

    @property
    def bound(self) -> float:
        """Mean bound of the Brownian bridge with the best field."""
        shift = torch.eye(self.dim) - self.slope
        square = torch.trace(shift @ self.data @ shift.T + self.noise)
        reference = -self.dim * math.log(2 * math.pi * self.sigma**2) / 2
        reference = reference - float(square) / (2 * self.sigma**2)

        def gained(t: Tensor) -> Tensor:
            lag = self.moments(t)[2]
            return (self.gain(t) @ lag.mT).diagonal(dim1=-1, dim2=-2).sum(-1)

        path = self.integral(gained) / (2 * self.sigma**2)
        return reference + path - self.divergence

    def items(self, number: int) -> Tensor:
        return torch.randn(number, self.dim) @ torch.linalg.cholesky(self.data).T

    def posterior(self) -> nn.Module:
        return _LinearPosterior(self.slope, self.noise)

    def field(self) -> VectorField:
        return _LinearField(self)


class _LinearPosterior(nn.Module):
    def __init__(self, slope: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.register_buffer("slope", slope)
        self.register_buffer("tril", torch.linalg.cholesky(noise))

    def forward(self, x: Tensor) -> dist.Distribution:
        return dist.MultivariateNormal(x @ self.slope.T, scale_tril=self.tril)


class _LinearField(VectorField):
    def __init__(self, case: LinearCase) -> None:
        super().__init__(case.dim)
        self.case = case
        # Modules of the library find their dtype by a parameter.
        self.scale = nn.Parameter(torch.ones(()))

    def velocity(self, time: Tensor, x: Tensor, prepared: None) -> Tensor:
        # The last time is a removable singularity.
        gain = self.case.gain(time.clamp(max=1 - 1e-9))
        return self.scale * (gain @ x.unsqueeze(-1)).squeeze(-1)


def full_covariance(dim: int) -> Tensor:
    """A covariance with correlations, sds from 0.7 to 2."""
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(dim, dim, generator=generator)
    vectors = torch.linalg.qr(factor)[0]
    return vectors @ torch.linspace(0.7, 2.0, dim).square().diag() @ vectors.T
