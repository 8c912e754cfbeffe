"""A model with a global mean and scale, its guide and its data, for tests of compiled steps."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

DATA = torch.tensor([1.3, -0.4, 2.1, 0.2, 0.9], dtype=torch.float64)


def model(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def guide(y: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor([0.3, -0.2]))
    scale = pyro.param("sd", torch.tensor([0.5, 0.8]), constraint=dist.constraints.positive)
    pyro.sample("mean", dist.Normal(loc[0], scale[0]))
    pyro.sample("scale", dist.LogNormal(loc[1], scale[1]))
