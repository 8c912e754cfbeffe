"""Ornstein-Uhlenbeck processes with closed forms, shared by the tests of path laws."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch

from flowvi.paths import GaussianPath

__all__ = ["OrnsteinUhlenbeck", "divergence", "marginal_path"]


@dataclass(frozen=True)
class OrnsteinUhlenbeck:
    """``dx = (shift - rate x) dt + noise dW`` on [0, 1] from N(mean, sd^2)."""

    rate: float
    shift: float
    noise: float
    mean: float
    sd: float

    def drift(self, x, t):
        return self.shift - self.rate * x

    def mean_at(self, t):
        level = self.shift / self.rate
        return level + (self.mean - level) * torch.exp(-self.rate * t)

    def sd_at(self, t):
        level = self.noise**2 / (2 * self.rate)
        return (level + (self.sd**2 - level) * torch.exp(-2 * self.rate * t)).sqrt()

    def start(self, dim: int = 1):
        return dist.Normal(torch.full((dim,), self.mean), self.sd).to_event(1)


def divergence(q: OrnsteinUhlenbeck, p: OrnsteinUhlenbeck) -> float:
    """KL(q || p) of the two processes, by integrating exponentials by hand."""
    start = math.log(p.sd / q.sd) + (q.sd**2 + (q.mean - p.mean) ** 2) / (2 * p.sd**2) - 0.5
    level, spread = q.shift / q.rate, q.noise**2 / (2 * q.rate)
    a, b = q.mean - level, q.sd**2 - spread
    e1, e2 = -math.expm1(-q.rate) / q.rate, -math.expm1(-2 * q.rate) / (2 * q.rate)
    mean = level + a * e1
    square = level**2 + 2 * level * a * e1 + a**2 * e2 + spread + b * e2
    slope, offset = q.rate - p.rate, p.shift - q.shift
    path = slope**2 * square + 2 * slope * offset * mean + offset**2
    return start + path / (2 * q.noise**2)


def marginal_path(q: OrnsteinUhlenbeck, dim: int = 1) -> GaussianPath:
    """The path whose process is q, given by its marginals alone."""
    return GaussianPath(dim, lambda y, t: q.mean_at(t), lambda y, t: q.sd_at(t), diffusion=q.noise)
