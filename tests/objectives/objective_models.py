"""A conjugate model with local latents, its exact quantities, and guides for it."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from flowvi.objectives import Objective

NOISE = 0.6
LOG_2PI = math.log(2 * math.pi)


def data(size: int) -> Tensor:
    return torch.linspace(-1.5, 2.0, size)


def model(x: Tensor, batch: int | None = None, index: Tensor | None = None) -> None:
    """z_i ~ N(0, 1), x_i ~ N(z_i, NOISE^2)."""
    with pyro.plate("data", len(x), subsample_size=batch, subsample=index) as rows:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x[rows])


class Guide(nn.Module):
    """Independent normals, off the posterior by a shift and a factor of the scale."""

    def __init__(self, x: Tensor, shift: float = 0.3, log_factor: float = 0.25) -> None:
        super().__init__()
        variance = NOISE**2 / (1 + NOISE**2)
        wave = torch.arange(len(x), dtype=x.dtype).sin()
        self.loc = nn.Parameter(x / (1 + NOISE**2) + shift * (1 + 0.5 * wave))
        self.log_scale = nn.Parameter(torch.full_like(x, 0.5 * math.log(variance) + log_factor))

    def forward(self, x: Tensor, batch: int | None = None, index: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), subsample_size=batch, subsample=index) as rows:
            pyro.sample("z", dist.Normal(self.loc[rows], self.log_scale[rows].exp()))


class GivenNoise(dist.Normal):
    """Normal law whose reparameterised draw uses noise given beforehand."""

    eps: Tensor

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> GivenNoise:
        return self

    def rsample(self, sample_shape: torch.Size = ()) -> Tensor:
        return self.loc + self.scale * self.eps


class GivenNoiseGuide(Guide):
    """The same guide with one fixed draw of noise per particle and item."""

    def __init__(self, x: Tensor, num_particles: int) -> None:
        super().__init__(x)
        self.eps = torch.randn(num_particles, len(x))

    def forward(self, x: Tensor, batch: int | None = None, index: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), subsample_size=batch, subsample=index) as rows:
            eps = self.eps[:, rows]
            loc = self.loc[rows].expand(eps.shape)
            law = GivenNoise(loc, self.log_scale[rows].exp().expand(eps.shape))
            law.eps = eps
            pyro.sample("z", law)


def log_evidence(x: Tensor) -> Tensor:
    """Exact log p(x_i) per item, in nats."""
    variance = 1 + NOISE**2
    return -0.5 * (x**2 / variance + math.log(variance) + LOG_2PI)


def log_weight(x: Tensor, z: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Log p(x, z) - log q(z), written out."""
    log_prior = -0.5 * (z**2 + LOG_2PI)
    log_likelihood = -0.5 * (((x - z) / NOISE) ** 2 + LOG_2PI) - math.log(NOISE)
    log_q = -0.5 * (((z - loc) * (-log_scale).exp()) ** 2 + LOG_2PI) - log_scale
    return log_prior + log_likelihood - log_q


def quadratic(x: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Coefficients of log w = a + b eps + c eps^2 with z = loc + scale eps."""
    scale = log_scale.exp()
    points = torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype)[:, None]
    low, middle, high = log_weight(x, loc + scale * points, loc, log_scale)
    return middle, (high - low) / 2, (high + low) / 2 - middle


def log_moment(x: Tensor, loc: Tensor, log_scale: Tensor, power: float) -> Tensor:
    r"""log E_q[w^power] in closed form: a Gaussian integral."""
    a, b, c = quadratic(x, loc, log_scale)
    precision = 1 - 2 * power * c
    return power * a + 0.5 * (power * b) ** 2 / precision - 0.5 * precision.log()


def tempered_mean(x: Tensor, loc: Tensor, log_scale: Tensor, beta: float) -> Tensor:
    r"""Mean of log w under pi_beta in closed form: eps is normal there too."""
    a, b, c = quadratic(x, loc, log_scale)
    precision = 1 - 2 * beta * c
    mean = beta * b / precision
    return a + b * mean + c * (mean**2 + 1 / precision)


def hermite(order: int, particles: int) -> tuple[Tensor, Tensor]:
    """Nodes ``(points, particles)`` and weights of a product rule for standard normals."""
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    grids = torch.meshgrid(*[nodes] * particles, indexing="ij")
    shares = torch.meshgrid(*[weights] * particles, indexing="ij")
    return torch.stack([g.flatten() for g in grids], -1), torch.stack(shares).prod(0).flatten()


class Learned(nn.Module):
    """Model with two parameters and a guide of one normal per item."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x
        self.prior = nn.Parameter(torch.tensor(0.2))
        self.log_noise = nn.Parameter(torch.tensor(-0.4))
        self.loc = nn.Parameter(0.5 * x + 0.2)
        self.log_scale = nn.Parameter(torch.full_like(x, -0.5))

    def model(self) -> None:
        with pyro.plate("data", len(self.x)):
            z = pyro.sample("z", dist.Normal(self.prior, 1.0))
            pyro.sample("x", dist.Normal(z, self.log_noise.exp()), obs=self.x)

    def guide(self) -> None:
        with pyro.plate("data", len(self.x)):
            pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))

    def log_w(self, eps: Tensor, *, constant: bool = False) -> tuple[Tensor, Tensor]:
        """Log-weights by hand; with ``constant`` the density of q keeps its parameters fixed."""
        loc, log_scale = self.loc, self.log_scale
        z = loc + log_scale.exp() * eps
        if constant:
            loc, log_scale = loc.detach(), log_scale.detach()

        def normal(value: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
            return (
                -0.5 * ((value - mean) / log_sd.exp()) ** 2 - log_sd - 0.5 * math.log(2 * math.pi)
            )

        zero = torch.zeros(())
        log_p = normal(z, self.prior, zero) + normal(self.x, z, self.log_noise)
        return log_p - normal(z, loc, log_scale), z

    def run(self, objective: Objective, seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gradient of the bound for all parameters, and the noise that made it."""
        objective.max_plate_nesting = 2
        pyro.set_rng_seed(seed)
        loss = objective.differentiable_loss(self.model, self.guide)
        pyro.set_rng_seed(seed)
        eps = torch.randn(objective.num_particles, len(self.x))
        return torch.autograd.grad(-loss, list(self.parameters())), eps
