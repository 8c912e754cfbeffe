"""A model with a global and local latents, its exact terms, and a guide for it."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch


def ladder(x):
    top = pyro.sample("top", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("items", len(x)):
        z = pyro.sample("z", dist.Normal(top, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


class LadderGuide(torch.nn.Module):
    def __init__(self, size, batch=None):
        super().__init__()
        self.size, self.batch = size, batch
        self.top = torch.nn.Parameter(torch.tensor([0.4, -0.3]))
        self.local = torch.nn.Parameter(torch.randn(size, 2) * 0.3)

    def forward(self, x):
        pyro.sample("top", dist.Normal(self.top[0], self.top[1].exp()))
        with pyro.plate("items", self.size, subsample_size=self.batch) as index:
            local = self.local[index]
            pyro.sample("z", dist.Normal(local[:, 0], local[:, 1].exp()))


def subsampled(size, batch):
    def model(x):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        with pyro.plate("items", size, subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(top, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x[index])

    return model


def ladder_terms(x, guide):
    """Likelihood, KL of `top` and of `z`, from expectations of quadratics."""

    def cross(mean, var, loc, scale2):
        return -0.5 * ((mean - loc) ** 2 + var) / scale2 - 0.5 * math.log(2 * math.pi * scale2)

    def entropy(log_scale):
        return log_scale + 0.5 * math.log(2 * math.pi * math.e)

    m, v = guide.top[0], (2 * guide.top[1]).exp()
    a, w = guide.local[:, 0], (2 * guide.local[:, 1]).exp()
    likelihood = cross(a, w, x, 0.49).sum()
    kl_top = -entropy(guide.top[1]) - cross(m, v, 0.0, 1.0)
    kl_z = (-entropy(guide.local[:, 1]) - cross(a, w + v, m, 1.0)).sum()
    return likelihood, kl_top, kl_z


def mean_loss_and_gradient(objective, model, guide, x, steps):
    params = list(guide.parameters())
    values, grads = [], []
    for _ in range(steps):
        loss = objective.differentiable_loss(model, guide, x)
        values.append(-loss.detach())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(-loss, params)]))
    return torch.stack(values), torch.stack(grads)


def check_mean(draws, truth, errors):
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - truth).abs() < errors * error + 1e-12).all()
