"""Gaussian targets and guides with everything known."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from flowvi.infer.draws import Draws
from flowvi.infer.target import Target

DIM = 4
LOC = torch.tensor([1.0, -2.0, 0.5, 30.0], dtype=torch.float64)
SCALE_TRIL = torch.tensor(
    [[1.0, 0, 0, 0], [0.8, 0.6, 0, 0], [0.0, 0.1, 0.05, 0], [4.0, -3.0, 2.0, 10.0]],
    dtype=torch.float64,
)
LOG_Z = 1.7


def model():
    x = pyro.sample("x", dist.Normal(torch.zeros(DIM), 1.0).to_event(1).mask(False))
    normal = dist.MultivariateNormal(LOC, scale_tril=SCALE_TRIL, validate_args=False)
    pyro.factor("density", normal.log_prob(x) + LOG_Z)


def guide_law(scale=1.0, shift=0.0):
    """The posterior, rescaled about its mean and moved by ``shift`` sd in every coordinate."""
    loc = LOC + shift * SCALE_TRIL.square().sum(-1).sqrt()
    return dist.MultivariateNormal(loc, scale_tril=scale * SCALE_TRIL)


def exact_draws(num_draws, scale=1.0, shift=0.0):
    law = guide_law(scale, shift)
    z = law.sample((num_draws,))
    return Draws(z, law.log_prob(z), target().log_prob(z), {"x": z})


def guide_of(scale=1.0, shift=0.0):
    def guide():
        pyro.sample("x", guide_law(scale, shift))

    return guide


_TARGET = []


def target():
    if not _TARGET:
        _TARGET.append(Target(model))
    return _TARGET[0]
