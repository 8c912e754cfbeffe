"""Models whose posteriors are known, shared by the tests of guides."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from flowvi.distributions import Flow
from flowvi.transforms import TriangularAffine

DATA = torch.tensor([1.3, -0.4, 2.1, 0.2, 0.9, 1.7], dtype=torch.float64)


def hierarchy(x: Tensor, observations: object = None) -> None:
    """A global mean and one local mean per observation: everything is Gaussian."""
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("items", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def subsampled(batch: int) -> Callable:
    """The same model, showing ``batch`` of its items at a time."""

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("items", len(x), subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

    return model


def hierarchy_posterior(x: Tensor, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Mean and covariance of (mu, z_1 .. z_N) given x, from the joint precision."""
    n = len(x)
    precision = torch.zeros(n + 1, n + 1)
    precision[0, 0] = 1.0 + n
    precision[0, 1:] = precision[1:, 0] = -1.0
    precision[range(1, n + 1), range(1, n + 1)] = 1.0 + noise**-2
    covariance = torch.linalg.inv(precision)
    return covariance @ torch.cat([x.new_zeros(1), x / noise**2]), covariance


def many_supports() -> None:
    """One site of every kind of support, with and without plates."""
    pyro.sample("real", dist.Normal(0.0, 1.0))
    pyro.sample("positive", dist.Gamma(2.0, 1.0))
    pyro.sample("interval", dist.Uniform(-1.0, 3.0))
    pyro.sample("vector", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("matrix", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("cholesky", dist.LKJCholesky(3, 1.0))
    with pyro.plate("plate", 4):
        pyro.sample("positives", dist.LogNormal(0.0, 1.0))
        with pyro.plate("outer", 2):
            pyro.sample("simplices", dist.Dirichlet(torch.ones(3)))


def shake(guide: torch.nn.Module, scale: float = 0.2) -> None:
    """Move every parameter, so that the flow is no longer the identity."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def affine(input_dim: int, context_dim: int = 0) -> Flow:
    """The cheapest recipe, exact for Gaussian posteriors."""
    return Flow(TriangularAffine(input_dim, context_dim))
